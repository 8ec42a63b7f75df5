"""What callers hand over: seeds, sides, keywords; one value or several, of Python, NumPy or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from flexvar.checks import whole_number

F = TypeVar("F", bound=Callable[..., Any])

SEEDS = 2**32
"""How many there are: torch's generator reads 32 bits of a seed, so that every other one would draw the same as one of these."""

ELSEWHERE = {"generator": "seed", "prompt": "class_labels", "cfg": "guidance_scale"}
"""What users of other libraries may write, and our keyword for it."""


def seeds_of(seed: int | Sequence[int] | Tensor | None, count: int) -> list[int]:
    """One seed a picture: an integer s means s, s + 1, ... by position; None draws s.

    ValueError for another number of them, and for anything but integers from 0 to 2**32 - 1.
    """
    if seed is None:
        seed = int(torch.randint(SEEDS - count + 1, ()))
    if is_single(seed):
        first = whole_number(seed, "a seed")
        if 0 <= first < SEEDS < first + count:
            raise ValueError(f"{count} pictures from seed {first} on count up past {SEEDS - 1}; give at most {SEEDS - count}")
        seeds = [first + i for i in range(count)]
    else:
        seeds = [whole_number(number, "a seed") for number in items(seed)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds were given for {count} pictures; give one a picture, or a single integer")
    for number in seeds:
        if not 0 <= number < SEEDS:
            raise ValueError(f"a seed is {number}; give integers from 0 to {SEEDS - 1}")
    return seeds


def both_sides(height: int | None, width: int | None, own: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """Height and width in pixels. One that is left out follows the proportions of `own`, to the nearest multiple; without either, `own`."""
    if height is None and width is None:
        return own
    height, width = (None if side is None else whole_number(side, "a side") for side in (height, width))

    def following(side: int | None, along: int, across: int) -> int:
        return max(multiple, round((side or 0) * across / along / multiple) * multiple)

    return (
        following(width, own[1], own[0]) if height is None else height,
        following(height, own[0], own[1]) if width is None else width,
    )


def is_single(value: Any) -> bool:
    """Whether this is one value, and no list, array or tensor of them."""
    return isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0


def items(values: Any) -> Any:
    """The items of a list, an array or a tensor, as Python's own numbers."""
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


def takes(settings: type) -> Callable[[F], F]:
    """For a method with `**settings: Unpack[...]` of this TypedDict: `help` shows its keywords one by one, and others are refused."""

    def decorated(method: F) -> F:
        own = signature(method)
        named = [parameter for parameter in own.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        more = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=getattr(kind, "__forward_arg__", kind))
            for name, kind in settings.__annotations__.items()
        ]
        taken = [parameter.name for parameter in (*named[1:], *more)]
        called = "pipe" if method.__name__ == "__call__" else method.__name__

        @wraps(method)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            refuse_unknown(called, keywords, taken)
            return method(*arguments, **keywords)

        checked.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return cast(F, checked)

    return decorated


def refuse_unknown(called: str, keywords: Iterable[str], taken: Sequence[str]) -> None:
    """TypeError, in one line with the closest name, for a keyword that is not taken."""
    for name in keywords:
        if name not in taken:
            close = [ELSEWHERE[name]] if ELSEWHERE.get(name) in taken else get_close_matches(name, taken, 1)
            mend = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(taken)}"
            raise TypeError(f"{called}() takes no keyword {name!r}; {mend}")
