"""Edits of given pictures: what is kept of them, as a `Keep` for the one loop, and how the drawing becomes a picture of theirs again.

Every scale of FlexVAR is a whole picture, so that an edit is a choice of codes: some scales of the given picture (refine, upscale),
or some places of every scale (inpaint, outpaint).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar.arguments import both_sides
from flexvar.checks import check_truth, finite_number, whole_number
from flexvar.data.given import GivenPictures, mask_of, over_white, pictures_of
from flexvar.generation import Keep, refuse_not_finite
from flexvar.position import area_averaged
from flexvar.schedule import Schedule, Size, grid_of

MaskRule: TypeAlias = Literal["any", "majority", "all"]
Anchor: TypeAlias = Literal["centre", "left", "right", "top", "bottom", "top-left", "top-right", "bottom-left", "bottom-right"]

RELAXATIONS = 8  # of a filling, at each resolution
LONGEST_SIDE = 1 << 16  # px, of a result


@dataclass(frozen=True)
class Edit:
    """Given pictures (P of one size) on their way into the loop and out of it. Tensors lie on the CPU, in float32.

    canvas: (P, 3, H, W) in [-1, 1], sides multiples of `downsample` px: what is encoded, with what is to be drawn filled from its border.
    grid: (h, w) codes to be drawn. crop: (top, left, height, width), the part of the drawing in pixels that is the result; size: what it
    is enlarged or reduced to. strength: the share of scales drawn anew. white: (P, 1, H, W) in [0, 1], the places drawn anew; None
    means all. given: (P, 3, *size), what the drawing is pasted into, with its weight (P, 1, *size); None pastes nothing. feather: the
    pixels over which the drawing is brought to the given colours at its border.
    """

    canvas: Tensor
    downsample: int
    grid: Size
    crop: tuple[int, int, int, int]
    size: Size
    strength: float = 1.0
    white: Tensor | None = None
    mask_rule: MaskRule = "all"
    given: Tensor | None = None
    weight: Tensor | None = None
    feather: int = 0

    def __len__(self) -> int:
        return len(self.canvas)

    def part(self, pictures: slice) -> Edit:
        """The edit of some of the pictures; a single picture stays for all that is drawn from it."""
        if len(self) == 1:
            return self
        tensors = {name: getattr(self, name) for name in ("canvas", "white", "given", "weight")}
        return replace(self, **{name: tensor[pictures] for name, tensor in tensors.items() if tensor is not None})

    @property
    def native(self) -> Size:
        """The canvas's own grid (h, w)."""
        return self.canvas.shape[-2] // self.downsample, self.canvas.shape[-1] // self.downsample

    def schedule(self, steps: int, trained_grid: int) -> Schedule:
        """The scales of a number of steps, at least 2: those of the canvas's own grid, and growing ones beyond it."""
        if self.grid[0] < self.native[0] or self.grid[1] < self.native[1]:
            return Schedule.for_grid(*self.grid, steps, trained_grid)
        beyond = len(Schedule((self.native,)).grown(*self.grid)) - 1
        return Schedule.for_grid(*self.native, max(2, steps - beyond), trained_grid).grown(*self.grid)

    def kept(self, schedule: Schedule) -> int:
        """How many scales are kept, wholly or in part: none finer than the canvas's own, and no more than the strength leaves."""
        if self.white is not None:
            return len(schedule)
        within = sum(h <= self.native[0] and w <= self.native[1] for h, w in schedule)
        return min(within, round((1 - self.strength) * len(schedule)))

    def keep(self, codes: Sequence[Tensor]) -> Keep:
        """The Keep of the canvas's codes (P, h, w) at the scales that are kept."""
        if self.white is None:
            return Keep(codes)
        rules: list[MaskRule] = [*[self.mask_rule] * (len(codes) - 1), "any"]  # at the finest scale nothing white may stay as it was
        where = [~drawn_cells(self.white, (c.shape[1], c.shape[2]), rule) for c, rule in zip(codes, rules, strict=True)]
        return Keep(codes, where)

    def finishing(self, decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A decoder that gives finished pictures."""

        def finished(codes: Tensor) -> Tensor:
            drawing = decode(codes)
            refuse_not_finite(drawing)  # pasting and cutting off may hide it
            return self.finish(drawing)

        return finished

    def finish(self, drawing: Tensor) -> Tensor:
        """The result (B, 3, *size), about [-1, 1], of the drawing (B, 3, H, W) of the last scale; on the CPU, in float32.

        A pixel whose weight is 0 is the given one, to the bit.
        """
        top, left, height, width = self.crop
        if len(drawing) > 1:  # one by one, as a large result takes several times its own memory on the way
            return torch.cat([self.part(slice(i, i + 1)).finish(drawing[i : i + 1]) for i in range(len(drawing))])
        drawing = drawing.cpu().float()[..., top : top + height, left : left + width]
        if drawing.shape[-2:] != self.size:
            drawing = F.interpolate(drawing, self.size, mode="bicubic", antialias=True)
        if self.given is None or self.weight is None:
            return drawing
        drawing = drawing.clamp(-1, 1)
        if self.feather:  # what the drawing misses at the border is added, less and less towards its middle
            black = (self.weight == 0).float()
            drawing = drawing + near(black, self.feather) * filled(self.given - drawing, black)
        return torch.where(self.weight == 0, self.given, torch.lerp(self.given, drawing, self.weight)).clamp(-1, 1)


# -- the four edits --


def refine(
    image: GivenPictures, f: int, most_pixels: int, *, strength: float = 0.5, height: int | None = None, width: int | None = None
) -> Edit:
    """Keeps the coarse scales and draws the rest again. strength: 0 keeps every scale, 1 none. height, width: of the result, multiples of
    f px; the picture's own by default, otherwise its composition is stretched to them. One alone keeps the picture's proportions.
    Raises ValueError for a strength that is not from 0 to 1, and for impossible sizes.
    """
    mend = "give a number from 0 (all scales kept) to 1 (none); a class is given as class_labels"
    strength = finite_number(strength, "strength", mend, least=0, most=1)
    pictures = over_white(pictures_of(image))
    size = (pictures.shape[-2], pictures.shape[-1])
    small = _reduced(pictures, most_pixels)
    canvas = _padded(small, f)
    if height is None and width is None:
        grid, crop = (canvas.shape[-2] // f, canvas.shape[-1] // f), (0, 0, small.shape[-2], small.shape[-1])
        return Edit(canvas, f, grid, crop, size, strength)
    asked = both_sides(height, width, size, f)
    grid_of(*asked, f)  # complains of what is no multiple
    _check_sides(*asked)
    return Edit(canvas, f, *_stretched(small, canvas, asked, f, most_pixels), asked, strength)


def upscale(
    image: GivenPictures, f: int, most_pixels: int, *, factor: float | None = None, height: int | None = None, width: int | None = None
) -> Edit:
    """Keeps every scale up to the picture's own and draws larger ones. The size by a factor or by pixels, and not smaller; one side alone
    keeps the picture's proportions. Above most_pixels the drawing is smaller than the result, and enlarged.
    Raises ValueError for a smaller size, and for a factor and a size together.
    """
    pictures = over_white(pictures_of(image))
    own = (pictures.shape[-2], pictures.shape[-1])
    if (factor is None) == (height is None and width is None):
        raise ValueError("give a factor, or a height or width in pixels, and not both")
    if factor is None:
        height, width = both_sides(height, width, own)
        factor_y, factor_x = height / own[0], width / own[1]
    else:
        factor_y = factor_x = finite_number(factor, "factor", "give a number of at least 1; a class is given as class_labels")
    if factor_y < 1 or factor_x < 1:
        raise ValueError(f"{own[0]} x {own[1]} px would become smaller; give a factor of at least 1, or larger sides")
    larger = own[0] * factor_y, own[1] * factor_x
    _check_sides(*larger)
    small = _reduced(pictures, most_pixels)
    canvas = _padded(small, f)
    return Edit(canvas, f, *_stretched(small, canvas, larger, f, most_pixels), (round(larger[0]), round(larger[1])), strength=0.0)


def inpaint(
    image: GivenPictures,
    f: int,
    most_pixels: int,
    *,
    mask: GivenPictures | None = None,
    feather: int | None = None,
    paste: bool = True,
    mask_rule: MaskRule = "all",
) -> Edit:
    """Draws anew what is white in the mask, and what is transparent. What lies under white does not matter.

    feather: pixels inside the white over which the drawing is brought to the colours at its border, a code's by default, 0 for none. A
    grey mask value is the weight of the drawing. paste: brings every pixel that is black in the mask back as it was. mask_rule: which
    cells of a coarse scale are drawn: those with any white, with a majority of it, or with nothing else.
    """
    pictures = pictures_of(image)
    return _masked(pictures, _white(pictures, mask), (0, 0), f, most_pixels, feather, paste, mask_rule)


def outpaint(
    image: GivenPictures,
    f: int,
    most_pixels: int,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    height: int | None = None,
    width: int | None = None,
    anchor: Anchor | None = None,
    feather: int | None = None,
    paste: bool = True,
    mask_rule: MaskRule = "all",
) -> Edit:
    """Draws beyond the picture's edges: by so many pixels on each side, or to height x width with the picture at the anchor ("centre" if
    None); one of the two alone keeps the picture's proportions.
    Raises ValueError for a smaller canvas, for none larger, for pixels and a size together, and for an anchor without a size.
    """
    pictures = pictures_of(image)
    own = (pictures.shape[-2], pictures.shape[-1])
    sides = [whole_number(added, name) for name, added in (("left", left), ("right", right), ("top", top), ("bottom", bottom))]
    if height is not None or width is not None:
        if any(sides):
            raise ValueError("give pixels on each side, or height and width with an anchor, and not both")
        height, width = both_sides(height, width, own)
        place: Anchor = "centre" if anchor is None else anchor
        sides = [*_shares(width - own[1], place, "left", "right"), *_shares(height - own[0], place, "top", "bottom")]
    elif anchor is not None:
        raise ValueError(f"anchor is {anchor!r}, which places a picture in a height and width; give these, or leave it out")
    if min(sides) < 0:
        raise ValueError(f"{own[0]} x {own[1]} px would become smaller; give pixels to add, or larger sides")
    if not any(sides):
        raise ValueError("there is nothing to draw beyond the picture; give left, right, top or bottom, or larger sides")
    left, right, top, bottom = sides
    _check_sides(own[0] + top + bottom, own[1] + left + right)
    white = F.pad(_white(pictures, None), sides, value=1.0)
    return _masked(F.pad(pictures, sides), white, (-top % f, -left % f), f, most_pixels, feather, paste, mask_rule)


EDITS: dict[str, Callable[..., Edit]] = {edit.__name__: edit for edit in (refine, upscale, inpaint, outpaint)}


def keywords(name: str) -> list[str]:
    """The keywords of an edit's own, apart from those of the drawing."""
    return [word.name for word in signature(EDITS[name]).parameters.values() if word.kind is word.KEYWORD_ONLY] + ["max_pixels"]


# -- masks --


def drawn_cells(white: Tensor, size: Size, rule: MaskRule) -> Tensor:
    """The cells (P, h, w) of a scale that are drawn anew, bool: where the mask (P, 1, H, W) is white enough in the cell's area.

    Raises ValueError for a rule that there is not.
    """
    if rule not in get_args(MaskRule):
        raise ValueError(f"mask_rule is {rule!r}; there are {', '.join(get_args(MaskRule))}")
    share = area_averaged(white, size)[:, 0]  # (P, h, w)
    return share > 0 if rule == "any" else share >= (0.5 if rule == "majority" else 1 - 1e-4)


def filled(pictures: Tensor, known: Tensor) -> Tensor:
    """Pictures (P, 3, H, W) with what is not known, (P, 1, H, W) in [0, 1], filled smoothly from what is; grey where nothing is known.

    Each halving averages what is known around a pixel; what is not known takes the next coarser average.
    """
    masked = torch.where(known > 0, pictures, 0) * known
    if known.min() == 1 or max(known.shape[-2:]) == 1:
        return masked
    weight = F.avg_pool2d(known, 3, stride=2, padding=1)  # overlapping, so that what is known reaches over the border of a cell
    coarse = F.avg_pool2d(masked, 3, stride=2, padding=1) / weight.clamp_min(1e-8)
    coarse = filled(coarse, (weight > 0).float())
    result = masked + (1 - known) * F.interpolate(coarse, pictures.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(RELAXATIONS):
        around = F.avg_pool2d(F.pad(result, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        result = masked + (1 - known) * around
    return result


def near(there: Tensor, reach: int) -> Tensor:
    """How near a pixel is to those that are there, (P, 1, H, W) of 0 and 1: 1 on them, falling to 0 beyond `reach` px."""
    nearness = there
    for distance in range(1, reach + 1):
        if there.all():
            break
        there = F.max_pool2d(there, 3, stride=1, padding=1)
        nearness = torch.maximum(nearness, there * (1 - distance / (reach + 1)))
    return nearness


def _white(pictures: Tensor, mask: GivenPictures | None) -> Tensor:
    """What is to be drawn of (P, 4, H, W): what is transparent, and what the mask says in white; (P, 1, H, W)."""
    white = 1 - pictures[:, 3:]
    if mask is None:
        return white
    given = mask_of(mask, (pictures.shape[-2], pictures.shape[-1]))
    if len(given) not in (1, len(pictures)):
        raise ValueError(f"{len(given)} masks were given for {len(pictures)} pictures; give one, or one a picture")
    return torch.maximum(white, given)


def _masked(
    pictures: Tensor, white: Tensor, corner: Size, f: int, most_pixels: int, feather: int | None, paste: bool, rule: MaskRule
) -> Edit:
    """The edit that draws what is white. corner: pixels added above and to the left, so that a picture's codes lie on the grid."""
    if not (drawn := (white > 0).flatten(1).any(1)).all():
        which = f" in picture {int(drawn.int().argmin())}, counted from 0" if len(drawn) > 1 else ""
        why = "the mask is black everywhere and the picture opaque"
        raise ValueError(f"there is nothing to draw{which}: {why}; paint white what is to be drawn")
    feather = f if feather is None else whole_number(feather, "feather", "give an integer of pixels, 0 for none", least=0)
    check_truth(paste, "paste")
    size = (pictures.shape[-2], pictures.shape[-1])
    colours = pictures[:, :3] * 2 - 1
    given = filled(colours, 1 - white)
    small, small_white = _reduced(given, most_pixels), _reduced(white, most_pixels)
    canvas, canvas_white = _padded(small, f, corner), _padded(small_white, f, corner)
    grid = (canvas.shape[-2] // f, canvas.shape[-1] // f)
    crop = (*corner, small.shape[-2], small.shape[-1])
    pasted, weight = (torch.where(white < 1, colours, given), white) if paste else (None, None)
    drawn_cells(canvas_white, (1, 1), rule)  # complains of an unknown rule at once
    return Edit(canvas, f, grid, crop, size, white=canvas_white, mask_rule=rule, given=pasted, weight=weight, feather=feather)


# -- canvases --


def _check_sides(height: float, width: float) -> None:
    """ValueError for a result that nobody can mean."""
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"the result would have {height:.0f} x {width:.0f} px; stay within {LONGEST_SIDE} px a side")


def _padded(tensor: Tensor, f: int, corner: Size = (0, 0)) -> Tensor:
    """Padded with its own edge to multiples of f px: by `corner` above and to the left, the rest below and to the right."""
    (top, left), (height, width) = corner, tensor.shape[-2:]
    return F.pad(tensor, (left, -(width + left) % f, top, -(height + top) % f), mode="replicate")


def _reduced(tensor: Tensor, most_pixels: int) -> Tensor:
    """As it is, or reduced to at most so many pixels."""
    height, width = tensor.shape[-2:]
    scale = math.sqrt(most_pixels / (height * width))
    if scale >= 1:
        return tensor
    size = (max(1, int(height * scale)), max(1, int(width * scale)))
    return F.interpolate(tensor, size, mode="bilinear", antialias=True)


def _stretched(
    small: Tensor, canvas: Tensor, size: tuple[float, float], f: int, most_pixels: int
) -> tuple[Size, tuple[int, int, int, int]]:
    """The grid (h, w) to draw, and the crop of the drawing that shows the picture without its padding, at about `size` px."""
    shown_h, shown_w = small.shape[-2] / canvas.shape[-2], small.shape[-1] / canvas.shape[-1]
    grid = _grid_within(size[0] / shown_h, size[1] / shown_w, f, most_pixels)
    return grid, (0, 0, max(1, round(grid[0] * f * shown_h)), max(1, round(grid[1] * f * shown_w)))


def _grid_within(height: float, width: float, f: int, most_pixels: int) -> Size:
    """The codes (h, w) that cover so many pixels, or as many of their shape as most_pixels."""
    scale = min(1.0, math.sqrt(most_pixels / (height * width)))
    return max(1, math.ceil(height * scale / f - 1e-6)), max(1, math.ceil(width * scale / f - 1e-6))


def _shares(added: int, anchor: str, first: str, last: str) -> tuple[int, int]:
    """Pixels added before and behind, so that the picture stays at its anchor."""
    if anchor not in get_args(Anchor):
        raise ValueError(f"anchor is {anchor!r}; there are {', '.join(get_args(Anchor))}")
    sides = anchor.split("-")
    before = 0 if first in sides else added if last in sides else added // 2
    return before, added - before
