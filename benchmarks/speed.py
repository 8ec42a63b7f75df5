"""How near a drawing comes to the least time that this machine's own rates allow.

`python -m benchmarks.speed [--depth 16 --height 256 --width 256 --steps 10 --batch 1 --dtype float32 --repeats 3 --threads 2]`

The account is that of `flexvar plan --measure` (`flexvar.accounting.floor`): of each part, at each scale, FLOPs or bytes over the rates
of this machine, measured in the same run, before and after, the better of the two taken. The target is held against the FLOPs alone, at
the rate of torch's own layers; what packed layers would allow, where they are faster, stands in the account. Weights are random, guidance
is on, settings are the released ones, the last scale is decoded. Exit status 1 where the share of that floor is below the target. Other
work on the machine spoils the figure; where the rates before and after are more than 10 % apart, a line says so.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, on Linux; torch reads it when it first allocates

import torch

from flexvar import Schedule, TokenizerConfig, TransformerConfig
from flexvar.accounting import plan
from flexvar.compiled import compiled
from flexvar.measuring import measure_drawing, random_networks
from flexvar.processes import keep_memory

TARGET, COMPILED_TARGET, BATCH_TARGET = 0.70, 0.80, 0.85


def main() -> int:
    """Prints the account; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--height", type=int, default=256, help="pixels")
    parser.add_argument("--width", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--int8", action="store_true", help="with 8-bit weights; the floor keeps the rate of unrounded products")
    parser.add_argument("--compile", action="store_true", help="by the faster way of `pipe.compile()`")
    by_default = f"{TARGET}, with --compile {COMPILED_TARGET}, and of 4 pictures or more {BATCH_TARGET}"
    parser.add_argument("--target", type=float, help=f"share of the floor (default: {by_default})")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    torch.manual_seed(0)
    keep_memory()  # as the command `flexvar` does

    tokenizer_config = TokenizerConfig()
    schedule = Schedule.for_size(words.height, words.width, words.steps, tokenizer_config.downsample)
    shape, dtype = TransformerConfig(depth=words.depth), getattr(torch, words.dtype)
    cost = plan(shape, tokenizer_config, schedule, batch=words.batch, dtype=dtype, int8=words.int8)
    networks = random_networks(cost, torch.device("cpu"))
    if words.compile:
        compiled(*networks)
    measured = measure_drawing(cost, *networks, words.repeats)

    share = measured.share(measured.rates.unhindered.unpacked)
    by_way = TARGET if not words.compile else COMPILED_TARGET if words.batch < 4 else BATCH_TARGET
    target = by_way if words.target is None else words.target
    print(f"torch {torch.__version__}, {words.threads} threads, THP_MEM_ALLOC_ENABLE={os.environ['THP_MEM_ALLOC_ENABLE']}")
    how = f"{words.dtype}{' with 8-bit weights' * words.int8}{', compiled' * words.compile}"
    print(f"depth {words.depth}, {words.batch} x {words.height} x {words.width} px, guided, {how}: {schedule}")
    print(*measured.lines(), sep="\n")
    print(f"target {target:.2f} by FLOP alone {'reached' if share >= target else 'missed'}: {share:.2f}")
    return 0 if share >= target else 1


if __name__ == "__main__":
    sys.exit(main())
