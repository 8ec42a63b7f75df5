"""Pictures and masks as users hand them over: PIL, arrays, tensors or paths, one or several, in whatever mode and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from flexvar.data.images import decoded, upright

OnePicture: TypeAlias = Image.Image | np.ndarray | Tensor | str | Path
GivenPictures: TypeAlias = OnePicture | Sequence[OnePicture]


def pictures_of(image: GivenPictures, what: str = "the image") -> Tensor:
    """Pictures (B, 4, H, W), float32 in [0, 1]: red, green, blue and how opaque each pixel is.

    image: one or a list of them, all of one size. PIL pictures of any mode or paths of files, turned as their EXIF tag says. Arrays
    (H, W), (H, W, C) or (B, H, W, C) and tensors (H, W), (C, H, W) or (B, C, H, W) with 1, 3 or 4 channels: integers over their whole
    range, or floats in [0, 1]. Raises ValueError, in one line, for anything else, and FileNotFoundError for a path without a file.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError(f"{what} is an empty list; give one picture or more")
        several = [pictures_of(one, what) for one in image]
        if len({one.shape[-2:] for one in several}) > 1:
            sizes = ", ".join(sorted({f"{one.shape[-2]} x {one.shape[-1]}" for one in several}))
            raise ValueError(f"{what} is a list of pictures of several sizes ({sizes}); give one size at a time")
        return torch.cat(several)
    pixels = _channels_first(image, what)
    if 0 in pixels.shape:
        raise ValueError(f"{what} has {pixels.shape[-2]} x {pixels.shape[-1]} pixels; give one that has some")
    if not torch.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(f"{what} has values outside [0, 1]; give floats in [0, 1], or integers over their whole range")
    if pixels.shape[1] == 4:
        return pixels
    return torch.cat((pixels.expand(-1, 3, -1, -1), torch.ones_like(pixels[:, :1])), 1)


def read_given(path: str | Path) -> Image.Image:
    """A picture file as it is, its transparency too, turned as its EXIF tag says. Raises FileNotFoundError or ValueError, in one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {path}: check the path")
    return decoded(path, path, lambda image: ImageOps.exif_transpose(image).copy())


def over_white(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of (B, 4, H, W) in [0, 1], their transparency over white."""
    colours, opaque = pictures[:, :3], pictures[:, 3:]
    return torch.where(opaque == 1, colours, torch.lerp(torch.ones_like(colours), colours, opaque)) * 2 - 1


def mask_of(mask: GivenPictures, size: tuple[int, int]) -> Tensor:
    """A mask (B or 1, 1, H, W) in [0, 1] of `size` = (height, width), 1 where it is white. Of any size: it is resized to the picture's.

    Colours count by their brightness, and what is transparent is black. Raises ValueError for one of zeros and ones out of 255.
    """
    given = pictures_of(mask, "the mask")
    red, green, blue, opaque = given.split(1, 1)
    grey = red if torch.equal(red, green) and torch.equal(red, blue) else 0.299 * red + 0.587 * green + 0.114 * blue
    white = grey * opaque
    if 0 < white.max() <= 1 / 255:  # nobody's mask is so nearly black
        raise ValueError("the mask holds nothing above 1 of 255; give bool values, or 255 for white")
    if white.shape[-2:] == tuple(size):
        return white
    return F.interpolate(white, size, mode="bilinear", antialias=True).clamp(0, 1)


def _channels_first(image: Any, what: str) -> Tensor:
    """Any single picture, or batch in one array, as (B, C, H, W) float32."""
    if isinstance(image, str | Path):
        image = read_given(image)
    if isinstance(image, Image.Image):
        if image.mode == "F":
            raise ValueError(f"{what} holds numbers of unknown range (mode F); give it as an array, floats from 0 to 1")
        if 0 in image.size:
            return torch.empty(1, 3, image.height, image.width)
        return torch.from_numpy(np.array(upright(image))).permute(2, 0, 1)[None].float() / 255
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(image.astype(np.float32) / _largest(str(image.dtype), what))
        tensor = tensor.movedim(-1, -3) if tensor.ndim > 2 else tensor
    elif isinstance(image, Tensor):
        tensor = image.detach().float().cpu() / _largest(str(image.dtype).removeprefix("torch."), what)
    else:
        forms = "a PIL picture, for example from PIL.Image.open, an array, a tensor or a path"
        raise ValueError(f"{what} is a {type(image).__name__}; give {forms}")
    tensor = tensor[None] if tensor.ndim == 2 else tensor
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3, 4):
        raise ValueError(f"{what} has shape {tuple(image.shape)}; give an array (H, W, C) or a tensor (C, H, W) of 1, 3 or 4 channels")
    return tensor


def _largest(dtype: str, what: str) -> int:
    """The number that stands for white. ValueError for a dtype that does not say it: whole numbers of 32 bits may be 0 to 255."""
    if not dtype.startswith(("uint8", "uint16", "bool", "float", "bfloat")):
        raise ValueError(f"{what} holds {dtype}; give uint8 or uint16 of the full range, bool, or floats from 0 to 1")
    return {"uint8": 255, "uint16": 65535}.get(dtype, 1)
