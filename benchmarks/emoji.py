"""Measures the bundled model: `python -m benchmarks.emoji [--model FOLDER] [--side PIXELS] [--pictures 500] [--quick]`.

One measure a line: what was found, the target where there is one, and "ok" or "short". Exit status 1 when one falls short, 2 when
something is missing. Those of PSNR and time are for the model's own size. A folder that holds a tokenizer only gets the tokenizer's and
the classifier's lines.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flexvar import Schedule, generate
from flexvar.checkpoint import Model, load
from flexvar.data import EmojiScenes
from flexvar.evaluation import UNSEEN_SEED, Classifier, accuracy_interval, class_accuracy, load_classifier, psnr, renderings
from flexvar.evaluation.reconstruction import unmeasured, use_of_all
from flexvar.settings import Settings
from flexvar.zoo import bundled_folder

CLASSIFIER_ACCURACY = 0.97
SAMPLES_OVER_REAL = 0.90  # class accuracy of samples over that of real renderings
PSNR, CODES_IN_USE = 27.0, 0.8  # dB at the native scale; of all scales together
SECONDS = 1.5  # a picture
FOLDER_MIB, FILE_MIB = 24.0, 16.0
AT_ONCE = 48
THREADS = 2


@dataclass(frozen=True)
class Measure:
    """One line: what was measured, what was found, and whether that reaches the target; None where there is none."""

    name: str
    found: str
    target: str = ""
    reached: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "ok", False: "short", None: ""}[self.reached]
        return f"{self.name:<44} {self.found:<36} {self.target:<10} {verdict}".rstrip()


def measures(model: Model, folder: Path, classifier: Classifier, side: int, pictures: int, scenes: int) -> Iterator[Measure]:
    """Every measure as soon as it is made, of pictures of `side` px. Raises ValueError when the classifier does not know a class."""
    names = model.class_names or classifier.class_names
    unknown = [name for name in names if name not in classifier.class_names]
    if unknown:
        raise ValueError(f"the classifier does not know {len(unknown)} classes of {folder}, {unknown[0]!r} first; train one that does")
    meaning = torch.tensor([classifier.class_names.index(name) for name in names])  # the model's labels to the classifier's

    unseen, labels = renderings(EmojiScenes(names), scenes, (side, side), UNSEEN_SEED)
    right, total = class_accuracy(classifier, unseen, meaning[labels])
    real = right / total
    yield Measure("classifier on unseen renderings", shares(right, total), f">= {CLASSIFIER_ACCURACY:.0%}", real >= CLASSIFIER_ACCURACY)

    schedule = Settings(model).schedule_of(side, side)
    own = side == model.defaults.height
    yield from tokenizer_measures(model, unseen, schedule, own)
    if model.transformer is None:
        return

    labels = torch.arange(pictures) % len(names)
    drawn = draw(model, schedule, labels.tolist(), range(pictures))
    right, total = class_accuracy(classifier, drawn, meaning[labels])
    yield Measure("classifier on samples", shares(right, total))
    ratio = right / total / real if real else 0.0
    yield Measure("samples over unseen renderings", f"{ratio:.3f}", f">= {SAMPLES_OVER_REAL}", ratio >= SAMPLES_OVER_REAL)
    files = [path.stat().st_size / 2**20 for path in folder.rglob("*") if path.is_file()]
    yield Measure("model folder, MiB", f"{sum(files):.2f}", f"<= {FOLDER_MIB:g}", sum(files) <= FOLDER_MIB)
    yield Measure("its largest file, MiB", f"{max(files):.2f}", f"<= {FILE_MIB:g}", max(files) <= FILE_MIB)
    seconds = seconds_a_picture(model, schedule)
    target = (f"<= {SECONDS:g}", seconds <= SECONDS) if own else ()
    yield Measure(f"one picture of {side} x {side}, seconds on {THREADS} threads", f"{seconds:.2f}", *target)


def tokenizer_measures(model: Model, scenes: Tensor, schedule: Schedule, own: bool) -> Iterator[Measure]:
    """PSNR of the native scale, which has a target at the model's own size, and use of the codebook, on scenes (N, 3, H, W) in [-1, 1]."""
    tokenizer, decibels = model.tokenizer, []
    scales = unmeasured(schedule, tokenizer.config.codebook_size)
    with torch.no_grad():
        for part in scenes.split(AT_ONCE):
            codes = tokenizer.codes(tokenizer.features(part), schedule)
            decibels += psnr(tokenizer.decode(codes[-1]), part).tolist()
            for scale, own_codes in zip(scales, codes, strict=True):
                scale.counts += own_codes.flatten().bincount(minlength=len(scale.counts))
    mean, share = statistics.fmean(decibels), use_of_all(scales)
    target = (f">= {PSNR:g}", mean >= PSNR) if own else ()
    yield Measure("tokenizer's PSNR at its native scale, dB", f"{mean:.2f} (median {statistics.median(decibels):.2f})", *target)
    found = f"{share:.1%} over {len(scenes)} scenes"
    yield Measure(f"codes in use, of {tokenizer.config.codebook_size}", found, f">= {CODES_IN_USE:.0%}", share >= CODES_IN_USE)
    for scale in scales:
        yield Measure(f"perplexity of the codes at {scale.size[0]}x{scale.size[1]}", f"{scale.perplexity:.1f}")


def draw(model: Model, schedule: Schedule, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Pictures (N, 3, H, W), about [-1, 1], guided and sampled in the model's default way. Shows a bar on a terminal."""
    assert model.transformer is not None
    drawn = []
    for start in tqdm(range(0, len(labels), AT_ONCE), desc="drawing", unit="batch", disable=None):
        part = slice(start, start + AT_ONCE)
        *_, last = generate(
            model.tokenizer, model.transformer, labels[part], schedule,
            guidance=model.defaults.guidance, sampling=model.defaults.sampling, seeds=seeds[part],
        )  # fmt: skip
        drawn.append(last.images)
    return torch.cat(drawn)


def seconds_a_picture(model: Model, schedule: Schedule, times: int = 5) -> float:
    """The median time of one picture, after one that warms up."""
    seconds = []
    for seed in range(times + 1):
        began = time.perf_counter()
        draw(model, schedule, [0], [seed])
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def shares(right: int, total: int) -> str:
    """A share with its 95 % interval."""
    low, high = accuracy_interval(right, total)
    return f"{right / total:.1%} ({low:.1%} to {high:.1%} of {total})"


def main() -> int:
    """Prints the measures; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=bundled_folder("emoji"), metavar="FOLDER", help="default: the bundled one")
    parser.add_argument("--side", type=int, help="of all pictures, in px (default: the model's own)")
    parser.add_argument("--pictures", type=int, default=500, help="samples to draw (default 500)")
    parser.add_argument("--quick", action="store_true", help="24 samples and 96 scenes, in less than 50 seconds")
    words = parser.parse_args()
    pictures, scenes = (min(24, words.pictures), 96) if words.quick else (words.pictures, 1000)
    torch.set_num_threads(THREADS)
    short = False
    try:
        if not words.model.is_dir():
            raise FileNotFoundError(f"there is no model folder {words.model}; train one, or name another with --model")
        model = load(words.model)
        for measure in measures(model, words.model, load_classifier(), words.side or model.defaults.height, pictures, scenes):
            print(measure, flush=True)
            short |= measure.reached is False
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        print(f"benchmarks.emoji: {error}", file=sys.stderr)
        return 2
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
