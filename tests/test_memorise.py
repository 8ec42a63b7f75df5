"""Eight pictures are learnt by heart by both trainings, within a minute: what cannot do this cannot learn at all."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from flexvar.cli import main
from training_runs import measurements

CONFIG = """
workers: 0
measure: 1
batch: 8
sizes: [[32, 32]]
report_every: 100
save_every: 1000
sheet_every: 1000
data: {{kind: folder, path: {pictures}, flip: false, resize: [1.0, 1.0]}}
"""

TOKENIZER = """
run: {run}
steps: 300
scales: 2
continuous: 0.3
l1: 1.0
restart_every: 20
model: {{channels: 16, multipliers: [1, 2, 2], blocks: 1, z_channels: 32, norm_groups: 8, codebook_size: 256, code_width: 8}}
optimiser: {{learning_rate: 3e-3, weight_decay: 0.0, clip: 1.0, warm_up: 0.05, flat: 0.4, end: 0.02, ema: 0.95}}
"""

TRANSFORMER = """
run: {run}
tokenizer: {tokenizer}
steps: 120
label_drop: 0.0
model: {{depth: 2, width: 128, heads: 2}}
optimiser: {{learning_rate: 3e-3, weight_decay: 0.0, clip: 2.0, warm_up: 0.05, flat: 0.4, end: 0.05, ema: 0.9}}
"""


def test_eight_pictures_are_memorised(tmp_path: Path, capsys) -> None:
    pictures = tmp_path / "pictures"
    assert main(["data", "shapes", str(pictures), "--count", "1", "--height", "32", "--width", "32"]) == 0
    for name in ("ring", "arrow"):
        shutil.rmtree(pictures / name)
    assert len(list(pictures.rglob("*.png"))) == 8
    began = time.process_time()
    for stage, text in (("tokenizer", TOKENIZER), ("transformer", TRANSFORMER)):
        config = tmp_path / f"{stage}.yaml"
        config.write_text((CONFIG + text).format(pictures=pictures, run=tmp_path / stage, tokenizer=tmp_path / "tokenizer" / "model"))
        assert main(["train", stage, str(config)]) == 0
    assert time.process_time() - began < 60
    assert measurements(tmp_path / "tokenizer")[-1]["measured"]["by_scale"]["8x8"]["psnr"] > 25
    assert measurements(tmp_path / "transformer")[-1]["measured"]["accuracy"] > 0.95
