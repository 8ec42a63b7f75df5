from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import curves
from PIL import Image

SCALES = [f"{side}x{side}" for side in range(1, 11)]


def write_log(run: Path, reports: list[dict], measured: list[dict], scored: list[dict] | None = None) -> Path:
    """A run folder with nothing but its log."""
    run.mkdir()
    lines = [*reports, *({"step": step, "measured": line} for step, line in enumerate(measured, 1))]
    lines += [{"step": step, "scores": line} for step, line in enumerate(scored or [], 1)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


@pytest.mark.parametrize("held_out", [True, False])
def test_curves_of_both_trainings(tmp_path: Path, held_out: bool, monkeypatch) -> None:
    tokenizer = write_log(
        tmp_path / "tokenizer",
        [{"step": step, "loss": 1 / step, "psnr": 10 + step, "codes_in_use": 0.5} for step in (1, 2, 3)],
        [{"by_scale": {scale: {"psnr": 9 + step} for scale in SCALES}, "use": 0.4} for step in (1, 2)] * held_out,
    )
    by_scale = {"loss_by_scale": dict.fromkeys(SCALES, 2.0), "accuracy_by_scale": dict.fromkeys(SCALES, 0.1)}
    transformer = write_log(
        tmp_path / "transformer",
        [{"step": step, "loss": 3 / step, "accuracy": 0.1, **by_scale} for step in (1, 2, 3)],
        [{"loss": 2.0, "loss_of_guessing": 6.9}] * held_out,
        [{"fid": 30.0}, {"fid": 12.0}] * held_out,
    )
    monkeypatch.setattr("sys.argv", ["curves", str(tokenizer), str(transformer), "--out", str(tmp_path / "curves.png")])
    curves.main()
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 10


def test_few_of_many_scales_the_finest_among_them() -> None:
    for count in range(1, 30):
        some = curves.thinned([str(scale) for scale in range(count)])
        assert some[-1] == str(count - 1)
        assert len(some) <= 7
        assert sorted(map(int, some)) == list(map(int, some))
