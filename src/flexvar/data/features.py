"""The feature cache: what a frozen tokenizer makes of fixed views of each picture, so that training needs no encoder.

A folder of cache.json and features-00000.safetensors, -00001, ...; a shard is whole or absent, and the same settings continue an
unfinished cache. `FixedViews` gives online the very pictures whose features `FeatureCache` reads. The metadata of a shard holds a
checksum for each tensor, and names the pictures that could not be read.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexvar.data.source import PictureSource, check_request
from flexvar.progress import progress
from flexvar.schedule import Size, grid_of
from flexvar.writing import make_folder, refuse_file, write_whole

FORMAT = 1
SETTINGS = "cache.json"
LABELS, UNREADABLE, UNREADABLE_CHECKSUM = "labels", "unreadable", "unreadable checksum"
DTYPES: dict[str, np.dtype] = {"F16": np.dtype(np.float16), "I64": np.dtype(np.int64)}  # by their names in a safetensors file
AGAIN = "run the same `flexvar cache` command again, without --overwrite"


class FixedViews:
    """A PictureSource with a fixed number of views of each picture of another one, the same whenever they are drawn.

    View v of picture i is drawn with `np.random.default_rng((seed, i, v))`. Raises ValueError for views below 1 or a seed below 0.
    """

    def __init__(self, source: PictureSource, seed: int, views: int) -> None:
        if views < 1 or seed < 0:
            raise ValueError(f"views is {views} and seed {seed}: give at least 1 view of each picture and a seed of at least 0")
        self.source, self.seed, self.views = source, seed, views
        self.class_names = source.class_names

    @property
    def unreadable(self) -> list[Path]:
        """The files that the source could not read; empty for sources without files."""
        return getattr(self.source, "unreadable", [])

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, index: int, size: Size, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """One view of picture `index`, chosen by one draw of `rng`: uint8 (height, width, 3) RGB, and its label. See PictureSource."""
        return self.view(index, int(rng.integers(self.views)), size)

    def view(self, index: int, view: int, size: Size) -> tuple[np.ndarray, int]:
        """View `view` of picture `index` at `size` = (height, width): uint8 (height, width, 3) RGB, and its label.

        Raises IndexError for a view that does not exist.
        """
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} does not exist: each picture has {self.views} views, 0 to {self.views - 1}")
        return self.source.draw(index, size, np.random.default_rng((self.seed, index, view)))


@dataclass(frozen=True)
class CacheSettings:
    """What cache.json says: all that a cache's features follow from. ValueError where a value is impossible."""

    tokenizer_sha256: str  # of the frozen tokenizer's file
    class_names: tuple[str, ...]
    sizes: tuple[Size, ...]  # (height, width) of the pictures, in pixels
    downsample: int
    code_width: int  # C
    views: int  # of each picture
    seed: int  # of the views, see FixedViews
    pictures: int
    pictures_per_shard: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the pictures come from and how they are augmented. A cache is not continued with another one: leave dates out."""

    def __post_init__(self) -> None:
        for name in ("downsample", "code_width", "views", "seed", "pictures", "pictures_per_shard"):
            least = 0 if name == "seed" else 1
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} of the cache is {value!r}; it must be a whole number of at least {least}")
        if not self.class_names or not all(isinstance(text, str) for text in (self.tokenizer_sha256, *self.class_names)):
            raise ValueError("tokenizer_sha256 and class_names must be texts; give one name for each class, at least one")
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"the sizes of the cache are {self.sizes}; give different (height, width) pairs, at least one")
        for height, width in self.sizes:
            grid_of(height, width, self.downsample)
        try:
            json.dumps(self.provenance)
        except TypeError as error:
            raise ValueError(f"provenance cannot be written as JSON ({error}); use texts, numbers, lists and tables") from error

    @classmethod
    def read(cls, folder: Path | str) -> CacheSettings:
        """The settings of the cache in a folder. FileNotFoundError where it holds none, ValueError where they are damaged."""
        path = Path(folder) / SETTINGS
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a feature cache: it holds no {SETTINGS}; write one with `flexvar cache`")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") > FORMAT:
                raise ValueError(f"the format is newer than this flexvar can read ({FORMAT}); update flexvar")
            class_names, sizes = tuple(values.pop("class_names")), tuple((height, width) for height, width in values.pop("sizes"))
            return cls(class_names=class_names, sizes=sizes, **values)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); write the cache anew with --overwrite") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def as_json(self) -> str:
        """The text of cache.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @property
    def shards(self) -> int:
        """How many shards a finished cache has."""
        return -(-self.pictures // self.pictures_per_shard)

    def pictures_of(self, shard: int) -> range:
        """The pictures whose features stand in a shard. IndexError where there is no such shard."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} does not exist: this cache has {self.shards}, 0 to {self.shards - 1}")
        return range(shard * self.pictures_per_shard, min((shard + 1) * self.pictures_per_shard, self.pictures))

    def tensors(self, shard: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The name, dtype and shape of each tensor of a shard: n labels and, a size, features (n, views, C, h, w)."""
        n = len(self.pictures_of(shard))
        shapes = {_name(size): (n, self.views, self.code_width, *grid_of(*size, self.downsample)) for size in self.sizes}
        return {LABELS: (DTYPES["I64"], (n,)), **{name: (DTYPES["F16"], shape) for name, shape in shapes.items()}}


class CacheWriter:
    """Writes a cache shard by shard. Several processes may do so at once, each other shards.

    Begins the cache, or goes on with the one that the folder holds; with `overwrite` (one process alone, before the others) that one is
    deleted first. Raises FileExistsError where, without it, the folder holds a cache with other settings, or something else.
    """

    def __init__(self, folder: Path | str, settings: CacheSettings, *, overwrite: bool = False) -> None:
        self.folder, self.settings, self._shards = Path(folder), settings, _Shards(Path(folder), settings)
        refuse_file(self.folder)
        make_folder(self.folder)
        if overwrite:
            for path in (*self.folder.glob("features-*.safetensors"), *self.folder.glob(".features-*.unfinished")):
                path.unlink()
        elif self._goes_on():
            return
        write_whole(self.folder / SETTINGS, lambda beside: beside.write_text(settings.as_json(), encoding="utf-8"))

    def _goes_on(self) -> bool:
        """Whether the folder holds this very cache; False where it holds nothing."""
        filled = any(not path.name.startswith(".") for path in self.folder.iterdir())  # first, as another process may be beginning
        if not (self.folder / SETTINGS).exists():
            if filled:
                raise FileExistsError(f"{self.folder} is not empty and no feature cache: choose another folder, or use it with --overwrite")
            return False
        old, new = (json.loads(settings.as_json()) for settings in (CacheSettings.read(self.folder), self.settings))
        different = [f"{name} is {reprlib.repr(old[name])}, not {reprlib.repr(new[name])}" for name in new if old[name] != new[name]]
        if different:
            what = f"{self.folder} holds a cache with other settings ({'; '.join(different)})"
            raise FileExistsError(f"{what}: choose another folder, or replace it with --overwrite")
        return True

    def missing(self) -> list[int]:
        """The shards that are still to be written."""
        return self._shards.missing()

    def pictures_of(self, shard: int) -> range:
        """The pictures whose features belong into a shard. IndexError where there is no such shard."""
        return self.settings.pictures_of(shard)

    def write(self, shard: int, labels: np.ndarray, features: Mapping[Size, np.ndarray], unreadable: Collection[str] = ()) -> None:
        """Writes a shard: labels (n,) int64 and, for each size of the cache, features (n, views, C, h, w) float16.

        n = len(pictures_of(shard)). `unreadable` names the pictures in whose place others stand. Raises ValueError for other sizes,
        shapes or dtypes, for labels without a class, and for features that are not finite.
        """
        if set(features) != set(self.settings.sizes):
            raise ValueError(f"features of {[*features]} for a cache of {[*self.settings.sizes]}: give each of its sizes, and no other")
        tensors = {LABELS: labels, **{_name(size): features[size] for size in self.settings.sizes}}
        for name, (dtype, shape) in self.settings.tensors(shard).items():
            values = tensors[name]
            if values.dtype != dtype or values.shape != shape:
                raise ValueError(f"{name} of shard {shard}: {values.dtype} {values.shape} must be {dtype} {shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} of shard {shard}: some features are not finite in float16; check the tokenizer")
            tensors[name] = np.ascontiguousarray(values)
        last = len(self.settings.class_names) - 1
        if labels.min() < 0 or labels.max() > last:
            raise ValueError(f"labels of shard {shard} run from {labels.min()} to {labels.max()}; the classes are 0 to {last}")
        path = self._shards.path(shard)
        names = json.dumps(sorted(unreadable))
        checksums = {UNREADABLE_CHECKSUM: _checksum(names.encode()), **{name: _checksum(values.data) for name, values in tensors.items()}}
        metadata = {UNREADABLE: names, **checksums}
        write_whole(path, partial(save_file, tensors, metadata=metadata))
        for leftover in self.folder.glob(f".{path.name}.*.unfinished"):  # of a process that was killed
            leftover.unlink()


class FeatureCache:
    """A finished cache to train from: what the tokenizer makes of `FixedViews`, memory-mapped, so that worker processes share it.

    `settings` is its cache.json, `labels` (pictures,) int64 are those of all pictures, `unreadable` names those in whose place others
    stand. Raises FileNotFoundError for a folder without a cache, and ValueError where a shard is missing, truncated or of another cache.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.settings = Path(folder), CacheSettings.read(folder)
        self.class_names = self.settings.class_names
        self._shards = _Shards(self.folder, self.settings)
        if missing := self._shards.missing():
            raise ValueError(self._shards.unfinished(missing))
        files = [self._shards.open(shard) for shard in range(self.settings.shards)]
        self.labels = np.concatenate([file.get_tensor(LABELS) for file in files])
        named = [self._shards.unreadable(shard, file) for shard, file in enumerate(files)]
        self.unreadable = [Path(name) for name in sorted({name for names in named for name in names})]
        self._files: dict[int, safe_open] = {}  # by shard, opened when first needed

    def __len__(self) -> int:
        return self.settings.pictures

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # an open file cannot be sent to a worker process

    def check_size(self, size: Size) -> None:
        """Raises ValueError for a size = (height, width) that is not cached."""
        if size not in self.settings.sizes:
            cached = ", ".join(map(_name, self.settings.sizes))
            raise ValueError(f"size {_name(size)} is not cached: {self.folder} holds {cached} (height x width); ask for one of them")

    def draw(self, index: int, size: Size, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Features (C, h, w) float16 of the view of picture `index` at `size` = (height, width) that FixedViews draws, and its label.

        Raises IndexError for a picture that does not exist and ValueError for a size that is not cached.
        """
        check_request(index, len(self), size)
        self.check_size(size)
        view = int(rng.integers(self.settings.views))
        shard, row = divmod(index, self.settings.pictures_per_shard)
        if shard not in self._files:
            self._files[shard] = self._shards.open(shard)
        return self._files[shard].get_slice(_name(size))[row, view], int(self.labels[index])  # reads this one view


def verify(folder: Path | str) -> list[str]:
    """Reads a whole cache again: one line for each shard that is damaged, and one for those that are missing. Empty: all is well.

    Raises FileNotFoundError or ValueError where cache.json is missing or damaged.
    """
    shards = _Shards(Path(folder), CacheSettings.read(folder))
    missing = shards.missing()
    there = sorted(set(range(shards.settings.shards)) - set(missing))
    complaints = [shards.complaint(shard) for shard in progress(there, f"checking {folder}")]
    return [text for text in (*complaints, shards.unfinished(missing) if missing else "") if text]


@dataclass(frozen=True)
class _Shards:
    """The shard files of a cache."""

    folder: Path
    settings: CacheSettings

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        return [shard for shard in range(self.settings.shards) if not self.path(shard).exists()]

    def unfinished(self, missing: list[int]) -> str:
        return f"{self.folder} is unfinished: {len(missing)} of {self.settings.shards} shards are missing; {AGAIN}, to go on"

    def open(self, shard: int) -> safe_open:
        """A shard's file, mapped into memory. ValueError where it is truncated, or its tensors are not those of this cache."""
        try:
            file = safe_open(self.path(shard), "np")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        except SafetensorError as error:
            raise ValueError(self._damaged(shard, str(error))) from error
        tensors = {name: (DTYPES.get(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
        if tensors != self.settings.tensors(shard):
            raise ValueError(self._damaged(shard, f"its tensors are not those that {SETTINGS} tells of"))
        return file

    def complaint(self, shard: int) -> str:
        """What is wrong with a shard; nothing where its bytes are those that were written."""
        try:
            file = self.open(shard)
            self.unreadable(shard, file)
        except ValueError as error:
            return str(error)
        written = file.metadata() or {}
        changed = [name for name in self.settings.tensors(shard) if written.get(name) != _checksum(file.get_tensor(name).data)]
        return self._damaged(shard, f"{changed[0]} is not what was written") if changed else ""

    def unreadable(self, shard: int, file: safe_open) -> list[str]:
        """The names of pictures in whose place others stand. ValueError where they are not what was written."""
        written = file.metadata() or {}
        names = written.get(UNREADABLE, "[]")
        if written.get(UNREADABLE_CHECKSUM, _checksum(b"[]")) != _checksum(names.encode()):
            raise ValueError(self._damaged(shard, f"{UNREADABLE} is not what was written"))
        return json.loads(names)

    def _damaged(self, shard: int, reason: str) -> str:
        return f"{self.path(shard)} is damaged ({reason}); delete it and {AGAIN}"


def _checksum(values: bytes | memoryview) -> str:
    return f"{zlib.crc32(values):08x}"


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
