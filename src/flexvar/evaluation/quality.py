"""How close pictures are to their targets, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_PSNR = 100.0  # dB; about one 8-bit step in one colour of one pixel of a 256 px picture
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM as published


def check_pair(images: Tensor, target: Tensor, smallest: int = 1) -> None:
    """Raises ValueError unless both are pictures (B, 3, H, W) of one shape with sides of at least `smallest` px."""
    shape = images.shape
    if shape != target.shape or images.ndim != 4 or shape[1] != 3 or min(shape[-2:]) < smallest:
        raise ValueError(
            f"the pictures are {tuple(shape)} and {tuple(target.shape)}; "
            f"give two tensors of one shape (B, 3, H, W) with both sides at least {smallest} px"
        )


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: (B,) float32.

    images, target: (B, 3, H, W), clamped to [-1, 1]; the peak is the width of that range. It ends at 100 dB, which equal pictures get, so
    that means over pictures stay finite. Raises ValueError for shapes that differ.
    """
    check_pair(images, target)
    error = (_unit_range(images) - _unit_range(target)).square().mean((1, 2, 3))  # (B,)
    return (-10 * error.log10()).clamp_max(LARGEST_PSNR)


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each picture: (B,) float32, at most 1, which equal pictures get (Wang et al. 2004).

    images, target: (B, 3, H, W), clamped to [-1, 1] and compared on [0, 1]. A Gaussian window of 11 px and sigma 1.5 visits every place
    where it lies wholly inside; the mean is over places and colour channels. On a picture whose shorter side is below 11 px, the window
    has the largest odd side that fits. Raises ValueError for shapes that differ.
    """
    check_pair(images, target)
    x, y = _unit_range(images), _unit_range(target)
    side = min(WINDOW, *x.shape[-2:])
    weights = _gaussian(side - 1 + side % 2)
    mean_x, mean_y, square_x, square_y, product = (_windowed(z, weights) for z in (x, y, x * x, y * y, x * y))  # (B, 3, h, w) each
    variances = (square_x - mean_x.square()) + (square_y - mean_y.square())
    covariance = product - mean_x * mean_y
    light = (2 * mean_x * mean_y + K1**2) / (mean_x.square() + mean_y.square() + K1**2)
    structure = (2 * covariance + K2**2) / (variances + K2**2)
    return (light * structure).mean((1, 2, 3))  # (B,)


def _unit_range(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as float32 in [0, 1]."""
    return images.float().clamp(-1, 1) / 2 + 0.5


def _gaussian(length: int) -> list[float]:
    """A window of odd length whose weights add up to 1."""
    places = torch.arange(length, dtype=torch.float64, device="cpu") - length // 2
    weights = (-places.square() / (2 * SIGMA**2)).exp()
    return (weights / weights.sum()).tolist()


def _windowed(x: Tensor, weights: list[float]) -> Tensor:
    """The weighted mean under a square window at every place where it fits.

    Not a convolution: GPUs round those to TF32, which is coarser than the small variances that SSIM compares.
    """
    for axis in (-2, -1):
        places = x.shape[axis] - len(weights) + 1
        x = sum((weight * x.narrow(axis, start, places) for start, weight in enumerate(weights)), x.new_zeros(()))
    return x


def seam(pictures: Tensor, white: Tensor) -> Tensor:
    """The jump across the border of a mask (P or 1, 1, H, W) in pictures (P, 3, H, W), over the picture's own jumps; (P,).

    A jump is the mean absolute difference of two neighbouring pixels; across the border one of them is black in the mask and one not.
    """
    inside = (white > 0).expand(len(pictures), -1, -1, -1)
    jumps = [pictures.diff(dim=side).abs().mean(1, keepdim=True).flatten(1) for side in (-1, -2)]
    borders = [inside.float().diff(dim=side).abs().flatten(1) for side in (-1, -2)]
    jump, border = torch.cat(jumps, 1), torch.cat(borders, 1)  # (P, pairs of neighbours)
    return (jump * border).sum(1) / border.sum(1) / jump.mean(1)
