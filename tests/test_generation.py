from __future__ import annotations

import copy
import importlib
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexvar
from flexvar import Guidance, Keep, Sampling, Schedule, Tokenizer, Transformer, generate
from flexvar.arguments import seeds_of
from flexvar.generation import draw_scales
from flexvar.kv_cache import KeyValueCache
from flexvar.sampling import choose

SCHEDULE = Schedule.of([1, (1, 2), (3, 4), (4, 6)])


def codes_of(tokenizer: Tokenizer, transformer: Transformer, labels: list[int], seeds: list[int], **settings) -> torch.Tensor:
    schedule = settings.pop("schedule", SCHEDULE)
    steps = generate(tokenizer, transformer, labels, schedule, seeds=seeds, **settings)
    return torch.cat([step.codes.flatten(1) for step in steps], 1)


def test_generate_stays_the_function() -> None:
    importlib.import_module("flexvar.generation")
    assert callable(flexvar.generate)
    from flexvar import generate as again

    assert again is flexvar.generate


def test_every_scale_is_a_picture(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    steps = list(generate(small_tokenizer, small_transformer, [0, 5], SCHEDULE, seeds=[1, 2]))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.size for step in steps] == list(SCHEDULE)
    for step in steps:
        assert step.codes.shape == (2, *step.size)
        assert step.codes.dtype == torch.int64
        assert step.images.shape == (2, 3, 4 * step.size[0], 4 * step.size[1])
        assert step.images is step.images


def test_pictures_are_decoded_only_when_asked_for(small_tokenizer: Tokenizer, small_transformer: Transformer, monkeypatch) -> None:
    decoded = []
    monkeypatch.setattr(Tokenizer, "decode", lambda self, codes: decoded.append(codes.shape) or codes)
    steps = list(generate(small_tokenizer, small_transformer, [0], SCHEDULE, seeds=[1]))
    assert not decoded
    _ = steps[1].images
    assert decoded == [(1, 1, 2)]


def test_numbers_that_are_not_finite_give_no_picture(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    broken = copy.deepcopy(small_transformer)
    broken.blocks[1].mlp.fall.bias[3] = torch.inf
    *_, last = generate(small_tokenizer, broken, [0, 5], SCHEDULE, seeds=[1, 2])
    assert 0 <= last.codes.min() <= last.codes.max() < 48  # these alone would be decoded
    with pytest.raises(ValueError, match="not finite; check its weights, or draw in float32"):
        _ = last.images


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_picture_depends_on_its_own_seed_and_label_alone(data, small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    count = data.draw(st.integers(1, 5))
    labels = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    seeds = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count))
    guidance = Guidance("ramp", data.draw(st.sampled_from([1.0, 3.0])))
    sampling = Sampling(top_k=data.draw(st.sampled_from([0, 7])), top_p=0.9, greedy="none")
    together = codes_of(small_tokenizer, small_transformer, labels, seeds, guidance=guidance, sampling=sampling)
    alone = data.draw(st.integers(0, count - 1))
    single = codes_of(small_tokenizer, small_transformer, [labels[alone]], [seeds[alone]], guidance=guidance, sampling=sampling)
    assert torch.equal(single[0], together[alone])


def test_seeds_and_labels_matter(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    codes = codes_of(small_tokenizer, small_transformer, [0, 0, 1], [1, 2, 1], sampling=Sampling(greedy="none"))
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_guidance_folded_before_the_head_is_guidance_of_the_logits(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    """The plain path: two separate passes over the true codes so far, guided logits, the likeliest code."""
    guidance, labels = Guidance("constant", 3.0), torch.tensor([0, 3])
    drawn = list(generate(small_tokenizer, small_transformer, labels, SCHEDULE, guidance=guidance, sampling=Sampling(top_k=1)))
    inputs = small_tokenizer.inputs([step.codes for step in drawn], SCHEDULE)
    with_class = small_transformer(labels, inputs, SCHEDULE)
    without = small_transformer(torch.full_like(labels, 5), inputs, SCHEDULE)
    expected = (without + 3.0 * (with_class - without)).argmax(-1)
    assert torch.equal(torch.cat([step.codes.flatten(1) for step in drawn], 1), expected)
    assert not torch.equal(expected, with_class.argmax(-1))


def test_split_guidance_draws_the_same(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    one, two = (
        codes_of(small_tokenizer, small_transformer, [1, 2, 3], [4, 5, 6], guidance=Guidance("ramp", 2.5, split=split))
        for split in (False, True)
    )
    assert torch.equal(one, two)


def test_guidance_switched_off_halves_the_work(small_tokenizer: Tokenizer, small_transformer: Transformer, monkeypatch) -> None:
    rows = []
    plain = KeyValueCache.extend
    monkeypatch.setattr(KeyValueCache, "extend", lambda self, block, k, v: (rows.append(len(k)), plain(self, block, k, v))[1])
    off = [Guidance("constant", 1.0), Guidance("ramp", 1.0), Guidance("official-ramp", 0.0)]
    codes = [codes_of(small_tokenizer, small_transformer, [1, 2], [3, 4], guidance=guidance) for guidance in off]
    assert set(rows) == {2}
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])
    codes_of(small_tokenizer, small_transformer, [1, 2], [3, 4], guidance=Guidance("ramp", 2.0))
    assert set(rows) == {2, 4}


@pytest.mark.parametrize("kind", ["constant", "ramp", "official-ramp"])
@pytest.mark.parametrize("split", [False, True])
def test_without_a_class_there_is_nothing_to_guide(
    small_tokenizer: Tokenizer, small_transformer: Transformer, monkeypatch: pytest.MonkeyPatch, kind: str, split: bool
) -> None:
    rows, plain = [], KeyValueCache.extend
    monkeypatch.setattr(KeyValueCache, "extend", lambda self, block, k, v: (rows.append(len(k)), plain(self, block, k, v))[1])
    drawing = small_tokenizer, small_transformer, [5, 5], [3, 4]
    guidance = Guidance(kind, 3.0, split)  # type: ignore[arg-type]
    quick = codes_of(*drawing, guidance=guidance)
    assert sum(rows) == 2 * small_transformer.config.depth * len(SCHEDULE)
    mixed = codes_of(small_tokenizer, small_transformer, [5, 5, 1], [3, 4, 6], guidance=guidance)
    assert torch.equal(quick, mixed[:2])
    rows.clear()
    monkeypatch.setattr("flexvar.generation.needed_guidance", lambda guidance, *_: guidance)
    assert torch.equal(quick, codes_of(*drawing, guidance=guidance))
    assert sum(rows) > 2 * small_transformer.config.depth * len(SCHEDULE)  # both halves


@pytest.mark.parametrize("schedule", [[3], [(2, 2), (2, 2), (2, 5)], [1, 6, 9]])
def test_hand_made_schedules(small_tokenizer: Tokenizer, small_transformer: Transformer, schedule: list) -> None:
    codes = codes_of(small_tokenizer, small_transformer, [0], [1], schedule=schedule)
    assert codes.shape == (1, Schedule.of(schedule).tokens)


def test_kept_codes_stay_and_steer(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    plain = list(generate(small_tokenizer, small_transformer, [1], SCHEDULE, seeds=[1]))
    given_codes = [(step.codes + 1) % 48 for step in plain]
    left = [torch.arange(w).expand(1, h, w) < w // 2 for h, w in SCHEDULE]
    steps = list(generate(small_tokenizer, small_transformer, [1], SCHEDULE, seeds=[1], keep=Keep(given_codes, left, upto=3)))
    for step, kept, where in zip(steps[:3], given_codes, left, strict=False):
        assert torch.equal(step.codes[where], kept[where])
    assert not torch.equal(steps[3].codes[left[3]], given_codes[3][left[3]])
    everything = list(generate(small_tokenizer, small_transformer, [1, 2], SCHEDULE, seeds=[1, 2], keep=Keep(given_codes)))
    assert all(torch.equal(step.codes, kept.expand(2, -1, -1)) for step, kept in zip(everything, given_codes, strict=True))
    with pytest.raises(ValueError, match="kept codes of scale 1 has shape"):
        list(generate(small_tokenizer, small_transformer, [1], SCHEDULE, keep=Keep([given_codes[0], given_codes[0]])))


class OwnKeep(Keep):
    """A way to keep of somebody else's."""


def test_all_of_a_request_is_moved_before_the_first_scale(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    elsewhere, requests = copy.deepcopy(small_transformer).to("meta"), []
    codes = [torch.zeros(1, *size, dtype=torch.int32) for size in SCHEDULE]
    keep = OwnKeep(codes, [torch.ones_like(scale) for scale in codes], upto=2)
    generate(small_tokenizer, elsewhere, [0, 1], SCHEDULE, keep=keep, draw=lambda *given: (requests.append(given[2]), iter(()))[1])
    (request,) = requests
    assert {(tensor.device.type, tensor.dtype) for tensor in request.keep.codes} == {("meta", torch.int64)}
    assert {(tensor.device.type, tensor.dtype) for tensor in request.keep.where} == {("meta", torch.bool)}
    assert {request.labels.device.type, request.numbers.device.type} == {"meta"}
    assert (type(request.keep), len(request.keep)) == (OwnKeep, 2)


def test_kept_codes_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at codes on a GPU waits for it."""
    keep, looks, tolist = Keep([torch.zeros(1, *size, dtype=torch.int64) for size in SCHEDULE]), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("one more look"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (looks.append(len(self)), tolist(self))[1])
    keep.check(SCHEDULE, 2, 48)
    assert looks == [len(SCHEDULE)]
    with pytest.raises(ValueError, match="the kept codes of scale 2 must be integers from 0 to 47"):
        Keep([*keep.codes[:2], keep.codes[2] - 1, keep.codes[3]]).check(SCHEDULE, 2, 48)


@pytest.mark.parametrize("labels", [[], [-1], [6], "pizza", ["pizza"], [1.0], [True], None, 10**30])
def test_labels_out_of_range(small_tokenizer: Tokenizer, small_transformer: Transformer, labels: Any) -> None:
    with pytest.raises(ValueError, match="from 0 to 5"):
        next(generate(small_tokenizer, small_transformer, labels, SCHEDULE))


def test_seeds_of_the_wrong_length(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="2 seeds were given for 1 pictures"):
        next(generate(small_tokenizer, small_transformer, [0], SCHEDULE, seeds=[1, 2]))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 1.0, "1"])
def test_seeds_of_the_wrong_kind(small_tokenizer: Tokenizer, small_transformer: Transformer, seed: object) -> None:
    with pytest.raises(ValueError, match=r"a seed is .*; give (an integer|integers from 0 to 4294967295)"):
        generate(small_tokenizer, small_transformer, [0], SCHEDULE, seeds=[seed])  # type: ignore[list-item]


def test_every_kind_of_integer_is_a_seed(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    expected = codes_of(small_tokenizer, small_transformer, [0, 1], [3, 4])
    for seeds in (np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), torch.tensor(4)], range(3, 5), 3):
        assert torch.equal(codes_of(small_tokenizer, small_transformer, [0, 1], seeds), expected)  # type: ignore[arg-type]


def test_seeds_that_are_drawn_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [number for _ in range(50) for number in seeds_of(None, 3)]
    assert 0 <= min(drawn) < max(drawn) < 2**32
    assert max(drawn) > 2**31
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.full(shape, high - 1))
    last = seeds_of(None, 3)
    assert len(set(last)) == 3
    assert max(last) < 2**32


def test_a_cache_too_small_says_so() -> None:
    cache = KeyValueCache(1, 1, 1, 3, 2, dtype=torch.float32, device=torch.device("cpu"))
    for _ in range(2):
        cache.extend(0, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
        cache.advance(2)
    with pytest.raises(ValueError, match="room for 3 tokens before the last scale and was given 4"):
        cache.extend(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_guidance_that_stops_drops_a_half_and_nothing_else(
    small_tokenizer: Tokenizer, small_transformer: Transformer, monkeypatch: pytest.MonkeyPatch, stop: int, split: bool
) -> None:
    class Both(Guidance):
        """As good as 1 instead of 1, so that both halves are computed to the end."""

        def weights(self, *arguments) -> tuple[float, ...]:
            return tuple(1 + 1e-9 if weight == 1 else weight for weight in super().weights(*arguments))

    guidance = ("constant", 3.0, split, stop)
    expected = codes_of(small_tokenizer, small_transformer, [1, 2], [3, 4], guidance=Both(*guidance))
    rows, plain = [], KeyValueCache.extend
    monkeypatch.setattr(KeyValueCache, "extend", lambda self, block, k, v: (rows.append(len(k)), plain(self, block, k, v))[1])
    assert torch.equal(codes_of(small_tokenizer, small_transformer, [1, 2], [3, 4], guidance=Guidance(*guidance)), expected)
    depth = small_transformer.config.depth
    assert sum(rows) == depth * (2 * len(SCHEDULE) + 2 * stop)


def test_decoding_gets_the_memory_of_the_cache(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    caches, new_cache = [], small_transformer.new_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_transformer, "new_cache", lambda *given: (caches.append(weakref.ref(cache := new_cache(*given))), cache)[1])
        for step in generate(small_tokenizer, small_transformer, [1], SCHEDULE, guidance=Guidance("constant", 2.0), seeds=[1]):
            assert (caches[0]() is None) == (step.index == len(SCHEDULE) - 1)


def test_half_precision_runs(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    tokenizer, transformer = copy.deepcopy(small_tokenizer).bfloat16(), copy.deepcopy(small_transformer).bfloat16()
    *_, last = generate(tokenizer, transformer, [0, 1], SCHEDULE, seeds=[1, 2])
    assert last.images.dtype == torch.bfloat16
    assert torch.isfinite(last.images.float()).all()


def test_half_precision_draws_from_logits_in_float32(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(logits)
        return choose(logits, *rest)

    tokenizer, transformer = copy.deepcopy(small_tokenizer).bfloat16(), copy.deepcopy(small_transformer).bfloat16()
    list(generate(tokenizer, transformer, [0, 1], SCHEDULE, seeds=[1, 2], draw=partial(draw_scales, choose=watched)))
    assert {logits.dtype for logits in seen} == {torch.float32}
    assert not any(torch.equal(logits, logits.bfloat16().float()) for logits in seen)


def test_autocast_does_not_round_the_logits(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(logits)
        return choose(logits, *rest)

    with torch.autocast("cpu", torch.bfloat16):
        list(generate(small_tokenizer, small_transformer, [0, 1], SCHEDULE, seeds=[1, 2], draw=partial(draw_scales, choose=watched)))
    assert not any(torch.equal(logits, logits.bfloat16().float()) for logits in seen)


def test_a_drawing_may_enter_and_leave_inference_mode(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    expected = list(generate(small_tokenizer, small_transformer, [0, 1], SCHEDULE, seeds=[1, 2]))
    drawing, found = generate(small_tokenizer, small_transformer, [0, 1], SCHEDULE, seeds=[1, 2]), []
    for k in range(len(SCHEDULE)):
        with torch.inference_mode(k % 2 == 0):
            found.append(next(drawing))
    assert all(torch.equal(ours.codes, theirs.codes) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (Keep([torch.zeros(3, 1, 1, dtype=torch.int64)]), "shape"),
        (Keep([torch.zeros(1, 1, 1)]), "integers from 0 to 47"),
        (Keep([torch.full((1, 1, 1), 48)]), "integers from 0 to 47"),
        (Keep([torch.zeros(1, 1, 1, dtype=torch.int64)], [torch.ones(1, 2, 2)]), "the kept map of scale 0"),
        (Keep([torch.zeros(1, 1, 1, dtype=torch.int64)] * 5), "5 scales are to be kept, but the schedule draws 4"),
        (Keep([torch.zeros(1, 1, 1, dtype=torch.int64)], upto=-1), "upto is -1"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(small_tokenizer: Tokenizer, small_transformer: Transformer, keep: Keep, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(small_tokenizer, small_transformer, [0, 1], SCHEDULE, keep=keep)


def test_settings_of_another_kind_are_told(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    with pytest.raises(ValueError, match=r"guidance is 2; give a flexvar\.Guidance"):
        generate(small_tokenizer, small_transformer, [0], SCHEDULE, guidance=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sampling is 0; give a flexvar\.Sampling"):
        generate(small_tokenizer, small_transformer, [0], SCHEDULE, sampling=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("codes", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 2)])
def test_what_cannot_be_decoded_is_told(small_tokenizer: Tokenizer, codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"codes are torch\..*; give int64 \(B, h, w\)"):
        small_tokenizer.decode(codes)
