"""What networks hold, do and move, counted on tensors without data: nothing is allocated, and any shape is counted as it is."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flexvar.generation import Recipe, Request, draw_scales
from flexvar.kv_cache import KeyValueCache
from flexvar.linear import Int8Linear, exchange_layers
from flexvar.sampling import MOST_CANDIDATES, Guidance, Sampling, choose
from flexvar.schedule import Schedule, Size
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.transformer import MODULATIONS, Transformer, TransformerConfig

BLOCKS = 2
"""That are run when the memory of a drawing is counted. Two are enough: from the second on, each starts with the same tensors alive."""


# -- networks --


@functools.lru_cache(maxsize=8)
def empty_tokenizer(config: TokenizerConfig, dtype: torch.dtype) -> Tokenizer:
    """A tokenizer without its numbers."""
    with torch.device("meta"):
        return Tokenizer(config).to(dtype).requires_grad_(False)


@functools.lru_cache(maxsize=16)
def empty_transformer(config: TransformerConfig, depth: int, dtype: torch.dtype, int8: bool = False) -> Transformer:
    """A transformer of so many blocks without its numbers; with 8-bit weights if asked for."""
    with torch.device("meta"):
        transformer = Transformer(replace(config, depth=depth)).to(dtype).requires_grad_(False)
        if int8:
            exchange_layers(transformer, Int8Linear)
    return transformer


def bytes_of(network: nn.Module) -> int:
    """What its weights take, 8-bit ones too."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def parameters_of(network: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in network.parameters())


def of_any_depth(count: Callable[[nn.Module], int], config: TransformerConfig, dtype: torch.dtype, int8: bool = False) -> int:
    """A count of a transformer of any depth, by those of one and of two blocks: every further block adds as many as the second."""
    one, two = (count(empty_transformer(config, depth, dtype, int8)) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


# -- drawing, decoding, encoding --


class Decoding(NamedTuple):
    """What decoding a batch takes."""

    convolutions: int  # FLOPs
    attention: int  # FLOPs
    memory: int  # the most bytes that its maps take at the same time
    moved: int  # bytes: each weight read once, what each convolution makes written and read once


@functools.lru_cache(maxsize=64)
def count_decoding(config: TokenizerConfig, size: Size, batch: int, dtype: torch.dtype) -> Decoding:
    """Of pictures of size = (h, w) codes."""
    tokenizer, made = empty_tokenizer(config, dtype), ResultBytes(torch.ops.aten.convolution)
    vectors = torch.empty(batch, config.code_width, *size, dtype=dtype, device="meta")
    with torch.no_grad(), made, FlopCounterMode(display=False) as counter:
        tokenizer.decode_vectors(vectors)
    with torch.no_grad(), WithoutScores(), LiveBytes() as live:
        tokenizer.decode_vectors(vectors)
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    weights = bytes_of(tokenizer.decoder) + bytes_of(tokenizer.after_codes)
    return Decoding(convolutions, counter.get_total_flops() - convolutions, live.most, weights + 2 * made.total)


@functools.lru_cache(maxsize=64)
def drawing_memory(
    config: TransformerConfig,
    tokenizer: TokenizerConfig,
    schedule: Schedule,
    batch: int,
    guided: bool,
    split: bool,
    dtype: torch.dtype,
    int8: bool,
) -> int:
    """The most bytes that exist at the same time, beside the weights, while codes are drawn; the cache is among them.

    The loop itself draws the last two scales: the last is the dearest, and begins with what the one before it left.
    In half precision the head is copied to float32, as on a CPU; CUDA does without, which shows where a transformer is small.
    """
    transformer = copy.copy(empty_transformer(config, min(BLOCKS, config.depth), dtype, int8))
    blocks, transformer.config = transformer.config.depth, config  # the cache is that of all blocks
    last = Schedule(schedule.sizes[-2:])

    def filled(rows: int, _: object) -> KeyValueCache:
        cache = Transformer.new_cache(transformer, rows, schedule)
        cache.advance(schedule.slices[-len(last)].start)
        return cache

    def choose_once(logits: Tensor, numbers: Tensor, sampling: Sampling, greedy: bool) -> Tensor:
        """Codes are chosen a part at a time, all parts alike."""
        part = slice(MOST_CANDIDATES // sampling.top_k)
        choose(logits.flatten(0, 1)[None, part], numbers.flatten()[None, part], sampling)
        return torch.empty_like(numbers, dtype=torch.int64)

    def lift(codes: Tensor, size: Size) -> Tensor:
        """A small map; to resize one without data takes half of the time of all this."""
        return torch.empty(batch, config.code_width, *size, dtype=dtype, device="meta")

    painter = copy.copy(empty_tokenizer(tokenizer, dtype))
    painter.lift, transformer.new_cache = lift, filled  # type: ignore[method-assign, assignment]
    guidance = Guidance("constant", 2.0 if guided else 1.0, split=split)
    labels, numbers = torch.empty(batch, dtype=torch.int64, device="meta"), torch.empty(batch, last.tokens, device="meta")
    request = Request(labels, Recipe(last, guidance, Sampling(greedy="none")), None, numbers)
    with WithoutScores(), LiveBytes() as live:
        for _ in draw_scales(painter, transformer, request, choose_once):
            pass
    modulation = MODULATIONS * (2 if guided else 1) * batch * config.width * dtype.itemsize  # of each of the other blocks
    return live.most + (config.depth - blocks) * modulation


@functools.lru_cache(maxsize=8)
def encoding_memory(config: TokenizerConfig, size: Size, batch: int, dtype: torch.dtype) -> int:
    """The most bytes that exist at the same time, beside the weights, while pictures of size = (h, w) codes are encoded.

    Raises ValueError for so many that no machine holds them.
    """
    tokenizer, (height, width) = empty_tokenizer(config, dtype), (side * config.downsample for side in size)
    try:
        pictures = torch.empty(batch, 3, height, width, dtype=dtype, device="meta")
        with torch.no_grad(), WithoutScores(), LiveBytes() as live:
            tokenizer.features(pictures)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"no machine holds {batch} x {height} x {width} px; take fewer") from error
    return live.most


# -- operations, followed one by one as they run --


class LiveBytes(TorchDispatchMode):
    """Follows the tensors that are made while it is on: `now` bytes of them exist, `most` existed at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and takes note of new memory among its results."""
        self._known.update(_storages((args, kwargs)))  # what was there before: weights, inputs
        result = func(*args, **(kwargs or {}))
        for storage in [storage for storage in _storages(result) if storage not in self._known]:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, storage.nbytes())
        return result

    def _remove(self, size: int) -> None:
        self.now -= size


class ResultBytes(TorchDispatchMode):
    """Adds up the bytes that the results of one operation take, such as those of torch.ops.aten.convolution."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.total = operation, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and takes note of its results if it is the one."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is self.operation:
            self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class WithoutScores(TorchFunctionMode):
    """Attention leaves the memory that the fused kernels take: its result exists, its scores never do. For tensors without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs any other function as it is."""
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    """The memory behind the tensors in nested tuples, lists and dictionaries."""
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
