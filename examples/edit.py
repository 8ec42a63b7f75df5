"""Every edit of some drawn pictures: `python -m examples.edit OUT_FILE.png [CLASS ...] [--model NAME]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from examples.demo import enlarged, zoom_of
from flexvar import FlexVARPipeline
from flexvar.sheet import sheet


def main() -> None:
    arguments = argparse.ArgumentParser(description="Refines, inpaints, outpaints and enlarges pictures that the model has drawn.")
    arguments.add_argument("out", type=Path, metavar="OUT_FILE.png")
    arguments.add_argument("labels", nargs="*", default=["pizza", "strawberry", "sunflower"], metavar="CLASS")
    arguments.add_argument("--model", default="emoji", help="another model's name or folder")
    words = arguments.parse_args()
    pipe, rows = FlexVARPipeline.from_pretrained(words.model), []
    for label in words.labels:
        given = pipe(label, seed=5).images[0]
        width, height = given.size
        mask = Image.new("L", given.size)
        ImageDraw.Draw(mask).rectangle((width // 2, 0, width, height), fill=255)
        missing = Image.composite(Image.new("RGB", given.size, "grey"), given, mask)
        refined = pipe.refine(given, 0.5, label, seed=3).images[0]
        painted = pipe.inpaint(given, mask, label, seed=3).images[0]
        wider = pipe.outpaint(given, label, right=width, seed=3).images[0]
        larger = pipe.upscale(given, 1.5, label, seed=3).images[0]
        shown = [given, refined, missing, painted, wider, larger]
        rows.append([enlarged(picture, zoom_of(pipe)) for picture in shown])
    captions = ["given", "refine 0.5", "without its half", "inpaint", "outpaint", "upscale 1.5"]
    sheet(rows, [captions, *[[]] * (len(rows) - 1)]).save(words.out)


if __name__ == "__main__":
    main()
