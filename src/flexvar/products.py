"""Many small products of matrices as one convolution, which oneDNN computes at the speed of a large product on CPUs with AVX-512."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def has_avx512() -> bool:
    """Whether torch uses AVX-512 on this processor."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def convolving_pays() -> bool:
    """Whether `multiply_in_groups` is the faster way: with AVX-512, where it is twice as fast as MKL's `bmm` on an AMD processor.

    Without, it takes two to seven times as long (benchmarks/RESULTS.md, machines D and C). Beside an Intel processor's `bmm` with AVX-512
    it is unmeasured.
    """
    return has_avx512()


def multiply_in_groups(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows (n, groups, in) times the weights (groups, out, in) of their group: (n, groups, out).

    A 1x1 convolution of a map of n pixels, whose channels are those of all groups side by side; in its own precision within autocast too.
    """
    count, groups, _ = rows.shape
    # In channels last; by the strides of a dimension that is put in front of this view, torch would not see that it is.
    pixels = rows.reshape(1, count, 1, -1).permute(0, 3, 1, 2)  # (1, groups * in, n, 1)
    with torch.autocast("cpu", enabled=False):
        products = F.conv2d(pixels, weights.flatten(0, 1)[:, :, None, None], groups=groups)  # (1, groups * out, n, 1)
    return products.permute(0, 2, 3, 1).reshape(count, groups, -1)
