"""The faster ways of `pipe.compile()` against the plain one: the same pictures up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from flexvar import FlexVARPipeline, Guidance, Keep, Sampling, Schedule, Tokenizer, Transformer, attention, generate, generation, memory
from flexvar.checkpoint import Defaults, Model
from flexvar.compiled import MOST_RECORDINGS, Recorded, Recording, Work, compiled, cuda_graph, fuse
from flexvar.generation import draw_scales
from flexvar.linear import PackedLinear, to_int8
from flexvar.sampling import choose
from flexvar.tokenizer.networks import Upsample

SCHEDULE = Schedule.of([1, (1, 2), (3, 4), (4, 6)])
CUDA = torch.cuda.is_available()
HALF = torch.backends.cpu.get_cpu_capability() == "AVX512"


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
def there(networks: tuple[Tokenizer, Transformer]) -> tuple[Tokenizer, Transformer]:
    """The networks where recordings are made: on a GPU where there is one."""
    return (networks[0].cuda(), networks[1].cuda()) if CUDA else networks


@pytest.fixture
def draw(there: tuple[Tokenizer, Transformer]) -> Recorded:
    return Recorded(cuda_graph if CUDA else recorded_again, choose, there[0].decode)


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


def test_packed_layers_say_the_same_logits(networks: tuple[Tokenizer, Transformer], packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "NARROWEST_HEAD", 1)
    monkeypatch.setattr(attention, "FEWEST_SCORES", 1)
    plain = logits_of(networks)
    compiled(*networks)
    first = networks[1].layers[0]
    assert isinstance(first.mlp.rise, PackedLinear)
    assert (first.attention.attend is attention.by_convolutions) == (packing == "AVX512")
    packed = logits_of(networks)
    assert torch.allclose(packed, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(packed, plain)  # by other kernels


@pytest.mark.usefixtures("packing")
def test_the_pipeline_draws_the_same_pictures(pipe: FlexVARPipeline) -> None:
    before = pipe(list("abc"), seed=3, output_type="pt")
    after = pipe.compile().compile()(list("abc"), seed=3, output_type="pt")
    assert torch.allclose(before.images, after.images, atol=1e-4)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiled_model_draws_within_a_callers_autocast(pipe: FlexVARPipeline, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        assert pipe.compile()("a", seed=3, output_type="pt").images.isfinite().all()


@pytest.mark.usefixtures("packing")
def test_threads_that_compile_at_the_same_time_take_turns(pipe: FlexVARPipeline) -> None:
    before = pipe("a", seed=3, output_type="pt").images
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: pipe.compile(), range(8)))
    assert torch.allclose(pipe("a", seed=3, output_type="pt").images, before, atol=1e-4)


def test_folded_upsampling_paints_the_same(networks: tuple[Tokenizer, Transformer]) -> None:
    codes = torch.randint(48, (2, 3, 5))
    before = networks[0].decode(codes)
    compiled(*networks)
    folded = [module.folded is not None for module in networks[0].decoder.modules() if isinstance(module, Upsample)]
    assert folded == [True, True]
    after = networks[0].decode(codes)
    assert torch.allclose(after, before, atol=1e-5)
    assert not torch.equal(after, before)  # by other sums
    assert not any("folded" in name for name in networks[0].state_dict())
    assert torch.equal(networks[0].train().decode(codes), before)  # where it learns, its own weights count


def test_8_bits_go_together_with_compiled(pipe: FlexVARPipeline) -> None:
    before = pipe.to_int8()("a", seed=3, output_type="pt")
    assert torch.allclose(pipe.compile()("a", seed=3, output_type="pt").images, before.images, atol=1e-4)
    with pytest.raises(ValueError, match=r"made faster \(compiled, of 8-bit weights\) stays where it is"):
        pipe.to("cpu")
    assert pipe.to_int8() is pipe  # once is enough


def test_a_model_that_compiling_does_not_change_stays_free(pipe: FlexVARPipeline, tmp_path: Path) -> None:
    before = pipe.to(dtype=torch.float16)("a", seed=3, output_type="pt")
    assert torch.equal(pipe.compile()("a", seed=3, output_type="pt").images, before.images)
    pipe.to("cpu").save_pretrained(tmp_path)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("another", [False, True])
def test_what_a_compiled_model_cannot_do_is_told(pipe: FlexVARPipeline, tmp_path: Path, another: bool) -> None:
    """Whether by the pipeline that compiled it or by another one of the same model."""
    pipe.compile()
    pipe = FlexVARPipeline(pipe.model) if another else pipe
    with pytest.raises(ValueError, match="a compiled model cannot be given 8-bit weights any more; load it again, and compile it after"):
        pipe.to_int8()
    for wrong in (lambda: pipe.to("cpu"), lambda: pipe.save_pretrained(tmp_path), lambda: pipe.save_released(tmp_path)):
        with pytest.raises(ValueError, match=r"made faster \(compiled\) stays where it is and is not saved; load it again"):
            wrong()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("packing")
def test_two_pipelines_of_a_model_are_compiled(pipe: FlexVARPipeline) -> None:
    before = pipe("a", seed=3, output_type="pt").images
    for either in (pipe, FlexVARPipeline(pipe.model)):
        assert torch.allclose(either.compile()("a", seed=3, output_type="pt").images, before, atol=1e-4)


@pytest.mark.skipif(not HALF, reason="needs a processor with AVX-512")
def test_packed_layers_in_bfloat16_are_as_exact_as_plain_ones(
    networks: tuple[Tokenizer, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "NARROWEST_HEAD", 1)
    monkeypatch.setattr(attention, "FEWEST_SCORES", 1)
    exact = logits_of(networks)
    half = copy.deepcopy(networks)
    for network in half:
        network.bfloat16()
    plain = logits_of(half)
    compiled(*half)
    assert half[1].head.weight.dtype == torch.float32
    packed = logits_of(half)
    off, bound = (packed - exact).square().mean(), (plain - exact).square().mean()
    assert 0 < off < 1.5 * bound


# -- recordings --


def same_codes(draw: Recorded, there: tuple[Tokenizer, Transformer], labels: list[int], schedule: Schedule = SCHEDULE, **settings) -> bool:
    """Whether a recording draws what the loop draws, with pictures as it decodes them."""
    plain = list(generate(*there, labels, schedule, **settings))
    steps = list(generate(*there, labels, schedule, draw=draw, **settings))
    assert [(step.index, step.size) for step in steps] == [(step.index, step.size) for step in plain]
    assert all(torch.allclose(one.images, other.images, atol=1e-5) for one, other in zip(steps, plain, strict=True))
    return all(torch.equal(one.codes, other.codes) for one, other in zip(steps, plain, strict=True))


def test_a_recording_draws_what_the_loop_draws(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    assert same_codes(draw, there, [0, 1, 2], seeds=[5, 6, 7])
    assert same_codes(draw, there, [2, 0, 1], seeds=[9, 5, 1])
    assert same_codes(draw, there, [4, 1], seeds=[7, 3])  # in a part of the batch
    assert len(draw.recordings) == 1
    assert same_codes(draw, there, [4], seeds=[7])  # less than half of it: not worth the rest
    assert len(draw.recordings) == 2


@pytest.mark.parametrize("guidance", [Guidance("constant", 3.0, split=True), Guidance(stop=2), Guidance("constant", 1.0)])
def test_every_guidance_is_recorded(draw: Recorded, there: tuple[Tokenizer, Transformer], guidance: Guidance) -> None:
    for seeds in ([1, 2], [3, 4]):
        assert same_codes(draw, there, [0, 3], guidance=guidance, seeds=seeds)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_other_weights_are_recorded(draw: Recorded, there: tuple[Tokenizer, Transformer], kind: str) -> None:
    if kind == "int8":
        to_int8(there[1])
    else:
        for network in there:
            network.bfloat16()
    for seeds in ([1, 2], [3, 4]):
        assert same_codes(draw, there, [0, 3], seeds=seeds)


def test_what_was_drawn_stays_when_the_next_is_drawn(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    *_, first = generate(*there, [0], SCHEDULE, seeds=[1], draw=draw)
    codes, images = first.codes.clone(), first.images.clone()
    list(generate(*there, [3], SCHEDULE, seeds=[2], draw=draw))
    assert torch.equal(first.codes, codes)
    assert torch.equal(first.images, images)


def test_other_settings_and_larger_batches_get_their_own_recording_until_all_go(
    draw: Recorded, there: tuple[Tokenizer, Transformer]
) -> None:
    assert same_codes(draw, there, [0], seeds=[1])
    assert same_codes(draw, there, [0, 1], seeds=[1, 2])
    assert same_codes(draw, there, [0], Schedule.of([1, 2, 4]), seeds=[1])
    assert same_codes(draw, there, [0], sampling=Sampling(top_k=3), seeds=[1])
    assert len(draw.recordings) == MOST_RECORDINGS == 4
    assert same_codes(draw, there, [1], seeds=[3])  # again the first one
    assert len(draw.recordings) == 4
    assert same_codes(draw, there, [0], sampling=Sampling(top_k=2), seeds=[1])
    assert len(draw.recordings) == 1


def test_edits_take_the_loop(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    assert same_codes(draw, there, [0, 1], keep=Keep([torch.full((1, 1, 1), 7)]), seeds=[1, 2])
    assert not draw.recordings


def test_a_recording_made_in_inference_mode_serves_outside_of_it(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    with torch.inference_mode():
        list(generate(*there, [0], SCHEDULE, seeds=[1], draw=draw))
    assert same_codes(draw, there, [2], seeds=[4])
    assert len(draw.recordings) == 1


def test_a_recording_tells_numbers_that_are_not_finite(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    *_, last = generate(*there, [0, 1], SCHEDULE, seeds=[1, 2], draw=draw)
    assert last.images.isfinite().all()
    there[1].blocks[1].mlp.fall.bias[3] = torch.nan
    for step in generate(*there, [0, 1], SCHEDULE, seeds=[1, 2], draw=draw):
        with pytest.raises(ValueError, match="not finite"):
            _ = step.images


def test_where_memory_runs_out_the_other_recordings_go_first(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    list(generate(*there, [0], SCHEDULE, seeds=[1], draw=draw))
    record, tries = draw.record, []

    def full_once(work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        tries.append(len(draw.recordings))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return record(work)

    draw.record = full_once
    assert same_codes(draw, there, [0, 1], seeds=[1, 2])
    assert tries == [1, 0]
    draw.recordings.clear()
    tries.clear()
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to go
        list(generate(*there, [0], SCHEDULE, seeds=[1], draw=draw))


@pytest.mark.parametrize("where", ["step", "decode"])
def test_where_an_edit_runs_out_of_memory_the_recordings_go(
    draw: Recorded, there: tuple[Tokenizer, Transformer], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Keep([torch.full((1, 1, 1), 7)])
    plain = list(generate(*there, [0, 1], SCHEDULE, keep=keep, seeds=[1, 2]))
    images = plain[-1].images
    list(generate(*there, [0], SCHEDULE, seeds=[1], draw=draw))
    kind = Transformer if where == "step" else Tokenizer
    work, tries = getattr(kind, where), []

    def full_while_recordings_are_there(*given: object) -> Tensor:
        tries.append(len(draw.recordings))
        if draw.recordings:
            raise torch.OutOfMemoryError("out of memory")
        return work(*given)

    monkeypatch.setattr(kind, where, full_while_recordings_are_there)
    steps = list(generate(*there, [0, 1], SCHEDULE, keep=keep, seeds=[1, 2], draw=draw))
    assert torch.equal(steps[-1].images, images)
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(steps, plain, strict=True))
    assert tries[:2] == [1, 0]
    assert not draw.recordings
    monkeypatch.setattr(kind, where, mock.Mock(side_effect=torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to go
        list(generate(*there, [0, 1], SCHEDULE, keep=keep, seeds=[1, 2], draw=draw))[-1].images  # noqa: B018


def test_where_giving_out_a_recording_runs_out_of_memory_all_go(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    list(generate(*there, [0], SCHEDULE, seeds=[1], draw=draw))
    (first,) = draw.recordings.values()
    run = Recording.run

    def full_at_first(self: Recording, *given: Tensor) -> list[Tensor]:
        if self is first:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, *given)

    with mock.patch.object(Recording, "run", full_at_first):
        assert same_codes(draw, there, [2], seeds=[4])
    assert first not in draw.recordings.values()


def test_recordings_are_of_one_pair_of_networks(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    *_, last = generate(*there, [1], SCHEDULE, seeds=[1], draw=draw)
    others = copy.deepcopy(there)
    for pair in ((others[0], there[1]), (there[0], others[1])):
        with pytest.raises(ValueError, match="holds recordings of other networks"):
            next(generate(*pair, [1], SCHEDULE, seeds=[1], draw=draw))
    again = (last.codes + 1) % 48
    assert torch.allclose(last.decode(again), there[0].decode(again), atol=1e-5)  # its own pictures are those of its own codes alone


@pytest.mark.parametrize("where", ["flexvar.generation.uniform_numbers", "flexvar.Tokenizer.features", "flexvar.Tokenizer.decode"])
def test_whatever_a_pipeline_does_the_recordings_give_way(pipe: FlexVARPipeline, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request needs, what is encoded, what is decoded."""
    pipe._draw = draw = Recorded(recorded_again, choose, pipe.tokenizer.decode)
    given = Image.radial_gradient("L").resize((24, 16))
    work = (lambda: pipe("b", seed=4, output_type="pt")) if "numbers" in where else (lambda: pipe.reconstruct(given, output_type="pt"))
    expected = work().images
    pipe("a", seed=3)
    assert draw.recordings
    plain = getattr(Tokenizer, where.rsplit(".", 1)[1], generation.uniform_numbers)

    def full_while_recordings_are_there(*given: object) -> Tensor:
        if draw.recordings and not (isinstance(given[-1], Tensor) and given[-1].is_meta):  # on meta its memory is counted
            raise torch.OutOfMemoryError("out of memory")
        return plain(*given)

    monkeypatch.setattr(where, full_while_recordings_are_there)
    assert torch.equal(work().images, expected)


def test_a_recorded_batch_is_drawn_again_although_it_fills_the_memory(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe._draw = draw = Recorded(recorded_again, choose, pipe.tokenizer.decode)
    free = {"bytes": 2**40}
    monkeypatch.setattr(memory, "free_memory", lambda device: free["bytes"])
    monkeypatch.setattr(memory.MemoryNeed, "refuse_what_cannot_fit", lambda self: None)  # as on a GPU
    monkeypatch.setattr("flexvar.pipeline.refuse_results", lambda size, pictures: None)  # which go to the CPU
    pipe(list("abcde"), seed=0)
    free["bytes"] = 0
    pipe(list("edcba"), seed=5)
    assert [batch for _, batch in draw.recordings] == [5]
    pipe(list("edcba"), seed=5, top_k=3)
    assert [batch for _, batch in draw.recordings] == [5, 1]


@pytest.mark.slow
def test_models_of_several_widths_are_all_compiled(networks: tuple[Tokenizer, Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The third one as often as the first, by a backend that leaves everything as it is. Dynamo's limit stays what it was outside."""
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, inputs: (graphs.append(graph), graph)[1]))
    torch._dynamo.reset()
    tokenizer, limit, made = networks[0], torch._dynamo.config.recompile_limit, []
    for width in (16, 24, 32):
        transformer = Transformer(replace(networks[1].config, width=width)).eval().requires_grad_(False)
        fuse(transformer)
        draw = Recorded(recorded_again, choose, tokenizer.decode)
        for settings in ({"keep": Keep([torch.full((1, 1, 1), 7)])}, {}, {"guidance": Guidance("constant", 1.0)}):
            list(generate(tokenizer, transformer, [0], SCHEDULE, seeds=[1], draw=draw, **settings))
        made.append(len(graphs))
    assert made == [made[0], 2 * made[0], 3 * made[0]]
    assert made[-1] > 2 * limit  # what stands before attention, and what stands after it
    assert torch._dynamo.config.recompile_limit == limit
    torch._dynamo.reset()


def test_a_drawing_waits_for_the_one_before_whatever_its_stream(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    draw.done = mock.Mock()
    run, order = Recording.run, []
    draw.done.wait.side_effect = lambda: order.append("waited")
    with mock.patch.object(Recording, "run", lambda self, *given: (order.append("ran"), run(self, *given))[1]):
        assert same_codes(draw, there, [0], seeds=[1])
    assert order == ["waited", "ran"]


def test_threads_with_streams_of_their_own_get_their_own_pictures(draw: Recorded, there: tuple[Tokenizer, Transformer]) -> None:
    expected = {seed: list(generate(*there, [0], SCHEDULE, seeds=[seed]))[-1].codes for seed in range(16)}
    list(generate(*there, [0], SCHEDULE, seeds=[0], draw=draw))

    def drawn(seed: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()) if CUDA else nullcontext():
            *_, last = generate(*there, [0], SCHEDULE, seeds=[seed], draw=draw)
            return torch.equal(last.codes, expected[seed])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(drawn, expected))


def test_without_triton_compiling_for_cuda_is_refused(networks: tuple[Tokenizer, Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar.compiled.find_spec", lambda name: None)
    elsewhere = mock.Mock()
    elsewhere.device.type = "cuda"
    with pytest.raises(ModuleNotFoundError, match="compiling for CUDA needs Triton"):
        compiled(networks[0], elsewhere)


@pytest.mark.slow
def test_fused_halves_of_blocks_say_the_same_logits(networks: tuple[Tokenizer, Transformer]) -> None:
    plain = logits_of(networks)
    fuse(networks[1])
    with torch.no_grad():
        assert torch.allclose(logits_of(networks), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_of_the_way_for_cuda_but_the_graph(networks: tuple[Tokenizer, Transformer]) -> None:
    """Fused blocks, a compiled decoder and recordings together, as on a GPU."""
    plain = list(generate(*networks, [0, 1], SCHEDULE, seeds=[1, 2]))
    fuse(networks[1])
    networks[0].decoder.to(memory_format=torch.channels_last)
    draw = Recorded(recorded_again, choose, torch.compile(networks[0].decode))
    list(generate(*networks, [3, 4], SCHEDULE, seeds=[3, 4], draw=draw))
    steps = list(generate(*networks, [0, 1], SCHEDULE, seeds=[1, 2], draw=draw))
    assert torch.cat([(one.codes == other.codes).flatten() for one, other in zip(steps, plain, strict=True)]).float().mean() > 0.9
    assert torch.allclose(steps[-1].images, networks[0].decode(steps[-1].codes), atol=1e-4)
