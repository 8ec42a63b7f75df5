"""The front room: class names and PIL pictures in, PIL pictures out."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from PIL import Image

from flexvar import editing, labels, linear
from flexvar.arguments import seeds_of, whole_number
from flexvar.checkpoint import Defaults, Model, load, save
from flexvar.compiled import compiled
from flexvar.data import fitted, upright_rgb
from flexvar.data.given import GivenPictures
from flexvar.editing import Edit
from flexvar.generation import Draw, Keep, Step, draw_scales, generate
from flexvar.labels import Label
from flexvar.memory import Drawing
from flexvar.models import model_folder, released_model, write_released
from flexvar.sampling import Greedy, Guidance, GuidanceKind
from flexvar.schedule import Schedule, ScheduleLike, grid_of
from flexvar.settings import Settings
from flexvar.sheet import Images, OutputType, as_output, check_output_type
from flexvar.tokenizer import Tokenizer
from flexvar.transformer import Transformer


@dataclass(frozen=True)
class FlexVAROutput:
    """What a call gives.

    images: PIL pictures, or an array (B, H, W, 3) float32 in [0, 1] ("np"), or a tensor (B, 3, H, W) in [0, 1] on the CPU ("pt").
    """

    images: Images
    labels: list[int]  # class indices; the number of classes stands for no class
    seeds: list[int]  # one a picture, so that any of them can be drawn again


class FlexVARPipeline:
    """A tokenizer, a transformer and the names of the classes."""

    def __init__(self, model: Model) -> None:
        if model.transformer is None:
            raise ValueError("this model has no transformer yet; train one on its tokenizer first")
        self.model = model
        self.tokenizer: Tokenizer = model.tokenizer
        self.transformer: Transformer = model.transformer
        self.settings = Settings(model)  # what the keywords of a call mean
        self.precision = _name_of(self.transformer)  # of the weights, as reports call it
        self.made_faster: tuple[str, ...] = ()  # "int8", "compiled"
        self._draw: Draw = draw_scales

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by index; empty where they have none."""
        return self.model.class_names

    @property
    def defaults(self) -> Defaults:
        """How the model draws when it is not told otherwise."""
        return self.model.defaults

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
        self._refuse_made_faster()
        save(self.model, folder, overwrite=overwrite)

    def save_released(self, folder: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
        """Writes the two .pth files that the released code loads; gives their paths, tokenizer first."""
        self._refuse_made_faster()
        return write_released(self.model, folder, overwrite=overwrite)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads the model folder to the Hub under `repository`; gives its address."""
        huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder))

    def to(self, *device_or_dtype: str | torch.device | torch.dtype) -> FlexVARPipeline:
        """Moves both networks to a device, a dtype, or both: pipe.to("cuda", torch.bfloat16)."""
        self._refuse_made_faster()
        for network in (self.tokenizer, self.transformer):
            network.to(*device_or_dtype)  # type: ignore[call-overload]
        self.precision = _name_of(self.transformer)
        return self

    def to_int8(self) -> FlexVARPipeline:
        """Rounds the weights of the transformer's blocks to 8 bits, for good: faster, at a price (docs/speed.md).

        On the CPU and on CUDA; move it there first, and compile it afterwards. Raises ValueError elsewhere.
        """
        self._refuse_made_faster()
        linear.to_int8(self.transformer)
        self.precision, self.made_faster = "int8", ("int8",)
        return self

    def compile(self) -> FlexVARPipeline:
        """Makes drawing faster where it is, for good: the same pictures up to rounding (`flexvar.compiled` says how; docs/speed.md).

        Move the pipeline first. The first picture of each size then takes longer on CUDA.
        """
        if "compiled" not in self.made_faster:
            self._draw = compiled(self.tokenizer, self.transformer)
            self.made_faster += ("compiled",)
        return self

    def _refuse_made_faster(self) -> None:
        if self.made_faster:
            how = " and ".join("of 8-bit weights" if name == "int8" else name for name in self.made_faster)
            raise ValueError(f"a model made faster ({how}) stays where it is and is not saved; load it again from its folder")

    # -- drawing --

    def __call__(
        self,
        class_labels: Label | Sequence[Label] = None,
        *,
        edit: Edit | None = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
        **settings: Any,
    ) -> FlexVAROutput:
        """Draws one picture for each label.

        class_labels: class names or indices, one or several; None (or "unconditional") means no class.
        batch_size: pictures drawn at the same time, by default what six tenths of the free memory hold; changes speed, not the pictures.
        output_type: "pil", "np" or "pt". The other keywords are those of `stream`.
        """
        check_output_type(output_type)
        listed = _listed(class_labels, edit)
        indices, seeds = self.labels_of(listed), seeds_of(settings.pop("seed", None), len(listed))
        at_once = self._fitting(len(listed), edit, **settings) if batch_size is None else whole_number(batch_size, "batch_size")
        if at_once < 1:
            raise ValueError(f"batch_size is {at_once}; draw at least 1 picture at a time")
        drawn = []
        for start in range(0, len(listed), at_once):
            part = slice(start, start + at_once)
            *_, last = self.stream(listed[part], edit=edit and edit.part(part), seed=seeds[part], **settings)
            drawn.append(last.images.float().cpu())
        return FlexVAROutput(as_output(torch.cat(drawn), output_type), indices, seeds)

    def stream(
        self,
        class_labels: Label | Sequence[Label] = None,
        *,
        edit: Edit | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        schedule: ScheduleLike | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceKind | None = None,
        split_guidance: bool | None = None,
        guidance_stop: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        greedy: Greedy | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Draws scale by scale: one Step for each, as soon as its codes are chosen. What is not given is the model's default.

        edit: what is kept of given pictures (`edit_of`); its last step's images are the finished ones. It has its own height and width.
        height, width: pixels, multiples of the tokenizer's downsampling; one alone means a square.
        num_inference_steps: scales, at least 2. schedule: the scales themselves, instead of size and steps.
        guidance_scale, guidance: see `Guidance`; 1 switches "ramp" and "constant" off, 0 "official-ramp".
        split_guidance: draws with and without the class in turn, for less memory. guidance_stop: scales that are guided, all by default;
        those behind them cost half.
        top_k, top_p, temperature, greedy: see `Sampling`.
        seed: one a picture, or one integer s for s, s + 1, ...; None draws them.
        Raises ValueError, in one line, for an unknown class, an impossible size or schedule, and settings out of range; MemoryError,
        naming the largest size that fits, where memory runs out.
        """
        indices = self.labels_of(_listed(class_labels, edit))
        grids = self.settings.schedule_of(height, width, num_inference_steps, schedule, edit=edit)
        guiding = self.settings.guidance_of(guidance, guidance_scale, split_guidance, guidance_stop)
        choosing = self.settings.sampling_of(top_k, top_p, temperature, greedy)
        seeds = seeds_of(seed, len(indices))
        with self._drawing(grids, len(indices), guiding) as drawing:
            keep = None if edit is None else self._keep(edit, grids)
            networks = self.tokenizer, self.transformer
            steps = generate(*networks, indices, grids, guidance=guiding, sampling=choosing, keep=keep, seeds=seeds, draw=self._draw)
        return _watched(steps, drawing, edit, len(grids))

    # -- editing --

    def refine(
        self, image: GivenPictures, strength: float = 0.5, class_labels: Label | Sequence[Label] = None, **settings: Any
    ) -> FlexVAROutput:
        """Keeps the coarse scales of given pictures and draws the others again; with another class, an edit towards it.

        strength: 0 keeps every scale, 1 none. height, width: another size or aspect ratio. For this and the other edits: image is one
        picture or a list of one size (see `flexvar.data.given.pictures_of`); class_labels one for all, or one each, or several for one
        picture; the result has the picture's size, unless it says otherwise; the other keywords are the call's own.
        """
        return self._edited("refine", image, class_labels, settings, strength=strength)

    def upscale(
        self, image: GivenPictures, factor: float | None = None, class_labels: Label | Sequence[Label] = None, **settings: Any
    ) -> FlexVAROutput:
        """Keeps every scale of given pictures up to their own, and draws larger ones: by a factor, or to `height` and `width`."""
        return self._edited("upscale", image, class_labels, settings, factor=factor)

    def inpaint(
        self, image: GivenPictures, mask: GivenPictures | None = None, class_labels: Label | Sequence[Label] = None, **settings: Any
    ) -> FlexVAROutput:
        """Draws anew what is white in the mask or transparent in the picture; every pixel that is neither comes back to the bit.

        feather, paste, mask_rule: see `flexvar.editing.inpaint`.
        """
        return self._edited("inpaint", image, class_labels, settings, mask=mask)

    def outpaint(self, image: GivenPictures, class_labels: Label | Sequence[Label] = None, **settings: Any) -> FlexVAROutput:
        """Draws beyond the edges of given pictures: `left`, `right`, `top`, `bottom` in pixels, or `height` and `width` with an `anchor`.

        feather, paste, mask_rule: see `flexvar.editing.inpaint`.
        """
        return self._edited("outpaint", image, class_labels, settings)

    def _edited(
        self, operation: str, image: GivenPictures, class_labels: Label | Sequence[Label], settings: dict[str, Any], **own: Any
    ) -> FlexVAROutput:
        own |= {name: settings.pop(name) for name in editing.keywords(operation) if name in settings}
        return self(class_labels, edit=self.edit_of(operation, image, **own), **settings)

    def edit_of(self, operation: str, image: GivenPictures, *, max_pixels: int | None = None, **own: Any) -> Edit:
        """The edit that `stream` and the call take: "refine", "upscale", "inpaint" or "outpaint", with that method's own keywords.

        max_pixels: above so many, 4 times the training size by default, a reduced copy is drawn and the drawing enlarged.
        """
        if operation not in editing.EDITS:
            raise ValueError(f"no edit is named {operation!r}; there are {', '.join(editing.EDITS)}")
        f, trained = self.tokenizer.config.downsample, self.transformer.config.trained_grid * self.tokenizer.config.downsample
        edit = editing.EDITS[operation](image, f, 4 * trained**2 if max_pixels is None else whole_number(max_pixels, "max_pixels"), **own)
        if operation == "upscale" and max(edit.grid) * f > 2 * trained:
            warnings.warn(f"{edit.size[0]} x {edit.size[1]} px is more than twice the trained {trained} px; expect waves", stacklevel=4)
        return edit

    @torch.no_grad()
    def _keep(self, edit: Edit, schedule: Schedule) -> Keep:
        """The codes of an edit's canvas, where and as far as they are kept."""
        kept = schedule.sizes[: edit.kept(schedule)]
        features = self.tokenizer.features(edit.canvas.to(self.tokenizer.after_codes.weight))
        return edit.keep(self.tokenizer.codes(features, kept) if kept else [])

    # -- through the tokenizer --

    @torch.no_grad()
    def reconstruct(
        self, image: Image.Image, *, height: int | None = None, width: int | None = None, output_type: OutputType = "pil"
    ) -> FlexVAROutput:
        """A picture through the tokenizer alone, resized to cover height x width and cropped at the centre: the best that codes can do.

        By default the largest size within the picture's own that the tokenizer takes.
        """
        check_output_type(output_type)
        if not isinstance(image, Image.Image):
            raise ValueError(f"the image is a {type(image).__name__}; give a PIL picture, for example from PIL.Image.open")
        if 0 in image.size:
            raise ValueError(f"the image has {image.height} x {image.width} pixels; give one that has some")
        image, f = upright_rgb(image), self.tokenizer.config.downsample
        height = max(f, image.height // f * f) if height is None else whole_number(height, "a side")
        width = max(f, image.width // f * f) if width is None else whole_number(width, "a side")
        grid = grid_of(height, width, f)
        weight = self.tokenizer.after_codes.weight
        pixels = torch.from_numpy(np.array(fitted(image, (height, width)))).permute(2, 0, 1)[None]
        with self._drawing(Schedule((grid,)), 1, Guidance("constant", 1.0)):
            (codes,) = self.tokenizer.codes(self.tokenizer.features(pixels.to(weight) / 127.5 - 1), [grid])
            return FlexVAROutput(as_output(self.tokenizer.decode(codes).float().cpu(), output_type), [], [])

    def _drawing(self, schedule: Schedule, batch: int, guidance: Guidance) -> Drawing:
        """What is about to be drawn, so that running out of memory is told with the size that fits."""
        transformer, weight = self.transformer.config, self.transformer.head.weight
        guided = any(factor != 1 for factor in guidance.weights(schedule, transformer.trained_grid))
        return Drawing(transformer, self.tokenizer.config, schedule, batch, guided, weight.dtype, weight.device)

    def _fitting(self, pictures: int, edit: Edit | None, **settings: Any) -> int:
        """How many of the pictures can be drawn at the same time in the memory that is free; at least one is tried."""
        if pictures == 1:
            return 1
        grids = self.settings.schedule_of(edit=edit, **settings)
        return self._drawing(grids, pictures, self.settings.guidance_of(**settings)).at_once()

    # -- what the words mean --

    def labels_of(self, class_labels: Label | Sequence[Label]) -> list[int]:
        """Class indices of names, indices or None. Raises ValueError with the closest names."""
        null_class, aliases = self.transformer.config.null_class, self.model.aliases
        return [labels.index_of(label, self.class_names, null_class, aliases) for label in labels.listed(class_labels)]

    def class_name(self, label: int) -> str:
        """The name of a class index."""
        return labels.name_of(label, self.class_names, self.transformer.config.null_class)


def _watched(steps: Iterator[Step], drawing: Drawing, edit: Edit | None, count: int) -> Iterator[Step]:
    """The steps as they are drawn, the last one of an edit with its finished pictures.

    Where memory runs out, in drawing or in decoding one of them, the error names what fits.
    """
    with drawing:
        for step in steps:
            yield replace(step, decode=drawing(step.decode if edit is None or step.index < count - 1 else edit.finishing(step.decode)))


def _listed(class_labels: Label | Sequence[Label], edit: Edit | None = None) -> list[Any]:
    """One label or several as a list, one for all pictures of an edit; ValueError when there is none, or another number of them."""
    listed = labels.listed(class_labels)
    if edit is not None and len(listed) == 1:
        return listed * len(edit)
    if edit is not None and len(edit) not in (1, len(listed)):
        raise ValueError(f"{len(listed)} class labels were given for {len(edit)} pictures; give one, or one a picture")
    return listed


def _name_of(transformer: Transformer) -> str:
    return str(transformer.head.weight.dtype).removeprefix("torch.")
