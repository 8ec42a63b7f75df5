"""A model is a folder: config.json, tokenizer.safetensors, transformer.safetensors. Read and written here, never half."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexvar.checks import check_whole_numbers
from flexvar.sampling import Guidance, Sampling
from flexvar.tokenizer import Tokenizer, TokenizerConfig
from flexvar.transformer import Transformer, TransformerConfig
from flexvar.weights import fill
from flexvar.writing import Write, make_folder, write_together

FORMAT = 1
CONFIG, TOKENIZER, TRANSFORMER = "config.json", "tokenizer.safetensors", "transformer.safetensors"

D = TypeVar("D")


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
    digests: dict[str, str]  # of each weights file, which holds its own too: files of two saves do not pass for one model

    def __post_init__(self) -> None:
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names is not a list of names; give one name for each class, or [] for none")
        if not isinstance(self.provenance, dict):
            raise ValueError("provenance is not a table; give {} where nothing is known")
        if not isinstance(self.digests, dict):
            raise ValueError("digests is not a table of weight files and what they say of themselves; give {} where nothing is known")
        if not isinstance(self.aliases, dict):
            raise ValueError("aliases is not a table of other names and the classes they stand for; give {} for none")
        if self.transformer is not None:
            self._check_that_they_fit(self.transformer)
        for alias, name in self.aliases.items():
            if name not in self.class_names:
                raise ValueError(f"aliases has {alias!r} for the class {name!r}, which does not exist; name one of class_names")

    def _check_that_they_fit(self, transformer: TransformerConfig) -> None:
        for name in ("codebook_size", "code_width"):
            theirs, ours = getattr(self.tokenizer, name), getattr(transformer, name)
            if theirs != ours:
                raise ValueError(f"{name} is {theirs} for the tokenizer and {ours} for the transformer; they must have the same codes")
        if self.class_names and len(self.class_names) != transformer.classes:
            raise ValueError(f"class_names holds {len(self.class_names)} names for {transformer.classes} classes; give one for each")


def save(model: Model, folder: Path | str, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> None:
    """Writes a model folder. All files are written under other names and put in place when they are complete, config.json last.

    Raises FileExistsError when the folder holds a model, or a file of one, and `overwrite` is not set; ValueError when the model's parts
    do not belong together, or its transformer was made faster.
    """
    if model.transformer:
        model.transformer.refuse_made_faster()
    folder = Path(folder)
    there = [name for name in (CONFIG, TOKENIZER, TRANSFORMER) if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds a model already ({', '.join(there)}); choose another folder, or allow it with overwrite=True (--overwrite)"
        )
    weights = {TOKENIZER: _tensors(model.tokenizer, dtype)} | (
        {TRANSFORMER: _tensors(model.transformer, dtype)} if model.transformer else {}
    )
    digests = {name: _digest(tensors) for name, tensors in weights.items()}
    config = _Config(
        tokenizer=model.tokenizer.config,
        transformer=model.transformer.config if model.transformer else None,
        class_names=tuple(model.class_names),
        defaults=model.defaults,
        provenance=dict(model.provenance),
        aliases=dict(model.aliases),
        digests=digests,
    )
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2, ensure_ascii=False) + "\n"
    writes: dict[Path, Write] = {
        folder / name: partial(save_file, tensors, metadata={"digest": digests[name]}) for name, tensors in weights.items()
    }
    writes[folder / CONFIG] = lambda path: path.write_text(text, encoding="utf-8")
    make_folder(folder)
    write_together(writes)
    if not model.transformer:
        (folder / TRANSFORMER).unlink(missing_ok=True)  # of the model before


@torch.inference_mode(False)  # or the weights could not be used outside of it
def load(folder: Path | str) -> Model:
    """Reads a model folder onto the CPU in float32, in evaluation mode.

    Raises FileNotFoundError or ValueError, in one line, for a folder, file or tensor that is missing, damaged or does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    model = _empty(config)
    _load_weights(model.tokenizer, folder / TOKENIZER, config)
    if model.transformer:
        _load_weights(model.transformer, folder / TRANSFORMER, config)
    return model


def load_empty(folder: Path | str) -> Model:
    """A model folder without its weights: the networks are on the meta device."""
    return _empty(_read_config(Path(folder)))


def _empty(config: _Config) -> Model:
    with torch.device("meta"):
        return Model(
            tokenizer=Tokenizer(config.tokenizer),
            transformer=Transformer(config.transformer) if config.transformer else None,
            class_names=config.class_names,
            defaults=config.defaults,
            provenance=config.provenance,
            aliases=config.aliases,
        )


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
            digests=config.get("digests", {}),  # nor digests
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; write the folder again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); write the folder again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tensors(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, dtypes and values: the same weights have the same one, and so the same file."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_weights(network: nn.Module, path: Path, config: _Config) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so the model folder is not complete; copy or fetch it again")
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get("digest")
        if digest not in (None, config.digests.get(path.name)):
            raise ValueError(f"this is not the file that was saved with {CONFIG}; save, copy or fetch the folder again as a whole")
        fill(network, load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _built(kind: type[D], values: Mapping[str, Any]) -> D:
    """A config dataclass from JSON, whose lists are tuples here."""
    return kind(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
