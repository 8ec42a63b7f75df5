"""Pictures in shards that are read from beginning to end, for sets too large for any other way: tar files, and the Hub's as a stream."""

import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from PIL import Image

from flexvar.checks import warn
from flexvar.data.hub import data_package, named_classes, open_split, stored_picture, with_columns
from flexvar.data.images import Augmentation, decoded, readable

T = TypeVar("T")

PICTURES = ("png", "jpg", "jpeg", "webp")
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Sample:
    """A picture of a shard, not decoded until it is opened."""

    open: Callable[[], Image.Image | None]  # mode RGB; None where it cannot be read
    label: int


class ShardSource(Protocol):
    """Labelled pictures in shards. Those that cannot be read are collected in `unreadable`, with one warning each (per process)."""

    class_names: tuple[str, ...]
    """The name of every class; a label is a position in this tuple."""
    shards: int
    """How many there are."""
    unreadable: list[Path]
    augmentation: Augmentation

    def read(self, shard: int) -> Iterator[Sample]:
        """The pictures of a shard in their order, each read when it is asked for; there may be none.

        All pictures come whoever asks: nothing is shuffled or shared out among processes. Raises IndexError for a shard
        that does not exist.
        """
        ...

    def fit(self, picture: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """An opened picture at `size` = (height, width): uint8 (height, width, 3) RGB, its augmentation drawn from `rng`."""
        return self.augmentation.apply(picture, size, rng)


class TarShards(ShardSource):
    """Tar files of samples: files of the same name up to the first dot, one after the other.

    A sample has a picture (png, jpg, jpeg or webp) and a label: a whole number in the file .cls, or as "label" in .json;
    with a single class it needs none. `pattern` is a folder of .tar files, a glob, or train-{0000..0099}.tar. The class
    names are given, or stand in classes.txt beside the shards, one a line.

    Of a shard that is damaged or cut off comes what can be read; it joins `damaged`, with one warning (per process).

    Raises ModuleNotFoundError without the `webdataset` package, FileNotFoundError where there is no shard, or one of a
    brace pattern is missing, and ValueError without class names; reading raises it for a label that has no class name.
    """

    def __init__(
        self, pattern: str | os.PathLike[str], class_names: Sequence[str] | None = None, augmentation: Augmentation | None = None
    ) -> None:
        data_package("webdataset")  # not to miss it in a loader worker
        self.files = tar_files(str(pattern))
        self.shards = len(self.files)
        self.class_names = tuple(class_names) if class_names is not None else _names_beside(self.files[0])
        self.augmentation = augmentation or Augmentation()
        self.unreadable: list[Path] = []
        self.damaged: list[Path] = []

    def read(self, shard: int) -> Iterator[Sample]:
        """See ShardSource."""
        path = _one_of(self.files, shard)
        group_by_keys = data_package("webdataset.tariterators").group_by_keys
        with path.open("rb") as file:
            for files in group_by_keys(self._files_in(file, path), handler=partial(self._damaged, path)):
                content = next((files[kind] for kind in PICTURES if kind in files), None)
                label = _label_in(files, 0 if len(self.class_names) == 1 else None)
                if path in self.damaged and (content is None or label is None):
                    continue  # where it was cut off
                name = Path(f"{path}[{files['__key__']}]")
                decode = partial(decoded, content or b"", name)
                yield Sample(partial(readable, name, decode, self.unreadable), _checked_label(label, self.class_names, name))

    def _files_in(self, file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
        expander, damaged = data_package("webdataset.tariterators").tar_file_expander, partial(self._damaged, path)
        yield from expander([{"url": str(path), "stream": file}], handler=damaged, eof_value=None)
        if path.suffix == ".tar" and path not in self.damaged and not _was_read_to_its_end(path):
            damaged()

    def _damaged(self, path: Path, _: Exception | None = None) -> bool:
        if path not in self.damaged:
            self.damaged.append(path)
            warn(f"{path} is damaged or cut off: what can be read of it is used")
        return True


class HubStream(ShardSource):
    """One split of a data set, read from the Hub or a folder without being downloaded or converted first; its shards are its files.

    `path`, `image` and `label` are those of HubPictures. `class_names` are needed where `label` is not a ClassLabel column:
    whole numbers and truths are positions among them, texts are looked up.

    Pictures that cannot be read are collected in `unreadable` as path[shard:row]. Errors as in HubPictures, and ValueError without
    class names; reading raises it for a label that has no class name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        image: str = "image",
        label: str = "label",
        augmentation: Augmentation | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.path, self.image, self.label = str(path), image, label
        self.rows = with_columns(open_split(self.path, split, streaming=True), self.path, image, label)
        self.shards = self.rows.num_shards
        names = class_names or named_classes(self.rows, label, self.path)
        if names is None:
            raise ValueError(f"the column {label!r} of {self.path} does not name its classes: give class_names")
        self.class_names = tuple(names)
        self.augmentation = augmentation or Augmentation()
        self.unreadable: list[Path] = []

    def read(self, shard: int) -> Iterator[Sample]:
        """See ShardSource."""
        rows = self.rows.shard(num_shards=self.shards, index=_one_of(range(self.shards), shard))
        positions = {name: position for position, name in enumerate(self.class_names)}
        for number, row in enumerate(rows.iter(batch_size=1)):  # plain iteration shares the rows out among loader workers
            name = Path(f"{self.path}[{shard}:{number}]")
            value = row[self.label][0] if self.label else 0
            label = positions.get(value, value) if isinstance(value, str) else int(value) if isinstance(value, bool) else value
            decode = partial(stored_picture, row[self.image][0], name)
            yield Sample(partial(readable, name, decode, self.unreadable), _checked_label(label, self.class_names, name))


def tar_files(pattern: str) -> list[Path]:
    """The .tar files of a folder, or those of a glob or brace pattern, in order; FileNotFoundError where one is missing."""
    parts = [f"{glob.escape(pattern)}/*.tar"] if Path(pattern).is_dir() else data_package("braceexpand").braceexpand(pattern)
    found: dict[Path, None] = {}  # in the order of the pattern, each once
    for part in parts:
        matches = [part] if Path(part).is_file() else sorted(glob.glob(part))  # a name may hold brackets
        if not matches:
            raise FileNotFoundError(f"there is no shard {part}: give a folder of .tar files, or a pattern such as train-{{0000..0099}}.tar")
        found |= dict.fromkeys(map(Path, matches))
    return list(found)


def shuffled(samples: Iterator[T], rng: np.random.Generator, buffer: int) -> Iterator[T]:
    """Every item once, each chosen at random among `buffer` of them, which are held at a time; 1 leaves the order as it is.

    Raises ValueError for a buffer below 1.
    """
    if buffer < 1:
        raise ValueError(f"buffer is {buffer}: at least 1 item must be held")
    held: list[T] = []
    for sample in samples:
        held.append(sample)
        if len(held) == buffer:
            place = rng.integers(buffer)
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    for place in rng.permutation(len(held)):
        yield held[place]


def _names_beside(shard: Path) -> tuple[str, ...]:
    listed = shard.parent / "classes.txt"
    try:
        names = listed.read_text(encoding="utf-8-sig").rstrip().splitlines() if listed.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{listed} is no text in UTF-8 ({error.reason}): save it as UTF-8") from None
    if not names:
        raise ValueError(f"the classes of {shard} have no names: list them in {listed}, one a line, or give class_names")
    for line, name in enumerate(names, 1):
        if not name.strip():
            raise ValueError(f"line {line} of {listed} is empty: name a class on every line")
    return tuple(name.strip() for name in names)


def _was_read_to_its_end(path: Path) -> bool:
    """Whether only padding follows what tarfile finds in a file: it takes a damaged or missing header for the end, and says nothing."""
    with path.open("rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it does not close the file
            while archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # of which a shard may have millions
        except tarfile.TarError:
            return False
        file.seek(archive.offset)
        padding = file.read(len(END_OF_TAR))
        return padding == END_OF_TAR and not any(part.strip(b"\0") for part in iter(partial(file.read, tarfile.RECORDSIZE), b""))


def _label_in(files: Mapping[str, bytes], otherwise: int | None) -> object:
    """The label of a sample in a tar file; `otherwise` where it has none."""
    try:
        return int(files["cls"]) if "cls" in files else json.loads(files["json"])["label"]
    except (KeyError, TypeError, ValueError):
        return otherwise


def _checked_label(label: object, class_names: Sequence[str], name: Path) -> int:
    if type(label) is not int or not 0 <= label < len(class_names):
        has = "no label" if label is None else f"the label {label!r}"
        raise ValueError(f"{name} has {has}: the {len(class_names)} classes have the labels 0 to {len(class_names) - 1}")
    return label


def _one_of(shards: Sequence[T], shard: int) -> T:
    if not 0 <= shard < len(shards):
        raise IndexError(f"shard {shard} does not exist: this source has {len(shards)} shards, 0 to {len(shards) - 1}")
    return shards[shard]
