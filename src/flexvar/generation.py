"""The one loop over scales. Generation, editing and evaluation all go through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flexvar.sampling import Guidance, Sampling, choose, uniform_numbers
from flexvar.schedule import Schedule, ScheduleLike, Size
from flexvar.tokenizer import Tokenizer
from flexvar.transformer import Transformer


@dataclass
class Step:
    """One scale as it was drawn; every scale is a whole picture."""

    index: int
    size: Size  # (h, w)
    codes: Tensor  # (B, h, w), int64
    tokenizer: Tokenizer = field(repr=False)

    @cached_property
    def images(self) -> Tensor:
        """The scale as pictures (B, 3, h·f, w·f), about [-1, 1], not clamped; decoded when first asked for."""
        with torch.no_grad():
            return self.tokenizer.decode(self.codes)


@dataclass(frozen=True)
class Keep:
    """Codes that are kept instead of drawn.

    codes: for each scale from the first, (B or 1, h, w). where: for each of them a bool map (B or 1, h, w) that is True where the code is
    kept; None keeps all. upto: how many scales; None means as many as there are codes.
    """

    codes: Sequence[Tensor]
    where: Sequence[Tensor] | None = None
    upto: int | None = None

    def apply(self, index: int, drawn: Tensor) -> Tensor:
        """The codes (B, h, w) of scale `index`: the kept ones in their places, the drawn ones elsewhere."""
        if index >= (len(self.codes) if self.upto is None else min(self.upto, len(self.codes))):
            return drawn
        kept = self.codes[index].to(drawn.device)
        if kept.shape[1:] != drawn.shape[1:]:
            raise ValueError(f"kept codes of scale {index} are {tuple(kept.shape[1:])}, but the schedule draws {tuple(drawn.shape[1:])}")
        if self.where is None:
            return kept.expand_as(drawn)
        return torch.where(self.where[index].to(drawn.device), kept, drawn)


@torch.no_grad()
def generate(
    tokenizer: Tokenizer,
    transformer: Transformer,
    labels: Tensor | Sequence[int],
    schedule: ScheduleLike,
    *,
    guidance: Guidance | None = None,
    sampling: Sampling | None = None,
    keep: Keep | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Draws pictures scale by scale; yields each scale as soon as its codes are chosen.

    labels: (B,), class indices; the null class draws without a label. guidance, sampling: the released evaluation's by default.
    seeds: one a picture; picture i depends on its own seed, label and settings alone. None draws them.
    Raises ValueError for a label out of range or seeds of another number than labels.
    """
    schedule, guidance, sampling = Schedule.of(schedule), guidance or Guidance(), sampling or Sampling()
    config, device = transformer.config, transformer.head.weight.device
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) == 0 or labels.min() < 0 or labels.max() > config.null_class:
        raise ValueError(f"labels must be one or more integers from 0 to {config.null_class}, the last one meaning no class")
    seeds = torch.randint(2**62, (len(labels),)).tolist() if seeds is None else seeds
    if len(seeds) != len(labels):
        raise ValueError(f"{len(seeds)} seeds were given for {len(labels)} pictures; give one a picture")

    numbers = uniform_numbers(seeds, schedule.tokens).to(device)  # (B, L)
    weights = guidance.weights(schedule, config.trained_grid)
    greedy = sampling.greedy_scales(schedule, config.trained_grid)
    guided = any(weight != 1 for weight in weights)

    # Each half is a batch that goes through the network at once: pictures with their class, and the same ones without it.
    labels = labels.to(device)
    unlabelled = torch.full_like(labels, config.null_class)
    halves = [labels] if not guided else [labels, unlabelled] if guidance.split else [torch.cat((labels, unlabelled))]
    conditions = [transformer.condition(half) for half in halves]
    caches = [transformer.new_cache(len(half), schedule) for half in halves]

    codes = torch.empty(0)
    for index, (size, at) in enumerate(zip(schedule, schedule.slices, strict=True)):
        if index == 0:
            embedded = [transformer.begin(condition, size) for condition in conditions]
        else:
            scale = transformer.embed(tokenizer.lift(codes, size).flatten(2).mT, size)  # (B, n, D)
            embedded = [scale.repeat(len(half) // len(labels), 1, 1) for half in halves]
        read = torch.cat([transformer.step(*half) for half in zip(embedded, conditions, caches, strict=True)])  # (B or 2B, n, D)
        if guided:
            # The head is linear and the weights sum to 1, so guiding what it reads is guiding its logits, at half the work.
            with_class, without = read.float().chunk(2)
            read = torch.lerp(without, with_class, weights[index]).to(read.dtype)  # (B, n, D)
        logits = transformer.head(read).float()  # (B, n, V)
        codes = choose(logits, numbers[:, at], sampling, greedy[index]).unflatten(1, size)  # (B, h, w)
        if keep is not None:
            codes = keep.apply(index, codes)
        yield Step(index, size, codes, tokenizer)
