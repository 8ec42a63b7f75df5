"""A run's settings from a YAML file and key=value words, and back to a file; what is wrong with them in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from flexvar.training.settings import CacheRun, RunConfig
from flexvar.writing import write_whole

C = TypeVar("C", bound="RunConfig | CacheRun")


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
    whole = [f"{word}''" if word.endswith("=") else word for word in words]  # `init_from=` empties it
    told = [_parsed(repr(word), partial(OmegaConf.from_dotlist, [word])) for word in whole]
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
    old = OmegaConf.to_container(_parsed(str(path), partial(OmegaConf.load, path))) if path.is_file() else new
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
        raise ValueError(f"{name} is not valid YAML ({' '.join(str(error).split())}); correct it") from error


def _fault(error: OmegaConfBaseException, key: str) -> str:
    """OmegaConf's complaint in one line, with the whole key and, for a key that resembles no known one, the known ones."""
    line = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        known = ", ".join(entry.name for entry in fields(error.object_type)) if is_dataclass(error.object_type) else ""
        return line if "Did you mean" in line or not known else f"{line}; there are {known}"
    full_key = str(error.full_key or "")
    line = re.sub(
        r"Invalid value assigned: .* is not a ListConfig.*",
        "it must be a list, and sizes one of pairs [height, width], for example [[64, 64]]",
        line,
    )
    return f"{full_key if full_key.startswith(key) else key}: {line}"
