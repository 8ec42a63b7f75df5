"""Choices in a tokenizer's training, each against the plain recipe: `python -m benchmarks.tokenizer_choices [--steps 1000] [--seeds 1]`.

Small tokenizers on emoji scenes of 48 px, trained for the same steps from the same seeds, measured on scenes that none of them saw. A line
a choice: PSNR and SSIM at three scales, codes in use and perplexity at the native one, and the distance from the original in the
features of the small classifier, which sees shapes rather than pixels. Finished runs are not trained again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar.checkpoint import load
from flexvar.data import WELL_KNOWN, EmojiScenes
from flexvar.evaluation import UNSEEN_SEED, Classifier, load_classifier, renderings
from flexvar.evaluation.reconstruction import quality_by_scale
from flexvar.schedule import Schedule, Size
from flexvar.tokenizer import Tokenizer
from flexvar.training.config import read_config
from flexvar.training.settings import TokenizerRun
from flexvar.training.start import start

CONFIG = Path("configs/emoji/tokenizer.yaml")
NETWORK = ["model.channels=16", "model.multipliers=[1,2,4,8]"]
PLAIN = [*NETWORK, "sizes=[[48,48]]", "batch=8", "scales=3", "continuous=0.2", "measure=0", "workers=0", "keep=1"]
ADVERSARY = ["adversary.weight=0.1", "adversary.channels=24", "adversary.layers=2", "smallest=32"]
CHOICES: dict[str, list[str]] = {
    "plain": [],
    "target: bicubic": ["target=bicubic"],
    "gradient: rotation": ["gradient=rotation"],
    "no codes start anew": ["restart_every=0"],
    "entropy 0.05": ["entropy=0.05"],
    "adversary, small scales masked": [*ADVERSARY, "small=mask"],
    "adversary, small scales enlarged": [*ADVERSARY, "small=enlarge"],
}
SIDE = 48  # px
SCALES: tuple[Size, ...] = ((2, 2), (4, 4), (6, 6))


def measured(tokenizer: Tokenizer, scenes: Tensor, classifier: Classifier) -> list[str]:
    """The columns of one tokenizer on scenes (N, 3, H, W) in [-1, 1]."""
    scales = quality_by_scale(tokenizer, scenes.split(64), Schedule(SCALES))
    columns = [f"{statistics.fmean(scale.psnr):6.2f}" for scale in scales] + [f"{statistics.fmean(scale.ssim):6.3f}" for scale in scales]
    columns += [f"{scales[-1].use:7.1%}", f"{scales[-1].perplexity:7.1f}"]
    return columns + [f"{distance:6.3f}" for distance in feature_distances(tokenizer, scenes, classifier)]


@torch.no_grad()
def feature_distances(tokenizer: Tokenizer, scenes: Tensor, classifier: Classifier) -> list[float]:
    """For each scale, the mean squared distance of rebuilt pictures from their targets in the classifier's features, over their variance.

    Pictures that are too small for the classifier are enlarged alike. 0: the same; 1: as far apart as the features of all pictures spread.
    """
    distances: dict[Size, list[Tensor]] = {size: [] for size in SCALES}
    spread = classifier.features(scenes).var(0).sum()
    for images in scenes.split(64):
        for size, codes in zip(SCALES, tokenizer.codes(tokenizer.features(images), SCALES), strict=True):
            rebuilt = tokenizer.decode(codes)
            target = F.adaptive_avg_pool2d(images, (rebuilt.shape[-2], rebuilt.shape[-1]))
            ours, theirs = (classifier.features(F.interpolate(x, images.shape[-2:], mode="bilinear")) for x in (rebuilt, target))
            distances[size].append((ours - theirs).square().sum(1))
    return [(torch.cat(values).mean() / spread).item() for values in distances.values()]


def trained(choice: str, seed: int, steps: int, folder: Path) -> Tokenizer:
    """The tokenizer of a run, trained now unless it is there."""
    run = folder / f"{'-'.join(choice.replace(':', '').replace(',', '').split())}-{seed}"
    words = [*PLAIN, *CHOICES[choice], f"seed={seed}", f"steps={steps}", f"run={run}", f"save_every={steps}", f"sheet_every={steps}"]
    words += [f"report_every={max(1, steps // 5)}", f"adversary.start={steps * 2 // 5}"]
    return load(start(read_config(TokenizerRun, CONFIG, words))).tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer_choices", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=480)
    parser.add_argument("--folder", type=Path, default=Path("runs/choices"))
    parser.add_argument("--only", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    words = parser.parse_args(arguments)
    classifier = load_classifier()
    scenes, _ = renderings(EmojiScenes(WELL_KNOWN), words.scenes, (SIDE, SIDE), UNSEEN_SEED)
    rows = []
    for choice in words.only:
        for seed in range(words.seeds):
            columns = measured(trained(choice, seed, words.steps, words.folder), scenes, classifier)
            rows.append(f"{choice:<34}{seed:>4}  {' '.join(columns)}")
    print(f"{'choice':<34}{'seed':>4}  {'PSNR 2, 4, 6':<21}{'SSIM 2, 4, 6':<21}{'in use':>7} {'perpl.':>7} distance in features 2, 4, 6")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
