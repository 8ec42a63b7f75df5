"""Keys and values of the scales drawn so far: allocated once, handed from call to call, never kept on a module."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor


class KeyValueCache:
    """Room for the keys and values of `tokens` positions in every block: those of all scales but the last, which no later one reads.

    One tensor (depth, 2, B, H, tokens, D / H). A scale is written by `extend`, block by block, and `advance` closes it.
    """

    def __init__(
        self, depth: int, batch: int, heads: int, tokens: int, head_width: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        with torch.inference_mode(False):  # it is written into later, by a caller who may have left that mode
            self.memory = torch.empty(depth, 2, batch, heads, tokens, head_width, dtype=dtype, device=device)
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.memory.nbytes

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all scales so far, and of the one being drawn: (B, H, n, D / H) each.

        The new ones are stored where there is room, and views are returned. The last scale finds none, by design: it is joined to copies
        of the others and not stored. Raises ValueError for a scale behind that one.
        """
        end, room = self.filled + keys.shape[2], self.memory.shape[4]
        if self.filled > room:
            raise ValueError(f"the cache has room for {room} tokens before the last scale and was given {self.filled}; allocate more")
        if end > room:
            earlier = self.memory[block, :, :, :, : self.filled]
            return torch.cat((earlier[0], keys), 2), torch.cat((earlier[1], values), 2)
        self.memory[block, 0, :, :, self.filled : end] = keys
        self.memory[block, 1, :, :, self.filled : end] = values
        return self.memory[block, 0, :, :, :end], self.memory[block, 1, :, :, :end]

    def only(self, batch: int) -> KeyValueCache:
        """The same memory, of the first `batch` rows alone."""
        first = copy(self)
        first.memory = self.memory[:, :, :batch]
        return first

    def advance(self, tokens: int) -> None:
        """Closes a scale of so many tokens, after the last block has extended it."""
        self.filled += tokens
