"""Figures of many steps and processes, averaged; peaks of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flexvar.processes import world_size

Figures = dict[str, Tensor]
"""Scalars by name; "loss/4x4" is the loss of the scale 4x4."""


@dataclass(frozen=True)
class Work:
    """What a process does in one step."""

    tokens: int = 0
    flops: int = 0


class Meter:
    """Sums figures without waiting for the device; `averages` waits, and asks the other processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, figures: Figures) -> None:
        """Takes in the figures of one step; not all steps have the same ones, but all processes have."""
        for name, figure in figures.items():
            self.sums[name] = self.sums.get(name, 0) + figure.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def averages(self, alone: bool = False) -> dict[str, float]:
        """The mean of each figure since the last call, over all processes or this one alone, in the order of the names."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        if dist.is_initialized() and not alone:
            dist.all_reduce(means)
            means /= world_size()
        self.sums, self.counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))


def peak_memory(device: torch.device) -> dict[str, float]:
    """`peak_memory_gib`: the most that tensors took on a GPU since this was last asked; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_gib": peak}


def nested(figures: dict[str, float]) -> dict[str, float | dict[str, float]]:
    """Figures of scales gathered under their own name: {"loss/2x2": 1} becomes {"loss_by_scale": {"2x2": 1}}, coarser scales first."""
    result: dict[str, float | dict[str, float]] = {name: value for name, value in figures.items() if "/" not in name}
    of_scales = [(name.split("/"), value) for name, value in figures.items() if "/" in name]
    for (name, scale), value in sorted(of_scales, key=lambda item: [int(side) for side in item[0][1].split("x")]):
        group = result.setdefault(f"{name}_by_scale", {})
        assert isinstance(group, dict)
        group[scale] = value
    return result
