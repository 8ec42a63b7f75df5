"""Has it memorised? `python -m examples.nearest OUT.png [--model MODEL]`: samples, and under each the rendering that is nearest to it.

Renderings are composed as those of the training are; of each class, the nearest of many by the mean squared difference of all pixels.
A third row shows the same renderings through the tokenizer and back: no sample can be sharper.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.demo import SHOWN, enlarged, zoom_of
from flexvar import FlexVARPipeline
from flexvar.data import EmojiScenes
from flexvar.evaluation import renderings
from flexvar.progress import progress
from flexvar.sheet import sheet, to_pil


def nearest(pictures: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each of (N, 3, H, W) the nearest of (M, 3, H, W): their positions (N,), and the root of the mean squared difference (N,)."""
    distances, positions = torch.cdist(pictures.clamp(-1, 1).flatten(1), among.flatten(1)).min(1)
    return positions, distances / pictures[0].numel() ** 0.5


def nearest_sheet(pipe: FlexVARPipeline, names: list[str], count: int) -> Image.Image:
    """A column a class: a sample, the nearest of `count` renderings and how far apart they are in levels of 255, and it rebuilt."""
    size = pipe.defaults.height, pipe.defaults.width
    samples = pipe(names, seed=21, output_type="pt").images * 2 - 1
    found, captions = [], []
    for name, sample in zip(progress(names, "rendering"), samples, strict=True):
        scenes, _ = renderings(EmojiScenes([name]), count, size, seed=0)
        (position,), (distance,) = nearest(sample[None], scenes)
        found.append(scenes[position])
        captions.append(f"{distance * 127.5:.0f} levels apart")
    drawn, real = to_pil(samples), to_pil(torch.stack(found))
    rebuilt = [pipe.reconstruct(picture).images[0] for picture in real]
    rows = [[enlarged(picture, zoom_of(pipe)) for picture in row] for row in (drawn, real, rebuilt)]
    return sheet(rows, [names, captions, ["rebuilt"] * len(names)])


def main() -> None:
    arguments = argparse.ArgumentParser(description="Samples, and the renderings nearest to them.")
    arguments.add_argument("out", type=Path, metavar="OUT.png")
    arguments.add_argument("--model", default="emoji")
    arguments.add_argument("--count", type=int, default=1000, help="renderings of each class (default 1000)")
    words = arguments.parse_args()
    pipe = FlexVARPipeline.from_pretrained(words.model)
    names = [name for name in SHOWN if name in pipe.class_names][:8]
    words.out.parent.mkdir(parents=True, exist_ok=True)
    nearest_sheet(pipe, names, words.count).save(words.out)


if __name__ == "__main__":
    main()
