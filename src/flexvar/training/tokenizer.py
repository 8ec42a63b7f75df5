"""The tokenizer's workshop: every picture is rebuilt from several scales of its codes (paper, section 3.1).

Where the paper is silent: the K - 1 random scales are different ones, their longer sides drawn evenly below the native one's, in the
picture's own aspect ratio; the target of a scale is the picture averaged down to that scale's own pixel size; all scales count alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.checkpoint import Defaults, Model
from flexvar.schedule import Size, grid_of
from flexvar.sheet import sheet, to_pil
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.training.config import TokenizerRun
from flexvar.training.loop import Workshop
from flexvar.training.order import Batch, step_random


class TokenizerWorkshop(Workshop):
    """Learns encoder, codebook and decoder. Counts how often each code is used, and starts unused ones anew."""

    def __init__(self, config: TokenizerRun, examples: Tensor) -> None:
        super().__init__()
        self.config = config
        shape = config.model
        self.tokenizer = Tokenizer(
            TokenizerConfig(
                channels=shape.channels,
                multipliers=tuple(shape.multipliers),
                blocks=shape.blocks,
                z_channels=shape.z_channels,
                norm_groups=shape.norm_groups,
                codebook_size=shape.codebook_size,
                code_width=shape.code_width,
            )
        )
        self.examples = examples  # (N, 3, H, W) uint8, for the sheets
        self.used = torch.zeros(shape.codebook_size)  # since unused codes were last looked for; each process counts its own share
        self.latest = torch.empty(0)  # feature vectors (N, C) of the last batch, from which codes start anew

    def _used_anywhere(self) -> Tensor:
        """How often each code was used, on all processes together."""
        used = self.used.to(self.latest.device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(used)
        return used

    def get_extra_state(self) -> Tensor:
        return self._used_anywhere().cpu()

    def set_extra_state(self, state: Tensor) -> None:
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.used = state.cpu().clone() if first else torch.zeros_like(self.used)

    @property
    def network(self) -> Tokenizer:
        return self.tokenizer

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config, images = self.config, batch.images / 127.5 - 1  # (B, 3, H, W)
        features = self.tokenizer.features(images).float()  # (B, C, h, w)
        native = grid_of(images.shape[-2], images.shape[-1], self.tokenizer.config.downsample)
        sizes = random_scales(config.scales, native, step_random(config.seed, batch.step, "scales"))
        quantising = batch.step >= config.continuous * config.steps
        loss, errors, vectors = images.new_zeros(()), [], []
        for size in sizes:
            z = F.normalize(self.tokenizer.pooled(features, size), dim=-1)  # (B, h, w, C)
            codes = self.tokenizer.quantizer.nearest(z)  # (B, h, w)
            e = self.tokenizer.quantizer.lookup(codes)  # (B, h, w, C)
            through = z + (e - z).detach() if quantising else z  # the gradient goes past the codes
            rebuilt = self.tokenizer.decode_vectors(through.permute(0, 3, 1, 2))  # (B, 3, h·f, w·f)
            target = F.adaptive_avg_pool2d(images, (rebuilt.shape[-2], rebuilt.shape[-1]))
            l2 = F.mse_loss(rebuilt.float(), target)
            loss = loss + config.l2 * l2 + config.l1 * F.l1_loss(rebuilt.float(), target)
            # As sums over the code's width: on the unit sphere the mean over it would shrink the pull as codes get wider.
            loss = loss + config.codebook * (e - z.detach()).pow(2).sum(-1).mean()
            loss = loss + quantising * config.commitment * (e.detach() - z).pow(2).sum(-1).mean()
            self.used += torch.bincount(codes.flatten(), minlength=len(self.used)).cpu()
            errors.append(l2.detach())
            vectors.append(z.detach().reshape(-1, z.shape[-1]))
        self.latest = torch.cat(vectors)
        return loss / len(sizes), {
            "psnr": -10 * torch.log10(errors[-1] / 4),
            "codes_in_use": (self.used > 0).float().mean().to(loss.device),
        }

    @torch.no_grad()
    def after_step(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        every = self.config.restart_every
        if not every or step % every:
            return
        unused = (self._used_anywhere() == 0).nonzero()[:, 0]
        self.used.zero_()
        if step > 0.8 * self.config.steps:
            return  # the last codes that were started need time to settle
        chosen = torch.randint(len(self.latest), (len(unused),), generator=torch.Generator().manual_seed(step))
        fresh = self.latest[chosen.to(self.latest.device)]  # (unused, C)
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        codebook = self.tokenizer.quantizer.codebook
        codebook[unused] = fresh.to(codebook.dtype)
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimiser.state[codebook]:
                optimiser.state[codebook][name][unused] = 0

    def sheet(self, network: nn.Module, path: Path) -> None:
        """Rows: the pictures, what the native scale rebuilds, and two coarser scales enlarged."""
        assert isinstance(network, Tokenizer)
        images = self.examples.to(network.after_codes.weight.device) / 127.5 - 1  # (N, 3, H, W)
        with torch.no_grad():
            features = network.features(images)
            h, w = features.shape[-2:]
            rows = [images]
            for size in [(h, w), (max(1, h // 2), max(1, w // 2)), (max(1, h // 4), max(1, w // 4))]:
                (codes,) = network.codes(features, [size])
                rows.append(F.interpolate(network.decode(codes), images.shape[-2:], mode="nearest"))
        sheet([to_pil(row) for row in rows]).save(path)

    def finished(self, network: nn.Module, provenance: dict[str, Any]) -> Model:
        assert isinstance(network, Tokenizer)
        height, width = self.config.sizes[0]
        return Model(network, None, (), Defaults(height=height, width=width), {"tokenizer": provenance})


def random_scales(count: int, native: Size, rng: Any) -> list[Size]:
    """`count` different scales in the native aspect ratio, growing; the last is the native one."""
    longer = max(native)
    sides = sorted(rng.sample(range(1, longer), min(count - 1, longer - 1)))
    return [*((max(1, native[0] * side // longer), max(1, native[1] * side // longer)) for side in sides), native]
