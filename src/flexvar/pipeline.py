"""The front room: class names and PIL pictures in, PIL pictures out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor

from flexvar import editing, labels, linear
from flexvar.arguments import both_sides, refuse_unknown, seeds_of, takes
from flexvar.checkpoint import Defaults, Model, load, save
from flexvar.checks import warn, whole_number
from flexvar.compiled import Recorded, compiled
from flexvar.data import fitted
from flexvar.data.given import GivenPictures, over_white, pictures_of
from flexvar.editing import Edit
from flexvar.generation import Draw, Keep, Recipe, Step, draw_scales, generate, needed_guidance
from flexvar.labels import Label
from flexvar.memory import MemoryNeed, in_parts, refuse_results, room_for
from flexvar.models import model_folder, released_model, write_released
from flexvar.processes import without_tf32
from flexvar.sampling import Guidance
from flexvar.schedule import Schedule, Size, grid_of
from flexvar.settings import DrawingSettings, MaskedEditSettings, OutpaintSettings, Settings, SizedEditSettings
from flexvar.sheet import OutputType, as_output, check_output_type, output_ready, to_pil
from flexvar.tokenizer import Tokenizer
from flexvar.transformer import Transformer
from flexvar.zoo import upload_folder

Labels: TypeAlias = Label | Sequence[Label]
T = TypeVar("T")


@dataclass(frozen=True)
class FlexVAROutput:
    """What a call gives.

    images: PIL pictures, or an array (B, H, W, 3) float32 in [0, 1] ("np"), or a tensor (B, 3, H, W) in [0, 1] on the CPU ("pt").
    """

    images: Any  # of a union, type checkers would have users say which one it is
    labels: list[int]  # class indices; the number of classes stands for no class
    seeds: list[int]  # one a picture, so that any of them can be drawn again


class FlexVARPipeline:
    """A tokenizer, a transformer and the names of the classes. What the keywords of drawing mean stands in `flexvar.settings`."""

    def __init__(self, model: Model) -> None:
        if model.transformer is None:
            raise ValueError("this model has no transformer yet; train one on its tokenizer first")
        self.model = model
        self.tokenizer: Tokenizer = model.tokenizer
        self.transformer: Transformer = model.transformer
        self.settings = Settings(model)  # what the keywords of a call mean
        self._draw: Draw = draw_scales

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by index; empty where they have none."""
        return self.model.class_names

    @property
    def defaults(self) -> Defaults:
        """How the model draws when it is not told otherwise."""
        return self.model.defaults

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.transformer.dtype

    @property
    def made_faster(self) -> frozenset[str]:
        """How the model was made faster, by this pipeline or another: "int8", "compiled"."""
        return self.transformer.made_faster

    @property
    def precision(self) -> str:
        """What its weights are held in, as reports call it."""
        return "int8" if "int8" in self.made_faster else str(self.dtype).removeprefix("torch.")

    # -- where it comes from and goes to --

    @classmethod
    def from_pretrained(cls, name: str | Path) -> FlexVARPipeline:
        """Loads onto the CPU, in float32, ready to draw.

        name: in this order, a bundled model ("emoji"), a released one ("flexvar-d16", "-d20", "-d24": fetched and converted once), a
        folder (a Path is nothing else), or a Hub id. Raises ValueError or OSError, in one line: what is missing, damaged or offline.
        """
        return cls(load(model_folder(name)))

    @classmethod
    def from_released(cls, tokenizer: str | Path, transformer: str | Path) -> FlexVARPipeline:
        """A pipeline from released .pth files of the tokenizer and the transformer; it draws as the released evaluation does."""
        return cls(released_model(tokenizer, transformer))

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the model folder. Raises FileExistsError when it holds a model and `overwrite` is not set."""
        save(self.model, folder, overwrite=overwrite)

    def save_released(self, folder: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
        """Writes the two .pth files that the released code loads; gives their paths, tokenizer first."""
        return write_released(self.model, folder, overwrite=overwrite)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads the model folder to the Hub under `repository`; gives its address. ConnectionError, in one line, where that cannot be."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_folder(folder, repository, private=private)

    def to(
        self,
        *device_or_dtype: str | int | torch.device | torch.dtype,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> FlexVARPipeline:
        """Moves both networks: pipe.to("cuda", torch.bfloat16), or by name. ValueError for no dtype of floats, or where made faster."""
        self.transformer.refuse_made_faster()
        for given in device_or_dtype:
            device, dtype = (device, given) if isinstance(given, torch.dtype) else (given, dtype)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; give one for floats, for example torch.bfloat16")
        for network in (self.tokenizer, self.transformer):
            network.to(device=device, dtype=dtype)
        return self

    def to_int8(self) -> FlexVARPipeline:
        """Rounds the weights of the transformer's blocks to 8 bits, for good: smaller, on most CPUs faster, at a price (docs/speed.md).

        On the CPU and on CUDA; move it there first, and compile it afterwards. Raises ValueError elsewhere.
        """
        linear.to_int8(self.transformer)
        return self

    def compile(self) -> FlexVARPipeline:
        """Makes drawing faster, if there is a way, for good: the same pictures up to rounding (`flexvar.compiled`, docs/speed.md).

        Move it first: a changed model is neither moved, copied nor saved any more. On CUDA the first picture of each size takes longer.
        On a CPU, on Linux, the whole process keeps the memory that it frees, other libraries' too (`flexvar.processes.keep_memory`).
        """
        if not isinstance(self._draw, Recorded):  # a new one would begin without recordings
            self._draw = compiled(self.tokenizer, self.transformer)
        return self

    # -- drawing --

    @takes(DrawingSettings)
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        edit: Edit | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
        **settings: Unpack[DrawingSettings],
    ) -> FlexVAROutput:
        """Draws one picture for each label.

        class_labels: class names or indices, one or several; None (or "unconditional") means no class.
        batch_size: pictures drawn at the same time; changes speed, not the pictures. By default what six tenths of the free memory hold,
        and fewer where that turns out to be too many.
        output_type: "pil", "np" or "pt". edit, height, width: as of `stream`. settings: `flexvar.settings.DrawingSettings`.
        """
        check_output_type(output_type)
        indices = self.labels_of(labels.listed(class_labels, edit))
        seeds = seeds_of(settings.pop("seed", None), len(indices))
        recipe = self._recipe(indices, edit, height, width, settings)
        if len(indices) > 1:
            self._need(recipe.schedule, 1, recipe.guidance, edit).refuse_what_cannot_fit()  # first, as it names the size that fits
            refuse_results(self._pixels(recipe.schedule[-1]) if edit is None else edit.size, len(indices))
        at_once = None if batch_size is None else whole_number(batch_size, "batch_size", "give an integer of at least 1", least=1)

        def drawn(part: slice) -> Tensor:
            """On the CPU; the steps before the last are gone then."""
            own = None if edit is None else edit.part(part)
            *_, last = self._steps(indices[part], seeds[part], own, recipe)
            with self._need(recipe.schedule, len(indices[part]), recipe.guidance, own):
                return self._making_room(lambda: output_ready(last.images, output_type))

        ready = self._draw.recorded_batch(recipe) if isinstance(self._draw, Recorded) and edit is None else 0
        images = in_parts(self._need(recipe.schedule, len(indices), recipe.guidance, edit), drawn, at_once, ready)
        return FlexVAROutput(as_output(images, output_type), indices, seeds)

    @takes(DrawingSettings)
    def stream(
        self,
        class_labels: Labels = None,
        *,
        edit: Edit | None = None,
        height: int | None = None,
        width: int | None = None,
        **settings: Unpack[DrawingSettings],
    ) -> Iterator[Step]:
        """Draws scale by scale: one Step for each, as soon as its codes are chosen.

        edit: what is kept of given pictures (`edit_of`); its last step's images are the finished ones. It has its own height and width.
        height, width: pixels, multiples of the tokenizer's downsampling; one alone keeps the proportions of the model's own size.
        settings: `flexvar.settings.DrawingSettings`.
        Raises ValueError, in one line, for an unknown class, an impossible size or schedule, and settings out of range; MemoryError,
        naming the largest size that fits, where memory runs out.
        """
        indices = self.labels_of(labels.listed(class_labels, edit))
        seeds = seeds_of(settings.pop("seed", None), len(indices))
        return self._steps(indices, seeds, edit, self._recipe(indices, edit, height, width, settings))

    def _recipe(self, indices: list[int], edit: Edit | None, height: int | None, width: int | None, settings: Mapping[str, Any]) -> Recipe:
        """What the keywords of a call ask for, less guidance where no picture has a class."""
        recipe = self.settings.recipe(height, width, edit=edit, **settings)
        return replace(recipe, guidance=needed_guidance(recipe.guidance, indices, self.transformer.config.null_class))

    def _pixels(self, grid: Size) -> Size:
        """Height and width of the picture that a grid of codes becomes."""
        return grid[0] * self.tokenizer.config.downsample, grid[1] * self.tokenizer.config.downsample

    def _steps(self, indices: list[int], seeds: list[int], edit: Edit | None, recipe: Recipe) -> Iterator[Step]:
        """The steps of a drawing that was asked for in full."""
        schedule, grid = recipe.schedule, self.settings.trained_grid
        need = self._need(schedule, len(indices), recipe.guidance, edit)
        need.refuse_what_cannot_fit()
        if max(schedule[-1]) > 2 * grid:
            size, (trained, _) = self._pixels(schedule[-1]), self._pixels((grid, grid))
            warn(f"{size[0]} x {size[1]} px is more than twice the {trained} px of this model's training; expect waves and repeated parts")
        with need:
            keep = None if edit is None else self._making_room(lambda: self._keep(edit, schedule))
            drawing = partial(generate, self.tokenizer, self.transformer, indices, schedule, keep=keep, seeds=seeds, draw=self._draw)
            steps = self._making_room(lambda: drawing(guidance=recipe.guidance, sampling=recipe.sampling))
        return _watched(steps, need, edit, len(schedule))

    def _making_room(self, work: Callable[[], T]) -> T:
        """What the work gives; recorded drawings, where there are any, give way to it when memory runs out."""
        return self._draw.making_room(work) if isinstance(self._draw, Recorded) else work()

    # -- editing --

    @takes(SizedEditSettings)
    def refine(
        self, image: GivenPictures, strength: float = 0.5, class_labels: Labels = None, **settings: Unpack[SizedEditSettings]
    ) -> FlexVAROutput:
        """Keeps the coarse scales of given pictures and draws the others again; with another class, an edit towards it.

        strength: 0 keeps every scale, 1 none. height, width: another size or aspect ratio. For this and the other edits: image is one
        picture or a list of one size (see `flexvar.data.given.pictures_of`); class_labels one for all, or one each, or several for one
        picture; the result has the picture's size, unless it says otherwise; settings stand in `flexvar.settings`.
        """
        return self._edited("refine", image, class_labels, settings, strength=strength)

    @takes(SizedEditSettings)
    def upscale(
        self, image: GivenPictures, factor: float | None = None, class_labels: Labels = None, **settings: Unpack[SizedEditSettings]
    ) -> FlexVAROutput:
        """Keeps every scale of given pictures up to their own, and draws larger ones: by a factor, or to `height` and `width`."""
        return self._edited("upscale", image, class_labels, settings, factor=factor)

    @takes(MaskedEditSettings)
    def inpaint(
        self,
        image: GivenPictures,
        mask: GivenPictures | None = None,
        class_labels: Labels = None,
        **settings: Unpack[MaskedEditSettings],
    ) -> FlexVAROutput:
        """Draws anew what is white in the mask or transparent; of 8-bit pictures every pixel that is neither comes back to the bit."""
        return self._edited("inpaint", image, class_labels, settings, mask=mask)

    @takes(OutpaintSettings)
    def outpaint(self, image: GivenPictures, class_labels: Labels = None, **settings: Unpack[OutpaintSettings]) -> FlexVAROutput:
        """Draws beyond the edges: by `left`, `right`, `top`, `bottom` in pixels, or to `height` and `width` with an `anchor`."""
        return self._edited("outpaint", image, class_labels, settings)

    def _edited(self, operation: str, image: GivenPictures, class_labels: Labels, settings: Mapping[str, Any], **own: Any) -> FlexVAROutput:
        given = {name: value for name, value in settings.items() if value is not None}
        own |= {name: given.pop(name) for name in editing.keywords(operation) if name in given}
        return self(class_labels, edit=self.edit_of(operation, image, **own), **given)

    def edit_of(self, operation: str, image: GivenPictures, *, max_pixels: int | None = None, **own: Any) -> Edit:
        """The edit that `stream` and the call take: "refine", "upscale", "inpaint" or "outpaint", with that method's own keywords.

        max_pixels: above so many, 4 times the training size by default, a reduced copy is drawn and the drawing enlarged.
        Raises ValueError for another operation, and TypeError for a keyword that it does not have.
        """
        if operation not in editing.EDITS:
            raise ValueError(f"no edit is named {operation!r}; there are {', '.join(editing.EDITS)}")
        refuse_unknown(operation, own, editing.keywords(operation))
        f, trained = self.tokenizer.config.downsample, self.transformer.config.trained_grid * self.tokenizer.config.downsample
        most = 4 * trained**2 if max_pixels is None else whole_number(max_pixels, "max_pixels", "give an integer of at least 1", least=1)
        with room_for(f"{operation} with pictures and results of such a size"):
            edit = editing.EDITS[operation](image, f, most, **own)
        refuse_results(edit.size, len(edit))
        if (height := edit.size[0]) * (width := edit.size[1]) > most:
            drawn = f"drawn at {edit.crop[2]} x {edit.crop[3]} px and enlarged"
            warn(f"{height} x {width} px are more than max_pixels={most}: {drawn}, which is softer; a larger max_pixels draws more")
        return edit

    @torch.no_grad()
    def _keep(self, edit: Edit, schedule: Schedule) -> Keep:
        """The codes of an edit's canvas, where and as far as they are kept."""
        kept = schedule.sizes[: edit.kept(schedule)]
        return edit.keep(self._codes(edit.canvas, kept) if kept else [])

    @without_tf32()
    def _codes(self, pictures: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """The codes (P, h, w) of pictures (P, 3, H, W) in [-1, 1], at each of the scales."""
        return self.tokenizer.codes(self.tokenizer.features(pictures.to(self.tokenizer.after_codes.weight)), sizes)

    # -- through the tokenizer --

    @torch.no_grad()
    def reconstruct(
        self, image: GivenPictures, *, height: int | None = None, width: int | None = None, output_type: OutputType = "pil"
    ) -> FlexVAROutput:
        """Pictures through the tokenizer alone, resized to cover height x width and cropped at the centre: the best that codes can do.

        image: as of `refine`, its transparency over white. By default the largest size within the picture's own that the tokenizer takes;
        one side alone keeps the picture's proportions.
        """
        check_output_type(output_type)
        pictures, f = to_pil(over_white(pictures_of(image))), self.tokenizer.config.downsample
        own = pictures[0].height, pictures[0].width
        if height is None and width is None:
            height, width = (max(f, side // f * f) for side in own)
        height, width = both_sides(height, width, own, f)
        grid = grid_of(height, width, f)
        pixels = torch.from_numpy(np.stack([np.asarray(fitted(one, (height, width))) for one in pictures])).permute(0, 3, 1, 2)
        need = replace(self._need(Schedule((grid,)), len(pictures), Guidance("constant", 1.0)), encoded=grid)

        def rebuilt(part: slice) -> Tensor:
            with (fitting := replace(need, batch=len(pixels[part]))):
                fitting.refuse_what_cannot_fit()
                (codes,) = self._making_room(lambda: self._codes(pixels[part] / 127.5 - 1, [grid]))
                return self._making_room(lambda: output_ready(self.tokenizer.decode(codes), output_type))

        return FlexVAROutput(as_output(in_parts(need, rebuilt), output_type), [], [])

    def _need(self, schedule: Schedule, batch: int, guidance: Guidance, edit: Edit | None = None) -> MemoryNeed:
        """What it takes to draw this, so that running out of memory is told with the size that fits."""
        shapes, int8 = (self.transformer.config, self.tokenizer.config), "int8" in self.made_faster
        guided = any(factor != 1 for factor in guidance.weights(schedule, shapes[0].trained_grid))
        need = MemoryNeed(*shapes, schedule, batch, guided, self.dtype, self.device, int8, guidance.split)
        if edit is None or not edit.kept(schedule):
            return need
        return replace(need, encoded=edit.native, given=1 if len(edit) == 1 else None)

    # -- what the words mean --

    def labels_of(self, class_labels: Labels) -> list[int]:
        """Class indices of names, indices or None. Raises ValueError with the closest names."""
        null_class, aliases = self.transformer.config.null_class, self.model.aliases
        return [labels.index_of(label, self.class_names, null_class, aliases) for label in labels.listed(class_labels)]

    def class_name(self, label: int) -> str:
        """The name of a class index."""
        return labels.name_of(label, self.class_names, self.transformer.config.null_class)


def _watched(steps: Iterator[Step], need: MemoryNeed, edit: Edit | None, count: int) -> Iterator[Step]:
    """The steps as they are drawn, the last one of an edit with its finished pictures.

    Where memory runs out, in drawing or in decoding one of them, the error names what fits.
    """
    with need:
        for step in steps:
            decode = edit.finishing(step.decode) if edit is not None and step.index == count - 1 else step.decode
            yield replace(step, decode=need(decode))
