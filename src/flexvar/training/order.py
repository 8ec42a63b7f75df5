"""The order of the data: one endless sequence, the permutations of epochs 0, 1, 2, ... laid end to end.

Step t takes positions [tG, (t+1)G) and each process its share of them, so that nothing is dropped or repeated at any number of processes,
and the place in the data is the step number. Everything random about a picture follows from (seed, position), everything about a step
from (seed, step): there is no random state to save.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flexvar.data.source import PictureSource

PICTURE, LABEL, PATHS, SHUFFLE, EPOCH = 0, 1, 2, 3, 4
"""What a random stream of a position, or of an epoch, is for."""


@dataclass(frozen=True)
class Batch:
    """One process's share of a step."""

    step: int
    pictures: Tensor  # (B, 3, H, W) uint8; from a feature cache their feature maps (B, C, h, w) float16
    labels: Tensor  # (B,) int64
    positions: tuple[int, ...]  # of each picture in the endless sequence
    unreadable: tuple[str, ...] = ()  # names of all pictures that were passed over so far, since they are damaged
    shard: int = 0  # of a stream: the place, in the endless sequence of shards, of the one that was read last
    lane: int = 0  # of a stream: which of the readers side by side

    @property
    def cached(self) -> bool:
        """Whether these are feature maps."""
        return self.pictures.is_floating_point()

    def to(self, device: torch.device) -> Batch:
        return replace(self, pictures=self.pictures.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory from which a GPU can fetch it while others compute; the data loader asks for it."""
        return replace(self, pictures=self.pictures.pin_memory(), labels=self.labels.pin_memory())

    def parts(self, count: int) -> list[Batch]:
        """The batch in so many parts of the same length."""
        length = len(self.positions) // count
        at = [slice(start, start + length) for start in range(0, length * count, length)]
        return [replace(self, pictures=self.pictures[i], labels=self.labels[i], positions=self.positions[i]) for i in at]


def step_random(seed: int, step: int, purpose: str = "") -> random.Random:
    """The random stream of a step, the same on all processes."""
    return random.Random(f"{seed}/{step}/{purpose}")


def position_random(seed: int, position: int, purpose: int) -> np.random.Generator:
    """The random stream of one picture at its place in the sequence."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, position)))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return position_random(seed, epoch, EPOCH).permutation(count)


def picture_at(seed: int, position: int, count: int) -> int:
    """Which of `count` pictures stands at a position."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, epoch, count)[place])


class Steps(Dataset[Batch]):
    """Item t is this process's share of step t."""

    def __init__(
        self, source: PictureSource, seed: int, batch: int, sizes: Sequence[Sequence[int]], rank: int = 0, processes: int = 1
    ) -> None:
        if not len(source):
            raise ValueError("there are no pictures to train on")
        self.source, self.seed, self.batch = source, seed, batch
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        share = shared(batch, processes)
        self.share = range(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Batch:
        size = step_random(self.seed, step, "size").choice(self.sizes)
        positions = tuple(step * self.batch + place for place in self.share)
        drawn = [self._picture(position, size) for position in positions]
        unreadable = tuple(str(path) for path in getattr(self.source, "unreadable", ()))
        return Batch(step, *stacked(drawn), positions, unreadable)

    def _picture(self, position: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        index = picture_at(self.seed, position, len(self.source))
        return self.source.draw(index, size, position_random(self.seed, position, PICTURE))


def shared(batch: int, processes: int) -> int:
    """Pictures of a step for each process; ValueError when they do not come out even."""
    if batch % processes:
        raise ValueError(f"a batch of {batch} pictures cannot be shared among {processes} processes; make it a multiple")
    return batch // processes


def stacked(drawn: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) uint8, or feature maps (B, C, h, w) float16 as they are, and labels (B,)."""
    pictures = torch.from_numpy(np.stack([picture for picture, _ in drawn]))
    if pictures.dtype == torch.uint8:
        pictures = pictures.permute(0, 3, 1, 2).contiguous()
    return pictures, torch.tensor([label for _, label in drawn])
