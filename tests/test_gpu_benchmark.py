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

from flexvar import Schedule, TokenizerConfig
from flexvar.compiled import Recorded, Work
from flexvar.sampling import choose

TINY = ["--device", "cpu", "--depths", "1", "--size", "64", "--steps", "3", "--batches", "1,2", "--repeats", "1", "--training-batch", "1"]

pytestmark = pytest.mark.filterwarnings("ignore:64x64 px is drawn in 2 steps")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    """A tokenizer that paints quickly, and few pictures; torch's settings stay as they were."""
    tokenizer = TokenizerConfig(channels=8, blocks=1, z_channels=8, norm_groups=4, codebook_size=64, code_width=8)
    monkeypatch.setattr(gpu, "TOKENIZER", tokenizer)
    monkeypatch.setattr(gpu, "COMPARED", 3)
    convolutions = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = convolutions


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
    tables = (CEILINGS, gpu.CODES, gpu.DRAWING, gpu.KERNELS, gpu.TRANSFORMER, gpu.TOKENIZER_STEP)
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
    for name in ("pictures/s", "ms", "first s", "share of the floor", "with weights read"):
        assert_positive(column(tables, gpu.DRAWING, name))
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
    ways = ["by-scale, recompute", "by-scale", "mask", "padded", "flex"]
    rows = dict(zip(ways, tables[gpu.TRANSFORMER[0]], strict=True))
    assert [row[0] for row in rows.values()] == [f"d1, {way}" for way in ways]
    assert rows.pop("flex")[1].startswith("failed: ValueError: attention 'flex' gives no gradients on cpu")
    for row in rows.values():
        assert_positive([*row[1:4], row[5], row[7]])
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


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    tables = measured("all", "--limit", "0", "--out", str(tmp_path / "out.md"))
    assert len(tables) == 6
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
