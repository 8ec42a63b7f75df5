"""What a generation or a step of training costs, said before anything runs: tokens, FLOPs and bytes by part, memory, the least seconds.

One multiply-add counts as 2 FLOPs. Products of matrices, attention and convolutions are counted; normalisation, activation functions,
resampling and the choice of codes (top-k and sums over V numbers a token) are not: below 1 % of the work together. The transformer is
counted by formula; the decoder, and the memory of both, by running them on tensors without data (`flexvar.counting`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flexvar.checks import shown, whole_number
from flexvar.counting import bytes_of, count_decoding, drawing_memory, empty_tokenizer, empty_transformer, of_any_depth, parameters_of
from flexvar.rates import Rates
from flexvar.schedule import Schedule, ScheduleLike
from flexvar.tokenizer import TokenizerConfig
from flexvar.transformer import MODULATIONS, TransformerConfig

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Scale:
    """FLOPs or bytes of one scale by part, the whole batch, both halves of guidance included."""

    embedding: int  # lifted codes into the transformer's width
    projections: int  # queries, keys, values and what comes out of attention: 4 D x D matrices
    attention: int  # scores and weighted sum
    mlp: int
    head: int  # on B rows: guidance is folded into what the head reads
    sampling: int

    @property
    def blocks(self) -> int:
        """What comes before the head."""
        return self.embedding + self.projections + self.attention + self.mlp

    @property
    def total(self) -> int:
        """All parts together."""
        return self.blocks + self.head + self.sampling


@dataclass(frozen=True)
class Cost:
    """FLOPs or bytes of one batch by part."""

    scales: tuple[Scale, ...]
    modulation: int  # of all blocks and the head by the class, once a picture
    decoder_convolutions: int
    decoder_attention: int

    def of(self, part: str) -> int:
        """One part ("embedding", "projections", "attention", "mlp", "head", "sampling") over all scales."""
        return sum(getattr(scale, part) for scale in self.scales)

    def by_name(self) -> dict[str, int]:
        """Every part, as tables call it, and all of them."""
        scales = {part: self.of(part) for part in ("projections", "attention", "mlp", "head", "sampling")}
        once = {"class modulation": self.modulation, "embedding": self.of("embedding")}
        decoder = {"decoder convolutions": self.decoder_convolutions, "decoder attention": self.decoder_attention}
        return scales | once | decoder | {"all": self.total}

    @property
    def transformer(self) -> int:
        """Everything but the decoder."""
        return sum(scale.total for scale in self.scales) + self.modulation

    @property
    def decoder(self) -> int:
        """Codes of the last scale to pictures."""
        return self.decoder_convolutions + self.decoder_attention

    @property
    def total(self) -> int:
        """All parts together."""
        return self.transformer + self.decoder


@dataclass(frozen=True)
class Flops(Cost):
    """FLOPs of one batch by part."""

    rows_per_picture: int  # through the blocks: 2 with guidance

    @property
    def transformer_as_released(self) -> int:
        """What the released code spends: both halves through the head, and the modulation at every scale."""
        return self.transformer + (self.rows_per_picture - 1) * self.of("head") + (len(self.scales) - 1) * self.modulation


@dataclass(frozen=True)
class Bytes(Cost):
    """Bytes that one batch moves between memory and processor by part: a lower bound, however well the steps are joined.

    Read once at every scale: the weights of blocks and head, the keys and values of earlier scales. Written: this scale's, but for the
    last. Logits, in float32, are written once and read once by sampling. In the decoder each weight is read once, and what each convolution
    makes is written and read once; its attention moves nothing else. Activations of the blocks are taken to stay in the processor.
    """


@dataclass(frozen=True)
class Seconds:
    """Of one batch by part: the least that a device allows, or what was measured."""

    modulation: float  # what comes before the first scale
    scales: tuple[float, ...]  # their blocks
    head: float
    sampling: float
    decoder: float

    @property
    def parts(self) -> tuple[float, ...]:
        """In the order of `Plan.parts`."""
        return (self.modulation, *self.scales, self.head, self.sampling, self.decoder)

    @property
    def all(self) -> float:
        """The parts together."""
        return sum(self.parts)


@dataclass(frozen=True)
class Memory:
    """Bytes. What the libraries add for themselves (a convolution's workspace, a CUDA context) is not in it."""

    transformer_weights: int
    tokenizer_weights: int  # encoder included
    cache: int  # keys and values of all scales but the last
    drawing: int  # the most that exists at the same time beside the weights, at the last scale, less the cache
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


class Part(NamedTuple):
    """What can be timed of a drawing, with its FLOPs and bytes."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The cost of drawing one batch."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    schedule: Schedule
    batch: int
    guided: bool
    dtype: torch.dtype
    int8: bool
    transformer_parameters: int
    tokenizer_parameters: int
    flops: Flops
    bytes: Bytes
    memory: Memory

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def parts(self) -> Iterator[Part]:
        """Class modulation, the blocks scale by scale, head, sampling, decoder."""
        flops, moved = self.flops, self.bytes
        yield Part("class modulation", flops.modulation, moved.modulation)
        for (h, w), work, traffic in zip(self.schedule, flops.scales, moved.scales, strict=True):
            yield Part(f"blocks at {h}x{w}", work.blocks, traffic.blocks)
        for part in ("head", "sampling"):
            yield Part(part, flops.of(part), moved.of(part))
        yield Part("decoder", flops.decoder, moved.decoder)

    def lines(self) -> list[str]:
        """A plain-text table."""
        flops, moved, memory, model = self.flops, self.bytes, self.memory, self.transformer
        height, width = (side * self.tokenizer.downsample for side in self.schedule[-1])
        precision = f"{str(self.dtype).removeprefix('torch.')}{' with 8-bit weights' if self.int8 else ''}"
        lines = [
            f"depth {model.depth}, width {model.width}, {model.heads} heads: {self.transformer_parameters / 1e6:.1f} M parameters; "
            f"tokenizer {self.tokenizer_parameters / 1e6:.1f} M",
            f"{self.batch} x {height} x {width} px, {'guided' if self.guided else 'without guidance'}, {precision}: "
            f"{self.schedule.tokens} tokens in {len(self.schedule)} scales",
            "",
            f"{'scale':>9}{'tokens':>9}{'seen':>9}{_HEADINGS}",
        ]
        scales = zip(self.schedule, self.schedule.slices, flops.scales, moved.scales, strict=True)
        lines += [
            f"{f'{h}x{w}':>9}{h * w:>9}{at.stop:>9}{_shares(work.total, flops.total)}{_shares(traffic.total, moved.total)}"
            for (h, w), at, work, traffic in scales
        ]
        parts = zip(flops.by_name().items(), moved.by_name().values(), strict=True)
        lines += ["", f"{'part':<27}{_HEADINGS}"]
        lines += [f"{name:<27}{_shares(work, flops.total)}{_shares(traffic, moved.total)}" for (name, work), traffic in parts]
        released = amount(flops.transformer_as_released)
        lines.append(f"{'a picture':<27}{amount(flops.total / self.batch):>12}{'':9}{amount(moved.total / self.batch):>12}")
        lines.append(f"{'transformer alone':<27}{amount(flops.transformer):>12}   {released} the way the released code does it")
        lines.append("bytes: what has to pass between memory and processor at least; the FLOPs of sampling are negligible")
        sizes = {"transformer weights": memory.transformer_weights, "tokenizer weights": memory.tokenizer_weights}
        sizes |= {"keys and values": memory.cache, "drawing, last scale": memory.drawing, "decoding": memory.decoding}
        lines += ["", f"{'memory':<27}{'MiB':>12}"]
        lines += [f"{name:<27}{size / MEBIBYTE:>12.1f}" for name, size in sizes.items()]
        lines.append(f"{'peak':<27}{memory.peak / MEBIBYTE:>12.1f}   drawing and decoding follow one another")
        return lines


_HEADINGS = f"{'FLOP':>12}{'share':>9}{'bytes':>12}{'share':>9}"


def plan(
    transformer: TransformerConfig,
    tokenizer: TokenizerConfig,
    schedule: ScheduleLike,
    *,
    batch: int = 1,
    guided: bool = True,
    split: bool = False,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
) -> Plan:
    """What drawing a batch of pictures costs; only the last scale is decoded. Nothing is allocated.

    split: with and without the class one after the other (`Guidance.split`). dtype: of all but the blocks' weights where these have 8
    bits (`int8`).
    Raises ValueError for a batch below 1, a dtype that is none of torch's for floats, and pictures so large that their bytes cannot be
    counted in 63 bits.
    """
    whole_number(batch, "batch", "give 1 or more", least=1)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {shown(dtype)}; give one of torch's for floats, for example torch.bfloat16")
    schedule, rows = Schedule.of(schedule), 2 * batch if guided else batch
    try:
        decoding, painter = count_decoding(tokenizer, schedule[-1], batch, dtype), empty_tokenizer(tokenizer, dtype)
        parameters = of_any_depth(parameters_of, transformer, dtype)
        moved = _bytes(transformer, schedule, batch, rows, dtype, int8, decoding.moved)
        cache = _token_bytes(transformer, rows, dtype) * (schedule.tokens - schedule.counts[-1])
        memory = Memory(
            transformer_weights=of_any_depth(bytes_of, transformer, dtype, int8),
            tokenizer_weights=bytes_of(painter),
            cache=cache,
            drawing=drawing_memory(transformer, tokenizer, schedule, batch, guided, split, dtype, int8) - cache,
            decoding=decoding.memory,
        )
    except (RuntimeError, TypeError) as error:  # tensors without data fail at nothing but their size
        height, width = schedule[-1]
        raise ValueError(f"no machine holds {batch} x {height} x {width} codes of width {transformer.width}; take fewer") from error
    flops = Flops(
        scales=tuple(_scale_flops(transformer, at, batch, rows) for at in schedule.slices),
        modulation=_modulation_flops(transformer, rows),
        decoder_convolutions=decoding.convolutions,
        decoder_attention=decoding.attention,
        rows_per_picture=rows // batch,
    )
    return Plan(transformer, tokenizer, schedule, batch, guided, dtype, int8, parameters, parameters_of(painter), flops, moved, memory)


def floor(cost: Plan, rates: Rates) -> Seconds:
    """The least seconds that the rates of a device allow: of each part, at each scale, its FLOPs or its bytes, whichever take longer."""

    def least(products: int, moved: int, convolutions: int = 0) -> float:
        return max(products / rates.fastest_products + convolutions / rates.convolutions, moved / rates.memory)

    flops, moved = cost.flops, cost.bytes
    scales = list(zip(flops.scales, moved.scales, strict=True))
    return Seconds(
        modulation=least(flops.modulation, moved.modulation),
        scales=tuple(least(work.blocks, traffic.blocks) for work, traffic in scales),
        head=sum(least(work.head, traffic.head) for work, traffic in scales),
        sampling=sum(least(work.sampling, traffic.sampling) for work, traffic in scales),
        decoder=least(flops.decoder_attention, moved.decoder, flops.decoder_convolutions),
    )


def training_flops(config: TransformerConfig, schedule: ScheduleLike, batch: int) -> int:
    """FLOPs of one step of training: three times the forward pass, since the backward pass has two products for each of its products.

    It is the work that the step asks for: a token's attention to what it sees, nothing for scores behind a mask, for what gradient
    checkpointing computes again, or for the optimiser.
    """
    scales = sum(_scale_flops(config, at, batch, batch).total for at in Schedule.of(schedule).slices)
    return 3 * (scales + _modulation_flops(config, batch))


# -- FLOPs and bytes of the transformer --


def _modulation_flops(config: TransformerConfig, rows: int) -> int:
    """Of every block, or once where it is shared, and of the head."""
    return 2 * rows * (MODULATIONS * (1 if config.shared_modulation else config.depth) + 2) * config.width**2


def _scale_flops(config: TransformerConfig, at: slice, batch: int, rows: int) -> Scale:
    """2 FLOPs for each row, token and weight; attention multiplies every query with every key and every score with every value."""
    width, tokens = config.width, at.stop - at.start
    through_blocks = 2 * rows * tokens * config.depth
    return Scale(
        embedding=2 * batch * tokens * config.code_width * width if at.start else 0,  # the first one has no codes before it
        projections=through_blocks * 4 * width**2,
        attention=through_blocks * 2 * at.stop * width,
        mlp=through_blocks * 2 * width * round(width * config.mlp_ratio),
        head=2 * batch * tokens * width * config.codebook_size,
        sampling=0,
    )


def _token_bytes(config: TransformerConfig, rows: int, dtype: torch.dtype) -> int:
    """One token's keys and values in all blocks."""
    return 2 * config.depth * rows * config.width * dtype.itemsize


def _bytes(config: TransformerConfig, schedule: Schedule, batch: int, rows: int, dtype: torch.dtype, int8: bool, decoder: int) -> Bytes:
    network = empty_transformer(config, 1, dtype, int8)
    block, shared, depth = network.layers[0], network.shared_modulation, config.depth
    embedding, head, projections, mlp = map(bytes_of, (network.code_projection, network.head, block.attention, block.mlp))
    modulation = bytes_of(network.final_modulation) + (depth * bytes_of(block.modulation) if shared is None else bytes_of(shared))

    def scale(at: slice) -> Scale:
        logits = batch * (at.stop - at.start) * config.codebook_size * torch.float32.itemsize
        return Scale(
            embedding=embedding if at.start else 0,
            projections=depth * projections,
            attention=_token_bytes(config, rows, dtype) * (at.start if at.stop == schedule.tokens else at.stop),
            mlp=depth * mlp,
            head=head + logits,
            sampling=logits,
        )

    return Bytes(tuple(map(scale, schedule.slices)), modulation, decoder_convolutions=decoder, decoder_attention=0)


def amount(count: float) -> str:
    """A count in the unit that suits it, three digits behind the point."""
    unit, name = (1e12, "T") if count >= 1e12 else (1e9, "G") if count >= 1e9 else (1e6, "M")
    return f"{count / unit:.3f} {name}"


def _shares(count: int, total: int) -> str:
    return f"{amount(count):>12}{count / total:>9.1%}"
