"""What training looked like: `python -m benchmarks.curves RUN [RUN ...] --out curves.png`, from the logs of runs (needs matplotlib).

A row a run. Of a tokenizer: its loss, the PSNR of batches and, at some scales, of pictures held out, the codes in use. Of a transformer:
its loss beside that of guessing, its FID where it was scored, and loss and accuracy at some of the square scales that came in most reports.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(run: Path) -> tuple[list[Line], list[Line], list[Line]]:
    """Reports, measurements and scores of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    reports, measured, scored = ([line for line in lines if kind in line] for kind in ("loss", "measured", "scores"))
    return reports, measured, scored


def series(lines: Sequence[Line], *path: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it was reported."""
    steps, values = [], []
    for line in lines:
        value: Any = line
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            steps.append(line["step"])
            values.append(value)
    return steps, values


def plot(axis: Any, lines: Sequence[Line], *path: str, label: str, **style: Any) -> None:
    """The curve of a figure, where the run reported it at all."""
    steps, values = series(lines, *path)
    if steps:
        axis.plot(steps, values, label=label, **style)


def thinned(scales: Sequence[str]) -> Sequence[str]:
    """Four or five of the scales, the finest among them."""
    return scales[:: -max(1, len(scales) // 4)][::-1]


def draw(runs: Sequence[Path], out: Path) -> None:
    """The picture of all curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(runs), 3, figsize=(13, 3.6 * len(runs)), squeeze=False, layout="constrained")
    for run, axes in zip(runs, rows, strict=True):
        reports, measured, scored = read(run)
        _of_transformer(axes, reports, measured, scored) if "accuracy" in reports[-1] else _of_tokenizer(axes, reports, measured)
        axes[0].set_ylabel(run.name)
        for axis in axes:
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(out, dpi=90)


def _of_tokenizer(axes: Any, reports: list[Line], measured: list[Line]) -> None:
    plot(axes[0], reports, "loss", label="loss of batches")
    axes[0].set_yscale("log")
    plot(axes[1], reports, "psnr", label="PSNR of batches, native scale, dB", alpha=0.5)
    for scale in thinned(list(measured[-1]["measured"]["by_scale"]) if measured else []):
        plot(axes[1], measured, "measured", "by_scale", scale, "psnr", label=f"unseen, {scale}")
    plot(axes[2], reports, "codes_in_use", label="codes in use since the last look")
    plot(axes[2], measured, "measured", "use", label="codes in use, unseen")
    axes[2].set_ylim(0, 1.05)


def _of_transformer(axes: Any, reports: list[Line], measured: list[Line], scored: list[Line]) -> None:
    plot(axes[0], reports, "loss", label="loss of batches")
    plot(axes[0], measured, "measured", "loss", label="loss, unseen, averaged weights")
    plot(axes[0], measured, "measured", "loss_of_guessing", label="guessing", color="grey", linestyle="--")
    if scored:
        beside = axes[0].twinx()
        plot(beside, scored, "scores", "fid", label="FID (right)", color="tab:green", marker=".")
        beside.set_ylim(bottom=0)
        beside.legend(fontsize=8, loc="center right")
    often = Counter(scale for report in reports for scale in report["loss_by_scale"])
    square = [scale for scale, count in often.items() if len(set(scale.split("x"))) == 1 and 2 * count > len(reports)]
    sides = sorted(int(scale.split("x")[0]) for scale in square)
    for scale in thinned([f"{side}x{side}" for side in sides]):
        plot(axes[1], reports, "loss_by_scale", scale, label=f"loss, {scale}")
        plot(axes[2], reports, "accuracy_by_scale", scale, label=f"accuracy, {scale}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    draw(words.runs, words.out)


if __name__ == "__main__":
    main()
