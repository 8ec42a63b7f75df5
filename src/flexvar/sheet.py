"""Tensors to pictures, and pictures side by side on one sheet with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

T = TypeVar("T")

OutputType: TypeAlias = Literal["pil", "np", "pt"]
Images: TypeAlias = list[Image.Image] | np.ndarray | Tensor

INK, PAPER = (40, 44, 52), (255, 255, 255)
CAPTION = 14  # px


def to_uint8(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in about [-1, 1] as uint8 from 0 to 255; what lies outside is cut off. Given uint8 stays."""
    return images if images.dtype == torch.uint8 else ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL pictures of (B, 3, H, W) in about [-1, 1], whose outside is cut off, or uint8."""
    return [Image.fromarray(picture) for picture in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


def check_output_type(output_type: str) -> None:
    """Raises ValueError for another name than "pil", "np" and "pt"."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type is {output_type!r}; give 'pil', 'np' or 'pt'")


def output_ready(images: Tensor, output_type: OutputType) -> Tensor:
    """Pictures (B, 3, H, W) in about [-1, 1] on the CPU: as bytes where these are wanted, so that fewer leave a GPU, else in float32."""
    return to_uint8(images).cpu() if output_type == "pil" else images.cpu().float()


def as_output(images: Tensor, output_type: OutputType) -> Images:
    """Pictures of `output_ready` as a call gives them."""
    if output_type == "pil":
        return to_pil(images)
    scaled = (images.clamp(-1, 1) + 1) / 2
    return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).numpy()


def sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]] | None = None, gap: int = 8) -> Image.Image:
    """Rows of pictures of any sizes on white, a line of captions above each row that has some."""
    above_rows: Sequence[Sequence[str]] = captions or [()] * len(rows)
    lines = [CAPTION + 6 if above else 0 for above in above_rows]
    heights = [max(picture.height for picture in row) + line for row, line in zip(rows, lines, strict=True)]
    widths = [sum(picture.width + gap for picture in row) for row in rows]
    paper = Image.new("RGB", (max(widths) + gap, sum(height + gap for height in heights) + gap), PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(CAPTION)
    y = gap
    for row, above, line, height in zip(rows, above_rows, lines, heights, strict=True):
        x = gap
        for picture, caption in zip(row, [*above, *[""] * len(row)], strict=False):
            draw.text((x, y), caption, INK, font)
            paper.paste(picture, (x, y + line))
            x += picture.width + gap
        y += height + gap
    return paper


def in_rows(items: Sequence[T], columns: int) -> list[list[T]]:
    """A list of pictures, or of their captions, cut into rows."""
    return [list(items[start : start + columns]) for start in range(0, len(items), columns)]
