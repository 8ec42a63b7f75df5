"""Schedules: the grids of codes that a picture is drawn on, from the coarsest to the finest.

The paper's schedules (Table 8) are rows of integers `u` on a 16 x 16 grid. Every other size scales one of these rows, so that one
rule serves any resolution, any aspect ratio and any number of steps, in training and in sampling.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flexvar.checks import sizes_of, warn, whole_number

Size: TypeAlias = tuple[int, int]
ScheduleLike: TypeAlias = "Schedule | str | Sequence[int | Sequence[int]]"
RandomPolicy: TypeAlias = Literal["paper", "released"]

ROWS: dict[int, tuple[int, ...]] = {
    6: (1, 2, 4, 6, 10, 16),
    7: (1, 2, 3, 5, 8, 11, 16),
    8: (1, 2, 3, 4, 6, 10, 13, 16),
    9: (1, 2, 3, 4, 5, 7, 10, 13, 16),
    10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
    12: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    13: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
    14: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16),
}
"""The published rows by their number of steps (paper, Table 8; 14 stands in the released evaluation script only)."""

NAMED: dict[str, tuple[int, ...]] = {
    **{str(steps): row for steps, row in ROWS.items()},
    "8-script": (1, 2, 3, 5, 7, 10, 13, 16),
    "384-11": (*ROWS[10], 24),
    "512-12": (*ROWS[10], 23, 32),
    "512-15": (*ROWS[13], 23, 32),
}

FINEST = 16
GROWTH = 1.5  # beyond the trained grid, one scale to the next is, before rounding, at most this much larger on a side


@dataclass(frozen=True)
class Schedule:
    """Grids ((h, w), ...) in the order they are drawn.

    Any list works that has positive sides and never shrinks on either side; it may start at any size and repeat a size.
    Raises ValueError for anything else, naming the scale at fault.
    """

    sizes: tuple[Size, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", sizes_of(self.sizes))
        if not self.sizes:
            raise ValueError("a schedule needs at least one scale, for example Schedule.square([1, 2, 4])")
        for k, (h, w) in enumerate(self.sizes):
            if h < 1 or w < 1:
                raise ValueError(f"scale {k} of the schedule is {h}x{w}; both sides must be at least 1")
        for k, ((h, w), (next_h, next_w)) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            if next_h < h or next_w < w:
                raise ValueError(
                    f"the schedule shrinks from {h}x{w} to {next_h}x{next_w} at scale {k + 1}; put its scales in growing order"
                )

    # -- ways to make one --

    @classmethod
    def of(cls, schedule: ScheduleLike) -> Schedule:
        """A Schedule as it is, one from a list whose integers are square scales and whose pairs are (h, w), or one from words (`parse`)."""
        if isinstance(schedule, Schedule):
            return schedule
        return cls.parse(schedule) if isinstance(schedule, str) else cls(schedule)  # type: ignore[arg-type]

    @classmethod
    def square(cls, sides: Iterable[int]) -> Schedule:
        """Square scales with these sides."""
        return cls(tuple(sides))  # type: ignore[arg-type]

    @classmethod
    def named(cls, name: str) -> Schedule:
        """A published schedule: "6" ... "14", "8-script", "384-11", "512-12", "512-15" (paper, Table 8 and the released scripts).

        ValueError for any other.
        """
        if name not in NAMED:
            raise ValueError(f"no schedule is named {name!r}; there are {', '.join(NAMED)}")
        return cls.square(NAMED[name])

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """A schedule as people type it: "1,2,4" (square scales), "1x1,2x3,4x6" (h x w), or a published name.

        ValueError for anything else, and for a number that is no published name: it might be meant as one, or as a single scale.
        """
        text = text.strip()
        if text.isdigit() and text not in NAMED:
            raise ValueError(
                f"{text!r} is no published schedule ({', '.join(NAMED)}); write one scale as 5x5, or ask for a number of steps"
            )
        return cls.named(text) if text in NAMED else cls(parse_sizes(text))

    @classmethod
    def for_grid(cls, h: int, w: int, steps: int = 10, trained_grid: int = FINEST) -> Schedule:
        """The schedule that ends at h x w codes: the row of `steps`, scaled on each side, equal neighbours merged.

        A square grid beyond the trained one gets extra scales in geometric steps behind a shorter row (24; 23, 32 from 16), where the
        steps suffice.
        """
        extra = _growths(h / trained_grid) if h == w and h > trained_grid else 0
        if not extra or steps - extra < 2:
            return cls(_merged(_scaled(_row(steps), h, w)))
        return cls(_merged(_scaled(_row(steps - extra), trained_grid, trained_grid))).grown(h, w)

    def grown(self, h: int, w: int) -> Schedule:
        """This schedule continued to a larger grid in geometric steps, before rounding at most 1.5 times on a side.

        Raises ValueError for a grid that is smaller on a side.
        """
        last_h, last_w = self.sizes[-1]
        if h < last_h or w < last_w:
            raise ValueError(
                f"a schedule that ends at {last_h}x{last_w} does not grow to {h}x{w}; give a grid at least as large on both sides"
            )
        steps = _growths(max(h / last_h, w / last_w))
        shares = [(i + 1) / steps for i in range(steps)]
        beyond = [(round(last_h * (h / last_h) ** share), round(last_w * (w / last_w) ** share)) for share in shares]
        return Schedule(_merged([*self.sizes, *beyond]))

    @classmethod
    def for_size(cls, height: int, width: int, steps: int = 10, downsample: int = 16, trained_grid: int = FINEST) -> Schedule:
        """The schedule of a picture of height x width px (paper, section 3.3 and Table 8).

        Raises ValueError, naming the nearest possible sizes, when a side is not a multiple of `downsample`, and when fewer than 2 steps
        are asked for. Warns in one line when the picture is too small for so many different scales.
        """
        check_steps(steps)
        schedule = cls.for_grid(*grid_of(height, width, downsample), steps=steps, trained_grid=trained_grid)
        if len(schedule) < steps:
            most = cls.max_steps(*schedule.sizes[-1], trained_grid=trained_grid)
            size = f"{height}x{width} px"
            warn(f"{size} is drawn in {len(schedule)} steps instead of {steps}: equal scales merge (at most {most} differ)")
        return schedule

    @classmethod
    def max_steps(cls, h: int, w: int, trained_grid: int = FINEST) -> int:
        """The largest number of different scales that `for_grid` can give a grid of h x w codes."""
        return max(len(cls.for_grid(h, w, steps, trained_grid)) for steps in range(2, 2 * FINEST + 2))

    @classmethod
    def random(cls, policy: RandomPolicy, rng: random.Random, h: int = FINEST, w: int = FINEST) -> Schedule:
        """A random schedule for one training step, scaled to a grid of h x w codes.

        "paper": as the paper says. "released": as the released trainer does, which leaves out the finest scale in a third of all steps
        to stay within 680 tokens. Raises ValueError for another policy.
        """
        if policy not in _RANDOM_ROWS:
            raise ValueError(f"no random schedule policy is named {policy!r}; there are {', '.join(_RANDOM_ROWS)}")
        return cls(_merged(_scaled(_RANDOM_ROWS[policy](rng), h, w, whole=policy == "paper")))

    # -- what one is --

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Size]:
        return iter(self.sizes)

    def __getitem__(self, index: int) -> Size:
        return self.sizes[index]

    def __str__(self) -> str:
        return " ".join(f"{h}x{w}" for h, w in self.sizes)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each scale: h·w."""
        return tuple(h * w for h, w in self.sizes)

    @property
    def tokens(self) -> int:
        """L, the tokens of all scales together."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Tokens of the first scale, which come from the class instead of from earlier codes."""
        return self.counts[0]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each scale lies among the L tokens."""
        ends = [sum(self.counts[: k + 1]) for k in range(len(self))]
        return tuple(slice(end - count, end) for end, count in zip(ends, self.counts, strict=True))


def check_steps(steps: int) -> None:
    """ValueError for fewer than 2 steps, and for no whole number of them."""
    if whole_number(steps, "steps") < 2:
        raise ValueError(f"{steps} steps are too few; a schedule from 1x1 to the full grid has at least 2")


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Grids as people type them: "1,2,4" (square scales) or "1x1,2x3,4x6" (h x w). ValueError for anything else."""
    plain = text.replace(" ", "").lower()
    if not re.fullmatch(r"\d+(x\d+)?(,\d+(x\d+)?)*", plain):
        raise ValueError(f"{text!r} is not a schedule; write square scales as 1,2,4 or pairs as 1x1,2x3")
    scales = [[int(side) for side in scale.split("x")] for scale in plain.split(",")]
    return tuple((scale[0], scale[-1]) for scale in scales)


def grid_of(height: int, width: int, downsample: int) -> Size:
    """The grid of codes of a picture of height x width px; ValueError naming the nearest sizes when it is not a whole one."""
    whole_number(downsample, "downsample", "give how many pixels a code has on a side", least=1)
    for name, pixels in (("height", height), ("width", width)):
        if whole_number(pixels, name) < downsample or pixels % downsample:
            below, above = pixels // downsample * downsample, (pixels // downsample + 1) * downsample
            nearest = f"{below} or {above}" if below >= downsample else str(max(above, downsample))
            raise ValueError(f"{name} {pixels} is not a multiple of {downsample} px; the nearest {name} is {nearest}")
    return height // downsample, width // downsample


def _row(steps: int) -> tuple[int, ...]:
    """`steps` different integers in 1..16: a published row, or one that is even in log."""
    steps = max(1, min(steps, FINEST))
    if steps == 1:
        return (FINEST,)
    if steps in ROWS:
        return ROWS[steps]
    row: list[int] = []
    for i in range(steps):
        even = round(FINEST ** (i / (steps - 1)))
        row.append(min(max(even, row[-1] + 1 if row else 1), FINEST - (steps - 1 - i)))
    return tuple(row)


def _scaled(row: Sequence[int], h: int, w: int, whole: bool = True) -> list[Size]:
    """A row on the 16 x 16 grid as scales of an h x w grid, from 1x1; `whole` ends it at (h, w)."""
    sizes = [(max(1, h * u // FINEST), max(1, w * u // FINEST)) for u in row]
    sizes[0] = (1, 1) if len(row) > 1 else sizes[0]
    return [*sizes[:-1], (h, w)] if whole else sizes


def _growths(ratio: float) -> int:
    """How many scales lead to a grid that is so many times larger."""
    return math.ceil(round(math.log(ratio) / math.log(GROWTH), 9))  # rounded, as log(24 / 16) / log(1.5) is to be 1


def _merged(sizes: Sequence[Size]) -> tuple[Size, ...]:
    return tuple(size for k, size in enumerate(sizes) if k == 0 or size != sizes[k - 1])


def _paper_row(rng: random.Random) -> list[int]:
    """1 and 16 always; 8 different interior sizes, each left out with probability 5 %, at most 4 of them (paper, section 3.2)."""
    row, left_out = [1], 0
    for u in sorted(rng.sample(range(2, FINEST), 8)):
        if left_out < 4 and rng.random() < 0.05:
            left_out += 1
        else:
            row.append(u)
    return [*row, FINEST]


def _released_row(rng: random.Random, most_tokens: int = 680) -> list[int]:
    """The released trainer's rule, its token cap included, which may remove the finest scale (released code, trainer)."""
    if rng.random() < 0.05:
        row = list(ROWS[10])
    else:
        row = [1, 2, *sorted(rng.sample(range(3, 11), 5)), *sorted(rng.sample(range(11, 16), 2)), FINEST]
    chance = rng.random()
    for _ in range(sum(chance < limit for limit in (0.10, 0.05, 0.02, 0.01))):
        row.pop(rng.randrange(2, len(row) - 1))
    while sum(u * u for u in row) > most_tokens:
        row.pop(len(row) - 1 - rng.randrange(4))
    return row


_RANDOM_ROWS = {"paper": _paper_row, "released": _released_row}
