"""LPIPS is its published formula, and reads torchvision's and lpips' files by their own names."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from flexvar.evaluation import LPIPS, load_lpips
from flexvar.evaluation.lpips import SMALLEST

VGG_SHAPES = {
    "features.0": (64, 3), "features.2": (64, 64),
    "features.5": (128, 64), "features.7": (128, 128),
    "features.10": (256, 128), "features.12": (256, 256), "features.14": (256, 256),
    "features.17": (512, 256), "features.19": (512, 512), "features.21": (512, 512),
    "features.24": (512, 512), "features.26": (512, 512), "features.28": (512, 512),
}  # fmt: skip
"""The convolutions of torchvision's file and their channels, out and in."""

LINEAR_SHAPES = {
    "lin0.model.1.weight": (1, 64, 1, 1),
    "lin1.model.1.weight": (1, 128, 1, 1),
    "lin2.model.1.weight": (1, 256, 1, 1),
    "lin3.model.1.weight": (1, 512, 1, 1),
    "lin4.model.1.weight": (1, 512, 1, 1),
}
"""All of lpips' file."""

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def vgg() -> Tensors:
    """torchvision's file, with random weights that keep the size of the features."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (outside, inside) in VGG_SHAPES.items():
        tensors[f"{name}.weight"] = torch.randn(outside, inside, 3, 3, generator=random) * (2 / (9 * inside)) ** 0.5
        tensors[f"{name}.bias"] = torch.randn(outside, generator=random) * 0.1
    return tensors | {f"classifier.{layer}.{kind}": torch.zeros(2) for layer in (0, 3, 6) for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def linear() -> Tensors:
    random = torch.Generator().manual_seed(1)
    return {name: torch.rand(shape, generator=random) for name, shape in LINEAR_SHAPES.items()}


@pytest.fixture(scope="module")
def folder(vgg: Tensors, linear: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files, as they are released: in torch's old form."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg, folder / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(linear, folder / "linear.pth", _use_new_zipfile_serialization=False)
    return folder


@pytest.fixture(scope="module")
def lpips(folder: Path) -> LPIPS:
    return load_lpips(folder / "vgg16.pth", folder / "linear.pth")


def pictures(height: int, width: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_the_formula(vgg: Tensors, linear: Tensors, images: Tensor, target: Tensor) -> np.ndarray:
    """LPIPS as Zhang et al. state it, in float64: its own walk through VGG-16, and NumPy from the features on."""

    def features(x: Tensor) -> list[np.ndarray]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)).double()
        taken = []
        for name in VGG_SHAPES:
            if name in ("features.5", "features.10", "features.17", "features.24"):
                x = F.max_pool2d(x, 2)
            x = F.conv2d(x, vgg[f"{name}.weight"].double(), vgg[f"{name}.bias"].double(), padding=1).clamp_min(0)
            if name in ("features.2", "features.7", "features.14", "features.21", "features.28"):
                taken.append(x.numpy())
        return taken

    total = np.zeros(len(images))
    for weights, one, other in zip(linear.values(), features(images), features(target), strict=True):
        one, other = (z / (np.sqrt((z**2).sum(1, keepdims=True)) + 1e-10) for z in (one, other))
        total += ((one - other) ** 2 * weights.double().numpy()).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize(("height", "width"), [(SMALLEST, SMALLEST), (21, 40), (48, 32)])
def test_the_formula(lpips: LPIPS, vgg: Tensors, linear: Tensors, height: int, width: int) -> None:
    images, target = pictures(height, width), pictures(height, width, seed=1)
    target[1] = images[1] * 0.9  # one far, one near
    distance = lpips(images, target)
    assert distance.shape == (2,)
    assert distance.dtype == torch.float32
    assert distance.tolist() == pytest.approx(by_the_formula(vgg, linear, images, target).tolist(), rel=1e-4)
    assert distance[0] > 3 * distance[1] > 0
    assert torch.allclose(lpips(target, images), distance, rtol=1e-5)


def test_equal_pictures_are_not_apart(lpips: LPIPS) -> None:
    images = pictures(32, 17)
    assert lpips(images, images.clone()).tolist() == [0, 0]


def test_each_picture_by_itself(lpips: LPIPS) -> None:
    images, target = pictures(16, 20, 3), pictures(16, 20, 3, seed=1)
    together = lpips(images, target)
    assert torch.allclose(lpips(images[1:2], target[1:2]), together[1:2], rtol=1e-5)


def test_gradients_reach_the_pictures_alone(lpips: LPIPS) -> None:
    images = pictures(16, 16).requires_grad_()
    lpips(images, pictures(16, 16, seed=1)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).float().mean() > 0.9
    assert not lpips.training
    for parameter in [*lpips.parameters(), *LPIPS().parameters()]:
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_following_the_gradient_brings_pictures_closer(lpips: LPIPS) -> None:
    images, target = pictures(16, 16), pictures(16, 16, seed=1)
    for _ in range(3):
        images.requires_grad_()
        before = lpips(images, target).sum()
        (gradient,) = torch.autograd.grad(before, images)
        images = (images - 0.5 * gradient / gradient.norm()).detach()
        assert lpips(images, target).sum() < before


def test_features_of_zero(vgg: Tensors, linear: Tensors, tmp_path: Path) -> None:
    silent = vgg | {"features.28.bias": torch.full((512,), -1e6)}
    torch.save(silent, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "linear.pth")
    images, target = pictures(16, 16).requires_grad_(), pictures(16, 16, seed=1)
    distance = load_lpips(tmp_path / "vgg16.pth", tmp_path / "linear.pth")(images, target)
    assert distance.tolist() == pytest.approx(by_the_formula(silent, linear, images.detach(), target).tolist(), rel=1e-4)
    distance.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_half_precision_is_near(lpips: LPIPS) -> None:
    images, target = pictures(32, 32), pictures(32, 32, seed=1)
    exact = lpips(images, target)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lpips(images, target)
        assert lpips(images, images).tolist() == [0, 0]
    half = copy.deepcopy(lpips).bfloat16()(images.bfloat16(), target.bfloat16())
    for distance in (mixed, half):
        assert distance.dtype == torch.float32
        assert torch.allclose(distance, exact, rtol=0.02)


@pytest.mark.parametrize("shape", [(1, 3, 15, 32), (1, 3, 32, 15), (1, 1, 32, 32), (3, 32, 32), (2, 3, 32, 32)])
def test_pictures_that_cannot_be_compared(lpips: LPIPS, shape: tuple[int, ...]) -> None:
    target = torch.zeros(1, 3, 32, 32) if shape[0] == 2 else torch.zeros(shape)
    with pytest.raises(ValueError, match=r"one shape \(B, 3, H, W\) with both sides at least 16 px"):
        lpips(torch.zeros(shape), target)


def test_files_in_other_forms(lpips: LPIPS, vgg: Tensors, linear: Tensors, tmp_path: Path) -> None:
    features = {name: tensor for name, tensor in vgg.items() if name.startswith("features.")}
    bare = {name.removeprefix("features."): tensor for name, tensor in features.items()}
    save_file(linear, tmp_path / "linear.safetensors")
    images, target = pictures(16, 16), pictures(16, 16, seed=1)
    for number, tensors in enumerate([vgg, features, bare]):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        again = load_lpips(tmp_path / f"{number}.safetensors", str(tmp_path / "linear.safetensors"))
        assert torch.equal(again(images, target), lpips(images, target))


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    state = torch.random.get_rng_state()
    load_lpips(folder / "vgg16.pth", folder / "linear.pth")
    assert torch.equal(state, torch.random.get_rng_state())


def test_files_that_are_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*fetch torchvision's vgg16-397923af.pth, or do without LPIPS"):
        load_lpips(tmp_path / "none.pth", folder / "linear.pth")
    with pytest.raises(FileNotFoundError, match=r"fetch lpips' weights/v0.1/vgg.pth \(7 kB, inside the lpips package\), or do without"):
        load_lpips(folder / "vgg16.pth", tmp_path / "none.safetensors")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes((folder / "linear.pth").read_bytes()[:1000])
        with pytest.raises(ValueError, match=f"{name} .*fetch it again|{name} .*fetch the released file again"):
            load_lpips(folder / "vgg16.pth", tmp_path / name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"features.14.bias": None}, "features.14.bias is missing"),
        ({"features.0.weight": torch.zeros(64, 3, 7, 7)}, r"features.0.weight has shape \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"),
        ({"features.1.running_mean": torch.zeros(64)}, "features.1.running_mean is not a tensor of this model"),
        ({"lin3.model.1.weight": None}, "lin3.model.1.weight is missing"),
        ({"lin1.model.1.weight": torch.zeros(1, 192, 1, 1)}, r"lin1.model.1.weight has shape \(1, 192, 1, 1\) instead of \(1, 128, 1, 1\)"),
    ],
)
def test_files_of_something_else(vgg: Tensors, linear: Tensors, tmp_path: Path, change: dict[str, Tensor | None], complaint: str) -> None:
    for tensors, name, prefix in [(vgg, "vgg16.pth", "features."), (linear, "linear.pth", "lin")]:
        mine = {key: tensor for key, tensor in change.items() if key.startswith(prefix)}
        torch.save({key: tensor for key, tensor in (tensors | mine).items() if tensor is not None}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{complaint}.*; fetch torchvision's .* and lpips' ") as caught:
        load_lpips(tmp_path / "vgg16.pth", tmp_path / "linear.pth")
    assert "\n" not in str(caught.value)
