"""Tensors to pictures, and pictures side by side on one sheet with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

T = TypeVar("T")

INK, PAPER = (40, 44, 52), (255, 255, 255)
CAPTION = 14  # px


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL pictures of (B, 3, H, W) in about [-1, 1]; what lies outside is cut off."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]


def sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]] | None = None, gap: int = 8) -> Image.Image:
    """Rows of pictures of any sizes on white, each under its caption's line where there is one."""
    line = CAPTION + 6 if captions else 0
    heights = [max(picture.height for picture in row) + line for row in rows]
    widths = [sum(picture.width + gap for picture in row) for row in rows]
    paper = Image.new("RGB", (max(widths) + gap, sum(height + gap for height in heights) + gap), PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(CAPTION)
    y = gap
    for r, (row, height) in enumerate(zip(rows, heights, strict=True)):
        x = gap
        for c, picture in enumerate(row):
            if captions and c < len(captions[r]):
                draw.text((x, y), captions[r][c], INK, font)
            paper.paste(picture, (x, y + line))
            x += picture.width + gap
        y += height + gap
    return paper


def in_rows(items: Sequence[T], columns: int) -> list[list[T]]:
    """A list of pictures, or of their captions, cut into rows."""
    return [list(items[start : start + columns]) for start in range(0, len(items), columns)]
