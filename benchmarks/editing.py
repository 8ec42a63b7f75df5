"""Measures inpainting by the bundled model: `python -m benchmarks.editing [--pictures 144] [--quick]`.

Unseen renderings lose a random quarter, half, or their centre, and are completed with their class given. One line for each way to do it:
class accuracy of the completed pictures over that of the untouched ones; the seam, over that of the untouched ones; PSNR of the completed
region against what was there; and, without the paste, how far the kept region (two codes or more from the mask) falls behind the
tokenizer's own reconstruction. Then the class accuracy of refined and enlarged pictures. Exit status 1 where the default way falls short.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.emoji import UNSEEN_SEED, Measure
from flexvar import FlexVARPipeline
from flexvar.data import EmojiScenes
from flexvar.editing import filled
from flexvar.evaluation import class_accuracy, load_classifier, renderings
from flexvar.evaluation.quality import seam

CLASS_KEPT = 0.80  # completed over untouched
SEAM = 1.5  # completed over untouched, medians
KEPT_LOSS = -1.0  # dB, median
AT_ONCE = 48
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "coarse cells with any white": {"mask_rule": "any"},
    "coarse cells with a majority of white": {"mask_rule": "majority"},
    "no feather": {"feather": 0},
    "a feather of 4 px": {"feather": 4},
    "a feather of 16 px": {"feather": 16},
    "without guidance": {"guidance_scale": 1.0},
    "without a class": {"class_labels": None},
}


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


def main() -> int:
    """Prints the measures; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=144, help="pictures to complete in each way (default 144)")
    parser.add_argument("--quick", action="store_true", help="48 pictures, the default way only")
    words = parser.parse_args()
    pictures, ways = (48, {"as it is": WAYS["as it is"]}) if words.quick else (words.pictures, WAYS)
    pipe, classifier = FlexVARPipeline.from_pretrained("emoji"), load_classifier()
    side, names = pipe.defaults.height, pipe.class_names
    real, labels = renderings(EmojiScenes(names), pictures, (side, side), UNSEEN_SEED)
    meaning = torch.tensor([classifier.class_names.index(name) for name in names])[labels]
    masks = random_masks(pictures, side)
    reach = 2 * pipe.tokenizer.config.downsample
    far = 1 - F.max_pool2d(masks, 2 * reach + 1, 1, reach)
    kept = far.sum((1, 2, 3)) > 0
    tokenizer = pipe.tokenizer
    with torch.no_grad():
        rebuilt = torch.cat([tokenizer.decode(tokenizer.codes(tokenizer.features(part), [(side // tokenizer.config.downsample,) * 2])[0])
                             for part in real.split(AT_ONCE)]).clamp(-1, 1)  # fmt: skip
    right, total = class_accuracy(classifier, real, meaning)
    untouched = right / total

    def completed(**settings: Any) -> Tensor:
        given = {"class_labels": labels.tolist(), "seed": 0, **settings}
        images = pipe.inpaint((real + 1) / 2, masks, output_type="pt", batch_size=AT_ONCE, **given).images
        return torch.as_tensor(images) * 2 - 1

    def line(name: str, found: Tensor, unpasted: Tensor | None, judged: bool = False) -> bool:
        right, total = class_accuracy(classifier, found, meaning)
        share, jump = right / total / untouched, (seam(found, masks).median() / seam(real, masks).median()).item()
        inside = decibels(found, real, masks).median().item()
        loss = None if unpasted is None else (decibels(unpasted, real, far) - decibels(rebuilt, real, far))[kept].median().item()
        said = f"class {share:.3f}  seam {jump:.2f}  inside {inside:.2f} dB" + ("" if loss is None else f"  kept {loss:+.2f} dB")
        reached = share >= CLASS_KEPT and jump <= SEAM and (loss is None or loss >= KEPT_LOSS)
        print(Measure(name, said, "", reached if judged else None), flush=True)
        return reached

    reached = True
    print(f"class accuracy of {total} untouched pictures: {untouched:.1%}")
    print(f"targets: class >= {CLASS_KEPT}, seam <= {SEAM}, kept >= {KEPT_LOSS} dB")
    line("filled from the border, nothing drawn", filled(real, 1 - masks), None)
    line("the tokenizer's own rebuilding, pasted", torch.where(masks > 0, rebuilt, real), None)
    for name, settings in ways.items():
        found = line(name, completed(**settings), completed(paste=False, **settings), judged=not settings)
        reached &= found or bool(settings)
    if not words.quick:
        several = torch.stack([completed(seed=1_000_000 * (1 + i)) for i in range(4)])
        best = torch.stack([seam(one, masks) for one in several]).argmin(0)
        line("the best seam of four", several[best, torch.arange(pictures)], None)
        changes: list[tuple[str, dict[str, float]]] = [("refine", {"strength": strength}) for strength in (0.25, 0.5, 0.75)]
        for name, settings in [*changes, ("upscale", {"factor": 1.5}), ("upscale", {"factor": 2.0})]:
            change = getattr(pipe, name)
            images = change((real + 1) / 2, class_labels=labels.tolist(), seed=0, output_type="pt", batch_size=AT_ONCE, **settings).images
            right, total = class_accuracy(classifier, torch.as_tensor(images) * 2 - 1, meaning)
            print(Measure(f"{name} {next(iter(settings.values())):g}", f"class {right / total / untouched:.3f}"), flush=True)
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
