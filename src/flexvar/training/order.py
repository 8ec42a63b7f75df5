"""The order of the data: one endless sequence, the permutations of epochs 0, 1, 2, ... laid end to end.

Step t takes positions [tG, (t+1)G) and each process its share of them, so that nothing is dropped or repeated at any number of processes,
and the place in the data is the step number. Everything random about a picture follows from (seed, position), everything about a step
from (seed, step): there is no random state to save.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flexvar.data.source import PictureSource

PICTURE, LABEL, PATHS = 0, 1, 2
"""What a random stream of a position is for."""


@dataclass(frozen=True)
class Batch:
    """One process's share of a step."""

    step: int
    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,) int64
    positions: tuple[int, ...]  # of each picture in the endless sequence

    def to(self, device: torch.device) -> Batch:
        return Batch(self.step, self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.positions)


def step_random(seed: int, step: int, purpose: str = "") -> random.Random:
    """The random stream of a step, the same on all processes."""
    return random.Random(f"{seed}/{step}/{purpose}")


def position_random(seed: int, position: int, purpose: int) -> np.random.Generator:
    """The random stream of one picture at its place in the sequence."""
    return np.random.default_rng((seed, position, purpose))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def picture_at(seed: int, position: int, count: int) -> int:
    """Which of `count` pictures stands at a position."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, epoch, count)[place])


class Steps(Dataset[Batch]):
    """Item t is this process's share of step t."""

    def __init__(
        self, source: PictureSource, seed: int, batch: int, sizes: Sequence[Sequence[int]], rank: int = 0, processes: int = 1
    ) -> None:
        if batch % processes:
            raise ValueError(f"a batch of {batch} pictures cannot be shared among {processes} processes; make it a multiple")
        if not len(source):
            raise ValueError("there are no pictures to train on")
        self.source, self.seed, self.batch = source, seed, batch
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        self.share = range(rank * batch // processes, (rank + 1) * batch // processes)

    def __getitem__(self, step: int) -> Batch:
        size = step_random(self.seed, step, "size").choice(self.sizes)
        positions = tuple(step * self.batch + place for place in self.share)
        drawn = [self._picture(position, size) for position in positions]
        images = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2)
        return Batch(step, images, torch.tensor([label for _, label in drawn]), positions)

    def _picture(self, position: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        index = picture_at(self.seed, position, len(self.source))
        return self.source.draw(index, size, position_random(self.seed, position, PICTURE))
