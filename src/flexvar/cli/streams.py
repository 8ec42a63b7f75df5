"""The standard streams, which may be closed, full, or read by nobody."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class CannotPrint(OSError):
    """stdout cannot be written. Its cause is a BrokenPipeError where nobody reads it any more."""


class _Stream:
    """A stream whose own errors cannot be taken for those of files: CannotPrint, or nothing where it is `silent`."""

    def __init__(self, stream: TextIO, silent: bool) -> None:
        self.stream, self.silent = stream, silent

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # or Python tries once more at its end
            if not self.silent:
                raise CannotPrint(error.strerror) from error


@contextmanager
def guarded_streams() -> Iterator[None]:
    """stdout raises CannotPrint where it cannot be written, and stderr nothing. What a closed one is given goes nowhere."""
    before = sys.stdout, sys.stderr
    stdout, stderr = (open(os.devnull, "w", encoding="utf-8") if stream is None else stream for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = cast(TextIO, _Stream(stdout, silent=False)), cast(TextIO, _Stream(stderr, silent=True))
    try:
        yield
    finally:
        with suppress(CannotPrint):  # of what ended before it was flushed, as --help does
            sys.stdout.flush()
        sys.stdout, sys.stderr = before
