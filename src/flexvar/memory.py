"""What fits: the free memory of a device, the largest drawing in it, and one line about it when memory runs out."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import clear_frames
from types import TracebackType

import torch
from torch import Tensor

from flexvar.accounting import plan
from flexvar.counting import encoding_memory
from flexvar.processes import kept_memory
from flexvar.schedule import Schedule, Size
from flexvar.tokenizer import TokenizerConfig
from flexvar.transformer import TransformerConfig

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory|alloc_failed|overflowed|overflow when unpacking", re.IGNORECASE)
"""How torch says, on one device or another, that it has no room for a tensor; the last two mean one that no machine could hold."""

SHARE_TO_FILL = 0.6
"""Of the free memory, where we choose the batch: others need some too, a CPU's libraries take more than is planned, and Linux kills."""

WHILE_FINISHING = 8  # times its own size: what the largest edit of a picture takes on the way to its result

MOST_CODES = 2**40  # on a side, as far as a size that fits is looked for

SHARED_POOL = (0, 0)  # of CUDA's allocator: all tensors' but those of recorded graphs

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # where Linux tells of memory


@dataclass(frozen=True)
class MemoryNeed(ContextDecorator):
    """What a batch to be drawn needs on a device. As a context or a decorator: the one line, naming what fits, when memory runs out."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    schedule: Schedule
    batch: int
    guided: bool
    dtype: torch.dtype
    device: torch.device
    int8: bool = False  # the blocks' weights
    split: bool = False  # guided one half after the other
    encoded: Size | None = None  # grid (h, w) of given pictures
    given: int | None = None  # how many of these; None: one for each that is drawn

    def fits(self, free: int) -> bool:
        """Whether so many bytes are enough, beside the weights."""
        try:
            cost = plan(
                self.transformer,
                self.tokenizer,
                self.schedule,
                batch=self.batch,
                guided=self.guided,
                split=self.split,
                dtype=self.dtype,
                int8=self.int8,
            )
            given = min(self.batch, self.given or self.batch)
            encoding = encoding_memory(self.tokenizer, self.encoded, given, self.dtype) if self.encoded else 0
        except ValueError:  # past counting
            return False
        return max(cost.memory.working, encoding) <= free

    def largest_size(self, free: int) -> Size | None:
        """The largest grid (h, w) of this shape that fits into so many bytes, its short side rounded to whole codes; None if none does.

        The batch stays, and the number of steps where the size allows it.
        """
        h, w = self.schedule[-1]
        longest = max(h, w)

        def shaped(side: int) -> Size:
            return max(1, round(h * side / longest)), max(1, round(w * side / longest))

        def too_large(side: int) -> bool:
            schedule = Schedule.for_grid(*shaped(side), len(self.schedule), self.transformer.trained_grid)
            encoded = shaped(side) if self.encoded == (h, w) else self.encoded  # given pictures that are drawn at their own size shrink too
            return not replace(self, schedule=schedule, encoded=encoded).fits(free)

        side = bisect_right(range(1, min(longest, MOST_CODES) + 1), False, key=too_large)
        return shaped(side) if side else None

    def largest_batch(self, free: int) -> int:
        """The most pictures of this size that fit into so many bytes, up to the batch itself; 0 if not even one does."""
        return bisect_right(range(1, self.batch + 1), False, key=lambda batch: not replace(self, batch=batch).fits(free))

    def at_once(self) -> int:
        """How many of the pictures to draw at the same time in the memory that is free, with room to spare; at least one is tried."""
        free = None if self.batch == 1 else free_memory(self.device)
        return self.batch if free is None else max(1, self.largest_batch(int(free * SHARE_TO_FILL)))

    def complaint(self, free: int | None) -> str:
        """One line for when memory ran out: what there is enough for in so many bytes, if that is known."""
        asked, f = self.schedule[-1], self.tokenizer.downsample
        size, batch = (asked, self.batch) if free is None else (self.largest_size(free), self.largest_batch(free))
        choices = [f"{size[0] * f} x {size[1] * f} px"] if size not in (None, asked) else []
        choices += [f"{batch} at a time"] if 0 < batch < self.batch else []
        halved = free is not None and self.guided and not self.split and not self.fits(free) and replace(self, split=True).fits(free)
        choices += ["the same with split_guidance"] if halved else []
        mend = f"{' or '.join(choices)} would fit" if choices else "free some, or take smaller pictures or a smaller batch"
        pictures, together = ("a picture", "") if self.batch == 1 else (f"{self.batch} pictures", " at a time")
        return f"not enough memory for {pictures} of {asked[0] * f} x {asked[1] * f} px{together}; {mend} (see `flexvar plan`)"

    def refuse_what_cannot_fit(self) -> None:
        """MemoryError, in one line, where a CPU has no room: Linux does not say so, it ends the process."""
        free = free_memory(self.device) if self.device.type == "cpu" else None
        if free is not None and not self.fits(free):
            raise MemoryError(self.complaint(free))

    def __enter__(self) -> MemoryNeed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and is_out_of_memory(error):
            clear_frames(trace)  # they hold the tensors of the drawing that failed
            raise MemoryError(self.complaint(free_memory(self.device))) from error


def in_parts(need: MemoryNeed, draw: Callable[[slice], Tensor], at_once: int | None = None, ready: int = 0) -> Tensor:
    """Draws a batch in parts and joins what they give.

    draw: what a part of the pictures gives. at_once: how many make a part, for which MemoryError is raised where they do not fit; None
    takes what fits into the free memory, and half of that where it turns out to be too many. ready: a number whose memory is held already
    (by a recording), and which is tried whatever is free.
    Raises MemoryError where even one does not fit.
    """
    drawn: list[Tensor] = []
    start, step = 0, max(ready, need.at_once()) if at_once is None else at_once
    while start < need.batch:
        part = slice(start, min(start + step, need.batch))
        try:
            drawn.append(draw(part))
            start = part.stop
        except MemoryError:
            if at_once is not None or part.stop - part.start == 1:
                raise
            step = (part.stop - part.start) // 2
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)  # which copies


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """As a context: MemoryError, in one line, when memory runs out on the way to what is not drawn."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"not enough memory for {what}; make it smaller, or free some") from error


def refuse_results(size: Size, pictures: int) -> None:
    """MemoryError, in one line, where so many finished pictures of `size` = (height, width) px find no room on the CPU."""
    each, free = 3 * 4 * size[0] * size[1], free_memory(torch.device("cpu"))
    if free is not None and (pictures + WHILE_FINISHING) * each > free:
        results, mend = (
            ("a result", "make it smaller") if pictures == 1 else (f"{pictures} results", "make fewer in one call or smaller ones")
        )
        raise MemoryError(f"not enough memory for {results} of {size[0]} x {size[1]} px; {mend}, or free some")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a tensor found no room, by any device's allocator, or came up while such a one was handled.

    So it is where a CUDA graph was being recorded: ending the recording fails as well.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | TypeError) and OUT_OF_MEMORY.search(str(error))):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors can take on a device: all of the machine's on a Mac's CPU; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _idle(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = [*_machine(), *_groups()] if device.type == "cpu" else []
    return min(free) + kept_memory() if free else None


def _idle(device: torch.device) -> int:
    """What CUDA's allocator holds for tensors to come; not what it holds for recorded graphs, which have pools of their own."""
    if torch.cuda.get_allocator_backend() != "native":  # it knows of no segments
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    number = torch.cuda.current_device() if device.index is None else device.index
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == number]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments if segment["segment_pool_id"] == SHARED_POOL)


def _machine() -> Iterator[int]:
    """What the machine has left."""
    meminfo = PROC / "meminfo"
    if meminfo.is_file() and (found := re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text())):
        yield 1024 * int(found[1])
    elif hasattr(os, "sysconf"):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups() -> Iterator[int]:
    """What each control group that limits this process has left: containers, services, jobs; cgroup v2 and v1."""
    own = PROC / "self" / "cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)  # no kinds: v2
        if kinds in ("", "memory"):
            root = GROUPS / kinds
            limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            inside = root / path.lstrip("/")
            for folder in (inside, *inside.parents[: len(inside.parts) - len(root.parts)]):
                yield from _left(folder / limit, folder / used, folder / "memory.stat")


def _left(limit: Path, used: Path, statistics: Path) -> Iterator[int]:
    """What a group has left, where it is limited. Of what it uses, old contents of files give way."""
    try:
        files = re.findall(r"^(?:total_)?inactive_file (\d+)", statistics.read_text(), re.MULTILINE)
        yield int(limit.read_text()) - int(used.read_text()) + max(map(int, files), default=0)
    except (OSError, ValueError):  # there is none here, or its limit is "max"
        return
