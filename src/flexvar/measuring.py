"""What a drawing takes on a device, part by part, held against the least that the device's own rates allow."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexvar.accounting import Part, Plan, Seconds, amount, floor
from flexvar.generation import Choose, draw_scales, generate
from flexvar.linear import to_int8
from flexvar.progress import progress
from flexvar.rates import Rates, device_name, measure_rates, wait_for
from flexvar.sampling import Guidance, choose
from flexvar.schedule import Schedule
from flexvar.tokenizer import Tokenizer
from flexvar.transformer import Transformer


@dataclass(frozen=True)
class Measured:
    """A drawing's cost, the rates of the device before and after it was drawn, and the seconds of each time; none where it was not."""

    cost: Plan
    device: str
    before: Rates
    after: Rates
    drawn: tuple[Seconds, ...]

    @property
    def rates(self) -> Rates:
        """The better ones."""
        return self.before.better(self.after)

    def share(self, rates: Rates) -> float:
        """Of the median drawing, what these rates take for it at least."""
        return floor(self.cost, rates).all / statistics.median(seconds.all for seconds in self.drawn)

    def lines(self) -> list[str]:
        """A plain-text table: FLOPs, bytes and the least time of each part, what it took, and the share of that which had to be."""
        cost, least = self.cost, floor(self.cost, self.rates)
        lines = [f"rates of {self.device}, {name}: {rates}" for name, rates in (("before", self.before), ("after", self.after))]
        if self.before.apart(self.after):
            lines.append("rates differ by more than 10 %: the device was busy, measure again")
        if cost.int8:
            lines.append("8-bit weights are held against the products of unrounded ones, and so may pass the floor")
        lines += ["", f"{'part':<27}{'FLOP':>12}{'bytes':>12}{'floor ms':>12}{'ms':>12}{'share':>9}"]
        rows = [*cost.parts(), Part("all", cost.flops.total, cost.bytes.total)]
        took: list[float | None] = [None] * len(rows)
        if self.drawn:
            took = [*medians(self.drawn).parts, statistics.median(seconds.all for seconds in self.drawn)]
        for (name, work, moved), needed, seconds in zip(rows, [*least.parts, least.all], took, strict=True):
            measured = f"{'-':>12}{'-':>9}" if seconds is None else f"{1e3 * seconds:>12.3f}{needed / seconds:>9.2f}"
            lines.append(f"{name:<27}{amount(work):>12}{amount(moved):>12}{1e3 * needed:>12.3f}{measured}")
        bare = self.rates.unhindered
        alone = [("all, by FLOP alone", bare)] + ([("the same, layers unpacked", bare.unpacked)] if bare.packed > bare.products else [])
        for name, rates in alone:
            share = f"{'':12}{self.share(rates):>9.2f}" if self.drawn else ""
            lines.append(f"{name:<27}{'':24}{1e3 * floor(cost, rates).all:>12.3f}{share}")
        if self.drawn:
            every = [1e3 * seconds.all for seconds in self.drawn]
            lines.append(f"median of {len(every)} with random weights, {min(every):.0f} to {max(every):.0f} ms, after one that warms up")
        return lines


def random_networks(cost: Plan, device: torch.device) -> tuple[Tokenizer, Transformer]:
    """Those of a plan, ready to draw. Raises ValueError for 8-bit weights where there are none (`flexvar.linear.to_int8`)."""
    with torch.device(device):
        tokenizer, transformer = Tokenizer(cost.tokenizer), Transformer(cost.transformer)
    for network in (tokenizer, transformer):
        network.to(cost.dtype).eval().requires_grad_(False)
    if cost.int8:
        to_int8(transformer)
    return tokenizer, transformer


def measure_drawing(cost: Plan, tokenizer: Tokenizer, transformer: Transformer, repeats: int = 3) -> Measured:
    """Draws with networks of the plan so many times, after once that warms up, and takes the rates of their device before and after."""
    device = transformer.device
    before = rates_for(cost, device)
    draw = partial(time_drawing, tokenizer, transformer, cost.schedule, cost.batch, guided=cost.guided)
    _, *drawn = [draw() for _ in progress(range(1 + repeats), "drawing")]
    return Measured(cost, device_name(device), before, rates_for(cost, device), tuple(drawn))


def rates_for(cost: Plan, device: torch.device) -> Rates:
    """The rates of a device, on a CPU in the sizes of what is drawn."""
    rows = cost.flops.rows_per_picture * cost.batch * cost.schedule.counts[-1]
    height, width = (side * cost.tokenizer.downsample for side in cost.schedule[-1])
    return measure_rates(device, cost.dtype, rows=rows, width=cost.transformer.width, pictures=(cost.batch, height, width))


@torch.no_grad()
def time_drawing(
    tokenizer: Tokenizer, transformer: Transformer, schedule: Schedule, batch: int, *, guided: bool = True, choose: Choose = choose
) -> Seconds:
    """Draws and decodes a batch of classes 0, 1, 2, ... by the plain loop and the released settings; gives the seconds of its parts.

    Lifting and embedding the codes count with the blocks that read them.
    """
    clock = Clock(transformer.device)

    def timed(*given: Any) -> Tensor:
        clock.mark()
        codes = choose(*given)
        clock.mark()
        return codes

    def begun(*_: Any) -> None:
        first.remove()
        clock.mark()

    first = transformer.blocks[0].register_forward_pre_hook(begun)
    every = transformer.blocks[-1].register_forward_hook(lambda *_: clock.mark())
    labels = [number % transformer.config.classes for number in range(batch)]
    guidance = Guidance() if guided else Guidance("constant", 1.0)
    clock.mark()
    try:
        *_, last = generate(
            tokenizer, transformer, labels, schedule, guidance=guidance, seeds=range(batch), draw=partial(draw_scales, choose=timed)
        )
        _ = last.images
    finally:
        first.remove()
        every.remove()
    clock.mark()
    modulation, *scales, decoder = clock.seconds()  # of each scale three: blocks, head, sampling
    return Seconds(modulation, tuple(scales[0::3]), sum(scales[1::3]), sum(scales[2::3]), decoder)


class Clock:
    """Moments in a device's work; a GPU is not waited for, but notes them itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """The moment when all that was given to the device so far is done."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True)))
        else:
            wait_for(self.device)
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each moment to the next."""
        wait_for(self.device)
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        return [before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before for before, after in pairs]


def peak_memory(device: torch.device) -> float:
    """The most GiB that there were at the same time: on CUDA of tensors, on a CPU of the whole process; NaN where no system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type != "cpu" or sys.platform == "win32":
        return math.nan
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


def medians(drawn: Sequence[Seconds]) -> Seconds:
    """Of each part."""

    def median(part: Callable[[Seconds], float]) -> float:
        return statistics.median(map(part, drawn))

    return Seconds(
        modulation=median(lambda one: one.modulation),
        scales=tuple(map(statistics.median, zip(*(one.scales for one in drawn), strict=True))),
        head=median(lambda one: one.head),
        sampling=median(lambda one: one.sampling),
        decoder=median(lambda one: one.decoder),
    )
