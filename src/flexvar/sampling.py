"""From logits to codes: guidance, top-k, top-p, greedy scales, and one stream of random numbers a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from flexvar.checks import check_truth, finite_number, shown, sizes_of, whole_number

Size: TypeAlias = tuple[int, int]
GuidanceKind: TypeAlias = Literal["ramp", "constant", "official-ramp"]
Greedy: TypeAlias = Literal["none", "official"] | tuple[int | Size, ...]

OFFICIAL_SAMPLED_SIDES = frozenset({1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32})
"""Square scales that the released evaluation samples; it draws all others with top-k 1 (released code; not in the paper)."""

MOST_CANDIDATES = 1 << 20  # that are chosen among at the same time, which bounds the memory that it takes
LARGEST_GUIDANCE, LEAST_TEMPERATURE = 1e30, 1e-6  # so that logits and weights stay within float32


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = uncond + w (cond - uncond), with a weight w for each scale.

    kind: "constant": w = scale. "ramp": from 1 at the first scale to `scale` at the last. Both are off at scale 1.
        "official-ramp": w = 1 + scale · i / min(S - 1, 9) at scale i of S, and w = 1 + scale beyond the trained grid: the released
        evaluation's `cfg`, off at 0. It passes 1 + scale when S > 10, as released. A one-scale schedule takes the end value.
    split: draws the two halves of the batch one after the other, for less memory.
    stop: only so many scales, from the first, are guided; the others are drawn with the class alone and cost half. None guides all.
    """

    kind: GuidanceKind = "official-ramp"
    scale: float = 2.5
    split: bool = False
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(GuidanceKind):
            raise ValueError(f"no guidance is of kind {self.kind!r}; there are {', '.join(get_args(GuidanceKind))}")
        mend = "give a finite number, 1 (or 0 for the official ramp) switches it off"
        scale = finite_number(self.scale, "the guidance scale", mend, least=-LARGEST_GUIDANCE, most=LARGEST_GUIDANCE)
        object.__setattr__(self, "scale", scale)
        check_truth(self.split, "split_guidance")
        if self.stop is not None:
            mend = "give how many scales are guided, from 0 on, or None for all"
            object.__setattr__(self, "stop", whole_number(self.stop, "guidance_stop", mend, least=0))

    def weights(self, schedule: Iterable[Size], trained_grid: int = 16) -> tuple[float, ...]:
        """w at each scale; 1 means that the unconditional half does not count."""
        sizes = list(schedule)
        stop = len(sizes) if self.stop is None else self.stop
        return tuple(weight if i < stop else 1.0 for i, weight in enumerate(self._unstopped(sizes, trained_grid)))

    def _unstopped(self, sizes: Sequence[Size], trained_grid: int) -> tuple[float, ...]:
        last = len(sizes) - 1
        if self.kind == "constant":
            return (self.scale,) * len(sizes)
        if self.kind == "ramp":
            return tuple(1 + (self.scale - 1) * (i / last if last else 1) for i in range(len(sizes)))
        shares = [i / min(last, 9) if last and h * w <= trained_grid**2 else 1.0 for i, (h, w) in enumerate(sizes)]
        return tuple(1 + self.scale * share for share in shares)


@dataclass(frozen=True)
class Sampling:
    """How a code is chosen from its logits.

    top_k: candidates kept, 0 for all of them. top_p: probability that the candidates must reach, 0 or 1 for no limit.
    temperature: logits are divided by it, at least 1e-6. greedy: the scales drawn with top-k 1: "none", "official" (those of the released
    evaluation), or their sizes, integers for square ones.
    """

    top_k: int = 900
    top_p: float = 0.95
    temperature: float = 1.0
    greedy: Greedy = "official"

    def __post_init__(self) -> None:
        top_k = whole_number(self.top_k, "top_k", "give 0 for all candidates or a number of them", least=0)
        top_p = finite_number(self.top_p, "top_p", "give a probability from 0 to 1", least=0, most=1)
        mend = f"give a number of at least {LEAST_TEMPERATURE:g} (top_k=1 always takes the most likely code)"
        temperature = finite_number(self.temperature, "temperature", mend, least=LEAST_TEMPERATURE)
        for name, value in (("top_k", top_k), ("top_p", top_p), ("temperature", temperature)):
            object.__setattr__(self, name, value)
        if isinstance(self.greedy, str) and self.greedy in ("none", "official"):
            return
        try:
            object.__setattr__(self, "greedy", sizes_of(self.greedy))
        except ValueError as error:
            raise ValueError(f"greedy is {shown(self.greedy)}; give 'none', 'official' or a list of scales") from error

    def greedy_scales(self, schedule: Iterable[Size], trained_grid: int = 16) -> tuple[bool, ...]:
        """For each scale, whether it is drawn with top-k 1."""
        if self.greedy == "none":
            return tuple(False for _ in schedule)
        if self.greedy == "official":
            return tuple(h * w > trained_grid**2 or (h == w and h not in OFFICIAL_SAMPLED_SIDES) for h, w in schedule)
        return tuple(size in self.greedy for size in schedule)


def uniform_numbers(seeds: Sequence[int], tokens: int) -> Tensor:
    """One number in [0, 1) for each picture and token, (B, L) float32 on the CPU; row i depends on seed i alone."""
    rows = [torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu") for seed in seeds]
    return torch.stack(rows)


def candidates(logits: Tensor, top_k: int, top_p: float, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The probabilities (..., k) of the kept candidates in descending order, 0 for dropped ones, and their codes (..., k).

    Top-k first, then top-p over what is left: among ascending probabilities those whose running sum is at most 1 - p are dropped, the
    largest always stays (released behaviour). Only the k candidates are sorted, never the whole codebook.
    Of logits that are equal to the last bit, no more than k are kept; the released code keeps all that equal the k-th.
    """
    kept = min(top_k or logits.shape[-1], logits.shape[-1])
    values, codes = torch.topk(logits.float(), kept, dim=-1)  # (..., k), descending
    probabilities = (values / temperature).softmax(-1)
    if 0 < top_p < 1:
        larger = probabilities.cumsum(-1) - probabilities  # the sum of all larger ones
        probabilities = probabilities.masked_fill(larger >= top_p, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, codes


def choose(logits: Tensor, numbers: Tensor, sampling: Sampling, greedy: bool = False) -> Tensor:
    """Codes (B, n) from logits (B, n, V) and uniform numbers (B, n): the inverse of the candidates' cumulative distribution."""
    if greedy or sampling.top_k == 1:
        return logits.argmax(-1)
    at_once = max(1, MOST_CANDIDATES // (sampling.top_k or logits.shape[-1]))
    parts = zip(logits.flatten(0, 1).split(at_once), numbers.flatten().split(at_once), strict=True)
    return torch.cat([_chosen(*part, sampling) for part in parts]).view_as(numbers)


def _chosen(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """The codes (n,) of some tokens: logits (n, V), numbers (n,)."""
    probabilities, codes = candidates(logits, sampling.top_k, sampling.top_p, sampling.temperature)
    reached = probabilities.cumsum(-1)  # (n, k)
    target = numbers.to(reached)[..., None] * reached[..., -1:]
    kept = (probabilities > 0).sum(-1, keepdim=True)  # a sum in parallel may still move behind them
    chosen = (reached <= target).sum(-1, keepdim=True).minimum(kept - 1).clamp_min(0)
    return codes.gather(-1, chosen)[..., 0]
