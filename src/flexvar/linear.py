"""Two other linear layers for transformers that only draw: weights of 8 bits, and weights laid out as a CPU's kernels read them.

8 bits, on CPUs and CUDA: each row of a weight is rounded by its own largest value, and so is each token of what it multiplies; sums are
exact integers, whichever way a processor gets them. So a picture depends on its own tokens alone, whatever else is in the batch. The price
stands in docs/speed.md.
Packed, on CPUs in float32 and bfloat16: the same numbers up to rounding, by oneDNN's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from timeit import repeat
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar.products import has_avx512
from flexvar.transformer import SelfAttention, Transformer

LARGEST = 127
SMALLEST = 1e-12  # so that a row of zeros stays one
FEWEST_CUDA_ROWS = 32  # CUDA's product of integers takes no fewer than 17
CUDA_MULTIPLE = 8  # of both sides of a weight, for the same product
EXACT_COLUMNS = 1024  # so many products of two numbers of up to LARGEST add up to less than 2**24: float32 holds each such sum exactly
ROWS_TRIED = 32  # on a CPU, by either way
PACKED_FOR_ROWS = 512  # a hint; 8 and 64 gave the same speed at every number of rows
GELU_ROWS = 64  # whose GELU is computed at a time, so that they stay in the processor's cache
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)

IntegerProduct: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Rows (R, n) times the rows of a weight (out, n), all int8: exact sums (R, out), int32."""


class MakeLinear(Protocol):
    """Makes a layer of a weight (out, in) and a bias (out); `gelu`: with the GELU of the MLP behind it."""

    def __call__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> nn.Module: ...


def plain_linear(weight: Tensor, bias: Tensor, *, gelu: bool = False) -> nn.Module:
    """A MakeLinear: the layer itself."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(tensor.detach(), requires_grad=False) for tensor in (weight, bias))
    return nn.Sequential(layer, nn.GELU("tanh")) if gelu else layer


def exchange_projection(attention: SelfAttention, make: MakeLinear) -> None:
    """Replaces the layer that gives queries, keys and values, in place and for good."""
    attention.joined = make(attention.qkv.weight, attention.bias)
    del attention.qkv, attention.q_bias, attention.v_bias


def exchange_layers(transformer: Transformer, make: MakeLinear) -> None:
    """Replaces the linear layers of all blocks, in place and for good."""
    for block in transformer.layers:
        attention, mlp = block.attention, block.mlp
        exchange_projection(attention, make)
        attention.out = make(attention.out.weight, attention.out.bias)  # type: ignore[assignment]
        mlp.rise, mlp.gelu = make(mlp.rise.weight, mlp.rise.bias, gelu=True), nn.Identity()  # type: ignore[assignment]
        mlp.fall = make(mlp.fall.weight, mlp.fall.bias)  # type: ignore[assignment]


# -- 8 bits --


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights (out, in)."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        super().__init__()
        rounded, scales = to_8_bits(weight.detach().float())
        self.register_buffer("weight", rounded)
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("bias", bias.detach().float())
        self.multiply = integer_product(*rounded.shape, rounded.device.type)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = to_8_bits(x.flatten(0, -2).float())  # (R, in), (R, 1)
        sums = self.multiply(rows, self.weight)  # (R, out)
        product = torch.addcmul(self.bias, sums * scales, self.scales).to(x.dtype).unflatten(0, x.shape[:-1])
        return F.gelu(product, approximate="tanh") if self.gelu else product  # (..., out)


def to_8_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, n) as int8, and what one step of each is worth (R, 1)."""
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))  # much faster than a norm on CPUs
    scales = largest.clamp_min_(SMALLEST).div_(LARGEST)
    return (rows / scales).round_().to(torch.int8), scales


@cache
def integer_product(out: int, columns: int, device_type: str) -> IntegerProduct:
    """The way to multiply by a weight (out, columns): `by_integers`, but `by_floats` on a CPU where that is faster, or alone exact.

    A processor without instructions for it takes some twenty times as long for a product of integers as for one of floats; one that adds
    two products up in 16 bits gets it wrong.
    """
    if device_type != "cpu":
        return by_integers
    rows, weight = (torch.full((count, columns), LARGEST, dtype=torch.int8, device="cpu") for count in (ROWS_TRIED, out))
    if not torch.equal(by_integers(rows, -weight), by_floats(rows, -weight)):
        return by_floats
    return min(by_integers, by_floats, key=lambda way: min(repeat(partial(way, rows, weight), number=1, repeat=3)))


def by_integers(rows: Tensor, weight: Tensor) -> Tensor:
    """An IntegerProduct: torch's own."""
    missing = max(0, FEWEST_CUDA_ROWS - len(rows)) if rows.is_cuda else 0
    return torch._int_mm(F.pad(rows, (0, 0, 0, missing)), weight.T)[: len(rows)]


def by_floats(rows: Tensor, weight: Tensor) -> Tensor:
    """An IntegerProduct: in float32, of so few columns at a time that nothing is rounded."""
    sums = torch.zeros(len(rows), len(weight), dtype=torch.int32, device=rows.device)
    for some, their in zip(rows.split(EXACT_COLUMNS, 1), weight.split(EXACT_COLUMNS, 1), strict=True):
        sums += F.linear(some.float(), their.float()).to(torch.int32)
    return sums


def to_int8(transformer: Transformer) -> None:
    """Gives all blocks 8-bit weights, in place and for good.

    Raises ValueError for a compiled transformer, on other devices than CPU and CUDA, and for weights with a side that is no multiple of 8.
    """
    if "int8" in transformer.made_faster:
        return
    if transformer.made_faster:
        raise ValueError("a compiled model cannot be given 8-bit weights any more; load it again, and compile it after them")
    device = transformer.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"8-bit weights run on CPUs and CUDA, and this transformer is on {device}; move it, or draw without them")
    first = transformer.layers[0]
    for layer in (first.attention.qkv, first.attention.out, first.mlp.rise, first.mlp.fall):
        if any(side % CUDA_MULTIPLE for side in layer.weight.shape):
            sides = " x ".join(map(str, layer.weight.shape))
            raise ValueError(f"8-bit weights need sides that are multiples of {CUDA_MULTIPLE}, and one is {sides}; draw without them")
    exchange_layers(transformer, Int8Linear)
    transformer.made_faster |= {"int8"}


# -- packed --


class PackedLinear(nn.Module):
    """A linear layer whose weight is laid out for oneDNN once, instead of at every call.

    With AVX-512 oneDNN applies the GELU too. Without, that takes it 3.6 times as long as torch (benchmarks/RESULTS.md, machine C).
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS)  # opaque but for its dtype and device
        self.bias = bias.detach().clone()
        joined = gelu and has_avx512()
        self.after, self.form = ("gelu", "tanh") if joined else ("none", "")
        self.gelu = gelu and not joined

    def forward(self, x: Tensor) -> Tensor:
        # Within a caller's autocast other precisions come in.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, self.after, [], self.form)
        return gelu_in_place(product) if self.gelu else product  # (..., out)


def gelu_in_place(x: Tensor) -> Tensor:
    """The GELU in its tanh form of x (..., n), contiguous, written into it: x · sigmoid(2 √(2/π) (x + 0.044715 x³))."""
    for rows in x.view(-1, x.shape[-1]).split(GELU_ROWS):
        share = (rows * rows).mul_(0.044715 * GELU_SLOPE).add_(GELU_SLOPE).mul_(rows).sigmoid_()
        rows.mul_(share)
    return x


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers can be packed there: on a CPU whose products oneDNN speeds up, in float32, with AVX-512 in bfloat16 too."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    fast = has_avx512() if dtype == torch.bfloat16 else torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and _packing_works(dtype)


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether a small packed layer gives what it should: torch does not promise the operations that it stands on."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, bias = torch.eye(8, dtype=dtype, device="cpu"), torch.arange(8.0, dtype=dtype, device="cpu")
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # oneDNN can be told to do without
            return False
        return torch.equal(PackedLinear(weight, bias)(weight), weight + bias)
    except (AttributeError, RuntimeError):
        return False


def pack(transformer: Transformer) -> None:
    """Lays weights out for oneDNN, in place and for good, where `can_pack`: of blocks that are not of 8 bits, head and modulation.

    The last two with AVX-512 only: without, nothing was gained (benchmarks/RESULTS.md, machine C). The head's weights are in float32
    whatever the others are (`flexvar.generation.full_logits`).
    """
    if "int8" not in transformer.made_faster:
        exchange_layers(transformer, PackedLinear)
    if not has_avx512():
        return
    shared = transformer.shared_modulation is not None
    modulations = [(transformer, "shared_modulation")] if shared else [(block, "modulation") for block in transformer.layers]
    for owner, name in (*modulations, (transformer, "final_modulation")):
        layer = getattr(owner, name)
        setattr(owner, name, PackedLinear(layer.weight, layer.bias))
    head = transformer.head
    transformer.head = PackedLinear(head.weight.float(), head.bias.float())  # type: ignore[assignment]
