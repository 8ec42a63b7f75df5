"""The learned 2-D table of positions: how it begins, and how it is resampled to the grid of a scale."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

PositionMode: TypeAlias = Literal["area", "smooth"]


def initial_table(width: int, side: int) -> Tensor:
    """The untrained table (D, side, side): even channels sin(y·f), odd channels cos(x·f), f falling from 1 to 1/10000.

    So each channel sees only one axis (released code; paper, section 3.2).
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)  # (D / 2)
    angle = torch.arange(side, dtype=torch.float32)[None] * frequency[:, None]  # (D / 2, side)
    table = torch.empty(width, side, side)
    table[0::2] = torch.sin(angle)[: (width + 1) // 2, :, None]
    table[1::2] = torch.cos(angle)[: width // 2, None, :]
    return table


def resample(table: Tensor, size: tuple[int, int], mode: PositionMode) -> Tensor:
    """The positions (h·w, D) of a grid, from the table (D, side, side).

    "area" averages the cells under each position, as released, so that beyond the table's side neighbours share a position. "smooth" is
    the same up to the table's side and linear beyond it, on each axis by itself. Raises ValueError for another mode.
    """
    if mode == "smooth":
        beyond = [n if n > side else side for n, side in zip(size, table.shape[1:], strict=True)]
        if beyond != list(table.shape[1:]):
            table = F.interpolate(table[None].float(), beyond, mode="bilinear", align_corners=False)[0].to(table.dtype)
    elif mode != "area":
        raise ValueError(f"no way to resample positions is named {mode!r}; there are 'area' and 'smooth'")
    return area_averaged(table, size).flatten(1).T  # (h·w, D)


def area_averaged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (..., C, H, W) averaged over the area of each cell of a grid: (..., C, h, w), adaptive average pooling."""
    if maps.device.type == "mps":  # torch pools there only where the sides divide one another
        return averaged_by_matrices(maps, size)
    return F.adaptive_avg_pool2d(maps, size)


def averaged_by_matrices(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The same by a product of matrices on each axis, in float32 also where autocast would round them."""
    rows, columns = (_shares(n, m).to(maps.device) for n, m in zip(maps.shape[-2:], size, strict=True))  # (h, H), (w, W)
    with torch.autocast(maps.device.type, enabled=False):
        return (rows @ maps.float() @ columns.T).to(maps.dtype)  # (..., C, h, w)


def _shares(cells: int, parts: int) -> Tensor:
    """The share (parts, cells) of each cell in the average of each part; a part begins and ends at whole cells and may share them."""
    part, cell = torch.arange(parts)[:, None], torch.arange(cells)
    inside = (cell >= part * cells // parts) & (cell < ((part + 1) * cells + parts - 1) // parts)
    return inside / inside.sum(1, keepdim=True)
