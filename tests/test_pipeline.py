from __future__ import annotations

import copy
import dataclasses
import errno
import inspect
import pydoc
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HTTPError
from PIL import Image

from flexvar import FlexVARPipeline, Guidance, Sampling, Schedule, Tokenizer, Transformer
from flexvar.checkpoint import Defaults, Model

NAMES = ("pizza", "cat face", "dog face", "Rocket", "12")


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Tokenizer, small_transformer: Transformer) -> FlexVARPipeline:
    defaults = Defaults(16, 16, 4, Guidance("ramp", 2.0), Sampling(0, 0.95, greedy="none"))
    return FlexVARPipeline(Model(small_tokenizer, small_transformer, NAMES, defaults))


def test_call(pipe: FlexVARPipeline) -> None:
    out = pipe(class_labels=["pizza", 3], height=8, width=24, num_inference_steps=3, guidance_scale=2.5, seed=7, output_type="pil")
    assert [picture.size for picture in out.images] == [(24, 8), (24, 8)]
    assert out.labels == [0, 3]
    assert out.seeds == [7, 8]


def test_a_picture_is_the_same_alone_and_in_any_batch(pipe: FlexVARPipeline) -> None:
    many = pipe(["pizza", "Rocket", None, 1, 2], seed=10, output_type="pt").images
    chunks = pipe(["pizza", "Rocket", None, 1, 2], seed=10, output_type="pt", batch_size=2).images
    assert torch.allclose(many, chunks, atol=1e-5)
    alone = pipe(1, seed=13, output_type="pt").images
    assert torch.allclose(alone[0], many[3], atol=1e-5)


def test_output_types(pipe: FlexVARPipeline) -> None:
    tensor = pipe(0, seed=1, output_type="pt").images
    array = pipe(0, seed=1, output_type="np").images
    (picture,) = pipe(0, seed=1).images
    assert tensor.shape == (1, 3, 16, 16)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(picture), (array[0] * 255).round().astype(np.uint8))
    with pytest.raises(ValueError, match="'pil', 'np' or 'pt'"):
        pipe(0, output_type="jpg")


def test_stream_draws_what_the_call_draws(pipe: FlexVARPipeline) -> None:
    steps = list(pipe.stream("pizza", seed=3))
    assert [step.size for step in steps] == list(Schedule.for_grid(4, 4, 4, 4))
    images = pipe("pizza", seed=3, output_type="pt").images
    assert torch.allclose((steps[-1].images.clamp(-1, 1) + 1) / 2, images)


def test_no_seed_draws_one_and_tells_it(pipe: FlexVARPipeline) -> None:
    first, second = pipe(0), pipe(0)
    assert first.seeds != second.seeds
    assert np.array_equal(np.asarray(pipe(0, seed=first.seeds).images[0]), np.asarray(first.images[0]))


@pytest.mark.parametrize(
    ("label", "index"),
    [("pizza", 0), ("PIZZA", 0), ("rocket", 3), ("12", 4), ("2", 2), (4, 4), (None, 5), ("unconditional", 5), ("Unconditional", 5)],
)
def test_labels(pipe: FlexVARPipeline, label, index: int) -> None:
    assert pipe.labels_of(label) == [index]


def test_other_names_of_classes(pipe: FlexVARPipeline) -> None:
    model = dataclasses.replace(pipe.model, aliases={"Margherita": "pizza", "rocket": "pizza"})
    called = FlexVARPipeline(model)
    assert called.labels_of(["margherita", "pizza", "rocket"]) == [0, 0, 3]  # a class's own name comes first
    with pytest.raises(ValueError, match=r"no class 'margerita'; did you mean 'pizza'\?$"):
        called("margerita")


def test_a_class_that_is_called_like_another_ones_index_is_said(pipe: FlexVARPipeline) -> None:
    """Folders 0, 1, 10, 2 are numbered in the order of their names."""
    numbered = FlexVARPipeline(dataclasses.replace(pipe.model, class_names=("0", "1", "10", "2", "3")))
    with pytest.warns(UserWarning, match="the index 2 is the class '10'; the class named '2' is given as a text"):
        assert numbered.labels_of(2) == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbered.labels_of(["2", 1]) == [3, 1]


def test_keywords_of_other_libraries(pipe: FlexVARPipeline) -> None:
    with pytest.raises(TypeError, match=r"takes no keyword 'generator'; did you mean 'seed'\?$"):
        pipe("pizza", generator=torch.Generator())  # type: ignore[call-arg]


def test_far_beyond_the_trained_size_is_said(pipe: FlexVARPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("pizza", height=32, width=32, num_inference_steps=4)
    with pytest.warns(UserWarning, match="16 x 36 px is more than twice the 16 px of this model's training; expect waves") as caught:
        pipe("pizza", height=16, width=36, num_inference_steps=4)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("piza", "did you mean 'pizza'"),
        ("slice of pizza", "did you mean 'pizza'"),
        ("face", "'cat face'"),
        ("xyzzy", "flexvar info"),
        (6, "0 to 4"),
        (-1, "0 to 4"),
        ("-1", "no class"),
        (b"\x00\x01", "the class labels are given as bytes; give a name, an index or None, or a list of these"),
        (bytearray(b"\x02"), "given as bytearray; give"),
        ({0: "pizza", 1: "cat face"}, "the class labels are given as dict; give a name, an index or None, or a list of these"),
    ],
)
def test_unknown_labels(pipe: FlexVARPipeline, label, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(label)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 18}, "height 18 is not a multiple of 4 px; the nearest height is 16 or 20"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 pictures"),
        ({"schedule": [1, 4, 2]}, "shrinks from 4x4 to 2x2"),
        ({"schedule": []}, "at least one scale"),
        ({"schedule": [1, 4], "height": 20}, "height is 20, but the schedule ends at 16 px"),
        ({"schedule": [1, 4], "num_inference_steps": 3}, "num_inference_steps is 3, but the schedule has 2"),
        ({"num_inference_steps": 1}, "at least 2"),
        ({"top_p": 2.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"guidance": "linear"}, "kind"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"temperature": float("nan")}, "temperature"),
        ({"height": 0, "width": 16}, "height 0 is not a multiple"),
        ({"height": 16.5}, "a side is 16.5; give an integer"),
        ({"seed": 1.5}, "give an integer|not iterable"),
        ({"seed": 2**64}, "a seed is 18446744073709551616; give integers from 0 to 4294967295"),
        ({"seed": -1}, "a seed is -1; give integers from 0 to 4294967295"),
        ({"seed": 2**32}, "a seed is 4294967296; give integers from 0"),
        ({"seed": [1.0]}, "a seed is 1.0; give an integer"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5; give an integer"),
        ({"guidance_scale": "2"}, "the guidance scale is '2'"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"greedy": 3}, "greedy is 3"),
        ({"schedule": [(1.9, 1.9)]}, "is not a list of scales"),
    ],
)
def test_bad_settings(pipe: FlexVARPipeline, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(0, **settings)


@pytest.mark.parametrize("method", ["__call__", "stream", "refine"])
def test_a_mistyped_keyword_is_told_with_the_closest_one(pipe: FlexVARPipeline, method: str) -> None:
    called = "pipe" if method == "__call__" else method
    with pytest.raises(TypeError, match=rf"^{called}\(\) takes no keyword 'heigth'; did you mean 'height'\?$"):
        getattr(pipe, method)(Image.new("RGB", (16, 16)), heigth=16)
    with pytest.raises(TypeError, match=rf"^{called}\(\) takes no keyword 'guidance_scal'; did you mean 'guidance_scale'\?$"):
        getattr(pipe, method)(0, guidance_scal=2.0)


def test_seeds_that_count_up_past_the_last_one(pipe: FlexVARPipeline) -> None:
    with pytest.raises(ValueError, match="2 pictures from seed 4294967295 on count up past 4294967295; give at most 4294967294"):
        pipe([0, 1], seed=2**32 - 1)


def test_networks_are_moved_to_floats_alone(pipe: FlexVARPipeline) -> None:
    for dtype in (torch.complex64, torch.int8):
        with pytest.raises(ValueError, match=r"give one for floats, for example torch\.bfloat16"):
            pipe.to(dtype)


def test_help_shows_every_keyword(pipe: FlexVARPipeline) -> None:
    settings = ["num_inference_steps", "guidance_scale", "top_k", "temperature", "seed"]
    for method, own in (("__call__", ["batch_size", "height"]), ("stream", ["edit"]), ("outpaint", ["anchor", "batch_size"])):
        assert {*settings, *own} <= set(inspect.signature(getattr(pipe, method)).parameters)
        assert "temperature" in pydoc.render_doc(getattr(FlexVARPipeline, method))


def test_warnings_come_once_and_point_at_the_line_that_asked(pipe: FlexVARPipeline) -> None:
    for draw in (pipe, pipe.stream):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw([0, 1, 2], num_inference_steps=9, seed=0, **({"batch_size": 1} if draw is pipe else {}))
        (warning,) = caught
        assert warning.filename == __file__


def test_one_side_keeps_the_proportions_of_the_models_size(pipe: FlexVARPipeline) -> None:
    wide = FlexVARPipeline(dataclasses.replace(pipe.model, defaults=dataclasses.replace(pipe.defaults, height=8, width=16)))
    assert wide(0, height=16, seed=0).images[0].size == (32, 16)
    assert wide(0, width=8, seed=0).images[0].size == (8, 4)
    assert wide(0, height=20, seed=0).images[0].size == (40, 20)


def test_one_side_means_a_square_and_the_default_is_silent(pipe: FlexVARPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe(0, height=20, seed=0).images[0].size == (20, 20)
        assert pipe(0, width=8, seed=0).images[0].size == (8, 8)
    with pytest.warns(UserWarning, match="in 4 steps instead of 9"):
        pipe(0, num_inference_steps=9, seed=0)


def test_settings_matter(pipe: FlexVARPipeline) -> None:
    def drawn(**settings) -> list[int]:
        return list(pipe.stream(0, seed=5, **settings))[-1].codes.flatten().tolist()

    plain = drawn()
    for settings in (
        {"guidance_scale": 8.0},
        {"guidance": "constant"},
        {"top_k": 1},
        {"temperature": 3.0},
        {"greedy": (4, 3)},
        {"top_p": 0.1},
    ):
        assert drawn(**settings) != plain, settings


def test_folders(pipe: FlexVARPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    again = FlexVARPipeline.from_pretrained(tmp_path / "model")
    assert np.array_equal(np.asarray(again("pizza", seed=1).images[0]), np.asarray(pipe("pizza", seed=1).images[0]))
    with torch.inference_mode():
        inside = FlexVARPipeline.from_pretrained(tmp_path / "model")
    assert np.array_equal(np.asarray(inside.to(torch.float32)("pizza", seed=1).images[0]), np.asarray(pipe("pizza", seed=1).images[0]))
    inside.to(torch.bfloat16)("pizza", seed=1)
    with pytest.raises(FileExistsError):
        pipe.save_pretrained(tmp_path / "model")


def test_hub(pipe: FlexVARPipeline, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    pipe.save_pretrained(tmp_path / "hub")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "hub"))
    assert FlexVARPipeline.from_pretrained("someone/model").class_names == NAMES
    assert asked == ["someone/model"]

    def offline(name: str, **_) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConnectionError, match=r"not in the Hub's cache and cannot be reached; .* or one of emoji"):
        FlexVARPipeline.from_pretrained("someone/model")

    uploaded = {}
    monkeypatch.setattr("huggingface_hub.create_repo", lambda name, **_: None)

    def upload(repo_id: str, folder_path: str) -> None:
        uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.upload_folder", upload)
    pipe.push_to_hub("me/mine")
    assert uploaded == {"me/mine": ["config.json", "tokenizer.safetensors", "transformer.safetensors"]}
    monkeypatch.setattr("huggingface_hub.upload_folder", mock.Mock(side_effect=HTTPError("401 Unauthorized\nRequest ID: 1")))
    with pytest.raises(ConnectionError, match=r"^me/mine could not be uploaded \(401 Unauthorized\); go online, and log in"):
        pipe.push_to_hub("me/mine")
    monkeypatch.setattr("huggingface_hub.upload_folder", mock.Mock(side_effect=OSError("no route")))
    with pytest.raises(ConnectionError, match=r"could not be uploaded \(no route"):
        pipe.push_to_hub("me/mine")
    made = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda name, **_: made.append(name))
    monkeypatch.setattr(pipe, "save_pretrained", mock.Mock(side_effect=ValueError("cannot be saved")))
    with pytest.raises(ValueError, match="cannot be saved"):
        pipe.push_to_hub("me/mine")
    assert not made


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "hub"), OSError, r"kept \(\[Errno 28\] No space left.* another in HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "hub"), OSError, r"kept \(\[Errno 13\] Permission denied: 'hub'\)"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ConnectionError, "Connection reset by peer.*go online"),
        (TimeoutError(), ConnectionError, r"fetched \(TimeoutError\); go online"),
        (HTTPError("503 Server Error\nRequest ID: 1"), ConnectionError, r"fetched \(503 Server Error\); go online"),
    ],
)
def test_a_full_disk_is_not_called_offline(error: Exception, kind: type[Exception], words: str, monkeypatch) -> None:
    def fail(name: str, **_) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=words) as caught:
        FlexVARPipeline.from_pretrained("someone/model")
    assert isinstance(caught.value, ConnectionError) is (kind is ConnectionError)
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(ValueError, match="not a bundled or released name"):
        FlexVARPipeline.from_pretrained("no such name!")
    with pytest.raises(ValueError, match="a model is None; give its name or folder"):
        FlexVARPipeline.from_pretrained(None)  # type: ignore[arg-type]
    for nowhere in ("./nowhere", Path("nowhere")):
        with pytest.raises(FileNotFoundError, match="no model folder"):
            FlexVARPipeline.from_pretrained(nowhere)


def test_reconstruct(pipe: FlexVARPipeline) -> None:
    picture = Image.new("RGB", (37, 21), "red")
    assert pipe.reconstruct(picture).images[0].size == (36, 20)
    assert pipe.reconstruct(picture, height=8, width=16).images[0].size == (16, 8)
    assert pipe.reconstruct(Image.new("L", (3, 2)), output_type="pt").images.shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="multiple of 4"):
        pipe.reconstruct(picture, height=9)
    with pytest.raises(ValueError, match="a side is '8'; give an integer"):
        pipe.reconstruct(picture, height="8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the image has 5 x 0 pixels"):
        pipe.reconstruct(Image.new("RGB", (0, 5)))
    assert pipe.reconstruct(picture, height=12).images[0].size == (20, 12)  # the width follows the picture


def test_reconstruct_takes_every_form_of_a_picture(pipe: FlexVARPipeline, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (21, 37, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "given.png")
    expected = pipe.reconstruct(Image.fromarray(array), output_type="pt").images
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (array, tensor, tensor[None] / 255, tmp_path / "given.png", [array]):
        assert torch.equal(pipe.reconstruct(form, output_type="pt").images, expected)
    both = pipe.reconstruct([array, array[:, ::-1].copy()], output_type="pt").images
    assert torch.allclose(both[0], expected[0], atol=1e-5)
    assert both.shape == (2, 3, 20, 36)


def test_a_tokenizer_alone_is_no_pipeline(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no transformer yet"):
        FlexVARPipeline(Model(small_tokenizer))


def test_numbers_of_numpy_and_torch_are_numbers(pipe: FlexVARPipeline) -> None:
    plain = pipe([1, 2], seed=[3, 4], schedule=[1, 4], output_type="pt").images
    for labels, seeds, schedule in (
        (np.array([1, 2]), np.array([3, 4]), np.array([1, 4])),
        (torch.tensor([1, 2]), torch.tensor([3, 4]), [np.int64(1), (4, np.int32(4))]),
        ([np.int64(1), torch.tensor(2)], np.int64(3), "1,4"),
    ):
        assert torch.equal(pipe(labels, seed=seeds, schedule=schedule, output_type="pt").images, plain)
    assert pipe(np.int64(1), seed=3, schedule=[1, 4], output_type="pt").images.shape[0] == 1
    assert Sampling(greedy=[np.int64(2), (3, 4)]).greedy == ((2, 2), (3, 4))  # type: ignore[arg-type]


def test_a_turned_photograph_is_reconstructed_upright(pipe: FlexVARPipeline, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert pipe.reconstruct(Image.open(tmp_path / "turned.jpg")).images[0].size == (24, 40)
    assert pipe.reconstruct(tmp_path / "turned.jpg").images[0].size == (24, 40)
    with pytest.raises(FileNotFoundError, match=r"there is no picture turned\.jpg: check the path"):
        pipe.reconstruct("turned.jpg")


def test_to_takes_a_dtype_alone(small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    model = Model(copy.deepcopy(small_tokenizer), copy.deepcopy(small_transformer), NAMES)
    half = FlexVARPipeline(model).to("cpu", torch.bfloat16).to(torch.bfloat16)
    assert half.transformer.head.weight.dtype == torch.bfloat16
    assert (half.device, half.dtype) == (torch.device("cpu"), torch.bfloat16)
    whole = half.to(device="cpu", dtype=torch.float32)
    assert (whole.dtype, whole.tokenizer.after_codes.weight.dtype, whole.precision) == (torch.float32, torch.float32, "float32")
    assert whole.to(torch.float64, device="cpu").dtype == torch.float64


def test_classes_without_names_are_called_by_their_number(pipe: FlexVARPipeline) -> None:
    nameless = FlexVARPipeline(dataclasses.replace(pipe.model, class_names=()))
    assert (nameless.class_name(3), nameless.class_name(5)) == ("class 3", "unconditional")
    assert nameless.labels_of(["Class 3", "3", 3]) == [3, 3, 3]
    with pytest.raises(ValueError, match="there is no class 'class 3'; "):
        pipe.labels_of("class 3")
