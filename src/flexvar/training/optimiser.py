"""The optimiser's settings over a run: learning rate, what decays, precision (paper, section 4.1; released code)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flexvar.training.settings import OptimiserConfig
from flexvar.training.workshop import Workshop


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """Linear from 0.5 % over the warm-up, flat, then linear to the end (released code; paper, section 4.1)."""
    progress = step / steps
    if progress < config.warm_up:
        return config.learning_rate * (0.005 + 0.995 * progress / config.warm_up)
    decline = max(0.0, (progress - config.warm_up - config.flat) / max(1e-9, 1 - config.warm_up - config.flat))
    return config.learning_rate * (1 - (1 - config.end) * min(1.0, decline))


def parameter_groups(workshop: Workshop, weight_decay: float) -> list[dict[str, Any]]:
    """The weights of network and adversary: those that decay, and those that do not, which are all with one axis and those that a module
    names in `WITHOUT_DECAY`."""
    groups = []
    for part, rate in ((workshop.network, 1.0), (workshop.adversary, workshop.adversary_rate)):
        if part is None:
            continue
        named: set[str] = set()
        for prefix, module in part.named_modules():
            named |= {f"{prefix}.{name}".lstrip(".") for name in getattr(module, "WITHOUT_DECAY", ())}
        decaying: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in part.named_parameters():
            (others if parameter.ndim <= 1 or name in named else decaying).append(parameter)
        groups.append({"params": decaying, "weight_decay": weight_decay, "rate": rate})
        groups.append({"params": others, "weight_decay": 0.0, "rate": rate})
    return groups


def precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products and convolutions in training; "auto" takes bf16 on GPUs that have it, and do not only imitate it."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name != "auto":
        return names[name]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return names["bf16" if has_bf16 else "fp32"]
