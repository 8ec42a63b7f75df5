from __future__ import annotations

import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch

from flexvar import Guidance, Sampling, Schedule, sampling
from flexvar.sampling import candidates, choose, uniform_numbers


def test_guidance_weights() -> None:
    schedule = Schedule.square([1, 2, 4, 8, 16])
    assert Guidance("constant", 3.0).weights(schedule) == (3.0,) * 5
    assert Guidance("ramp", 3.0).weights(schedule) == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert Guidance("official-ramp", 2.0).weights(schedule) == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert Guidance("ramp", 1.0).weights(schedule) == Guidance("constant", 1.0).weights(schedule) == (1.0,) * 5
    assert Guidance("official-ramp", 0.0).weights(schedule) == (1.0,) * 5


def test_the_official_ramp_overshoots_and_ends_beyond_the_trained_grid() -> None:
    assert Guidance("official-ramp", 2.5).weights(Schedule.named("13"))[-1] == pytest.approx(1 + 2.5 * 12 / 9)
    weights = Guidance("official-ramp", 3.0).weights(Schedule.named("512-15"))
    assert weights[-2:] == (4.0, 4.0)
    assert weights[12] == pytest.approx(1 + 3.0 * 12 / 9)
    assert Guidance("official-ramp", 3.0).weights([(16, 17)]) == (4.0,)


@pytest.mark.parametrize(("kind", "end"), [("ramp", 2.5), ("constant", 2.5), ("official-ramp", 3.5)])
def test_one_scale_takes_the_end_value(kind: str, end: float) -> None:
    assert Guidance(kind, 2.5).weights([(4, 4)]) == (end,)  # type: ignore[arg-type]


def test_greedy_scales() -> None:
    greedy = Sampling(greedy="official").greedy_scales(Schedule.named("512-15"))
    drawn_greedily = [h for (h, _), flag in zip(Schedule.named("512-15"), greedy, strict=True) if flag]
    assert drawn_greedily == [7, 9, 12, 14, 23, 32]
    oblong = [(1, 1), (7, 9), (16, 16), (12, 24)]
    assert Sampling(greedy="official").greedy_scales(oblong) == (False, False, False, True)
    assert Sampling(greedy="none").greedy_scales(oblong) == (False,) * 4
    assert Sampling(greedy=(16, (7, 9))).greedy_scales(oblong) == (False, True, True, False)


WRONG = {
    "top_k": [-1, 2.5, "5", None, True],
    "top_p": [1.5, -0.1, math.nan, "0.9", True],
    "temperature": [0.0, 1e-38, math.nan, math.inf, "1"],
    "greedy": ["all", 3, 1.5, [1.5], ["2"], [(1, 2, 3)], [None], [True]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_settings(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; give ")):
        Sampling(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e300, 10**400, "2", [2.0], np.array([2.5, 3.0]), True, None])
def test_wrong_guidance(scale: object) -> None:
    with pytest.raises(ValueError, match=r"the guidance scale is .{1,60}; give a finite number"):
        Guidance("ramp", scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the guidance scale is a very large int; give"):
        Guidance("ramp", 10**5000)  # of which Python writes no digits
    with pytest.raises(ValueError, match="kind"):
        Guidance("linear", 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [-1, 2.0, "3", torch.tensor(2.5)])
def test_wrong_stops_of_guidance(stop: object) -> None:
    with pytest.raises(ValueError, match=r"guidance_stop is .*; give how many"):
        Guidance("ramp", 2.0, stop=stop)  # type: ignore[arg-type]


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    for stop in (np.int64(2), torch.tensor(2)):
        assert repr(Guidance("ramp", 2.0, stop=stop)) == repr(Guidance("ramp", 2.0, stop=2))  # type: ignore[arg-type]
    assert hash(Sampling(torch.tensor(3))) == hash(Sampling(3))  # type: ignore[arg-type]
    assert Guidance("ramp", np.float32(2)).scale == Guidance("ramp", torch.tensor(2.0)).scale == 2.0  # type: ignore[arg-type]
    assert Guidance("ramp", Decimal(2)).scale == 2.0  # type: ignore[arg-type]
    given = Sampling(np.int64(3), np.float32(0.5), torch.tensor(1.0), np.array([2, 4]))  # type: ignore[arg-type]
    assert given == Sampling(3, 0.5, 1.0, (2, 4))
    assert Sampling(greedy=torch.tensor([[1, 2], [3, 4]])).greedy == ((1, 2), (3, 4))  # type: ignore[arg-type]


def test_numbers_depend_on_the_seed_alone() -> None:
    alone, among = uniform_numbers([7], 50), uniform_numbers([3, 7, 9], 50)
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[0], among[2])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (0, 1.0), (5, 0.0), (0, 0.6), (7, 0.8)])
def test_chosen_codes_follow_the_candidates(top_k: int, top_p: float) -> None:
    logits = 1.5 * torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(1))
    probabilities, codes = candidates(logits, top_k, top_p)
    expected = torch.zeros(12).scatter(0, codes[0, 0], probabilities[0, 0])
    assert expected.sum() == pytest.approx(1)
    count = 40000
    numbers = (torch.arange(count) + 0.5)[None] / count  # evenly spread, so that the shares are exact
    chosen = choose(logits.expand(1, count, 12), numbers, Sampling(top_k, top_p, greedy="none"))
    assert torch.allclose(torch.bincount(chosen[0], minlength=12) / count, expected, atol=1e-3)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_codes_of_many_tokens_are_chosen_in_parts(top_k: int, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, numbers = torch.randn(3, 7, 20, generator=generator), torch.rand(3, 7, generator=generator)
    together, seen = choose(logits, numbers, Sampling(top_k, 0.9)), []
    monkeypatch.setattr(sampling, "MOST_CANDIDATES", 41)
    monkeypatch.setattr(sampling, "candidates", lambda logits, *rest: (seen.append(len(logits)), candidates(logits, *rest))[1])
    assert torch.equal(choose(logits, numbers, Sampling(top_k, 0.9)), together)
    assert seen == ([8, 8, 5] if top_k else [2] * 10 + [1])


def test_edges() -> None:
    logits = torch.randn(2, 3, 20)
    top = logits.argmax(-1)
    sampling = Sampling(top_k=0, top_p=0.0)
    assert torch.equal(choose(logits, torch.rand(2, 3), Sampling(top_k=1)), top)
    assert torch.equal(choose(logits, torch.rand(2, 3), sampling, greedy=True), top)
    assert torch.equal(choose(logits, torch.zeros(2, 3), sampling), top)
    assert torch.equal(choose(logits, torch.ones(2, 3), Sampling(top_k=6, top_p=0.0)), logits.topk(6).indices[..., -1])
    assert torch.equal(choose(logits, torch.rand(2, 3), Sampling(top_k=0, top_p=1e-6)), top)
    assert torch.equal(choose(logits, torch.rand(2, 3), Sampling(top_k=0, top_p=0.0, temperature=1e-4)), top)


def test_logits_that_are_no_numbers_still_give_codes() -> None:
    assert choose(torch.full((1, 2, 50), math.nan), torch.rand(1, 2), Sampling()).shape == (1, 2)


def test_a_seed_means_the_same_whatever_torch_draws_by_default() -> None:
    expected = uniform_numbers([3], 4)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(uniform_numbers([3], 4), expected)
    finally:
        torch.set_default_dtype(torch.float32)
