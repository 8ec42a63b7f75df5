"""What a training run is told: dataclasses that a YAML file and key=value words fill. No torch here, so that errors come at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flexvar.writing import write_whole

C = TypeVar("C", bound="RunConfig")


@dataclass
class DataConfig:
    """Where the pictures come from."""

    kind: Literal["folder", "emoji", "shapes"] = "folder"
    path: str = ""  # folder: class folders of pictures
    classes: list[str] = field(default_factory=list)  # emoji: their names; empty means all
    views: int = 1000  # emoji and shapes: pictures of a class in one epoch
    flip: bool = True  # folder: mirror half of the pictures
    resize: list[float] = field(default_factory=lambda: [1.0, 1.136])  # folder: range of the short side before the crop, over the crop's


@dataclass
class OptimiserConfig:
    """AdamW and the shape of its learning rate (paper, section 4.1; released code)."""

    learning_rate: float = 3e-4  # the highest
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.05  # not on biases, norms, the position table, the start token, scales and codes
    clip: float = 2.0  # largest norm of the gradient; 0 switches clipping off
    warm_up: float = 0.02  # share of the steps, from 0.5 % of the highest rate
    flat: float = 0.05  # share of the steps at the highest rate, then linear to the end
    end: float = 0.1  # last rate over the highest
    ema: float = 0.999  # decay of the averaged weights, which are those that are kept


@dataclass
class RunConfig:
    """What both trainings share."""

    run: str = "runs/unnamed"  # folder of the run; the same command again goes on from its last checkpoint
    seed: int = 0
    steps: int = 10000
    batch: int = 64  # pictures a step, on all processes together
    sizes: list[list[int]] = field(default_factory=lambda: [[256, 256]])  # (height, width) in pixels; one is drawn each step
    workers: int = 0  # processes that prepare pictures, beside each training process
    report_every: int = 100
    save_every: int = 500
    sheet_every: int = 1000
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)


@dataclass
class TokenizerShape:
    """`flexvar.TokenizerConfig`, as a file says it."""

    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    blocks: int = 2
    z_channels: int = 256
    norm_groups: int = 32
    codebook_size: int = 8912
    code_width: int = 32


@dataclass
class TokenizerRun(RunConfig):
    """Training a tokenizer (paper, section 3.1)."""

    model: TokenizerShape = field(default_factory=TokenizerShape)
    scales: int = 5  # K: random scales a step, the last of them the native one
    l1: float = 0.0
    l2: float = 1.0
    codebook: float = 1.0  # codes towards features
    commitment: float = 0.25  # features towards codes
    continuous: float = 0.0  # share of the steps at the start in which features are rebuilt as they are, before codes take their place
    restart_every: int = 100  # steps between two looks for unused codes, which then start anew from features; 0 never


@dataclass
class TransformerShape:
    """`flexvar.TransformerConfig`, as a file says it; classes and codes follow from the data and the tokenizer."""

    depth: int = 16
    width: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    trained_grid: int = 16
    table_side: int = 0
    positions: Literal["area", "smooth"] = "smooth"
    shared_modulation: bool = False


@dataclass
class TransformerRun(RunConfig):
    """Training a transformer on the codes of a frozen tokenizer (paper, section 3.2)."""

    tokenizer: str = ""  # a model folder
    model: TransformerShape = field(default_factory=TransformerShape)
    schedules: Literal["paper", "released"] = "paper"  # how the scales of a step are drawn
    label_drop: float = 0.1  # share of the pictures that are learnt without their class
    drop_path: float = 0.0  # of the last block's paths, rising linearly from 0; the released models use 0.1 · depth / 24
    sheet_labels: list[int] = field(default_factory=lambda: list(range(8)))
    guidance_scale: float = 2.5  # of the sheets, and the finished model's default


def read_config(kind: type[C], path: Path | str, words: Sequence[str] = ()) -> C:
    """A run's config from a YAML file, changed by words such as "optimiser.learning_rate=3e-4".

    Raises FileNotFoundError or ValueError, in one line with the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}; see configs/ for examples")
    for word in words:
        if not re.match(r"[\w.]+=", word):
            raise ValueError(f"{word!r} is not a setting; write key=value, for example steps=2000")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.load(path), OmegaConf.from_dotlist(list(words)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}{_nearest(kind, str(error))}") from error
    except Exception as error:  # what the YAML parser raises is its own affair
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    assert isinstance(config, kind)
    return config


def write_config(config: RunConfig, path: Path) -> list[str]:
    """Writes the whole config, defaults included; names the settings that differ from those that stood there before."""
    new = OmegaConf.to_container(OmegaConf.structured(config))
    old = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else new
    text = OmegaConf.to_yaml(OmegaConf.create(new))
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    before, after = _flat(old), _flat(new)
    return [key for key in after if before.get(key, after[key]) != after[key]]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"optimiser.clip": 2.0, ...}."""
    if not isinstance(settings, dict):
        return {prefix.rstrip("."): settings}
    return {key: value for name, inner in settings.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def _nearest(kind: type[RunConfig], message: str) -> str:
    unknown = re.match(r"Key '(\w+)' not in", message)
    known = [entry.name for entry in fields(kind)]
    close = difflib.get_close_matches(unknown[1], known, 1) if unknown else []
    return f"; did you mean {close[0]!r}?" if close and "Did you mean" not in message else ""
