"""One codebook for all scales: the nearest code on the unit sphere (paper, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIMILARITIES_AT_ONCE = 1 << 24
"""Numbers of the (tokens, V) similarity matrix that exist at the same time: 64 MiB in float32."""


ROUNDING = 0.01
"""By so much may codes of length 1 differ that were rounded to bfloat16."""


def same_codes(one: Tensor, other: Tensor) -> bool:
    """Whether two codebooks (V, C) are the same, but for rounding and the lengths of their vectors, which do not count."""
    if one.shape != other.shape:
        return False
    return torch.allclose(F.normalize(one.float(), dim=-1), F.normalize(other.float(), dim=-1), rtol=0, atol=ROUNDING)


class Quantizer(nn.Module):
    """V code vectors of width C; pictures' features and codes are compared as unit vectors, in float32."""

    WITHOUT_DECAY = ("codebook",)

    def __init__(self, codebook_size: int, code_width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, code_width), dim=-1))

    def nearest(self, features: Tensor) -> Tensor:
        """The codes (...) int64 nearest to features (..., C), a slice of tokens at a time so that memory stays bounded."""
        vectors = F.normalize(features.detach().reshape(-1, features.shape[-1]).float(), dim=-1)  # (N, C)
        codebook = F.normalize(self.codebook.detach().float(), dim=-1).T  # (C, V)
        rows = max(1, SIMILARITIES_AT_ONCE // codebook.shape[1])
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):  # in half precision near codes would be taken for each other
            for start in range(0, len(vectors), rows):
                torch.argmax(vectors[start : start + rows] @ codebook, dim=-1, out=codes[start : start + rows])
        return codes.reshape(features.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """The unit vectors (..., C) of codes (...)."""
        return F.normalize(F.embedding(codes, self.codebook).float(), dim=-1).to(self.codebook.dtype)
