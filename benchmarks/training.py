"""What a step of training the transformer costs, and what it spends its time on.

`python -m benchmarks.training [--depth 16 --batch 4 --steps 3 --device cpu --dtype float32 --attention by-scale --recompute --profile]`

The whole step from cached features: the trainer's own loss with its figures by scale, dropped labels and paths, backward, clipping, AdamW,
averaged weights; first on the schedule named, then on random ones of the paper's policy. Features and weights are random. FLOPs are by
`flexvar.accounting.training_flops`; the share is theirs of the device's matrix rate, the better of before and after. `--profile` tells
how much of one step's time goes into products of matrices, convolutions and attention (CPU time on a CPU, kernel time on a GPU).
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.attention import NAMES
from flexvar import Schedule, Tokenizer, TokenizerConfig
from flexvar.accounting import training_flops
from flexvar.attention import AttentionName
from flexvar.measuring import peak_memory
from flexvar.processes import forbid_cudnn_attention, forbid_tf32, keep_memory
from flexvar.rates import device_name, matrix_rate, wait_for
from flexvar.schedule import RandomPolicy

PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|.*convolution.*|.*(flash|efficient|dot_product).*attention.*)|flex_attention.*")
"""Operations that multiply matrices."""


class Training:
    """All that a run holds while it trains."""

    def __init__(
        self, depth: int, batch: int, device: torch.device, dtype: torch.dtype,
        attention: AttentionName = "by-scale", recompute: bool = False, compile: str = "",
    ) -> None:  # fmt: skip
        from flexvar.checkpoint import Model  # here, since these need Pillow and safetensors
        from flexvar.training.optimiser import parameter_groups
        from flexvar.training.settings import TransformerRun, TransformerShape
        from flexvar.training.transformer import TransformerWorkshop

        self.batch, self.device, self.dtype = batch, device, dtype
        shape = TransformerShape(depth=depth, positions="area", trained_grid=16)
        drop_path = 0.1 * depth / 24
        run = TransformerRun(model=shape, attention=attention, recompute=recompute, compile=compile, drop_path=drop_path)
        tokenizer = Tokenizer(TokenizerConfig(channels=8)).requires_grad_(False)  # of which only the codebook is used
        self.workshop = TransformerWorkshop(run, Model(tokenizer), tuple(map(str, range(1000)))).to(device).train()
        self.config = self.workshop.transformer.config
        self.average = copy.deepcopy(self.workshop.network).requires_grad_(False)
        self.workshop.speed_up()
        self.optimiser = torch.optim.AdamW(parameter_groups(self.workshop, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.steps = 0

    def step(self, schedule: Schedule) -> None:
        """One step on a batch of random feature maps, on this schedule."""
        from flexvar.training.order import Batch

        features = torch.randn(self.batch, self.config.code_width, *schedule[-1], device=self.device).half()
        labels = torch.randint(self.config.classes, (self.batch,), device=self.device)
        positions = range(self.steps * self.batch, (self.steps + 1) * self.batch)
        self.optimiser.zero_grad(set_to_none=True)
        with (
            patch.object(self.workshop, "_schedule", lambda *_: schedule),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            loss, figures = self.workshop(Batch(self.steps, features, labels, tuple(positions)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.workshop.parameters(), 2.0)
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.workshop.network.parameters()), 1e-3)
        figures["loss"].item()  # waits for the device
        self.steps += 1


@dataclass(frozen=True)
class Measured:
    """Seconds of the steps on some schedules, and their work."""

    seconds: tuple[float, ...]
    tokens: int
    flops: int

    def line(self, name: str, rate: float) -> str:
        """One row of the table."""
        total = sum(self.seconds)
        spread = f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"
        speed = f"{self.tokens / total:>11.0f}{self.flops / total / 1e12:>10.3f}{self.flops / total / rate:>8.2f}"
        return f"{name:<20}{statistics.median(self.seconds):>8.2f}   {spread:<18}{speed}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of each kind of schedule, after one that warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of products and convolutions")
    parser.add_argument("--schedule", default="10", help="a published name or sides as 1,2,4")
    parser.add_argument("--policy", default="paper", choices=get_args(RandomPolicy), help="of the random schedules")
    parser.add_argument("--attention", default="by-scale", choices=NAMES)
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--give-back", action="store_true", help="leave the C library's memory as it is (see keep_memory)")
    parser.add_argument("--profile", action="store_true", help="where the time of one more step goes")
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    if not words.give_back:
        keep_memory()
    torch.set_num_threads(words.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(words.device), getattr(torch, words.dtype)
    forbid_tf32()
    forbid_cudnn_attention()

    schedule = Schedule.of(words.schedule)
    others = [Schedule.random(words.policy, random.Random(seed), *schedule[-1]) for seed in range(words.steps)]
    before = matrix_rate(device, dtype)
    training = Training(words.depth, words.batch, device, dtype, words.attention, words.recompute)
    training.step(schedule)
    measured = {words.schedule: measure(training, [schedule] * words.steps), f"random ({words.policy})": measure(training, others)}
    rate = max(before, after := matrix_rate(device, dtype))

    print(f"torch {torch.__version__}, {device_name(device)}, {words.dtype}, {words.threads} threads")
    print(f"depth {words.depth}, batch {words.batch}, attention {words.attention}{', recompute' if words.recompute else ''}", end="; ")
    print(f"random schedules of {', '.join(str(s.tokens) for s in others)} tokens")
    print(f"matrix rate {before / 1e12:.3f} before, {after / 1e12:.3f} TFLOP/s after; peak memory {peak_memory(device):.1f} GiB")
    print(f"{'schedule':<20}{'step s':>8}   {'spread':<18}{'tokens/s':>11}{'TFLOP/s':>10}{'share':>8}")
    for name, one in measured.items():
        print(one.line(name, rate))
    for profiled in [schedule, *others[:1]] if words.profile else []:
        print_profile(training, profiled)


def measure(training: Training, schedules: Sequence[Schedule]) -> Measured:
    """One step on each schedule."""
    seconds = []
    for schedule in schedules:
        wait_for(training.device)
        began = time.perf_counter()
        training.step(schedule)
        wait_for(training.device)
        seconds.append(time.perf_counter() - began)
    flops = sum(training_flops(training.config, schedule, training.batch) for schedule in schedules)
    return Measured(tuple(seconds), training.batch * sum(schedule.tokens for schedule in schedules), flops)


def print_profile(training: Training, schedule: Schedule) -> None:
    """The share of one step's time that products of matrices take, and the ten dearest of all other operations.

    Time is each operation's own; what the step spends outside operations, in Python, counts as another one.
    """
    on_gpu = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler, record_function("(outside operations)"):
        training.step(schedule)
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 for event in events}
    total = sum(times.values())
    products = {key: seconds for key, seconds in times.items() if PRODUCTS.fullmatch(key)}
    share = sum(products.values()) / total
    print(f"a step on {schedule.tokens} tokens: of {total:.2f} s, products of matrices, convolutions and attention take {share:.1%}:")
    dearest = sorted(times, key=lambda key: -times[key])
    shown = [key for key in dearest if key in products and times[key] > 1e-3 * total]
    for key in [*shown, "", *[key for key in dearest if key not in products][:10]]:
        print(f"  {key:<60}{times[key]:>8.3f} s{times[key] / total:>8.1%}" if key else "the dearest of the others:")


if __name__ == "__main__":
    main()
