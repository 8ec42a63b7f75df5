"""The formulas of the losses. Tokenizer: how a gradient passes the codes, how codes and features are drawn together, how a picture is
reduced to a scale. Transformer: what each code costs."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar.position import area_averaged

FEATURES_AT_ONCE = 4096
"""Features of a batch that the entropy term looks at; it holds a probability for each of them and each code."""


def code_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each code (B, L), in nats: logits (B, L, V), and the codes (B, L) that they should say."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def past_codes(features: Tensor, codes: Tensor, gradient: Literal["straight-through", "rotation"]) -> Tensor:
    """Code vectors (..., C) whose gradient reaches the unit features (..., C) they stand for.

    "straight-through": unchanged. "rotation": turned as the code is turned away from its feature, so that the angle between gradient and
    code becomes that between gradient and feature (Fifty et al., "Restructuring vector quantization with the rotation trick", 2024; both
    are unit vectors here, so nothing is stretched).
    """
    if gradient == "straight-through":
        return features + (codes - features).detach()
    z, e = features.detach(), codes.detach()
    between = F.normalize(z + e, dim=-1)  # (..., C)
    along = (features * between).sum(-1, keepdim=True) * between
    return features - 2 * along + 2 * (features * z).sum(-1, keepdim=True) * e


def commitment(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Two means over all features (..., C): of codes towards features, and of features towards codes.

    As sums over the code's width: on the unit sphere a mean over it would shrink the pull as codes get wider.
    """
    towards_features = (codes - features.detach()).pow(2).sum(-1).mean()
    towards_codes = (codes.detach() - features).pow(2).sum(-1).mean()
    return towards_features, towards_codes


def entropy(features: Tensor, codebook: Tensor, temperature: float = 0.01) -> Tensor:
    """Small when every unit feature (..., C) is near one code (V, C) and all codes are near some: mean entropy less entropy of the mean.

    As in LlamaGen, where its weight is 0; of at most 4096 features, evenly spread over those given, so that memory stays bounded.
    """
    flat = features.reshape(-1, features.shape[-1])
    flat = flat[:: max(1, -(-len(flat) // FEATURES_AT_ONCE))]  # (N, C)
    with torch.autocast(flat.device.type, enabled=False):
        similarity = 2 * flat.float() @ F.normalize(codebook.float(), dim=-1).T / temperature  # (N, V)
    shares, logs = similarity.softmax(-1), similarity.log_softmax(-1)  # (N, V)
    of_each = -(shares * logs).sum(-1).mean()
    mean = shares.mean(0).clamp_min(1e-10)  # (V,); entr has no finite gradient at 0
    return of_each - torch.special.entr(mean).sum()


@torch.no_grad()
def reduced(pictures: Tensor, size: tuple[int, int], how: Literal["area", "bicubic"]) -> Tensor:
    """Pictures (B, 3, H, W) at a coarser scale's pixels: averaged, or bicubic with antialiasing, which is crisper and can overshoot.

    A target, so no gradient passes it: torch has no backward pass of antialiased bicubic on MPS, and none is needed.
    """
    if pictures.shape[-2:] == size:
        return pictures
    if how == "area":
        return area_averaged(pictures, size)
    return F.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=True)


def seen(pictures: Tensor, smallest: int, small: Literal["mask", "enlarge"]) -> Tensor | None:
    """What a perceptual or adversarial term sees of a scale's pictures (B, 3, H, W).

    All of them from `smallest` px on the shorter side; below it nothing (None), or the pictures enlarged until their shorter side has it.
    """
    shorter = min(pictures.shape[-2:])
    if shorter >= smallest:
        return pictures
    if small == "mask":
        return None
    height, width = (round(side * smallest / shorter) for side in pictures.shape[-2:])
    return F.interpolate(pictures, (height, width), mode="bilinear", align_corners=False)
