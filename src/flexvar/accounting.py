"""What a generation or a step of training costs, said before anything runs: tokens, FLOPs by part, parameters and memory.

One multiply-add counts as 2 FLOPs. Products of matrices, attention and convolutions are counted; normalisation, activation functions,
resampling and the choice of codes (top-k and sums over V numbers a token) are not: below 1 % of the work together. The transformer is
counted by formula, the decoder by running it on tensors without data, so that whatever shape it has is counted as it is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flexvar.schedule import Schedule, ScheduleLike, Size
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.transformer import MODULATIONS, Transformer, TransformerConfig

MEBIBYTE = 2**20

C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class ScaleFlops:
    """FLOPs of one scale, the whole batch, both halves of guidance included."""

    seen: int  # tokens that each token attends to: this scale's and all earlier ones'
    projections: int  # queries, keys, values and what comes out of attention: 4 D x D matrices
    attention: int  # scores and weighted sum
    mlp: int
    head: int  # on B rows: guidance is folded into what the head reads

    @property
    def total(self) -> int:
        """All parts together."""
        return self.projections + self.attention + self.mlp + self.head


@dataclass(frozen=True)
class Flops:
    """FLOPs of one batch by part."""

    scales: tuple[ScaleFlops, ...]
    modulation: int  # of all blocks and the head by the class, once a picture
    embedding: int  # lifted codes into the transformer's width
    decoder_convolutions: int
    decoder_attention: int
    rows_per_picture: int  # through the blocks: 2 with guidance

    def of(self, part: str) -> int:
        """One part ("projections", "attention", "mlp", "head") over all scales."""
        return sum(getattr(scale, part) for scale in self.scales)

    @property
    def transformer(self) -> int:
        """Everything but the decoder."""
        return sum(scale.total for scale in self.scales) + self.modulation + self.embedding

    @property
    def transformer_as_released(self) -> int:
        """What the released code spends: both halves through the head, and the modulation at every scale."""
        return self.transformer + (self.rows_per_picture - 1) * self.of("head") + (len(self.scales) - 1) * self.modulation

    @property
    def decoder(self) -> int:
        """Codes of the last scale to pictures."""
        return self.decoder_convolutions + self.decoder_attention

    @property
    def total(self) -> int:
        """All parts together."""
        return self.transformer + self.decoder


@dataclass(frozen=True)
class Memory:
    """Bytes. What the libraries add for themselves (a convolution's workspace, a CUDA context) is not in it."""

    transformer_weights: int
    tokenizer_weights: int  # encoder included
    cache: int  # keys and values of all scales but the last
    drawing: int  # estimate: the last scale's activations, or its logits in float32 where they are larger
    decoding: int  # the largest sum of maps that exist at the same time in the decoder

    @property
    def weights(self) -> int:
        """Transformer and tokenizer."""
        return self.transformer_weights + self.tokenizer_weights

    @property
    def working(self) -> int:
        """The most that exists at the same time beside the weights; the cache is gone when the last scale is decoded."""
        return max(self.cache + self.drawing, self.decoding)

    @property
    def peak(self) -> int:
        """The most that exists at the same time."""
        return self.weights + self.working


@dataclass(frozen=True)
class Plan:
    """The cost of drawing one batch."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    schedule: Schedule
    batch: int
    guided: bool
    dtype: torch.dtype
    transformer_parameters: int
    tokenizer_parameters: int
    flops: Flops
    memory: Memory

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """A plain-text table."""
        flops, memory, model = self.flops, self.memory, self.transformer
        height, width = (side * self.tokenizer.downsample for side in self.schedule[-1])
        lines = [
            f"depth {model.depth}, width {model.width}, {model.heads} heads: {self.transformer_parameters / 1e6:.1f} M parameters; "
            f"tokenizer {self.tokenizer_parameters / 1e6:.1f} M",
            f"{self.batch} x {height} x {width} px, {'guided' if self.guided else 'without guidance'}, "
            f"{str(self.dtype).removeprefix('torch.')}: {self.schedule.tokens} tokens in {len(self.schedule)} scales",
            "",
            f"{'scale':>9}{'tokens':>9}{'seen':>9}{'FLOP':>12}{'share':>9}",
        ]
        for scale, (h, w) in zip(flops.scales, self.schedule, strict=True):
            lines.append(f"{f'{h}x{w}':>9}{h * w:>9}{scale.seen:>9}{_flop(scale.total):>12}{scale.total / flops.total:>9.1%}")
        parts = {part: flops.of(part) for part in ("projections", "attention", "mlp", "head")}
        parts |= {"class modulation": flops.modulation, "embedding": flops.embedding}
        parts |= {"decoder convolutions": flops.decoder_convolutions, "decoder attention": flops.decoder_attention}
        lines += ["", f"{'part':<24}{'FLOP':>12}{'share':>9}"]
        lines += [f"{name:<24}{_flop(count):>12}{count / flops.total:>9.1%}" for name, count in parts.items()]
        lines.append(f"{'all':<24}{_flop(flops.total):>12}   {_flop(flops.total / self.batch)} a picture; choosing codes is negligible")
        released = _flop(flops.transformer_as_released)
        lines.append(f"{'transformer alone':<24}{_flop(flops.transformer):>12}   {released} the way the released code does it")
        sizes = {"transformer weights": memory.transformer_weights, "tokenizer weights": memory.tokenizer_weights}
        sizes |= {"keys and values": memory.cache, "drawing, last scale": memory.drawing, "decoding": memory.decoding}
        lines += ["", f"{'memory':<24}{'MiB':>12}"]
        lines += [f"{name:<24}{size / MEBIBYTE:>12.1f}" for name, size in sizes.items()]
        lines.append(f"{'peak':<24}{memory.peak / MEBIBYTE:>12.1f}   drawing and decoding follow one another")
        return lines


def plan(
    transformer: TransformerConfig,
    tokenizer: TokenizerConfig,
    schedule: ScheduleLike,
    *,
    batch: int = 1,
    guided: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """What drawing a batch of pictures costs; only the last scale is decoded. Nothing is allocated.

    Raises ValueError for a batch below 1, and for pictures so large that their bytes cannot be counted in 63 bits.
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch} draws nothing; give 1 or more")
    schedule = Schedule.of(schedule)
    rows, width = 2 * batch if guided else batch, transformer.width
    hidden, last = round(width * transformer.mlp_ratio), schedule.counts[-1]
    try:
        convolutions, attention, decoding = _decoding(tokenizer, schedule[-1], batch, dtype)
        parameters = _transformer_parameters(transformer), _parameters(_empty(Tokenizer, tokenizer, dtype))
    except (RuntimeError, TypeError) as error:  # tensors without data fail at nothing but their size
        raise ValueError(f"no machine holds {batch} x {schedule[-1][0]} x {schedule[-1][1]} codes of width {width}; take fewer") from error
    flops = Flops(
        scales=tuple(_scale_flops(transformer, at, batch, rows) for at in schedule.slices),
        modulation=_modulation_flops(transformer, rows),
        embedding=_embedding_flops(transformer, schedule, batch),
        decoder_convolutions=convolutions,
        decoder_attention=attention,
        rows_per_picture=rows // batch,
    )
    memory = Memory(
        transformer_weights=parameters[0] * dtype.itemsize,
        tokenizer_weights=parameters[1] * dtype.itemsize,
        cache=2 * transformer.depth * rows * (schedule.tokens - last) * width * dtype.itemsize,
        # Attention holds one block's keys and values of all scales, and some twelve maps of the last one; the MLP its hidden layer twice
        # beside x, its normalised and its modulated form; sampling the logits twice.
        drawing=max(
            rows * (2 * schedule.tokens + 12 * last) * width * dtype.itemsize,
            rows * last * (2 * hidden + 3 * width) * dtype.itemsize,
            2 * batch * last * transformer.codebook_size * 4,
        ),
        decoding=decoding,
    )
    return Plan(transformer, tokenizer, schedule, batch, guided, dtype, *parameters, flops, memory)


def training_flops(config: TransformerConfig, schedule: ScheduleLike, batch: int) -> int:
    """FLOPs of one step of training: three times the forward pass, since the backward pass has two products for each of its products.

    It is the work that the step asks for: a token's attention to what it sees, nothing for scores behind a mask, for what gradient
    checkpointing computes again, or for the optimiser.
    """
    schedule = Schedule.of(schedule)
    scales = sum(_scale_flops(config, at, batch, batch).total for at in schedule.slices)
    return 3 * (scales + _modulation_flops(config, batch) + _embedding_flops(config, schedule, batch))


def _modulation_flops(config: TransformerConfig, rows: int) -> int:
    """Of every block, or once where it is shared, and of the head."""
    return 2 * rows * (MODULATIONS * (1 if config.shared_modulation else config.depth) + 2) * config.width**2


def _embedding_flops(config: TransformerConfig, schedule: Schedule, batch: int) -> int:
    return 2 * batch * (schedule.tokens - schedule.first) * config.code_width * config.width


def _scale_flops(config: TransformerConfig, at: slice, batch: int, rows: int) -> ScaleFlops:
    """2 FLOPs for each row, token and weight; attention multiplies every query with every key and every score with every value."""
    width, tokens = config.width, at.stop - at.start
    through_blocks = 2 * rows * tokens * config.depth
    return ScaleFlops(
        seen=at.stop,
        projections=through_blocks * 4 * width**2,
        attention=through_blocks * 2 * at.stop * width,
        mlp=through_blocks * 2 * width * round(width * config.mlp_ratio),
        head=2 * batch * tokens * width * config.codebook_size,
    )


def _transformer_parameters(config: TransformerConfig) -> int:
    """By two networks of one and of two blocks, since every further block has as many as the second: so any depth is quickly counted."""
    one, two = (_parameters(_empty(Transformer, replace(config, depth=depth), torch.float32)) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@functools.lru_cache(maxsize=8)
def _decoding(config: TokenizerConfig, size: Size, batch: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """FLOPs of the decoder's convolutions and of its attention, and the most bytes that its maps take at the same time."""
    tokenizer = _empty(Tokenizer, config, dtype)
    with torch.device("meta"), torch.no_grad(), LiveBytes() as live, FlopCounterMode(display=False) as counter:
        tokenizer.decode_vectors(torch.empty(batch, config.code_width, *size, dtype=dtype))
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    return convolutions, counter.get_total_flops() - convolutions, live.most


@functools.lru_cache(maxsize=8)
def encoding_memory(config: TokenizerConfig, size: Size, batch: int, dtype: torch.dtype) -> int:
    """The most bytes that exist at the same time, beside the weights, while pictures of size = (h, w) codes are encoded.

    Raises ValueError for so many that no machine holds them.
    """
    tokenizer, (height, width) = _empty(Tokenizer, config, dtype), (side * config.downsample for side in size)
    try:
        with torch.device("meta"), torch.no_grad(), LiveBytes() as live:
            tokenizer.features(torch.empty(batch, 3, height, width, dtype=dtype))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"no machine holds {batch} x {height} x {width} px; take fewer") from error
    return live.most


@functools.lru_cache(maxsize=8)
def _empty(network: Callable[[C], N], config: C, dtype: torch.dtype) -> N:
    """A network without its numbers."""
    with torch.device("meta"):
        return network(config).to(dtype)


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
        for storage in _storages(result) - set(self._known):
            self._known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, storage.nbytes())
        return result

    def _remove(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    """The memory behind the tensors in nested tuples, lists and dictionaries."""
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _flop(count: float) -> str:
    """A count in the unit that suits it, three digits behind the point."""
    unit, name = (1e12, "T") if count >= 1e12 else (1e9, "G") if count >= 1e9 else (1e6, "M")
    return f"{count / unit:.3f} {name}"
