from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flexvar.position import averaged_by_matrices, initial_table, resample

SIDES = st.integers(1, 20)


def test_each_channel_sees_one_axis() -> None:
    table = initial_table(6, 5)
    assert (table[0::2] == table[0::2, :, :1]).all()
    assert (table[1::2] == table[1::2, :1]).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (2, 8)])
def test_smooth_is_area_up_to_the_table(size: tuple[int, int]) -> None:
    table = torch.randn(4, 8, 8)
    assert torch.equal(resample(table, size, "smooth"), resample(table, size, "area"))


def test_smooth_goes_on_where_area_repeats() -> None:
    table = torch.arange(8.0).expand(1, 8, 8).clone()  # grows along the width
    area = resample(table, (8, 16), "area").view(8, 16)
    smooth = resample(table, (8, 16), "smooth").view(8, 16)
    assert torch.equal(area[0, 0::2], area[0, 1::2])
    assert (smooth[0, 1:-2].diff() > 0).all()
    assert torch.allclose(smooth, smooth[:1].expand_as(smooth))


def test_mixed_axes_are_resampled_each_by_itself() -> None:
    table = torch.randn(3, 8, 8)
    mixed = resample(table, (2, 16), "smooth").T.view(3, 2, 16)
    wide = resample(table, (8, 16), "smooth").T.view(3, 8, 16)
    assert torch.allclose(mixed, wide.view(3, 2, 4, 16).mean(2), atol=1e-6)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="'area' and 'smooth'"):
        resample(torch.zeros(1, 2, 2), (1, 1), "other")  # type: ignore[arg-type]


@given(SIDES, SIDES, SIDES, SIDES)
def test_averaging_by_matrices_is_adaptive_pooling(height: int, width: int, h: int, w: int) -> None:
    maps = torch.randn(2, 3, height, width)
    with torch.autocast("cpu", torch.bfloat16):  # rounds neither
        assert torch.allclose(averaged_by_matrices(maps, (h, w)), F.adaptive_avg_pool2d(maps, (h, w)), atol=1e-6)
