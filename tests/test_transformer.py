from __future__ import annotations

import pytest
import torch

from flexvar import Schedule, Tokenizer, Transformer, TransformerConfig

SCHEDULES = [[1, 2, 3, 4], [(1, 1), (1, 3), (2, 5), (4, 9)], [(2, 2), (2, 2), (3, 4)], [4]]


def step_by_step(transformer: Transformer, labels: torch.Tensor, inputs: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    condition, cache = transformer.condition(labels), transformer.new_cache(len(labels), schedule)
    read = []
    for index, (size, at) in enumerate(zip(schedule, schedule.slices, strict=True)):
        scale = inputs[:, at.start - schedule.first : at.stop - schedule.first]
        x = transformer.embed(scale, size) if index else transformer.begin(condition, size)
        read.append(transformer.step(x, condition, cache))
    assert cache.filled == schedule.tokens
    return transformer.head(torch.cat(read, 1)).float()


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_teacher_forcing_equals_step_by_step(sizes: list, shared: bool) -> None:
    torch.manual_seed(1)
    config = TransformerConfig(
        depth=2, width=32, heads=2, classes=5, codebook_size=48, code_width=8, trained_grid=4, shared_modulation=shared
    )
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    schedule = Schedule.of(sizes)
    labels, inputs = torch.tensor([0, 5]), torch.randn(2, schedule.tokens - schedule.first, 8)
    with torch.no_grad():
        whole, stepped = transformer(labels, inputs, schedule), step_by_step(transformer, labels, inputs, schedule)
    assert whole.shape == (2, schedule.tokens, 48)
    assert whole.dtype == torch.float32
    assert torch.allclose(whole, stepped, atol=1e-4)
    assert whole.std() > 0.1


def test_no_scale_sees_a_later_one(small_transformer: Transformer) -> None:
    schedule = Schedule.square([1, 2, 3])
    inputs = torch.randn(1, 13, 8)
    changed = inputs.clone()
    changed[:, 4:] += 1
    before, after = (small_transformer(torch.tensor([1]), x, schedule) for x in (inputs, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_depth_gives_width_and_heads_and_both_can_be_given() -> None:
    assert (TransformerConfig(depth=20).width, TransformerConfig(depth=20).heads) == (1280, 20)
    config = TransformerConfig(depth=4, width=96, heads=6)
    assert (config.width, config.heads, config.table_side) == (96, 6, 32)
    with pytest.raises(ValueError, match="cannot be shared among"):
        TransformerConfig(width=100, heads=3)


def test_wrong_number_of_inputs(small_transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="inputs have 3 tokens, but 1x1 2x2 needs 4"):
        small_transformer(torch.tensor([0]), torch.zeros(1, 3, 8), [1, 2])


def test_dropped_paths_do_nothing_and_kept_ones_are_the_plain_pass(small_transformer: Transformer) -> None:
    labels, inputs, schedule = torch.tensor([0, 1]), torch.randn(2, 4, 8), [1, 2]
    plain = small_transformer(labels, inputs, schedule)
    paths = torch.ones(2, 2, 2)
    assert torch.equal(small_transformer(labels, inputs, schedule, paths=paths), plain)
    paths[:, :, 0] = 0
    dropped = small_transformer(labels, inputs, schedule, paths=paths)
    assert not torch.allclose(dropped[0], plain[0])
    assert torch.allclose(dropped[1], plain[1], atol=1e-6)


def test_initialisation_is_the_released_one() -> None:
    torch.manual_seed(0)
    transformer = Transformer(TransformerConfig(depth=4, classes=10, codebook_size=64))
    std = (1 / (3 * 256)) ** 0.5
    measured = {
        "blocks.0.attention.qkv.weight": std,
        "blocks.0.attention.out.weight": std / 8**0.5,
        "blocks.0.mlp.fall.weight": std / 8**0.5,
        "head.weight": 0.02 * std,
        "final_modulation.weight": 0.5 * std,
    }
    parameters = dict(transformer.named_parameters())
    for name, expected in measured.items():
        assert parameters[name].std().item() == pytest.approx(expected, rel=0.05), name
    modulation = parameters["blocks.0.modulation.weight"]
    assert modulation[:512].std().item() == pytest.approx(1e-3 * std, rel=0.05)
    assert modulation[512:].std().item() == pytest.approx(0.5 * std, rel=0.05)
    assert parameters["blocks.0.attention.log_scale"].exp().mean().item() == pytest.approx(4)


@pytest.mark.parametrize("shared", [False, True])
def test_initialising_again_is_initialising(shared: bool) -> None:
    """With another gain than the one before, as of d24: nothing of what was there is left."""
    torch.manual_seed(0)
    transformer = Transformer(TransformerConfig(depth=4, classes=10, codebook_size=64, shared_modulation=shared))
    before = {name: tensor.std().item() for name, tensor in transformer.named_parameters() if tensor.numel() > 1000}
    transformer.initialise()
    after = {name: tensor.std().item() for name, tensor in transformer.named_parameters() if tensor.numel() > 1000}
    assert after == pytest.approx(before, rel=0.1)
    transformer.initialise(1e-4)
    if shared:
        offset = transformer.layers[0].modulation_offset
        assert offset[:2].std().item() == pytest.approx(1e-4 / 16, rel=0.1)
        assert offset[2:].std().item() == pytest.approx(0.5 / 16, rel=0.1)


def test_sampling_leaves_nothing_on_the_modules(small_transformer: Transformer, small_tokenizer: Tokenizer) -> None:
    from flexvar import generate

    before = {name: id(value) for name, value in vars(small_transformer).items()}
    next(iter(generate(small_tokenizer, small_transformer, [0], [1, 2])))
    assert {name: id(value) for name, value in vars(small_transformer).items()} == before
    assert not list(small_transformer.buffers())


@pytest.mark.slow
def test_compiled_is_the_same(small_transformer: Transformer, small_tokenizer: Tokenizer) -> None:
    schedule = Schedule.square([1, 2, 3])
    labels, inputs, codes = torch.tensor([1, 2]), torch.randn(2, 13, 8), torch.randint(48, (2, 4, 4))
    compiled = torch.compile(small_transformer, fullgraph=True)
    painted = torch.compile(small_tokenizer.decode, fullgraph=True)
    assert torch.allclose(compiled(labels, inputs, schedule), small_transformer(labels, inputs, schedule), atol=1e-4)
    assert torch.allclose(painted(codes), small_tokenizer.decode(codes), atol=1e-4)
