"""From a config to a running training: opens the pictures, builds the workshop, hands both to the loop."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from flexvar.checkpoint import TOKENIZER, load
from flexvar.checks import warn
from flexvar.data import Augmentation, EmojiScenes, FeatureCache, FixedViews, HubPictures, HubStream, ImageFolder, PictureSource, Shapes
from flexvar.data.features import SETTINGS
from flexvar.data.shards import ShardSource, TarShards
from flexvar.models import model_folder
from flexvar.processes import MOST_WORKERS, forbid_tf32, keep_memory, pick_device, processes
from flexvar.training.initial import begin_from, check_codes
from flexvar.training.loop import Batches, Data, train
from flexvar.training.order import Batch, Steps
from flexvar.training.run_folder import RunFolder
from flexvar.training.settings import DataConfig, RunConfig, TokenizerRun, TransformerRun
from flexvar.training.stream import Stream
from flexvar.training.tokenizer import TokenizerWorkshop
from flexvar.training.transformer import TransformerWorkshop
from flexvar.training.workshop import Workshop

EXAMPLES = 8
MEASURED_AT_ONCE = 64
PATIENCE = timedelta(hours=1)  # with the first process, which measures, draws sheets and writes while the others wait
UNSEEN = 1_000_003  # added to the seed for pictures that are drawn to measure on


def start(config: TokenizerRun | TransformerRun) -> Path:
    """Trains as the config says, or goes on from where the run stopped; gives the model folder.

    Raises ValueError or FileNotFoundError, in one line, where config, pictures, tokenizer or run folder do not fit together.
    """
    device = pick_device(exchanging=True)
    forbid_tf32()
    if device.type == "cpu":
        keep_memory()
    folder = RunFolder(Path(config.run), config.keep)
    with processes(device, PATIENCE) as (rank, world), folder.alone() if rank == 0 else nullcontext():
        torch.manual_seed(config.seed)
        source = open_source(config.data, config.seed)
        held_out = open_source(config.data, config.seed, held_out=True) if config.measure else None
        workshop: Workshop
        if isinstance(config, TokenizerRun):
            workshop = TokenizerWorkshop(config, examples(held_out or source, config))
        else:
            if not config.tokenizer:
                raise ValueError("tokenizer is empty; name the model folder of a trained tokenizer")
            painted = load(model_folder(config.tokenizer))
            workshop = TransformerWorkshop(config, painted, source.class_names)
            if before := _begun_from(config):
                check_codes(before, painted.tokenizer, config.tokenizer)
            if held_out and not _same_classes(source.class_names, held_out.class_names):
                raise ValueError(f"{config.data.held_out} has other classes than {config.data.path}; both need the same class folders")
            for pictures in (source, held_out):
                if isinstance(pictures, FeatureCache):
                    _check_cache(pictures, config)
        if config.init_from and not folder.newest():
            begin_from(config.init_from, workshop.network, source.class_names)
        data = Data(
            batches=batches_of(source, config, _workers(config, device), rank, world),
            held_out=_measured_batches(held_out, config) if held_out and rank == 0 else [],
            pictures=len(source) if isinstance(source, PictureSource) else 0,
            class_names=source.class_names if isinstance(config, TransformerRun) else (),
        )
        return train(workshop, data, config, rank=rank, world=world, device=device)


def _same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether labels mean the same; a single class is called as its folder is, and is the same under any name."""
    return names == others or len(names) == len(others) == 1


def _begun_from(config: TransformerRun) -> Path | None:
    """The folder of the model that a transformer goes on from: the run's own, else that of `init_from`."""
    run = RunFolder(Path(config.run), config.keep)
    if run.newest():
        return run.model
    return model_folder(config.init_from) if config.init_from else None


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


def _workers(config: RunConfig, device: torch.device) -> int:
    """Processes for preparing pictures, as many on each machine: from their number follows which of them reads which shard."""
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

    So a worker leaves the group, where there are groups, and lets one request to end pass; the loop itself sends another to one that is
    stuck. It also ends where the loop is no more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _measured_batches(source: PictureSource | ShardSource, config: RunConfig) -> list[Batch]:
    """The same few batches of pictures at every measurement."""
    size = min(config.batch, MEASURED_AT_ONCE)
    if isinstance(source, PictureSource):
        steps = Steps(source, config.seed + UNSEEN, size, config.sizes)
        return [steps[i] for i in range(config.measure)]
    return list(islice(Stream(source, config.seed + UNSEEN, size, config.sizes, shuffle=config.data.shuffle), config.measure))


def _check_cache(cache: FeatureCache, config: TransformerRun) -> None:
    """ValueError, in one line, unless a cache is of the run's tokenizer and has all of its sizes."""
    folder = model_folder(config.tokenizer)
    if digest(folder) != cache.settings.tokenizer_sha256:
        raise ValueError(f"{cache.folder} was made with another tokenizer than {folder}; cache the features again, with this one")
    for height, width in config.sizes:
        cache.check_size((height, width))


def digest(folder: Path) -> str:
    """The sha256 of a model folder's tokenizer."""
    with (folder / TOKENIZER).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
