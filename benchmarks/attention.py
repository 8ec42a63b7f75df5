"""Which way to attend is the fastest in training, where every step has another length.

`python -m benchmarks.attention [--depth 16 --batch 4 --device cpu --dtype float32 --schedule 10 --random 4 --blocks 2 --steps 3]`

Forward and backward, of attention alone and of a few whole blocks (the embedding and a small head with them), on the schedule named and
on random ones of the paper's policy with the same last grid. The ways take turns. Seconds are of one pass over all these schedules: the
first pass, which meets each length for the first time (on GPUs: compiling, choosing kernels), then median and spread of the others.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import get_args

import torch

from flexvar import Schedule, Transformer, TransformerConfig
from flexvar.attention import AttentionName, attention_named
from flexvar.rates import device_name, wait_for

NAMES: tuple[AttentionName, ...] = get_args(AttentionName)
Run = Callable[[AttentionName], None]
"""Forward and backward on one schedule, in the way named."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=16, help="of the model whose width and heads are taken")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--schedule", default="10", help="a published name or sides as 1,2,4")
    parser.add_argument("--random", type=int, default=4, help="how many random schedules")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="passes after the first")
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    device, dtype = torch.device(words.device), getattr(torch, words.dtype)

    schedule = Schedule.of(words.schedule)
    schedules = [schedule, *(Schedule.random("paper", random.Random(seed), *schedule[-1]) for seed in range(words.random))]
    config = TransformerConfig(depth=words.blocks, width=64 * words.depth, heads=words.depth, classes=1, codebook_size=64)
    transformer = Transformer(config).to(device)
    print(f"torch {torch.__version__}, {device_name(device)}, {words.dtype}, {words.threads} threads")
    print(f"width {config.width}, {config.heads} heads, batch {words.batch}; L {', '.join(str(s.tokens) for s in schedules)}")
    works: dict[str, Callable[[Schedule], Run]] = {
        "attention alone": lambda schedule: attention_alone(words.batch, config, schedule, device, dtype),
        f"{words.blocks} blocks": lambda schedule: blocks(transformer, words.batch, schedule, dtype),
    }
    for title, prepare in works.items():
        print(f"{title:<20}{'first s':>10}{'median s':>10}   spread")
        prepare(Schedule.square([1, 2]))("mask")  # what a process does once
        for name, seconds in measure([prepare(schedule) for schedule in schedules], words.steps, device).items():
            first, *others = seconds
            print(f"  {name:<18}{first:>10.3f}{statistics.median(others):>10.3f}   {min(others):.3f} to {max(others):.3f}")


def measure(runs: Sequence[Run], steps: int, device: torch.device) -> dict[AttentionName, list[float]]:
    """Seconds of 1 + `steps` passes over all runs in each of the ways; one that cannot run is left out, and the reason printed."""
    seconds: dict[AttentionName, list[float]] = {name: [] for name in NAMES}
    for _ in range(1 + steps):
        for name in list(seconds):
            wait_for(device)
            began = time.perf_counter()
            try:
                for run in runs:
                    run(name)
            except ValueError as error:
                print(f"  {name} left out: {error}")
                del seconds[name]
                continue
            wait_for(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def attention_alone(batch: int, config: TransformerConfig, schedule: Schedule, device: torch.device, dtype: torch.dtype) -> Run:
    """The attention of one block, on queries, keys and values that lie in memory as the network makes them."""
    given = [torch.randn(batch, schedule.tokens, config.heads, 64, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    given = [x.requires_grad_() for x in given]  # (B, H, L, D/H) each
    gradient = torch.ones_like(given[0])

    def run(name: AttentionName) -> None:
        attended = attention_named(name, schedule.counts, device)(*given)
        torch.autograd.grad(attended, given, gradient)

    return run


def blocks(transformer: Transformer, batch: int, schedule: Schedule, dtype: torch.dtype) -> Run:
    """A step of the whole network, without optimiser."""
    device, config = transformer.device, transformer.config
    inputs = torch.randn(batch, schedule.tokens - schedule.first, config.code_width, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    def run(name: AttentionName) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = transformer(labels, inputs, schedule, attention=name)
        transformer.zero_grad(set_to_none=True)
        logits.sum().backward()

    return run


if __name__ == "__main__":
    main()
