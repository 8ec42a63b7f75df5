"""Hugging Face data sets as training pictures, each picture at hand at any time: from the Hub or from a folder."""

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flexvar.data.images import Augmentation, decoded, next_readable, readable
from flexvar.data.source import check_request


class HubPictures:
    """A PictureSource over one split of a data set that lies on this machine, where the Hub's are downloaded to first.

    `path` is a Hub id, a folder of parquet files (or of what else `datasets.load_dataset` reads), or a folder written by
    `save_to_disk`. `image` and `label` are columns. The classes are those of a ClassLabel column, else the different
    values of a column of whole numbers or texts, in order; an empty `label` means a single class, called as the data set.

    Pictures that cannot be read are collected in `unreadable` as path[row], with one warning each (per process).

    Raises ModuleNotFoundError without the `datasets` package, ConnectionError where the data set is neither here nor
    within reach, and ValueError for a split or column that does not exist, holds something else, or is empty.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        image: str = "image",
        label: str = "label",
        augmentation: Augmentation | None = None,
    ) -> None:
        self.path = str(path)
        self.augmentation = augmentation or Augmentation()
        self.unreadable: list[Path] = []
        self.image = image
        rows = with_columns(open_split(self.path, split), self.path, image, label)
        if not len(rows):
            raise ValueError(f"the split {split!r} of {self.path} has no pictures: choose another one")
        self.rows = rows.select_columns([image])
        self.class_names, self.labels = _classes(rows, label, self.path)

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Picture `index` at `size` = (height, width): uint8 (height, width, 3) RGB, and its label. See PictureSource.

        In place of an unreadable picture comes the next readable one, with that one's label. Raises ValueError where
        none can be read.
        """
        check_request(index, len(self), size)
        picture, row = next_readable(index, len(self), self._readable)
        if picture is None:
            raise ValueError(f"none of the {len(self)} pictures in {self.path} can be read: check the column {self.image!r}")
        return self.augmentation.apply(picture, size, rng), int(self.labels[row])

    def _readable(self, row: int) -> Image.Image | None:
        name = Path(f"{self.path}[{row}]")
        return readable(name, lambda: stored_picture(self.rows[row][self.image], name), self.unreadable)


def data_package(name: str) -> Any:
    """The module of an optional package; ModuleNotFoundError, which says how to install it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        raise ModuleNotFoundError(f"these pictures need the package {missing}: pip install 'flexvar[data]'") from None


def open_split(path: str, split: str, streaming: bool = False) -> Any:
    """A split as a `datasets.Dataset`, or as an `IterableDataset` that decodes nothing. Errors as in HubPictures."""
    datasets = data_package("datasets")
    try:
        if any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise ValueError(f"there are {', '.join(splits)}")
            dataset = splits[split]
            if streaming:
                dataset = dataset.to_iterable_dataset(num_shards=max(1, len(dataset.cache_files)))
        else:
            with _quiet_hub():
                dataset = datasets.load_dataset(path, split=split, streaming=streaming)
        # load_dataset lets threads decode the pictures of a stream beforehand, which hangs in loader workers
        return dataset.decode(False) if streaming else dataset
    except ConnectionError as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"{path} is no folder, and the Hub is out of reach ({reason}): check path and connection") from None
    except Exception as error:  # datasets raises anything
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)  # which says nothing but this
        reason = " ".join(str((generating and error.__cause__) or error).split())
        raise ValueError(f"the split {split!r} of {path} cannot be opened: {reason}") from None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the lines that the Hub's client logs of every try: what comes of them is said once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def with_columns(dataset: Any, path: str, image: str, label: str) -> Any:
    """The data set with these columns alone, its pictures not decoded; ValueError where a column is missing or holds no pictures."""
    features = data_package("datasets").features
    if image == label:
        raise ValueError(f"image and label are both the column {image!r}: name another one, or an empty label for a single class")
    columns = [image, label] if label else [image]
    for column in columns:
        if column not in dataset.features:
            raise ValueError(f"{path} has no column {column!r}: there are {', '.join(dataset.features)}")
    dataset, kind = dataset.select_columns(columns), dataset.features[image]
    if isinstance(kind, features.Image):
        return dataset.cast_column(image, features.Image(decode=False))
    holds_files = "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "large_binary")
    if holds_files:
        return dataset
    raise ValueError(f"the column {image!r} of {path} holds {kind}, not pictures: choose among {', '.join(dataset.features)}")


def stored_picture(value: Any, name: Path) -> Image.Image:
    """A picture as a data set stores it: the content of its file, alone or beside a path, or the path or address alone.

    Mode RGB, as `open_picture` gives it. Raises OSError or ValueError where it cannot be read.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is None and path:
        with data_package("fsspec").open(path, "rb") as file:
            content = file.read()
    if content is None:
        raise ValueError(f"{name} is empty: replace or remove it")
    return decoded(content, name)


def named_classes(dataset: Any, label: str, path: str) -> tuple[str, ...] | None:
    """The class names that are known without a look at the labels; None where there are none."""
    if not label:
        return (Path(path).resolve().name,)
    names: Sequence[str] | None = getattr(dataset.features[label], "names", None)
    return None if names is None else tuple(names)


def _classes(dataset: Any, label: str, path: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names, and the label (N,) int64 of every picture."""
    names = named_classes(dataset, label, path)
    values = dataset.select_columns([label])[:][label] if label else [0] * len(dataset)
    without = sum(value is None or (names is not None and value < 0) for value in values)  # the Hub's test splits have -1
    if without:
        raise ValueError(f"{without} of {len(values)} pictures in {path} have no {label!r}: choose another split, or another column")
    if names is not None:
        return names, np.asarray(values, np.int64)
    if not isinstance(values[0], int | str):
        raise ValueError(f"the column {label!r} of {path} holds {dataset.features[label]}: labels are whole numbers or texts")
    different, labels = np.unique(values, return_inverse=True)
    return tuple(str(value) for value in different), labels.astype(np.int64)
