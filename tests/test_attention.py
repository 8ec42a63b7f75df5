"""Every way to attend means the same: values and gradients of the dense mask."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar import Schedule, Transformer, TransformerConfig, attention
from flexvar.attention import AttentionName, attention_named, block_causal_mask, by_convolutions, by_scale, flex, masked, padded
from flexvar.products import multiply_in_groups

CPU = torch.device("cpu")
WAYS = get_args(AttentionName)
WITH_GRADIENTS = [name for name in WAYS if name != "flex"]
SCHEDULES = [[1, 2, 3, 4], [(1, 1), (1, 3), (2, 5), (4, 9)], [(2, 2), (2, 2), (3, 4)], [4], [1], [1, 5, 11]]
quiet = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def unit_vectors(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values (2, 3, L, 16) as the network makes them: a transposed view, queries up to 10 long."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, sum(counts), 3, 3, 16).permute(2, 0, 3, 1, 4)
    made = (10 * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
    return [x.to(dtype).detach().requires_grad_() for x in made]


def values_and_gradients(name: AttentionName, counts: tuple[int, ...]) -> list[Tensor]:
    given = unit_vectors(counts)
    result = attention_named(name, counts, CPU)(*given)
    weights = torch.linspace(-1, 1, result.numel()).sin().view_as(result)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), given)]


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_values_and_gradients_are_those_of_the_mask(name: AttentionName, sizes: list) -> None:
    counts = Schedule.of(sizes).counts
    for ours, expected in zip(values_and_gradients(name, counts), values_and_gradients("mask", counts), strict=True):
        assert ours.shape == expected.shape
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
def test_the_mask_is_the_formula(sizes: list) -> None:
    schedule = Schedule.of(sizes)
    q, k, v = (x.detach() for x in unit_vectors(schedule.counts))
    result = masked(schedule.counts, CPU)(q, k, v)
    for at in schedule.slices:
        scores = q[:, :, at] @ k[:, :, : at.stop].transpose(2, 3)
        assert torch.allclose(result[:, :, at], scores.softmax(-1) @ v[:, :, : at.stop], atol=1e-5)


@quiet
@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
def test_flex_gives_the_values_of_the_mask(sizes: list) -> None:
    counts = Schedule.of(sizes).counts
    given = [x.detach() for x in unit_vectors(counts)]
    assert torch.allclose(flex(counts, CPU)(*given), masked(counts, CPU)(*given), atol=1e-5)


def test_flex_gives_no_gradients_here() -> None:
    with pytest.raises(ValueError, match="gives no gradients on cpu; choose by-scale, mask or padded"):
        values_and_gradients("flex", (1, 4))


@pytest.mark.parametrize("multiple", [1, 7, 30, 128])
def test_padding_takes_no_part(multiple: int) -> None:
    counts = (1, 4, 9, 16)
    lengths = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
        lengths.append(q.shape[2])
        return sdpa(q, k, v, **settings)  # type: ignore[arg-type]

    sdpa, given = F.scaled_dot_product_attention, unit_vectors(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        result = padded(counts, CPU, multiple)(*given)
    assert lengths == [math.ceil(30 / multiple) * multiple]
    assert torch.allclose(result, masked(counts, CPU)(*given), atol=1e-5)


def test_by_scale_needs_no_mask_and_no_score_that_is_thrown_away() -> None:
    counts, shapes = (1, 4, 9), []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shapes.append((q.shape[2], k.shape[2], v.shape[2]))
        return sdpa(q, k, v, scale=scale)

    sdpa = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        by_scale(counts)(*unit_vectors(counts))
    assert shapes == [(1, 1, 1), (4, 5, 5), (9, 14, 14)]


def test_half_precision_stays_half() -> None:
    counts = (1, 4, 9)
    expected = masked(counts, CPU)(*unit_vectors(counts))
    for name in WITH_GRADIENTS:
        result = attention_named(name, counts, CPU)(*unit_vectors(counts, torch.bfloat16))
        assert result.dtype == torch.bfloat16
        assert torch.allclose(result.float(), expected, atol=0.05)


def test_mask() -> None:
    mask = block_causal_mask(Schedule.square([1, 2]).counts, CPU)
    assert mask.tolist() == [[True] + [False] * 4] + [[True] * 5] * 4


def test_an_unknown_name_is_answered_with_the_known_ones(small_transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="no way to attend is named 'flash'; there are by-scale, mask, flex, padded"):
        small_transformer(torch.tensor([0]), torch.zeros(1, 4, 8), [1, 2], attention="flash")


# -- in the transformer --


def loss_and_gradients(attention: AttentionName = "mask", recompute: bool = False, sizes: object = (1, 2, 4)) -> list[Tensor]:
    """The loss of a small transformer with dropped paths, and the gradient of each of its parameters."""
    torch.manual_seed(0)
    transformer = Transformer(TransformerConfig(depth=3, width=32, heads=2, classes=5, codebook_size=48, code_width=8, trained_grid=4))
    schedule = Schedule.of(sizes)  # type: ignore[arg-type]
    inputs, targets = torch.randn(2, schedule.tokens - schedule.first, 8), torch.randint(48, (2 * schedule.tokens,))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    paths = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 1.25], [0.0, 1.25]], [[1.5, 1.5], [1.5, 0.0]]])
    logits = transformer(torch.tensor([1, 5]), inputs, schedule, paths=paths, attention=attention, recompute=recompute)
    loss = F.cross_entropy(logits.flatten(0, 1), targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(transformer.parameters()), materialize_grads=True)]


@pytest.mark.parametrize("sizes", SCHEDULES[:4], ids=str)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_training_is_the_same_whichever_way(name: AttentionName, sizes: list) -> None:
    for ours, expected in zip(loss_and_gradients(name, sizes=sizes), loss_and_gradients("mask", sizes=sizes), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_computing_again_changes_no_bit(name: AttentionName) -> None:
    for again, kept in zip(loss_and_gradients(name, recompute=True), loss_and_gradients(name), strict=True):
        assert torch.equal(again, kept)


def test_computing_again_keeps_less() -> None:
    kept = {False: 0, True: 0}
    for recompute in kept:

        def count(x: Tensor, recompute: bool = recompute) -> Tensor:
            kept[recompute] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss_and_gradients(recompute=recompute)
    assert kept[True] < 0.5 * kept[False]


@quiet
def test_flex_without_gradients_gives_the_same_logits(small_transformer: Transformer) -> None:
    given = torch.tensor([1, 5]), torch.randn(2, 13, 8), [1, 2, 3]
    assert torch.allclose(small_transformer(*given, attention="flex"), small_transformer(*given, attention="mask"), atol=1e-4)


def test_a_compiled_block_meets_new_lengths_without_compiling_again() -> None:
    compiled = []
    transformer = Transformer(TransformerConfig(depth=2, width=32, heads=2, classes=5, codebook_size=48, code_width=8, trained_grid=8))
    schedules = [Schedule.of(sizes) for sizes in ([1, 3, 5, 8], [1, 2, 7, 8], [(1, 1), (2, 3), (3, 4), (5, 6)])]
    inputs = [torch.randn(2, schedule.tokens - 1, 8) for schedule in schedules]
    plain = [transformer(torch.tensor([0, 1]), x, schedule) for x, schedule in zip(inputs, schedules, strict=True)]

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    for block in transformer.blocks:
        block.compile(backend=backend, dynamic=True)
    for schedule, x, expected in zip(schedules, inputs, plain, strict=True):
        assert torch.allclose(transformer(torch.tensor([0, 1]), x, schedule), expected, atol=1e-5)
    assert len(compiled) == 1


@pytest.mark.slow
def test_flex_is_compiled_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flex_attention", attention._compiled_flex_attention())
    stance = "default"
    for sizes in ([1, 5, 11], [1, 3, 7, 13], [(1, 1), (4, 7), (9, 16)]):
        with torch.compiler.set_stance(stance):  # an error where it is compiled again
            test_flex_gives_the_values_of_the_mask(sizes)
        stance = "fail_on_recompile"


@pytest.mark.parametrize("at_once", [1, 100, attention.MOST_SCORES])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (40, 65)])
@torch.no_grad()
def test_attention_by_convolutions_is_torchs(queries: int, keys: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "NARROWEST_HEAD", 1)
    monkeypatch.setattr(attention, "FEWEST_SCORES", 1)
    monkeypatch.setattr(attention, "MOST_SCORES", at_once)
    q, k, v = unit_vectors((keys,))
    longer = (F.pad(x, (0, 0, 0, 5))[:, :, :keys] for x in (k, v))  # as a cache gives them
    found = by_convolutions(q[:, :, :queries], *longer)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q[:, :, :queries], k, v, scale=1.0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1:], by_convolutions(q[1:, :, :queries], k[1:], v[1:]))  # whatever else is in the batch


@torch.no_grad()
def test_attention_by_convolutions_in_bfloat16_keeps_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "NARROWEST_HEAD", 1)
    monkeypatch.setattr(attention, "FEWEST_SCORES", 1)
    q, k, v = unit_vectors((65,), torch.bfloat16)
    found = by_convolutions(q * 8, k, v)
    assert found.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention((q * 8).float(), k.float(), v.float(), scale=1.0)
    off, torchs = ((x.float() - exact).square().mean() for x in (found, F.scaled_dot_product_attention(q * 8, k, v, scale=1.0)))
    assert off < 2 * torchs


@torch.no_grad()
def test_attention_is_torchs_own_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr(attention, "multiply_in_groups", lambda rows, weights: taken.append(rows) or multiply_in_groups(rows, weights))
    for queries, width in ((512, 32), (511, 32), (512, 31)):
        q, k, v = torch.randn(3, 1, 1, 512, width)
        torch.testing.assert_close(
            by_convolutions(q[:, :, :queries], k, v), F.scaled_dot_product_attention(q[:, :, :queries], k, v, scale=1.0)
        )
    assert len(taken) == 2  # both products, once


@torch.no_grad()
def test_scores_stay_in_float32_within_a_callers_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "NARROWEST_HEAD", 1)
    monkeypatch.setattr(attention, "FEWEST_SCORES", 1)
    q, k, v = unit_vectors((65,))
    expected = by_convolutions(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(by_convolutions(q, k, v), expected)
