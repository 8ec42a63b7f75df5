"""The convolutional encoder and its mirror, the decoder (LlamaGen's VQ-16, which FlexVAR extends; paper, section 3.1).

Levels halve or double the resolution; attention stands at the coarsest level and in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.tokenizer import winograd


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Normalisation over groups of channels; fewer groups where the channels do not divide evenly."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


class Convolution(nn.Conv2d):
    """A 3x3 convolution that keeps the resolution."""

    bias: Tensor
    winograd_filters: Tensor | None  # (36, out, in)

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self.register_buffer("winograd_filters", None, persistent=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def use_winograd(self) -> None:
        """Outside of training, a quarter of the products from now on, up to rounding, for weights and maps for which that pays.

        Which those are say `winograd.pays` and `winograd.takes`. Do it again when the weights have changed.
        """
        self.winograd_filters = winograd.filter_transform(self.weight) if winograd.pays(self.weight) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.winograd_filters is not None and not self.training and winograd.takes(x):
            return winograd.convolve(x, self.winograd_filters, self.bias)  # (B, out, H, W)
        return super().forward(x)  # (B, out, H, W)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = Convolution(channels_in, channels_out)
        self.norm2 = group_norm(channels_out, groups)
        self.conv2 = Convolution(channels_out, channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, out, H, W)
        return self.shortcut(x) + h  # (B, out, H, W)


class AttentionBlock(nn.Module):
    """Every position of the map attends to every other: one head, 1x1 projections."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A position's channels side by side, without which attention falls back on the kernel that holds all scores at once.
        normed = self.norm(x).contiguous(memory_format=torch.channels_last)  # (B, ch, H, W)
        q, k, v = (conv(normed).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))  # (B, 1, H·W, ch)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H·W, ch)
        return x + self.out(attended[:, 0].mT.unflatten(2, x.shape[2:]))  # (B, ch, H, W)


class Downsample(nn.Conv2d):
    """Halves the resolution: stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # (B, ch, H/2, W/2)


class Upsample(nn.Conv2d):
    """Doubles the resolution: nearest neighbours, then a convolution."""

    folded: Tensor | None  # (ch, ch, 4, 4)

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.register_buffer("folded", None, persistent=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self) -> None:
        """Outside of training, one transposed convolution does both from now on, up to rounding, with 4 products where there were 9.

        Of the 3 x 3 pixels that each new one is made of, those that repeat the same old pixel have their weights added up beforehand. So
        do it again when the weights have changed.
        """
        turned = self.weight.flip(2, 3).transpose(0, 1)  # (in, out, 3, 3)
        shifted = [F.pad(turned, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1)]  # (in, out, 4, 4) each
        self.folded = torch.stack(shifted).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is not None and not self.training:
            return F.conv_transpose2d(x, self.folded, self.bias, stride=2, padding=1)  # (B, ch, 2H, 2W)
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, ch, 2H, 2W)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked for, then a change of resolution."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels_in if i == 0 else channels_out, channels_out, groups) for i in range(blocks))
        self.attentions = nn.ModuleList(AttentionBlock(channels_out, groups) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)  # (B, out, H, W)
            if self.attentions:
                x = self.attentions[i](x)  # (B, out, H, W)
        return self.resample(x)


def middle(channels: int, groups: int) -> nn.Sequential:
    """The blocks at the coarsest resolution, between the levels and the codes."""
    return nn.Sequential(
        ResidualBlock(channels, channels, groups), AttentionBlock(channels, groups), ResidualBlock(channels, channels, groups)
    )


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to feature maps (B, z_channels, H/f, W/f), f = 2 ** (levels - 1)."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, z_channels: int, groups: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(before, width, blocks, groups, i == last, nn.Identity() if i == last else Downsample(width))
            for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.middle = middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.conv_in(pictures)  # (B, ch, H, W)
        for level in self.levels:
            x = level(x)  # (B, ch·m, H/2, W/2), the last level keeps H, W
        x = self.middle(x)  # (B, ch·m, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, z_channels, H/f, W/f)


class Decoder(nn.Module):
    """Feature maps (B, z_channels, h, w) to pictures (B, 3, h·f, w·f); one more residual block a level than the encoder."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, z_channels: int, groups: int) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], groups)
        self.levels = nn.ModuleList(
            Level(before, width, blocks + 1, groups, i == 0, nn.Identity() if i == last else Upsample(width))
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))  # (B, ch·m, h, w)
        for level in self.levels:
            x = level(x)  # (B, ch·m, 2h, 2w), the last level keeps h, w
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, h·f, w·f)
