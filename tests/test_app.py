"""The page, as its users meet it: the command serves it, and clicks reach it by gradio's own client; the functions behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from flexvar import FlexVARPipeline
from flexvar.app import SIDES, draw, edit_of, mask_of, overheard, page, seed_of
from flexvar.cli import main

NULL_CLASS = 48


@pytest.fixture(scope="module")
def pipe() -> FlexVARPipeline:
    return FlexVARPipeline.from_pretrained("emoji")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of `flexvar app`, which must end with status 0 on Ctrl-C."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "flexvar", "app", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "draws with the model emoji; Ctrl-C ends it" in line
            yield line.split()[0]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0
            assert errors == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(server: str) -> Client:
    return Client(server, verbose=False)


def settings(seed: int = 3, anew: bool = False, steps: int = 4) -> list[Any]:
    return [seed, anew, steps, 1.5, 0, 0.95, 1.0]


def painted(picture: Image.Image, box: tuple[int, int, int, int] | None = None) -> dict[str, Any]:
    """What the editor holds when a box was painted over a picture."""
    layer = Image.new("RGBA", picture.size)
    if box:
        layer.paste((230, 0, 126, 255), box)
    return {"background": picture.convert("RGBA"), "layers": [layer], "composite": None}


def uploaded(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same as a browser sends it."""
    files = []
    for name, picture in (("background", value["background"]), ("layer", value["layers"][0])):
        picture.save(folder / f"{name}.png")
        files.append(handle_file(folder / f"{name}.png"))
    return {"background": files[0], "layers": files[1:], "composite": None}


# -- through the server --


def test_a_click_draws_what_the_pipeline_draws(client: Client, pipe: FlexVARPipeline) -> None:
    picture, facts, scales, seed = client.predict(5, 32, 64, *settings(), api_name="/draw")
    drawn = pipe(5, height=32, width=64, seed=3, num_inference_steps=4, guidance_scale=1.5, top_k=0, top_p=0.95, temperature=1.0)
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(drawn.images[0]))
    assert facts == f"{pipe.class_name(5)}, seed 3: 8 x 16 codes, 32 x 64 px"
    assert seed == 3
    assert [scale["caption"] for scale in scales][-1] == "8 x 16"
    assert len(scales) == 4


def test_every_scale_is_sent_by_itself(client: Client, pipe: FlexVARPipeline) -> None:
    job = client.submit(5, 32, 32, *settings(), api_name="/draw")
    job.result()
    sizes = [facts.split(": ")[1].split(" codes")[0] for _, facts, _, _ in job.outputs()]
    assert sizes == [f"{h} x {w}" for h, w in pipe.settings.schedule_of(32, 32, 4)]


def test_painting_over_a_picture_draws_that_part_alone(client: Client, pipe: FlexVARPipeline, tmp_path: Path) -> None:
    given = pipe("pizza", seed=1, height=32, width=32).images[0]
    value = uploaded(painted(given, (8, 8, 24, 24)), tmp_path)
    picture, *_ = client.predict(value, "inpaint", 2, None, 0.5, 2, 0, 0, 0, 0, *settings(), api_name="/edit")
    before, after = np.asarray(given), np.asarray(Image.open(picture).convert("RGB"))
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    assert np.array_equal(before[outside], after[outside])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(("operation", "size"), [("refine", (32, 32)), ("upscale", (64, 64)), ("outpaint", (36, 48))])
def test_other_edits(client: Client, pipe: FlexVARPipeline, tmp_path: Path, operation: str, size: tuple[int, int]) -> None:
    given = pipe("pizza", seed=1, height=32, width=32).images[0]
    value = uploaded(painted(given), tmp_path)
    picture, facts, *_ = client.predict(value, operation, NULL_CLASS, None, 0.5, 2, 16, 0, 4, 0, *settings(), api_name="/edit")
    assert Image.open(picture).size == size[::-1]
    assert facts.startswith("unconditional, seed 3: ")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([5, 33, 32, *settings()], "33"),
        ([5, 32, 0, *settings()], "0"),
        ([5, 32, 32, *settings(seed=-1)], "give a whole number from 0"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(client: Client, given: list[Any], complaint: str) -> None:
    with pytest.raises(AppError) as error:
        client.predict(*given, api_name="/draw")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_an_edit_of_nothing_says_so(client: Client) -> None:
    with pytest.raises(AppError, match="there is no picture yet"):
        client.predict(None, "refine", 2, None, 0.5, 2, 0, 0, 0, 0, *settings(), api_name="/edit")


def test_only_the_two_buttons_can_be_called(client: Client) -> None:
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/draw", "/edit"}


def test_nothing_passes_by_the_queue(server: str) -> None:
    """One drawing at a time, whoever asks."""
    request = urllib.request.Request(f"{server}gradio_api/run/draw", b'{"data": []}', {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(request)


# -- the command --


def test_a_taken_port_is_told_in_one_line(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--device", "cpu", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"flexvar: the page cannot be served at 127.0.0.1:{port} (not free); give another --host or --port\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--port", "70000"], "--port is 70000; give one from 1 to 65535, or leave it out"),
        (["--port", "0"], "--port is 0; give one from 1"),
        (["--host", "no-such-host.invalid"], "the page cannot be served at no-such-host.invalid ("),
    ],
)
def test_wrong_addresses_are_told_in_one_line(words: list[str], complaint: str, capsys) -> None:
    assert main(["app", "--device", "cpu", *words]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flexvar.app")
    assert main(["app"]) == 2
    assert capsys.readouterr().err == "flexvar: the page needs a package: pip install 'flexvar[app]'\n"


# -- what stands behind it --


def test_warnings_are_shown_on_the_page(pipe: FlexVARPipeline) -> None:
    with overheard() as heard:
        edit = edit_of(pipe, "refine", painted(Image.new("RGB", (32, 32), "red")), max_pixels=256)
    assert "max_pixels" in heard[0]
    *_, (_, facts, _) = draw(pipe, 2, 0, edit=edit, notes=heard, num_inference_steps=3)
    assert facts.endswith(heard[0])
    *_, (_, facts, _) = draw(pipe, 2, 0, height=8, width=8, num_inference_steps=9)
    assert " · " in facts  # so small a picture has fewer steps


def test_paint_of_any_strength_and_layer_counts() -> None:
    faint, other = Image.new("RGBA", (4, 2)), Image.new("RGBA", (4, 2))
    faint.putpixel((1, 0), (0, 0, 0, 1))
    other.putpixel((3, 1), (255, 255, 255, 255))
    assert np.argwhere(np.asarray(mask_of({"layers": [faint, other]}, (4, 2)))).tolist() == [[0, 1], [1, 3]]
    assert mask_of({}, (4, 2)).getbbox() is None


def test_inpainting_needs_paint_or_transparency(pipe: FlexVARPipeline) -> None:
    with pytest.raises(ValueError, match="nothing is painted over"):
        edit_of(pipe, "inpaint", painted(Image.new("RGB", (32, 32), "red")))
    seen_through = Image.new("RGBA", (32, 32), "red")
    seen_through.paste((0, 0, 0, 0), (0, 0, 16, 32))
    white = edit_of(pipe, "inpaint", painted(seen_through)).white
    assert white is not None
    assert 0 < white.mean() < 1


def test_a_picture_of_too_many_pixels_is_refused_at_once(pipe: FlexVARPipeline) -> None:
    with pytest.raises(ValueError, match="8000 x 8000 px are too many; give a picture of at most 32 megapixels"):
        edit_of(pipe, "refine", {"background": Image.new("1", (8000, 8000)), "layers": []})


def test_a_seed_is_the_given_one_or_a_new_one() -> None:
    assert seed_of(7.0, anew=False) == 7
    assert len({seed_of(7, anew=True) for _ in range(5)}) == 5
    for wrong in (None, -1, 2**32):
        with pytest.raises(ValueError, match="give a whole number"):
            seed_of(wrong, anew=False)


def test_the_page_asks_nothing_of_other_machines(pipe: FlexVARPipeline) -> None:
    blocks = page(pipe, "emoji")
    config = blocks.get_config_file()
    assert not blocks.analytics_enabled
    shared = [part["id"] for part in config["components"] if "share" in json.dumps(part["props"].get("buttons") or [])]
    assert shared == []
    assert {side.capitalize() for side in SIDES} <= {part["props"].get("label") for part in config["components"]}
