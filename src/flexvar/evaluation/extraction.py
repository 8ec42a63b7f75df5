"""From pictures to features, in pieces that outlive an interruption and that any number of processes share out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexvar.evaluation.extractors import Extractor, Features
from flexvar.evaluation.report import read_json, write_json
from flexvar.evaluation.stored import PictureSet
from flexvar.progress import progress
from flexvar.writing import make_folder, write_whole

PIECE = 250  # pictures; a kill loses at most so many a process
VERSION = 1  # of the features; a change in how they are made changes it
ABOUT = "about.json"
PIXELS = "pictures"
OUTSTANDING = 2  # batches that wait for the extractor while the next one is drawn


class FeatureStore:
    """Features of one set of pictures, in files of PIECE pictures each, with all that determines them beside.

    about: anything that JSON can hold. A folder that holds features of something else is a FileExistsError that names the difference,
    unless `overwrite` is set. begin: False for processes that open what the first one began; FileNotFoundError where they do not see it.
    """

    def __init__(self, folder: Path, count: int, about: Mapping[str, Any], *, overwrite: bool = False, begin: bool = True) -> None:
        self.folder, self._count = folder, count
        about = _flat(json.loads(json.dumps({**about, "features": VERSION, "pictures a piece": PIECE})))
        path = folder / ABOUT
        if not path.is_file() and not begin:
            raise FileNotFoundError(f"this process sees no {path}; all processes must share the folder of --out")
        before = read_json(path) if path.is_file() else {}
        different = [name for name in ({**before, **about} if begin else about) if before.get(name) != about.get(name)]
        if before and different and not overwrite:
            was, now = (json.dumps(side.get(different[0]), ensure_ascii=False) for side in (before, about))
            raise FileExistsError(
                f"{folder} holds unfinished work with other settings ({different[0]}: {was}, not {now}); "
                "add --overwrite, or use another --out"
            )
        self.fresh = bool(different)  # whether nothing of it was there
        if self.fresh:
            path.unlink(missing_ok=True)  # first, so that pieces that are left by a kill belong to nothing
            for piece in folder.glob("piece-*"):
                piece.unlink()
            make_folder(folder)
            write_json(path, about)

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

    def pieces(self) -> Iterator[Features]:
        """The features of one piece after the other. ValueError for a damaged one, FileNotFoundError for a missing one."""
        for part in self.parts():
            tensors = self._tensors(part, "pool", "spatial", "logits")
            if "pool" not in tensors or len(tensors["pool"]) != len(part):
                raise ValueError(f"{self._path(part)} does not hold {len(part)} pictures; delete it and run the command again")
            yield Features(tensors["pool"], tensors.get("spatial"), tensors.get("logits"))

    def read(self) -> Features:
        """The features of all pictures, in order."""
        return joined(list(self.pieces()))

    def pixels(self) -> Iterator[Tensor]:
        """The pictures of all pieces, if they were kept."""
        return (self._tensors(part, PIXELS)[PIXELS] for part in self.parts())

    def remove(self) -> None:
        """Deletes all of it."""
        (self.folder / ABOUT).unlink()
        shutil.rmtree(self.folder)

    def _path(self, part: range) -> Path:
        return self.folder / f"piece-{part.start // PIECE:05d}.safetensors"

    def _tensors(self, part: range, *names: str) -> dict[str, Tensor]:
        """Those of some tensors that a piece has."""
        path = self._path(part)
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118 - it is no dictionary
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run the command again") from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names like "samples.seeds", so that a difference can be told in a few words."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def joined(parts: list[Features]) -> Features:
    """The features of several batches as those of one."""
    spatial = [part.spatial for part in parts if part.spatial is not None]
    logits = [part.logits for part in parts if part.logits is not None]
    pool = torch.cat([part.pool for part in parts])
    return Features(pool, torch.cat(spatial) if spatial else None, torch.cat(logits) if logits else None)


def extract(
    pictures: PictureSet,
    extractor: Extractor,
    store: FeatureStore,
    *,
    rank: int = 0,
    world: int = 1,
    keep_pixels: bool = False,
    pngs: Path | None = None,
) -> None:
    """Fills a store with the features of pictures; of several processes, `world` in all, each takes its share.

    pngs: a folder that also gets each picture as a file, numbered from 0.
    """
    own = [part for part in store.missing() if (part.start // PIECE) % world == rank]
    for part in progress(own, f"pictures, {PIECE} at a time"):
        batches = extract_beside(pictures.batches(part), extractor, pngs, part.start)
        pixels, features = zip(*batches, strict=True)
        store.write(part, joined(list(features)), torch.cat(pixels) if keep_pixels else None)


def extract_beside(
    batches: Iterator[Tensor], extract: Callable[[Tensor], Features], pngs: Path | None = None, start: int = 0
) -> Iterator[tuple[Tensor, Features]]:
    """Each batch with its features, which are made (and its files written) while the next one is drawn or comes from disk."""

    def work(batch: Tensor, place: int) -> tuple[Tensor, Features]:
        if pngs is not None:
            _save(batch, pngs, place)
        return batch, extract(batch)

    waiting: list[Future[tuple[Tensor, Features]]] = []
    with ThreadPoolExecutor(1) as beside:
        try:
            for batch in batches:
                waiting.append(beside.submit(work, batch, start))
                start += len(batch)
                if len(waiting) > OUTSTANDING:
                    yield waiting.pop(0).result()
            yield from (future.result() for future in waiting)
        finally:
            beside.shutdown(wait=True, cancel_futures=True)


def _save(batch: Tensor, folder: Path, start: int) -> None:
    make_folder(folder)
    for place, pixels in enumerate(batch.permute(0, 2, 3, 1).contiguous().numpy(), start):
        write_whole(folder / f"{place:06d}.png", partial(Image.fromarray(pixels).save, format="PNG"))
