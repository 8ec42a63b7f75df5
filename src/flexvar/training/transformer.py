"""The transformer's workshop: cross-entropy over the true codes of every scale, from the true codes before it (paper, section 3.2)."""

from __future__ import annotations

import math
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from flexvar.accounting import training_flops
from flexvar.checkpoint import Defaults, Model
from flexvar.data import aliases_of
from flexvar.generation import generate
from flexvar.sampling import Guidance, Sampling
from flexvar.schedule import Schedule, Size, grid_of
from flexvar.sheet import sheet, to_pil
from flexvar.training.losses import code_losses
from flexvar.training.meter import Figures, Meter, Work, nested
from flexvar.training.order import LABEL, PATHS, Batch, position_random, step_random
from flexvar.training.scoring import Scoring
from flexvar.training.settings import TransformerRun, demand_grids
from flexvar.training.workshop import Workshop
from flexvar.transformer import Transformer, TransformerConfig


class TransformerWorkshop(Workshop):
    """Learns the transformer; the tokenizer is frozen and stays out of its state."""

    def __init__(self, config: TransformerRun, tokenizer: Model, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.class_names = config, class_names
        self.frozen = [tokenizer]  # in a list, so that it is not one of this module's own parts
        shape, painted = vars(config.model).copy(), tokenizer.tokenizer.config
        demand_grids(config.sizes, painted.downsample)
        grids = [self._drawn((height, width)) for height, width in config.sizes]
        least = 3 if config.schedules == "released" else 2  # that rule leaves out the finest scale now and then
        for (height, width), grid in zip(config.sizes, grids, strict=True):
            if max(grid) < least:
                what = f"sizes holds [{height}, {width}], {grid[0]}x{grid[1]} codes"
                raise ValueError(f"{what}, of which a step may have a single scale; take larger pictures, of {least} codes on a side")
        shape["trained_grid"] = shape["trained_grid"] or max(math.isqrt(h * w) for h, w in grids)
        self.transformer = Transformer(
            TransformerConfig(**shape, classes=len(class_names), codebook_size=painted.codebook_size, code_width=painted.code_width),
            config.gain_factor,
        )
        self.unconditional = len(class_names) == 1
        self.scoring: Scoring | None = None

    @property
    def network(self) -> Transformer:
        return self.transformer

    def speed_up(self) -> None:
        """Has what stands before and after attention compiled, if the config says so.

        Attention itself is a call a scale, and their number changes from step to step. ValueError for a backend that torch does not know.
        """
        if not (backend := self.config.compile):
            return
        if backend not in torch.compiler.list_backends(exclude_tags=()):
            raise ValueError(f"compile is {backend!r}; it must be one of {', '.join(torch.compiler.list_backends())}")
        torch._dynamo.config.optimize_ddp = False  # it would cut the halves, which are small enough, where gradients are exchanged
        for block in self.transformer.layers:
            for half in ("before", "after"):
                setattr(block, half, torch.compile(getattr(block, half), backend=backend, dynamic=True))

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        assert isinstance(network, Transformer)
        config, tokenizer = self.config, self.frozen[0].tokenizer.to(batch.pictures.device)
        # First, while nothing is queued on the GPU: a copy from ordinary memory waits until the queue is empty.
        labels, paths = (self._labels(batch), self._paths(batch)) if network.training else (batch.labels, None)
        with torch.no_grad(), torch.autocast(batch.pictures.device.type, enabled=False):
            features = batch.pictures if batch.cached else tokenizer.features(batch.pictures / 127.5 - 1)  # (B, C, h, w)
            features = features.half().float()  # as a cache keeps them, so that training from one is the same
            schedule = self._schedule(batch.step, (features.shape[-2], features.shape[-1]))
            codes = tokenizer.codes(features, schedule)
            inputs = tokenizer.inputs(codes, schedule)  # (B, L - first, C)
        targets = torch.cat([scale.flatten(1) for scale in codes], 1)  # (B, L)
        recompute = config.recompute and network.training
        logits = network(labels, inputs, schedule, paths=paths, attention=config.attention, recompute=recompute)  # (B, L, V)
        losses = code_losses(logits, targets)  # (B, L)
        right = (logits.detach().argmax(-1) == targets).float()
        of_guessing = losses.new_full((), math.log(logits.shape[-1]))  # what an untrained model has
        figures = {"loss": losses.mean().detach(), "loss_of_guessing": of_guessing, "accuracy": right.mean()}
        for (h, w), at in zip(schedule, schedule.slices, strict=True):
            figures |= {f"loss/{h}x{w}": losses[:, at].detach().mean(), f"accuracy/{h}x{w}": right[:, at].mean()}
        return losses.mean(), figures

    def _schedule(self, step: int, grid: Size) -> Schedule:
        """The scales of a step, the same on all processes."""
        return Schedule.random(self.config.schedules, step_random(self.config.seed, step, "schedule"), *self._at_most(grid))

    def _at_most(self, grid: Size) -> Size:
        """A grid, reduced to what the config allows as the finest."""
        finest, longer = self.config.finest, max(grid)
        return grid if not finest or longer <= finest else (max(1, grid[0] * finest // longer), max(1, grid[1] * finest // longer))

    def _drawn(self, size: Size) -> Size:
        """The finest grid that is learnt from pictures of size = (height, width) px."""
        return self._at_most(grid_of(*size, self.frozen[0].tokenizer.config.downsample))

    def work(self, batch: Batch) -> Work:
        downsample = 1 if batch.cached else self.frozen[0].tokenizer.config.downsample
        h, w = (side // downsample for side in batch.pictures.shape[-2:])
        schedule, pictures = self._schedule(batch.step, (h, w)), len(batch.positions)
        return Work(pictures * schedule.tokens, training_flops(self.transformer.config, schedule, pictures))

    def _labels(self, batch: Batch) -> Tensor:
        """The labels, some of them dropped for the null class; all of them where there is one class, which says nothing."""
        if self.unconditional:
            return torch.full_like(batch.labels, self.transformer.config.null_class)
        chances = [position_random(self.config.seed, position, LABEL).random() for position in batch.positions]
        dropped = torch.tensor([chance < self.config.label_drop for chance in chances], device=batch.labels.device)
        return torch.where(dropped, self.transformer.config.null_class, batch.labels)

    def _paths(self, batch: Batch) -> Tensor | None:
        """The factors (depth, 2, B) of the residual paths; dropped ones are 0, the others make up for it."""
        if not self.config.drop_path:
            return None
        depth = self.transformer.config.depth
        rates = torch.linspace(0, self.config.drop_path, depth)[:, None, None]
        chances = [position_random(self.config.seed, position, PATHS).random((depth, 2)) for position in batch.positions]
        chance = torch.stack([torch.from_numpy(c) for c in chances], -1)
        return ((chance >= rates) / (1 - rates)).to(batch.pictures.device, torch.float32)

    @torch.no_grad()
    def after_step(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        """A single class is the same as none, and is drawn the same."""
        if self.unconditional:
            self.transformer.class_embedding.weight[0] = self.transformer.class_embedding.weight[-1]

    # -- what is seen of it --

    def measured(self, network: nn.Module, batches: list[Batch]) -> dict[str, Any]:
        """Loss and accuracy with all labels and paths, over all scales and by scale."""
        meter = Meter()
        for batch in batches:
            meter.add(self.loss(network, batch)[1])
        return nested(meter.averages(alone=True))

    def scored(self, network: nn.Module, step: int, *, again: bool = True) -> dict[str, float]:
        if self.scoring is None or (step % self.config.scores.every and step < self.config.steps):
            return {}
        if not again and self.scoring.done(step):
            return {}
        return self.scoring.scores(self.finished(network, {}), step)

    def sheet(self, network: nn.Module, out: BinaryIO) -> None:
        """Samples at fixed seeds: a row for each of the picture sizes, all of `sheet_labels`."""
        assert isinstance(network, Transformer)
        defaults, null_class = self._defaults(), network.config.null_class
        named = [label for label in self.config.sheet_labels if label < null_class and not self.unconditional]
        labels = named or [null_class] * len(self.config.sheet_labels)
        rows = []
        for grid in dict.fromkeys(self._drawn((height, width)) for height, width in self.config.sizes):
            *_, last = generate(
                self.frozen[0].tokenizer,
                network,
                labels,
                Schedule.for_grid(*grid, trained_grid=network.config.trained_grid),
                guidance=defaults.guidance,
                sampling=defaults.sampling,
                seeds=range(len(labels)),
            )
            rows.append(to_pil(last.decode(last.codes)))  # whatever they are: a sheet does not end a training
        sheet(rows).save(out, "PNG")

    def _defaults(self) -> Defaults:
        height, width = self.config.sizes[0]
        h, w = self._drawn((height, width))
        f, guidance = self.frozen[0].tokenizer.config.downsample, Guidance("ramp", self.config.guidance_scale)
        return Defaults(h * f, w * f, guidance=guidance, sampling=Sampling(top_k=0, top_p=self.config.top_p, greedy="none"))

    def finished(self, network: nn.Module, provenance: dict[str, Any]) -> Model:
        assert isinstance(network, Transformer)
        before = self.frozen[0]
        told = {name: what for name, what in before.provenance.items() if "transformer" not in name}  # what is told of another one
        provenance = {**told, "transformer": provenance}
        return Model(before.tokenizer, network, self.class_names, self._defaults(), provenance, aliases_of(self.class_names))
