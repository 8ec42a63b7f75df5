"""What a set of training pictures must offer, and how to write one out as class folders."""

from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from flexvar.progress import progress
from flexvar.writing import make_folder, refuse_file, write_whole


@runtime_checkable
class PictureSource(Protocol):
    """Labelled pictures, each of which can be had at any size.

    Drawn sources (emoji, shapes) have label = index % number of classes.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every class; a label is a position in this tuple."""
        ...

    def __len__(self) -> int:
        """Pictures in one epoch."""
        ...

    def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Picture `index` at `size` = (height, width) pixels: uint8 (height, width, 3) RGB, and its class label.

        All randomness (augmentation, scene) comes from `rng`: the same state of rng gives the same picture.
        """
        ...


def check_request(index: int, length: int, size: tuple[int, int]) -> None:
    """Refuse a picture that does not exist (IndexError) or that has no pixels (ValueError)."""
    if not 0 <= index < length:
        raise IndexError(f"picture {index} does not exist: this source has {length} pictures, 0 to {length - 1}")
    if min(size) < 1:
        raise ValueError(f"size {size} has no pixels: give (height, width), both at least 1")


def write_pictures(
    source: PictureSource,
    out: Path,
    *,
    count_per_class: int,
    size: tuple[int, int],
    seed: int,
    overwrite: bool = False,
) -> int:
    """Write a drawn source as `out`/<class name>/<0000>.png, with a README.txt that says how, and return the count.

    Picture i of class c is drawn with `np.random.default_rng((seed, c, i))` at `size` = (height, width), so it is the
    same however many pictures are written. The source must be a drawn one: label = index % number of classes.

    Raises FileExistsError where `out` holds something and `overwrite` is False, and ValueError for a count below 1
    or a source whose labels do not follow from the index. With `overwrite`, files of the same name are replaced and
    all others stay.
    """
    out = Path(out)
    if count_per_class < 1:
        raise ValueError(f"count_per_class is {count_per_class}: ask for at least 1 picture of each class")
    refuse_file(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty: choose another folder, or overwrite it with --overwrite")

    classes = len(source.class_names)
    for place in progress(range(classes * count_per_class), "writing pictures"):
        label, number = divmod(place, count_per_class)
        pixels, drawn = source.draw((number * classes + label) % len(source), size, np.random.default_rng((seed, label, number)))
        if drawn != label:
            raise ValueError(f"picture {number} of class {label} has label {drawn}: only drawn sources can be written")
        folder = out / source.class_names[label]
        make_folder(folder)
        write_whole(folder / f"{number:04d}.png", partial(Image.fromarray(pixels).save, format="PNG"))
    licence = getattr(source, "licence", "see the source")
    about = (
        f"{classes * count_per_class} pictures of {size[0]} x {size[1]} px (height x width) in {classes} classes, {count_per_class} each.\n"
        f"Source: flexvar {type(source).__name__}, seed {seed}.\n"
        f"Licence: {licence}\n"
    )
    write_whole(out / "README.txt", lambda beside: beside.write_text(about, encoding="utf-8"))
    return classes * count_per_class
