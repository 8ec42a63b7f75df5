"""What it costs to score features that are already there, by all metrics: at most 4 minutes and 4 GiB on 2 cores.

`python -m benchmarks.evaluation [--samples 50000 --reference 10000 --dimensions 2048 --repeats 3 --threads 2]`

Features and logits are random numbers. What takes seconds is measured several times and the median stands; what takes longer, once. FLOPs
are of products and decompositions of matrices, each distance counted once where it serves both ends. Memory is the most that the whole
process ever held, its inputs and its libraries included. Exit status 1 where a limit is exceeded; a shortened run has none. Other work on
the machine spoils the figures; where the rates of products before and after are more than 10 % apart, a line says so. Figures taken so
far: RESULTS.md.

`--overlap` measures something else: pictures of the bundled model through the Inception network (random weights), drawing and network in
turn, and side by side as `evaluate` runs them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexvar import FlexVARPipeline
from flexvar.evaluation import DrawnPictures, Features
from flexvar.evaluation.extraction import extract_beside
from flexvar.evaluation.inception import Inception
from flexvar.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from flexvar.measuring import peak_memory
from flexvar.rates import disturbed, matrix_rate

SAMPLES, REFERENCE, DIMENSIONS, SPATIAL, CLASSES = 50_000, 10_000, 2048, 2023, 1008
SECONDS, GIBIBYTES = 240, 4
BLOCKS, SUBSETS, SUBSET_SIZE = 20, 100, 1000


@dataclass(frozen=True)
class Cost:
    """One metric."""

    name: str
    seconds: tuple[float, ...]
    flops: float

    def __str__(self) -> str:
        median = statistics.median(self.seconds)
        rate = f"{self.flops / 1e12:>9.3f}{self.flops / median / 1e9:>10.0f}" if self.flops else f"{'–':>9}{'–':>10}"
        return f"{self.name:<24}{median:>9.2f}{rate}   {min(self.seconds):.2f} to {max(self.seconds):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--reference", type=int, default=REFERENCE)
    parser.add_argument("--dimensions", type=int, default=DIMENSIONS)
    parser.add_argument("--repeats", type=int, default=3, help="of what takes seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--overlap", action="store_true", help="instead: drawing beside the network, and in turn")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if words.overlap:
        return overlap(words.repeats)
    torch.manual_seed(0)
    n, m, f = words.samples, words.reference, words.dimensions

    before = rates()
    reference, samples = torch.randn(m, f), torch.randn(n, f)
    spatial, their_spatial = torch.randn(n, SPATIAL), moments(torch.randn(m, SPATIAL))
    logits = torch.randn(n, CLASSES)
    mu, sigma = moments(reference)
    mean, covariance = moments(samples)
    distance = (2 / 3 + 2 + 8 / 3) * f**3  # Cholesky's factors, their product, its singular values
    between, within = 2 * n * m * f, lambda count: count**2 * f  # products of two sets; of one, each pair once
    size = min(SUBSET_SIZE, n, m)
    works: list[tuple[str, Callable[[], Any], float, int]] = [
        ("moments of samples", lambda: moments(samples), 2 * n * f**2, words.repeats),
        ("moments of reference", lambda: moments(reference), 2 * m * f**2, words.repeats),
        ("Fréchet distance", lambda: frechet_distance(mean, covariance, mu, sigma), distance, words.repeats),
        ("sFID, moments and all", lambda: frechet_distance(*moments(spatial), *their_spatial), 2 * n * SPATIAL**2 + 16 / 3 * SPATIAL**3, 1),
        ("the interval of FID", lambda: frechet_interval(samples, mu, sigma, BLOCKS), 4 * n * f**2 + (BLOCKS + 1) * distance, 1),
        ("Inception Score", lambda: inception_score(logits), 0, words.repeats),
        ("precision and recall", lambda: precision_recall(reference, samples), between + within(n) + within(m), 1),
        ("density and coverage", lambda: density_coverage(reference, samples), between + within(m), 1),
        ("kernel distance", lambda: kernel_distance(reference, samples, SUBSETS, SUBSET_SIZE), 6 * SUBSETS * size**2 * f, 1),
    ]
    print(f"torch {torch.__version__}, {words.threads} threads; {n} samples and {m} of the reference, {f} features, {CLASSES} logits")
    print(f"{'':<24}{'seconds':>9}{'TFLOP':>9}{'GFLOP/s':>10}   spread")
    costs = []
    for name, work, flops, repeats in works:
        costs.append(Cost(name, tuple(timed(work) for _ in range(repeats)), flops))
        print(costs[-1], flush=True)
    after = rates()

    total, memory = sum(statistics.median(cost.seconds) for cost in costs), peak_memory(torch.device("cpu"))
    print(Cost("all", (total,), sum(cost.flops for cost in costs)))
    for name, one, other in zip(("float32", "float64"), before, after, strict=True):
        print(f"products in {name}: {one / 1e9:.0f} GFLOP/s before, {other / 1e9:.0f} after")
    if any(disturbed(one, other) for one, other in zip(before, after, strict=True)):
        print("rates differ by more than 10 %: the machine was busy, measure again")
    print(f"{total:.0f} s, peak memory {memory:.2f} GiB;", end=" ")
    if (n, m, f) != (SAMPLES, REFERENCE, DIMENSIONS):
        print("shortened, so no limits")
        return 0
    kept = total <= SECONDS and not memory > GIBIBYTES
    print(f"limits {SECONDS} s and {GIBIBYTES} GiB", "kept" if kept else "exceeded")
    return 0 if kept else 1


def overlap(repeats: int) -> int:
    """Prints seconds for the same pictures in turn and side by side."""
    pictures, network = DrawnPictures(FlexVARPipeline.from_pretrained("emoji"), "emoji", 3, batch=24), Inception().eval()

    @torch.no_grad()
    def extract(batch: Tensor) -> Features:
        return Features(*network(batch))

    def in_turn() -> None:
        for batch in pictures.batches(range(len(pictures))):
            extract(batch)

    def side_by_side() -> None:
        list(extract_beside(pictures.batches(range(len(pictures))), extract))

    taken: dict[str, list[float]] = {"in turn": [], "side by side": []}
    for _ in range(repeats):
        for name, work in (("in turn", in_turn), ("side by side", side_by_side)):
            taken[name].append(timed(work))
    for name, seconds in taken.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{len(pictures)} pictures drawn and read {name:<14}{statistics.median(seconds):.2f} s ({spread})")
    return 0


def rates() -> tuple[float, float]:
    """FLOP/s of products of matrices in float32 and in float64."""
    return matrix_rate(torch.device("cpu"), torch.float32), matrix_rate(torch.device("cpu"), torch.float64)


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
