"""What is said, in one line, where something is not as it must be or may surprise."""

from __future__ import annotations

import sys
import warnings


def check_whole_numbers(config: object, whose: str, least: int, *names: str) -> None:
    """ValueError, naming the first of these attributes of a config that is no integer of at least `least`; `whose`: "the tokenizer"."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} of {whose} is {value!r}; it must be a whole number of at least {least}")


def warn(message: str) -> None:
    """A warning that points at the line outside of this package that led to it."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "flexvar":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
