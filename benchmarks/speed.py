"""How near one picture's drawing comes to the least time that this machine's own rates allow.

`python -m benchmarks.speed [--depth 16 --height 256 --width 256 --steps 10 --batch 1 --repeats 3 --threads 2]`

The floor is the sum over the parts of FLOPs / rate, with the rates of large fp32 products and of 3x3 convolutions measured in the same
run, before and after, the better of the two taken. A second one adds what no kernel can avoid: every scale reads all weights of the
blocks from memory, which takes longer than the products of few tokens. Weights are random, guidance is on, settings are the released
ones, the last scale is decoded. Exit status 1 where the share of the first floor is below the target (0.70 by default). Other work on the
machine spoils the figure; where the rates before and after are more than 10 % apart, a line says so. Figures taken so far: RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, on Linux; torch reads it when it first allocates

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar import Schedule, Tokenizer, TokenizerConfig, Transformer, TransformerConfig, generate
from flexvar.accounting import Flops, plan
from flexvar.compiled import compiled
from flexvar.generation import draw_scales
from flexvar.linear import to_int8
from flexvar.processes import keep_memory
from flexvar.sampling import choose

TARGET = 0.70
SECONDS_A_RATE = 0.5
"""How long each shape is measured."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of this machine, float32."""

    products: float
    convolutions: float
    format: str  # the faster one: "NCHW" or "channels last"
    bandwidth: float  # bytes/s, read from memory

    def reading(self, flops: Flops, weights: int) -> float:
        """The least seconds of the transformer's scales where each reads so many bytes of weights, which few tokens do not hide."""
        return sum(max(scale.total / self.products, weights / self.bandwidth) for scale in flops.scales)

    def floor(self, flops: Flops) -> tuple[float, float]:
        """The least seconds of the transformer and of the decoder."""
        return (
            flops.transformer / self.products,
            flops.decoder_convolutions / self.convolutions + flops.decoder_attention / self.products,
        )


@dataclass(frozen=True)
class Seconds:
    """One batch, from labels to pictures."""

    transformer: float
    sampling: float
    decoder: float

    @property
    def all(self) -> float:
        """The parts together."""
        return self.transformer + self.sampling + self.decoder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--height", type=int, default=256, help="pixels")
    parser.add_argument("--width", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--int8", action="store_true", help="with 8-bit weights; the floor stays that of float32")
    parser.add_argument("--compile", action="store_true", help="by the faster way of `pipe.compile()`")
    parser.add_argument("--target", type=float, default=TARGET, help="share of the floor (default: %(default)s)")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    torch.manual_seed(0)
    keep_memory()  # as the command `flexvar` does

    transformer_config, tokenizer_config = TransformerConfig(depth=words.depth), TokenizerConfig()
    schedule = Schedule.for_size(words.height, words.width, words.steps, tokenizer_config.downsample)
    flops = plan(transformer_config, tokenizer_config, schedule, batch=words.batch).flops
    transformer = Transformer(transformer_config).eval().requires_grad_(False)
    tokenizer = Tokenizer(tokenizer_config).eval().requires_grad_(False)
    parts = [part for block in transformer.layers for part in (block.attention, block.mlp)]
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    if words.int8:
        to_int8(transformer)
    if words.compile:
        compiled(tokenizer, transformer)

    def measure_rates() -> Rates:
        rows = 2 * words.batch * schedule.counts[-1]
        products = product_rate(rows, transformer_config.width)
        return Rates(products, *convolution_rate(words.batch, words.height, words.width), bandwidth())

    before = measure_rates()
    drawn = [draw(tokenizer, transformer, schedule, words.batch) for _ in range(words.repeats + 1)][1:]  # the first one warms up
    after = measure_rates()

    fastest = max(before, after, key=lambda rates: rates.convolutions)
    best = Rates(max(before.products, after.products), fastest.convolutions, fastest.format, max(before.bandwidth, after.bandwidth))
    floors, reading = best.floor(flops), best.reading(flops, weights)
    every = [seconds.all for seconds in drawn]
    share = sum(floors) / statistics.median(every)
    print(f"torch {torch.__version__}, {words.threads} threads, THP_MEM_ALLOC_ENABLE={os.environ['THP_MEM_ALLOC_ENABLE']}")
    print(f"depth {words.depth}, {words.batch} x {words.height} x {words.width} px, guided: {schedule}")
    for name, rates in (("before", before), ("after", after)):
        products, convolutions, read = rates.products / 1e9, rates.convolutions / 1e9, rates.bandwidth / 1e9
        line = f"products {products:.1f} GFLOP/s, 3x3 convolutions {convolutions:.1f} ({rates.format}), memory {read:.1f} GB/s"
        print(f"rates {name:<7} {line}")
    if disturbed(before.products, after.products) or disturbed(before.convolutions, after.convolutions):
        print("rates differ by more than 10 %: the machine was busy, measure again")
    print(f"{'':<12}{'TFLOP':>9}{'floor s':>9}{'seconds':>9}{'share':>8}")
    for name, count, floor in (("transformer", flops.transformer, floors[0]), ("sampling", 0, 0.0), ("decoder", flops.decoder, floors[1])):
        seconds = statistics.median(getattr(one, name) for one in drawn)
        print(f"{name:<12}{count / 1e12:>9.3f}{floor:>9.2f}{seconds:>9.2f}{floor / seconds:>8.2f}")
    print(f"{'all':<12}{flops.total / 1e12:>9.3f}{sum(floors):>9.2f}{statistics.median(every):>9.2f}{share:>8.2f}")
    both = reading + floors[1]
    print(f"with the weights of the blocks read once a scale the floor is {both:.2f} s, the share {both / statistics.median(every):.2f}")
    print(f"median of {words.repeats}, {min(every):.2f} to {max(every):.2f} s; target {words.target:.2f}", end=" ")
    print("reached" if share >= words.target else "missed")
    return 0 if share >= words.target else 1


def disturbed(before: float, after: float) -> bool:
    """Whether two rates are more than 10 % apart."""
    return abs(before - after) > 0.1 * max(before, after)


def draw(tokenizer: Tokenizer, transformer: Transformer, schedule: Schedule, batch: int) -> Seconds:
    """Draws and decodes one batch of classes 0, 1, 2, ... under guidance."""
    sampling = 0.0

    def timed_choose(*arguments: Any) -> Tensor:
        nonlocal sampling
        began = time.perf_counter()
        codes = choose(*arguments)
        sampling += time.perf_counter() - began
        return codes

    began = time.perf_counter()
    way = partial(draw_scales, choose=timed_choose)
    *_, last = generate(tokenizer, transformer, list(range(batch)), schedule, seeds=range(batch), draw=way)
    drawn = time.perf_counter()
    assert last.images.isfinite().all()
    return Seconds(drawn - began - sampling, sampling, time.perf_counter() - drawn)


def rate(work: Callable[[], Tensor], flops: int) -> float:
    """FLOP/s of a piece of work: the median over runs that fill half a second."""
    work()
    seconds: list[float] = []
    while sum(seconds) < SECONDS_A_RATE or len(seconds) < 3:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return flops / statistics.median(seconds)


def bandwidth() -> float:
    """Bytes/s of reading a piece of memory that no cache holds."""
    memory = torch.ones(2**26)
    return rate(memory.sum, memory.nbytes)


def product_rate(rows: int, width: int) -> float:
    """FLOP/s of the model's largest products, those of its MLP at the last scale."""
    rates = []
    for wide, narrow in ((4 * width, width), (width, 4 * width)):
        x, weight, bias = torch.randn(rows, narrow), torch.randn(wide, narrow), torch.randn(wide)
        rates.append(rate(lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias), 2 * rows * narrow * wide))  # type: ignore[misc]
    return statistics.harmonic_mean(rates)


def convolution_rate(batch: int, height: int, width: int) -> tuple[float, str]:
    """FLOP/s of the decoder's largest 3x3 convolutions in the faster memory format, and its name."""
    best = (0.0, "")
    for memory_format, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels last")):
        seconds, count = 0.0, 0
        for channels, shrink in ((128, 1), (256, 2), (256, 4)):
            x = torch.randn(batch, channels, height // shrink, width // shrink).to(memory_format=memory_format)
            weight = torch.randn(channels, channels, 3, 3).to(memory_format=memory_format)
            flops = 2 * x.numel() * channels * 9
            seconds += flops / rate(lambda x=x, weight=weight: F.conv2d(x, weight, padding=1), flops)  # type: ignore[misc]
            count += flops
        best = max(best, (count / seconds, name))
    return best


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
