"""From a config to a running training: opens the pictures, builds the workshop, hands both to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from flexvar.checkpoint import TOKENIZER, load
from flexvar.data import FeatureCache, PictureSource
from flexvar.models import model_folder
from flexvar.processes import forbid_cudnn_attention, forbid_tf32, keep_memory, pick_device, processes
from flexvar.training.initial import begin_from, check_codes
from flexvar.training.loop import Data, train
from flexvar.training.order import shared
from flexvar.training.pictures import batches_of, examples, measured_batches, open_source, reading_processes
from flexvar.training.run_folder import RunFolder
from flexvar.training.scoring import Scoring
from flexvar.training.settings import TokenizerRun, TransformerRun
from flexvar.training.tokenizer import TokenizerWorkshop
from flexvar.training.transformer import TransformerWorkshop
from flexvar.training.workshop import Workshop
from flexvar.zoo import sha256

PATIENCE = timedelta(hours=1)  # with the first process, which reads a reference, measures, draws sheets and writes while the others wait


def start(config: TokenizerRun | TransformerRun) -> Path:
    """Trains as the config says, or goes on from where the run stopped; gives the model folder.

    Raises ValueError or FileNotFoundError, in one line, where config, pictures, tokenizer or run folder do not fit together.
    """
    device = pick_device(exchanging=True)
    forbid_tf32()
    forbid_cudnn_attention()
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
            if before := _begun_from(config, folder):
                check_codes(before, painted.tokenizer, config.tokenizer)
            if held_out and not _same_classes(source.class_names, held_out.class_names):
                raise ValueError(f"{config.data.held_out} has other classes than {config.data.path}; both need the same class folders")
            for pictures in (source, held_out):
                if isinstance(pictures, FeatureCache):
                    _check_cache(pictures, config)
        if config.init_from and not folder.newest():
            begin_from(config.init_from, workshop.network, source.class_names)
        if isinstance(config, TransformerRun) and isinstance(workshop, TransformerWorkshop) and config.scores.reference:
            at_once = max(1, shared(config.batch, world) // config.accumulate)
            like = workshop.finished(workshop.network, {})
            workshop.scoring = Scoring(config.scores, folder, like, batch=at_once, rank=rank, device=device)
        data = Data(
            batches=batches_of(source, config, reading_processes(config, device), rank, world),
            held_out=measured_batches(held_out, config, world) if held_out and rank == 0 else [],
            pictures=len(source) if isinstance(source, PictureSource) else 0,
            class_names=source.class_names if isinstance(config, TransformerRun) else (),
        )
        return train(workshop, data, config, rank=rank, world=world, device=device)


def _same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether labels mean the same; a single class is called as its folder is, and is the same under any name."""
    return names == others or len(names) == len(others) == 1


def _begun_from(config: TransformerRun, folder: RunFolder) -> Path | None:
    """The folder of the model that a transformer goes on from: the run's own, else that of `init_from`."""
    if folder.newest():
        return folder.model
    return model_folder(config.init_from) if config.init_from else None


def _check_cache(cache: FeatureCache, config: TransformerRun) -> None:
    """ValueError, in one line, unless a cache is of the run's tokenizer and has all of its sizes."""
    folder = model_folder(config.tokenizer)
    if sha256(folder / TOKENIZER) != cache.settings.tokenizer_sha256:
        raise ValueError(f"{cache.folder} was made with another tokenizer than {folder}; cache the features again, with this one")
    for height, width in config.sizes:
        cache.check_size((height, width))
