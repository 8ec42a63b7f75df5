"""A model is a folder: config.json, tokenizer.safetensors, transformer.safetensors. Read and written here, never half."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flexvar.checks import check_whole_numbers
from flexvar.sampling import Guidance, Sampling
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.transformer import Transformer, TransformerConfig
from flexvar.weights import fill
from flexvar.writing import write_whole

FORMAT = 1
CONFIG, TOKENIZER, TRANSFORMER = "config.json", "tokenizer.safetensors", "transformer.safetensors"

D = TypeVar("D")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Defaults:
    """How a model draws when it is not told otherwise."""

    height: int = 256
    width: int = 256
    num_inference_steps: int = 10
    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        check_whole_numbers(self, "the defaults", 1, "height", "width", "num_inference_steps")


@dataclass(frozen=True)
class Model:
    """What a model folder holds. The transformer is None while only the tokenizer has been trained."""

    tokenizer: Tokenizer
    transformer: Transformer | None = None
    class_names: tuple[str, ...] = ()
    defaults: Defaults = field(default_factory=Defaults)
    provenance: Mapping[str, Any] = field(default_factory=dict)  # how it came to be, in plain words and figures
    aliases: Mapping[str, str] = field(default_factory=dict)  # another name for a class -> its name


@dataclass(frozen=True)
class _Config:
    """What config.json says: a model without its weights. ValueError when its parts do not belong together."""

    tokenizer: TokenizerConfig
    transformer: TransformerConfig | None
    class_names: tuple[str, ...]
    defaults: Defaults
    provenance: dict[str, Any]
    aliases: dict[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names is not a list of names; give one name for each class, or [] for none")
        if not isinstance(self.provenance, dict):
            raise ValueError("provenance is not a table; give {} where nothing is known")
        if not isinstance(self.aliases, dict):
            raise ValueError("aliases is not a table of other names and the classes they stand for; give {} for none")
        if self.transformer is not None:
            self._check_that_they_fit(self.transformer)
        for alias, name in self.aliases.items():
            if name not in self.class_names:
                raise ValueError(f"aliases calls a class {name!r} {alias!r}, but no class has that name; name one of class_names")

    def _check_that_they_fit(self, transformer: TransformerConfig) -> None:
        for name in ("codebook_size", "code_width"):
            theirs, ours = getattr(self.tokenizer, name), getattr(transformer, name)
            if theirs != ours:
                raise ValueError(f"{name} is {theirs} for the tokenizer and {ours} for the transformer; they must have the same codes")
        if self.class_names and len(self.class_names) != transformer.classes:
            raise ValueError(f"class_names holds {len(self.class_names)} names for {transformer.classes} classes; give one for each")


def save(model: Model, folder: Path | str, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> None:
    """Writes a model folder. Every file is written under another name and put in place when it is complete.

    Raises FileExistsError when the folder holds a model, or a file of one, and `overwrite` is not set; ValueError when the model's parts
    do not belong together.
    """
    folder = Path(folder)
    there = [name for name in (CONFIG, TOKENIZER, TRANSFORMER) if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder} holds a model already ({', '.join(there)}); choose another folder or ask for overwriting")
    config = _Config(
        tokenizer=model.tokenizer.config,
        transformer=model.transformer.config if model.transformer else None,
        class_names=tuple(model.class_names),
        defaults=model.defaults,
        provenance=dict(model.provenance),
        aliases=dict(model.aliases),
    )
    folder.mkdir(parents=True, exist_ok=True)
    _save_weights(model.tokenizer, folder / TOKENIZER, dtype)
    if model.transformer:
        _save_weights(model.transformer, folder / TRANSFORMER, dtype)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def load(folder: Path | str) -> Model:
    """Reads a model folder onto the CPU in float32, in evaluation mode.

    Raises FileNotFoundError or ValueError, in one line, for a folder, file or tensor that is missing, damaged or does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    with torch.device("meta"):
        tokenizer = Tokenizer(config.tokenizer)
        transformer = Transformer(config.transformer) if config.transformer else None
    return Model(
        tokenizer=_load_weights(tokenizer, folder / TOKENIZER),
        transformer=_load_weights(transformer, folder / TRANSFORMER) if transformer else None,
        class_names=config.class_names,
        defaults=config.defaults,
        provenance=config.provenance,
        aliases=config.aliases,
    )


def load_configs(folder: Path | str) -> tuple[TokenizerConfig, TransformerConfig]:
    """The shapes of a model folder's networks, without their weights. ValueError when it holds a tokenizer only."""
    config = _read_config(Path(folder))
    if config.transformer is None:
        raise ValueError(f"{folder} holds a tokenizer only; train a transformer on it first")
    return config.tokenizer, config.transformer


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it holds no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise ValueError(f"format {config['format']} is newer than this flexvar can read ({FORMAT}); update flexvar")
        defaults = dict(config["defaults"])
        guidance, sampling = _built(Guidance, defaults.pop("guidance")), _built(Sampling, defaults.pop("sampling"))
        return _Config(
            tokenizer=_built(TokenizerConfig, config["tokenizer"]),
            transformer=None if config["transformer"] is None else _built(TransformerConfig, config["transformer"]),
            class_names=_tuples(config["class_names"]),
            defaults=Defaults(guidance=guidance, sampling=sampling, **defaults),
            provenance=config["provenance"],
            aliases=config.get("aliases", {}),  # folders written before there were any have none
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); write the folder again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _save_weights(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()}
    write_whole(path, lambda beside: save_file(tensors, beside))


def _load_weights(module: M, path: Path) -> M:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the model folder is not complete")
    try:
        return fill(module, load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _built(kind: type[D], values: Mapping[str, Any]) -> D:
    """A config dataclass from JSON, whose lists are tuples here."""
    return kind(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
