"""What docs/training.md says about the memory of a step of training, against what a small one allocates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flexvar.counting import LiveBytes
from flexvar.schedule import Schedule
from flexvar.transformer import Transformer, TransformerConfig

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
MODEL, KEPT, RECOMPUTED, LOGIT = 22, 67, 6, 16  # bytes a parameter; a token, block and channel; the same with recompute; a token and code


def working(config: TransformerConfig, tokens: int, recompute: bool) -> int:
    """Bytes beside those of the model."""
    block = KEPT * config.width * tokens
    kept = RECOMPUTED * config.width * config.depth * tokens if recompute else config.depth * block
    return kept + max(LOGIT * config.codebook_size * tokens, block)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("codes", [64, 1024])
def test_what_a_step_allocates(codes: int, recompute: bool) -> None:
    config = TransformerConfig(depth=4, width=64, heads=1, classes=10, codebook_size=codes, code_width=8)
    transformer, schedule, batch = Transformer(config).train(), Schedule.square([1, 2, 4, 8, 12]), 4
    for parameter in transformer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    labels, inputs = torch.zeros(batch, dtype=torch.int64), torch.randn(batch, schedule.tokens - schedule.first, 8)
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16):
            logits = transformer(labels, inputs, schedule, paths=torch.ones(4, 2, batch), recompute=recompute)  # (B, L, V)
            targets = torch.zeros(batch, schedule.tokens, dtype=torch.int64)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.mean().backward()
    copy = 2 * sum(parameter.numel() for parameter in transformer.parameters())
    assert live.most - copy == pytest.approx(working(config, batch * schedule.tokens, recompute), rel=0.15)


def test_the_table_is_the_formula() -> None:
    rows = re.findall(r"^\| d(\d+) \| ([\d.]+) \| ([\d.]+), ([\d.]+) \| ([\d.]+), ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [16, 20, 24, 30]
    for depth, *said in rows:
        config = TransformerConfig(depth=int(depth))
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
        pictures = [working(config, tokens, recompute) for recompute in (False, True) for tokens in (930, 1357)]
        assert [float(text) for text in said] == pytest.approx([size / 1e9 for size in (MODEL * parameters, *pictures)], rel=0.02)
