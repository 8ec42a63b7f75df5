"""Both trainings, small enough for seconds, learn eight pictures by heart: what cannot do that cannot learn at all."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from flexvar.cli import main
from training_runs import measurements

BOTH = """
batch: 8
sizes: [[32, 32]]
workers: 0
report_every: 1000
save_every: 1000
sheet_every: 1000
measure: 1
data: {kind: folder, path: PICTURES, flip: false, resize: [1.0, 1.0]}
"""
TOKENIZER = """
steps: 180
scales: 2
continuous: 0.3
l2: 4.0
restart_every: 20
model: {channels: 16, multipliers: [1, 2, 4, 4, 4], blocks: 1, z_channels: 32, norm_groups: 16, codebook_size: 128, code_width: 16}
optimiser: {learning_rate: 2.5e-3, weight_decay: 0.0, clip: 1.0, warm_up: 0.1, flat: 0.4, end: 0.02, ema: 0.9}
"""
TRANSFORMER = """
steps: 80
tokenizer: TOKENIZER
label_drop: 0.0
model: {depth: 2, width: 64, heads: 2}
optimiser: {learning_rate: 5.0e-3, weight_decay: 0.0, flat: 0.4, end: 0.02, ema: 0.9}
"""


@pytest.fixture
def eight_pictures(tmp_path: Path) -> Path:
    """A folder of eight class folders with a picture each."""
    folder = tmp_path / "pictures"
    assert main(["data", "shapes", str(folder), "--count", "1", "--height", "32", "--width", "32"]) == 0
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir())[8:]:
        shutil.rmtree(class_folder)
    assert len(list(folder.rglob("*.png"))) == 8
    return folder


def test_eight_pictures_are_learnt_by_heart(eight_pictures: Path, tmp_path: Path, capsys) -> None:
    """Measured on these very pictures, with averaged weights: the tokenizer's PSNR, the share of codes that the transformer knows."""
    tokenizer, transformer = tmp_path / "tokenizer", tmp_path / "transformer"
    of_both = BOTH.replace("PICTURES", str(eight_pictures))
    began = time.process_time()

    (tmp_path / "tokenizer.yaml").write_text(of_both + TOKENIZER)
    assert main(["train", "tokenizer", str(tmp_path / "tokenizer.yaml"), f"run={tokenizer}"]) == 0
    assert measurements(tokenizer)[-1]["measured"]["by_scale"]["2x2"]["psnr"] > 25

    (tmp_path / "transformer.yaml").write_text(of_both + TRANSFORMER.replace("TOKENIZER", str(tokenizer / "model")))
    assert main(["train", "transformer", str(tmp_path / "transformer.yaml"), f"run={transformer}"]) == 0
    measured = measurements(transformer)[-1]["measured"]
    assert list(measured["accuracy_by_scale"]) == ["1x1", "2x2"]
    assert measured["accuracy"] > 0.95
    assert time.process_time() - began < 60
