"""PSNR and SSIM are what their definitions say, on pictures of any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flexvar.evaluation import psnr, ssim
from flexvar.evaluation.quality import seam


def noisy_pair(height: int, width: int, pictures: int = 2) -> tuple[Tensor, Tensor]:
    """Pictures of smooth colours and the same with noise, some of it beyond the range."""
    random = torch.Generator().manual_seed(height * 100 + width)
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    phases = torch.rand(pictures, 3, 1, 1, generator=random) * 6
    target = torch.sin(3 * rows + 2 * columns + phases)
    return target + 0.4 * torch.randn(target.shape, generator=random), target


def brute_force_ssim(images: Tensor, target: Tensor) -> list[float]:
    """The published definition in float64: one window after the other, each weight a product of two Gaussians."""
    first, second = (np.clip(z.double().numpy(), -1, 1) / 2 + 0.5 for z in (images, target))
    side = next(n for n in (11, 9, 7, 5, 3, 1) if n <= min(first.shape[2:]))
    middle = side // 2
    window = np.array([[math.exp(-((i - middle) ** 2 + (j - middle) ** 2) / (2 * 1.5**2)) for j in range(side)] for i in range(side)])
    window /= window.sum()
    values = []
    for one, other in zip(first, second, strict=True):
        found = []
        for x, y in zip(one, other, strict=True):
            for top in range(x.shape[0] - side + 1):
                for left in range(x.shape[1] - side + 1):
                    a, b = x[top : top + side, left : left + side], y[top : top + side, left : left + side]
                    mean_a, mean_b = (window * a).sum(), (window * b).sum()
                    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                    top_line = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
                    found.append(top_line / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
        values.append(float(np.mean(found)))
    return values


SIZES = [*((side, side) for side in range(1, 13)), (1, 20), (7, 30), (24, 13), (10, 11)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_brute_force(height: int, width: int) -> None:
    images, target = noisy_pair(height, width)
    assert ssim(images, target).tolist() == pytest.approx(brute_force_ssim(images, target), abs=2e-5)
    error = np.mean((images.clamp(-1, 1) - target).double().numpy() ** 2, axis=(1, 2, 3))
    assert psnr(images, target).tolist() == pytest.approx((10 * np.log10(2**2 / error)).tolist(), abs=1e-4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equal_pictures_are_at_the_top_and_nothing_is_above(height: int, width: int) -> None:
    images, target = noisy_pair(height, width)
    assert psnr(target, target).tolist() == [100.0, 100.0]
    assert ssim(target, target).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert (psnr(images, target) < 100).all()
    assert (ssim(images, target) < 1).all()
    for measure in (psnr, ssim):
        assert torch.equal(measure(images, target), measure(target, images))


def test_known_values() -> None:
    black, white = -torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert psnr(black, white).item() == 0
    assert psnr(black, black + 0.2).item() == pytest.approx(20, abs=1e-4)
    assert ssim(black, white).item() == pytest.approx(1e-4 / 1.0001, rel=1e-4)
    chequered = black.clone()
    chequered[..., ::2, ::2] = chequered[..., 1::2, 1::2] = 1
    assert ssim(chequered, -chequered).item() == pytest.approx(-1, abs=0.01)


def test_more_noise_is_worse() -> None:
    _, target = noisy_pair(32, 32)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    for measure in (psnr, ssim):
        values = torch.stack([measure(target + strength * noise, target) for strength in (0, 0.01, 0.1, 0.3, 1.0)])
        assert (values.diff(dim=0) < 0).all()


def test_each_picture_by_itself_in_any_precision() -> None:
    images, target = noisy_pair(20, 28, pictures=3)
    for measure in (psnr, ssim):
        together = measure(images, target)
        assert together.shape == (3,)
        assert together[1:2].tolist() == pytest.approx(measure(images[1:2], target[1:2]).tolist(), rel=1e-6)
        assert torch.equal(measure(images.clamp(-1, 1), target), together)
        half = measure(images.bfloat16(), target.bfloat16())
        assert half.dtype == torch.float32
        assert torch.allclose(half, together, rtol=0.01)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(measure(images, target), together)


@pytest.mark.parametrize(
    ("shape", "other"), [((1, 3, 8, 8), (1, 3, 8, 9)), ((2, 3, 8, 8), (1, 3, 8, 8)), ((3, 8, 8), (3, 8, 8)), ((1, 1, 8, 8), (1, 1, 8, 8)),
                         ((1, 3, 0, 8), (1, 3, 0, 8))]
)  # fmt: skip
def test_pictures_that_cannot_be_compared(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"give two tensors of one shape \(B, 3, H, W\) with both sides at least 1 px"):
            measure(torch.zeros(shape), torch.zeros(other))


def test_the_seam_of_a_step_and_of_a_ramp() -> None:
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    white = (torch.arange(8) >= 4).float().expand(1, 1, 8, 8)
    step = white.expand(1, 3, 8, 8) * 2 - 1
    pairs = 2 * 8 * 7  # of neighbours, half of them side by side
    assert seam(ramp, white).item() == pytest.approx(2, rel=1e-5)
    assert seam(step, white).item() == pytest.approx(pairs / 8, rel=1e-5)
