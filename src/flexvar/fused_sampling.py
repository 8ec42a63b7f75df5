"""Choosing codes by one Triton kernel on CUDA: top-k, top-p and the inverse of the cumulative distribution, without sorting.

What sorting is for, finding the logit at which a count or a sum is reached, is done by halving the range of the row's logits: read as
integers in the order of their values, at most 32 halvings tell any two float32 apart. The row stays in registers. `sampling.choose` is
the truth.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexvar import sampling
from flexvar.sampling import Sampling

WIDEST_OF_FEW_WARPS = 4096


def choose(logits: Tensor, numbers: Tensor, settings: Sampling, greedy: bool = False) -> Tensor:
    """Codes (B, n) from logits (B, n, V) and uniform numbers (B, n), as `sampling.choose` gives them, but for ties of rounding."""
    if greedy or settings.top_k == 1:
        return sampling.choose(logits, numbers, settings, greedy)
    rows = logits.float().flatten(0, 1).contiguous()  # (R, V)
    candidates = rows.shape[1]
    codes = torch.empty(numbers.shape, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(candidates)
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _choose_row[(len(rows),)](
            rows,
            numbers.float().contiguous(),
            codes,
            candidates,
            int(min(settings.top_k or candidates, candidates)),
            float(settings.top_p),
            float(settings.temperature),
            LIMITED=bool(0 < settings.top_p < 1),
            BLOCK=block,
            num_warps=4 if block <= WIDEST_OF_FEW_WARPS else 16,
        )
    return codes


@triton.jit
def _mass_above(weights, keys, key):  # type: ignore[no-untyped-def]
    """What all candidates with a larger logit weigh together."""
    return tl.sum(tl.where(keys > key, weights, 0.0))


@triton.jit
def _weight_at(weights, keys, key):  # type: ignore[no-untyped-def]
    """What one candidate with this logit weighs."""
    return tl.max(tl.where(keys == key, weights, 0.0))


@triton.jit
def _choose_row(logits, numbers, codes, V, top_k, top_p, temperature, LIMITED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of logits (V) and one number to one code.

    An example: five candidates a, b, c, d, e whose weights, exp(logit), are as 5, 3, 3, 2, 1, with top_k 4, top_p 0.6 and the number 0.9.
    Top-k: d's key is the largest that 4 candidates reach. 3 of them exceed it, so that 1 of those that equal it stays; 5 + 3 + 3 + 2 = 13
    is kept.
    Top-p: the limit is 0.6 · 13 = 7.8. The mass above d's key is 11, above c's, which is b's too, 5: this is the smallest key that starts
    below the limit. b starts at 5 and c at 8, so that ceil((7.8 - 5) / 3) = 1 of the two stays; 5 + 3 = 8 is kept.
    The inverse: the target is 0.9 · 8 = 7.2. The mass down to a's key is 5, down to b's 5 + 3 + 3: it falls among those that equal b,
    (7.2 - 5) / 3 = 0.7 places in, which is the first of them: b.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < V
    values = tl.load(logits + row * V + place, mask=inside, other=float("-inf"))
    bits = values.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the values
    weights = tl.where(inside, tl.exp((values - tl.max(values)) / temperature), 0.0)
    largest = tl.max(keys)

    # Top-k: the largest key that at least k candidates reach. Of those that equal it, so many stay that k are kept.
    low, high = tl.min(tl.where(inside, keys, largest)), largest
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        enough = tl.sum((inside & (keys >= middle)).to(tl.int32)) >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    last = low
    equals = top_k - tl.sum((keys > last).to(tl.int32))
    above = _mass_above(weights, keys, last)
    each = _weight_at(weights, keys, last)
    kept = above + equals.to(tl.float32) * each

    # Top-p: the smallest key with less than p of the kept mass above it. Of those that equal it, the ones that start below p stay.
    if LIMITED:
        limit = top_p * kept
        low, high = last, largest
        while low < high:
            middle = (low & high) + ((low ^ high) >> 1)  # rounded down
            below = _mass_above(weights, keys, middle) < limit
            high = tl.where(below, middle, high)
            low = tl.where(below, low, middle + 1)
        equals = tl.where(high == last, equals, tl.sum((inside & (keys == high)).to(tl.int32)))
        last = high
        above = _mass_above(weights, keys, last)
        each = _weight_at(weights, keys, last)
        equals = tl.minimum(equals, tl.maximum(tl.ceil((limit - above) / each), 1.0).to(tl.int32))
        kept = above + equals.to(tl.float32) * each

    # The inverse: the largest key whose own mass and that above it exceed the target; the last one where only its own is left.
    target = tl.load(numbers + row) * kept
    low, high = last, largest
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        exceeded = tl.sum(tl.where(keys >= middle, weights, 0.0)) > target
        low = tl.where(exceeded, middle, low)
        high = tl.where(exceeded, high, middle - 1)
    low = tl.where(above <= target, last, low)
    same = inside & (keys == low)
    count = tl.where(low == last, equals, tl.sum(same.to(tl.int32)))
    rank = ((target - _mass_above(weights, keys, low)) / _weight_at(weights, keys, low)).to(tl.int32)
    rank = tl.minimum(tl.maximum(rank, 0), count - 1)
    here = same & (tl.cumsum(same.to(tl.int32), 0) - 1 == rank)
    tl.store(codes + row, tl.max(tl.where(here, place, 0)).to(tl.int64))
