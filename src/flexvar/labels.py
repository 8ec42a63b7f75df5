"""What people call classes: names or indices, or nothing for no class."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any, TypeAlias

from flexvar.arguments import is_single, items
from flexvar.checks import warn, whole_number

Label: TypeAlias = int | str | None

UNCONDITIONAL = "unconditional"
NO_ALIASES: Mapping[str, str] = MappingProxyType({})


def listed(class_labels: Label | Sequence[Label], pictures: Sized | None = None) -> list[Any]:
    """One label or several as a list; where pictures are edited, one label for all of them, or one each, or several for a single one.

    ValueError when there is none, for another number of them, and for bytes and tables, whose items are no labels.
    """
    if isinstance(class_labels, bytes | bytearray | Mapping):
        raise ValueError(f"the class labels are given as {type(class_labels).__name__}; give a name, an index or None, or a list of these")
    labels = [class_labels] if is_single(class_labels) else list(items(class_labels))
    if not labels:
        raise ValueError("there are no class labels; give one or more, or None for pictures without a class")
    if pictures is not None and len(labels) == 1:
        return labels * len(pictures)
    if pictures is not None and len(pictures) not in (1, len(labels)):
        raise ValueError(f"{len(labels)} class labels were given for {len(pictures)} pictures; give one, or one a picture")
    return labels


def index_of(label: Label, names: Sequence[str], null_class: int, aliases: Mapping[str, str] = NO_ALIASES) -> int:
    """The index of a class: by its name or another name for it (`aliases`), in any case, as a number or its digits; the null class for
    None and "unconditional".

    Raises ValueError with the closest names.
    """
    if label is None or (isinstance(label, str) and label.casefold() == UNCONDITIONAL):
        return null_class
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        by_name = {name.casefold(): index for index, name in reversed(list(enumerate(names)))}
        by_name = {alias.casefold(): by_name[name.casefold()] for alias, name in aliases.items()} | by_name
        if label.casefold() in by_name:
            return by_name[label.casefold()]
        if not names and (given := re.fullmatch(r"class (\d+)", label.casefold())):  # as `name_of` calls it
            label = given[1]
        if not label.isdecimal():
            asked = label.casefold()
            inside = [name for name in by_name if asked and (asked in name or f" {name} " in f" {asked} ")]
            close = difflib.get_close_matches(asked, by_name, 3, 0.6) or inside[:3]
            nearest = dict.fromkeys(names[by_name[name]] for name in close)
            hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else "`flexvar info MODEL` lists the classes"
            raise ValueError(f"there is no class {label!r}; {hint}")
    number = int(label) if isinstance(label, str) else whole_number(label, "a class label", "give a name, an index or None")
    if (digits := str(number)) in names and names.index(digits) != number:  # folders 0, 1, 10, 2, ... in the order of their names
        warn(f"the index {number} is the class {name_of(number, names, null_class)!r}; the class named {digits!r} is given as a text")
    if not 0 <= number < null_class:
        raise ValueError(f"there is no class {label}; indices go from 0 to {null_class - 1}, and 'unconditional' means no class")
    return number


def name_of(index: int, names: Sequence[str], null_class: int) -> str:
    """The name of a class, or "unconditional"; "class 3" where classes have no names."""
    if index == null_class:
        return UNCONDITIONAL
    return names[index] if names else f"class {index}"
