"""How far long work is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def progress(items: Sequence[T], what: str, count: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """Gives the items one by one and says on stderr how many are done; `count`: as how many an item counts."""
    total, done, latest = sum(map(count, items)), 0, time.monotonic()
    with tqdm(total=total, desc=what, disable=not sys.stderr.isatty()) as bar:
        for item in items:
            yield item
            done += count(item)
            bar.update(count(item))
            if bar.disable and (time.monotonic() - latest >= SECONDS_BETWEEN_LINES or (done == total and len(items) > 1)):
                latest = time.monotonic()
                print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def within(parts: Iterable[T], count: int, what: str) -> Iterator[T]:
    """Gives the parts of one of those items: on a terminal with a second bar, which goes when they are done."""
    yield from tqdm(parts, desc=what, total=count, leave=False, disable=not sys.stderr.isatty())
