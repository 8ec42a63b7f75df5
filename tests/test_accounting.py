"""The cost of a generation, said beforehand, is what it turns out to be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexvar.accounting import Plan, Seconds, floor, plan, training_flops
from flexvar.attention import AttentionName
from flexvar.counting import LiveBytes
from flexvar.generation import Keep, generate
from flexvar.linear import to_int8
from flexvar.rates import Rates
from flexvar.sampling import Guidance, Sampling
from flexvar.schedule import Schedule, ScheduleLike
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.transformer import Transformer, TransformerConfig

PUBLISHED = {  # TFLOP a picture with guidance, d16, d20, d24, by arithmetic on the published sizes
    "6": (0.37, 0.70, 1.19),
    "9": (0.57, 1.08, 1.83),
    "10": (0.61, 1.17, 1.98),
    "13": (0.90, 1.71, 2.90),
    "384-11": (1.19, 2.25, 3.80),
    "512-12": (2.31, 4.28, 7.16),
    "512-15": (2.66, 4.92, 8.21),
}
SCHEDULE = Schedule(((1, 1), (2, 3), (4, 5)))


def released(depth: int, schedule: ScheduleLike, **settings: object) -> Plan:
    return plan(TransformerConfig(depth=depth), TokenizerConfig(), schedule, **settings)  # type: ignore[arg-type]


def measured(tokenizer: Tokenizer, transformer: Transformer, batch: int, guided: bool) -> tuple[int, int]:
    """FLOPs of drawing and of decoding, counted operation by operation; the count knows attention as products of matrices only."""
    guidance = Guidance("constant", 2.0 if guided else 1.0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as drawing:
        *_, last = generate(tokenizer, transformer, [0] * batch, SCHEDULE, guidance=guidance, seeds=range(batch))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding:
        assert last.images.shape[0] == batch
    return drawing.get_total_flops(), decoding.get_total_flops()


@pytest.mark.parametrize(("batch", "guided"), [(1, True), (3, True), (2, False)])
def test_agrees_with_what_torch_counts(small_tokenizer: Tokenizer, small_transformer: Transformer, batch: int, guided: bool) -> None:
    flops = plan(small_transformer.config, small_tokenizer.config, SCHEDULE, batch=batch, guided=guided).flops
    drawing, decoding = measured(small_tokenizer, small_transformer, batch, guided)
    assert flops.transformer == pytest.approx(drawing, rel=0.01)
    assert flops.decoder == pytest.approx(decoding, rel=0.01)


def test_agrees_where_the_modulation_is_shared(small_tokenizer: Tokenizer) -> None:
    config = TransformerConfig(depth=3, width=64, heads=2, mlp_ratio=2.5, classes=5, codebook_size=48, code_width=8, shared_modulation=True)
    flops = plan(config, small_tokenizer.config, SCHEDULE).flops
    assert flops.transformer == pytest.approx(measured(small_tokenizer, Transformer(config), 1, True)[0], rel=0.01)


def measured_step(transformer: Transformer, schedule: Schedule, batch: int, attention: AttentionName) -> int:
    """FLOPs of forward and backward, counted operation by operation."""
    inputs = torch.randn(batch, schedule.tokens - schedule.first, transformer.config.code_width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = transformer(torch.zeros(batch, dtype=torch.int64), inputs, schedule, attention=attention)
        F.cross_entropy(logits.flatten(0, 1), torch.zeros(batch * schedule.tokens, dtype=torch.int64)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.square([1, 2, 3, 5, 8])], ids=str)
def test_a_step_of_training_agrees_with_what_torch_counts(schedule: Schedule, shared: bool) -> None:
    config = TransformerConfig(depth=2, width=64, heads=2, classes=5, codebook_size=96, code_width=8, shared_modulation=shared)
    transformer, said = Transformer(config), training_flops(config, schedule, 3)
    assert said == pytest.approx(measured_step(transformer, schedule, 3, "by-scale"), rel=0.01)
    seen = sum(count * at.stop for count, at in zip(schedule.counts, schedule.slices, strict=True))
    behind_the_mask = 3 * 2 * 3 * config.depth * 2 * (schedule.tokens**2 - seen) * config.width
    assert said + behind_the_mask == pytest.approx(measured_step(transformer, schedule, 3, "mask"), rel=0.01)


def test_a_step_of_training_is_about_six_times_parameters_and_tokens_and_the_attention() -> None:
    config, plan_ = TransformerConfig(depth=16), released(16, "10", guided=False)
    once_a_picture = config.width**2 * (6 * config.depth + 2)
    each_token = plan_.transformer_parameters - once_a_picture
    expected = 6 * (680 * each_token + once_a_picture) + 3 * plan_.flops.of("attention")
    assert training_flops(config, "10", 1) == pytest.approx(expected, rel=0.02)
    assert training_flops(config, "10", 4) == 4 * training_flops(config, "10", 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_released_models_cost_what_is_published(name: str) -> None:
    for depth, teraflop in zip((16, 20, 24), PUBLISHED[name], strict=True):
        assert released(depth, name).flops.transformer_as_released / 1e12 == pytest.approx(teraflop, abs=0.0051)


def test_folding_guidance_halves_the_head_and_nothing_else() -> None:
    flops = released(24, "10").flops
    assert flops.of("head") == 2 * 680 * 1536 * 8912
    assert flops.transformer_as_released - flops.transformer == flops.of("head") + 9 * flops.modulation
    alone = released(24, "10", guided=False).flops
    assert alone.of("head") == flops.of("head")
    assert 2 * alone.of("mlp") == flops.of("mlp")
    assert alone.transformer_as_released - alone.transformer == 9 * alone.modulation


@pytest.mark.parametrize(("name", "teraflop"), [("10", 0.25), ("384-11", 0.57), ("512-15", 1.02)])
def test_the_released_decoder_costs_what_is_published(name: str, teraflop: float) -> None:
    assert released(16, name).flops.decoder / 1e12 == pytest.approx(teraflop, abs=0.0051)


def test_convolutions_and_attention_of_the_decoder_are_told_apart() -> None:
    tokenizer = TokenizerConfig(channels=8, multipliers=(1, 2), blocks=1, z_channels=4, norm_groups=2, codebook_size=16, code_width=3)
    flops = plan(TransformerConfig(depth=1, code_width=3, codebook_size=16), tokenizer, [(3, 5)], batch=2).flops
    assert flops.decoder_attention == 2 * 3 * 4 * (3 * 5) ** 2 * 16  # 2 pictures, 1 attention in the middle and 2 at the coarsest level
    blocks = 4 * 9 * 16 * 16 + 4 * 9 * 16 * 16 + 3 * 4 * 16 * 16  # in the middle, at the coarsest level, the attentions' 1x1 ones
    coarse = 3 * 4 + 9 * 4 * 16 + blocks
    fine = 9 * 16 * 16 + (9 * 16 * 8 + 9 * 8 * 8 + 16 * 8) + 2 * 9 * 8 * 8 + 9 * 8 * 3
    assert flops.decoder_convolutions == 2 * 2 * 15 * (coarse + 4 * fine)


def test_the_cache_of_the_released_models() -> None:
    """All scales of the released code's cache, less the last, which ours does not keep."""
    for name, mebibytes in (("10", 191 * (680 - 256) / 680), ("512-15", 713 * (2534 - 1024) / 2534)):
        assert released(24, name, dtype=torch.float16).memory.cache / 2**20 == pytest.approx(mebibytes, abs=0.5)


def test_memory_and_parameters_are_those_of_the_real_thing(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    plan_ = plan(small_transformer.config, small_tokenizer.config, SCHEDULE, batch=2)
    assert plan_.memory.cache == small_transformer.new_cache(4, SCHEDULE).nbytes
    for network, parameters, size in (
        (small_transformer, plan_.transformer_parameters, plan_.memory.transformer_weights),
        (small_tokenizer, plan_.tokenizer_parameters, plan_.memory.tokenizer_weights),
    ):
        assert parameters == sum(p.numel() for p in network.parameters())
        assert size == sum(p.nbytes for p in network.parameters())
    with LiveBytes() as live, torch.no_grad():
        small_tokenizer.decode_vectors(torch.zeros(2, small_tokenizer.config.code_width, 4, 5))
    assert plan_.memory.decoding == pytest.approx(live.most, rel=0.05)
    assert plan_.memory.peak == plan_.memory.weights + max(plan_.memory.cache + plan_.memory.drawing, plan_.memory.decoding)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_drawing_takes_what_was_planned(small_tokenizer: Tokenizer, depth: int, dtype: torch.dtype, int8: bool, guided: bool) -> None:
    """Where the last scale's blocks take the most, and where its logits do."""
    tokenizer, guidance = copy.deepcopy(small_tokenizer).to(dtype), Guidance("constant", 2.0 if guided else 1.0)
    schedule, sampling = Schedule.square([1, 2, 4, 7, 9]), Sampling(greedy="none")
    for codebook_size in (48, 2000):
        config = TransformerConfig(depth=depth, width=64, heads=2, classes=2, codebook_size=codebook_size, code_width=8)
        memory = plan(config, small_tokenizer.config, schedule, batch=2, guided=guided, dtype=dtype, int8=int8).memory
        transformer = Transformer(config).to(dtype).requires_grad_(False)
        if int8:
            to_int8(transformer)
        tensors = (*transformer.parameters(), *transformer.buffers())
        assert memory.transformer_weights == sum(tensor.nbytes for tensor in tensors)
        drawn = Keep([torch.zeros(1, *size, dtype=torch.int64) for size in schedule])  # so that the tokenizer has all codes
        with LiveBytes() as live:
            *_, _last = generate(tokenizer, transformer, [0, 1], schedule, guidance=guidance, sampling=sampling, seeds=[0, 1], keep=drawn)
        assert memory.drawing + memory.cache == pytest.approx(live.most, rel=0.1)


# -- bytes, and the floor --


def test_the_bytes_of_a_tiny_model_by_hand() -> None:
    tokenizer = TokenizerConfig(channels=8, multipliers=(1, 2), blocks=1, z_channels=4, norm_groups=2, codebook_size=16, code_width=3)
    config = TransformerConfig(depth=2, width=8, heads=2, mlp_ratio=2.0, codebook_size=16, code_width=3)
    moved = plan(config, tokenizer, [(1, 1), (2, 2), (3, 5)], batch=3).bytes
    projections = 3 * 8 * 8 + 2 * 8 + 2 + 8 * 8 + 8  # weights, two biases and a scale a head; the way out
    mlp = 2 * 8 * 16 + 16 + 8
    logits = [3 * n * 16 for n in (1, 4, 15)]
    keys_and_values = 2 * 2 * 6 * 8  # of a token: in 2 blocks, of 6 rows
    assert [scale.projections for scale in moved.scales] == [4 * 2 * projections] * 3
    assert [scale.mlp for scale in moved.scales] == [4 * 2 * mlp] * 3
    assert [scale.attention for scale in moved.scales] == [4 * keys_and_values * tokens for tokens in (1, 1 + 4, 1 + 4)]
    assert [scale.embedding for scale in moved.scales] == [0, 4 * (3 * 8 + 8), 4 * (3 * 8 + 8)]
    assert [scale.head for scale in moved.scales] == [4 * (8 * 16 + 16 + written) for written in logits]
    assert [scale.sampling for scale in moved.scales] == [4 * read for read in logits]
    assert moved.modulation == 4 * (2 * (8 * 48 + 48) + 8 * 16 + 16)

    painter = Tokenizer(tokenizer)
    weights = sum(p.numel() for part in (painter.decoder, painter.after_codes) for p in part.parameters())
    coarse = 4 + 16 + 4 * 16 + 4 * 16 + 3 * 4 * 16  # channels that convolutions make at 3 x 5: two at the entry, blocks, attentions
    fine = 16 + (8 + 8 + 8) + 2 * 8 + 3  # at 6 x 10: the one that enlarges, a block with its shortcut, another, the picture
    assert moved.decoder == 4 * (weights + 2 * 3 * 15 * (coarse + 4 * fine))


def test_bytes_grow_with_the_batch_and_shrink_with_the_weights() -> None:
    one, many, half, eight = (
        released(16, "10", **settings).bytes
        for settings in ({}, {"batch": 8}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "int8": True})
    )
    for part in ("attention", "head", "sampling"):
        assert one.of(part) < many.of(part)
    for part in ("projections", "mlp"):
        assert one.of(part) == many.of(part) == 2 * half.of(part)
        assert 0.5 * half.of(part) < eight.of(part) < 0.51 * half.of(part)
    assert (eight.modulation, eight.of("head"), eight.decoder) == (half.modulation, half.of("head"), half.decoder)
    assert 8 * one.of("sampling") == many.of("sampling")
    assert one.decoder < many.decoder < 8 * one.decoder
    assert one.of("projections") + one.of("mlp") == pytest.approx(10 * 4 * 12 * 16 * 1024**2, rel=0.001)


def test_without_guidance_there_are_fewer_keys_and_values() -> None:
    assert 2 * released(16, "10", guided=False).bytes.of("attention") == released(16, "10").bytes.of("attention")


@pytest.mark.parametrize("memory", [1e6, 1e9, 1e12, math.inf])
def test_the_floor_of_a_part_is_the_longer_of_two(small_tokenizer: Tokenizer, small_transformer: Transformer, memory: float) -> None:
    cost, rates = plan(small_transformer.config, small_tokenizer.config, SCHEDULE, batch=2), Rates(3e9, 2e9, memory)
    least, flops, moved = floor(cost, rates), cost.flops, cost.bytes
    assert least.modulation == max(flops.modulation / 3e9, moved.modulation / memory)
    for found, work, traffic in zip(least.scales, flops.scales, moved.scales, strict=True):
        assert found == max(work.blocks / 3e9, traffic.blocks / memory)
    scales = list(zip(flops.scales, moved.scales, strict=True))
    assert least.head == pytest.approx(sum(max(work.head / 3e9, traffic.head / memory) for work, traffic in scales))
    assert least.sampling == pytest.approx(moved.of("sampling") / memory)
    assert least.decoder == max(flops.decoder_attention / 3e9 + flops.decoder_convolutions / 2e9, moved.decoder / memory)
    assert least.all == sum(least.parts)
    if math.isinf(memory):
        assert least.all == pytest.approx((flops.transformer + flops.decoder_attention) / 3e9 + flops.decoder_convolutions / 2e9)
        assert least.all == floor(cost, Rates(3e9, 2e9, 1.0).unhindered).all


def test_parts_are_all_there_is() -> None:
    cost = released(16, [1, 2, 2, 3], batch=2)
    parts = list(cost.parts())
    assert sum(part.flops for part in parts) == cost.flops.total
    assert sum(part.bytes for part in parts) == cost.bytes.total
    assert [part.name for part in parts][1:4] == ["blocks at 1x1", "blocks at 2x2", "blocks at 2x2"]
    assert len(parts) == len(Seconds(0, (0,) * 4, 0, 0, 0).parts)


def test_half_precision_halves_the_memory_and_leaves_the_work() -> None:
    full, half = released(16, "10", batch=2), released(16, "10", batch=2, dtype=torch.bfloat16)
    assert full.flops == half.flops
    for part in ("transformer_weights", "tokenizer_weights", "cache"):
        assert getattr(full.memory, part) == 2 * getattr(half.memory, part)
    assert full.memory.decoding == pytest.approx(2 * half.memory.decoding, rel=0.01)


def test_the_table_names_every_part_and_adds_up() -> None:
    text = str(released(16, "10", batch=8, dtype=torch.bfloat16))
    assert text.splitlines()[1] == "8 x 256 x 256 px, guided, bfloat16: 680 tokens in 10 scales"
    for words in ("315.6 M parameters", "16x16      256      680", "decoder convolutions", "keys and values", "sampling   "):
        assert words in text
    assert "a picture                     850.738 G" in text
    assert "guided, bfloat16 with 8-bit weights: 680 tokens" in str(released(16, "10", dtype=torch.bfloat16, int8=True))
    assert all(line.isascii() and len(line) < 100 for line in text.splitlines())


def test_an_empty_batch_is_an_error() -> None:
    for words, complaint in (
        ({"batch": 0}, "batch is 0; give 1 or more"),
        ({"batch": 1.5}, "batch is 1.5; give 1 or more"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; give one of torch's"),
    ):
        with pytest.raises(ValueError, match=complaint):
            released(16, "10", **words)


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_of_any_depth_are_counted_without_building_it(shared: bool) -> None:
    config = TransformerConfig(depth=5, width=64, heads=2, classes=5, codebook_size=96, code_width=32, shared_modulation=shared)
    assert plan(config, TokenizerConfig(), SCHEDULE).transformer_parameters == sum(p.numel() for p in Transformer(config).parameters())
    assert released(10**6, "6").transformer_parameters > 10**22


def test_what_no_machine_holds_is_an_error() -> None:
    tokenizer = TokenizerConfig()
    for depth, side, batch in ((16, 50000, 1), (16, 10**20, 1), (16, 16, 10**15), (10**12, 16, 1)):
        with pytest.raises(ValueError, match="no machine holds") as caught:
            plan(TransformerConfig(depth=depth), tokenizer, [1, side], batch=batch)
        assert "\n" not in str(caught.value)
