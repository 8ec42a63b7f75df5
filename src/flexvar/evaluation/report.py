"""What every report of a measurement says of the machine that made it, and how it is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flexvar.writing import make_folder, write_whole

FORMAT = 1
PUBLISHED_COUNT = 50_000  # pictures behind published scores


def machine(device: torch.device) -> dict[str, str]:
    """Versions and device, under which the same settings give the same numbers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: version(package) for package in ("flexvar", "torch", "numpy", "pillow")}
    return {**versions, "python": platform.python_version(), "device": f"{device.type} ({name})"}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; it appears when it is complete."""
    make_folder(path.parent)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads one again. ValueError, in one line, where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the command again") from error
