"""3x3 convolutions with a quarter of the products: Winograd's F(4x4, 3x3) (Lavin and Gray 2016), on CPUs in float32.

Along one axis, four neighbouring outputs are made of six inputs and three weights. Taken as the coefficients of polynomials, their product
is known from its values at six points (0, 1, -1, 2, -2, infinity), each of them one product of two numbers. So weights become values at
six points, once (the filter transform); inputs do too, tile by tile (the input transform); values are multiplied and summed over channels;
and four outputs are read off the sums (the output transform). Along both axes that makes 36 products for a tile of 4 x 4 outputs instead of
144. The transforms add in place, in a piece of the map at a time that the processor's caches hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar.products import convolving_pays, multiply_in_groups

TILE = 4
POINTS = 6
ONE = 1
"""The point, of the six, at which all four outputs have the weight 1: a number added there is added to each of them."""

FILTER_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

FEWEST_CHANNELS = 96
"""With fewer, in or out, the additions take longer than the products that they save."""

MOST_WEIGHTS = 256 * 256
"""Channels in times channels out. The released tokenizer has more only on its smallest maps, and would need four times the memory."""

PIECE = 2**16
"""Tiles times channels of a piece. Which is best depends on the layer; 2**15 to 2**17 are mostly within a tenth (benchmarks/RESULTS.md)."""


def pays(weight: Tensor) -> bool:
    """Whether the weight (out, in, 3, 3) of a convolution is worth it: on a CPU in float32, neither small nor large."""
    outputs, inputs = weight.shape[:2]
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and min(inputs, outputs) >= FEWEST_CHANNELS and inputs * outputs <= MOST_WEIGHTS


def takes(x: Tensor) -> bool:
    """Whether `convolve` can be used for a map (B, in, H, W): of whole tiles, on a CPU in float32, where no gradients are asked for."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return plain and x.shape[2] % TILE == 0 and x.shape[3] % TILE == 0


def filter_transform(weight: Tensor) -> Tensor:
    """Weights (out, in, 3, 3) of a convolution at all points, float32 (36, out, in), by column and row; four times as many numbers."""
    axis = torch.tensor(FILTER_TRANSFORM, dtype=torch.float64, device=weight.device)  # (6, 3)
    return torch.einsum("jx,iy,ocyx->jioc", axis, axis, weight.double()).float().flatten(0, 1).contiguous()


def convolve(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """The convolution, padded by 1, of a map (B, in, H, W), H and W multiples of 4, as (B, out, H, W), channels last.

    filters: (36, out, in), from `filter_transform`. Outputs are off by less than 1e-4 of their size, some ten times what a
    plain convolution is off by. A picture's do not depend on the rest of the batch.
    """
    batch, inputs, height, width = x.shape
    outputs = filters.shape[1]
    across, down = width // TILE, height // TILE
    most = min(down, max(1, PIECE // (max(inputs, outputs) * across)))  # rows of tiles in a piece
    result = x.new_empty(batch, height, width, outputs)
    padded = x.new_zeros(TILE * most + 2, width + 2, inputs)
    for picture, painted in zip(x.permute(0, 2, 3, 1), result, strict=True):  # (H, W, in), (H, W, out)
        for top in range(0, height, TILE * most):
            rows = min(most, (height - top) // TILE)
            fill(padded[: TILE * rows + 2], picture, top)
            values = values_of(padded[: TILE * rows + 2], rows, across)  # (36, tiles, in)
            sums = multiply(values, filters)  # (36, tiles, out)
            sums[POINTS * ONE + ONE] += bias
            write(painted[top : top + TILE * rows], sums, rows, across)
    return result.permute(0, 3, 1, 2)


def fill(padded: Tensor, picture: Tensor, top: int) -> None:
    """Puts the rows of a picture (H, W, in) from one above `top` into a padded piece (n, W + 2, in), zeros where the picture ends."""
    first, last = max(0, top - 1), min(len(picture), top - 1 + len(padded))
    start, stop = first - (top - 1), last - (top - 1)
    padded[:start].zero_()
    padded[start:stop, 1:-1] = picture[first:last]
    padded[stop:].zero_()


def values_of(padded: Tensor, rows: int, across: int) -> Tensor:
    """The tiles of a padded piece as values (36, rows * across, in), by column and row; all of a tile side by side if `convolving_pays`."""
    inputs, width = padded.shape[2], padded.shape[1]
    by_row = padded.new_empty(POINTS, rows, width, inputs)
    input_transform([padded[i : i + TILE * (rows - 1) + 1 : TILE] for i in range(POINTS)], by_row)
    if convolving_pays():
        values = padded.new_empty(rows * across, POINTS**2, inputs).transpose(0, 1)
    else:
        values = padded.new_empty(POINTS**2, rows * across, inputs)
    columns = [by_row[:, :, j : j + TILE * (across - 1) + 1 : TILE] for j in range(POINTS)]
    input_transform(columns, values.view(POINTS, POINTS, rows, across, inputs))
    return values


def multiply(values: Tensor, filters: Tensor) -> Tensor:
    """Values (36, tiles, in) times weights (36, out, in): sums over channels (36, tiles, out)."""
    if convolving_pays():
        return multiply_in_groups(values.transpose(0, 1), filters).transpose(0, 1)
    return torch.bmm(values, filters.mT)


def write(painted: Tensor, sums: Tensor, rows: int, across: int) -> None:
    """Reads the outputs off the sums (36, rows * across, out), which are used up, into a piece (4 * rows, 4 * across, out)."""
    outputs = sums.shape[2]
    by_row = sums.new_empty(POINTS, rows, across, TILE, outputs)
    output_transform(sums.view(POINTS, POINTS, rows, across, outputs), by_row.movedim(3, 0))
    output_transform(by_row.view(POINTS, rows, TILE * across, outputs), painted.view(rows, TILE, -1, outputs).movedim(1, 0))


def input_transform(x: list[Tensor], values: Tensor) -> None:
    """Six neighbouring inputs as values at the six points, written into `values` (6, ...).

    Those at 1 and -1 are the sum and the difference of an even and an odd part, as are those at 2 and -2.
    """
    zero, one, minus_one, two, minus_two, infinity = values
    even, odd = one, zero
    torch.sub(x[4], x[2], alpha=4, out=even)
    torch.sub(x[3], x[1], alpha=4, out=odd)
    torch.sub(even, odd, out=minus_one)
    even += odd  # at 1
    even, odd = two, infinity
    torch.sub(x[4], x[2], out=even)
    torch.sub(x[3], x[1], out=odd)
    torch.sub(x[0], x[2], out=zero)
    torch.add(even, zero, alpha=4, out=zero)  # 4 x0 - 5 x2 + x4
    torch.sub(even, odd, alpha=2, out=minus_two)
    even.add_(odd, alpha=2)  # at 2
    torch.sub(x[5], odd, alpha=4, out=infinity).sub_(x[3])  # 4 x1 - 5 x3 + x5


def output_transform(values: Tensor, y: Tensor) -> None:
    """Four neighbouring outputs from the values (6, ...) at the six points, which are used up, written into `y` (4, ...)."""
    zero, one, minus_one, two, minus_two, infinity = values
    near = torch.add(one, minus_one, out=y[0])
    near_odd = one.sub_(minus_one)
    far = torch.add(two, minus_two, out=minus_one)
    far_odd = two.sub_(minus_two)
    torch.add(near, far, alpha=4, out=y[2])
    y[0].add_(far).add_(zero)
    torch.add(near_odd, far_odd, alpha=2, out=y[1])
    torch.add(near_odd, far_odd, alpha=8, out=y[3]).add_(infinity)
