"""How well a tokenizer rebuilds pictures, scale by scale, and how it uses its codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexvar.evaluation.quality import psnr, ssim
from flexvar.position import area_averaged
from flexvar.schedule import Schedule, ScheduleLike, Size
from flexvar.tokenizer import Tokenizer


@dataclass
class ScaleQuality:
    """One scale of many pictures. Its picture is compared with the original averaged down to the scale's own pixels."""

    size: Size  # (h, w) codes
    psnr: list[float] = field(default_factory=list)  # dB, one a picture
    ssim: list[float] = field(default_factory=list)
    l1: list[float] = field(default_factory=list)  # mean distance on the scale from -1 to 1
    counts: Tensor = field(default_factory=lambda: torch.empty(0))  # (V,), how often each code was used

    @property
    def use(self) -> float:
        """The share of all codes that this scale used."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """How many codes, used alike, would be as surprising as those that were used: from 1 to V."""
        return torch.special.entr(self.counts / self.counts.sum()).sum().exp().item()

    def means(self) -> dict[str, float]:
        """The figures of a report."""
        means = {name: sum(values) / len(values) for name in ("psnr", "ssim", "l1") for values in [getattr(self, name)]}
        return means | {"use": self.use, "perplexity": self.perplexity}


@torch.no_grad()
def quality_by_scale(tokenizer: Tokenizer, batches: Iterable[Tensor], schedule: ScheduleLike) -> list[ScaleQuality]:
    """Rebuilds pictures (B, 3, H, W) in [-1, 1] from the codes of every scale of a schedule; one result a scale, over all batches."""
    schedule = Schedule.of(schedule)
    codebook_size = tokenizer.config.codebook_size
    scales = [ScaleQuality(size, counts=torch.zeros(codebook_size)) for size in schedule]
    for images in batches:
        for scale, codes in zip(scales, tokenizer.codes(tokenizer.features(images), schedule), strict=True):
            rebuilt = tokenizer.decode(codes).float()
            target = area_averaged(images, (rebuilt.shape[-2], rebuilt.shape[-1]))
            scale.psnr += psnr(rebuilt, target).tolist()
            scale.ssim += ssim(rebuilt, target).tolist()
            scale.l1 += (rebuilt.clamp(-1, 1) - target).abs().mean((1, 2, 3)).tolist()
            scale.counts += codes.flatten().bincount(minlength=codebook_size).cpu()
    return scales


def use_of_all(scales: Iterable[ScaleQuality]) -> float:
    """The share of all codes that any of the scales used."""
    return (torch.stack([scale.counts for scale in scales]).sum(0) > 0).float().mean().item()
