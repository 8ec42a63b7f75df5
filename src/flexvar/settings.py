"""What a call's keywords mean for a model: its own defaults where they are not given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, TypeVar

from flexvar.arguments import both_sides
from flexvar.checkpoint import Model
from flexvar.checks import warn, whole_number
from flexvar.editing import Anchor, Edit, MaskRule
from flexvar.generation import Recipe
from flexvar.sampling import Greedy, Guidance, GuidanceKind, Sampling
from flexvar.schedule import FINEST, Schedule, ScheduleLike, check_steps, grid_of
from flexvar.sheet import OutputType

S = TypeVar("S", Guidance, Sampling)


class DrawingSettings(TypedDict, total=False):
    """The keywords of everything that draws. What is not given, or None, is the model's default.

    num_inference_steps: scales, at least 2. schedule: the scales themselves, instead of size and steps.
    guidance_scale, guidance: see `flexvar.Guidance`; 1 switches "ramp" and "constant" off, 0 "official-ramp".
    split_guidance: draws with and without the class in turn, for less memory. guidance_stop: scales that are guided, all by default;
    those behind them cost half.
    top_k, top_p, temperature, greedy: see `flexvar.Sampling`.
    seed: one a picture, or one integer s for s, s + 1, ..., from 0 to 2**32 - 1; None draws s.
    """

    num_inference_steps: int | None
    schedule: ScheduleLike | None
    guidance_scale: float | None
    guidance: GuidanceKind | None
    split_guidance: bool | None
    guidance_stop: int | None
    top_k: int | None
    top_p: float | None
    temperature: float | None
    greedy: Greedy | None
    seed: int | Sequence[int] | None


class EditSettings(DrawingSettings, total=False):
    """The keywords of every edit: also those of the pipeline's call, and the edit's own.

    max_pixels: above so many, 4 times the training size by default, a reduced copy is drawn and the drawing enlarged.
    """

    batch_size: int | None
    output_type: OutputType
    max_pixels: int | None


class SizedEditSettings(EditSettings, total=False):
    """Those of `refine` and `upscale`. height, width: of the result in pixels; one alone keeps the picture's proportions."""

    height: int | None
    width: int | None


class MaskedEditSettings(EditSettings, total=False):
    """Those of `inpaint`. feather, paste, mask_rule: see `flexvar.editing.inpaint`."""

    feather: int | None
    paste: bool
    mask_rule: MaskRule


class OutpaintSettings(MaskedEditSettings, SizedEditSettings, total=False):
    """Those of `outpaint`. left, right, top, bottom: pixels to add; or height and width, with the picture at the anchor."""

    left: int
    right: int
    top: int
    bottom: int
    anchor: Anchor


class Settings:
    """What the keywords of `FlexVARPipeline.stream` ask for, and the model's defaults where they do not."""

    def __init__(self, model: Model) -> None:
        self.defaults = model.defaults
        self.downsample = model.tokenizer.config.downsample
        self.trained_grid = FINEST if model.transformer is None else model.transformer.config.trained_grid

    def recipe(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        edit: Edit | None = None,
        num_inference_steps: int | None = None,
        schedule: ScheduleLike | None = None,
        guidance: GuidanceKind | None = None,
        guidance_scale: float | None = None,
        split_guidance: bool | None = None,
        guidance_stop: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        greedy: Greedy | None = None,
    ) -> Recipe:
        """How a call draws that has these keywords. Raises ValueError where they are out of range or contradict each other."""
        return Recipe(
            self.schedule_of(height, width, num_inference_steps, schedule, edit=edit),
            _replaced(self.defaults.guidance, kind=guidance, scale=guidance_scale, split=split_guidance, stop=guidance_stop),
            _replaced(self.defaults.sampling, top_k=top_k, top_p=top_p, temperature=temperature, greedy=greedy),
        )

    def schedule_of(
        self,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        schedule: ScheduleLike | None = None,
        *,
        edit: Edit | None = None,
    ) -> Schedule:
        """The schedule that size and steps, a list of scales, or an edit ask for.

        Raises ValueError where they contradict each other, or are impossible.
        """
        f, trained_grid, steps = self.downsample, self.trained_grid, num_inference_steps
        if edit is not None:
            own = edit.grid[0] * f, edit.grid[1] * f
            if height not in (None, own[0]) or width not in (None, own[1]):
                raise ValueError(f"the edit draws {own[0]} x {own[1]} px; leave height and width out")
            height, width = own
        if schedule is not None:
            given = Schedule.of(schedule)
            if edit is not None and given[-1] != edit.grid:
                (h, w), (end_h, end_w) = edit.grid, given[-1]
                raise ValueError(
                    f"the edit draws {h}x{w} codes, but the schedule ends at {end_h}x{end_w}; end it at {h}x{w}, or leave it out"
                )
            for name, asked, side in (("height", height, given[-1][0] * f), ("width", width, given[-1][1] * f)):
                if asked not in (None, side):
                    raise ValueError(f"{name} is {asked}, but the schedule ends at {side} px; give one of the two, or let them agree")
            if steps not in (None, len(given)):
                raise ValueError(f"num_inference_steps is {steps}, but the schedule has {len(given)}; give one of the two")
            return given
        asked = self.defaults.num_inference_steps if steps is None else whole_number(steps, "num_inference_steps")
        if edit is not None:
            check_steps(asked)
            found = edit.schedule(asked, trained_grid)
            if steps is not None and len(found) > steps:
                growth = "beyond the picture's own each is at most about 1.5 times the one before"
                warn(f"{len(found)} scales are drawn instead of {steps}: {growth}")
            return found
        height, width = both_sides(height, width, (self.defaults.height, self.defaults.width), f)
        if steps is None:  # nobody asked for so many
            return Schedule.for_grid(*grid_of(height, width, f), asked, trained_grid)
        return Schedule.for_size(height, width, asked, f, trained_grid)


def _replaced(defaults: S, **given: Any) -> S:
    """Settings with those changed that were given."""
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})
