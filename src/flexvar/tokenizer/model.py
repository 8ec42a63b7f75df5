"""The tokenizer: one feature map a picture, codes at any scale of it, and a decoder that paints any scale.

picture -> features -> codes (scale by scale) -> lift (the next scale's input) | decode (a picture)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.checks import check_whole_numbers
from flexvar.position import area_averaged
from flexvar.schedule import Schedule, ScheduleLike, Size, grid_of
from flexvar.tokenizer.networks import Decoder, Encoder
from flexvar.tokenizer.quantizer import Quantizer


@dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a tokenizer; the defaults are the released one (72 M parameters)."""

    channels: int = 128  # of the finest level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, from the finest; each further level halves the resolution
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    z_channels: int = 256  # between encoder or decoder and the 1x1 quantisation convolutions
    norm_groups: int = 32
    codebook_size: int = 8912  # V; the odd number is the released one
    code_width: int = 32  # C

    def __post_init__(self) -> None:
        check_whole_numbers(self, "the tokenizer", 1, "channels", "blocks", "z_channels", "norm_groups", "codebook_size", "code_width")
        levels = self.multipliers
        if not isinstance(levels, tuple) or not levels or any(type(level) is not int or level < 1 for level in levels):
            raise ValueError(f"multipliers of the tokenizer are {levels!r}; give a tuple with a whole number of at least 1 for each level")

    @property
    def downsample(self) -> int:
        """Pixels per code on a side."""
        return 2 ** (len(self.multipliers) - 1)


class Tokenizer(nn.Module):
    """Pictures to codes and back. Pictures are (B, 3, H, W) in [-1, 1], their sides multiples of `config.downsample`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.channels, config.multipliers, config.blocks, config.z_channels, config.norm_groups)
        self.encoder = Encoder(*shape)
        self.decoder = Decoder(*shape)
        self.quantizer = Quantizer(config.codebook_size, config.code_width)
        self.before_codes = nn.Conv2d(config.z_channels, config.code_width, 1)
        self.after_codes = nn.Conv2d(config.code_width, config.z_channels, 1)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """He initialisation: with torch's own gains a small tokenizer learns later (14.2 dB after 250 steps instead of 16.1)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> Tensor:
        """Feature maps (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1], after the 1x1 convolution and before any scale is taken.

        Raises ValueError for tensors of another kind, and naming the nearest sizes when a side is not a multiple of the downsampling.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give floats (B, 3, H, W) from -1 to 1")
        grid_of(images.shape[-2], images.shape[-1], self.config.downsample)
        return self.before_codes(self.encoder(images))  # (B, C, h, w)

    def codes(self, features: Tensor, schedule: ScheduleLike) -> list[Tensor]:
        """For each scale of the schedule its codes (B, h, w), int64: the map averaged down to the scale, then the nearest codes.

        Averaging comes first, quantisation second, at every scale anew: no scale is the residual of another (paper, section 3.1).
        """
        return [self.quantizer.nearest(self.pooled(features, size)) for size in Schedule.of(schedule)]

    @staticmethod
    def pooled(features: Tensor, size: Size) -> Tensor:
        """The feature map at a scale, channels last (B, h, w, C)."""
        return area_averaged(features, size).permute(0, 2, 3, 1)

    def lift(self, codes: Tensor, size: Size) -> Tensor:
        """Codes (B, h, w) of one scale as the input (B, C, h', w') of the next: unit vectors, resized bicubically, not normalised again."""
        vectors = self.quantizer.lookup(codes).permute(0, 3, 1, 2)  # (B, C, h, w)
        if codes.shape[1:] == tuple(size):
            return vectors
        return F.interpolate(vectors, size, mode="bicubic", align_corners=False)  # (B, C, h', w')

    def inputs(self, codes: Sequence[Tensor], schedule: ScheduleLike) -> Tensor:
        """The transformer's inputs (B, L - first, C) for teacher forcing: every scale but the last, lifted to the size of the next."""
        sizes = Schedule.of(schedule).sizes
        lifted = [self.lift(scale, size).flatten(2).mT for scale, size in zip(codes, sizes[1:], strict=False)]  # (B, h·w, C) each
        return torch.cat(lifted, 1) if lifted else self.quantizer.codebook.new_empty(len(codes[0]), 0, self.config.code_width)

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, h·f, w·f), about [-1, 1] and not clamped, from the codes (B, h, w) of any scale, 0 to V - 1.

        Raises ValueError for tensors of another kind. Whether codes are in range would have to be read from a GPU, and is not checked.
        """
        if codes.ndim != 3 or codes.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; give int64 (B, h, w)")
        return self.decode_vectors(self.quantizer.lookup(codes).permute(0, 3, 1, 2))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Pictures (B, 3, h·f, w·f) from code vectors (B, C, h, w)."""
        return self.decoder(self.after_codes(vectors))
