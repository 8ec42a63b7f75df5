"""The one command for machines with a GPU, as far as a CPU can try it: rows, figures, and failures that are rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.rows import CEILINGS, Table
from torch import Tensor

from flexvar import Schedule, TokenizerConfig, TransformerConfig, rates
from flexvar.accounting import floor, plan
from flexvar.compiled import Recorded, Work
from flexvar.processes import without_tf32
from flexvar.sampling import choose

TINY = ["--device", "cpu", "--depths", "1", "--size", "64", "--steps", "3", "--batches", "1,2", "--repeats", "1", "--training-batch", "1"]

pytestmark = pytest.mark.filterwarnings("ignore:64x64 px is drawn in 2 steps")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    """A tokenizer that paints quickly, few pictures, and ceilings taken at once; torch's settings stay as they were."""
    tokenizer = TokenizerConfig(channels=8, blocks=1, z_channels=8, norm_groups=4, codebook_size=64, code_width=8)
    monkeypatch.setattr(gpu, "TOKENIZER", tokenizer)
    monkeypatch.setattr(gpu, "COMPARED", 3)
    monkeypatch.setattr(rates, "SECONDS_A_RATE", 0.0)
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    with without_tf32():
        yield
    torch.backends.cuda.enable_cudnn_sdp(attention)


def measured(item: str, *words: str) -> dict[str, list[list[str]]]:
    """The cells of every row, under the title of its table, as the file has them."""
    out = Path(words[words.index("--out") + 1])
    assert gpu.main([*TINY, "--item", item, *words]) == 0
    tables: dict[str, list[list[str]]] = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        if line.startswith("**"):
            rows = tables.setdefault(line.strip("*"), [])
        elif line.startswith("|") and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {title: [row for row in rows if row != list(table_of(title)[1:])] for title, rows in tables.items()}


def table_of(title: str) -> Table:
    tables = (
        *(CEILINGS, gpu.CODES, gpu.DRAWING, gpu.SHARES, gpu.PARTS, gpu.KERNELS),
        *(gpu.TRANSFORMER, gpu.STEP_SHARES, gpu.TOKENIZER_STEP),
    )
    (table,) = (table for table in tables if table[0] == title)
    return table


def column(tables: dict[str, list[list[str]]], table: Table, name: str) -> list[str]:
    return [row[table.index(name) - 1] for row in tables[table[0]]]


def assert_positive(cells: list[str]) -> None:
    assert cells
    assert all(float(cell) > 0 for cell in cells), cells


@pytest.mark.slow
def test_generation_is_timed_in_every_way(tmp_path: Path, capsys) -> None:
    tables = measured("generation", "--out", str(tmp_path / "out.md"))
    assert column(tables, gpu.DRAWING, "way") == [f"d1, 64 px, {way}" for way in ("plain", "fast", "int8") for _ in range(2)]
    assert column(tables, gpu.DRAWING, "batch") == ["1", "2"] * 3
    for name in ("pictures/s", "ms", "first s", *gpu.SHARE):
        assert_positive(column(tables, gpu.DRAWING, name))
    assert column(tables, gpu.SHARES, "way") == column(tables, gpu.DRAWING, "way")
    for name in gpu.SHARES[2:]:
        assert_positive(column(tables, gpu.SHARES, name))
    parts = ["class modulation", "blocks at 1x1", "blocks at 4x4", "head", "sampling", "decoder", "all"]
    assert column(tables, gpu.PARTS, "part") == parts * 6
    assert column(tables, gpu.PARTS, "batch") == [batch for _ in range(3) for batch in "12" for _ in parts]
    for name in ("GB", "floor ms", "ms"):
        assert_positive(column(tables, gpu.PARTS, name))
    assert {*column(tables, gpu.DRAWING, "peak GiB"), *column(tables, gpu.DRAWING, "planned GiB")} == {"-"}
    assert len(tables["Where the time goes"]) == 3 * 11
    assert any("convolution" in kernel for kernel in column(tables, gpu.KERNELS, "kernel"))
    assert_positive(column(tables, gpu.KERNELS, "calls"))
    assert column(tables, CEILINGS, "when") == ["before", "after"]
    for name in CEILINGS[2:]:
        assert_positive(column(tables, CEILINGS, name))
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.slow
def test_training_is_timed_in_every_way_that_the_device_has(tmp_path: Path) -> None:
    tables = measured("training", "--out", str(tmp_path / "out.md"))
    ways = ["by-scale, compiled", "by-scale, recompute", "by-scale", "mask", "padded", "flex"]
    rows = dict(zip(ways, tables[gpu.TRANSFORMER[0]], strict=True))
    assert [row[0] for row in rows.values()] == [f"d1, {way}" for way in ways]
    assert rows.pop("flex")[1].startswith("failed: ValueError: attention 'flex' gives no gradients on cpu")
    for row in rows.values():
        assert_positive([*row[1:4], row[5], row[7]])
        assert row[8] == "-"
    assert column(tables, gpu.STEP_SHARES, "way") == [row[0] for row in rows.values()]
    assert_positive(column(tables, gpu.STEP_SHARES, "share of the rate"))
    assert column(tables, gpu.TOKENIZER_STEP, "losses") == ["without discriminator", "with discriminator"]
    for name in ("pictures/s", "ms", "first s"):
        assert_positive(column(tables, gpu.TOKENIZER_STEP, name))


def recorded_again(work: Work) -> tuple[list[Tensor], Callable[[], None]]:
    """Stands in for a CUDA graph."""
    filled = work()

    def replay() -> None:
        for tensor, result in zip(filled, work(), strict=True):
            tensor.copy_(result)

    return filled, replay


@pytest.mark.slow
def test_codes_are_compared(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "compiled", lambda *networks: Recorded(recorded_again, choose, networks[0].decode))
    tables = measured("correct", "--out", str(tmp_path / "out.md"))
    ways = ["plain, float32", "plain, bfloat16", "fast, float32", "fast, bfloat16", "int8, float32"]
    assert column(tables, gpu.CODES, "way") == [f"{model}, {way}" for model in ("emoji", "d1") for way in ways]
    equal = [float(cell.rstrip("%")) for cell in column(tables, gpu.CODES, "equal")]
    assert equal[0::5] == equal[2::5] == [100, 100]
    assert all(50 < some < 100 for some in [*equal[1::5], *equal[4::5]])
    errors = [float(cell) for cell in column(tables, gpu.CODES, "pictures off by")]
    assert errors[0::5] == [0, 0]
    assert all(0 < error < 0.1 for error in errors[1::5])
    recordings = column(tables, gpu.CODES, "recording as loop, off by")
    assert [recordings[k::5] for k in range(5)] == [["-", "-"]] * 2 + [["100.00%, 0.0e+00"] * 2] * 3


def test_a_recording_that_does_not_read_its_inputs_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "compiled", lambda *networks: Recorded(lambda work: (work(), lambda: None), choose, networks[0].decode))
    networks = partial(gpu.random_networks, 1, torch.device("cpu"))
    ((equal, _, _, recorded),) = gpu.code_rows(networks, Schedule.square([1, 2, 4]), "fast", torch.float32)
    assert equal == "100.00%"
    assert float(recorded.split("%")[0]) < 50


def test_the_parts_of_a_recorded_drawing_are_recorded_on_their_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "compiled", lambda *networks: Recorded(recorded_again, choose, networks[0].decode))
    bench = gpu.Bench(torch.device("cpu"), None, 100, 64)
    bench.rates = rates.Rates(1e9, 2e9, 3e9)
    drawing = gpu.Drawing(partial(gpu.random_networks, 1, bench.device), "fast", torch.float32)
    schedule = Schedule.square([1, 2, 4])
    rows = gpu.part_rows(bench, drawing, schedule, 2, 3)
    assert [row[:2] for row in rows] == [("2", name) for name in ("transformer with its head", "sampling", "decoder", "all")]
    cost = drawing.cost(schedule, 2)
    assert [row[4] for row in rows[1:3]] == [gpu.figure(1e3 * least) for least in floor(cost, bench.rates).parts[-2:]]
    assert [float(row[4]) for row in rows][-1] == pytest.approx(1e3 * floor(cost, bench.rates).all, rel=0.01)
    assert float(rows[0][2]) == pytest.approx(cost.flops.transformer / 1e12, rel=0.01)
    assert_positive([row[5] for row in rows[1:]])


def test_shares_are_said_again_with_the_better_ceilings(monkeypatch) -> None:
    found = [rates.Rates(1e9, 1e9, 1e9), rates.Rates(2e9, 2e9, 2e9)]
    monkeypatch.setattr("benchmarks.rows.measure_rates", lambda *_, **__: found.pop(0))
    bench, said = gpu.Bench(torch.device("cpu"), None, 100, 64), []
    monkeypatch.setattr(bench, "say", said.append)
    cost = plan(TransformerConfig(depth=1, codebook_size=64, code_width=8), gpu.TOKENIZER, [1, 2])
    bench.ceilings("before")
    bench.later(gpu.SHARES, "d1", partial(gpu.share_rows, bench, cost, 1.0))
    ((*_, first, _),) = gpu.share_rows(bench, cost, 1.0)
    bench.end = 0.0  # what needs no time is said all the same
    bench.finish()
    assert "not begun" in said[-3]
    assert said[-1].split("|")[-3].strip() == first
    bench.end = 1e12
    bench.waiting.clear()
    bench.finish()
    ((*_, second, _),) = gpu.share_rows(bench, cost, 1.0)
    assert float(second) == pytest.approx(float(first) / 2, rel=0.01)


def test_targets_stand_beside_what_they_are_for() -> None:
    def target(depth: int, schedule: object, batch: int) -> str:
        return gpu.target_of(plan(TransformerConfig(depth=depth, codebook_size=64, code_width=8), gpu.TOKENIZER, schedule, batch=batch))

    assert [target(16, "10", batch) for batch in (1, 8, 64, 128)] == ["12 ms", "-", "450 pictures/s", "450 pictures/s"]
    assert [target(24, "10", batch) for batch in (1, 64)] == ["25 ms", "180 pictures/s"]
    assert [target(16, "512-15", 1), target(20, "10", 1)] == ["-", "-"]
    assert Schedule.for_size(256, 256, 10) == Schedule.named("10")


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch) -> None:
    def full(transformer: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    def broken(*networks: object) -> None:
        raise TypeError("no such | kernel\nand a second line")

    monkeypatch.setattr(gpu, "to_int8", full)
    monkeypatch.setattr(gpu, "compiled", broken)
    tables = measured("generation", "--batches", "1", "--out", str(tmp_path / "out.md"))
    plain, fast, int8 = tables["Drawing"]
    assert_positive(plain[1:4])
    assert fast[1:] == ["failed: TypeError: no such / kernel", *["-"] * (len(plain) - 2)]
    assert int8[1] == "out of memory"


def test_a_failure_within_another_is_told_and_a_batch_is_halved_until_it_fits() -> None:
    bench = gpu.Bench(torch.device("cpu"), None, 100, 64)

    def capture_fails() -> None:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("capture ended\nmore")

    assert bench._attempted(capture_fails) == [("failed: RuntimeError: capture ended after ValueError: the cause",)]
    tried = []

    def fits_three(batch: int) -> list[tuple[str, ...]]:
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [(str(batch),)]

    assert bench.halved(fits_three, 16) == [("2",)]
    assert tried == [16, 8, 4, 2]
    assert bench._attempted(partial(bench.halved, lambda batch: fits_three(batch + 3), 2)) == [("out of memory",)]


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    tables = measured("all", "--limit", "0", "--out", str(tmp_path / "out.md"))
    assert len(tables) == 7
    assert {row[1] for rows in tables.values() for row in rows} == {"not begun, the time was up"}


def test_larger_pictures_are_drawn_by_the_deepest_model(tmp_path: Path) -> None:
    tables = measured("generation", "--depths", "1,24", "--limit", "0", "--out", str(tmp_path / "out.md"))
    names = column(tables, gpu.DRAWING, "way")
    assert [names.count(f"d24, 512 px, {way}") for way in ("plain", "fast", "int8")] == [2, 2, 2]
    assert not any(name.startswith("d1, 512") for name in names)


def test_without_cuda_it_says_so_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "benchmarks.gpu: there is no CUDA here; run it on a machine with a GPU, or with --device cpu\n"
