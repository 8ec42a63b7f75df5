"""What FlexVAR does, in four sheets drawn by the bundled model: `python -m examples.demo OUT_FOLDER [--model MODEL]`.

Classes, sizes and aspect ratios, numbers of steps, and every scale of one picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image

from flexvar import FlexVARPipeline, Schedule
from flexvar.sheet import sheet, to_pil

SHOWN = ("pizza", "panda", "ghost", "red heart", "frog", "rocket", "sunflower", "octopus", "cat face", "strawberry", "cactus", "rainbow")
ZOOM = 2  # the bundled model draws 64 px pictures; sheets are for people


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture at twice its size, for the eye."""
    return picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.BICUBIC)


def classes_sheet(pipe: FlexVARPipeline) -> Image.Image:
    """Twelve classes, three pictures of each."""
    names = [name for name in SHOWN if name in pipe.class_names] or list(pipe.class_names[:12])
    drawn = [pipe(names, seed=100 * row, batch_size=12).images for row in range(3)]
    return sheet([[enlarged(picture) for picture in row] for row in drawn], [names, [], []])


def sizes_sheet(pipe: FlexVARPipeline, label: str) -> Image.Image:
    """One class at six sizes, from 1:3 to 3:1 and beyond the training size, with the same seed."""
    side = pipe.defaults.height
    small, long = side * 5 // 8, side * 15 // 8
    half, large = side * 3 // 4, side * 3 // 2
    sizes = [(side, side), (small, long), (half, large), (long, small), (large, half), (large, large)]
    pictures = [enlarged(pipe(label, height=height, width=width, seed=5, top_p=0.8).images[0]) for height, width in sizes]
    captions = [f"{height} x {width}" for height, width in sizes]
    return sheet([pictures[:3], pictures[3:]], [captions[:3], captions[3:]])


def steps_sheet(pipe: FlexVARPipeline, labels: list[str]) -> Image.Image:
    """The same seeds in four numbers of steps."""
    f, side = pipe.tokenizer.config.downsample, pipe.defaults.height
    last = side // f
    schedules = [Schedule.square(sides) for sides in ([1, 2, last], [1, 2, 4, last], [1, 2, 3, 4, 6, last], list(range(1, last + 1)))]
    rows = [[enlarged(picture) for picture in pipe(labels, schedule=schedule, seed=3).images] for schedule in schedules]
    return sheet(rows, [[f"{len(schedule)} steps"] for schedule in schedules])


def scales_sheet(pipe: FlexVARPipeline, labels: list[str]) -> Image.Image:
    """Every scale of some pictures, each decoded by itself: each is a whole picture."""
    steps = list(pipe.stream(labels, seed=11))
    full = steps[-1].images.shape[-1] * ZOOM
    columns = [[picture.resize((full, full), Image.Resampling.NEAREST) for picture in to_pil(step.images)] for step in steps]
    rows = [list(row) for row in zip(*columns, strict=True)]
    captions = [f"{h} x {w} codes" for h, w in (step.size for step in steps)]
    return sheet(rows, [captions] + [[] for _ in rows[1:]])


def main() -> None:
    arguments = argparse.ArgumentParser(description="Draws four sheets that show what FlexVAR does.")
    arguments.add_argument("out", type=Path, metavar="OUT_FOLDER")
    arguments.add_argument("--model", default="emoji")
    words = arguments.parse_args()
    pipe = FlexVARPipeline.from_pretrained(words.model)
    labels = [name for name in ("pizza", "frog", "rocket", "panda") if name in pipe.class_names] or list(pipe.class_names[:4])
    words.out.mkdir(parents=True, exist_ok=True)
    sheets = {
        "classes.png": lambda: classes_sheet(pipe),
        "sizes.png": lambda: sizes_sheet(pipe, "sunflower" if "sunflower" in pipe.class_names else labels[0]),
        "steps.png": lambda: steps_sheet(pipe, labels),
        "scales.png": lambda: scales_sheet(pipe, labels),
    }
    for name, draw in sheets.items():
        began = time.perf_counter()
        draw().save(words.out / name)
        print(f"{words.out / name}  ({time.perf_counter() - began:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
