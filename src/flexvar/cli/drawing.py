"""The commands that draw: samples of classes, and edits of given pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flexvar
from flexvar.cli.options import Words

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from flexvar.editing import Edit
    from flexvar.generation import Step
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.sampling import Greedy


MOST_PICTURES = 10**6
"""Of one command, which keeps their names and seeds in memory."""

LONGEST_NAME = 200
"""Bytes of a class's name in that of a file, of which most disks allow 255."""


def run_sample(words: Words) -> None:
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.progress import progress
    from flexvar.sheet import in_rows, sheet

    pipe = FlexVARPipeline.from_pretrained(words.model)
    asked, labels, seeds, stems = _asked(pipe, words)
    endings = [".png", *(["-strip.png"] if words.strip else [])]
    planned = [words.out / (stem + ending) for stem in stems for ending in endings] + ([words.out / "grid.png"] if words.grid else [])
    _check_free(words.out, planned, words.overwrite)
    settings = {"height": words.height, "width": words.width, **settings_of(words)}
    made = move(pipe, words)
    pictures: list[Image.Image] = []  # of the grid: without one, a long series is not kept in memory
    for part in progress(_parts(labels, words.batch), _doing("drawing", made), count=lambda part: part.stop - part.start):
        steps, how = _drawn(pipe, words, asked[part], seeds[part], settings)
        for i, picture in enumerate(_painted(steps[-1]), part.start):
            facts = {"model": words.model, "class": pipe.class_name(labels[i]), "seed": seeds[i]}
            _save_picture(picture, words.out / f"{stems[i]}.png", facts | made | how)
            if words.grid:
                pictures.append(picture)
        if words.strip:
            for i, strip in enumerate(zip(*(_painted(step) for step in steps), strict=True), part.start):
                row = [scale.resize(strip[-1].size, resample=0) for scale in strip]
                caption = [f"{h} x {w}" for h, w in (step.size for step in steps)]
                _save_picture(sheet([row], [caption]), words.out / f"{stems[i]}-strip.png")
    if words.grid:
        columns = words.count if words.count > 1 else max(1, round(len(pictures) ** 0.5))
        captions = in_rows([pipe.class_name(label) for label in labels], columns)
        _save_picture(sheet(in_rows(pictures, columns), captions), words.out / "grid.png")
    _print_paths(planned)


def run_edit(words: Words) -> None:
    from flexvar import editing
    from flexvar.data.given import over_white, pictures_of, read_given
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.progress import progress
    from flexvar.sheet import sheet, to_pil

    operation = words.command_name
    pipe = FlexVARPipeline.from_pretrained(words.model)
    asked, labels, seeds, names = _asked(pipe, words)
    settings = settings_of(words)
    stems = {image: [f"{Path(image).stem}-{operation}-{name}" for name in names] for image in words.images}
    planned = [words.out / f"{stem}.png" for image in stems for stem in stems[image]]
    sheets = {image: words.out / f"{Path(image).stem}-{operation}-sheet.png" for image in stems} if words.sheet else {}
    if len(set(planned)) < len(planned):
        raise ValueError("two pictures have the same name and would overwrite each other; edit them into different folders with --out")
    _check_free(words.out, [*planned, *sheets.values()], words.overwrite)
    own = {name: value for name in editing.keywords(operation) if (value := getattr(words, name, None)) is not None}
    own |= {"mask": read_given(words.mask)} if "mask" in own else {}

    @lru_cache(maxsize=1)  # many large ones do not fit into memory together; one that is alone is prepared once
    def prepared(image: str) -> tuple[Image.Image, Edit]:
        given = read_given(image)
        return given, pipe.edit_of(operation, given, **own)

    for image in stems:
        prepared(image)  # a picture that cannot be edited is told before any is drawn
    made = move(pipe, words)
    for image in progress(list(stems), _doing("editing", made)):
        given, edit = prepared(image)
        finished: list[Image.Image] = []  # of the sheet
        facts = {"model": words.model, "edit": operation, "of": Path(image).name} | made
        facts |= {name: value for name, value in own.items() if name != "mask"}
        for part in _parts(labels, words.batch):
            steps, how = _drawn(pipe, words, asked[part], seeds[part], settings, edit)
            for i, picture in enumerate(_painted(steps[-1]), part.start):
                what = {"class": pipe.class_name(labels[i]), "seed": seeds[i]}
                _save_picture(picture, words.out / f"{stems[image][i]}.png", facts | how | what)
                if words.sheet:
                    finished.append(picture)
        if words.sheet:
            white = edit.white
            mask = [] if white is None else to_pil(edit.canvas * (1 - white))  # grey where it is drawn
            captions = ["before", *["mask"] * len(mask), *(pipe.class_name(label) for label in labels)]
            before = to_pil(over_white(pictures_of(given)))
            _save_picture(sheet([[*before, *mask, *finished]], [captions]), sheets[image])
    _print_paths([*planned, *sheets.values()])


def run_app(words: Words) -> None:
    from flexvar.app import serve  # first, as it may be missing what it needs
    from flexvar.pipeline import FlexVARPipeline

    pipe = FlexVARPipeline.from_pretrained(words.model)
    move(pipe, words)
    serve(pipe, words.model, words.host, words.port, open_browser=words.open)


def _asked(pipe: FlexVARPipeline, words: Words) -> tuple[list[str | None], list[int], list[int], list[str]]:
    """For each picture to be drawn the class as it was typed, its index, the seed, and what to call it."""
    from flexvar.arguments import seeds_of

    for name in ("count", "batch"):
        if getattr(words, name) < 1:
            raise ValueError(f"--{name} is {getattr(words, name)}; it must be at least 1")
    if (count := words.count * len(words.classes or [None]) * len(getattr(words, "images", [None]))) > MOST_PICTURES:
        raise ValueError(f"{count} pictures are asked for; draw at most {MOST_PICTURES} with one command, and others from another --seed")
    asked = [word for word in words.classes or [None] for _ in range(words.count)]
    labels, seeds = pipe.labels_of(asked), seeds_of(words.seed, len(asked))
    return asked, labels, seeds, [f"{_file_name(pipe, label)}-seed{seed}" for label, seed in zip(labels, seeds, strict=True)]


def _doing(what: str, made: dict[str, str]) -> str:
    """What a bar of progress is called: the work, on which device, in which precision."""
    return f"{what} on {made['device']} in {made['dtype']}"


def _parts(labels: Sequence[int], batch: int) -> list[slice]:
    """Those that are drawn at the same time."""
    return [slice(start, min(start + batch, len(labels))) for start in range(0, len(labels), batch)]


def _drawn(
    pipe: FlexVARPipeline, words: Words, asked: list[str | None], seeds: list[int], settings: dict[str, Any], edit: Edit | None = None
) -> tuple[list[Step], dict[str, Any]]:
    """The steps of some pictures, and how they were drawn, to be kept in their files."""
    from flexvar.progress import within
    from flexvar.writing import make_folder

    drawing = pipe.stream(asked, edit=edit, seed=seeds, **settings)  # complains of wrong settings at once
    make_folder(words.out)
    recipe = pipe.settings.recipe(edit=edit, **settings)
    steps = list(within(drawing, len(recipe.schedule), "scales"))
    return steps, {"schedule": recipe.schedule, "guidance": recipe.guidance, "sampling": recipe.sampling}


def settings_of(words: Words) -> dict[str, Any]:
    """The keywords of the pipeline that both commands have."""
    from flexvar.schedule import Schedule

    return {
        "num_inference_steps": words.steps,
        "schedule": None if words.schedule is None else Schedule.parse(words.schedule),
        "guidance_scale": words.guidance_scale,
        "guidance": words.guidance,
        "split_guidance": words.split_guidance or None,
        "guidance_stop": words.guidance_stop,
        "top_k": words.top_k,
        "top_p": words.top_p,
        "temperature": words.temperature,
        "greedy": words.greedy if words.greedy in (None, "none", "official") else greedy_scales(words.greedy),
    }


def greedy_scales(text: str) -> Greedy:
    """Scales as people type them: "7,9" or "4x6". ValueError for anything else."""
    from flexvar.schedule import parse_sizes

    try:
        return parse_sizes(text)
    except ValueError as error:
        raise ValueError(f"--greedy is {text!r}; give none, official, or scales such as 7,9 or 4x6") from error


def move(pipe: FlexVARPipeline, words: Words) -> dict[str, str]:
    """Moves a pipeline to the device and dtype asked for, or the best that there are, compiles it on request; gives what came of it."""
    from flexvar.processes import keep_memory

    device = device_of(words.device)
    if device.type == "cpu":
        keep_memory()  # this process is ours
    pipe.to(device, dtype_of(words.dtype, device.type))
    if words.dtype == "int8":
        pipe.to_int8()
    if words.compile:
        pipe.compile()
    made = {"device": str(device), "dtype": pipe.precision, "flexvar": flexvar.__version__}
    return made | ({"compiled": "yes"} if "compiled" in pipe.made_faster else {})


def dtype_of(name: str | None, device_type: str) -> torch.dtype:
    """The dtype asked for; the device's own where none is, or 8-bit weights are, which are for the blocks alone."""
    import torch

    own = "bfloat16" if device_type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, own if name in (None, "int8") else name)
    return dtype


def kind_of(device: str) -> str:
    """ "cuda" of "cuda:1", whether it is here or not; ValueError for no name of a device."""
    import torch

    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no name of a device; give cpu, cuda or mps") from error


def device_of(name: str | None) -> Any:
    """The device asked for, or the accelerator, or the CPU; ValueError when there is none of that name."""
    import torch

    from flexvar.processes import pick_device

    if name in (None, "cuda"):
        device = pick_device()  # of several processes each has its own
        if name is None or device.type == "cuda":
            return device
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here; give cpu, or leave --device out") from error
    return device


def _painted(step: Step) -> list[Image.Image]:
    from flexvar.sheet import to_pil

    return to_pil(step.images)


def _file_name(pipe: FlexVARPipeline, label: int) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in pipe.class_name(label))
    return name.encode()[:LONGEST_NAME].decode(errors="ignore")


def _check_free(folder: Path, paths: Sequence[Path], overwrite: bool) -> None:
    """Raises FileExistsError where a file is in the folder's place, or in that of a picture and may not be replaced."""
    from flexvar.writing import refuse_file

    refuse_file(folder)
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists; choose another --out or --seed, or add --overwrite")


def _print_paths(paths: Sequence[Path]) -> None:
    for path in paths:
        print(_encodable(str(path), sys.stdout.encoding or "utf-8"))


def _encodable(text: str, encoding: str = "utf-8") -> str:
    """A text with question marks for what the encoding does not have: file names need not be text at all."""
    return text.encode(encoding, "replace").decode(encoding)


def _save_picture(picture: Image.Image, path: Path, facts: dict[str, Any] | None = None) -> None:
    from PIL.PngImagePlugin import PngInfo

    from flexvar.writing import write_whole

    text = PngInfo()
    for name, value in (facts or {}).items():
        text.add_itxt(name, _encodable(str(value)))
    write_whole(path, lambda beside: picture.save(beside, "PNG", pnginfo=text))
