"""Scores the bundled model with the built-in extractor: `python -m examples.evaluate FOLDER [--model MODEL] [--side PIXELS]`.

It needs the emoji font.

Two sets of real renderings that no training has seen are made first: one is the reference, the other is scored beside the model's
pictures, and so tells what perfect pictures would get at that number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexvar import FlexVARPipeline
from flexvar.data import EmojiScenes, write_pictures
from flexvar.evaluation import UNSEEN_SEED, DrawnPictures, evaluate, load_extractor, open_pictures

PER_CLASS = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help=f"pictures of each class (default: {PER_CLASS})")
    parser.add_argument("--model", default="emoji", help="a model of emoji (default: the bundled one)")
    parser.add_argument("--side", type=int, help="of the pictures, in px (default: the model's own)")
    words = parser.parse_args()
    pipe, extractor = FlexVARPipeline.from_pretrained(words.model), load_extractor("classifier")
    side = words.side or pipe.defaults.height
    for name, seed in (("reference", UNSEEN_SEED), ("unseen", UNSEEN_SEED + 30)):
        scenes = EmojiScenes(pipe.class_names, views=words.per_class)
        write_pictures(scenes, words.out / name, count_per_class=words.per_class, size=(side, side), seed=seed, overwrite=True)
    for name, pictures in (
        ("unseen renderings", open_pictures(words.out / "unseen")),
        ("drawn by the model", DrawnPictures(pipe, words.model, words.per_class, height=side, width=side)),
    ):
        report = evaluate(pictures, words.out / "reference", extractor, words.out / f"{name}.json", intervals=True, overwrite=True)
        assert report is not None  # there is one process
        print(f"\n{name}:\n{report.table()}")


if __name__ == "__main__":
    main()
