"""How far long work is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Gives the items one by one and says on stderr how many are done."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what)
        return
    latest = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - latest >= SECONDS_BETWEEN_LINES or (done == len(items) and done > 1):
            latest = time.monotonic()
            print(f"{what}: {done} of {len(items)}", file=sys.stderr, flush=True)


def within(parts: Iterable[T], count: int, what: str) -> Iterator[T]:
    """Gives the parts of one of those items: on a terminal with a second bar, which goes when they are done."""
    yield from tqdm(parts, desc=what, total=count, leave=False, disable=not sys.stderr.isatty())
