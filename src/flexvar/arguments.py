"""What callers hand over: integers, seeds, one value or several, of Python, NumPy or torch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed a picture: an integer s means s, s + 1, ... by position; None draws them. ValueError for another number or no integers."""
    if seed is None:
        return [int(number) for number in torch.randint(2**31, (count,))]
    if is_single(seed):
        first = whole_number(seed, "a seed")
        seeds = [first + i for i in range(count)]
    else:
        seeds = [whole_number(number, "a seed") for number in items(seed)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds were given for {count} pictures; give one a picture, or a single integer")
    if not all(-(2**63) <= number < 2**63 for number in seeds):
        raise ValueError("a seed is too large; give integers of at most 63 bits")
    return seeds


def is_single(value: Any) -> bool:
    """Whether this is one value, and no list, array or tensor of them."""
    return isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0


def items(values: Any) -> Any:
    """The items of a list, an array or a tensor, as Python's own numbers."""
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


def whole_number(value: Any, what: str) -> int:
    """An integer of any kind as Python's own; ValueError naming it for anything else."""
    try:
        return index(value)
    except TypeError as error:
        raise ValueError(f"{what} is {value!r}; give an integer") from error
