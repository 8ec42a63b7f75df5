"""From pictures to features, in pieces that outlive an interruption and that any number of processes share out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexvar.evaluation.extractors import Extractor, Features
from flexvar.evaluation.stored import PictureSet
from flexvar.progress import progress
from flexvar.writing import write_whole

PIECE = 250  # pictures; a kill loses at most so many a process
ABOUT = "about.json"
PIXELS = "pictures"


class FeatureStore:
    """Features of one set of pictures, in files of PIECE pictures each, with all that determines them beside.

    about: anything that JSON can hold. A folder that holds features of something else is a FileExistsError that names the difference,
    unless `overwrite` is set.
    """

    def __init__(self, folder: Path, count: int, about: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder, self._count = folder, count
        about = json.loads(json.dumps(dict(about)))
        path = folder / ABOUT
        if path.is_file() and not overwrite:
            before = json.loads(path.read_text(encoding="utf-8"))
            if different := [name for name in {**before, **about} if before.get(name) != about.get(name)]:
                name = different[0]
                was, now = (json.dumps(side.get(name), ensure_ascii=False) for side in (before, about))
                raise FileExistsError(
                    f"{folder} holds unfinished work with other settings ({name}: {was}, not {now}); add --overwrite, or use another --out"
                )
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(path, lambda beside: beside.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8"))

    def parts(self) -> list[range]:
        """The pictures of each piece."""
        return [range(start, min(start + PIECE, self._count)) for start in range(0, self._count, PIECE)]

    def missing(self) -> list[range]:
        """The pieces that are still to be made."""
        return [part for part in self.parts() if not self._path(part).is_file()]

    def write(self, part: range, features: Features, pixels: Tensor | None = None) -> None:
        """Keeps the features of a piece and, if they are wanted later, its pictures: uint8 (n, 3, H, W)."""
        tensors = {name: tensor.contiguous() for name, tensor in vars(features).items() if tensor is not None}
        tensors |= {} if pixels is None else {PIXELS: pixels.contiguous()}
        write_whole(self._path(part), lambda beside: save_file(tensors, beside))

    def read(self) -> Features:
        """The features of all pictures, in order."""
        return joined([Features(piece["pool"], piece.get("spatial"), piece.get("logits")) for piece in self._pieces()])

    def pixels(self) -> Iterator[Tensor]:
        """The pictures of all pieces, if they were kept."""
        return (piece[PIXELS] for piece in self._pieces())

    def remove(self) -> None:
        """Deletes all of it."""
        shutil.rmtree(self.folder)

    def _path(self, part: range) -> Path:
        return self.folder / f"piece-{part.start // PIECE:05d}.safetensors"

    def _pieces(self) -> Iterator[dict[str, Tensor]]:
        for part in self.parts():
            try:
                yield load_file(self._path(part))
            except SafetensorError as error:
                raise ValueError(f"{self._path(part)} is damaged ({error}); delete it and run the command again") from error


def joined(parts: list[Features]) -> Features:
    """The features of several batches as those of one."""
    spatial = [part.spatial for part in parts if part.spatial is not None]
    logits = [part.logits for part in parts if part.logits is not None]
    pool = torch.cat([part.pool for part in parts])
    return Features(pool, torch.cat(spatial) if spatial else None, torch.cat(logits) if logits else None)


def extract(
    pictures: PictureSet, extractor: Extractor, store: FeatureStore, *, share: tuple[int, int] = (0, 1), keep_pixels: bool = False
) -> None:
    """Fills a store with the features of pictures: of all of them, or of this process's share (its number, how many there are)."""
    rank, processes = share
    own = [part for part in store.missing() if (part.start // PIECE) % processes == rank]
    for part in progress(own, f"pictures, {PIECE} at a time"):
        pixels: list[Tensor] | None = [] if keep_pixels else None
        features = features_beside(pictures.batches(part), extractor, pixels)
        store.write(part, features, torch.cat(pixels) if pixels else None)


def features_beside(batches: Iterable[Tensor], extract: Callable[[Tensor], Features], pixels: list[Tensor] | None = None) -> Features:
    """The features of some batches; each is read by the extractor while the next one is drawn or comes from disk.

    pixels: a list that also gets the batches.
    """
    waiting = []
    with ThreadPoolExecutor(1) as beside:
        for batch in batches:
            waiting.append(beside.submit(extract, batch))
            if pixels is not None:
                pixels.append(batch)
    return joined([future.result() for future in waiting])
