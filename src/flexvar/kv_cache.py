"""Keys and values of the scales drawn so far: allocated once, handed from call to call, never kept on a module."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Room for the keys and values of `tokens` positions in every block.

    One tensor (depth, 2, B, H, tokens, D / H). A scale is written by `extend`, block by block, and `advance` closes it.
    """

    def __init__(
        self, depth: int, batch: int, heads: int, tokens: int, head_width: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.memory = torch.empty(depth, 2, batch, heads, tokens, head_width, dtype=dtype, device=device)
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.memory.nbytes

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values (B, H, n, D / H) of the scale being drawn; returns those of all scales so far, as views."""
        end = self.filled + keys.shape[2]
        if end > self.memory.shape[4]:
            raise ValueError(
                f"the cache has room for {self.memory.shape[4]} tokens and was given {end}; allocate it for the whole schedule"
            )
        self.memory[block, 0, :, :, self.filled : end] = keys
        self.memory[block, 1, :, :, self.filled : end] = values
        return self.memory[block, 0, :, :, :end], self.memory[block, 1, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Closes a scale of so many tokens, after the last block has extended it."""
        self.filled += tokens
