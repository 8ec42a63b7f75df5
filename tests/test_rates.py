"""What a device does at most: rates of this century, the better of two, and what disturbed them."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from flexvar import rates
from flexvar.linear import PackedLinear, can_pack
from flexvar.rates import Rates, disturbed, matrix_rate, measure_rates

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_of_this_century(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS_A_RATE", 0.0)
    found = measure_rates(CPU, dtype, rows=8, width=64, pictures=(1, 16, 16))
    for rate in (found.products, found.convolutions, found.memory):
        assert 1e6 < rate < 1e15
    assert found.format in ("NCHW", "channels last")
    packed = f", packed {found.packed / 1e9:.1f}" if can_pack(CPU, dtype) else ""
    assert str(found).startswith(f"products {found.products / 1e9:.1f} GFLOP/s{packed}, 3x3 convolutions ")
    assert str(found).endswith(f"({found.format}), memory {found.memory / 1e9:.1f} GB/s")


def test_large_drawings_do_not_make_them_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(rates, "_rate", lambda device, work, amount: taken.append(amount) or 1.0)
    monkeypatch.setattr(rates, "can_pack", lambda device, dtype: False)
    measure_rates(CPU, torch.float32, rows=10**6, width=64, pictures=(1000, 64, 512))
    *convolutions, rise, fall, _, _ = taken
    assert max(convolutions) == 2 * rates.MOST_PIXELS * 128**2 * 9
    assert rise == fall == 2 * rates.MOST_ROWS * 64 * 256


def test_the_better_of_two_is_taken_rate_by_rate() -> None:
    one, other = Rates(5.0, 2.0, 9.0, "NCHW", 6.0), Rates(4.0, 3.0, 8.0, "channels last", 7.0)
    assert one.better(other) == other.better(one) == Rates(5.0, 3.0, 9.0, "channels last", 7.0)
    assert one.unhindered == Rates(5.0, 2.0, math.inf, "NCHW", 6.0)


def test_the_faster_kind_of_layers_counts() -> None:
    assert Rates(5.0, 1.0, 1.0, packed=6.0).fastest_products == 6.0
    assert Rates(5.0, 1.0, 1.0, packed=4.0).fastest_products == 5.0
    assert Rates(5.0, 1.0, 1.0, packed=6.0).unpacked.fastest_products == 5.0


@pytest.mark.usefixtures("packing")
def test_both_kinds_of_layers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(device: torch.device, work: partial, amount: int) -> float:
        work()
        return 2.0 if isinstance(work.func, PackedLinear) else 1.0

    monkeypatch.setattr(rates, "_rate", rate)
    monkeypatch.setattr(rates, "_convolution_rate", lambda *_: (1.0, "NCHW"))
    monkeypatch.setattr(rates, "_memory_rate", lambda device: 1.0)
    assert measure_rates(CPU, torch.float32, rows=8, width=16) == Rates(1.0, 1.0, 1.0, "NCHW", 2.0)


def test_what_is_more_than_a_tenth_apart_was_disturbed() -> None:
    assert disturbed(1.0, 0.89)
    assert not disturbed(0.91, 1.0)
    calm = Rates(1.0, 1.0, 1.0)
    assert calm.apart(Rates(0.8, 1.0, 1.0))
    assert calm.apart(Rates(1.0, 1.2, 1.0))
    assert Rates(1.0, 1.0, 1.0, packed=1.0).apart(Rates(1.0, 1.0, 1.0, packed=1.2))
    assert not calm.apart(Rates(1.0, 1.0, 0.5))  # memory is never at rest


def test_a_matrix_rate_is_one_of_this_century() -> None:
    assert 1e8 < matrix_rate(CPU, torch.float32) < 1e15


def test_a_matrix_rate_of_slow_products_is_taken_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 2)
    monkeypatch.setattr("flexvar.rates.time.perf_counter", lambda: next(seconds))
    assert matrix_rate(CPU, torch.float32) == 1024**3
    assert next(seconds) == 4  # the clock was read twice
