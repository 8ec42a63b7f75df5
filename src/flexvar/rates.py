"""What a device does at most: how fast it multiplies matrices, convolves, and reads memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar.linear import MakeLinear, PackedLinear, can_pack, plain_linear

SECONDS_A_RATE = 0.5
"""How long each shape is measured."""

SECONDS_AT_MOST = 1.0
"""After so many the largest product is not measured again."""

LAUNCHES = 8
"""Pieces of work between two waits for a GPU: a wait takes as long as a small part of one."""

MEMORY_TAKEN = 2**30
"""Bytes that are enough to measure the rates on a CPU."""

LARGE_PRODUCT = 8192  # rows, and both sides of a weight: less does not fill a GPU
MOST_ROWS = 4096  # of a product on a CPU, which is no faster with more
MOST_PIXELS = 2**19  # of the largest convolutions' maps, the whole batch
CONVOLUTIONS = ((128, 1), (256, 2), (256, 4))  # channels of the released decoder's dearest ones, and how much smaller their maps are


@dataclass(frozen=True)
class Rates:
    """Of one device, in one precision."""

    products: float  # FLOP/s of large products of matrices, by torch's own layers
    convolutions: float  # FLOP/s of 3x3 convolutions, in the faster format
    memory: float  # bytes/s
    format: str = ""  # the faster one: "NCHW" or "channels last"
    packed: float = 0.0  # FLOP/s of the same products by packed layers (`flexvar.linear`); 0 where there are none

    def __str__(self) -> str:
        products = f"products {_giga(self.products)} GFLOP/s{f', packed {_giga(self.packed)}' if self.packed else ''}"
        convolutions = f"3x3 convolutions {_giga(self.convolutions)}{self.format and f' ({self.format})'}"
        return f"{products}, {convolutions}, memory {_giga(self.memory)} GB/s"

    def better(self, other: Rates) -> Rates:
        """The larger one of each rate."""
        faster = max(self, other, key=lambda rates: rates.convolutions)
        larger = {name: max(getattr(self, name), getattr(other, name)) for name in ("products", "memory", "packed")}
        return replace(faster, **larger)

    def apart(self, other: Rates) -> bool:
        """Whether products or convolutions differ by more than a tenth: other work disturbed one of the two."""
        return any(disturbed(getattr(self, name), getattr(other, name)) for name in ("products", "convolutions", "packed"))

    @property
    def fastest_products(self) -> float:
        """FLOP/s of products by the faster of the two kinds of layers."""
        return max(self.products, self.packed)

    @property
    def unpacked(self) -> Rates:
        """As if there were no packed layers."""
        return replace(self, packed=0.0)

    @property
    def unhindered(self) -> Rates:
        """As if memory were read at once."""
        return replace(self, memory=math.inf)


def disturbed(before: float, after: float) -> bool:
    """Whether two rates are more than 10 % apart."""
    return abs(before - after) > 0.1 * max(before, after)


def measure_rates(
    device: torch.device, dtype: torch.dtype, *, rows: int = 512, width: int = 1024, pictures: tuple[int, int, int] = (1, 256, 256)
) -> Rates:
    """The rates of a device in one precision, a median each.

    On a CPU the products are those of an MLP of this width on so many rows, and the convolutions those of a decoder of pictures (B, H, W):
    it is filled by what is drawn, and larger ones take long. Elsewhere they are larger than either.
    """
    convolutions, name = _convolution_rate(device, dtype, *pictures)
    products = _product_rate(device, dtype, rows, width, plain_linear)
    packed = _product_rate(device, dtype, rows, width, PackedLinear) if can_pack(device, dtype) else 0.0
    return Rates(products, convolutions, _memory_rate(device), name, packed)


def _product_rate(device: torch.device, dtype: torch.dtype, rows: int, width: int, make: MakeLinear) -> float:
    """FLOP/s of products of matrices of random numbers by such layers: an MLP's two on a CPU, a large square one elsewhere."""
    rows = min(rows, MOST_ROWS)
    shapes = [(rows, width, 4 * width), (rows, 4 * width, width)] if device.type == "cpu" else [(LARGE_PRODUCT,) * 3]
    rates = []
    for count, narrow, wide in shapes:
        x, weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((count, narrow), (wide, narrow), (wide,)))
        rates.append(_rate(device, partial(make(weight, bias), x), 2 * count * narrow * wide))
    return statistics.harmonic_mean(rates)


def _convolution_rate(device: torch.device, dtype: torch.dtype, batch: int, height: int, width: int) -> tuple[float, str]:
    """FLOP/s of 3x3 convolutions in the faster memory format, and its name."""
    height, width = (min(side, 512) for side in (height, width))
    most = max(1, MOST_PIXELS // (height * width))
    batch = min(batch, most) if device.type == "cpu" else most
    best = (0.0, "")
    for memory_format, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels last")):
        seconds, count = 0.0, 0
        for channels, shrink in CONVOLUTIONS:
            x = torch.randn(batch, channels, max(1, height // shrink), max(1, width // shrink), device=device)
            weight = torch.randn(channels, channels, 3, 3, device=device)
            x, weight = (tensor.to(dtype, memory_format=memory_format) for tensor in (x, weight))
            flops = 2 * x.numel() * channels * 9
            seconds += flops / _rate(device, lambda x=x, weight=weight: F.conv2d(x, weight, padding=1), flops)  # type: ignore[misc]
            count += flops
        best = max(best, (count / seconds, name))
    return best


def _memory_rate(device: torch.device) -> float:
    """Bytes/s of a piece of memory that no cache holds, read, or read and written: the better of the two."""
    memory = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    copy = torch.empty_like(memory)
    return max(_rate(device, memory.sum, memory.nbytes), _rate(device, lambda: copy.copy_(memory), 2 * memory.nbytes))


def _rate(device: torch.device, work: Callable[[], Tensor], amount: int) -> float:
    """How much of a piece of work is done in a second: the median over runs that fill half of one."""
    work()
    times = 1 if device.type == "cpu" else LAUNCHES
    seconds: list[float] = []
    while sum(seconds) < SECONDS_A_RATE or len(seconds) < 3:
        wait_for(device)
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return amount * times / statistics.median(seconds)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices of random numbers, the best of six: what the device can do at most in this precision.

    The best of fewer where a CPU without instructions for half precision takes seconds for each.
    """
    side = LARGE_PRODUCT if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 6 and sum(seconds) < SECONDS_AT_MOST:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The name that a report says."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.1f}"
