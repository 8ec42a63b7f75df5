"""How well a tokenizer rebuilds pictures, scale by scale, and how it uses its codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    counts: Tensor  # (V,) float64, how often each code was used
    psnr: list[float] = field(default_factory=list)  # dB, one a picture
    ssim: list[float] = field(default_factory=list)
    l1: list[float] = field(default_factory=list)  # mean distance on the scale from -1 to 1
    lpips: list[float] = field(default_factory=list)  # empty where it was not measured
    rfid: float | None = None  # of all pictures together; None where it was not measured

    def add(self, codes: Tensor, rebuilt: Tensor, target: Tensor) -> None:
        """Counts in codes (B, h, w), what was rebuilt from them, and what should have been: (B, 3, H, W) float32, about [-1, 1]."""
        self.counts += codes.flatten().bincount(minlength=len(self.counts)).cpu()
        self.psnr += psnr(rebuilt, target).tolist()
        self.ssim += ssim(rebuilt, target).tolist()
        self.l1 += (rebuilt.clamp(-1, 1) - target).abs().mean((1, 2, 3)).tolist()

    @property
    def use(self) -> float:
        """The share of all codes that this scale used."""
        return (self.counts > 0).double().mean().item()

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes' use, from 1 to V: so many codes, used equally often, would have the same entropy."""
        return torch.special.entr(self.counts / self.counts.sum()).sum().exp().item()

    def means(self) -> dict[str, float]:
        """The figures of a report: of those over pictures the means; what was not measured is missing."""
        means = {name: sum(values) / len(values) for name in ("psnr", "ssim", "l1", "lpips") if (values := getattr(self, name))}
        figures = means | {"use": self.use, "perplexity": self.perplexity}
        return figures if self.rfid is None else {"rfid": self.rfid, **figures}


def unmeasured(schedule: Schedule, codebook_size: int) -> list[ScaleQuality]:
    """The scales of a schedule before any picture is counted in."""
    return [ScaleQuality(size, torch.zeros(codebook_size, dtype=torch.float64, device="cpu")) for size in schedule]


@torch.no_grad()
def rebuilt_by_scale(tokenizer: Tokenizer, images: Tensor, schedule: Schedule) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pictures (B, 3, H, W) in [-1, 1] from their codes at each scale: the codes (B, h, w), what they rebuild and what they should.

    Both of the latter are (B, 3, h·f, w·f) float32; what is rebuilt is not clamped, what should be is the original averaged down.
    """
    for codes in tokenizer.codes(tokenizer.features(images), schedule):
        rebuilt = tokenizer.decode(codes).float()
        yield codes, rebuilt, area_averaged(images.float(), (rebuilt.shape[-2], rebuilt.shape[-1]))


def quality_by_scale(tokenizer: Tokenizer, batches: Iterable[Tensor], schedule: ScheduleLike) -> list[ScaleQuality]:
    """Rebuilds pictures (B, 3, H, W) in [-1, 1] from the codes of every scale of a schedule; one result a scale, over all batches."""
    schedule = Schedule.of(schedule)
    scales = unmeasured(schedule, tokenizer.config.codebook_size)
    for images in batches:
        for scale, made in zip(scales, rebuilt_by_scale(tokenizer, images, schedule), strict=True):
            scale.add(*made)
    return scales


def use_of_all(scales: Iterable[ScaleQuality]) -> float:
    """The share of all codes that any of the scales used."""
    return (torch.stack([scale.counts for scale in scales]).sum(0) > 0).double().mean().item()
