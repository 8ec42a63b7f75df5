"""LPIPS: how different two pictures look to VGG-16 (Zhang et al. 2018, version 0.1), from torchvision's and lpips' weight files.

It measures, and it is the perceptual loss of the tokenizer. Neither package is needed: only the two files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flexvar.evaluation.quality import check_pair
from flexvar.official import read_released
from flexvar.weights import fill

SMALLEST = 16  # px; VGG-16 halves the resolution four times before the last features
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and number of 3x3 convolutions
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the colours, mean and deviation
EPSILON = 1e-10

VGG_FILE = "torchvision's vgg16-397923af.pth"
LINEAR_FILE = "lpips' weights/v0.1/vgg.pth (7 kB, inside the lpips package)"


class LPIPS(nn.Module):
    """The perceptual distance of pictures from their targets; frozen, so that gradients reach the pictures alone.

    Features are taken after the last ReLU of each stage (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3). The weights are random until they
    are filled; `load_lpips` does both.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps = []
        inside = 3
        for stage, (channels, convolutions) in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(inside, channels, 3, padding=1), nn.ReLU()]
                inside = channels
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # torchvision's name, and its numbers of the layers
        self.linear = nn.ParameterList(torch.rand(channels) for channels, _ in STAGES)
        # On the CPU even where the rest is made on the meta device, as no file fills them.
        self.register_buffer("shift", torch.tensor(SHIFT, dtype=torch.float32, device="cpu")[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE, dtype=torch.float32, device="cpu")[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The distance (B,) float32, 0 for equal pictures. images, target: (B, 3, H, W) in [-1, 1], not clamped; ValueError below 16 px."""
        check_pair(images, target, SMALLEST)
        distances = []
        for weights, ours, theirs in zip(self.linear, self._directions(images), self._directions(target), strict=True):
            differences = (ours - theirs).square().mean((2, 3))  # (B, ch)
            distances.append((differences * weights).sum(1))
        return torch.stack(distances).sum(0)  # (B,)

    def _directions(self, images: Tensor) -> Iterator[Tensor]:
        """The feature vectors of each stage at length 1: (B, ch, h, w) float32."""
        x = (images - self.shift) / self.scale  # (B, 3, H, W)
        for index, layer in enumerate(self.features):
            x = layer(x)  # (B, ch, h, w)
            if index in self.taps:
                vectors = x.float()
                yield vectors / (vectors.norm(dim=1, keepdim=True) + EPSILON)


def load_lpips(vgg: Path | str, linear: Path | str) -> LPIPS:
    """Reads LPIPS onto the CPU in float32, in evaluation mode.

    vgg: torchvision's VGG-16, whole or its features alone. linear: lpips' weights of the features. Each .pth or .safetensors.
    Raises FileNotFoundError or ValueError, in one line, for a file that is missing, damaged or holds other tensors.
    """
    tensors = _features_of(_read(Path(vgg), VGG_FILE)) | _read(Path(linear), LINEAR_FILE)
    with torch.device("meta"):
        lpips = LPIPS().float()
    try:
        fill(lpips, tensors, _name_in_file, _shape_in_file)
    except ValueError as error:
        raise ValueError(f"{vgg} and {linear} are not LPIPS's files ({error}); fetch {VGG_FILE} and {LINEAR_FILE}") from error
    return lpips


def _read(path: Path, source: str) -> dict[str, Tensor]:
    """The tensors of a file; what it is and where it comes from is said when it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; fetch {source}, or do without LPIPS")
    if path.suffix != ".safetensors":
        return read_released(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def _features_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGG-16 without its classifier, under the names that the features have in the whole of it."""
    prefix = "" if any(name.startswith("features.") for name in tensors) else "features."
    return {prefix + name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}


def _name_in_file(name: str) -> str:
    """The released name of one of our tensors."""
    part, rest = name.split(".", 1)
    return f"lin{rest}.model.1.weight" if part == "linear" else name


def _shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The released shape of a tensor: the linear weights are those of a 1x1 convolution to one channel."""
    return (1, *shape, 1, 1) if name.startswith("lin") else shape
