from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from flexvar import FlexVARPipeline, Guidance, Sampling, Tokenizer, Transformer
from flexvar.checkpoint import Defaults, Model, save
from flexvar.cli import main, parser
from flexvar.data import Shapes


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_tokenizer: Tokenizer, small_transformer: Transformer) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    defaults = Defaults(16, 16, 4, Guidance("ramp", 2.0), Sampling(0, 0.95, greedy="none"))
    save(Model(small_tokenizer, small_transformer, ("pizza", "cat face", "a/b", "d", "e"), defaults), folder)
    return str(folder)


def test_sample(model: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    words = ["sample", "pizza", "cat face", "2", "--model", model, "--height", "8", "--width", "24", "--seed", "7", "--count", "2"]
    assert main([*words, "--batch", "4", "--out", str(out), "--grid", "--strip"]) == 0
    names = [f"{name}-seed{seed}" for name, seed in zip(["pizza"] * 2 + ["cat-face"] * 2 + ["a-b"] * 2, range(7, 13), strict=True)]
    expected = {f"{name}{ending}" for name in names for ending in (".png", "-strip.png")} | {"grid.png"}
    assert {path.name for path in out.iterdir()} == expected
    assert set(capsys.readouterr().out.split()) == {str(out / name) for name in expected}
    picture = Image.open(out / "cat-face-seed9.png")
    assert picture.size == (24, 8)
    assert picture.text["class"] == "cat face"
    assert picture.text["seed"] == "9"
    assert picture.text["schedule"].endswith("2x6")
    assert picture.text["guidance"] == "Guidance(kind='ramp', scale=2.0, split=False, stop=None)"
    assert "top_p=0.95" in picture.text["sampling"]
    same = FlexVARPipeline.from_pretrained(model)("cat face", height=8, width=24, seed=9).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(same))


@pytest.mark.parametrize("grid", [False, True])
def test_drawn_pictures_are_kept_for_the_grid_alone(model: str, tmp_path: Path, monkeypatch, grid: bool) -> None:
    seen = watched(monkeypatch, "flexvar.sheet.to_pil")
    words = ["sample", "pizza", "--model", model, "--count", "6", "--batch", "1", "--out", str(tmp_path)]
    assert main([*words, *(["--grid"] if grid else [])]) == 0
    assert max(seen) == (5 if grid else 1)


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How many of the results of a function are still there, at each of its calls."""
    module, _, function = name.rpartition(".")
    work, there, counts = getattr(pkgutil.resolve_name(module), function), [], []

    def watching(*arguments, **keywords):
        counts.append(sum(result() is not None for result in there))
        result = work(*arguments, **keywords)
        there.extend(weakref.ref(one) for one in (result if isinstance(result, list) else [result]))
        return result

    monkeypatch.setattr(name, watching)
    return counts


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder in which not even root can make one")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "pizza", "--out", "/proc/out"], "the folder /proc/out could not be made ("),
        (["edit", "refine", "photo.png", "--out", "/proc/out"], "the folder /proc/out could not be made ("),
        (["sample", "pizza", "--out", "/proc"], "/proc/pizza-seed0.png could not be written ("),
        (["data", "shapes", "/proc/out"], "the folder /proc/out/circle could not be made ("),
    ],
)
def test_a_folder_that_cannot_be_made_is_told_with_a_mend(
    model: str, photo: str, tmp_path: Path, capsys, monkeypatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, *([] if words[0] == "data" else ["--model", model])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flexvar: {told}")
    assert "choose another" in error
    assert "unfinished" not in error
    assert error.count("\n") == 1


def test_a_file_in_the_place_of_the_folder_is_told_before_the_model_is_moved(model: str, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("flexvar.cli.drawing.move", lambda *_: pytest.fail("it was moved"))
    assert main(["sample", "pizza", "--model", model, "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"flexvar: {tmp_path / 'file'} is a file; name a folder\n"


def test_nothing_is_overwritten_unasked(model: str, tmp_path: Path, capsys) -> None:
    words = ["sample", "pizza", "--model", model, "--out", str(tmp_path)]
    assert main(words) == 0
    before = (tmp_path / "pizza-seed0.png").stat().st_mtime_ns
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "pizza-seed0.png").stat().st_mtime_ns == before
    assert main([*words, "--overwrite"]) == 0


def test_no_class_is_unconditional_and_schedules_are_read(model: str, tmp_path: Path) -> None:
    assert main(["sample", "--model", model, "--schedule", "1x1,2x3", "--greedy", "7,2x3,1", "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "unconditional-seed0.png").size == (12, 8)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["piza"], "did you mean 'pizza'"),
        (["pizza", "--height", "30"], "nearest height is 28 or 32"),
        (["pizza", "--schedule", "4,2"], "shrinks"),
        (["pizza", "--schedule", "four"], "is not a schedule"),
        (["pizza", "--schedule", "1,4", "--steps", "5"], "num_inference_steps is 5"),
        (["pizza", "--steps", "1"], "at least 2"),
        (["pizza", "--device", "abacus"], "no device 'abacus'"),
        (["pizza", "--count", "0"], "--count is 0"),
        (["pizza", "d", "--count", "500001"], "1000002 pictures are asked for; draw at most 1000000 with one command"),
        (["pizza", "--temperature", "0"], "temperature"),
        (["pizza", "--out", "{file}"], "is a file"),
        (["pizza", "--guidance-scale", "1e300"], "the guidance scale is 1e+300"),
        (["pizza", "--schedule", "1,99999"], "not enough memory for a picture of 399996 x 399996 px; "),
        (["pizza", "--schedule", "1,99999999999999999999"], "not enough memory"),
    ],
)
def test_mistakes_get_one_line_and_status_2(model: str, words: list[str], complaint: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    words = [word.format(file=tmp_path / "file") for word in words]
    assert main(["sample", "--model", model, "--out", str(tmp_path / "out"), *words]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--depth", "0"], "at least 1"),
        (["--batch", "0"], "give 1 or more"),
        (["--height", "65"], "nearest height is 64 or 80"),
        (["--steps", "1"], "at least 2"),
        (["--schedule", "1,50000"], "no machine holds"),
        (["--schedule", "10", "--height", "512"], "height is 512, but the schedule ends at 256 px"),
        (["--schedule", "10", "--steps", "9"], "num_inference_steps is 9, but the schedule has 10"),
        (["--schedule", ""], "is not a schedule"),
        (["--model", "/nowhere"], "no model folder"),
        (["--device", "abacus"], "'abacus' is no name of a device"),
        (["--device", "abacus", "--measure"], "no device 'abacus'"),
    ],
)
def test_plans_that_cannot_be_made(words: list[str], complaint: str, capsys) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert complaint in captured.err


def test_a_plan_of_any_depth(capsys) -> None:
    assert main(["plan", "--depth", "1000000"]) == 0
    assert "depth 1000000, width 64000000" in capsys.readouterr().out


def test_a_plan_is_of_what_would_be_drawn(model: str, capsys) -> None:
    for words, first in (
        (["--model", model], "1 x 16 x 16 px"),
        (["--model", model, "--height", "8"], "1 x 8 x 8 px"),
        (["--schedule", "512-12", "--batch", "2"], "2 x 512 x 512 px"),
        ([], "1 x 256 x 256 px"),
    ):
        assert main(["plan", *words]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith(first)


def test_a_plan_of_8_bit_weights_and_of_devices_that_are_not_here(capsys) -> None:
    for words, precision in (
        (["--dtype", "int8"], "float32 with 8-bit weights"),
        (["--dtype", "int8", "--device", "cuda:1"], "bfloat16 with 8-bit weights"),
        (["--device", "cuda"], "bfloat16"),
        (["--device", "cuda", "--dtype", "float32"], "float32"),
        (["--device", "cpu"], "float32"),
    ):
        assert main(["plan", *words]) == 0
        assert capsys.readouterr().out.splitlines()[1] == f"1 x 256 x 256 px, guided, {precision}: 680 tokens in 10 scales"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar.rates.SECONDS_A_RATE", 0.0)
    monkeypatch.setattr("flexvar.processes.keep_memory", lambda: None)  # for the whole process


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_plan_is_measured(model: str, dtype: str, capsys) -> None:
    words = ["plan", "--model", model, "--schedule", "1,2,4", "--batch", "2", "--dtype", dtype]
    assert main(words) == 0
    planned = capsys.readouterr().out
    assert main([*words, "--measure", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(planned + "\nrates of cpu, before: products ")
    shares = [float(line.split()[-1]) for line in said[len(planned) :].splitlines() if line.startswith(("blocks", "decoder", "all  "))]
    assert len(shares) == 3 + 2
    assert all(0 <= share < 100 for share in shares)
    assert said.splitlines()[-1].startswith("median of 3 with random weights, ")


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_not_drawn_and_told_in_one_line(model: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("flexvar.memory.free_memory", lambda device: 2**29)
    monkeypatch.setattr("flexvar.measuring.time_drawing", lambda *_, **__: pytest.fail("it was tried"))
    assert main(["plan", "--model", model, "--measure", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("all, by FLOP alone")
    assert said.err == "flexvar: it was not drawn, which takes 1.0 GiB where 0.5 are free; take smaller pictures or a smaller batch\n"


def test_no_plan_of_a_tokenizer_alone(small_tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    save(Model(small_tokenizer), tmp_path / "tokenizer")
    assert main(["plan", "--model", str(tmp_path / "tokenizer")]) == 2
    assert "holds a tokenizer only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["smaple"], "argument COMMAND: invalid choice: 'smaple'"),
        ([], "the following arguments are required: COMMAND; see flexvar --help"),
        (["sample", "--count", "many"], "argument --count: invalid int value: 'many'; see flexvar sample --help"),
        (["edit", "refine"], "the following arguments are required: PICTURE; see flexvar edit refine --help"),
        (["sample", "--out", ""], "argument --out: it is empty; name a file or folder; see flexvar sample --help"),
        (["plan", "--depth", "16", "--model", "emoji"], "argument --model: not allowed with argument --depth"),
        (["info", "--fast"], "unrecognized arguments: --fast; see flexvar info --help"),
    ],
)
def test_mistyped_words_get_one_line_and_status_2(words: list[str], complaint: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("flexvar: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_lists_may_go_on_behind_options(model: str, tmp_path: Path, capsys) -> None:
    words = ["sample", "pizza", "--model", model, "--seed", "7", "d", "--out", str(tmp_path), "--", "e"]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d-seed8.png", "e-seed9.png", "pizza-seed7.png"]
    assert main(["cache", "nowhere.yaml", "--overwrite", "out=here"]) == 2
    assert "there is no config file nowhere.yaml" in capsys.readouterr().err
    for wrong, told in (
        (["info", model, "a"], "unrecognized arguments: a; see flexvar info"),
        ([*words[:-2], "--n", "b"], "arguments: --n; see"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert told in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_streams_that_are_closed_or_full_or_read_by_nobody(model: str, tmp_path: Path) -> None:
    def run(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "", **environment}
        return subprocess.run(["sh", "-c", words], capture_output=True, text=True, env=environment)

    sample = f"{sys.executable} -m flexvar sample pizza --count 2 --batch 1 --model {model} --overwrite --out {tmp_path}"
    picture = str(tmp_path / "pizza-seed0.png")
    assert run(f"{sample} >&-").returncode == 0
    for told in (run(f"{sample} 2>&-"), run(f"{sample} 2> /dev/full")):
        assert (told.returncode, told.stdout.split()[0]) == (0, picture)
    full = "flexvar: what this command prints could not be written (No space left on device); {}"
    told, at_once = run(f"{sample} > /dev/full"), run(f"{sample} > /dev/full", PYTHONUNBUFFERED="1")
    assert (told.returncode, told.stderr.splitlines()[1:]) == (2, [full.format("all else is done")])
    assert (at_once.returncode, at_once.stderr.splitlines()[1:]) == (2, [full.format("it ended there")])
    told = run(f"({sample}; echo $? > {tmp_path}/status) | true")
    assert (len(told.stderr.splitlines()), (tmp_path / "status").read_text()) == (1, "141\n")
    assert Path(picture).is_file()
    for unbuffered in ("", "1"):
        assert run(f"{sys.executable} -m flexvar --help | true", PYTHONUNBUFFERED=unbuffered).stderr == ""
        assert run(f"{sys.executable} -m flexvar --help > /dev/full", PYTHONUNBUFFERED=unbuffered).stderr == ""


def test_the_version(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"flexvar {version('flexvar')}\n")


def test_a_traceback_on_request(monkeypatch) -> None:
    monkeypatch.setenv("FLEXVAR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="give 1 or more"):
        main(["plan", "--batch", "0"])

    def no_room(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("flexvar.cli.parsing.run_info", no_room)
    with pytest.raises(MemoryError, match="no room"):
        main(["info"])


def test_a_mistyped_folder_is_named_at_once(capsys, monkeypatch) -> None:
    def offline(name: str, **_) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name, told in (("runs/emojis", "runs/emojis"), ("flexvar-d24", "jiaosiyu1999/FlexVAR")):
        assert main(["info", name]) == 2
        error = capsys.readouterr().err
        assert f"{told} is no folder here, not in the Hub's cache and cannot be reached; correct the name" in error
        assert error.count("\n") == 1


def test_models_that_are_not_there(capsys, tmp_path: Path) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err


def test_info(model: str, capsys) -> None:
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "cat face" in out
    assert "tokenizer:" in out


def test_info_of_a_tokenizer_alone(small_tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    save(Model(small_tokenizer), tmp_path / "tokenizer")
    assert main(["info", str(tmp_path / "tokenizer")]) == 0
    assert "transformer: none yet" in capsys.readouterr().out


def test_data_shapes(tmp_path: Path, capsys) -> None:
    words = ["data", "shapes", str(tmp_path / "shapes"), "--count", "2", "--height", "20", "--width", "30"]
    assert main(words) == 0
    assert "20 pictures of 10 classes" in capsys.readouterr().out
    pictures = sorted((tmp_path / "shapes").rglob("*.png"))
    assert len(pictures) == 20
    assert Image.open(pictures[0]).size == (30, 20)
    assert main(words) == 2
    assert "holds a data set; choose another folder, or replace all of it with --overwrite" in capsys.readouterr().err


def test_a_data_set_is_whole_and_holds_nothing_of_the_one_before(tmp_path: Path, capsys, monkeypatch) -> None:
    out, words = tmp_path / "set", ["--height", "8", "--width", "8"]
    assert main(["data", "shapes", str(out), "--count", "2", *words]) == 0
    before = sorted(out.rglob("*"))
    draw = Shapes.draw

    def interrupted(self, index, *rest):
        if index > 4:
            raise KeyboardInterrupt
        return draw(self, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Shapes, "draw", interrupted)
        assert main(["data", "shapes", str(out), "--overwrite", *words]) == 130
        assert main(["data", "shapes", str(tmp_path / "other"), *words]) == 130
    assert sorted(out.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (out / "trapezium").mkdir()
    assert main(["data", "shapes", str(out), "--count", "1", "--overwrite", *words]) == 0
    assert len(list(out.rglob("*.png"))) == 10
    assert not (out / "trapezium").exists()


def test_no_data_set_takes_the_place_of_what_is_dear_to_someone(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine/letter", "file"):
        (tmp_path / name).write_text("dear to someone")
    for name, complaint in (("mine", "holds what `flexvar data` has not made"), ("file", "is a file")):
        assert main(["data", "shapes", str(tmp_path / name), "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"dear to someone"}


@pytest.mark.parametrize("words", [["--count", "0"], ["--height", "-1"], ["--width", "0"], ["--seed", "-1"]])
def test_data_sets_that_cannot_be_made(words: list[str], tmp_path: Path, capsys) -> None:
    assert main(["data", "shapes", str(tmp_path / "set"), *words]) == 2
    assert f"{words[0]} is {words[1]}; it must be at least" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_every_command_has_help_with_an_example() -> None:
    def commands(of, path=()):
        for action in of._actions:
            for name, sub in (getattr(action, "choices", None) or {}).items() if hasattr(action, "_name_parser_map") else ():
                yield from commands(sub, (*path, name))
        if of.get_default("run"):
            yield path, of.format_help()

    found = dict(commands(parser()))
    assert {path[0] for path in found} == {"sample", "edit", "train", "cache", "evaluate", "convert", "data", "info", "plan", "app"}
    for path, text in found.items():
        assert f"example: flexvar {' '.join(path)}" in " ".join(text.split()), path


def test_help_needs_no_torch_and_import_touches_nothing() -> None:
    script = "import sys, flexvar, flexvar.cli; flexvar.cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.slow
def test_as_a_program(model: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "flexvar", "sample", "piza", "--model", model, "--out", str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert "Traceback" not in run.stderr


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((13, 18), np.uint8)
    mask[:, 9:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return str(tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("name", "words", "size"),
    [
        ("refine", ["--strength", "0.7"], (18, 13)),
        ("upscale", ["--factor", "1.5"], (27, 20)),
        ("inpaint", ["--mask", "mask.png", "--feather", "0", "--mask-rule", "any"], (18, 13)),
        ("outpaint", ["--left", "5", "--no-paste"], (23, 13)),
    ],
)
def test_edit(model: str, photo: str, tmp_path: Path, capsys, monkeypatch, name: str, words: list[str], size: tuple[int, int]) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["edit", name, photo, *words, "--class", "pizza", "cat face", "--model", model, "--seed", "4", "--sheet", "--out", "out"]
    assert main(asked) == 0
    expected = [f"photo-{name}-pizza-seed4.png", f"photo-{name}-cat-face-seed5.png", f"photo-{name}-sheet.png"]
    assert [Path(line).name for line in capsys.readouterr().out.split()] == expected
    picture = Image.open(tmp_path / "out" / expected[1])
    assert picture.size == size
    assert (picture.text["edit"], picture.text["of"], picture.text["class"], picture.text["seed"]) == (name, "photo.png", "cat face", "5")
    if name == "inpaint":
        assert np.array_equal(np.asarray(picture)[:, :9], np.asarray(Image.open(photo))[:, :9])
        pipe = FlexVARPipeline.from_pretrained(model)
        same = pipe.inpaint(Image.open(photo), Image.open("mask.png"), "cat face", feather=0, mask_rule="any", seed=5).images[0]
        assert np.array_equal(np.asarray(picture), np.asarray(same))
    assert main(asked) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["refine", "nothing.png"], "there is no picture nothing.png"),
        (["inpaint", "photo.png"], "nothing to draw: the mask is black everywhere and the picture opaque"),
        (["inpaint", "photo.png", "--mask", "no.png"], "there is no picture no.png"),
        (["inpaint", "broken.png", "--mask", "mask.png"], "broken.png is not an image"),
        (["outpaint", "photo.png"], "nothing to draw beyond the picture"),
        (["upscale", "photo.png"], "give a factor, or a height or width"),
        (["refine", "photo.png", "--strength", "2"], "strength is 2.0"),
        (["refine", "photo.png", "--count", "0"], "--count is 0"),
        (["refine", "photo.png", "photo.png", "other/photo.png"], "two pictures have the same name"),
        (["refine", "photo.png", "broken.png"], "broken.png is not an image"),
    ],
)
def test_bad_edits(model: str, photo: str, tmp_path: Path, capsys, monkeypatch, words: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert main(["edit", *words, "--model", model]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_of_several_pictures_one_edit_is_kept_at_a_time(model: str, photo: str, tmp_path: Path, monkeypatch) -> None:
    for i in range(5):
        Image.open(photo).save(tmp_path / f"{i}.png")
    edits, drawn = watched(monkeypatch, "flexvar.pipeline.FlexVARPipeline.edit_of"), watched(monkeypatch, "flexvar.sheet.to_pil")
    words = ["edit", "inpaint", *(str(tmp_path / f"{i}.png") for i in range(5)), "--mask", str(tmp_path / "mask.png"), "--batch", "1"]
    assert main([*words, "--model", model, "--count", "3", "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 15
    assert (max(edits), max(drawn)) == (1, 1)


def test_the_edit_of_one_picture_is_made_once(model: str, photo: str, tmp_path: Path, monkeypatch) -> None:
    edits = watched(monkeypatch, "flexvar.pipeline.FlexVARPipeline.edit_of")
    assert main(["edit", "refine", photo, "--model", model, "--sheet", "--out", str(tmp_path / "out")]) == 0
    assert edits == [0]


@pytest.mark.parametrize("stem", ["a" * 200, "\u732b" * 70], ids=["ascii", "3 bytes a letter"])
def test_long_names_are_edited(model: str, photo: str, tmp_path: Path, stem: str) -> None:
    os.rename(photo, tmp_path / f"{stem}.png")
    assert main(["edit", "refine", str(tmp_path / f"{stem}.png"), "--model", model, "--out", str(tmp_path / "out")]) == 0
    assert os.listdir(tmp_path / "out") == [f"{stem}-refine-unconditional-seed0.png"]


def test_a_name_that_is_no_text_is_edited(model: str, photo: str, tmp_path: Path, capsys) -> None:
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    try:
        os.rename(photo, named)
    except OSError:
        pytest.skip("this disk takes no such names")
    assert main(["edit", "refine", str(named), "--model", model, "--sheet", "--out", str(tmp_path / "out")]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["?-refine-unconditional-seed0.png", "?-refine-sheet.png"]
    assert Image.open(tmp_path / "out" / f"{named.stem}-refine-unconditional-seed0.png").text["of"] == "?.png"
