"""From a config to a running training: opens the pictures, builds the workshop, hands both to the loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flexvar.checkpoint import load
from flexvar.data import EmojiScenes, ImageFolder, PictureSource, Shapes
from flexvar.training.config import DataConfig, TokenizerRun, TransformerRun
from flexvar.training.loop import Workshop, pick_device, processes, train
from flexvar.training.tokenizer import TokenizerWorkshop
from flexvar.training.transformer import TransformerWorkshop

EXAMPLES = 8


def open_source(config: DataConfig) -> PictureSource:
    """The pictures that a config asks for."""
    if config.kind == "emoji":
        return EmojiScenes(config.classes or None, views=config.views)
    if config.kind == "shapes":
        return Shapes(views=config.views)
    if not config.path:
        raise ValueError("data.path is empty; name the folder of class folders with pictures")
    return ImageFolder(Path(config.path), flip=config.flip, resize=(config.resize[0], config.resize[1]))


def start(config: TokenizerRun | TransformerRun) -> Path:
    """Trains as the config says, or goes on from where the run stopped; gives the model folder."""
    source, device = open_source(config.data), pick_device()
    with processes(device) as (rank, world):
        torch.manual_seed(config.seed)
        workshop: Workshop
        if isinstance(config, TokenizerRun):
            workshop = TokenizerWorkshop(config, examples(source, config))
        else:
            if not config.tokenizer:
                raise ValueError("tokenizer is empty; name the model folder of a trained tokenizer")
            workshop = TransformerWorkshop(config, load(config.tokenizer), source.class_names)
        return train(workshop, source, config, rank=rank, world=world, device=device)


def examples(source: PictureSource, config: TokenizerRun) -> torch.Tensor:
    """A few pictures (N, 3, H, W) uint8 for the sheets, spread over the source."""
    size = (config.sizes[0][0], config.sizes[0][1])
    count = min(EXAMPLES, len(source))
    indices = [len(source) * i // count for i in range(count)]
    if config.data.kind != "folder":
        indices = [len(source.class_names) * i // count for i in range(count)]
    drawn = [source.draw(index, size, np.random.default_rng((config.seed, index)))[0] for index in indices]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
