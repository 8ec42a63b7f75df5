"""The Inception-v3 of FID: TensorFlow's graph of 2015-12-05 as ADM's evaluator runs it, by the names of torch-fidelity's weight file.

It is not torchvision's: its average pools leave the border out, its last block takes a maximum instead, and it tells 1008 classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.official import read_released
from flexvar.weights import fill

Branches = Mapping[str, str]
"""What each branch consists of: "channels height x width" of a convolution, a comma before the next one, a plus before one beside it."""


def fives(pooled: int) -> Branches:
    return {"branch1x1": "64 1x1", "branch5x5": "48 1x1, 64 5x5", "branch3x3dbl": "64 1x1, 96 3x3, 96 3x3", "branch_pool": f"{pooled} 1x1"}


def sevens(c: int) -> Branches:
    return {
        "branch1x1": "192 1x1",
        "branch7x7": f"{c} 1x1, {c} 1x7, 192 7x1",
        "branch7x7dbl": f"{c} 1x1, {c} 7x1, {c} 1x7, {c} 7x1, 192 1x7",
        "branch_pool": "192 1x1",
    }


THREES = {
    "branch1x1": "320 1x1",
    "branch3x3": "384 1x1, 384 1x3 + 384 3x1",
    "branch3x3dbl": "448 1x1, 384 3x3, 384 1x3 + 384 3x1",
    "branch_pool": "192 1x1",
}
TO_17 = {"branch3x3": "384 3x3", "branch3x3dbl": "64 1x1, 96 3x3, 96 3x3", "branch_pool": ""}
TO_8 = {"branch3x3": "192 1x1, 320 3x3", "branch7x7x3": "192 1x1, 192 1x7, 192 7x1, 192 3x3", "branch_pool": ""}


class Convolution(nn.Module):
    """Convolution, batch normalisation and ReLU. padded: with zeros, to keep the resolution; with stride 2 it never is."""

    def __init__(self, inside: int, layer: str, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        outside, height, width = map(int, layer.replace("x", " ").split())
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inside, outside, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)  # (B, outside, h, w)


class Block(nn.Module):
    """Branches side by side, the last of them behind a pool. stride: of the last convolution of each branch."""

    def __init__(self, inside: int, branches: Branches, pool: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.branches: dict[str, list[list[Convolution]]] = {}  # one after another; the last may be two side by side
        for branch, text in branches.items():
            steps = [step.split(" + ") for step in text.split(", ") if step]
            channels, self.branches[branch] = inside, []
            for number, step in enumerate(steps, 1):
                layers = [Convolution(channels, layer, stride if number == len(steps) else 1) for layer in step]
                channels = layers[0].conv.out_channels
                self.branches[branch].append(layers)
                stem = f"{branch}_{number}" if len(steps) > 1 else branch
                for letter, layer in zip("ab" if len(layers) > 1 else [""], layers, strict=True):
                    self.add_module(stem + letter, layer)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, steps in self.branches.items():
            ends = [self.pool(x) if branch == "branch_pool" else x]
            for layers in steps:
                ends = [layer(ends[0]) for layer in layers]
            outputs += ends
        return torch.cat(outputs, 1)  # (B, ch, h, w)


class Inception(nn.Module):
    """Pictures to what FID, sFID and the Inception Score compare. The weights are random until `load_inception` fills them."""

    def __init__(self) -> None:
        super().__init__()
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        largest, halving = nn.MaxPool2d(3, stride=1, padding=1), nn.MaxPool2d(3, stride=2)
        self.body: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": Convolution(3, "32 3x3", stride=2),
            "Conv2d_2a_3x3": Convolution(32, "32 3x3", padded=False),
            "Conv2d_2b_3x3": Convolution(32, "64 3x3"),
            "MaxPool_1": halving,
            "Conv2d_3b_1x1": Convolution(64, "80 1x1"),
            "Conv2d_4a_3x3": Convolution(80, "192 3x3", padded=False),
            "MaxPool_2": halving,
            "Mixed_5b": Block(192, fives(32), average),
            "Mixed_5c": Block(256, fives(64), average),
            "Mixed_5d": Block(288, fives(64), average),
            "Mixed_6a": Block(288, TO_17, halving, stride=2),
            "Mixed_6b": Block(768, sevens(128), average),
            "Mixed_6c": Block(768, sevens(160), average),
            "Mixed_6d": Block(768, sevens(160), average),
            "Mixed_6e": Block(768, sevens(192), average),
            "Mixed_7a": Block(768, TO_8, halving, stride=2),
            "Mixed_7b": Block(1280, THREES, average),
            "Mixed_7c": Block(2048, THREES, largest),
        }
        for name, layer in self.body.items():
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool (B, 2048), spatial (B, 2023) and logits (B, 1008), float32, of pictures (B, 3, H, W), uint8.

        Spatial is ADM's mixed_6/conv[..., :7] as TensorFlow flattens it: height, width, channel. Logits are, as ADM's, without the bias.
        """
        x = (resized(pictures) - 128) / 128  # (B, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)  # takes two thirds of the time on a CPU
        for name, layer in self.body.items():
            x = layer(x)  # (B, ch, h, w)
            if name == "Mixed_6d":  # whose first branch is mixed_6/conv
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 · 17 · 7)
        pool = x.mean((2, 3))  # (B, 2048)
        return pool, spatial, F.linear(pool, self.fc.weight)


def resized(pictures: Tensor, side: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize of pictures (B, 3, H, W) to (B, 3, side, side), float32: no antialiasing, no half-pixel centres."""
    for axis in (3, 2):
        length = pictures.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=pictures.device) * (length / side)
        before = place.long()
        start = pictures.index_select(axis, before).float()
        end = pictures.index_select(axis, (before + 1).clamp_max(length - 1))
        pictures = start + (end - start) * (place - before).view(side, *[1] * (3 - axis))
    return pictures


def load_inception(path: Path | str) -> Inception:
    """Reads torch-fidelity's weight file onto the CPU in float32, in evaluation mode.

    Raises FileNotFoundError or ValueError, in one line, for a file that is missing, damaged or holds other tensors.
    """
    with torch.device("meta"):
        inception = Inception()
    counters = {name: torch.zeros(()) for name in inception.state_dict() if name.endswith(".num_batches_tracked")}
    try:
        fill(inception, counters | read_released(path))  # no result depends on the counters, which some files lack
    except ValueError as error:
        raise ValueError(f"{path} does not hold the Inception of 2015-12-05 ({error}); fetch torch-fidelity's file") from error
    return inception
