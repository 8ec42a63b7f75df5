"""The transformer: says the codes of every scale from the scales before it (paper, section 3.2).

The whole sequence at once in training (`forward`), scale by scale in sampling (`step`, with a cache). It draws no random numbers: labels
and paths are dropped by the trainer, who hands in the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexvar.attention import Attend, AttentionName, all_keys, attention_named
from flexvar.checks import check_whole_numbers
from flexvar.kv_cache import KeyValueCache
from flexvar.position import PositionMode, initial_table, resample
from flexvar.schedule import Schedule, ScheduleLike, Size

MODULATIONS = 6
LARGEST_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer; one dial, the depth, gives the released models (d16, d20, d24, d30)."""

    depth: int = 16
    width: int = 0  # D; 0 means 64 · depth
    heads: int = 0  # H; 0 means heads of width 64
    mlp_ratio: float = 4.0
    classes: int = 1000  # the null class, which stands for no label, is one more
    codebook_size: int = 8912  # V
    code_width: int = 32  # C
    trained_grid: int = 16  # the largest grid it is trained on, on a side
    table_side: int = 0  # of the position table; 0 means 2 · trained_grid
    positions: PositionMode = "area"
    shared_modulation: bool = False  # one class modulation for all blocks, for small models

    def __post_init__(self) -> None:
        check_whole_numbers(self, "the transformer", 1, "depth", "classes", "codebook_size", "code_width", "trained_grid")
        check_whole_numbers(self, "the transformer", 0, "width", "heads", "table_side")  # 0 means that it follows from the others
        if type(self.mlp_ratio) not in (int, float) or not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio of the transformer is {self.mlp_ratio!r}; it must be a number above 0")
        if self.positions not in get_args(PositionMode):
            raise ValueError(f"positions of the transformer is {self.positions!r}; there are {', '.join(get_args(PositionMode))}")
        if type(self.shared_modulation) is not bool:
            raise ValueError(f"shared_modulation of the transformer is {self.shared_modulation!r}; it must be true or false")
        object.__setattr__(self, "width", self.width or 64 * self.depth)
        object.__setattr__(self, "heads", self.heads or max(1, self.width // 64))
        object.__setattr__(self, "table_side", self.table_side or 2 * self.trained_grid)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared among {self.heads} heads; make it a multiple")

    @property
    def null_class(self) -> int:
        """The label that means no class."""
        return self.classes


class Condition(NamedTuple):
    """What the class says to the network, computed once a picture and used at every scale."""

    embedding: Tensor  # (B, D)
    blocks: tuple[Tensor, ...]  # a block's modulation, (6, B, 1, D): gains of attention and MLP, scales, shifts
    final: Tensor  # (2, B, 1, D): scale and shift before the head

    def only(self, batch: int) -> Condition:
        """Of the first `batch` rows alone."""
        return Condition(self.embedding[:batch], tuple(block[:, :batch] for block in self.blocks), self.final[:, :batch])


def normalised(x: Tensor) -> Tensor:
    """Layer normalisation without learned weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class SelfAttention(nn.Module):
    """Multi-head attention whose queries and keys are unit vectors; a learned scale a head takes the place of 1/sqrt(D/H)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have no bias
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4)))
        self.out = nn.Linear(width, width)
        self.joined: nn.Module | None = None  # in place of `qkv` and its bias where it was made faster (`flexvar.linear`)
        self.attend: Attend = all_keys  # in drawing

    @property
    def bias(self) -> Tensor:
        """Of queries, keys and values: (3D)."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side."""
        if self.joined is not None:
            projected: Tensor = self.joined(x)
            return projected  # (B, n, 3D)
        return F.linear(x, self.qkv.weight, self.bias)  # (B, n, 3D)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, n, D/H) of x (B, n, D), ready for attention."""
        qkv = self.project(x).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, D/H) each
        scale = self.log_scale.float().clamp_max(LARGEST_LOG_SCALE).exp()[:, None, None]  # (H, 1, 1)
        q = (F.normalize(q.float(), dim=-1) * scale).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        if q.device.type == "mps":  # where attention of few queries reads other layouts wrongly, in torch 2.11 (pytorch issue 181133)
            return q.contiguous(), k.contiguous(), v.contiguous()
        return q, k, v

    def write(self, attended: Tensor) -> Tensor:
        """The result (B, n, D) of what attention gave (B, H, n, D/H)."""
        written: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return written  # (B, n, D)


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.rise = nn.Linear(width, hidden)
        self.gelu: nn.Module = nn.GELU("tanh")
        self.fall = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.gelu(self.rise(x)))  # (B, n, D)


class Block(nn.Module):
    """Attention and MLP, each modulated by the class."""

    WITHOUT_DECAY = ("modulation_offset",)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.mlp = MLP(config.width, round(config.width * config.mlp_ratio))
        if config.shared_modulation:
            self.modulation_offset = nn.Parameter(torch.empty(MODULATIONS, config.width))
        else:
            self.modulation = nn.Linear(config.width, MODULATIONS * config.width)

    def forward(self, x: Tensor, modulation: Tensor, attend: Attend, paths: Tensor | None = None) -> Tensor:
        return self.after(x, attend(*self.before(x, modulation)), modulation, paths)  # (B, n, D)

    def before(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: queries, keys and values (B, H, n, D/H)."""
        _, _, scale, _, shift, _ = modulation  # (B, 1, D) each
        return self.attention.read(normalised(x) * (1 + scale) + shift)

    def after(self, x: Tensor, attended: Tensor, modulation: Tensor, paths: Tensor | None = None) -> Tensor:
        """What comes after it, the MLP included: (B, n, D)."""
        gain1, gain2, _, scale, _, shift = modulation  # (B, 1, D) each
        path1, path2 = (1.0, 1.0) if paths is None else paths[:, :, None, None]  # (B, 1, 1) each
        x = x + path1 * gain1 * self.attention.write(attended)  # (B, n, D)
        return x + path2 * gain2 * self.mlp(normalised(x) * (1 + scale) + shift)  # (B, n, D)


class Transformer(nn.Module):
    """Class labels and earlier codes to logits over the codebook. `gain_factor`: see `initialise`."""

    WITHOUT_DECAY = ("positions",)

    made_faster: frozenset[str] = frozenset()  # "int8", "compiled": how it was changed in place, for drawing alone

    def __init__(self, config: TransformerConfig, gain_factor: float = 1e-3) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.class_embedding = nn.Embedding(config.classes + 1, width)  # the last row is the null class
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(width, config.table_side, config.table_side))
        self.code_projection = nn.Linear(config.code_width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.shared_modulation = nn.Linear(width, MODULATIONS * width) if config.shared_modulation else None
        self.final_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.codebook_size)
        self.initialise(gain_factor)

    @torch.no_grad()
    def initialise(self, gain_factor: float = 1e-3) -> None:
        """The released initialisation (released code), whatever was there before. `gain_factor`: of the modulation's gains, 1e-4 for d24.

        The released code leaves a linear layer that all blocks share as it is; here it is scaled as those of single blocks are.
        """
        depth, width = self.config.depth, self.config.width
        std = math.sqrt(1 / (3 * width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=std)
        self.positions.copy_(initial_table(width, self.config.table_side))
        self.head.weight.mul_(0.02)
        for block in self.layers:
            block.attention.out.weight.div_(math.sqrt(2 * depth))
            block.mlp.fall.weight.div_(math.sqrt(2 * depth))
            if self.shared_modulation is not None:
                nn.init.normal_(block.modulation_offset, std=1 / math.sqrt(width))
                block.modulation_offset[:2].mul_(gain_factor)
                block.modulation_offset[2:].mul_(0.5)
        for modulation in [self.shared_modulation] if self.shared_modulation is not None else [block.modulation for block in self.layers]:
            modulation.weight[2 * width :].mul_(0.5)
            modulation.weight[: 2 * width].mul_(gain_factor)
        self.final_modulation.weight.mul_(0.5)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.start.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, and holds its weights in where they are not of 8 bits."""
        return self.start.dtype

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def refuse_made_faster(self) -> None:
        """Raises ValueError where it was made faster: its weights are laid out for one device, or rounded, or recordings point at them."""
        if self.made_faster:
            how = ", ".join(sorted("of 8-bit weights" if name == "int8" else name for name in self.made_faster))
            raise ValueError(f"a model made faster ({how}) stays where it is and is not saved; load it again from its folder")

    # -- the parts of one pass --

    def condition(self, labels: Tensor) -> Condition:
        """The class modulation of every block for labels (B,), int64, where `config.null_class` means no class."""
        embedding = self.class_embedding(labels)  # (B, D)
        signal = F.silu(embedding)
        if self.shared_modulation is not None:
            shared = self.shared_modulation(signal).unflatten(-1, (MODULATIONS, -1))  # (B, 6, D)
            blocks = [shared + block.modulation_offset for block in self.layers]
        else:
            blocks = [block.modulation(signal).unflatten(-1, (MODULATIONS, -1)) for block in self.layers]
        final = self.final_modulation(signal).unflatten(-1, (2, -1))  # (B, 2, D)
        return Condition(embedding, tuple(block.transpose(0, 1)[:, :, None] for block in blocks), final.transpose(0, 1)[:, :, None])

    def begin(self, condition: Condition, size: Size) -> Tensor:
        """The embedded first scale (B, h·w, D): class and start token at every position."""
        first = (condition.embedding + self.start)[:, None]  # (B, 1, D)
        return first + resample(self.positions, size, self.config.positions)  # (B, h·w, D)

    def embed(self, inputs: Tensor, size: Size) -> Tensor:
        """The embedded tokens (B, h·w, D) of a later scale, from its inputs (B, h·w, C): the codes before it, lifted to its size."""
        return self.code_projection(inputs) + resample(self.positions, size, self.config.positions)  # (B, h·w, D)

    def read_out(self, x: Tensor, condition: Condition) -> Tensor:
        """What the head reads, (B, n, D)."""
        scale, shift = condition.final  # (B, 1, D) each
        return normalised(x) * (1 + scale) + shift  # (B, n, D)

    # -- the two ways to run it --

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        schedule: ScheduleLike,
        *,
        paths: Tensor | None = None,
        attention: AttentionName = "by-scale",
        recompute: bool = False,
    ) -> Tensor:
        """Teacher forcing: logits (B, L, V), float32, of all scales at once; within autocast rounded by the head to its dtype, as released.

        labels: (B,), int64. inputs: (B, L - first, C), from `Tokenizer.inputs`. paths: (depth, 2, B), the factor of each residual path
        when some are dropped (stochastic depth: 0, or one over the kept share). attention: the way to compute it, without a change in
        what it gives. recompute: compute what is inside the blocks again in the backward pass instead of keeping it (gradient
        checkpointing): a third more work, a fraction of the memory. Raises ValueError for inputs of another length.
        """
        schedule = Schedule.of(schedule)
        if inputs.shape[1] != schedule.tokens - schedule.first:
            raise ValueError(
                f"inputs have {inputs.shape[1]} tokens, but {schedule} needs {schedule.tokens - schedule.first}: all but the first scale's"
            )
        condition = self.condition(labels)
        scales = [self.begin(condition, schedule[0])]
        for size, at in zip(schedule.sizes[1:], schedule.slices[1:], strict=True):
            scales.append(self.embed(inputs[:, at.start - schedule.first : at.stop - schedule.first], size))
        x = torch.cat(scales, 1)  # (B, L, D)
        attend = attention_named(attention, schedule.counts, x.device)
        for i, block in enumerate(self.blocks):
            given = (x, condition.blocks[i], attend, None if paths is None else paths[i])
            x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False) if recompute else block(*given)  # (B, L, D)
        return self.head(self.read_out(x, condition)).float()  # (B, L, V)

    def step(self, x: Tensor, condition: Condition, cache: KeyValueCache) -> Tensor:
        """One scale: embedded tokens (B, n, D) to what the head reads (B, n, D). The cache takes in this scale."""
        for i, block in enumerate(self.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i, block: Block = block) -> Tensor:
                return block.attention.attend(q, *cache.extend(i, k, v))

            x = block(x, condition.blocks[i], attend)  # (B, n, D)
        cache.advance(x.shape[1])
        return self.read_out(x, condition)  # (B, n, D)

    def new_cache(self, batch: int, schedule: ScheduleLike) -> KeyValueCache:
        """An empty cache for a batch and a schedule."""
        config = self.config
        tokens = Schedule.of(schedule).slices[-1].start  # the last scale is read by none
        return KeyValueCache(config.depth, batch, config.heads, tokens, config.width // config.heads, dtype=self.dtype, device=self.device)
