"""Both trainings from nothing on drawn shapes of 32 px: `python -m benchmarks.shapes [--minutes 20] [--run FOLDER] [--quick]`.

Prints one measure a line: what was found, the floor where there is one, and "ok" or "short"; exit status 1 when one falls short. A minute
stands for so many steps of each training, whatever the machine's speed, so that any machine comes to the same model; on two cores it is
about a minute. Everything is judged on drawings that no training saw. The floors hold for 20 minutes or more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.emoji import Measure, draw, shares
from flexvar import Schedule
from flexvar.checkpoint import Model, load
from flexvar.data import Shapes
from flexvar.evaluation import UNSEEN_SEED, Classifier, class_accuracy, renderings, train_classifier
from flexvar.evaluation.reconstruction import quality_by_scale, use_of_all
from flexvar.training.config import read_config
from flexvar.training.losses import code_losses
from flexvar.training.settings import TokenizerRun, TransformerRun
from flexvar.training.start import start

SIZE = (32, 32)
SCHEDULE = Schedule.square([1, 2, 3, 4])
"""The scales that differ on 4 x 4 codes. Fewer codes, of 16 px each, would be three scales at most and do not paint the shapes."""
CONFIGS = Path(__file__).parent.parent / "configs" / "shapes"
PSNR_FLOOR = 21.05  # dB: of the first honest run, 22.05, less 1
ACCURACY_FLOOR = 0.735  # samples over unseen drawings: of the first honest run, 0.785, less 0.05
FLOORS_FROM = 20.0  # minutes
CLASSIFIER_STEPS, TOKENIZER_STEPS, TRANSFORMER_STEPS = 100, 150, 300  # of a minute
CLASSIFIER_BATCH = 32


def trained(kind: type[TokenizerRun] | type[TransformerRun], config: Path, run: Path, steps: int, words: Sequence[str] = ()) -> Path:
    """Trains for so many steps; gives the model folder."""
    every = [f"report_every={max(1, steps // 20)}", f"save_every={max(1, steps // 8)}", f"sheet_every={steps}"]
    return start(read_config(kind, config, ["seed=1", f"run={run}", f"steps={steps}", *every, *words]))


def unigram_entropies(codes: Sequence[Tensor], codebook_size: int) -> list[float]:
    """Nats a code at each scale, from codes (N, h, w): the loss of a model that knows how often each code comes, and nothing else."""
    counts = [scale.flatten().bincount(minlength=codebook_size).double() for scale in codes]
    return [torch.special.entr(count / count.sum()).sum().item() for count in counts]


@torch.no_grad()
def losses_by_scale(model: Model, codes: Sequence[Tensor], labels: Tensor) -> list[float]:
    """Teacher-forced cross-entropy at each scale of the schedule, for codes (N, h, w) and labels (N,)."""
    assert model.transformer is not None
    inputs = model.tokenizer.inputs(codes, SCHEDULE)
    targets = torch.cat([scale.flatten(1) for scale in codes], 1)  # (N, L)
    logits = model.transformer(labels, inputs, SCHEDULE)
    losses = code_losses(logits, targets)
    return [losses[:, at].mean().item() for at in SCHEDULE.slices]


def measures(model: Model, classifier: Classifier, scenes: int, pictures: int, floors: bool) -> Iterator[Measure]:
    """Every measure of a trained model, on drawings that were not seen."""
    unseen, labels = renderings(Shapes(), scenes, SIZE, UNSEEN_SEED)
    scales = quality_by_scale(model.tokenizer, unseen.split(64), SCHEDULE)
    native = statistics.fmean(scales[-1].psnr)
    floor = PSNR_FLOOR if floors else None
    yield Measure("PSNR on unseen drawings, dB", f"{native:.2f}", *_target(native, floor, "{:.1f}"))
    for (h, w), scale in zip(SCHEDULE, scales, strict=True):
        means = scale.means()
        yield Measure(
            f"  rebuilt from {h}x{w} codes",
            f"PSNR {means['psnr']:.2f}, SSIM {means['ssim']:.3f}, {means['use']:.1%} of codes, perplexity {means['perplexity']:.1f}",
        )
    yield Measure("codes in use over all scales", f"{use_of_all(scales):.1%}")

    codes = model.tokenizer.codes(model.tokenizer.features(unseen), SCHEDULE)
    size = model.tokenizer.config.codebook_size
    yield Measure("loss of guessing, ln V", f"{torch.tensor(float(size)).log().item():.3f}")
    for (h, w), loss, entropy in zip(SCHEDULE, losses_by_scale(model, codes, labels), unigram_entropies(codes, size), strict=True):
        yield Measure(f"  loss at {h}x{w}", f"{loss:.3f}; {entropy:.3f} is the codes' own unigram entropy")

    right, total = class_accuracy(classifier, unseen, labels)
    real = right / total
    yield Measure("classifier on unseen drawings", shares(right, total))
    asked = torch.arange(pictures) % len(model.class_names)
    right, total = class_accuracy(classifier, draw(model, SCHEDULE, asked.tolist(), range(pictures)), asked)
    yield Measure("classifier on samples", shares(right, total))
    ratio = right / total / real
    yield Measure("samples over unseen drawings", f"{ratio:.3f}", *_target(ratio, ACCURACY_FLOOR if floors else None, "{:.2f}"))


def _target(found: float, floor: float | None, form: str) -> tuple[str, bool | None]:
    return ("", None) if floor is None else (f">= {form.format(floor)}", found >= floor)


def _steps(of_a_minute: int, minutes: float) -> int:
    return max(5, round(of_a_minute * minutes))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, measures and prints; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of two cores, all three trainings together (default 20)")
    parser.add_argument("--run", type=Path, default=Path("runs/shapes"), help="folder of the runs (default runs/shapes)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that it works; without floors")
    words = parser.parse_args(arguments)
    if words.run.exists():
        print(f"benchmarks.shapes: {words.run} exists; remove it, or name another folder with --run", file=sys.stderr)
        return 2
    minutes = 0.1 if words.quick else words.minutes
    began = time.perf_counter()
    classifier = train_classifier(Shapes(), steps=_steps(CLASSIFIER_STEPS, minutes), batch=CLASSIFIER_BATCH, seed=0, size=SIZE[0])
    steps = _steps(TOKENIZER_STEPS, minutes)
    tokenizer = trained(TokenizerRun, CONFIGS / "tokenizer.yaml", words.run / "tokenizer", steps)
    steps = _steps(TRANSFORMER_STEPS, minutes)
    folder = trained(TransformerRun, CONFIGS / "transformer.yaml", words.run / "transformer", steps, [f"tokenizer={tokenizer}"])
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes of training")
    short = False
    scenes, pictures = (200, 50) if words.quick else (1000, 500)
    for measure in measures(load(folder), classifier, scenes, pictures, floors=minutes >= FLOORS_FROM):
        print(measure, flush=True)
        short |= measure.reached is False
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
