"""Storing the features of a data set for the training of transformers: `flexvar cache`. Under `torchrun` each process writes its shards."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flexvar.checkpoint import TOKENIZER, load
from flexvar.data import FixedViews, PictureSource
from flexvar.data.features import CacheSettings, CacheWriter, FeatureCache
from flexvar.data.images import count_of_unreadable
from flexvar.models import model_folder
from flexvar.processes import forbid_tf32, pick_device, processes, wait_for_all
from flexvar.progress import progress
from flexvar.schedule import Size
from flexvar.tokenizer import Tokenizer
from flexvar.training.optimiser import precision
from flexvar.training.pictures import open_source, spare_cores
from flexvar.training.settings import CacheRun
from flexvar.zoo import sha256

PATIENCE = timedelta(days=1)  # with a process that still writes shards when the others have written theirs


def cache_features(config: CacheRun, overwrite: bool = False) -> Path:
    """Writes the cache that a config asks for, or goes on where it stopped; gives its folder.

    Raises ValueError, FileNotFoundError or FileExistsError, in one line, where it cannot.
    """
    device = pick_device()
    forbid_tf32()
    with processes(device, PATIENCE) as (rank, world):
        if not config.tokenizer:
            raise ValueError("tokenizer is empty; name the model folder of a trained tokenizer")
        folder = model_folder(config.tokenizer)
        tokenizer = load(folder).tokenizer.to(device)
        source = open_source(config.data, config.seed)
        assert isinstance(source, PictureSource)  # CacheRun allows no other kind
        views, dtype = FixedViews(source, config.seed, config.views), precision(config.precision, device)
        settings = CacheSettings(
            tokenizer_sha256=sha256(folder / TOKENIZER),
            class_names=source.class_names,
            sizes=tuple(dict.fromkeys((height, width) for height, width in config.sizes)),
            downsample=tokenizer.config.downsample,
            code_width=tokenizer.config.code_width,
            views=config.views,
            seed=config.seed,
            pictures=len(source),
            pictures_per_shard=config.shard,
            provenance={"data": OmegaConf.to_container(OmegaConf.structured(config.data)), "precision": str(dtype)},
        )
        if overwrite and rank == 0:
            CacheWriter(config.out, settings, overwrite=True)
        wait_for_all()
        writer = CacheWriter(config.out, settings)
        own = [shard for shard in writer.missing() if shard % world == rank]
        for shard in progress(own, f"caching into {config.out}"):
            _write(writer, shard, views, tokenizer, config.batch, dtype)
        wait_for_all()
        if rank == 0 and (unreadable := FeatureCache(config.out).unreadable):
            tqdm.write(count_of_unreadable(unreadable))
    return Path(config.out)


def _write(writer: CacheWriter, shard: int, views: FixedViews, tokenizer: Tokenizer, batch: int, dtype: torch.dtype) -> None:
    """One shard: every size of every view of its pictures through the encoder."""
    indices, device = writer.pictures_of(shard), tokenizer.after_codes.weight.device
    labels = np.empty(0, np.int64)  # the same at every size
    maps: dict[Size, np.ndarray] = {}
    unreadable: set[str] = set()
    for size in writer.settings.sizes:
        parts, given = [], []
        loader = DataLoader(_Views(views, indices, size), batch_size=batch, collate_fn=_together, num_workers=spare_cores())
        for pictures, targets, names in loader:  # (B, views, 3, H, W) uint8, (B,)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                images = pictures.flatten(0, 1).to(device) / 127.5 - 1
                features = tokenizer.features(images).unflatten(0, pictures.shape[:2])  # (B, views, C, h, w)
            parts.append(features.half().cpu().numpy())
            given.append(targets.numpy())
            unreadable |= names
        maps[size], labels = np.concatenate(parts), np.concatenate(given)
    writer.write(shard, labels, maps, unreadable)


_Item = tuple[np.ndarray, int, list[str]]


class _Views(Dataset[_Item]):
    """Item i is all views of the i-th of some pictures, (views, 3, H, W) uint8, its label, and the pictures unreadable so far."""

    def __init__(self, views: FixedViews, indices: range, size: Size) -> None:
        self.views, self.indices, self.size = views, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> _Item:
        drawn = [self.views.view(self.indices[place], view, self.size) for view in range(self.views.views)]
        names = [str(path) for path in self.views.unreadable]
        return np.stack([pixels for pixels, _ in drawn]).transpose(0, 3, 1, 2), drawn[0][1], names


def _together(items: list[_Item]) -> tuple[Tensor, Tensor, set[str]]:
    """A batch: pictures (B, views, 3, H, W) uint8, labels (B,), and the unreadable ones."""
    pictures, labels, names = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pictures)), torch.tensor(labels), {name for some in names for name in some}
