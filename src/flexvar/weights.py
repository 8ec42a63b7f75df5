"""Named tensors into a module, or one line that says which of them do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]


def fill(
    module: M,
    tensors: Mapping[str, Tensor],
    rename: Callable[[str], str] = lambda name: name,
    reshape: Callable[[str, Shape], Shape] = lambda _, shape: shape,
) -> M:
    """Puts the tensors, in float32, into a module made on the meta device; returns it in evaluation mode. Float32 ones are not copied.

    rename: our name of a tensor to its name among `tensors`. reshape: that name and our shape to the shape expected there (the same
    numbers, other axes of length 1). Raises ValueError naming what is missing, extra or misshapen; nothing is filled then.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {rename(name): name for name in ours}
    complaints = [f"{name} is missing" for name in theirs if name not in tensors]
    complaints += [f"{name} is not a tensor of this model" for name in tensors if name not in theirs]
    for name, own in theirs.items():
        expected = reshape(name, ours[own])
        if name in tensors and tuple(tensors[name].shape) != expected:
            complaints.append(f"{name} has shape {tuple(tensors[name].shape)} instead of {expected}")
    if complaints:
        more = f", and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(complaints[:3])}{more}")
    state = {own: tensors[name].detach().float().reshape(ours[own]).contiguous() for name, own in theirs.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
