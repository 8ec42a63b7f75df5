"""Folders of pictures: read in whatever form they come, resized and cropped to the size asked for."""

import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flexvar.checks import warn
from flexvar.data.source import check_request

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


@dataclass(frozen=True)
class Augmentation:
    """How a picture becomes one of the size asked for.

    It is resized to cover the size times a factor drawn from the range `resize`, cropped at a random place and, with
    `flip`, mirrored every second time. Where it is not `random` (evaluation), it is resized to just cover the size and
    cropped at the centre, and `resize` and `flip` have no effect.

    Raises ValueError for a `resize` that is not 1 <= smallest <= largest.
    """

    flip: bool = True
    resize: tuple[float, float] = (1.0, 1.136)
    random: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.resize[0] <= self.resize[1] < math.inf:
            raise ValueError(f"resize is {tuple(self.resize)}: give (smallest, largest) factors of at least 1")

    def apply(self, picture: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A picture of mode RGB at `size` = (height, width): uint8 (height, width, 3)."""
        if not self.random:
            return np.array(fitted(picture, size))
        factor = rng.uniform(*self.resize)
        place_x, place_y, chance = rng.random(3)
        cropped = fitted(picture, size, factor, (place_x, place_y))
        return np.array(ImageOps.mirror(cropped) if self.flip and chance < 0.5 else cropped)


class ImageFolder:
    """A PictureSource over a folder of class folders, in sorted order: `root`/<class>/**/*.png, jpg and so on (`EXTENSIONS`).

    A folder that holds pictures and no class folders is one class with the folder's name. Folders with ImageNet's
    names (n01440764) get the class's English name (tench).

    `flip`, `resize` and `augment` make the `Augmentation`, which calls the last one `random`. Files that cannot be read
    are collected in `unreadable`, with one warning each (per process).

    Raises FileNotFoundError for a folder that is missing or has no pictures, and ValueError for an empty class folder,
    pictures beside class folders, or a `resize` that is not 1 <= smallest <= largest.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        flip: bool = True,
        resize: tuple[float, float] = (1.0, 1.136),
        augment: bool = True,
    ) -> None:
        self.augmentation = Augmentation(flip, resize, augment)
        self.root = Path(root)
        self.unreadable: list[Path] = []
        classes = _classes_in(self.root)
        names = dict(imagenet_classes())
        self.class_names: tuple[str, ...] = tuple(names.get(name, name) for name in classes)
        self._names = _Names(str(path.relative_to(self.root)) for paths in classes.values() for path in paths)
        self._labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes.values()])

    def __len__(self) -> int:
        return len(self._labels)

    def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Picture `index` at `size` = (height, width): uint8 (height, width, 3) RGB, and its label. See PictureSource.

        In place of an unreadable file comes the next readable one, with that one's label. Raises ValueError where no
        file can be read.
        """
        check_request(index, len(self), size)
        picture, place = next_readable(index, len(self), self._readable)
        if picture is None:
            raise ValueError(f"none of the {len(self)} pictures in {self.root} can be read: check the files")
        return self.augmentation.apply(picture, size, rng), int(self._labels[place])

    def _readable(self, place: int) -> Image.Image | None:
        path = self.root / self._names[place]
        return readable(path, partial(open_picture, path), self.unreadable)


class _Names:
    """Names of files, end to end: as a list, those of millions of pictures take gigabytes in each of the processes that prepare them."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.text, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]])


def fitted(picture: Image.Image, size: tuple[int, int], factor: float = 1.0, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A picture resized to cover `size` = (height, width) times `factor`, and cropped to it at a place (x, y), 0 to 1 from left and top.

    In one pass: the crop is chosen in the picture's own pixels, and only it is resampled.
    """
    height, width = size
    scale = max(height / picture.height, width / picture.width) * factor
    crop_width, crop_height = min(width / scale, picture.width), min(height / scale, picture.height)
    left, top = place[0] * (picture.width - crop_width), place[1] * (picture.height - crop_height)
    box = (left, top, min(left + crop_width, picture.width), min(top + crop_height, picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as a person sees it: mode RGB, upright as its EXIF tag says, transparency over white.

    Grey, palette, CMYK and 16-bit pictures are converted, of an animation the first frame is taken. Raises
    FileNotFoundError where there is no such file, and ValueError where it is not an image or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {path}: check the path")
    return decoded(path, path)


def decoded(
    stored: bytes | str | os.PathLike[str], name: object, convert: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """The picture in the content of a file, or in a file, as `open_picture` or `convert` gives it; `name` is for the error.

    Raises ValueError where it is no image or is damaged, and MemoryError where it finds no room.
    """
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            return (convert or upright_rgb)(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image: replace or remove it") from None
    except MemoryError:
        raise MemoryError(f"not enough memory to read {name}; free some, or read with fewer processes (workers=)") from None
    except (Exception, Image.DecompressionBombError) as error:  # decoders raise anything on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason}): replace or remove it") from None


def readable(name: Path, decode: Callable[[], Image.Image], unreadable: list[Path]) -> Image.Image | None:
    """What `decode` gives; None where it cannot: then, once, `name` joins `unreadable` and a warning says why."""
    if name in unreadable:
        return None
    try:
        return decode()
    except (OSError, ValueError) as error:
        unreadable.append(name)
        warn(f"skipped a picture: {error}")
        return None


def next_readable(index: int, count: int, read: Callable[[int], Image.Image | None]) -> tuple[Image.Image | None, int]:
    """The picture at `index`, else the next of `count` in a circle that `read` gives, and its place; None where it gives none."""
    places = ((index + step) % count for step in range(count))
    return next(((picture, place) for place in places if (picture := read(place)) is not None), (None, index))


def count_of_unreadable(names: Collection[str | os.PathLike[str]]) -> str:
    """How many pictures could not be read, and which, in one line that holds the first few names, with their class folders."""
    first = ", ".join("/".join(Path(name).parts[-2:]) for name in sorted(map(str, names))[:3])
    return f"{len(names)} pictures could not be read and were skipped: {first}{' ...' if len(names) > 3 else ''}"


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """ImageNet's 1,000 classes in index order, as (folder name, English name): ("n01440764", "tench") is the first.

    Names are unique: the first lemma of the WordNet synset, as listed in timm (Apache-2.0), except where two classes
    share it.
    """
    text = (files("flexvar") / "assets" / "imagenet.json").read_text(encoding="ascii")
    return tuple((folder, name) for folder, name in json.loads(text))


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as a person sees it: mode RGB, turned as its EXIF tag says, transparency over white."""
    image = upright(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB") if image.mode == "RGBA" else image


def upright(image: Image.Image) -> Image.Image:
    """A picture of any mode turned as its EXIF tag says: mode RGBA where something may be transparent, otherwise RGB.

    ValueError for numbers whose range it does not say: floats, and whole ones of 32 bits that are not those of 16.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("the picture holds floats of unknown range (mode F); convert it to mode L for 0 to 255")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white instead of scaling
        values = np.asarray(image).astype(np.float32)
        if image.mode == "I" and not 255 < values.max() <= 65535:
            raise ValueError(f"the picture holds whole numbers up to {values.max():.0f} in 32 bits; convert it to mode L for 0 to 255")
        grey = Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8))
        if (hidden := image.info.get("transparency")) is None:
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
        return grey.convert("RGBA")
    if image.mode == "La":  # which converts to nothing else
        image = image.convert("LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _classes_in(root: Path) -> dict[str, list[Path]]:
    """Folder name -> pictures of every class in `root`, sorted by name, so that every machine numbers them alike."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: check the path of the pictures")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    loose = [path for path in entries if _is_picture(path.name) and path.is_file()]
    classes = {path.name: pictures_below(path) for path in entries if path.is_dir()}
    if not any(classes.values()):
        if not loose:
            wanted = ", ".join(EXTENSIONS)
            raise FileNotFoundError(f"no pictures in {root}: put {wanted} files into one folder per class")
        return {root.resolve().name: loose}
    if loose:
        raise ValueError(f"{root} holds pictures beside class folders: move {loose[0].name} into a class folder")
    for name, pictures in classes.items():
        if not pictures:
            raise ValueError(f"the class folder {root / name} has no pictures: fill or remove it")
    return classes


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder and those below it, links to folders included and what is hidden left out, in the order of their paths."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(place, name))]
        found += [Path(place, name) for name in names if _is_picture(name)]
    return sorted(found)


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to itself or to one above it, and so would be entered for ever."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
