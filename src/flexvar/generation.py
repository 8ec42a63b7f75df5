"""The one loop over scales. Generation, editing and evaluation all go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.arguments import seeds_of
from flexvar.checks import shown
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
    decode: Callable[[Tensor], Tensor] = field(repr=False)  # the tokenizer's
    total: Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)  # (B,), sum of what the head read; finite if that was

    @cached_property
    def images(self) -> Tensor:
        """The scale as pictures (B, 3, h·f, w·f), about [-1, 1], not clamped; decoded when first asked for.

        Raises ValueError where a number on the way to them was not finite: codes are chosen even then, and the picture may look fine.
        """
        with torch.no_grad():
            images = self.decode(self.codes)
            refuse_not_finite(self.total, images)
            return images


def refuse_not_finite(*tensors: Tensor) -> None:
    """Raises ValueError where a number is not finite; waits for a GPU."""
    if not all(tensor.sum(dtype=torch.float32).isfinite() for tensor in tensors):  # a sum takes no memory
        raise ValueError("the model drew numbers that are not finite; check its weights, or draw in float32")


@dataclass(frozen=True)
class Keep:
    """Codes that are kept instead of drawn.

    codes: for each scale from the first, (B or 1, h, w). where: for each of them a bool map (B or 1, h, w) that is True where the code is
    kept; None keeps all. upto: how many scales; None means as many as there are codes.
    """

    codes: Sequence[Tensor]
    where: Sequence[Tensor] | None = None
    upto: int | None = None

    def __len__(self) -> int:
        """How many scales are kept, wholly or in part."""
        return len(self.codes) if self.upto is None else max(0, min(self.upto, len(self.codes)))

    def check(self, schedule: Schedule, pictures: int, codebook_size: int) -> None:
        """Raises ValueError, naming the scale, where the kept codes do not fit a drawing of so many pictures."""
        if (self.upto or 0) < 0:
            raise ValueError(f"upto is {self.upto}: so many scales are to be kept; give 0 or more, or None for all that have codes")
        if len(self) > len(schedule) or (self.where is not None and len(self.where) < len(self)):
            raise ValueError(
                f"{len(self)} scales are to be kept, but the schedule draws {len(schedule)}; give codes, and maps if any, for each"
            )
        for k in range(len(self)):
            for name, tensor in (("codes", self.codes[k]), *([("map", self.where[k])] if self.where is not None else [])):
                if tensor.ndim != 3 or tuple(tensor.shape[1:]) != schedule[k] or tensor.shape[0] not in (1, pictures):
                    expected = f"({pictures} or 1, {schedule[k][0]}, {schedule[k][1]})"
                    raise ValueError(f"the kept {name} of scale {k} has shape {tuple(tensor.shape)} instead of {expected}")
        kept = self.codes[: len(self)]
        outside = [(codes < 0).logical_or(codes >= codebook_size).any() for codes in kept]
        for k, wrong in enumerate(torch.stack(outside).tolist() if kept else []):  # codes on a GPU are waited for once
            if wrong or kept[k].is_floating_point():
                raise ValueError(f"the kept codes of scale {k} must be integers from 0 to {codebook_size - 1}")

    def to(self, device: torch.device) -> Keep:
        """All of it on a device, as `apply` takes it."""
        codes = [codes.to(device, torch.int64) for codes in self.codes]
        return replace(self, codes=codes, where=None if self.where is None else [where.to(device, torch.bool) for where in self.where])

    def apply(self, scale: int, drawn: Tensor) -> Tensor:
        """The codes (B, h, w) of a scale: the kept ones in their places, the drawn ones elsewhere."""
        if scale >= len(self):
            return drawn
        return self.codes[scale].expand_as(drawn) if self.where is None else torch.where(self.where[scale], self.codes[scale], drawn)


@dataclass(frozen=True)
class Recipe:
    """How pictures are drawn, whatever they show."""

    schedule: Schedule
    guidance: Guidance
    sampling: Sampling


@dataclass(frozen=True)
class Request:
    """What is to be drawn: checked, and on the device of the networks."""

    labels: Tensor  # (B,), int64
    recipe: Recipe
    keep: Keep | None
    numbers: Tensor  # (B, L), uniform in [0, 1)


Draw: TypeAlias = Callable[[Tokenizer, Transformer, Request], Iterator[Step]]
Choose: TypeAlias = Callable[[Tensor, Tensor, Sampling, bool], Tensor]


def generate(
    tokenizer: Tokenizer,
    transformer: Transformer,
    labels: Tensor | Sequence[int],
    schedule: ScheduleLike,
    *,
    guidance: Guidance | None = None,
    sampling: Sampling | None = None,
    keep: Keep | None = None,
    seeds: int | Sequence[int] | Tensor | None = None,
    draw: Draw | None = None,
) -> Iterator[Step]:
    """Draws pictures scale by scale; yields each scale as soon as its codes are chosen.

    labels: (B,), class indices; the null class draws without a label. guidance, sampling: the released evaluation's by default.
    seeds: one a picture, or an integer s for s, s + 1, ..., from 0 to 2**32 - 1; None draws s. Picture i depends on its own seed, label
    and settings alone.
    draw: another way to run the loop below, as `flexvar.compiled` makes them.
    Raises ValueError at once, before anything is drawn, for labels or seeds out of range, seeds of another number than labels, or a
    `keep` that does not fit the schedule.
    """
    schedule = Schedule.of(schedule)
    guidance, sampling = Guidance() if guidance is None else guidance, Sampling() if sampling is None else sampling
    for given, kind in ((guidance, Guidance), (sampling, Sampling)):
        if not isinstance(given, kind):
            raise ValueError(f"{kind.__name__.lower()} is {shown(given)}; give a flexvar.{kind.__name__}")
    config, device = transformer.config, transformer.device
    labels = _indices(labels, config.null_class)
    if keep is not None:
        keep.check(schedule, len(labels), config.codebook_size)
        keep = keep.to(device)
    numbers = uniform_numbers(seeds_of(seeds, len(labels)), schedule.tokens).to(device)
    guidance = needed_guidance(guidance, labels.tolist(), config.null_class)
    request = Request(labels.to(device, torch.int64), Recipe(schedule, guidance, sampling), keep, numbers)
    return (draw or draw_scales)(tokenizer, transformer, request)


def _indices(labels: Tensor | Sequence[int], null_class: int) -> Tensor:
    """Class indices as a tensor (B,); ValueError for anything else."""
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        given = torch.empty(0)
    whole = not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool
    if given.ndim != 1 or not len(given) or not whole or given.min() < 0 or given.max() > null_class:
        raise ValueError(f"labels must be one or more integers from 0 to {null_class}, the last one meaning no class")
    return given


def needed_guidance(guidance: Guidance, labels: Sequence[int], null_class: int) -> Guidance:
    """Switched off where no picture has a class: what is drawn with the class and without it is then the same."""
    return replace(guidance, stop=0) if all(label == null_class for label in labels) else guidance


@torch.no_grad()
def draw_scales(tokenizer: Tokenizer, transformer: Transformer, request: Request, choose: Choose = choose) -> Iterator[Step]:
    """The loop itself. Nothing in it waits for a GPU."""
    labels, recipe, keep = request.labels, request.recipe, request.keep
    schedule, trained_grid = recipe.schedule, transformer.config.trained_grid
    weights = recipe.guidance.weights(schedule, trained_grid)
    greedy = recipe.sampling.greedy_scales(schedule, trained_grid)
    guided = max((k + 1 for k, weight in enumerate(weights) if weight != 1), default=0)  # scales, from the first

    # A batch goes through the network at once: pictures with their class and the same ones without it, together or one after the other.
    unlabelled = torch.full_like(labels, transformer.config.null_class)
    if not guided:
        batches = [labels]
    elif recipe.guidance.split:
        batches = [labels, unlabelled]
    else:
        batches = [torch.cat((labels, unlabelled))]
    conditions = [transformer.condition(batch) for batch in batches]
    caches = [transformer.new_cache(len(batch), schedule) for batch in batches]

    codes, total = torch.empty(0), torch.zeros(len(labels), device=labels.device)
    for k, (size, at) in enumerate(zip(schedule, schedule.slices, strict=True)):
        if guided and k == guided:  # from here on nothing is drawn without the class
            conditions, caches = [conditions[0].only(len(labels))], [caches[0].only(len(labels))]
        if k == 0:
            embedded = [transformer.begin(condition, size) for condition in conditions]
        else:
            scale = transformer.embed(tokenizer.lift(codes, size).flatten(2).mT, size)  # (B, n, D)
            embedded = [scale.repeat(len(condition.embedding) // len(labels), 1, 1) for condition in conditions]
        hidden = torch.cat([transformer.step(*given) for given in zip(embedded, conditions, caches, strict=True)])  # (B or 2B, n, D)
        if k < guided:
            # The head is linear and the weights sum to 1, so guiding what it reads is guiding its logits, at half the work.
            with_class, without = hidden.float().chunk(2)
            hidden = torch.lerp(without, with_class, weights[k]).to(hidden.dtype)  # (B, n, D)
        total = total + hidden.sum((1, 2), dtype=torch.float32)
        if k == len(schedule) - 1:
            del caches, embedded  # decoding gets their memory
        drawn = choose(full_logits(transformer.head, hidden), request.numbers[:, at], recipe.sampling, greedy[k])  # (B, n)
        codes = drawn.unflatten(1, size)  # (B, h, w)
        if keep is not None:
            codes = keep.apply(k, codes)
        yield Step(k, size, codes, tokenizer.decode, total)


def full_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What the head makes of its input (B, n, D): logits (B, n, V) in float32, also where weights and input are in half precision.

    A layer in half precision rounds its sums to that, and neighbouring logits become equal.
    """
    half = head.weight.dtype in (torch.bfloat16, torch.float16)
    if half and hidden.is_cuda and torch.version.cuda:
        product = torch.mm(hidden.flatten(0, 1), head.weight.T, out_dtype=torch.float32)
        return product.add_(head.bias).unflatten(0, hidden.shape[:2])
    kind = hidden.device.type
    # A caller's autocast would round them too; the device of tensors without data has none.
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        if half:
            return F.linear(hidden.float(), head.weight.float(), head.bias.float())
        return head(hidden.to(head.weight.dtype)).float()
