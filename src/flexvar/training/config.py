"""What a training run is told: dataclasses that a YAML file and key=value words fill. No torch here, so that errors come at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from flexvar.schedule import grid_of
from flexvar.writing import write_whole

C = TypeVar("C", bound="RunConfig")
Rule = tuple[str, Callable[[Any], bool]]
"""What a setting must be, in words and as a test."""

COUNT: Rule = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Rule = ("a number of at least 0", lambda value: 0 <= value < math.inf)
POSITIVE: Rule = ("a number above 0", lambda value: 0 < value < math.inf)
SHARE: Rule = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE: Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)
COUNTS: Rule = ("a list of whole numbers of at least 1", lambda values: bool(values) and min(values) >= 1)
LABELS: Rule = ("a list of labels, each at least 0", lambda values: bool(values) and min(values) >= 0)
BETAS: Rule = ("two numbers, each at least 0 and below 1", lambda pair: len(pair) == 2 and all(0 <= value < 1 for value in pair))
RANGE: Rule = ("two numbers of at least 1, the smaller first", lambda pair: len(pair) == 2 and 1 <= pair[0] <= pair[1] < math.inf)
SIZES: Rule = (
    "a list of pairs [height, width] in pixels, for example [[64, 64]]",
    lambda sizes: bool(sizes) and all(len(size) == 2 and min(size) >= 1 for size in sizes),
)


def _demand(settings: Any, rule: Rule, keys: str) -> None:
    """ValueError naming the first of the keys whose value breaks the rule; keys are written as a user writes them."""
    words, holds = rule
    for key in keys.split():
        if not holds(value := getattr(settings, key.split(".")[-1])):
            raise ValueError(f"{key} is {value}; it must be {words}")


@dataclass
class DataConfig:
    """Where the pictures come from."""

    kind: Literal["folder", "emoji", "shapes"] = "folder"
    path: str = ""  # folder: class folders of pictures
    classes: list[str] = field(default_factory=list)  # emoji: their names; empty means all
    views: int = 1000  # emoji and shapes: pictures of a class in one epoch
    flip: bool = True  # folder: mirror half of the pictures
    resize: list[float] = field(default_factory=lambda: [1.0, 1.136])  # folder: range of the short side before the crop, over the crop's

    def __post_init__(self) -> None:
        _demand(self, COUNT, "data.views")
        _demand(self, RANGE, "data.resize")


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

    def __post_init__(self) -> None:
        _demand(self, POSITIVE, "optimiser.learning_rate")
        _demand(self, BETAS, "optimiser.betas")
        _demand(self, NOT_NEGATIVE, "optimiser.weight_decay optimiser.clip")
        _demand(self, SHARE, "optimiser.warm_up optimiser.flat optimiser.end")
        _demand(self, BELOW_ONE, "optimiser.ema")


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

    def __post_init__(self) -> None:
        _demand(self, COUNT, "steps batch report_every save_every sheet_every")
        _demand(self, NOT_NEGATIVE, "seed workers")
        _demand(self, SIZES, "sizes")


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

    def __post_init__(self) -> None:
        _demand(self, COUNT, "model.channels model.blocks model.z_channels model.norm_groups model.codebook_size model.code_width")
        _demand(self, COUNTS, "model.multipliers")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand(self, COUNT, "scales")
        _demand(self, NOT_NEGATIVE, "l1 l2 codebook commitment restart_every")
        _demand(self, SHARE, "continuous")
        for height, width in self.sizes:
            try:
                grid_of(height, width, 2 ** (len(self.model.multipliers) - 1))
            except ValueError as error:
                raise ValueError(f"sizes holds [{height}, {width}]: {error}") from error


@dataclass
class TransformerShape:
    """`flexvar.TransformerConfig`, as a file says it; classes and codes follow from the data and the tokenizer."""

    depth: int = 16
    width: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    trained_grid: int = 0  # side of the largest grid it is trained on; 0 means what follows from the sizes
    table_side: int = 0
    positions: Literal["area", "smooth"] = "smooth"
    shared_modulation: bool = False

    def __post_init__(self) -> None:
        _demand(self, COUNT, "model.depth")
        _demand(self, NOT_NEGATIVE, "model.width model.heads model.table_side model.trained_grid")
        _demand(self, POSITIVE, "model.mlp_ratio")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand(self, BELOW_ONE, "label_drop drop_path")
        _demand(self, LABELS, "sheet_labels")
        _demand(self, NOT_NEGATIVE, "guidance_scale")


def read_config(kind: type[C], path: Path | str, words: Sequence[str] = ()) -> C:
    """A run's config from a YAML file, changed by words such as "optimiser.learning_rate=3e-4".

    Raises FileNotFoundError or ValueError, in one line that names the key at fault and, where it is unknown, the known ones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}; see configs/ for examples")
    for word in words:
        if not re.match(r"[\w.]+=", word):
            raise ValueError(f"{word!r} is not a setting; write key=value, for example steps=2000")
    read = _parsed(str(path), partial(OmegaConf.load, path))
    if not isinstance(read, DictConfig):
        raise ValueError(f"{path} holds a list at its top level; write settings, one `key: value` a line")
    told = [_parsed(repr(word), partial(OmegaConf.from_dotlist, [word])) for word in words]
    merged, key = OmegaConf.structured(kind), ""
    try:
        for settings in (read, *told):
            for key in settings:  # one by one, as not all of OmegaConf's complaints name the key
                merged = OmegaConf.merge(merged, OmegaConf.masked_copy(settings, [key]))
        key = ""
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_fault(error, str(key))}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
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


def _parsed(name: str, parse: Callable[[], Any]) -> Any:
    """What OmegaConf makes of a text; ValueError when it is not YAML."""
    try:
        return parse()
    except Exception as error:  # what the YAML parser raises is its own affair
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


def _fault(error: OmegaConfBaseException, key: str) -> str:
    """OmegaConf's complaint in one line, with the whole key and, for a key that resembles no known one, the known ones."""
    line = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        known = ", ".join(entry.name for entry in fields(error.object_type)) if is_dataclass(error.object_type) else ""
        return line if "Did you mean" in line or not known else f"{line}; there are {known}"
    full_key = str(error.full_key or "")
    line = re.sub(r"Invalid value assigned: .* is not a ListConfig.*", "it must be a list, or a list of lists for sizes", line)
    return f"{full_key if full_key.startswith(key) else key}: {line}"
