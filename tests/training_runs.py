"""Trainings small enough for tests, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TOKENIZER = """
run: {run}
steps: {steps}
batch: 4
sizes: [[16, 16], [16, 24]]
scales: 2
workers: 0
report_every: 1
save_every: 2
sheet_every: 100
restart_every: 2
measure: 1
model: {{channels: 8, multipliers: [1, 2, 2], blocks: 1, z_channels: 8, norm_groups: 4, codebook_size: 16, code_width: 4}}
optimiser: {{learning_rate: 1e-2}}
data: {{kind: shapes}}
"""

TRANSFORMER = """
run: {run}
tokenizer: {tokenizer}
steps: {steps}
batch: 4
sizes: [[16, 16], [16, 24]]
workers: 0
report_every: 1
save_every: 2
sheet_every: 100
measure: 1
drop_path: 0.1
sheet_labels: [0, 1]
model: {{depth: 2, width: 16, heads: 2}}
optimiser: {{learning_rate: 1e-2, ema: 0.9}}
data: {{kind: shapes}}
"""


def tokenizer_config(folder: Path, steps: int = 4, name: str = "tokenizer") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(TOKENIZER.format(run=folder / name, steps=steps))
    return path


def transformer_config(folder: Path, tokenizer: Path, steps: int = 4, name: str = "transformer") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(TRANSFORMER.format(run=folder / name, steps=steps, tokenizer=tokenizer))
    return path


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def reports(run: Path) -> list[dict]:
    """The log without the lines of measurements."""
    return [line for line in lines(run) if "loss" in line]


def measurements(run: Path) -> list[dict]:
    return [line for line in lines(run) if "measured" in line]


def newest_state(run: Path) -> dict:
    return torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def assert_equal(one: object, two: object, what: str) -> None:
    """Tensors, numbers, and tables of them."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), what
        for name in one:
            assert_equal(one[name], two[name], f"{what}: {name}")
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, what


def assert_same_end(one: Path, two: Path) -> None:
    """Two runs whose weights, averages and losses are equal, bit for bit."""
    first, second = newest_state(one), newest_state(two)
    for part in ("workshop", "average"):
        assert_equal(first[part], second[part], part)
    assert [report["loss"] for report in reports(one)] == [report["loss"] for report in reports(two)]
    assert [line["measured"] for line in measurements(one)] == [line["measured"] for line in measurements(two)]
