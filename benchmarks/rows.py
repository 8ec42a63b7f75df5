"""A report that grows row by row: measurements on one device, each printed as soon as it is known; one that fails is a row that says so."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from traceback import clear_frames
from typing import TypeAlias

import torch

from flexvar.memory import is_out_of_memory
from flexvar.rates import Rates, measure_rates, wait_for

Rows: TypeAlias = list[tuple[str, ...]]
Table: TypeAlias = tuple[str, ...]
"""Title and columns; the first column names the measurement."""

CEILINGS: Table = ("Ceilings", "when", "TFLOP/s of products", "TFLOP/s of 3x3 convolutions", "TB/s of memory")


class Bench:
    """A device, what it can do at most, and the report of what was measured on it."""

    def __init__(self, device: torch.device, out: Path | None, limit: float, side: int) -> None:
        """limit: seconds after which no measurement begins. side: of the pictures in px, in whose size a CPU's ceilings are taken."""
        self.device, self.on_gpu, self.out, self.side = device, device.type == "cuda", out, side
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.rates = Rates(math.nan, math.nan, math.nan)
        self.waiting: list[tuple[Table, str, Callable[[], Rows]]] = []
        self.end = time.perf_counter() + limit
        self.table: Table = ()

    def say(self, line: str) -> None:
        """Prints a line, and appends it to the file."""
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def rows(self, table: Table, name: str, work: Callable[[], Rows]) -> None:
        """Does one measurement. One that fails, or that would begin too late, is a row that says so."""
        title, *columns = table
        if table != self.table:
            self.table = table
            self.say(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in [("not begun, the time was up",)] if time.perf_counter() > self.end else self._attempted(work):
            cells = [name, *row, *["-"] * (len(columns) - 1 - len(row))]
            self.say(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")

    def later(self, table: Table, name: str, work: Callable[[], Rows]) -> None:
        """What `finish` is to say when the last ceilings are known."""
        self.waiting.append((table, name, work))

    def finish(self) -> None:
        """Takes the ceilings once more, and says what waited for them, whatever time it is."""
        self.ceilings("after")
        self.end = math.inf
        for row in self.waiting:
            self.rows(*row)

    def _attempted(self, work: Callable[[], Rows]) -> Rows:
        try:
            self.tidy()  # which fails too where an earlier failure has left the device unusable
            return work()
        except Exception as error:  # whatever it is, the other measurements are still worth their time
            clear_frames(error.__traceback__)  # they hold the tensors of what failed
            errors: list[BaseException] = [error]
            while (before := errors[-1].__context__) is not None:  # what ends a recording raises one of its own on top
                errors.append(before)
            said = " after ".join(f"{type(one).__name__}: {next(iter(str(one).splitlines()), '')}"[:200] for one in errors)
            return [("out of memory" if is_out_of_memory(error) else f"failed: {said}",)]

    def halved(self, work: Callable[[int], Rows], batch: int) -> Rows:
        """What a measurement gives at the largest batch that fits: this one, its half, and so on."""
        while True:
            try:
                return work(batch)
            except Exception as error:
                if batch == 1 or not is_out_of_memory(error):
                    raise
                clear_frames(error.__traceback__)
            batch //= 2
            self.tidy()

    def tidy(self) -> None:
        """Gives back the memory that nothing holds; the peak is of what comes from here on."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def gibibytes(self, count: int | None = None) -> str:
        """So many bytes, or the most that tensors took at the same time; of GPUs only."""
        return figure((torch.cuda.max_memory_allocated(self.device) if count is None else count) / 2**30) if self.on_gpu else "-"

    def timed(self, work: Callable[[], object], times: int = 1) -> list[float]:
        """Seconds of each run."""
        seconds = []
        for _ in range(times):
            wait_for(self.device)
            began = time.perf_counter()
            work()
            wait_for(self.device)
            seconds.append(time.perf_counter() - began)
        return seconds

    def ceilings(self, when: str) -> None:
        """Takes the rates of the device; of those taken so far, the better ones are kept."""
        self.rows(CEILINGS, when, self._ceilings)

    def _ceilings(self) -> Rows:
        rates = measure_rates(self.device, self.dtype, pictures=(1, self.side, self.side))
        self.rates = rates if math.isnan(self.rates.products) else self.rates.better(rates)
        return [tuple(figure(rate / 1e12) for rate in (rates.products, rates.convolutions, rates.memory))]


def figure(value: float) -> str:
    """Three digits at least."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed(batch: int, each: float, seconds: list[float]) -> tuple[str, ...]:
    """The batch, how many of what a run does each pass in a second, and milliseconds; the first run warms up and stands apart."""
    first, *others = seconds
    spread = f"{figure(1e3 * min(others))} to {figure(1e3 * max(others))}"
    return str(batch), figure(each * len(others) / sum(others)), figure(1e3 * statistics.median(others)), spread, figure(first)
