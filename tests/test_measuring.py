"""A drawing part by part: its seconds add up, it is the drawing that it would be, and the table says what the account says."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from benchmarks import speed

from flexvar import Schedule, Tokenizer, Transformer, rates
from flexvar.accounting import Plan, Seconds, floor, plan
from flexvar.linear import Int8Linear
from flexvar.measuring import Clock, Measured, measure_drawing, medians, peak_memory, random_networks, time_drawing
from flexvar.rates import Rates
from flexvar.sampling import choose

SCHEDULE = Schedule(((1, 1), (2, 3), (2, 3), (4, 5)))
SLOW, FAST = Rates(1e9, 2e9, 3e9, "NCHW"), Rates(2e9, 4e9, 3e9, "channels last")
CPU = torch.device("cpu")


@pytest.fixture
def cost(small_tokenizer: Tokenizer, small_transformer: Transformer) -> Plan:
    return plan(small_transformer.config, small_tokenizer.config, SCHEDULE, batch=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS_A_RATE", 0.0)


@pytest.mark.parametrize("guided", [True, False])
def test_the_parts_are_the_whole(small_tokenizer: Tokenizer, small_transformer: Transformer, guided: bool) -> None:
    rows: list[int] = []

    def slow(*given) -> torch.Tensor:
        time.sleep(0.02)
        rows.append(len(given[0]))
        return choose(*given)

    began = time.perf_counter()
    seconds = time_drawing(small_tokenizer, small_transformer, SCHEDULE, 3, guided=guided, choose=slow)
    whole = time.perf_counter() - began
    assert 0.08 < seconds.sampling < seconds.all < whole
    assert len(seconds.scales) == 4
    assert all(part > 0 for part in seconds.parts)
    assert rows == [3] * 4
    assert not small_transformer.blocks[0]._forward_pre_hooks
    assert not small_transformer.blocks[-1]._forward_hooks


def test_nothing_is_left_on_the_network_when_drawing_fails(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    def broken(*_) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        time_drawing(small_tokenizer, small_transformer, SCHEDULE, 1, choose=broken)
    assert not small_transformer.blocks[0]._forward_pre_hooks
    assert not small_transformer.blocks[-1]._forward_hooks


def test_a_clock_tells_the_time_between_its_marks() -> None:
    clock = Clock(CPU)
    for pause in (0.0, 0.01, 0.03):
        time.sleep(pause)
        clock.mark()
    first, second = clock.seconds()
    assert first >= 0.01
    assert second >= 0.03


@pytest.mark.parametrize("int8", [False, True])
def test_networks_are_those_of_the_plan(small_tokenizer: Tokenizer, small_transformer: Transformer, int8: bool) -> None:
    cost = plan(small_transformer.config, small_tokenizer.config, SCHEDULE, dtype=torch.bfloat16, int8=int8)
    tokenizer, transformer = random_networks(cost, CPU)
    assert isinstance(transformer.layers[0].mlp.rise, Int8Linear) is int8
    weights = [tensor for network in (tokenizer, transformer) for tensor in (*network.parameters(), *network.buffers())]
    assert sum(weight.nbytes for weight in weights) == cost.memory.weights
    assert not any(weight.requires_grad for weight in weights)


def test_a_drawing_is_measured(cost: Plan) -> None:
    measured = measure_drawing(cost, *random_networks(cost, CPU), repeats=2)
    assert len(measured.drawn) == 2
    assert measured.device == "cpu"
    assert all(part > 0 for seconds in measured.drawn for part in seconds.parts)


def test_a_share_is_the_floor_over_the_median(cost: Plan) -> None:
    took = [Seconds(0.1, (0.1, 0.1, 0.1, 0.1), 0.1, 0.1, 0.3 + n) for n in (0, 3, 1)]  # 1, 4 and 2 in all
    measured = Measured(cost, "abacus", SLOW, FAST, tuple(took))
    products, convolutions = cost.flops.transformer + cost.flops.decoder_attention, cost.flops.decoder_convolutions
    assert measured.share(FAST.unhindered) == pytest.approx((products / 2e9 + convolutions / 4e9) / 2)


def test_where_packed_layers_are_faster_both_floors_are_told(cost: Plan) -> None:
    took = (Seconds(0.1, (0.1, 0.1, 0.1, 0.1), 0.1, 0.1, 0.3),)

    def told(packed: float) -> dict[str, list[str]]:
        rates = replace(FAST, packed=packed)
        lines = Measured(cost, "abacus", rates, rates, took).lines()
        return {line[:27].strip(): line[27:].split() for line in lines}

    assert "the same, layers unpacked" not in told(1e9)
    rows = told(8e9)
    floors = [floor(cost, Rates(products, 4e9, math.inf)).all for products in (8e9, 2e9)]
    assert rows["all, by FLOP alone"] == [f"{1e3 * floors[0]:.3f}", f"{floors[0]:.2f}"]
    assert rows["the same, layers unpacked"] == [f"{1e3 * floors[1]:.3f}", f"{floors[1]:.2f}"]


def test_the_table_is_the_account(cost: Plan) -> None:
    took = [Seconds(0.1 * n, (0.2, 0.3, 0.3, 0.4), 0.5, 0.25, 1.0 + n) for n in (1, 2, 4)]
    measured = Measured(cost, "abacus", SLOW, FAST, tuple(took))
    lines, least = measured.lines(), floor(cost, Rates(2e9, 4e9, 3e9))
    assert lines[:3] == [
        f"rates of abacus, before: {SLOW}",
        f"rates of abacus, after: {FAST}",
        "rates differ by more than 10 %: the device was busy, measure again",
    ]
    assert all(line.isascii() and len(line) <= 100 for line in lines)
    rows = {line[:27].strip(): line[27:].split() for line in lines}
    names = ["class modulation", "blocks at 1x1", "blocks at 2x3", "blocks at 4x5", "head", "sampling", "decoder", "all"]
    assert [name for name in rows if name in names] == names
    assert rows["decoder"][-3:] == [f"{1e3 * least.decoder:.3f}", "3000.000", f"{least.decoder / 3:.2f}"]
    assert rows["class modulation"][-2] == "200.000"
    assert rows["all"][-3:] == [f"{1e3 * least.all:.3f}", "5150.000", f"{least.all / 5.15:.2f}"]
    assert rows["all, by FLOP alone"][0] == f"{1e3 * floor(cost, FAST.unhindered).all:.3f}"
    assert lines[-1] == "median of 3 with random weights, 4050 to 7350 ms, after one that warms up"


def test_what_was_not_drawn_has_a_floor_all_the_same(cost: Plan) -> None:
    lines = Measured(cost, "abacus", FAST, FAST, ()).lines()
    row = next(line for line in lines if line.startswith("all  "))
    assert row.split()[-3:] == [f"{1e3 * floor(cost, FAST).all:.3f}", "-", "-"]
    assert not any("median" in line or "busy" in line or "8-bit" in line for line in lines)
    assert any("8-bit weights are held against" in line for line in Measured(replace(cost, int8=True), "abacus", FAST, FAST, ()).lines())


def test_medians_are_of_each_part() -> None:
    drawn = [Seconds(n, (n, 10 - n), 2 * n, 3 * n, 4 * n) for n in (1, 5, 3)]
    assert medians(drawn) == Seconds(3, (3, 7), 6, 9, 12)


def test_peak_memory_takes_in_what_was_held() -> None:
    code = (
        "import torch; from flexvar.measuring import peak_memory; cpu = torch.device('cpu'); before = peak_memory(cpu);"
        "held = torch.ones(int((before + 0.1) * 2**28)); del held; print(before, peak_memory(cpu))"
    )
    # By a shell, since what a system tells of a process may begin with its parent's size.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = map(float, out.split())
    assert 0.05 < before < 2  # GiB
    assert before + 0.05 < after < 2 * before + 0.2
    assert math.isnan(peak_memory(torch.device("meta")))


def test_the_benchmark_and_the_command_have_one_account(cost: Plan, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked: list[Plan] = []

    def measured(cost: Plan, *networks: object) -> Measured:
        asked.append(cost)
        return Measured(cost, "abacus", FAST, FAST, (Seconds(0.1, (0.1,) * len(cost.schedule), 0.1, 0.1, 0.1),))

    monkeypatch.setattr(speed, "measure_drawing", measured)
    monkeypatch.setattr(speed, "random_networks", lambda *_: ())
    monkeypatch.setattr(speed, "keep_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    words = ["speed", "--depth", "2", "--height", "64", "--width", "96", "--steps", "2", "--batch", "2", "--int8", "--dtype", "bfloat16"]
    monkeypatch.setattr(speed, "compiled", lambda *_: None)
    for more, target, status in (
        (["--target", "0"], 0.0, 0), (["--target", "99"], 99.0, 1), ([], 0.7, 0), (["--compile"], 0.8, 0),
        (["--compile", "--batch", "4"], 0.85, 0),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", [*words, *more])
        assert speed.main() == status
        said = capsys.readouterr().out
        assert "\n".join(measured(asked[-1]).lines()) in said
        assert said.splitlines()[-1].startswith(f"target {target:.2f} by FLOP alone {'missed' if status else 'reached'}: ")
    config = asked[0].transformer
    assert asked[0] == plan(config, asked[0].tokenizer, Schedule.for_size(64, 96, 2), batch=2, dtype=torch.bfloat16, int8=True)
