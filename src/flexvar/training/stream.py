"""Pictures that come as a stream of shards, for sets too large to be opened at any place.

The shards form one endless sequence, the permutations of epochs 0, 1, 2, ... laid end to end. Every process has one reader a worker: a
lane. Lane l of n takes the shards at places l, l + n, l + 2n, ... from the first to the last picture, so each shard is read once an epoch
at any number of processes. With two processes of two workers and five shards, the places 0 to 4 are the first epoch in its order, and

    lane 0 (process 0, worker 0) reads the places 0, 4, 8, ...
    lane 1 (process 0, worker 1)              1, 5, 9, ...
    lane 2 (process 1, worker 0)              2, 6, 10, ...
    lane 3 (process 1, worker 1)              3, 7, 11, ...

Within a shard the next picture is chosen among a buffer of them. A run goes on at a shard: the earliest one that some lane had not finished
is the first to be read again. So none is left out, and what a lane had read of its own shard is seen twice: at the most a shard a lane, or
some more where lanes are not equally fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from flexvar.data.shards import ShardSource, shuffled
from flexvar.training.order import PICTURE, SHUFFLE, Batch, picture_at, position_random, shared, stacked, step_random

PICTURES_A_SHARD = 1 << 32  # positions set aside for one shard: position = place of the shard · this + number of the picture within it


@dataclass(frozen=True)
class Stream(IterableDataset[Batch]):
    """This process's share of the steps from `first_step` on, read from the shard at place `first_shard` on; endless."""

    source: ShardSource
    seed: int
    batch: int
    sizes: Sequence[Sequence[int]]
    rank: int = 0
    processes: int = 1
    shuffle: int = 1000
    first_step: int = 0
    first_shard: int = 0

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, lanes = self.rank * workers + number, self.processes * workers
        share, pictures = shared(self.batch, self.processes), self._pictures(self.first_shard + lane, lanes)
        step = self.first_step + number  # workers hand over their batches in turn
        while True:
            height, width = step_random(self.seed, step, "size").choice(list(self.sizes))
            drawn: list[tuple[np.ndarray, int]] = []
            positions: list[int] = []
            while len(drawn) < share:
                position, picture, label = next(pictures)
                drawn.append((self.source.fit(picture, (height, width), position_random(self.seed, position, PICTURE)), label))
                positions.append(position)
            unreadable = tuple(str(path) for path in self.source.unreadable)
            yield Batch(step, *stacked(drawn), tuple(positions), unreadable, positions[-1] // PICTURES_A_SHARD, lane)
            step += workers

    def _pictures(self, first: int, lanes: int) -> Iterator[tuple[int, Image.Image, int]]:
        """The readable pictures of every `lanes`-th shard from the place `first` on: position, picture, label. Endless.

        ValueError when all shards, read one after the other, had none.
        """
        place, empty = first, set[int]()  # a lane meets the same shard again before it has met all of them
        while len(empty) < self.source.shards:
            shard = picture_at(self.seed, place, self.source.shards)
            empty.add(shard)
            samples = self.source.read(shard)
            for number, sample in enumerate(shuffled(samples, position_random(self.seed, place, SHUFFLE), self.shuffle)):
                if (picture := sample.open()) is not None:
                    empty.clear()
                    yield place * PICTURES_A_SHARD + number, picture, sample.label
            place += lanes
        raise ValueError("none of the shards holds a picture that can be read; check data.path")
