"""What is said, in one line, where something is not as it must be or may surprise."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from operator import index
from typing import Any

LONGEST = 60  # letters of a value that an error repeats


def whole_number(value: Any, what: str, mend: str = "give an integer", *, least: int | None = None) -> int:
    """An integer of any kind, Python's, NumPy's or torch's, as Python's own.

    ValueError, which names it `what` and ends with `mend`, for anything else, True and False too, and for one below `least`.
    """
    try:
        if _is_truth(value):
            raise TypeError
        found = index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is {shown(value)}; {mend}") from error
    if least is not None and found < least:
        raise ValueError(f"{what} is {shown(value)}; {mend}")
    return found


def finite_number(value: Any, what: str, mend: str = "give a number", *, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number of any kind as a float.

    ValueError, which names it `what` and ends with `mend`, for texts, truth values, infinities, numbers too large for a float, and those
    outside the limits.
    """
    try:
        if isinstance(value, str) or _is_truth(value):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{what} is {shown(value)}; {mend}") from error
    if not math.isfinite(found) or not least <= found <= most:
        raise ValueError(f"{what} is {shown(value)}; {mend}")
    return found


def sizes_of(scales: Any) -> tuple[tuple[int, int], ...]:
    """Grids (h, w) from a list whose integers are square scales and whose pairs are (h, w), or an array of pairs.

    ValueError for anything else.
    """
    try:
        return tuple(_size(scale) for scale in (scales.tolist() if hasattr(scales, "tolist") else scales))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown(scales)} is not a list of scales; each is an integer or a pair (h, w)") from error


def _size(scale: Any) -> tuple[int, int]:
    if isinstance(scale, Iterable) and getattr(scale, "ndim", 1) > 0:  # of no axis: an array's own way to hold a number
        h, w = scale
        return whole_number(h, "a side"), whole_number(w, "a side")
    side = whole_number(scale, "a side")
    return side, side


def check_truth(value: Any, what: str) -> None:
    """ValueError for anything but True and False: a text such as "no" would count as true."""
    if not _is_truth(value):
        raise ValueError(f"{what} is {shown(value)}; give True or False")


def _is_truth(value: Any) -> bool:
    """Whether a value is True or False of any kind."""
    return isinstance(value, bool) or (str(getattr(value, "dtype", "")).endswith("bool") and getattr(value, "ndim", 1) == 0)


def shown(value: Any) -> str:
    """A value as an error repeats it: in one line, and not the whole of a long one."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


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
