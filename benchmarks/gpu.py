"""All that is measured where a GPU is at hand, in one command.

`python -m benchmarks.gpu [--item all --device cuda --depths 16,24 --batches 1,8,64,128 --size 256 --steps 10 --repeats 5 --out FILE.md]`

Items: `correct` (codes of bfloat16, of the faster way and of 8-bit weights against the plain way in float32), `generation` (labels to
pictures: speed, memory, parts, dearest kernels), `training` (steps of the transformer in every way to attend, and of the tokenizer),
`ceilings` (rates of products, convolutions and memory; taken first and last, whatever the items). bfloat16 on CUDA, else float32; weights
are random, except for the bundled model's codes. The floor is that of `flexvar plan --measure`: of each part, at each scale, FLOPs or bytes
over the first ceilings; the last tables repeat the shares with the better of both. 8-bit weights move fewer bytes, and are held against the
rate of the others' products. The parts of a recorded drawing cannot be timed within it: sampling and decoding are recorded on their own,
and the transformer is the rest. A row is printed as soon as it is known; one that fails says so, and the rest goes on.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention import NAMES
from benchmarks.rows import Bench, Rows, Table, figure, speed
from benchmarks.training import Training, measure
from flexvar import Keep, Schedule, Step, Tokenizer, TokenizerConfig, Transformer, TransformerConfig, generate
from flexvar.accounting import Part, Plan, floor, plan
from flexvar.compiled import Recorded, compiled
from flexvar.generation import Draw, draw_scales
from flexvar.linear import to_int8
from flexvar.measuring import medians, time_drawing
from flexvar.processes import forbid_cudnn_attention, forbid_tf32
from flexvar.rates import device_name
from flexvar.sampling import Sampling, choose

TOKENIZER = TokenizerConfig()
COMPARED = 8  # pictures whose codes are compared

TARGETS = {16: (450, 12), 24: (180, 25)}
"""Of an H200-class GPU by depth, at 256 px in 10 steps: pictures/s at a batch of LARGE or more, and ms at one of 1."""

TRAINING_TARGETS = {16: 0.45}
"""By depth: the share of the rate of products, at a batch of LARGE or more."""

LARGE = 64

Way: TypeAlias = Literal["plain", "fast", "int8"]  # int8: 8-bit weights, drawn in the faster way
Networks: TypeAlias = tuple[Tokenizer, Transformer]

SECONDS = ("ms", "spread", "first s")
CODES: Table = ("Codes chosen after the same earlier codes", "way", "equal", "worst scale", "pictures off by", "recording as loop, off by")
SHARE = ("share of the floor", "by FLOP alone")
DRAWING: Table = ("Drawing", "way", "batch", "pictures/s", *SECONDS, "target", "peak GiB", "planned GiB", *SHARE)
SHARES: Table = ("Drawing, by the better ceilings", "way", "batch", "ms", "floor ms", "floor ms by FLOP alone", *SHARE)
PARTS: Table = ("Parts of a drawing", "way", "batch", "part", "TFLOP", "GB", "floor ms", "ms", "share of the floor")
KERNELS: Table = ("Where the time goes", "way", "kernel", "calls", "ms", "share")
STEP = "A step of the transformer"
TRANSFORMER: Table = (f"{STEP}, random schedules", "way", "batch", "tokens/s", *SECONDS, "peak GiB", "share of the rate", "target")
STEP_SHARES: Table = (f"{STEP}, by the better ceilings", "way", "share of the rate", "target")
TOKENIZER_STEP: Table = ("A step of the tokenizer", "losses", "batch", "pictures/s", *SECONDS, "peak GiB")


# -- generation --


@torch.no_grad()
def random_networks(depth: int, device: torch.device) -> Networks:
    """The same each time. Fresh weights hardly tell classes, codes, blocks and logits apart; these do, as trained ones would."""
    torch.manual_seed(0)
    with torch.device(device):
        shape = TransformerConfig(depth=depth, codebook_size=TOKENIZER.codebook_size, code_width=TOKENIZER.code_width)
        tokenizer, transformer = Tokenizer(TOKENIZER), Transformer(shape)
    for block in transformer.layers:
        block.modulation.bias[: 2 * shape.width] = 1.0  # the gains
    for part, factor in ((transformer.class_embedding, 10), (transformer.code_projection, 50), (transformer.head, 250)):
        part.weight.mul_(factor)
    return tokenizer, transformer


class Drawing:
    """Networks in one precision, made ready for one way to draw when they first do."""

    def __init__(self, make: Callable[[], Networks], way: Way, dtype: torch.dtype) -> None:
        torch.compiler.reset()  # a function is compiled so many times at most, and earlier networks count
        self.make, self.way, self.dtype = make, way, dtype

    @cached_property
    def ready(self) -> tuple[Tokenizer, Transformer, Draw]:
        """The networks and the loop over scales."""
        tokenizer, transformer = self.make()
        for network in (tokenizer, transformer):
            network.to(self.dtype).eval().requires_grad_(False)
        if self.way == "plain":
            return tokenizer, transformer, draw_scales
        if self.way == "int8":
            to_int8(transformer)
        return tokenizer, transformer, compiled(tokenizer, transformer)

    @torch.no_grad()
    def steps(self, schedule: Schedule, numbers: range, keep: Keep | None = None, draw: Draw | None = None) -> list[Step]:
        """The scales of pictures with these numbers, which are seed and class."""
        tokenizer, transformer, own = self.ready
        labels = [number % transformer.config.classes for number in numbers]
        return list(generate(tokenizer, transformer, labels, schedule, keep=keep, seeds=numbers, draw=draw or own))

    def batch(self, schedule: Schedule, pictures: int) -> Tensor:
        """So many pictures, drawn and decoded: (B, 3, H, W)."""
        return self.steps(schedule, range(pictures))[-1].images

    def cost(self, schedule: Schedule, pictures: int) -> Plan:
        """The account of that batch."""
        shape = self.ready[1].config
        return plan(shape, TOKENIZER, schedule, batch=pictures, dtype=self.dtype, int8=self.way == "int8")


def drawing_rows(bench: Bench, name: str, drawing: Drawing, schedule: Schedule, batch: int, repeats: int) -> Rows:
    """Time and memory of a batch from labels to pictures."""
    _, _, draw = drawing.ready
    if isinstance(draw, Recorded):
        draw.recordings.clear()  # they hold the memory of earlier batches
    bench.tidy()
    seconds = bench.timed(partial(drawing.batch, schedule, batch), 1 + repeats)
    peak, median, cost = bench.gibibytes(), statistics.median(seconds[1:]), drawing.cost(schedule, batch)
    bench.later(SHARES, name, partial(share_rows, bench, cost, median))
    ((*_, share, bare),) = share_rows(bench, cost, median)
    return [(*speed(batch, batch, seconds), target_of(cost), peak, bench.gibibytes(cost.memory.peak), share, bare)]


def share_rows(bench: Bench, cost: Plan, median: float) -> Rows:
    """The floor of a drawing by the ceilings known so far, and what share of its seconds it is; with bytes, and without them."""
    floors = [floor(cost, rates).all for rates in (bench.rates, bench.rates.unhindered)]
    milliseconds = [figure(1e3 * seconds) for seconds in (median, *floors)]
    return [(str(cost.batch), *milliseconds, *(figure(seconds / median) for seconds in floors))]


def target_of(cost: Plan) -> str:
    """What is asked of a drawing, where anything is."""
    if cost.transformer.depth not in TARGETS or cost.schedule != Schedule.named("10") or 1 < cost.batch < LARGE:
        return "-"
    pictures, milliseconds = TARGETS[cost.transformer.depth]
    return f"{milliseconds} ms" if cost.batch == 1 else f"{pictures} pictures/s"


@torch.no_grad()
def part_rows(bench: Bench, drawing: Drawing, schedule: Schedule, batch: int, repeats: int) -> Rows:
    """FLOPs, bytes and floor of each part of a batch, beside its time."""
    tokenizer, transformer, draw = drawing.ready
    cost = drawing.cost(schedule, batch)
    parts, floors = list(cost.parts()), list(floor(cost, bench.rates).parts)
    if isinstance(draw, Recorded):
        seconds = recorded_parts(bench, drawing, draw, schedule, batch, repeats)
        *blocks, sampling, decoder = parts
        whole = Part("transformer with its head", sum(part.flops for part in blocks), sum(part.bytes for part in blocks))
        parts, floors = [whole, sampling, decoder], [sum(floors[:-2]), *floors[-2:]]
    else:
        seconds = medians([time_drawing(tokenizer, transformer, schedule, batch) for _ in range(1 + repeats)][1:]).parts
    parts.append(Part("all", cost.flops.total, cost.bytes.total))
    rows = []
    for part, least, took in zip(parts, [*floors, sum(floors)], [*seconds, sum(seconds)], strict=True):
        figures = part.flops / 1e12, part.bytes / 1e9, 1e3 * least, 1e3 * took, least / took
        rows.append((str(batch), part.name, *map(figure, figures)))
    return rows


def recorded_parts(bench: Bench, drawing: Drawing, draw: Recorded, schedule: Schedule, batch: int, repeats: int) -> tuple[float, ...]:
    """Seconds of the transformer with its head, of sampling and of the decoder."""
    config, device = drawing.ready[1].config, bench.device
    greedy = Sampling().greedy_scales(schedule, config.trained_grid)
    logits = [torch.randn(batch, count, config.codebook_size, device=device) for count in schedule.counts]  # (B, n, V) each
    numbers = [torch.rand(batch, count, device=device) for count in schedule.counts]  # (B, n) each
    codes = torch.randint(config.codebook_size, (batch, *schedule[-1]), device=device)  # (B, h, w)
    scales = list(zip(logits, numbers, greedy, strict=True))

    def sampling() -> list[Tensor]:
        return [draw.choose(scores, drawn, Sampling(), likeliest) for scores, drawn, likeliest in scales]

    def median(work: Callable[[], object]) -> float:
        return statistics.median(bench.timed(work, 1 + repeats)[1:])

    whole = median(partial(drawing.batch, schedule, batch))
    kept = [draw.making_room(partial(draw.record, work)) for work in (sampling, lambda: [draw.decode(codes)])]  # with what they fill
    sampled, decoded = (median(replay) for _, replay in kept)
    return whole - sampled - decoded, sampled, decoded


def kernel_rows(bench: Bench, drawing: Drawing, schedule: Schedule, batch: int) -> Rows:
    """The ten dearest kernels of a batch; on a CPU, operations."""
    work = partial(drawing.batch, schedule, batch)
    _, unwatched = bench.timed(work, 2)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]) as profiler:
        bench.timed(work)
    kind = torch.autograd.DeviceType.CUDA if bench.on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    times = [(event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total) / 1e3 for event in events]
    total, calls = sum(times), sum(event.count for event in events)
    dearest = sorted(zip(times, events, strict=True), key=lambda pair: -pair[0])[:10]
    rows = [(event.key[:100], str(event.count), figure(ms), figure(ms / total)) for ms, event in dearest]
    return [(f"all, of {figure(1e3 * unwatched)} ms that pass unwatched", str(calls), figure(total), "1"), *rows]


def generation(bench: Bench, words: Namespace) -> None:
    """Every way to draw, and where the time of the largest batch goes."""
    schedule, most = Schedule.for_size(words.size, words.size, words.steps, TOKENIZER.downsample), max(words.batches)
    ways: tuple[Way, ...] = ("plain", "fast", "int8")
    for way, depth in product(ways, words.depths):
        drawing = Drawing(partial(random_networks, depth, bench.device), way, bench.dtype)
        name = f"d{depth}, {words.size} px, {way}"
        for batch in words.batches:
            bench.rows(DRAWING, name, partial(drawing_rows, bench, name, drawing, schedule, batch, words.repeats))
        for batch in sorted({min(words.batches), most}):
            bench.rows(PARTS, name, partial(part_rows, bench, drawing, schedule, batch, words.repeats))
        bench.rows(KERNELS, f"d{depth}, {most} x {words.size} px, {way}", partial(kernel_rows, bench, drawing, schedule, most))
        for batch in (16, 64) if depth == 24 else ():
            large, name = Schedule.of("512-15"), f"d{depth}, 512 px, {way}"
            bench.rows(DRAWING, name, partial(drawing_rows, bench, name, drawing, large, batch, words.repeats))


# -- correct --


def bundled_networks(device: torch.device) -> Networks:
    """Those of the emoji model."""
    from flexvar.checkpoint import load  # here, since they need safetensors
    from flexvar.zoo import bundled_folder

    model = load(bundled_folder("emoji"))
    assert model.transformer is not None
    return model.tokenizer.to(device), model.transformer.to(device)


def bundled_schedule() -> Schedule:
    """That of the emoji model when it is not told otherwise."""
    from flexvar.checkpoint import load_empty  # here, since they need safetensors
    from flexvar.settings import Settings
    from flexvar.zoo import bundled_folder

    return Settings(load_empty(bundled_folder("emoji"))).schedule_of()


@torch.no_grad()
def code_rows(make: Callable[[], Networks], schedule: Schedule, way: Way, dtype: torch.dtype) -> Rows:
    """Codes that a way chooses after those that the plain way drew in float32, so that a difference does not grow from scale to scale;
    and whether a recording, made of other pictures, draws what the loop draws with the same kernels."""
    expected = Drawing(make, "plain", torch.float32).steps(schedule, range(COMPARED))
    drawing = Drawing(make, way, dtype)
    tokenizer, _, draw = drawing.ready
    choosing, decode = (draw.choose, draw.decode) if isinstance(draw, Recorded) else (choose, tokenizer.decode)
    chosen: list[Tensor] = []

    def noted(logits: Tensor, numbers: Tensor, sampling: Sampling, greedy: bool) -> Tensor:
        chosen.append(choosing(logits, numbers, sampling, greedy))
        return chosen[-1]  # (B, n)

    drawing.steps(schedule, range(COMPARED), Keep([step.codes for step in expected]), partial(draw_scales, choose=noted))
    equal = [ours == theirs.codes.flatten(1) for ours, theirs in zip(chosen, expected, strict=True)]
    worst, (h, w) = min((scale.float().mean().item(), size) for scale, size in zip(equal, schedule, strict=True))
    painted = off_by(decode(expected[-1].codes), expected[-1].images)
    recorded = "-"
    if isinstance(draw, Recorded):
        drawing.steps(schedule, range(COMPARED, 2 * COMPARED))
        replayed, looped = (drawing.steps(schedule, range(COMPARED), draw=how) for how in (draw, partial(draw_scales, choose=choosing)))
        same = torch.cat([(ours.codes == theirs.codes).flatten(1) for ours, theirs in zip(replayed, looped, strict=True)], 1)
        recorded = f"{same.float().mean():.2%}, {off_by(replayed[-1].images, looped[-1].images)}"
    return [(f"{torch.cat(equal, 1).float().mean():.2%}", f"{h}x{w}: {worst:.2%}", painted, recorded)]


def off_by(ours: Tensor, theirs: Tensor) -> str:
    """The error of all pictures over their 2-norm."""
    return f"{(ours.float() - theirs.float()).norm() / theirs.float().norm():.1e}"


def correct(bench: Bench, words: Namespace) -> None:
    """Of the bundled model, and of random weights in the full size, by the released settings."""
    forbid_tf32()
    depth, full = words.depths[0], Schedule.for_size(words.size, words.size, words.steps, TOKENIZER.downsample)
    emoji = partial(code_rows, partial(bundled_networks, bench.device), bundled_schedule())
    large = partial(code_rows, partial(random_networks, depth, bench.device), full)
    ways: list[tuple[Way, torch.dtype]] = [(way, dtype) for way in ("plain", "fast") for dtype in (torch.float32, torch.bfloat16)]
    for (name, rows), (way, dtype) in product((("emoji", emoji), (f"d{depth}", large)), [*ways, ("int8", bench.dtype)]):
        bench.rows(CODES, f"{name}, {way}, {str(dtype).removeprefix('torch.')}", partial(rows, way, dtype))


# -- training --


def transformer_rows(bench: Bench, name: str, depth: int, schedules: list[Schedule], setting: Mapping[str, Any], batch: int) -> Rows:
    """The trainer's step on cached features: on half of the schedules, which compiles, then on the others, whose lengths are new."""
    torch.compiler.reset()
    steps = Training(depth, batch, bench.device, bench.dtype, **setting)
    middle = len(schedules) // 2
    first, then = measure(steps, schedules[:middle]), measure(steps, schedules[middle:])

    def share() -> Rows:
        target = str(TRAINING_TARGETS[depth]) if depth in TRAINING_TARGETS and batch >= LARGE else "-"
        return [(figure(then.flops / sum(then.seconds) / bench.rates.products), target)]

    bench.later(STEP_SHARES, name, share)
    seconds = [sum(first.seconds), *then.seconds]
    return [(*speed(batch, then.tokens / len(then.seconds), seconds), bench.gibibytes(), *share()[0])]


def tokenizer_rows(bench: Bench, size: int, repeats: int, opposed: bool, batch: int) -> Rows:
    """Forward, backward and AdamW on random pictures, each rebuilt from five scales; every step has other scales."""
    from flexvar.training.optimiser import parameter_groups  # here, since they need Pillow and safetensors
    from flexvar.training.order import Batch
    from flexvar.training.settings import AdversaryConfig, TokenizerRun, TokenizerShape
    from flexvar.training.tokenizer import TokenizerWorkshop

    shape = TokenizerShape(**(vars(TOKENIZER) | {"multipliers": list(TOKENIZER.multipliers)}))
    run = TokenizerRun(model=shape, adversary=AdversaryConfig(weight=0.5 * opposed, start=0))
    workshop = TokenizerWorkshop(run, torch.empty(0)).to(bench.device)
    optimiser = torch.optim.AdamW(parameter_groups(workshop, 0.05), lr=1e-4, fused=True)
    pictures = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=bench.device)

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            loss, _ = workshop(Batch(number, pictures, torch.zeros(batch, dtype=torch.int64), ()))
        loss.backward()
        optimiser.step()

    first, then = ([bench.timed(partial(step, number))[0] for number in range(repeats)] for _ in range(2))
    return [(*speed(batch, batch, [sum(first), *then]), bench.gibibytes())]


def training(bench: Bench, words: Namespace) -> None:
    """Steps of the tokenizer with and without its discriminator, and of the transformer in every way to attend.

    Each at the largest batch that fits, from `--training-batch` down.
    """
    forbid_cudnn_attention()  # as the trainer does
    grid, batch = words.size // TOKENIZER.downsample, words.training_batch
    schedules = [Schedule.random("paper", random.Random(seed), grid, grid) for seed in range(2 * words.repeats)]
    for name, opposed in (("without discriminator", False), ("with discriminator", True)):
        rows: Callable[[int], Rows] = partial(tokenizer_rows, bench, words.size, words.repeats, opposed)
        bench.rows(TOKENIZER_STEP, name, partial(bench.halved, rows, batch))
    ways: dict[str, dict[str, Any]] = {
        "by-scale, compiled": {"attention": "by-scale", "compile": "inductor" if bench.on_gpu else "eager"},
        "by-scale, recompute": {"attention": "by-scale", "recompute": True},
        **{way: {"attention": way} for way in sorted(NAMES, key="flex".__eq__)},  # which compiles for longest
    }
    for (way, setting), depth in product(ways.items(), words.depths):
        name = f"d{depth}, {way}"
        rows = partial(transformer_rows, bench, name, depth, schedules, setting)
        bench.rows(TRANSFORMER, name, partial(bench.halved, rows, batch))


ITEMS: dict[str, Callable[[Bench, Namespace], None]] = {"correct": correct, "generation": generation, "training": training}


def counts(text: str) -> list[int]:
    """Whole numbers, as "1,8"."""
    return [int(word) for word in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--item", choices=[*ITEMS, "ceilings", "all"], default="all")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--depths", type=counts, default="16,24")
    parser.add_argument("--batches", type=counts, default="1,8,64,128", help="pictures drawn at the same time")
    parser.add_argument("--training-batch", type=int, default=LARGE, help="halved until it fits (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="px")
    parser.add_argument("--steps", type=int, default=10, help="scales of a drawing")
    parser.add_argument("--repeats", type=int, default=5, help="behind one that warms up")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which no measurement begins")
    parser.add_argument("--out", type=Path, help="a Markdown file, to which all is appended")
    words = parser.parse_args(arguments)
    if words.device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA here; run it on a machine with a GPU, or with --device cpu", file=sys.stderr)
        return 2
    bench = Bench(words.device, words.out, words.limit, words.size)
    bench.say(f"\n{time.strftime('%Y-%m-%d %H:%M')}, {device_name(words.device)}, torch {torch.__version__}, {bench.dtype}: {words.item}")
    bench.ceilings("before")
    for name, item in ITEMS.items():
        if words.item in (name, "all"):
            item(bench, words)
    bench.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
