"""What less precision costs in quality: `python -m benchmarks.precision [--model FOLDER] [--side PIXELS] [--pictures 960] [--scenes 480]`.

The model with 8-bit weights, and in bfloat16, is compared with itself in float32: on unseen scenes, whose codes are given, by the likeliest
and the sampled codes of every scale (guided, as in drawing) and by the loss; then by the class accuracy of pictures drawn from the same
seeds. Timings: benchmarks.speed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.emoji import AT_ONCE, THREADS, draw, shares
from flexvar import Keep, Sampling, Schedule, generate
from flexvar.checkpoint import Model, load
from flexvar.data import EmojiScenes
from flexvar.evaluation import UNSEEN_SEED, class_accuracy, load_classifier, renderings
from flexvar.generation import draw_scales
from flexvar.linear import to_int8
from flexvar.sampling import choose
from flexvar.settings import Settings
from flexvar.training.losses import code_losses
from flexvar.zoo import bundled_folder


def main() -> int:
    """Prints one measure a line; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=bundled_folder("emoji"), metavar="FOLDER", help="default: the bundled one")
    parser.add_argument("--side", type=int, help="of all pictures, in px (default: the model's own)")
    parser.add_argument("--pictures", type=int, default=960, help="samples to draw (default 960)")
    parser.add_argument("--scenes", type=int, default=480, help="unseen renderings (default 480)")
    words = parser.parse_args()
    torch.set_num_threads(THREADS)
    plain = load(words.model)
    side, names = words.side or plain.defaults.height, plain.class_names
    schedule = Settings(plain).schedule_of(side, side)
    scenes, labels = renderings(EmojiScenes(names), words.scenes, (side, side), UNSEEN_SEED)
    codes = codes_of(plain, scenes, schedule)
    classifier = load_classifier()
    meaning = torch.tensor([classifier.class_names.index(name) for name in names])
    drawn = torch.arange(words.pictures) % len(names)
    exact = None
    for title, model in (("float32", plain), ("8 bits", with_8_bits(plain)), ("bfloat16", in_bfloat16(plain))):
        likeliest, sampled, loss = said(model, codes, labels, schedule)
        exact = exact or (likeliest, sampled)
        same = [f"{(one == other).float().mean():.1%}" for one, other in zip((likeliest, sampled), exact, strict=True)]
        pictures = draw(model, schedule, drawn.tolist(), range(words.pictures))
        accuracy = shares(*class_accuracy(classifier, pictures.float(), meaning[drawn]))
        print(
            f"{title}: codes as in float32, likeliest {same[0]}, sampled {same[1]}; loss {loss:.4f}; samples in their class {accuracy}",
            flush=True,
        )
    return 0


def with_8_bits(model: Model) -> Model:
    """A copy whose blocks have 8-bit weights."""
    rounded = copy.deepcopy(model)
    assert rounded.transformer is not None
    to_int8(rounded.transformer)
    return rounded


def in_bfloat16(model: Model) -> Model:
    """A copy whose networks are."""
    rounded = copy.deepcopy(model)
    assert rounded.transformer is not None
    rounded.transformer.bfloat16()
    rounded.tokenizer.bfloat16()
    return rounded


@torch.no_grad()
def codes_of(model: Model, scenes: Tensor, schedule: Schedule) -> list[Tensor]:
    """The codes (N, h, w) of scenes (N, 3, H, W) at every scale."""
    parts = [model.tokenizer.codes(model.tokenizer.features(part), schedule) for part in scenes.split(AT_ONCE)]
    return [torch.cat(scale) for scale in zip(*parts, strict=True)]


@torch.no_grad()
def said(model: Model, given: list[Tensor], labels: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, float]:
    """Where codes (N, h, w) of every scale are given: the likeliest and the sampled codes (N, L) after those before, and the loss."""
    tokenizer, transformer = model.tokenizer, model.transformer
    assert transformer is not None
    likeliest: list[Tensor] = []
    sampled: list[Tensor] = []
    losses: list[float] = []

    def watched(logits: Tensor, numbers: Tensor, sampling: Sampling, greedy: bool = False) -> Tensor:
        codes = choose(logits, numbers, sampling, greedy)
        likeliest.append(logits.argmax(-1).flatten())
        sampled.append(codes.flatten())
        return codes

    for start in range(0, len(labels), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        codes = [scale[part] for scale in given]
        settings = {"guidance": model.defaults.guidance, "sampling": model.defaults.sampling}
        way = partial(draw_scales, choose=watched)
        seeds = range(start, start + len(labels[part]))
        list(generate(tokenizer, transformer, labels[part], schedule, keep=Keep(codes), seeds=seeds, draw=way, **settings))  # type: ignore[arg-type]
        logits = transformer(labels[part], tokenizer.inputs(codes, schedule), schedule)  # (B, L, V)
        targets = torch.cat([scale.flatten(1) for scale in codes], 1)  # (B, L)
        losses += code_losses(logits, targets).flatten().tolist()
    return torch.cat(likeliest), torch.cat(sampled), sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main())
