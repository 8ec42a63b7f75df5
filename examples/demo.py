"""What FlexVAR does, drawn by the bundled model: `python -m examples.demo OUT_FOLDER [--model MODEL]`.

Four sheets: classes, sizes and aspect ratios, numbers of steps, all scales of some pictures. And one class growing in three shapes, a film.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image

from flexvar import FlexVARPipeline
from flexvar.sheet import sheet, to_pil

SHOWN = ("pizza", "panda", "ghost", "red heart", "frog", "rocket", "sunflower", "octopus", "cat face", "strawberry", "cactus", "rainbow")
SHOWN_SIDE = 128  # px: smaller models' pictures are enlarged, as sheets are for people
FRAME, PAUSE = 350, 2000  # milliseconds


def zoom_of(pipe: FlexVARPipeline) -> int:
    """How much larger the pictures of a small model are shown."""
    return max(1, SHOWN_SIDE // pipe.defaults.height)


def of_side(pipe: FlexVARPipeline, share: float) -> int:
    """A share of the model's own side, in px and whole codes."""
    f = pipe.tokenizer.config.downsample
    return max(1, round(pipe.defaults.height * share / f)) * f


def enlarged(picture: Image.Image, zoom: int) -> Image.Image:
    """A small picture, for the eye."""
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)


def classes_sheet(pipe: FlexVARPipeline) -> Image.Image:
    """Twelve classes, three pictures of each."""
    names = [name for name in SHOWN if name in pipe.class_names] or list(pipe.class_names[:12])
    drawn = [pipe(names, seed=100 * row, batch_size=12).images for row in range(3)]
    return sheet([[enlarged(picture, zoom_of(pipe)) for picture in row] for row in drawn], [names, [], []])


def sizes_sheet(pipe: FlexVARPipeline, label: str) -> Image.Image:
    """One class at six sizes, from 1:3 to 3:1 and beyond the training size, with the same seed."""
    side, small, half, large, long = (of_side(pipe, share) for share in (1, 0.625, 0.75, 1.5, 1.875))
    sizes = [(side, side), (small, long), (half, large), (long, small), (large, half), (large, large)]
    pictures = [enlarged(pipe(label, height=height, width=width, seed=7).images[0], zoom_of(pipe)) for height, width in sizes]
    captions = [f"{height} x {width}" for height, width in sizes]
    return sheet([pictures[:3], pictures[3:]], [captions[:3], captions[3:]])


def steps_sheet(pipe: FlexVARPipeline, labels: list[str]) -> Image.Image:
    """The same seeds in four numbers of steps."""
    numbers = (6, 8, 10, 13)
    rows = [[enlarged(picture, zoom_of(pipe)) for picture in pipe(labels, num_inference_steps=steps, seed=3).images] for steps in numbers]
    drawn = [len(pipe.settings.schedule_of(num_inference_steps=steps)) for steps in numbers]  # equal scales merge, so there may be fewer
    return sheet(rows, [[f"{steps} steps"] for steps in drawn])


def growing(pipe: FlexVARPipeline, label: str) -> list[Image.Image]:
    """The frames of a film: a square, a row and a column of one class, scale by scale and side by side."""
    side, small, long = (of_side(pipe, share) for share in (1, 0.625, 1.875))
    films = []
    for height, width in ((side, side), (small, long), (long, small)):
        steps = pipe.stream(label, height=height, width=width, seed=7)
        full = width * zoom_of(pipe), height * zoom_of(pipe)
        films.append([to_pil(step.images)[0].resize(full, Image.Resampling.BICUBIC) for step in steps])
    last = max(map(len, films))
    return [sheet([[film[min(frame, len(film) - 1)] for film in films]]) for frame in range(last)]


def scales_sheet(pipe: FlexVARPipeline, labels: list[str]) -> Image.Image:
    """Every scale of some pictures, each decoded by itself: each is a whole picture."""
    steps = list(pipe.stream(labels, seed=11))
    full = steps[-1].images.shape[-1] * zoom_of(pipe)
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
    labels: list[str] = [name for name in ("pizza", "frog", "rocket", "panda") if name in pipe.class_names] or list(pipe.class_names[:4])
    fruit = "watermelon" if "watermelon" in pipe.class_names else labels[0]
    words.out.mkdir(parents=True, exist_ok=True)
    sheets = {
        "classes.png": lambda: classes_sheet(pipe),
        "sizes.png": lambda: sizes_sheet(pipe, fruit),
        "steps.png": lambda: steps_sheet(pipe, labels),
        "scales.png": lambda: scales_sheet(pipe, labels),
    }
    for name, draw in sheets.items():
        began = time.perf_counter()
        draw().save(words.out / name)
        print(f"{words.out / name}  ({time.perf_counter() - began:.1f} s)", flush=True)
    first, *others = growing(pipe, fruit)
    durations = [FRAME] * len(others) + [PAUSE]
    first.save(words.out / "growing.webp", save_all=True, append_images=others, duration=durations, loop=0, quality=90)
    print(words.out / "growing.webp")


if __name__ == "__main__":
    main()
