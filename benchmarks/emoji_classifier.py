"""Trains the judge of the emoji model, seeded: `python -m benchmarks.emoji_classifier OUT.safetensors [--steps N] [--classes all]`.

Prints its accuracy on renderings that training has not seen, at several sizes. The bundled one is what the defaults give with one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from flexvar.data import WELL_KNOWN, EmojiScenes
from flexvar.evaluation import UNSEEN_SEED, accuracy_interval, class_accuracy, load_classifier, renderings, train_classifier

HELD_OUT_SIZES = ((64, 64), (48, 48), (96, 96), (64, 128), (192, 64))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji_classifier", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--classes", choices=("well-known", "all"), default="well-known", help="48 well-known emoji, or all of them")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    torch.set_num_threads(1)
    source = EmojiScenes(WELL_KNOWN if words.classes == "well-known" else None)
    began = time.perf_counter()
    trained = train_classifier(source, steps=words.steps, batch=words.batch, seed=words.seed)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    trained.save(words.out)
    print(f"{words.out}: {words.out.stat().st_size / 2**20:.2f} MiB, {time.perf_counter() - began:.0f} s")
    classifier = load_classifier(words.out)  # what is measured is what was written
    for height, width in HELD_OUT_SIZES:
        right, total = class_accuracy(classifier, *renderings(source, max(1000, len(source.class_names)), (height, width), UNSEEN_SEED))
        low, high = accuracy_interval(right, total)
        print(f"held-out renderings {height} x {width}: {right / total:.1%} right ({low:.1%} to {high:.1%} of {total})")


if __name__ == "__main__":
    main()
