"""The transformer's workshop: cross-entropy over the true codes of every scale, from the true codes before it (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.checkpoint import Defaults, Model
from flexvar.generation import generate
from flexvar.sampling import Guidance, Sampling
from flexvar.schedule import Schedule, grid_of
from flexvar.sheet import sheet, to_pil
from flexvar.training.config import TransformerRun
from flexvar.training.loop import Workshop
from flexvar.training.order import LABEL, PATHS, Batch, position_random, step_random
from flexvar.transformer import Transformer, TransformerConfig


class TransformerWorkshop(Workshop):
    """Learns the transformer; the tokenizer is frozen and stays out of its state."""

    def __init__(self, config: TransformerRun, tokenizer: Model, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.class_names = config, class_names
        self.frozen = [tokenizer]  # in a list, so that it is not one of this module's own parts
        shape = config.model
        self.transformer = Transformer(
            TransformerConfig(
                depth=shape.depth,
                width=shape.width,
                heads=shape.heads,
                mlp_ratio=shape.mlp_ratio,
                classes=len(class_names),
                codebook_size=tokenizer.tokenizer.config.codebook_size,
                code_width=tokenizer.tokenizer.config.code_width,
                trained_grid=shape.trained_grid or largest_grid(config.sizes, tokenizer.tokenizer.config.downsample),
                table_side=shape.table_side,
                positions=shape.positions,
                shared_modulation=shape.shared_modulation,
            )
        )

    @property
    def network(self) -> Transformer:
        return self.transformer

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokenizer = self.frozen[0].tokenizer.to(batch.images.device)
        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            features = tokenizer.features(batch.images / 127.5 - 1)  # (B, C, h, w)
            h, w = features.shape[-2:]
            schedule = Schedule.random(self.config.schedules, step_random(self.config.seed, batch.step, "schedule"), h, w)
            codes = tokenizer.codes(features, schedule)
            inputs = tokenizer.inputs(codes, schedule)  # (B, L - first, C)
        targets = torch.cat([scale.flatten(1) for scale in codes], 1)  # (B, L)
        logits = self.transformer(self._labels(batch), inputs, schedule, paths=self._paths(batch))  # (B, L, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)  # (B, L)
        right = (logits.argmax(-1) == targets).float()
        return losses.mean(), {
            "accuracy": right.mean(),
            "loss_by_scale": torch.stack([losses[:, at].detach().mean() for at in schedule.slices]),
            "accuracy_by_scale": torch.stack([right[:, at].mean() for at in schedule.slices]),
            "scales": torch.tensor(schedule.sizes),
            "untrained_loss": losses.new_tensor(math.log(logits.shape[-1])),
        }

    def _labels(self, batch: Batch) -> Tensor:
        """The labels, some of them dropped for the null class."""
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
        return ((chance >= rates) / (1 - rates)).to(batch.images.device, torch.float32)

    def sheet(self, network: nn.Module, path: Path) -> None:
        """Samples at fixed seeds: a row for each of the picture sizes, all of `sheet_labels`."""
        assert isinstance(network, Transformer)
        tokenizer, defaults = self.frozen[0].tokenizer, self._defaults()
        labels = [label for label in self.config.sheet_labels if label < len(self.class_names)]
        rows = []
        for height, width in dict.fromkeys((height, width) for height, width in self.config.sizes):
            grid = grid_of(height, width, tokenizer.config.downsample)
            schedule = Schedule.for_grid(*grid, trained_grid=network.config.trained_grid)
            *_, last = generate(
                tokenizer, network, labels, schedule, guidance=defaults.guidance, sampling=defaults.sampling, seeds=range(len(labels))
            )
            rows.append(to_pil(last.images))
        sheet(rows).save(path)

    def _defaults(self) -> Defaults:
        height, width = self.config.sizes[0]
        guidance = Guidance("ramp", self.config.guidance_scale)
        return Defaults(height, width, guidance=guidance, sampling=Sampling(top_k=0, top_p=0.95, greedy="none"))

    def finished(self, network: nn.Module, provenance: dict[str, Any]) -> Model:
        assert isinstance(network, Transformer)
        before = self.frozen[0]
        return Model(before.tokenizer, network, self.class_names, self._defaults(), {**before.provenance, "transformer": provenance})


def largest_grid(sizes: Sequence[Sequence[int]], downsample: int) -> int:
    """The side of the square grid with as many codes as the largest of the picture sizes (height, width)."""
    return max(math.isqrt(math.prod(grid_of(height, width, downsample))) for height, width in sizes)
