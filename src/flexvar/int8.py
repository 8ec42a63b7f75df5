"""8-bit weights for the transformer's blocks on CPUs: less than two thirds of the time and a quarter of their memory, at a measured price.

Each row of a weight is rounded to 8 bits by its own largest value, and each token of what it multiplies to 7; sums are exact integers. So
a picture depends on its own tokens alone, whatever else is in the batch. The price stands in docs/speed.md.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from flexvar.transformer import SelfAttention, Transformer

LARGEST = 127
SMALLEST_SCALE = 1e-12  # so that a row of zeros stays one


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights. ModuleNotFoundError where torch has none any more: it means to replace its quantised tensors."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        try:
            from torch.ao.nn.quantized.dynamic import Linear as PackedLinear
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"torch {torch.__version__} has no 8-bit linear layers; draw in float32, or take 2.13") from error
        scales = (weight.abs().amax(1) / LARGEST).double().clamp_min(SMALLEST_SCALE)
        no_shift = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch 2.13 announces the replacement
            self.packed = PackedLinear(weight.shape[1], weight.shape[0], bias_=False)
            self.packed.set_weight_bias(torch.quantize_per_channel(weight.detach(), scales, no_shift, 0, torch.qint8), None)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (R, in)
        largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True).clamp_min_(SMALLEST_SCALE)  # (R, 1)
        # The layer rounds by the range of all it is given. Scaled to 1, and with a row that reaches from -1 to 1, that is always the same.
        scaled = rows.new_zeros(len(rows) + 1, rows.shape[1])
        torch.div(rows, largest, out=scaled[:-1])
        scaled[-1, 0], scaled[-1, -1] = -1, 1
        product = self.packed(scaled)[:-1]  # (R, out)
        return torch.addcmul(self.bias, product, largest).unflatten(0, x.shape[:-1])  # (..., out)


class Int8Attention(SelfAttention):
    """Attention whose two products are of 8-bit weights."""

    def __init__(self, attention: SelfAttention) -> None:
        nn.Module.__init__(self)
        self.heads, self.log_scale = attention.heads, attention.log_scale
        self.packed_qkv = Int8Linear(attention.qkv.weight, attention.bias)
        self.out = Int8Linear(attention.out.weight, attention.out.bias)  # type: ignore[assignment]

    def project(self, x: Tensor) -> Tensor:
        return self.packed_qkv(x)  # (B, n, 3D)


def to_int8(transformer: Transformer) -> None:
    """Replaces the linear layers of all blocks, in place and for good. ValueError unless the transformer is in float32 on the CPU."""
    weight = transformer.head.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(f"8-bit weights run on CPUs, from float32; this transformer is {weight.dtype} on {weight.device}")
    for block in transformer.layers:
        block.attention = Int8Attention(block.attention)
        block.mlp.rise = Int8Linear(block.mlp.rise.weight, block.mlp.rise.bias)  # type: ignore[assignment]
        block.mlp.fall = Int8Linear(block.mlp.fall.weight, block.mlp.fall.bias)  # type: ignore[assignment]
