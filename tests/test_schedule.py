from __future__ import annotations

import math
import random
import statistics
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexvar import Schedule
from flexvar.schedule import NAMED, ROWS

PUBLISHED_TOKENS = {
    "6": 413, "7": 480, "8": 591, "9": 629, "10": 680, "11": 767, "12": 900, "13": 981, "14": 1102,
    "384-11": 1256, "512-12": 2233, "512-15": 2534,
}  # fmt: skip


def test_published_schedules() -> None:
    assert {name: Schedule.named(name).tokens for name in PUBLISHED_TOKENS} == PUBLISHED_TOKENS
    assert set(NAMED) == {*PUBLISHED_TOKENS, "8-script"}
    assert [h for h, _ in Schedule.named("8-script")] == [1, 2, 3, 5, 7, 10, 13, 16]
    assert all(len(row) == steps for steps, row in ROWS.items())


def test_for_size_gives_the_published_ones() -> None:
    for steps in ROWS:
        assert Schedule.for_size(256, 256, steps) == Schedule.named(str(steps))
    assert Schedule.for_size(384, 384, 11) == Schedule.named("384-11")
    assert Schedule.for_size(512, 512, 12) == Schedule.named("512-12")
    assert Schedule.for_size(512, 512, 15) == Schedule.named("512-15")


def test_oblong_follows_the_paper() -> None:
    assert Schedule.for_size(128, 384, 6).sizes == ((1, 1), (1, 3), (2, 6), (3, 9), (5, 15), (8, 24))
    narrow = Schedule.for_size(512, 32, 10)
    assert narrow[0] == (1, 1)
    assert narrow[-1] == (32, 2)
    assert min(w for _, w in narrow) == 1


@given(h=st.integers(1, 48), w=st.integers(1, 48), steps=st.integers(2, 24), trained_grid=st.sampled_from([8, 16, 32]))
def test_any_size(h: int, w: int, steps: int, trained_grid: int) -> None:
    schedule = Schedule.for_grid(h, w, steps, trained_grid)
    assert schedule[-1] == (h, w)
    assert schedule[0] == (1, 1)
    assert len(schedule) <= max(steps, 2)
    assert len(set(schedule)) == len(schedule)
    assert all(a <= c and b <= d for (a, b), (c, d) in zip(schedule, schedule.sizes[1:], strict=False))
    assert len(schedule) <= Schedule.max_steps(h, w, trained_grid)


def test_small_pictures_warn_once_and_in_one_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = Schedule.for_size(64, 64, 10, downsample=8, trained_grid=8)
    assert [h for h, _ in schedule] == [1, 2, 3, 4, 5, 6, 8]
    assert [str(one.message) for one in caught] == ["64x64 px is drawn in 7 steps instead of 10: equal scales merge (at most 8 differ)"]


@pytest.mark.parametrize(("height", "width", "named"), [(100, 128, "96 or 112"), (128, 7, "16"), (0, 16, "16"), (-16, 16, "16")])
def test_impossible_sizes_name_the_nearest(height: int, width: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Schedule.for_size(height, width, 10)


def test_lists_words_and_mistakes() -> None:
    assert Schedule.of([1, (2, 3), [4, 6]]).sizes == ((1, 1), (2, 3), (4, 6))
    assert Schedule.of([5, 5]).tokens == 50
    assert Schedule.parse("1,2,4") == Schedule.square([1, 2, 4])
    assert Schedule.parse("1x1, 2x3") == Schedule.of([1, (2, 3)])
    assert Schedule.parse(" 512-15").tokens == 2534
    for text in ("", "1,,2", "a", "1x2x3", "1;2"):
        with pytest.raises(ValueError, match="is not a schedule"):
            Schedule.parse(text)
    for number in ("5", "15", " 16"):
        with pytest.raises(
            ValueError, match=f"'{number.strip()}' is no published schedule .*; write one scale as 5x5, or ask for a number of steps"
        ):
            Schedule.parse(number)
    assert Schedule([1, [2, 3]]) == Schedule(((1, 1), (2, 3)))  # type: ignore[arg-type,list-item]
    for array in (np.array([[1, 1], [2, 3]]), torch.tensor([[1, 1], [2, 3]]), [np.array([1, 1]), torch.tensor([2, 3])]):
        assert Schedule.of(array) == Schedule.of([1, (2, 3)])  # type: ignore[arg-type]
    assert Schedule.of([np.int64(1), torch.tensor(2)]) == Schedule.square([1, 2])  # type: ignore[list-item]
    for wrong in (((2.5, 2.5),), [True], ["2"], [(1, 2, 3)], 3):
        with pytest.raises(ValueError, match="is not a list of scales"):
            Schedule(wrong)  # type: ignore[arg-type]
    for words, complaint in (
        (("64", 64), "height is '64'; give an integer"),
        ((64.0, 64), "height is 64.0; give an integer"),
        ((64, math.nan), "width is nan; give an integer"),
        ((64, 64, 2.5), "steps is 2.5; give an integer"),
        ((64, 64, 10, 0), "downsample is 0; give how many pixels"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Schedule.for_size(*words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one scale"):
        Schedule.of([])
    with pytest.raises(ValueError, match="shrinks from 4x4 to 4x2 at scale 1"):
        Schedule.of([4, (4, 2)])
    with pytest.raises(ValueError, match="at least 1"):
        Schedule.of([0])
    with pytest.raises(ValueError, match="at least 2"):
        Schedule.for_size(256, 256, 1)
    with pytest.raises(ValueError, match="there are 6, 7"):
        Schedule.named("5")
    with pytest.raises(ValueError, match="ends at 4x8 does not grow to 8x6; give a grid at least as large on both sides"):
        Schedule.of([1, (4, 8)]).grown(8, 6)


def test_slices_cover_the_tokens() -> None:
    schedule = Schedule.of([2, (2, 3), 5])
    assert schedule.first == 4
    assert schedule.slices == (slice(0, 4), slice(4, 10), slice(10, 35))
    assert schedule.tokens == 35


def test_released_random_schedules_have_the_published_statistics() -> None:
    rng = random.Random(0)
    drawn = [Schedule.random("released", rng) for _ in range(20000)]
    last = [schedule[-1][0] for schedule in drawn]
    for side, share in ((16, 0.666), (15, 0.137), (14, 0.102), (13, 0.064), (12, 0.028)):
        assert last.count(side) / len(drawn) == pytest.approx(share, abs=0.012), side
    lengths = [len(schedule) for schedule in drawn]
    for length, share in ((10, 0.049), (9, 0.476), (8, 0.393), (7, 0.066)):
        assert lengths.count(length) / len(drawn) == pytest.approx(share, abs=0.012), length
    assert statistics.mean(schedule.tokens for schedule in drawn) == pytest.approx(591, abs=2)
    assert max(schedule.tokens for schedule in drawn) <= 680


def test_paper_random_schedules() -> None:
    rng = random.Random(0)
    drawn = [Schedule.random("paper", rng) for _ in range(5000)]
    assert all(schedule[0] == (1, 1) and schedule[-1] == (16, 16) and 6 <= len(schedule) <= 10 for schedule in drawn)
    assert statistics.mean(schedule.tokens for schedule in drawn) == pytest.approx(930, abs=15)
    assert statistics.mean(len(schedule) == 10 for schedule in drawn) == pytest.approx(0.95**8, abs=0.02)
    assert Schedule.random("paper", random.Random(1), 4, 12)[-1] == (4, 12)
    with pytest.raises(ValueError, match="paper, released"):
        Schedule.random("other", rng)  # type: ignore[arg-type]
