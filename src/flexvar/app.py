"""A page for the browser: draws classes and edits pictures, and shows every scale as it is drawn.

`page` lays it out and `serve` opens it; what happens on a click is `draw` and `edit_of`, which know nothing of the page. It needs gradio,
which nothing else here does.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from flexvar.arguments import SEEDS
from flexvar.editing import EDITS, Edit
from flexvar.memory import is_out_of_memory
from flexvar.pipeline import FlexVARPipeline
from flexvar.schedule import FINEST
from flexvar.sheet import to_pil

try:
    import gradio as gr
    from httpx import HTTPError  # comes with it
except ModuleNotFoundError:
    raise ModuleNotFoundError("the page needs a package: pip install 'flexvar[app]'") from None

HOST = "127.0.0.1"  # this machine alone
HOUR = 3600  # seconds
MOST_PIXELS = 2**25  # of an uploaded picture, which may be a small file all the same
PAINT = "#e6007e"  # seen on most pictures
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
UNSEEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
LARGEST_FILE = "50mb"  # of a file that is uploaded

STYLE = """
.pixels img { image-rendering: pixelated; object-fit: contain; width: 100%; height: 100%; }
.scales .grid-wrap { min-height: 0; max-height: none; }
"""

SIDES = ("left", "right", "top", "bottom")

ABOUT = {
    "refine": "Keeps the coarse scales and draws the finer ones anew: with another class, an edit towards it.",
    "inpaint": "Paint over what is to be drawn anew.",
    "outpaint": "Draws beyond the edges.",
    "upscale": "Keeps every scale and draws larger ones.",
}

Shown: TypeAlias = tuple[Image.Image, str, list[tuple[Image.Image, str]]]
"""A scale as a picture, a line of text, and once the last is drawn all of them with their sizes in codes."""


# -- what a click does --


def draw(
    pipe: FlexVARPipeline,
    label: int,
    seed: int,
    *,
    edit: Edit | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    notes: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Shown]:
    """Draws one picture of a class index, the null class among them; yields what the page shows after each scale.

    notes: what the line of text ends with. The others are as of `FlexVARPipeline.stream`, which says what is raised.
    """
    with overheard() as heard:
        schedule = pipe.settings.schedule_of(height, width, num_inference_steps, edit=edit)
        steps = pipe.stream(
            None if label == pipe.transformer.config.null_class else label, seed=seed, edit=edit, schedule=schedule, **settings
        )
    scales: list[tuple[Image.Image, str]] = []
    for step in steps:
        (picture,), size = to_pil(step.images), f"{step.size[0]} x {step.size[1]}"
        scales.append((picture, size))
        facts = f"{pipe.class_name(label)}, seed {seed}: {size} codes, {picture.height} x {picture.width} px"
        yield picture, " · ".join([facts, *notes, *heard]), scales if len(scales) == len(schedule) else []


@contextmanager
def overheard() -> Iterator[list[str]]:
    """The warnings of what is done within, for the page instead of the terminal; to be read afterwards."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield heard
    heard += [str(warning.message) for warning in caught if warning.category is UserWarning]


def edit_of(pipe: FlexVARPipeline, operation: str, painted: dict[str, Any] | None, **own: Any) -> Edit:
    """The edit of what the page's editor holds: a picture, and for "inpaint" what was painted over it.

    painted: `background` and `layers`, PIL pictures with transparency of one size. own: keywords of that edit.
    Raises ValueError where there is no picture, or nothing is painted over one without transparency.
    """
    picture = (painted or {}).get("background")
    if picture is None:
        raise ValueError("there is no picture yet; upload one, or send one here from the drawings")
    if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(
            f"{picture.height} x {picture.width} px are too many; give a picture of at most {MOST_PIXELS / 2**20:.0f} megapixels"
        )
    if operation == "inpaint":
        mask = mask_of(painted or {}, picture.size)
        opaque = np.asarray(picture.convert("RGBA"))[..., 3].min() == 255
        if not mask.getbbox() and opaque:
            raise ValueError("nothing is painted over; paint over what is to be drawn anew")
        own["mask"] = mask if mask.getbbox() else None
    return pipe.edit_of(operation, picture, **own)


def mask_of(painted: dict[str, Any], size: tuple[int, int]) -> Image.Image:
    """White where any layer is painted, however thinly."""
    mask = np.zeros((size[1], size[0]), bool)
    for layer in painted.get("layers") or []:
        mask |= np.asarray(layer.convert("RGBA"))[..., 3] > 0
    return Image.fromarray(mask)


def seed_of(seed: float | None, anew: bool) -> int:
    """The seed in the page's field, or a new one. ValueError where it is none."""
    if anew:
        return secrets.randbelow(SEEDS)
    if seed is None or not 0 <= seed < SEEDS:
        raise ValueError(f"the seed is {seed}; give a whole number from 0 to {SEEDS - 1}")
    return int(seed)


@contextmanager
def told() -> Iterator[None]:
    """Raises gradio's Error, which the page shows, for one that explains itself, as on the command line; others stay as they are."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ValueError | OSError | FloatingPointError | MemoryError) and not is_out_of_memory(error):
            raise
        line = str(error) if not is_out_of_memory(error) or isinstance(error, MemoryError) else ""  # torch's own lines name no mend
        shown = bool(os.environ.get("FLEXVAR_TRACEBACK"))
        raise gr.Error(line or "not enough memory; draw smaller pictures", duration=None, print_exception=shown) from error


# -- the page --


def page(pipe: FlexVARPipeline, name: str) -> gr.Blocks:
    """The page for a model of that name; gradio calls it with one click at a time."""
    with gr.Blocks(title=f"flexvar: {name}", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as blocks:
        gr.Markdown(f"# flexvar\nThe model **{name}** draws scale by scale, and every scale is a whole picture.")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"), gr.Row():
                label, drawn, send = _drawing_tab(pipe)
            with gr.Tab("Edit", id="edit"), gr.Row():
                painted, towards, edited, again = _editing_tab(pipe)
        send.click(_to_editor, [drawn, label], [painted, towards, tabs], **UNSEEN, **ONE_AT_A_TIME)
        again.click(_to_editor, [edited, towards], [painted, towards, tabs], **UNSEEN, **ONE_AT_A_TIME)
    return blocks


def _to_editor(picture: Image.Image | None, label: int) -> tuple[Any, ...]:
    """A picture for the editor with its class, and the tab that it is on."""
    with told():
        if picture is None:
            raise ValueError("nothing is drawn yet")
    return {"background": picture, "layers": [], "composite": picture}, label, gr.Tabs(selected="edit")


def _drawing_tab(pipe: FlexVARPipeline) -> tuple[Any, Any, Any]:
    """Lays it out; gives its class, its picture, and the button that sends it on."""
    height, width, f = pipe.defaults.height, pipe.defaults.width, pipe.tokenizer.config.downsample
    with gr.Column(scale=2):
        label = _class_field(pipe, 0)
        with gr.Row():
            sides = [
                gr.Number(side, label=name, info=f"pixels, a multiple of {f}", precision=0, step=f)
                for side, name in ((height, "Height"), (width, "Width"))
            ]
        settings = _settings(pipe)
        button = gr.Button("Draw", variant="primary")
    with gr.Column(scale=3):
        results, send = _results("Drawing", "Edit this picture")

    def on_click(label: int, height: int | None, width: int | None, *chosen: Any) -> Iterator[tuple[Any, ...]]:
        with told():
            seed, keywords = _chosen(*chosen)
            yield from _shown(draw(pipe, label, seed, height=height, width=width, **keywords), seed)

    button.click(
        on_click,
        [label, *sides, *settings],
        [*results, settings[0]],
        api_name="draw",
        show_progress="minimal",
        show_progress_on=results[0],
        **ONE_AT_A_TIME,
    )
    return label, results[0], send


def _editing_tab(pipe: FlexVARPipeline) -> tuple[Any, Any, Any, Any]:
    """Lays it out; gives the picture that is edited, its class, the result, and the button that sends that on."""
    with gr.Column(scale=2):
        painted = gr.ImageEditor(
            type="pil", format="png", image_mode="RGBA", layers=False, transforms=(), sources=("upload", "clipboard"), label="Picture",
            brush=gr.Brush(default_size=12, colors=[PAINT], color_mode="fixed"), height=420,
        )  # fmt: skip
        operation = gr.Radio(list(EDITS), value="refine", label="Edit", info=ABOUT["refine"])
        strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength", info="share of the scales that are drawn anew")
        factor = gr.Slider(1, 4, 2, step=0.25, label="Factor", info="how many times larger on a side", visible=False)
        with gr.Row(visible=False) as margin:
            added = [gr.Number(0, label=side.capitalize(), info="pixels", precision=0) for side in SIDES]
        label = _class_field(pipe, pipe.transformer.config.null_class)
        settings = _settings(pipe)
        with gr.Accordion("Large pictures", open=False):
            most = gr.Number(
                None, label="max_pixels", info="above so many, a reduced copy is drawn; empty: 4 times the trained size", precision=0
            )
        button = gr.Button("Edit", variant="primary")
    with gr.Column(scale=3):
        results, again = _results("Result", "Edit the result")

    def on_click(
        painted: dict[str, Any] | None, operation: str, label: int, most: int | None, strength: float, factor: float, *others: Any
    ) -> Iterator[tuple[Any, ...]]:
        added, chosen = others[: len(SIDES)], others[len(SIDES) :]
        own = {
            "refine": {"strength": strength},
            "upscale": {"factor": factor},
            "inpaint": {},
            "outpaint": {side: pixels or 0 for side, pixels in zip(SIDES, added, strict=True)},
        }
        with told():
            seed, keywords = _chosen(*chosen)
            with overheard() as notes:
                edit = edit_of(pipe, operation, painted, max_pixels=most, **own[operation])
            yield from _shown(draw(pipe, label, seed, edit=edit, notes=notes, **keywords), seed)

    def on_operation(operation: str) -> tuple[Any, ...]:
        shown = (operation == name for name in ("refine", "upscale", "outpaint"))
        return gr.Radio(info=ABOUT[operation]), *(gr.update(visible=visible) for visible in shown)

    given = [painted, operation, label, most, strength, factor, *added, *settings]
    button.click(
        on_click, given, [*results, settings[0]], api_name="edit", show_progress="minimal", show_progress_on=results[0], **ONE_AT_A_TIME
    )
    operation.change(on_operation, operation, [operation, strength, factor, margin], **UNSEEN)
    return painted, label, results[0], again


def _shown(drawing: Iterator[Shown], seed: int) -> Iterator[tuple[Any, ...]]:
    """What `_results` and the seed's field take. All scales come at the end: gradio would write and send each of them at every scale."""
    for picture, facts, scales in drawing:
        yield picture, facts, scales or gr.skip(), seed


def _class_field(pipe: FlexVARPipeline, value: int) -> Any:
    return gr.Dropdown(
        [(pipe.class_name(label), label) for label in range(pipe.transformer.config.null_class + 1)], value=value, label="Class"
    )


def _settings(pipe: FlexVARPipeline) -> list[Any]:
    """The fields that both tabs have, in the order of `_chosen`."""
    defaults = pipe.defaults
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0)
        anew = gr.Checkbox(True, label="Another seed each time")
    steps, guidance, heat = defaults.num_inference_steps, defaults.guidance, defaults.sampling.temperature
    count = gr.Slider(2, max(FINEST, steps), steps, step=1, label="Steps")
    off = f"how strongly the class is followed; {0 if guidance.kind == 'official-ramp' else 1} is off"
    scale = gr.Slider(min(0, guidance.scale), max(10, guidance.scale), guidance.scale, step=0.1, label="Guidance", info=off)
    with gr.Accordion("More", open=False):
        top_k = gr.Number(defaults.sampling.top_k, label="Top-k", info="candidates kept, 0 for all", precision=0)
        top_p = gr.Slider(0, 1, defaults.sampling.top_p, step=0.01, label="Top-p", info="probability that they reach, 0 or 1 for no limit")
        temperature = gr.Slider(min(0.1, heat), max(2, heat), heat, step=0.05, label="Temperature")
    return [seed, anew, count, scale, top_k, top_p, temperature]


def _chosen(
    seed: float | None, anew: bool, steps: int, scale: float, top_k: int, top_p: float, temperature: float
) -> tuple[int, dict[str, Any]]:
    """The seed, and the keywords of the pipeline, of what the fields say. ValueError for no seed."""
    settings = {"num_inference_steps": steps, "guidance_scale": scale, "top_k": top_k, "top_p": top_p, "temperature": temperature}
    return seed_of(seed, anew), settings


def _results(label: str, next_step: str) -> tuple[list[Any], Any]:
    """The fields for what `_shown` gives, and a button between them."""
    buttons: list[Any] = ["download", "fullscreen"]  # none that uploads
    picture = gr.Image(label=label, format="png", type="pil", interactive=False, height=420, buttons=buttons, elem_classes="pixels")
    facts = gr.Markdown()
    button = gr.Button(next_step)
    scales = gr.Gallery(label="Every scale", format="png", columns=5, object_fit="contain", buttons=buttons, elem_classes="pixels scales")
    return [picture, facts, scales], button


def serve(pipe: FlexVARPipeline, name: str, host: str = HOST, port: int | None = None, *, open_browser: bool = False) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and prints its address; from the main thread. port: by default the first free one from 7860.

    Raises OSError, in one line, where it cannot listen there, and ValueError for no number of a port.
    """
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"--port is {port}; give one from 1 to {2**16 - 1}, or leave it out")
    where = f"{host}{'' if port is None else f':{port}'}"
    blocks, ended = page(pipe, name), Event()
    try:
        socket.getaddrinfo(host, port)  # gradio would try a wrong one for minutes
        blocks.queue(api_open=False).launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=port, inbrowser=open_browser, share=False, ssr_mode=False,
            quiet=True, prevent_thread_lock=True, show_error=True, run_history=False, footer_links=[], max_file_size=LARGEST_FILE,
            css=STYLE,
        )  # fmt: skip
    except (OSError, HTTPError) as error:
        reason = (
            "its own address is asked for through a proxy: set NO_PROXY" if isinstance(error, HTTPError) else error.strerror or "not free"
        )
        raise OSError(f"the page cannot be served at {where} ({reason}); give another --host or --port") from error
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(f"{blocks.local_url} draws with the model {name}; Ctrl-C ends it", flush=True)
        while not ended.wait(1):  # by the second, as Windows wakes nobody who waits for ever
            pass
    finally:
        blocks.close(verbose=False)
        for number, handler in previous.items():
            signal.signal(number, handler)
