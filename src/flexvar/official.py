"""The released checkpoints and ours: the same tensors under other names.

One table of renamings turns each of our names into the released one; walked from our model's own names it reads released files, and
walked the other way it writes them.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexvar.attention import block_causal_mask
from flexvar.checks import warn
from flexvar.schedule import Schedule
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.transformer import Transformer, TransformerConfig
from flexvar.weights import fill

RENAMINGS: tuple[tuple[str, str], ...] = (
    # tokenizer, ours -> released
    (r"^(encoder|decoder)\.levels\.", r"\1.conv_blocks."),
    (r"^(encoder|decoder)\.middle\.", r"\1.mid."),
    (r"^((?:encoder|decoder)\.conv_blocks\.\d+)\.blocks\.", r"\1.res."),
    (r"\.attentions\.", ".attn."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^(encoder\..*)\.resample\.", r"\1.downsample.conv."),
    (r"^(decoder\..*)\.resample\.", r"\1.upsample.conv."),
    (r"^((?:encoder|decoder)\..*)\.out\.", r"\1.proj_out."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^before_codes\.", "quant_conv."),
    (r"^after_codes\.", "post_quant_conv."),
    # transformer, ours -> released
    (r"^class_embedding\.", "class_emb."),
    (r"^start$", "pos_start"),
    (r"^positions$", "pos_1LC"),
    (r"^code_projection\.", "word_embed."),
    (r"\.attention\.qkv\.", ".attn.mat_qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.attention\.", ".attn."),
    (r"\.mlp\.rise\.", ".ffn.fc1."),
    (r"\.mlp\.fall\.", ".ffn.fc2."),
    (r"^shared_modulation\.", "shared_ada_lin.1."),
    (r"^final_modulation\.", "head_nm.ada_lin.1."),
    (r"\.modulation_offset$", ".ada_gss"),
    (r"\.modulation\.", ".ada_lin.1."),
)

WITHOUT_MEANING = re.compile(r"(\.zero_k_bias|^attn_bias_for_masking|^quantize\.codebook_used)$")
"""Released tensors that hold no learned value: zeros, a mask and a usage counter."""

USAGE_COUNTER = 65536

FREE = {"depth", "classes", "codebook_size", "shared_modulation", "trained_grid", "positions"}
"""What the released code can be told of a model, or need not know of it; the rest of a model's shape is fixed there."""


def released_name(name: str) -> str:
    """The released name of one of our tensors."""
    for pattern, replacement in RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def read_released(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a released .pth file, by their released names and without those that hold no learned value.

    Understands {"model": ...} (tokenizer), a bare dictionary, and {"trainer": {"var_wo_ddp": ...}} (transformer). Nothing but tensors and
    plain containers is unpickled. Raises ValueError, in one line, for a file that is truncated, holds code or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a released .pth file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is not a torch file, and was not loaded; fetch the released file again"
        ) from error
    except Exception as error:  # torch raises anything on damaged files
        raise ValueError(f"{path} is damaged or not a torch file; fetch it again") from error
    for layer in ("trainer", "var_wo_ddp", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(layer), Mapping):
            content = content[layer]
    if not isinstance(content, Mapping) or not content or not all(_is_plain(value) for value in content.values()):
        raise ValueError(f"{path} holds no table of plain tensors; a released file is one, bare or under 'model' or 'trainer'")
    return {str(name): tensor for name, tensor in content.items() if not WITHOUT_MEANING.search(str(name))}


def tokenizer_from_released(tensors: Mapping[str, Tensor]) -> Tokenizer:
    """A tokenizer with the released tensors; its shape is read off them. ValueError names a missing, extra or misshapen tensor."""
    channels = _shape(tensors, "encoder.conv_in.weight", 1, 1, 1, 1)[0]
    levels = _count(tensors, r"encoder\.conv_blocks\.(\d+)\.")
    firsts = [f"encoder.conv_blocks.{level}.res.0.conv2.weight" for level in range(max(1, levels))]
    codebook_size, code_width = _shape(tensors, "quantize.embedding.weight", 1, 1)
    config = TokenizerConfig(
        channels=channels,
        multipliers=tuple(_times(channels, _shape(tensors, name, 1, 1, 1, 1)[0], f"{name} and encoder.conv_in.weight") for name in firsts),
        blocks=_count(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        z_channels=_shape(tensors, "encoder.conv_out.weight", 1, 1, 1, 1)[0],
        codebook_size=codebook_size,
        code_width=code_width,
    )
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    return fill(tokenizer, tensors, released_name, _released_shape)


def transformer_from_released(tensors: Mapping[str, Tensor]) -> Transformer:
    """A transformer with the released tensors; its shape is read off them. ValueError names a missing, extra or misshapen tensor."""
    codebook_size, width = _shape(tensors, "head.weight", 1, 1)
    table_side = _shape(tensors, "pos_1LC", 1, 1, 2, 2)[-1]
    heads = _shape(tensors, "blocks.0.attn.scale_mul_1H11", 1, 1, 1, 1)[1]
    _times(heads, width, "head.weight and blocks.0.attn.scale_mul_1H11")
    config = TransformerConfig(
        depth=_count(tensors, r"blocks\.(\d+)\."),
        width=width,
        heads=heads,
        mlp_ratio=_shape(tensors, "blocks.0.ffn.fc1.weight", 1, 1)[0] / width,
        classes=_shape(tensors, "class_emb.weight", 2, 1)[0] - 1,  # one is the null class
        codebook_size=codebook_size,
        code_width=_shape(tensors, "word_embed.weight", 1, 1)[1],
        trained_grid=table_side // 2,
        table_side=table_side,
        positions="area",
        shared_modulation="shared_ada_lin.1.weight" in tensors,
    )
    with torch.device("meta"):
        transformer = Transformer(config)
    return fill(transformer, tensors, released_name, _released_shape)


def warn_of_differences(tokenizer: TokenizerConfig, transformer: TransformerConfig) -> None:
    """Warns, naming what differs, where the released code has to be changed to build such a model, or would draw otherwise with it."""
    fixed = asdict(TokenizerConfig()) | asdict(TransformerConfig(transformer.depth))
    ours = asdict(tokenizer) | asdict(transformer)  # what has the same name in both is equal: the codes
    differing = [name for name in fixed if name not in FREE and ours[name] != fixed[name]]
    if differing:
        differences = ", ".join(f"{name} is {ours[name]} instead of {fixed[name]}" for name in differing)
        warn(f"the released code builds models of its own shape: {differences}; change it to load these files")
    if transformer.positions != "area":
        side = transformer.table_side * tokenizer.downsample
        warn(f"the released code knows positions by area only: above {side} px it draws otherwise than this model")


def to_released(module: Tokenizer | Transformer) -> dict[str, Tensor]:
    """The tensors of a model under their released names and shapes, the meaningless ones included: what the released loader takes.

    They lie on the CPU in float32, as those of the released files do, wherever the model is and whatever it computes in; those of a model
    without data have none.
    """
    released = {}
    for name, tensor in module.state_dict().items():
        theirs = released_name(name)
        plain = tensor.detach().float() if tensor.is_meta else tensor.detach().to("cpu", torch.float32)
        released[theirs] = plain.reshape(_released_shape(theirs, tuple(tensor.shape))).contiguous()
    if isinstance(module, Tokenizer):
        released["quantize.codebook_used"] = torch.zeros(USAGE_COUNTER)
        return released
    width, depth = module.config.width, module.config.depth
    released |= {f"blocks.{i}.attn.zero_k_bias": torch.zeros(width) for i in range(depth)}
    schedule = Schedule.named("10")
    mask = torch.zeros(schedule.tokens, schedule.tokens).masked_fill(~block_causal_mask(schedule.counts, torch.device("cpu")), -torch.inf)
    released["attn_bias_for_masking"] = mask[None, None]
    return released


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor of real numbers, all of them written out."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_complex()


def _released_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the released model gives a tensor: ours, with axes of length 1 in some cases."""
    if name == "pos_start":
        return (1, 1, *shape)
    if name == "pos_1LC":
        return (1, *shape)
    if name.endswith("scale_mul_1H11"):
        return (1, *shape, 1, 1)
    if name.endswith("ada_gss"):
        return (1, 1, *shape)
    return shape


def _shape(tensors: Mapping[str, Tensor], name: str, *least: int) -> tuple[int, ...]:
    """The shape of a tensor, which must be there and have at least these lengths, one for each axis."""
    if name not in tensors:
        raise ValueError(
            f"the weights do not fit the model: {name} is missing; was the tokenizer's file given for the transformer's, or the reverse?"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != len(least) or any(length < lowest for length, lowest in zip(shape, least, strict=True)):
        raise ValueError(f"the weights do not fit the model: {name} has shape {shape} instead of {len(least)} axes of at least {least}")
    return shape


def _times(part: int, whole: int, names: str) -> int:
    """How often `part` goes into `whole`, lengths of the named tensors; ValueError unless evenly."""
    if whole % part:
        raise ValueError(f"the weights do not fit the model: {names} do not go together; {whole} is not a multiple of {part}")
    return whole // part


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the names hold at the pattern's group."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
