"""FlexVAR: pictures drawn scale by scale, each scale whole, at any size, aspect ratio and number of steps."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexvar.generation import Keep, Step, generate
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.sampling import Guidance, Sampling
    from flexvar.schedule import Schedule
    from flexvar.tokenizer import Tokenizer, TokenizerConfig
    from flexvar.transformer import Transformer, TransformerConfig

__version__ = "0.1.0"

_HOMES = {
    "FlexVARPipeline": "pipeline",
    "Guidance": "sampling",
    "Keep": "generation",
    "Sampling": "sampling",
    "Schedule": "schedule",
    "Step": "generation",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "tokenizer",
    "Transformer": "transformer",
    "TransformerConfig": "transformer",
    "generate": "generation",
}

__all__ = [
    "FlexVARPipeline",
    "Guidance",
    "Keep",
    "Sampling",
    "Schedule",
    "Step",
    "Tokenizer",
    "TokenizerConfig",
    "Transformer",
    "TransformerConfig",
    "generate",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its file when it is first used, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flexvar' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"flexvar.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
