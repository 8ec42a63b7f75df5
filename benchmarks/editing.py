"""Measures editing: `python -m benchmarks.editing [--model FOLDER | --shapes FOLDER] [--side PIXELS] [--pictures N] [--seed N] [--quick]`.

Unseen drawings lose a random quarter, half, or their centre, and are completed with their class given. One line for each way to do it:
class accuracy of the completed pictures over that of the untouched ones; the seam, over that of the untouched ones; PSNR of the completed
region against what was there; and, without the paste, how far the kept region (two codes or more from the mask) falls behind the
tokenizer's own reconstruction. Then the class accuracy of refined and enlarged pictures, and how near enlarged ones come to drawings of
that size. Exit status 1 where the default way falls short.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.emoji import Measure
from benchmarks.shapes import CLASSIFIER_BATCH, CLASSIFIER_STEPS, FLOORS_FROM
from flexvar import FlexVARPipeline, Tokenizer
from flexvar.data import EmojiScenes, PictureSource, Shapes
from flexvar.editing import Edit, filled
from flexvar.evaluation import UNSEEN_SEED, Classifier, class_accuracy, load_classifier, psnr, renderings, ssim, train_classifier
from flexvar.evaluation.quality import seam
from flexvar.generation import Keep
from flexvar.position import area_averaged
from flexvar.schedule import Schedule, Size
from flexvar.sheet import to_pil

CLASS_KEPT = 0.80  # completed over untouched
SEAM = 1.5  # completed over untouched, medians
KEPT_LOSS = -1.0  # dB, median
AT_ONCE = 48
WAYS: dict[str, dict[str, Any]] = {
    "coarse cells with any white": {"mask_rule": "any"},
    "coarse cells with a majority of white": {"mask_rule": "majority"},
    "no feather": {"feather": 0},
    "without guidance": {"guidance_scale": 1.0},
    "without a class": {"class_labels": None},
}


# -- other ways to keep, which the package does not have --


@contextmanager
def own_features(pipe: FlexVARPipeline, decoded: bool) -> Iterator[None]:
    """Where codes are kept, the next scale reads the picture's own features there, as unit vectors, instead of the codes' vectors.

    decoded: they are decoded too; otherwise that is the kept codes.
    """
    tokenizer, ordinary = pipe.tokenizer, pipe._keep
    held: dict[Size, tuple[Tensor, Tensor]] = {}  # of each scale: where codes are kept (B, h, w, 1), and the features (B, h, w, C)

    @torch.no_grad()
    def keep(edit: Edit, schedule: Schedule) -> Keep:
        kept, features = ordinary(edit, schedule), tokenizer.features(edit.canvas)
        for size, where in zip(schedule, kept.where or [], strict=True):
            held[size] = where[..., None], F.normalize(tokenizer.pooled(features, size), dim=-1)
        return kept

    def vectors(codes: Tensor) -> Tensor:
        return torch.where(*held[codes.shape[1], codes.shape[2]], tokenizer.quantizer.lookup(codes)).permute(0, 3, 1, 2)  # (B, C, h, w)

    def lift(codes: Tensor, size: Size) -> Tensor:
        return F.interpolate(vectors(codes), size, mode="bicubic")

    def decode(codes: Tensor) -> Tensor:
        return tokenizer.decode_vectors(vectors(codes))

    with patch.object(pipe, "_keep", keep), patch.multiple(tokenizer, lift=lift, decode=decode if decoded else tokenizer.decode):
        yield


@dataclass(frozen=True, kw_only=True)
class Recoded(Keep):
    """Kept codes that are those of a composite: the scale before, as it was drawn, inside the white, and the canvas outside."""

    codes: list[Tensor]
    tokenizer: Tokenizer
    canvas: Tensor  # (B, 3, H, W)
    white: Tensor  # (B, 1, H, W)

    def apply(self, scale: int, drawn: Tensor) -> Tensor:
        codes = super().apply(scale, drawn)
        if scale + 1 < len(self):
            drawing = F.interpolate(self.tokenizer.decode(codes), self.canvas.shape[-2:], mode="bicubic").clamp(-1, 1)
            features = self.tokenizer.features(torch.lerp(self.canvas, drawing, self.white))
            (self.codes[scale + 1],) = self.tokenizer.codes(features, [tuple(self.codes[scale + 1].shape[1:])])
        return codes


@contextmanager
def recoded(pipe: FlexVARPipeline) -> Iterator[None]:
    """The composited picture is encoded again between scales."""
    ordinary = pipe._keep

    def keep(edit: Edit, schedule: Schedule) -> Keep:
        kept = ordinary(edit, schedule)
        assert edit.white is not None
        return Recoded(codes=list(kept.codes), where=kept.where, tokenizer=pipe.tokenizer, canvas=edit.canvas, white=edit.white)

    with patch.object(pipe, "_keep", keep):
        yield


OTHER_WAYS: dict[str, Callable[[FlexVARPipeline], AbstractContextManager[None]]] = {
    "the picture's own features as inputs": partial(own_features, decoded=False),
    "its own features as inputs, and decoded": partial(own_features, decoded=True),
    "encoded again between scales": recoded,
}


# -- what is edited, and how it is measured --


def random_masks(count: int, side: int) -> Tensor:
    """Masks (N, 1, side, side): a quarter, a half and the centre in turn, the first two at a random place."""
    rng, masks, half = np.random.default_rng(0), torch.zeros(count, 1, side, side), side // 2
    for i, mask in enumerate(masks[:, 0]):
        top, left = (int(place) * half for place in rng.integers(0, 2, 2))
        if i % 3 == 0:
            mask[top : top + half, left : left + half] = 1
        elif i % 3 == 1:
            (mask[top : top + half] if rng.random() < 0.5 else mask[:, left : left + half]).fill_(1)
        else:
            mask[side // 4 : side // 4 + half, side // 4 : side // 4 + half] = 1
    return masks


def decibels(found: Tensor, expected: Tensor, where: Tensor) -> Tensor:
    """PSNR (N,) of pictures in [-1, 1] where a map (N, 1, H, W) is 1."""
    error = ((found - expected) / 2).square().mean(1, keepdim=True)
    return -10 * ((error * where).sum((1, 2, 3)) / where.sum((1, 2, 3))).clamp_min(1e-9).log10()


@torch.no_grad()
def rebuilt(tokenizer: Tokenizer, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) through the tokenizer."""
    parts = [tokenizer.features(part) for part in pictures.split(AT_ONCE)]
    return torch.cat([tokenizer.decode(tokenizer.codes(part, [part.shape[-2:]])[0]) for part in parts]).clamp(-1, 1)


class Trial:
    """Unseen pictures (N, 3, side, side) in [-1, 1] and their masks, the model that edits them, and the judge of their class."""

    def __init__(self, pipe: FlexVARPipeline, source: PictureSource, judge: Classifier, side: int, count: int, seed: int) -> None:
        self.pipe, self.source, self.judge, self.seed = pipe, source, judge, seed
        reach = 2 * pipe.tokenizer.config.downsample
        self.real, self.labels = renderings(source, count, (side, side), UNSEEN_SEED)
        self.meaning = torch.tensor([judge.class_names.index(name) for name in pipe.class_names])[self.labels]
        self.masks, self.rebuilt = random_masks(count, side), rebuilt(pipe.tokenizer, self.real)
        self.far = 1 - F.max_pool2d(self.masks, 2 * reach + 1, 1, reach)
        right, total = class_accuracy(judge, self.real, self.meaning)
        self.untouched = right / total

    def edited(self, name: str, given: Tensor, **settings: Any) -> Tensor:
        """Given pictures in [-1, 1] after an edit, with their own classes."""
        settings = {"class_labels": self.labels.tolist(), "seed": self.seed, "output_type": "pt", "batch_size": AT_ONCE} | settings
        return torch.as_tensor(getattr(self.pipe, name)((given + 1) / 2, **settings).images) * 2 - 1

    def completed(self, **settings: Any) -> Tensor:
        return self.edited("inpaint", self.real, mask=self.masks, **settings)

    def class_share(self, found: Tensor) -> float:
        right, total = class_accuracy(self.judge, found, self.meaning)
        return right / total / self.untouched

    def line(self, name: str, found: Tensor, unpasted: Tensor | None = None, judged: bool = False) -> bool:
        """Prints the measures of completed pictures; whether they reach the targets."""
        share, jump = self.class_share(found), (seam(found, self.masks).median() / seam(self.real, self.masks).median()).item()
        said = f"class {share:.3f}  seam {jump:.2f}  inside {decibels(found, self.real, self.masks).median():.2f} dB"
        reached, kept = share >= CLASS_KEPT and jump <= SEAM, self.far.sum((1, 2, 3)) > 0
        if unpasted is not None and kept.any():
            loss = (decibels(unpasted, self.real, self.far) - decibels(self.rebuilt, self.real, self.far))[kept].median().item()
            said, reached = f"{said}  kept {loss:+.2f} dB", reached and loss >= KEPT_LOSS
        print(Measure(name, said, "", reached if judged else None), flush=True)
        return reached

    def way(self, name: str, judged: bool = False, **settings: Any) -> bool:
        """Completes the pictures in a way, with and without the paste, and prints the measures."""
        return self.line(name, self.completed(**settings), self.completed(paste=False, **settings), judged)

    def enlarged(self, factor: float) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Ways to a larger size, each with its pictures and the true ones; all but the last are given those reduced."""
        own = self.real.shape[-1]
        side = round(factor * own)
        large, _ = renderings(self.source, len(self.real), (side, side), UNSEEN_SEED)
        small = area_averaged(large, (own, own))
        yield "upscale", self.edited("upscale", small, factor=factor), large
        for filter in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
            pixels = np.stack([np.array(picture.resize((side, side), filter)) for picture in to_pil(small)])
            yield filter.name.lower(), torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, large
        yield "the tokenizer's rebuilding of the true ones", rebuilt(self.pipe.tokenizer, large), large


def trial_of(words: argparse.Namespace) -> Trial:
    """What the words ask for. The judge of drawn shapes is trained here, as in benchmarks.shapes."""
    pipe, count = FlexVARPipeline.from_pretrained(words.shapes or words.model or "emoji"), 48 if words.quick else words.pictures
    side = words.side or pipe.defaults.height
    if words.shapes is None:
        return Trial(pipe, EmojiScenes(pipe.class_names), load_classifier(), side, count, words.seed)
    steps = round(CLASSIFIER_STEPS * (1 if words.quick else FLOORS_FROM))
    judge = train_classifier(Shapes(), steps=steps, batch=CLASSIFIER_BATCH, seed=0, size=side)
    return Trial(pipe, Shapes(), judge, side, count, words.seed)


def main() -> int:
    """Prints the measures; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=(__doc__ or "").splitlines()[0])
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", type=Path, metavar="FOLDER", help="a model of emoji; default: the bundled one")
    models.add_argument("--shapes", type=Path, metavar="FOLDER", help="a model of drawn shapes, such as benchmarks.shapes trains")
    parser.add_argument("--side", type=int, help="of the pictures, in px (default: the model's own)")
    parser.add_argument("--pictures", type=int, default=144, help="pictures to complete in each way (default 144)")
    parser.add_argument("--seed", type=int, default=0, help="the first picture's; the others count on from it (default 0)")
    parser.add_argument("--quick", action="store_true", help="48 pictures, the default way only")
    words = parser.parse_args()
    trial = trial_of(words)
    real, masks = trial.real, trial.masks
    print(f"class accuracy of {len(real)} untouched pictures: {trial.untouched:.1%}")
    print(f"targets: class >= {CLASS_KEPT}, seam <= {SEAM}, kept >= {KEPT_LOSS} dB")
    trial.line("filled from the border, nothing drawn", filled(real, 1 - masks))
    trial.line("the tokenizer's own rebuilding, pasted", torch.where(masks > 0, trial.rebuilt, real))
    reached = trial.way("as it is", judged=True)
    if words.quick:
        return int(not reached)
    for name, settings in WAYS.items():
        trial.way(name, **settings)
    code = trial.pipe.tokenizer.config.downsample  # px, and the usual feather
    trial.way("a feather of half a code", feather=code // 2)
    trial.way("a feather of two codes", feather=2 * code)
    for name, replaced in OTHER_WAYS.items():
        with replaced(trial.pipe):
            trial.way(name)
    several = torch.stack([trial.completed(seed=words.seed + 1_000_000 * (1 + i)) for i in range(4)])
    best = torch.stack([seam(one, masks) for one in several]).argmin(0)
    trial.line("the best seam of four", several[best, torch.arange(len(real))])

    changes: list[tuple[str, dict[str, float]]] = [("refine", {"strength": strength}) for strength in (0.0, 0.25, 0.5, 0.75)]
    for name, settings in [*changes, ("upscale", {"factor": 1.5}), ("upscale", {"factor": 2.0})]:
        share = trial.class_share(trial.edited(name, real, **settings))
        print(Measure(f"{name} {next(iter(settings.values())):g}", f"class {share:.3f}"), flush=True)
    for factor in (1.5, 2.0):
        print(f"{factor:g} times the size, against drawings of that size")
        for name, found, large in trial.enlarged(factor):
            print(Measure(name, f"PSNR {psnr(found, large).median():.2f} dB  SSIM {ssim(found, large).median():.3f}"), flush=True)
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
