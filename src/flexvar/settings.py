"""What a call's keywords mean for a model: its own defaults where they are not given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from flexvar.arguments import whole_number
from flexvar.checkpoint import Model
from flexvar.editing import Edit
from flexvar.sampling import Greedy, Guidance, GuidanceKind, Sampling
from flexvar.schedule import FINEST, Schedule, ScheduleLike, grid_of

S = TypeVar("S", Guidance, Sampling)


class Settings:
    """Guidance, sampling and schedule of a call. Its keywords are those of `FlexVARPipeline.stream`; others are passed over."""

    def __init__(self, model: Model) -> None:
        self.defaults = model.defaults
        self.downsample = model.tokenizer.config.downsample
        self.trained_grid = FINEST if model.transformer is None else model.transformer.config.trained_grid

    def guidance_of(
        self,
        guidance: GuidanceKind | None = None,
        guidance_scale: float | None = None,
        split_guidance: bool | None = None,
        guidance_stop: int | None = None,
        **_: Any,
    ) -> Guidance:
        """The guidance that a call's keywords ask for, and the model's default where they do not."""
        return _replaced(self.defaults.guidance, kind=guidance, scale=guidance_scale, split=split_guidance, stop=guidance_stop)

    def sampling_of(
        self,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        greedy: Greedy | None = None,
        **_: Any,
    ) -> Sampling:
        """The sampling that a call's keywords ask for, and the model's default where they do not."""
        return _replaced(self.defaults.sampling, top_k=top_k, top_p=top_p, temperature=temperature, greedy=greedy)

    def schedule_of(
        self,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        schedule: ScheduleLike | None = None,
        *,
        edit: Edit | None = None,
        **_: Any,
    ) -> Schedule:
        """The schedule that size and steps, a list of scales, or an edit ask for."""
        f, trained_grid, steps = self.downsample, self.trained_grid, num_inference_steps
        if edit is not None:
            own = edit.grid[0] * f, edit.grid[1] * f
            if (height or own[0], width or own[1]) != own:
                raise ValueError(f"the edit draws {own[0]} x {own[1]} px; leave height and width out")
            height, width = own
        if schedule is not None:
            given = Schedule.of(schedule)
            for name, asked, side in (("height", height, given[-1][0] * f), ("width", width, given[-1][1] * f)):
                if asked not in (None, side):
                    raise ValueError(f"{name} is {asked}, but the schedule ends at {side} px; give one of the two, or let them agree")
            if steps not in (None, len(given)):
                raise ValueError(f"num_inference_steps is {steps}, but the schedule has {len(given)}; give one of the two")
            return given
        if edit is not None:
            asked = self.defaults.num_inference_steps if steps is None else whole_number(steps, "num_inference_steps")
            return edit.schedule(asked, trained_grid)
        if height is None and width is None:
            height, width = self.defaults.height, self.defaults.width
        height, width = (whole_number(side, "a side") for side in (width if height is None else height, height if width is None else width))
        if steps is None:
            return Schedule.for_grid(*grid_of(height, width, f), self.defaults.num_inference_steps, trained_grid)
        return Schedule.for_size(height, width, whole_number(steps, "num_inference_steps"), f, trained_grid)


def _replaced(defaults: S, **given: Any) -> S:
    """Settings with those changed that were given."""
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})
