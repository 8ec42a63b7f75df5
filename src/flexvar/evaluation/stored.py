"""Pictures that lie in files: ADM's .npz, read without holding it whole, and folders."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexvar.data.images import EXTENSIONS, fitted, open_picture, pictures_below
from flexvar.evaluation.npz import CLASSES, DAMAGED, PICTURES, array_header, array_names, open_npz, read_array
from flexvar.schedule import Size
from flexvar.zoo import sha256

AT_ONCE = 50  # pictures in a batch
LOSSY = (".jpg", ".jpeg", ".webp")
ORIENTATION = 0x0112  # EXIF's tag; from 5 on, height and width change places


class PictureSet(Protocol):
    """Pictures of one size that are to be measured, wherever they come from."""

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        ...

    @property
    def labels(self) -> Sequence[str] | None:
        """The class of each picture; None where the classes are not known."""
        ...

    @property
    def caveats(self) -> list[str]:
        """What keeps their scores from being compared with published ones."""
        ...

    def __len__(self) -> int: ...

    def batches(self, part: range) -> Iterator[Tensor]:
        """The pictures of a part: uint8 (B, 3, H, W)."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """All that determines them, for the report; the same pictures say the same."""
        ...


def open_pictures(path: Path | str, size: Size | None = None) -> NpzPictures | FolderPictures:
    """The pictures in an .npz or a folder. size: (height, width) to which those of a folder are resized and cropped.

    Raises FileNotFoundError or ValueError, in one line, for what is missing, damaged, of another type or of mixed sizes.
    """
    path = Path(path)
    if path.is_dir():
        return FolderPictures(path, size)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give an .npz file or a folder of pictures")
    if size is not None:
        raise ValueError(f"{path} holds pictures of its own size; only those of a folder can be resized")
    return NpzPictures(path)


def chosen(pictures: PictureSet, count: int) -> list[int]:
    """The places of `count` of the pictures (of all, where there are no more): evenly spread, over the classes too."""
    labels, available = pictures.labels, len(pictures)
    places = range(available) if labels is None else sorted(range(available), key=labels.__getitem__)
    count = min(count, available)
    return sorted(places[i * available // count] for i in range(count))


class NpzPictures:
    """The array arr_0 of an .npz, uint8 (N, H, W, 3), read part by part; arr_1, if there is one, holds the class of each picture.

    Parts in growing order are one pass over the file: an archive can only be read forward.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.caveats: list[str] = []
        with open_npz(path) as archive:
            if PICTURES not in (names := array_names(archive)):
                raise ValueError(f"{path} holds no pictures: it has no array {PICTURES}, but {', '.join(names) or 'nothing'}")
            with archive.open(f"{PICTURES}.npy") as file:
                shape, fortran, dtype = array_header(file, path)
            stored = archive.getinfo(f"{PICTURES}.npy").file_size
            labels = read_array(archive, CLASSES, path) if CLASSES in names else None
        if dtype != np.uint8:
            raise ValueError(f"{PICTURES} of {path} is {dtype}; pictures must be uint8 from 0 to 255: convert and write them again")
        if len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise ValueError(f"{PICTURES} of {path} has shape {shape}; it must be (N, H, W, 3), N at least 1, in C order")
        if math.prod(shape) > stored:
            raise ValueError(f"{PICTURES} of {path} is damaged: it claims the shape {shape} and holds {stored} bytes; write it again")
        if labels is not None and labels.shape != shape[:1]:
            raise ValueError(f"{CLASSES} of {path} has shape {labels.shape} instead of {shape[:1]}, one class a picture")
        self._count, self.size = int(shape[0]), (int(shape[1]), int(shape[2]))
        self._file: IO[bytes] | None = None
        self._next = 0  # the picture that the open file comes to next
        self.labels = None if labels is None else [str(label) for label in labels.tolist()]

    def __len__(self) -> int:
        return self._count

    def batches(self, part: range) -> Iterator[Tensor]:
        for start in range(part.start, part.stop, AT_ONCE):
            count = min(AT_ONCE, part.stop - start)
            try:
                pixels = np.frombuffer(self._read(start, count), np.uint8).reshape(count, *self.size, 3)
            except DAMAGED as error:
                raise ValueError(f"{self.path} is damaged or truncated ({error}); copy or write it again") from error
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    @cached_property
    def about(self) -> dict[str, Any]:
        return {"pictures": self.path.name, "sha256": sha256(self.path)}

    def _read(self, start: int, count: int) -> bytes:
        """The bytes of some pictures."""
        one = self.size[0] * self.size[1] * 3
        if self._file is None or start < self._next:
            self._file, self._next = open_npz(self.path).open(f"{PICTURES}.npy"), 0
            array_header(self._file, self.path)
        self._file.seek((start - self._next) * one, os.SEEK_CUR)
        self._next = start + count
        return self._file.read(count * one)


class FolderPictures:
    """The pictures below a folder, in the order of their paths.

    If all lie in folders below it, these are the classes, and the pictures come from each in turn: the splits of the Inception Score want
    neighbours of different classes.
    """

    def __init__(self, folder: Path, size: Size | None = None) -> None:
        self.folder, self._resized = folder, size
        if size is not None and min(size) < 1:
            raise ValueError(f"the pictures are to have {size[0]} x {size[1]} px; give sides of at least 1")
        self.paths = pictures_below(folder)
        if not self.paths:
            raise FileNotFoundError(f"there are no pictures in {folder}; it must hold {', '.join(EXTENSIONS)} files")
        lossy = sum(path.suffix.lower() in LOSSY for path in self.paths)
        self.caveats = [f"{lossy} of the pictures were stored as JPEG or WebP, which changes the scores; store PNG"] if lossy else []
        self.size = size or self._common_size()
        self.labels: list[str] | None = None
        if all(len(path.relative_to(folder).parts) > 1 for path in self.paths):
            self._deal()

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, part: range) -> Iterator[Tensor]:
        for start in range(part.start, part.stop, AT_ONCE):
            pictures = [self._picture(index) for index in range(start, min(start + AT_ONCE, part.stop))]
            yield torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())

    @cached_property
    def about(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(f"{path.relative_to(self.folder).as_posix()} {sha256(path)}\n"))  # names need not be text
        resized = {} if self._resized is None else {"resized and cropped to": list(self._resized)}
        return {"pictures": self.folder.name, "sha256": digest.hexdigest(), **resized}

    def _deal(self) -> None:
        """Puts the pictures into an order in which the classes come in turn, and notes the class of each."""
        place: Counter[str] = Counter()
        dealt = []
        for path in self.paths:
            label = path.relative_to(self.folder).parts[0]
            dealt.append((place[label], label, path))
            place[label] += 1
        dealt.sort()
        self.paths, self.labels = [path for *_, path in dealt], [label for _, label, _ in dealt]

    def _picture(self, index: int) -> np.ndarray:
        picture = open_picture(self.paths[index])
        if self._resized is not None:
            picture = fitted(picture, self._resized)
        if (picture.height, picture.width) != self.size:
            raise ValueError(f"{self.paths[index]} has {picture.height} x {picture.width} px, the others {self.size[0]} x {self.size[1]}")
        return np.asarray(picture)

    def _common_size(self) -> Size:
        """(height, width) of all pictures; ValueError, naming two of them, where they differ."""
        first: tuple[Path, Size] | None = None
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    # As stored; it is turned when it is read. Where nothing is known yet, a PNG would have to be decoded to tell.
                    turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5
                    size = (image.width, image.height) if turned else (image.height, image.width)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                reason = getattr(error, "strerror", None) or "it is no image, or is damaged"
                raise ValueError(f"{path} cannot be read ({reason}); replace or remove it") from error
            first = first or (path, size)
            if size != first[1]:
                one, other = (f"{seen.relative_to(self.folder)} has {h} x {w} px" for seen, (h, w) in (first, (path, size)))
                raise ValueError(f"the pictures in {self.folder} have different sizes: {one}, {other}; bring them to one size")
        assert first is not None
        return first[1]
