"""Operations are followed one by one; drawings on tensors without data are those with data."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flexvar.counting import LiveBytes, ResultBytes, WithoutScores, drawing_memory, empty_transformer
from flexvar.schedule import Schedule
from flexvar.tokenizer import Tokenizer
from flexvar.transformer import Transformer


def test_bytes_are_followed() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100)  # 400 bytes
        _view = kept[:50]
        del kept
        assert live.now == 400
        del _view
        assert live.now == 0
        torch.ones(50)
    assert (live.now, live.most) == (0, 400)


def test_the_results_of_one_operation_are_added_up() -> None:
    x = torch.ones(2, 3, 4, 5, device="meta")
    with ResultBytes(torch.ops.aten.convolution) as made, torch.no_grad():
        F.conv2d(F.silu(x), torch.ones(7, 3, 1, 1, device="meta"))
        F.conv2d(x, torch.ones(2, 3, 3, 3, device="meta"), padding=1)
        x * 2
    assert made.total == 4 * 2 * (7 + 2) * 20


def test_attention_without_scores_has_its_result_alone() -> None:
    q = torch.ones(1, 2, 50, 4, device="meta")
    with LiveBytes() as live, WithoutScores():
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
        assert F.softmax(q, -1).shape == q.shape
    assert live.most <= 2 * q.nbytes


def test_networks_that_stand_for_others_stay_as_they_are(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    config, schedule = small_transformer.config, Schedule.square([1, 2, 4])
    before = empty_transformer(config, 2, torch.float32)
    drawing_memory(config, small_tokenizer.config, schedule, 1, True, False, torch.float32, False)
    assert empty_transformer(config, 2, torch.float32) is before
    assert before.new_cache(2, schedule).nbytes == small_transformer.new_cache(2, schedule).nbytes
    assert before.new_cache(2, schedule).filled == 0
    assert before.config.depth == 2


def test_sizes_that_take_no_time_to_count(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    """Codes are chosen a part at a time, which would be a million parts here."""
    given = small_transformer.config, small_tokenizer.config, Schedule.square([1, 20000]), 1, True, False, torch.float32, False
    assert drawing_memory(*given) > 2 * 20000**2 * 48
