"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from flexvar.schedule import NAMED

Parser = argparse.ArgumentParser
Words = argparse.Namespace
"""What was said on the command line."""

DEVICES = "cpu, cuda, cuda:1, mps (default: the accelerator, if there is one)"


def path(text: str) -> Path:
    """What was typed as a file or folder. Raises ArgumentTypeError for an empty word, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or folder")
    return Path(text)


def add_size(command: Parser, what: str = "pixels (default: the model's)") -> None:
    command.add_argument("--height", type=int, help=what)
    command.add_argument("--width", type=int, help=what)


def add_seed(command: Parser) -> None:
    command.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on from it (default: 0)")


def add_batch(command: Parser, default: int) -> None:
    command.add_argument(
        "--batch", type=int, default=default, help=f"pictures drawn at the same time; changes speed only (default: {default})"
    )


def add_extractor(command: Parser, more: str = "") -> None:
    names = f"inception, classifier (built in, for relative numbers), a file{more} (default: inception)"
    command.add_argument("--extractor", default="inception", help=f"of features: {names}")
    command.add_argument("--weights", type=path, help="the Inception weights (default: fetched once)")


def add_drawing(command: Parser) -> None:
    add_settings(command)
    add_seed(command)
    command.add_argument("--count", type=int, default=1, help="pictures of each class (default: 1)")
    add_batch(command, 8)
    add_device(command)
    command.add_argument("--out", type=path, default=Path("out"), help="folder for the pictures (default: out)")
    add_overwrite(command)


def add_settings(command: Parser) -> None:
    add_schedule(command)
    command.add_argument(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="how strongly the class is followed: 2.5, say; 1 switches guidance off, for official-ramp 0 does (default: the model's)",
    )
    kinds = ["ramp", "constant", "official-ramp"]
    command.add_argument("--guidance", choices=kinds, help="how it grows over the scales (default: the model's)")
    command.add_argument("--split-guidance", action="store_true", help="draw with and without the class in turn: less memory")
    command.add_argument("--guidance-stop", type=int, metavar="N", help="guide the first N scales only: the others cost half")
    command.add_argument("--top-k", type=int, help="candidates kept, 0 for all")
    command.add_argument("--top-p", type=float, help="probability that the candidates reach, 0 or 1 for no limit")
    command.add_argument("--temperature", type=float, help="logits are divided by it")
    command.add_argument("--greedy", help="none, official, or the scales that take the likeliest code: 7,9 or 4x6")


def add_schedule(command: Parser) -> None:
    command.add_argument("--steps", type=int, help="scales, at least 2 (default: the model's)")
    help = f"instead of size and steps, the scales themselves, 1,2,4,6 or 1x1,2x3,4x6 in codes, or one of {', '.join(NAMED)}"
    command.add_argument("--schedule", metavar="SCALES", help=help)


def add_device(command: Parser) -> None:
    command.add_argument("--device", help=DEVICES)
    add_dtype(command)
    command.add_argument(
        "--compile",
        action="store_true",
        help="prepare the model for speed first (CUDA, or float32 or bfloat16 on a CPU): pays for many pictures",
    )


def add_dtype(command: Parser) -> None:
    choices = ["float32", "bfloat16", "float16", "int8"]
    command.add_argument(
        "--dtype",
        choices=choices,
        help="int8: a quarter of the memory, on most CPUs faster, at a price (default: bfloat16 on CUDA, else float32)",
    )


def add_model(command: Parser) -> None:
    command.add_argument("--model", default="emoji", help="a bundled or released name, a folder or a Hub id (default: emoji)")


def add_overwrite(command: Parser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
