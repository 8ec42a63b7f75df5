"""What a config read from a file must hold, or one line that says what it does not."""

from __future__ import annotations


def check_whole_numbers(config: object, whose: str, least: int, *names: str) -> None:
    """ValueError, naming the first of these attributes of a config that is no integer of at least `least`; `whose`: "the tokenizer"."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} of {whose} is {value!r}; it must be a whole number of at least {least}")
