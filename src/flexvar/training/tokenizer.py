"""The tokenizer's workshop: every picture is rebuilt from several scales of its codes (paper, section 3.1).

Where the paper is silent: the K - 1 random scales are different ones, their longer sides drawn evenly below the native one's, in the
picture's own aspect ratio; the target of a scale is the picture reduced to that scale's own pixels; all scales count alike; perceptual and
adversarial terms see pictures that are too small for them enlarged. docs/training.md tells what was measured.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.checkpoint import Defaults, Model
from flexvar.evaluation.lpips import LPIPS, load_lpips
from flexvar.evaluation.lpips import SMALLEST as SMALLEST_FOR_LPIPS
from flexvar.evaluation.reconstruction import quality_by_scale, use_of_all
from flexvar.processes import rank, world_size
from flexvar.schedule import Schedule, Size, grid_of
from flexvar.sheet import sheet, to_pil
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.training import losses
from flexvar.training.adversary import Discriminator, generator_loss, hinge_loss, judged_without_learning
from flexvar.training.meter import Figures
from flexvar.training.order import Batch, step_random
from flexvar.training.settings import TokenizerRun
from flexvar.training.workshop import Workshop

SETTLING = 0.2  # of the steps, at the end, in which no code starts anew: the last that did need time


class TokenizerWorkshop(Workshop):
    """Learns encoder, codebook and decoder. Counts how often each code is used, and starts unused ones anew."""

    def __init__(self, config: TokenizerRun, examples: Tensor) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(TokenizerConfig(**(vars(config.model) | {"multipliers": tuple(config.model.multipliers)})))
        self.adversary = self._adversary()
        self.adversary_rate = config.adversary.learning_rate
        self.frozen: list[LPIPS] = self._lpips()  # in a list, so that it is not one of this module's own parts
        self.examples = examples  # (N, 3, H, W) uint8, for the sheets
        self.used = torch.zeros(config.model.codebook_size)  # since unused codes were last looked for; each process counts its own share
        self.latest = torch.empty(0)  # feature vectors (B, L, C) of the last part of a batch, of all scales, from which codes start anew
        self.continuous = round(config.continuous * config.steps)  # steps before codes take the place of features
        self.codes_learn = config.learns == "all"
        if not self.codes_learn:
            for part in (self.tokenizer.encoder, self.tokenizer.before_codes, self.tokenizer.quantizer):
                part.requires_grad_(False)

    def _adversary(self) -> Discriminator | None:
        asked = self.config.adversary
        if not asked.weight:
            return None
        discriminator = Discriminator(asked.channels, asked.layers)
        if self.config.smallest < discriminator.smallest:
            raise ValueError(
                f"smallest is {self.config.smallest} px, too small for a discriminator of {asked.layers} layers; "
                f"give at least {discriminator.smallest}"
            )
        return discriminator

    def _lpips(self) -> list[LPIPS]:
        asked = self.config.perceptual
        if not asked.weight:
            return []
        if self.config.smallest < SMALLEST_FOR_LPIPS:
            raise ValueError(f"smallest is {self.config.smallest} px, too small for LPIPS; give at least {SMALLEST_FOR_LPIPS}")
        try:
            return [load_lpips(asked.vgg, asked.linear)]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} (perceptual.weight=0)") from error

    @property
    def network(self) -> Tokenizer:
        return self.tokenizer

    # -- the loss --

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        assert isinstance(network, Tokenizer)
        config, images = self.config, batch.pictures / 127.5 - 1  # (B, 3, H, W)
        features = network.features(images).float()  # (B, C, h, w)
        native = grid_of(images.shape[-2], images.shape[-1], network.config.downsample)
        sizes = random_scales(config.scales, native, step_random(config.seed, batch.step, "scales"))
        quantising = batch.step >= self.continuous
        terms: dict[str, list[Tensor]] = {}
        vectors: list[Tensor] = []
        for size in sizes:
            z = F.normalize(network.pooled(features, size), dim=-1)  # (B, h, w, C)
            codes = network.quantizer.nearest(z)  # (B, h, w)
            e = network.quantizer.lookup(codes)  # (B, h, w, C)
            through = losses.past_codes(z, e, config.gradient) if quantising else z
            rebuilt = network.decode_vectors(through.permute(0, 3, 1, 2)).float()  # (B, 3, h·f, w·f)
            target = losses.reduced(images, (rebuilt.shape[-2], rebuilt.shape[-1]), config.target)
            scale = {"l1": F.l1_loss(rebuilt, target), "l2": F.mse_loss(rebuilt, target)}
            if self.codes_learn:
                scale["codebook"], towards_codes = losses.commitment(z, e)
                scale["commitment"] = towards_codes * quantising
            if config.entropy:
                scale["entropy"] = losses.entropy(z, network.quantizer.codebook)
            if self.frozen or self._opposed(network, batch.step):
                scale |= self._as_seen(rebuilt, target, opposed=self._opposed(network, batch.step))
            for name, term in scale.items():
                terms.setdefault(name, []).append(term)
            self.used = self.used.to(codes.device)
            self.used.index_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=self.used.dtype))
            vectors.append(z.detach().flatten(1, 2))
        self.latest = torch.cat(vectors, 1)  # (B, L, C)
        # All scales count alike, those too: a term that leaves some out is still divided by all of them.
        means = {name: torch.stack(values).sum() / len(sizes) for name, values in terms.items()}
        total = sum((weight * means[name] for name, weight in self._weights().items() if name in means), images.new_zeros(()))
        figures = {name: mean.detach() for name, mean in means.items() if name != "l2"}
        figures |= {"loss": total.detach(), "psnr": -10 * torch.log10(terms["l2"][-1].detach() / 4)}
        figures["codes_in_use"] = (self._used_anywhere() > 0).float().mean()
        return total + means.get("discriminator", 0), figures

    def _weights(self) -> dict[str, float]:
        """Of the terms that make up the tokenizer's own loss."""
        config = self.config
        weights = {"l1": config.l1, "l2": config.l2, "codebook": config.codebook, "commitment": config.commitment}
        return weights | {"entropy": config.entropy, "perceptual": config.perceptual.weight, "adversarial": config.adversary.weight}

    def _opposed(self, network: nn.Module, step: int) -> bool:
        """Whether the adversary takes part: in training, from its first step on."""
        return self.adversary is not None and network.training and step >= self.config.adversary.start

    def _as_seen(self, rebuilt: Tensor, target: Tensor, opposed: bool) -> Figures:
        """The terms that look at more than single pixels, where the scale's pictures are large enough for them."""
        ours = losses.seen(rebuilt, self.config.smallest, self.config.small)
        real = losses.seen(target, self.config.smallest, self.config.small)
        if ours is None or real is None:
            return {}
        scale: Figures = {}
        if self.frozen:
            self.frozen[0].to(rebuilt.device)
            scale["perceptual"] = self.frozen[0](ours, real).mean()
        if opposed:
            assert isinstance(self.adversary, Discriminator)
            scale["adversarial"] = generator_loss(judged_without_learning(self.adversary, ours))
            scale["discriminator"] = hinge_loss(self.adversary(real), self.adversary(ours.detach()))
        return scale

    # -- the codes --

    def _used_anywhere(self) -> Tensor:
        """How often each code was used, on all processes together, which must all ask."""
        used = self.used.to(self.latest.device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(used)
        return used

    def _latest_anywhere(self) -> Tensor:
        """The feature vectors (N, C) of all processes, in the order in which a single one would have them."""
        shares = [self.latest]
        if dist.is_initialized():
            shares = [torch.empty_like(self.latest) for _ in range(world_size())]
            dist.all_gather(shares, self.latest)
        return torch.cat(shares).flatten(0, 1)

    def get_extra_state(self) -> dict[str, Any]:
        return {"used": self._used_anywhere().cpu(), "continuous": self.continuous}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.used = state["used"].cpu().clone() if rank() == 0 else torch.zeros_like(self.used)
        self.continuous = min(self.continuous, state["continuous"])  # more steps make no codes go back to features

    @torch.no_grad()
    def after_step(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        every = self.config.restart_every
        if not self.codes_learn or not every or step % every:
            return
        unused = (self._used_anywhere() == 0).nonzero()[:, 0]
        self.used.zero_()
        if step > (1 - SETTLING) * self.config.steps:
            return
        latest = self._latest_anywhere()  # (N, C)
        chosen = torch.randint(len(latest), (len(unused),), generator=torch.Generator().manual_seed(step))
        fresh = latest[chosen.to(latest.device)]  # (unused, C)
        codebook = self.tokenizer.quantizer.codebook
        codebook[unused] = fresh.to(codebook.dtype)
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimiser.state[codebook]:
                optimiser.state[codebook][name][unused] = 0

    # -- what is seen of it --

    def measured(self, network: nn.Module, batches: list[Batch]) -> dict[str, Any]:
        """The native scale's distance, by which the best checkpoint is chosen, and the quality of every scale of the default schedule."""
        assert isinstance(network, Tokenizer)
        by_size: dict[Size, list[Tensor]] = {}
        for batch in batches:
            by_size.setdefault((batch.pictures.shape[-2], batch.pictures.shape[-1]), []).append(batch.pictures)
        size, pictures = max(by_size.items(), key=lambda item: len(item[1]))  # of the size that came most often
        grid = grid_of(*size, network.config.downsample)
        scales = quality_by_scale(network, (part / 127.5 - 1 for part in pictures), Schedule.for_grid(*grid))
        by_scale = {f"{h}x{w}": scale.means() for scale in scales for h, w in [scale.size]}
        return {"loss": by_scale["x".join(map(str, grid))]["l1"], "use": use_of_all(scales), "by_scale": by_scale}

    def sheet(self, network: nn.Module, out: BinaryIO) -> None:
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
        sheet([to_pil(row) for row in rows]).save(out, "PNG")

    def finished(self, network: nn.Module, provenance: dict[str, Any]) -> Model:
        assert isinstance(network, Tokenizer)
        height, width = self.config.sizes[0]
        return Model(network, None, (), Defaults(height=height, width=width), {"tokenizer": provenance})


def random_scales(count: int, native: Size, rng: Any) -> list[Size]:
    """`count` different scales in the native aspect ratio, growing; the last is the native one."""
    longer = max(native)
    sides = sorted(rng.sample(range(1, longer), min(count - 1, longer - 1)))
    return [*((max(1, native[0] * side // longer), max(1, native[1] * side // longer)) for side in sides), native]
