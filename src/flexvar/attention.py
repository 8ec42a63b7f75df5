"""Attention over the tokens of all scales at once: each token sees its own scale and all earlier ones (paper, section 3.2).

In training there are four ways to compute it, which give the same values and gradients and differ in speed and memory. Each takes
`counts`, the tokens of every scale (`Schedule.counts`), since random schedules hardly ever have the same length L twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexvar.products import multiply_in_groups

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, H, n, D / H) of new tokens, keys and values (B, H, m, D / H) to what they attend to (B, H, n, D / H).

Scores are q·k, not scaled. In training the keys and values are those of the new tokens, m = n; in drawing, of earlier scales too.
"""

NARROWEST_HEAD, FEWEST_SCORES = 32, 2**18
"""For which attention by convolutions is worth it: with less of either, torch's is as fast or faster (benchmarks/RESULTS.md, machine D)."""

MOST_SCORES = 2**24
"""Held of one picture at the same time (heads x queries x keys): 128 MiB, before and after the softmax together.

Smaller pieces take longer, as oneDNN lays the keys out anew for each.
"""

AttentionName: TypeAlias = Literal["by-scale", "mask", "flex", "padded"]


def attention_named(name: AttentionName, counts: Sequence[int], device: torch.device) -> Attend:
    """One of the ways by its name; ValueError for another name."""
    match name:
        case "by-scale":
            return by_scale(counts)
        case "mask":
            return masked(counts, device)
        case "flex":
            return flex(counts, device)
        case "padded":
            return padded(counts, device)
    raise ValueError(f"no way to attend is named {name!r}; there are {', '.join(get_args(AttentionName))}")


def masked(counts: Sequence[int], device: torch.device) -> Attend:
    """All scales in one call under a dense mask: the plainest way, which the others are held to."""
    mask = block_causal_mask(counts, device)  # (L, L)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # (B, H, L, D/H)

    return attend


def padded(counts: Sequence[int], device: torch.device, multiple: int = 128) -> Attend:
    """The masked way with a length rounded up to a multiple, so that kernels meet few different shapes.

    The padding is one more scale: no token sees it.
    """
    padding = -sum(counts) % multiple
    attend_masked = masked((*counts, padding), device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longer = [F.pad(x, (0, 0, 0, padding)) for x in (q, k, v)]  # (B, H, L + padding, D/H) each
        return attend_masked(*longer)[:, :, : q.shape[2]]  # (B, H, L, D/H)

    return attend


def by_scale(counts: Sequence[int]) -> Attend:
    """A call a scale: its queries see every key up to the scale's end, so no mask is needed and no score is computed in vain."""
    ends = tuple(accumulate(counts))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scales = zip(q.split(list(counts), 2), _Prefixes.apply(k, ends), _Prefixes.apply(v, ends), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*scale, scale=1.0) for scale in scales], 2)  # (B, H, L, D/H)

    return attend


def flex(counts: Sequence[int], device: torch.device) -> Attend:
    """FlexAttention, which leaves out the blocks of the mask that are empty: compiled on CUDA, once for all lengths.

    Elsewhere it runs uncompiled and has no backward pass: ValueError where gradients are asked for.
    """
    scale = _scale_of_each_token(counts, device)  # (L)
    blocks = create_block_mask(lambda batch, head, q, k: scale[q] >= scale[k], None, None, len(scale), len(scale), device=device)
    attention: Any = _compiled_flex_attention() if device.type == "cuda" else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if device.type != "cuda" and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError(f"attention 'flex' gives no gradients on {device.type}; choose by-scale, mask or padded, or train on CUDA")
        return attention(q, k, v, block_mask=blocks, scale=1.0)  # (B, H, L, D/H)

    return attend


def all_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An Attend for drawing, where there are no later scales: all queries see all keys."""
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)  # (B, H, n, D/H)


def by_convolutions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`all_keys` without gradients, for CPUs where `convolving_pays`.

    Both products of all heads are one convolution each. Scores are in float32 whatever the precision is. A picture's do not depend on the
    rest of the batch. Where torch's own attention is faster it is taken (NARROWEST_HEAD, FEWEST_SCORES).
    """
    if q.shape[-1] < NARROWEST_HEAD or q.shape[1] * q.shape[2] * k.shape[2] < FEWEST_SCORES:
        return all_keys(q, k, v)  # (B, H, n, D/H)
    attended = torch.empty_like(q.transpose(1, 2))  # (B, n, H, D/H)
    at_once = max(1, MOST_SCORES // (k.shape[1] * k.shape[2]))  # queries
    for queries, keys, values, result in zip(q.transpose(1, 2), k, v.mT, attended, strict=True):
        keys = keys.float()
        for some, theirs in zip(queries.split(at_once), result.split(at_once), strict=True):
            scores = multiply_in_groups(some.float(), keys)  # (n, H, keys)
            theirs.copy_(multiply_in_groups(scores.softmax(-1).to(v.dtype), values))  # (n, H, D/H)
    return attended.transpose(1, 2)


def block_causal_mask(counts: Sequence[int], device: torch.device) -> Tensor:
    """(L, L) bool, True where row attends to column: a token sees its own scale and all earlier ones."""
    scale = _scale_of_each_token(counts, device)  # (L)
    return scale[:, None] >= scale


def _scale_of_each_token(counts: Sequence[int], device: torch.device) -> Tensor:
    """(L) int64, the index of the scale that each token belongs to."""
    return torch.tensor([k for k, count in enumerate(counts) for _ in range(count)], device=device)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


class _Prefixes(torch.autograd.Function):
    """Views of the first `end` tokens of x (B, H, L, D/H), for each end, the last being L.

    Plain slices would do, but the gradient of each is as long as x, mostly zeros, and K of them are added. Here that is done in place.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        context.ends = ends
        return tuple(x[:, :, :end] for end in ends)  # (B, H, end, D/H) each

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[-1].clone()  # (B, H, L, D/H)
        for end, gradient in zip(context.ends[:-1], gradients[:-1], strict=True):
            total[:, :, :end] += gradient
        return total, None
