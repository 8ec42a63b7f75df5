"""The pictures of a run: where they are, who reads them, in what batches they come; those to measure on, and those for the sheets."""

from __future__ import annotations

import os
import signal
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from flexvar.checks import warn
from flexvar.data import Augmentation, EmojiScenes, FeatureCache, FixedViews, HubPictures, HubStream, ImageFolder, PictureSource, Shapes
from flexvar.data.features import SETTINGS
from flexvar.data.shards import ShardSource, TarShards
from flexvar.processes import MOST_WORKERS
from flexvar.training.loop import Batches
from flexvar.training.order import Batch, Steps, shared
from flexvar.training.settings import DataConfig, RunConfig, TokenizerRun
from flexvar.training.stream import Stream

EXAMPLES = 8
MEASURED_AT_ONCE = 64
UNSEEN = 1_000_003  # added to the seed for pictures that are drawn to measure on


def open_source(config: DataConfig, seed: int, held_out: bool = False) -> PictureSource | ShardSource:
    """The pictures that a config asks for; to train on, or those that were held out, as they are.

    Where none were held out, those to train on stand in for them, without augmentation. Drawn pictures follow from the seed.
    Raises ValueError or FileNotFoundError where they are not there.
    """
    augmentation = Augmentation(config.flip, (config.resize[0], config.resize[1]), random=not held_out)
    elsewhere = config.held_out if held_out and config.held_out else ""
    if config.kind == "emoji":
        source: PictureSource = EmojiScenes(config.classes or None, views=config.views)
    elif config.kind == "shapes":
        source = Shapes(views=config.views)
    elif not config.path:
        raise ValueError("data.path is empty; name the folder of class folders with pictures, or what data.kind asks for")
    elif config.kind == "folder":
        source = ImageFolder(Path(elsewhere or config.path), flip=config.flip, resize=augmentation.resize, augment=augmentation.random)
    elif config.kind == "features":
        if elsewhere and not (Path(elsewhere) / SETTINGS).exists():
            raise FileNotFoundError(
                f"data.held_out is {elsewhere}, which is no feature cache as data.path is; write one with `flexvar cache`, "
                "or set data.held_out= to measure on the training's own"
            )
        return FeatureCache(Path(elsewhere or config.path))
    elif config.kind == "shards":
        return TarShards(elsewhere or config.path, config.classes or None, augmentation)
    elif config.kind == "hub-stream":
        return HubStream(config.path, elsewhere or config.split, config.image, config.label, augmentation, config.classes or None)
    else:
        source = HubPictures(config.path, elsewhere or config.split, config.image, config.label, augmentation)
    return FixedViews(source, seed, config.fixed_views) if config.fixed_views and not held_out else source


def batches_of(source: PictureSource | ShardSource, config: RunConfig, workers: int, rank: int, world: int) -> Batches:
    """What the loop asks for its batches, which so many processes prepare; of a stream only as many as there are shards for."""
    if not isinstance(source, PictureSource) and source.shards < world * workers:
        few, workers = f"{source.shards} shards for {world} x {workers} readers", max(1, source.shards // world)
        if rank == 0:
            warn(f"{few}, of which each needs its own: now there are {world} x {workers}; more and smaller shards are read faster")

    def batches(step: int, last: int, first_shard: int) -> DataLoader[Batch]:
        share = (config.seed, config.batch, config.sizes, rank, world)
        steps = Steps(source, *share) if isinstance(source, PictureSource) else None
        return DataLoader(
            steps or Stream(cast(ShardSource, source), *share, config.data.shuffle, step, first_shard),
            batch_size=None,
            sampler=range(step, last) if steps else None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_loop,
        )

    return batches


def reading_processes(config: RunConfig, device: torch.device) -> int:
    """Processes that prepare pictures beside each training process: the fewest that any machine allows.

    All must have as many, since from their number follows which of them reads which shard.
    """
    workers = torch.tensor(config.workers if config.workers >= 0 else spare_cores(), device=device)
    if dist.is_initialized():
        dist.all_reduce(workers, dist.ReduceOp.MIN)
    return int(workers)


def spare_cores() -> int:
    """Processes for preparing pictures, beside each training process of this machine: 1 to 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # of a share of a machine
    return max(1, min(MOST_WORKERS, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _leave_signals_to_the_loop(_: int) -> None:
    """Ctrl-C, and the end of a job under torchrun or Slurm, reach all processes; the loop still needs its batch to finish a step.

    So a worker ignores Ctrl-C, leaves the process group, and ignores the first SIGTERM; the second, which the loader sends to a worker that
    is stuck, ends it. It also ends where the loop is no more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def measured_batches(source: PictureSource | ShardSource, config: RunConfig, world: int) -> list[Batch]:
    """The same few batches of pictures at every measurement, in parts no larger than those that a process trains on at a time."""
    size = min(config.batch, MEASURED_AT_ONCE)
    if isinstance(source, PictureSource):
        steps = Steps(source, config.seed + UNSEEN, size, config.sizes)
        batches = [steps[i] for i in range(config.measure)]
    else:
        batches = list(islice(Stream(source, config.seed + UNSEEN, size, config.sizes, shuffle=config.data.shuffle), config.measure))
    at_once = max(1, shared(config.batch, world) // config.accumulate)
    parts = next(count for count in range(1, size + 1) if size % count == 0 and size // count <= at_once)
    return [part for batch in batches for part in batch.parts(parts)]


def examples(source: PictureSource | ShardSource, config: TokenizerRun) -> torch.Tensor:
    """A few pictures (N, 3, H, W) uint8 for the sheets, of different classes where that is known beforehand."""
    sizes = [config.sizes[0]]
    if not isinstance(source, PictureSource):
        return next(iter(Stream(source, config.seed, EXAMPLES, sizes, shuffle=config.data.shuffle))).pictures
    count = min(EXAMPLES, len(source))
    drawn = config.data.kind in ("emoji", "shapes")  # label = index % classes
    indices = [(len(source.class_names) if drawn else len(source)) * i // count for i in range(count)]
    size = (sizes[0][0], sizes[0][1])
    pictures = [source.draw(index, size, np.random.default_rng((config.seed + UNSEEN, index)))[0] for index in indices]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
