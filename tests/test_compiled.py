"""The faster ways of `pipe.compile()` against the plain one: the same pictures up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexvar import FlexVARPipeline, Guidance, Keep, Sampling, Schedule, Tokenizer, Transformer, generate
from flexvar.checkpoint import Defaults, Model
from flexvar.compiled import MOST_RECORDINGS, Recorded, Work, compiled, fuse
from flexvar.generation import draw_scales
from flexvar.linear import PackedLinear
from flexvar.sampling import choose

SCHEDULE = Schedule.of([1, (1, 2), (3, 4), (4, 6)])


def recorded_again(work: Work) -> tuple[list[Tensor], Callable[[], None]]:
    """Stands in for a CUDA graph: replaying does the work again, from the same inputs into the same tensors."""
    filled = [tensor.clone() for tensor in work()]

    def replay() -> None:
        for tensor, result in zip(filled, work(), strict=True):
            tensor.copy_(result)

    return filled, replay


@pytest.fixture
def networks(small_tokenizer: Tokenizer, small_transformer: Transformer) -> tuple[Tokenizer, Transformer]:
    return copy.deepcopy(small_tokenizer), copy.deepcopy(small_transformer)


@pytest.fixture
def pipe(networks: tuple[Tokenizer, Transformer]) -> FlexVARPipeline:
    return FlexVARPipeline(Model(*networks, tuple("abcde"), Defaults(16, 24, 5)))


def logits_of(networks: tuple[Tokenizer, Transformer]) -> Tensor:
    """What the transformer says of random codes, with its cache: all scales side by side."""
    seen = []

    def watched(logits: Tensor, numbers: Tensor, sampling: Sampling, greedy: bool = False) -> Tensor:
        seen.append(logits)
        return choose(logits, numbers, sampling, greedy)

    generator = torch.Generator().manual_seed(0)
    kept = Keep([torch.randint(48, (2, *size), generator=generator) for size in SCHEDULE])
    list(generate(*networks, [0, 1], SCHEDULE, keep=kept, seeds=[1, 2], draw=partial(draw_scales, choose=watched)))
    return torch.cat(seen, 1)


def test_packed_layers_say_the_same_logits(networks: tuple[Tokenizer, Transformer]) -> None:
    plain = logits_of(networks)
    compiled(*networks)
    assert isinstance(networks[1].layers[0].mlp.rise, PackedLinear)
    packed = logits_of(networks)
    assert torch.allclose(packed, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(packed, plain)  # by other kernels


def test_the_pipeline_draws_the_same_pictures(pipe: FlexVARPipeline) -> None:
    before = pipe(list("abc"), seed=3, output_type="pt")
    after = pipe.compile().compile()(list("abc"), seed=3, output_type="pt")
    assert torch.allclose(before.images, after.images, atol=1e-4)


def test_8_bits_and_compiled_go_together_in_this_order_only(pipe: FlexVARPipeline) -> None:
    before = pipe.to_int8()("a", seed=3, output_type="pt")
    assert torch.allclose(pipe.compile()("a", seed=3, output_type="pt").images, before.images, atol=1e-6)
    with pytest.raises(ValueError, match=r"made faster \(of 8-bit weights and compiled\) stays where it is"):
        pipe.to_int8()


def test_what_a_compiled_model_cannot_do_is_told(pipe: FlexVARPipeline, tmp_path: Path) -> None:
    pipe.compile()
    for wrong in (lambda: pipe.to("cpu"), lambda: pipe.save_pretrained(tmp_path), pipe.to_int8, lambda: pipe.save_released(tmp_path)):
        with pytest.raises(ValueError, match=r"made faster \(compiled\) stays where it is and is not saved; load it again"):
            wrong()


def test_half_precision_on_a_cpu_keeps_its_layers(pipe: FlexVARPipeline) -> None:
    pipe.to(torch.bfloat16)
    before = pipe("a", seed=3, output_type="pt")
    assert torch.equal(pipe.compile()("a", seed=3, output_type="pt").images, before.images)


# -- recordings --


def test_a_recording_draws_what_the_loop_draws(networks: tuple[Tokenizer, Transformer]) -> None:
    draw = Recorded(recorded_again, choose)
    for labels, seeds in (([0, 1, 2], [5, 6, 7]), ([2, 0, 1], [9, 5, 1]), ([4], [7])):  # the last one in a part of the batch
        plain = list(generate(*networks, labels, SCHEDULE, seeds=seeds))
        steps = list(generate(*networks, labels, SCHEDULE, seeds=seeds, draw=draw))
        assert [(step.index, step.size) for step in steps] == [(step.index, step.size) for step in plain]
        assert all(torch.equal(one.codes, other.codes) for one, other in zip(steps, plain, strict=True))
        assert all(torch.allclose(one.images, other.images, atol=1e-6) for one, other in zip(steps, plain, strict=True))
    assert len(draw.recordings) == 1


def test_what_was_drawn_stays_when_the_next_is_drawn(networks: tuple[Tokenizer, Transformer]) -> None:
    draw = Recorded(recorded_again, choose)
    *_, first = generate(*networks, [0], SCHEDULE, seeds=[1], draw=draw)
    codes, images = first.codes.clone(), first.images.clone()
    list(generate(*networks, [3], SCHEDULE, seeds=[2], draw=draw))
    assert torch.equal(first.codes, codes)
    assert torch.equal(first.images, images)


def test_other_settings_and_larger_batches_get_their_own_recording_and_the_oldest_goes(networks: tuple[Tokenizer, Transformer]) -> None:
    draw = Recorded(recorded_again, choose)

    def drawn(labels: list[int], schedule: Schedule = SCHEDULE, **settings) -> None:
        plain = list(generate(*networks, labels, schedule, seeds=labels, **settings))
        steps = list(generate(*networks, labels, schedule, seeds=labels, draw=draw, **settings))
        assert all(torch.equal(one.codes, other.codes) for one, other in zip(steps, plain, strict=True))

    drawn([0])
    drawn([0, 1])
    drawn([0], Schedule.of([1, 2, 4]))
    drawn([0], guidance=Guidance("constant", 1.0))
    assert len(draw.recordings) == MOST_RECORDINGS == 4
    drawn([1])  # used again: now the second one is the oldest
    drawn([0], sampling=Sampling(top_k=3))
    assert len(draw.recordings) == 4
    assert sorted(batch for schedule, _, _, batch in draw.recordings if schedule == SCHEDULE) == [1, 1, 1]


def test_edits_take_the_loop(networks: tuple[Tokenizer, Transformer]) -> None:
    draw, keep = Recorded(recorded_again, choose), Keep([torch.full((1, 1, 1), 7)])
    plain = list(generate(*networks, [0, 1], SCHEDULE, seeds=[1, 2], keep=keep))
    steps = list(generate(*networks, [0, 1], SCHEDULE, seeds=[1, 2], keep=keep, draw=draw))
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(steps, plain, strict=True))
    assert not draw.recordings


@pytest.mark.slow
def test_fused_halves_of_blocks_say_the_same_logits(networks: tuple[Tokenizer, Transformer]) -> None:
    plain = logits_of(networks)
    picture = networks[0].decode(torch.arange(24).view(1, 4, 6))
    fuse(*networks)
    with torch.no_grad():
        assert torch.allclose(logits_of(networks), plain, rtol=1e-4, atol=1e-5)
        assert torch.allclose(networks[0].decode(torch.arange(24).view(1, 4, 6)), picture, atol=1e-4)
