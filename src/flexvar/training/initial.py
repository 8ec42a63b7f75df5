"""Beginning from weights that are there instead of random ones: fine-tuning on other pictures or classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flexvar.checkpoint import TOKENIZER, load
from flexvar.checks import warn
from flexvar.models import model_folder
from flexvar.official import read_released, released_name
from flexvar.position import resample
from flexvar.tokenizer import Tokenizer
from flexvar.tokenizer.quantizer import same_codes
from flexvar.transformer import Transformer

CODES = ("quantizer.", "before_codes.", "after_codes.")  # the tensors of a tokenizer that depend on the shape of the codebook


def check_codes(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    """Compares the codes on which a folder's transformer was trained with those of the tokenizer called `name`, if it has its own with it.

    ValueError where their number or width differs, and a warning where they are others, but for rounding.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            theirs = file.get_tensor("quantizer.codebook").float()  # (V, C)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove or replace it") from error
    ours = tokenizer.quantizer.codebook.detach()  # (V, C)
    if theirs.shape != ours.shape:
        (their_size, their_width), (size, width) = theirs.shape, ours.shape
        raise ValueError(
            f"{folder} was trained on {their_size} codes of width {their_width}, and {name} has {size} of width {width}; "
            f"take its own, tokenizer={folder}, or begin anew: another run= without init_from"
        )
    if not same_codes(theirs, ours):
        told = f"{folder} was trained on other codes than {name} has, and must learn these; tokenizer={folder} has its own"
        warn(told)


def begin_from(name: str, network: nn.Module, class_names: Sequence[str]) -> None:
    """Fills a network with the weights of a model: a folder, a bundled or released name, or for a tokenizer a released file.

    A tokenizer takes encoder and decoder, and its codes too where they have the same shape: LlamaGen's VQ-16 has 16384 codes of width 8, so
    of it a FlexVAR tokenizer gets encoder and decoder only. A transformer takes everything; classes are matched by name, a class that is
    new begins as the null class, and a position table of another size is resampled.
    Raises ValueError naming a tensor that is missing or misshapen.
    """
    if isinstance(network, Tokenizer):
        if Path(name).is_file():
            theirs: Mapping[str, Tensor] = read_released(name)
            ours = {released_name(own): own for own in network.state_dict()}
            _fill(network, {ours.get(key, key): tensor for key, tensor in theirs.items()}, name)
        else:
            _fill(network, load(model_folder(name)).tokenizer.state_dict(), name)
        return
    assert isinstance(network, Transformer)
    model = load(model_folder(name))
    if model.transformer is None:
        raise ValueError(f"{name} holds a tokenizer only; name a model with a transformer to begin from")
    tensors = dict(model.transformer.state_dict())
    tensors["class_embedding.weight"] = _classes(name, tensors["class_embedding.weight"], model.class_names, class_names)
    side = network.config.table_side
    if model.transformer.config.table_side != side:
        tensors["positions"] = resample(tensors["positions"], (side, side), "smooth").T.unflatten(1, (side, side))
    _fill(network, tensors, name)


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copies the tensors in; those of a tokenizer's codes may be left as they are, all together."""
    ours = network.state_dict()
    fitting = {key: tensor for key, tensor in tensors.items() if key in ours and ours[key].shape == tensor.shape}
    if others := [key for key in ours if key.startswith(CODES) and key not in fitting]:
        if not all(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"{name} has other codes than the config's model: {others[0]} does not fit, and only the decoder learns")
        fitting = {key: tensor for key, tensor in fitting.items() if not key.startswith(CODES)}
        warn(f"{name} has other codes; they begin anew, beside its encoder and decoder")
    for key in ours:
        if key not in fitting and not key.startswith(CODES):
            there = f"has shape {tuple(tensors[key].shape)} instead of {tuple(ours[key].shape)}" if key in tensors else "is missing"
            raise ValueError(f"{name} does not fit the config's model: {key} {there}; give both the same shape")
    for key in tensors:
        if key not in ours and not key.startswith(CODES):
            raise ValueError(f"{name} does not fit the config's model: it has a {key} besides; give both the same shape")
    network.load_state_dict(fitting, strict=False)


def _classes(name: str, embedding: Tensor, theirs: Sequence[str], ours: Sequence[str]) -> Tensor:
    """The class embedding (classes + 1, D) for our classes, from the one for theirs of the model `name`; the last row is the null class."""
    if not theirs and len(embedding) == len(ours) + 1:
        return embedding  # classes without names are matched by their order
    null = embedding[-1]
    rows = dict(zip(theirs, embedding, strict=False))
    known = len(rows.keys() & set(ours))
    if known < len(ours) and len(ours) > 1:  # a single class is not told apart from none
        warn(f"{name} knows {known} of the {len(ours)} classes by name; the others begin as its null class")
    return torch.stack([*(rows.get(own, null) for own in ours), null])
