from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexvar import FlexVARPipeline, Guidance, Sampling, Schedule, Tokenizer, Transformer, editing
from flexvar.checkpoint import Defaults, Model
from flexvar.data.given import mask_of, over_white, pictures_of

SIDE = 16
NAMES = ("pizza", "cat face", "dog face", "Rocket", "12")


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Tokenizer, small_transformer: Transformer) -> FlexVARPipeline:
    defaults = Defaults(SIDE, SIDE, 4, Guidance("ramp", 2.0), Sampling(0, 0.95, greedy="none"))
    return FlexVARPipeline(Model(small_tokenizer, small_transformer, NAMES, defaults))


def picture(seed: int = 0, height: int = SIDE, width: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return mask


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


EDITS = {
    "refine": ({"strength": 0.5}, (SIDE, SIDE)),
    "upscale": ({"factor": 1.5}, (24, 24)),
    "inpaint": ({"mask": half()}, (SIDE, SIDE)),
    "outpaint": ({"left": 3, "bottom": 8}, (24, 19)),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_gives_its_size_and_the_same_again(pipe: FlexVARPipeline, name: str) -> None:
    words, (height, width) = EDITS[name]
    first, second, other = (getattr(pipe, name)(picture(), class_labels="pizza", seed=seed, **words).images[0] for seed in (3, 3, 4))
    assert first.size == (width, height)
    assert np.array_equal(pixels(first), pixels(second))
    assert not np.array_equal(pixels(first), pixels(other))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_same_alone_and_in_any_batch(pipe: FlexVARPipeline, name: str) -> None:
    words, _ = EDITS[name]
    pictures, labels = [picture(i) for i in range(3)], ["pizza", 3, None]
    many = getattr(pipe, name)(pictures, class_labels=labels, seed=5, output_type="pt", **words).images
    parts = getattr(pipe, name)(pictures, class_labels=labels, seed=5, output_type="pt", batch_size=2, **words).images
    alone = getattr(pipe, name)(pictures[1], class_labels=3, seed=6, output_type="pt", **words).images
    assert torch.allclose(many, parts, atol=1e-5)
    assert torch.allclose(many[1], alone[0], atol=1e-5)


def test_one_picture_with_several_classes_and_one_class_for_several_pictures(pipe: FlexVARPipeline) -> None:
    assert len(pipe.refine(picture(), 0.5, ["pizza", "Rocket", None], seed=1).images) == 3
    assert pipe.refine([picture(), picture(1)], 0.5, "Rocket", seed=1).labels == [3, 3]
    with pytest.raises(ValueError, match="3 class labels were given for 2 pictures"):
        pipe.refine([picture(), picture(1)], 0.5, [0, 1, 2])


@pytest.mark.parametrize("rule", ["any", "majority", "all"])
def test_kept_codes_are_kept_at_every_scale(pipe: FlexVARPipeline, rule: str) -> None:
    edit = pipe.edit_of("inpaint", picture(), mask=half(), mask_rule=rule)
    steps = list(pipe.stream("pizza", edit=edit, seed=2))
    schedule = Schedule(tuple(step.size for step in steps))
    with torch.no_grad():
        own = pipe.tokenizer.codes(pipe.tokenizer.features(edit.canvas), schedule)
    for step, codes in zip(steps, own, strict=True):
        last = step.index == len(steps) - 1
        kept = ~editing.drawn_cells(edit.white, step.size, "any" if last else rule)
        assert torch.equal(step.codes[kept], codes[kept])
    assert (steps[-1].codes != own[-1])[..., 2:].any()


def test_strength_is_the_share_drawn_anew(pipe: FlexVARPipeline) -> None:
    canvas = over_white(pictures_of(picture()))
    with torch.no_grad():
        own = pipe.tokenizer.codes(pipe.tokenizer.features(canvas), [1, 2, 3, 4])
    for strength, kept in ((0, 4), (0.25, 3), (0.5, 2), (1, 0)):
        steps = list(pipe.stream(1, edit=pipe.edit_of("refine", picture(), strength=strength), schedule=[1, 2, 3, 4], seed=0))
        equal = [torch.equal(step.codes, codes) for step, codes in zip(steps, own, strict=True)]
        assert all(equal[:kept])
        assert kept == 4 or not equal[-1]
    nothing_kept = pipe.refine(picture(), 1.0, 1, seed=7).images[0]
    assert np.array_equal(pixels(nothing_kept), pixels(pipe(1, seed=7).images[0]))


def test_refine_at_another_aspect_ratio(pipe: FlexVARPipeline) -> None:
    assert pipe.refine(picture(), 0.6, 0, height=8, width=24, seed=0).images[0].size == (24, 8)


def test_what_pads_a_picture_does_not_come_into_the_result(pipe: FlexVARPipeline) -> None:
    """A drawing that is the canvas itself, stretched: the result is the picture, stretched."""
    ramp = torch.linspace(0, 1, 9)[None, None, None].expand(1, 3, 10, 9)  # its last column pads it to 12
    for name, words in (("refine", {"height": 32, "width": 48}), ("upscale", {"height": 32, "width": 48})):
        edit = pipe.edit_of(name, ramp, max_pixels=64**2, **words)
        height, width = (side * pipe.tokenizer.config.downsample for side in edit.grid)
        drawing = torch.nn.functional.interpolate(edit.canvas, (height, width), mode="bilinear")
        made = (edit.finish(drawing) + 1) / 2
        expected = torch.nn.functional.interpolate(ramp, (32, 48), mode="bilinear")
        assert (made - expected).abs().max() < 0.05, name


def test_upscale_keeps_the_native_scales_and_grows_beyond(pipe: FlexVARPipeline) -> None:
    edit = pipe.edit_of("upscale", picture(), factor=2)
    steps = list(pipe.stream(0, edit=edit, seed=0, num_inference_steps=6))
    sizes = [step.size for step in steps]
    assert sizes == list(Schedule.for_grid(4, 4, 4, 4).grown(8, 8))
    with torch.no_grad():
        own = pipe.tokenizer.codes(pipe.tokenizer.features(edit.canvas), sizes[: sizes.index((4, 4)) + 1])
    assert all(torch.equal(step.codes, codes) for step, codes in zip(steps, own, strict=False))
    with pytest.warns(UserWarning, match="px") as caught:
        assert pipe.upscale(picture(height=8, width=12), 4, 0, seed=0).images[0].size == (48, 32)
    assert {warning.filename for warning in caught} == {__file__}
    small, waves = (str(warning.message) for warning in caught)
    assert small.startswith("32 x 48 px are more than max_pixels=1024: drawn at 28 x 40 px and enlarged, which is softer")
    assert waves.startswith("28 x 40 px is more than twice the 16 px of this model's training")
    with pytest.warns(UserWarning, match="6 scales are drawn instead of 2: beyond the picture's own each is at most about 1.5 times"):
        pipe.settings.schedule_of(edit=pipe.edit_of("upscale", picture(height=8, width=8), factor=4), num_inference_steps=2)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 19), (7, 30), (1, 1), (5, 2)])
def test_black_pixels_come_back_to_the_bit_at_any_size(pipe: FlexVARPipeline, height: int, width: int) -> None:
    given, mask = picture(1, height, width), np.random.default_rng(2).choice([0, 0, 90, 255], (height, width)).astype(np.uint8)
    mask[-1, -1] = 255
    result = pipe.inpaint(given, mask, 0, seed=0).images[0]
    assert result.size == given.size
    assert np.array_equal(pixels(result)[mask == 0], pixels(given)[mask == 0])


def test_black_pixels_come_back_above_max_pixels(pipe: FlexVARPipeline) -> None:
    given, mask = picture(1, 61, 90), half(61, 90)
    result = pipe.inpaint(given, mask, 0, seed=0, max_pixels=200).images[0]
    assert np.array_equal(pixels(result)[mask == 0], pixels(given)[mask == 0])
    assert pipe.refine(given, 0.5, 0, seed=0, max_pixels=200).images[0].size == given.size


@pytest.mark.parametrize(
    ("name", "words"),
    [("upscale", {"factor": 3}), ("upscale", {"height": 39}), ("refine", {"height": 40, "width": 36}), ("outpaint", {"left": 9})],
)
@pytest.mark.parametrize("max_pixels", [1, 50, 300, 10**6])
def test_no_edit_draws_more_than_max_pixels(
    pipe: FlexVARPipeline, name: str, words: dict, max_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = picture(1, 13, 13)
    monkeypatch.setattr("flexvar.pipeline.warn", lambda message: None)
    edit = pipe.edit_of(name, given, max_pixels=max_pixels, **words)
    h, w = edit.grid
    assert 16 * max(1, h - 1) * max(1, w - 1) <= max(max_pixels, 16)  # sides are rounded up to codes
    free = pipe.edit_of(name, given, max_pixels=10**6, **words)
    assert edit.size == free.size
    result = pipe(0, edit=edit, seed=0, output_type="pt").images
    assert result.shape[-2:] == free.size


def test_upscale_draws_as_much_as_it_may_and_enlarges_the_rest(pipe: FlexVARPipeline) -> None:
    edit = pipe.edit_of("upscale", picture(), factor=4, max_pixels=24**2)
    assert (edit.native, edit.grid, edit.size) == ((4, 4), (6, 6), (64, 64))
    assert pipe.upscale(picture(), 4, 0, seed=0, max_pixels=24**2).images[0].size == (64, 64)


@pytest.mark.parametrize("words", [{"left": 5}, {"right": 4, "top": 3}, {"height": 21, "width": 40, "anchor": "bottom-left"}])
def test_outpaint_keeps_the_picture_in_its_place(pipe: FlexVARPipeline, words: dict) -> None:
    given = picture(3, 13, 18)
    result = pipe.outpaint(given, 0, seed=0, **words).images[0]
    if "anchor" in words:
        assert result.size == (40, 21)
        left, top = 0, 8
    else:
        left, top = words.get("left", 0), words.get("top", 0)
    assert np.array_equal(pixels(result)[top : top + 13, left : left + 18], pixels(given))


@pytest.mark.parametrize("feather", [0, 3, None])
def test_what_lies_under_white_does_not_matter(pipe: FlexVARPipeline, feather: int | None) -> None:
    mask = half()
    one, other = pixels(picture(1)), pixels(picture(2))
    other[mask == 0] = one[mask == 0]
    results = [pipe.inpaint(p.astype(np.uint8), mask, 0, feather=feather, seed=0).images[0] for p in (one, other)]
    assert np.array_equal(pixels(results[0]), pixels(results[1]))


def test_grey_is_the_weight_of_the_drawing(pipe: FlexVARPipeline) -> None:
    given, mask = pictures_of(picture()), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 8:], mask[..., 6:8] = 1, 0.25
    pasted = pipe.inpaint(given, mask, 0, seed=0, feather=0, output_type="pt").images
    drawn = pipe.inpaint(given, mask, 0, seed=0, paste=False, output_type="pt").images
    assert torch.allclose(pasted[..., 6:8], 0.75 * given[:, :3, :, 6:8] + 0.25 * drawn[..., 6:8], atol=1e-5)
    assert torch.allclose(pasted[..., 8:], drawn[..., 8:], atol=1e-6)


def test_transparency_is_the_mask(pipe: FlexVARPipeline) -> None:
    given = picture()
    see_through = given.copy()
    see_through.putalpha(Image.fromarray(255 - half()))
    by_alpha, by_mask = pipe.inpaint(see_through, class_labels=0, seed=0), pipe.inpaint(given, half(), 0, seed=0)
    assert np.array_equal(pixels(by_alpha.images[0]), pixels(by_mask.images[0]))
    both = pipe.inpaint(see_through, np.ascontiguousarray(half().T), 0, seed=0).images[0]
    kept = (half() == 0) & (half().T == 0)
    assert np.array_equal(pixels(both)[kept], pixels(given)[kept])


def test_a_full_mask_draws_as_without_a_picture(pipe: FlexVARPipeline) -> None:
    white = np.full((SIDE, SIDE), 255, np.uint8)
    result = pipe.inpaint(picture(), white, 2, seed=9, output_type="pt").images
    assert torch.allclose(result, pipe(2, seed=9, output_type="pt").images, atol=1e-6)


def test_a_mask_of_another_size_is_resized(pipe: FlexVARPipeline) -> None:
    result = pipe.inpaint(picture(), half(32, 64), 0, seed=0).images[0]
    assert np.array_equal(pixels(result)[:, :7], pixels(picture())[:, :7])


def test_edits_combine(pipe: FlexVARPipeline) -> None:
    wider = pipe.outpaint(picture(), 0, right=8, seed=0).images[0]
    mask = np.zeros((SIDE, 24), np.uint8)
    mask[:, 12:20] = 255
    again = pipe.inpaint(wider, mask, 0, seed=1).images[0]
    assert pipe.refine(again, 0.3, 0, seed=2).images[0].size == (24, 16)


def test_stream_ends_with_the_finished_picture(pipe: FlexVARPipeline) -> None:
    *_, last = pipe.stream("pizza", edit=pipe.edit_of("inpaint", picture(), mask=half()), seed=3)
    out = pipe.inpaint(picture(), half(), "pizza", seed=3, output_type="pt").images
    assert torch.equal((last.images + 1) / 2, out)


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("inpaint", {"mask": np.zeros((SIDE, SIDE), np.uint8)}, "nothing to draw: the mask is black everywhere"),
        ("inpaint", {}, "nothing to draw"),
        ("inpaint", {"mask": half(), "mask_rule": "some"}, "mask_rule is 'some'; there are any, majority, all"),
        ("inpaint", {"mask": half(), "feather": -1}, "feather is -1"),
        ("inpaint", {"mask": [half(), half()]}, "2 masks were given for 1 pictures"),
        ("inpaint", {"mask": half().astype(bool).astype(np.uint8)}, "the mask holds nothing above 1 of 255; give bool values, or 255"),
        ("inpaint", {"mask": half(), "paste": "no"}, "paste is 'no'; give True or False"),
        ("inpaint", {"mask": half(), "split_guidance": "no"}, "split_guidance is 'no'; give True or False"),
        ("inpaint", {"mask": half(), "height": 32}, "inpaint\\(\\) takes no keyword 'height'"),
        ("inpaint", {"mask": half(), "fether": 3}, "inpaint\\(\\) takes no keyword 'fether'; did you mean 'feather'\\?"),
        ("inpaint", {"mask": half(), "max_pixels": 2.5}, "max_pixels is 2.5; give an integer"),
        ("upscale", {"factor": 2, "max_pixels": 0}, "max_pixels is 0"),
        ("outpaint", {"left": 2.5}, "left is 2.5; give an integer"),
        ("outpaint", {}, "nothing to draw beyond the picture"),
        ("outpaint", {"left": -4}, "would become smaller"),
        ("outpaint", {"left": 4, "height": 32}, "and not both"),
        ("outpaint", {"height": 32, "anchor": "middle"}, "anchor is 'middle'"),
        ("outpaint", {"left": 8, "anchor": "right"}, "anchor is 'right', which places a picture in a height and width; give these"),
        ("upscale", {}, "give a factor"),
        ("upscale", {"factor": 0.5}, "would become smaller"),
        ("upscale", {"factor": float("nan")}, "factor is nan; give a number of at least 1"),
        ("upscale", {"factor": 10**400}, r"factor is 1000.*\.\.\.; give a number"),
        ("upscale", {"factor": 1e300}, "px; stay within 65536 px a side"),
        ("upscale", {"factor": True}, "factor is True; give a number"),
        ("outpaint", {"left": 10**12}, "the result would have 16 x 1000000000016 px; stay within 65536 px a side"),
        ("upscale", {"factor": 2, "height": 32}, "and not both"),
        ("refine", {"strength": 1.5}, "strength is 1.5"),
        ("refine", {"strength": "b"}, "strength is 'b'; give a number from 0 .*; a class is given as class_labels"),
        ("upscale", {"factor": "b"}, "factor is 'b'; give a number"),
        ("outpaint", {"left": 8, "feather": 1.5}, "feather is 1.5; give an integer"),
        ("refine", {"height": 18}, "height 18 is not a multiple of 4 px; the nearest height is 16 or 20"),
        ("refine", {"schedule": [1, 2]}, "the edit draws 4x4 codes, but the schedule ends at 2x2; end it at 4x4"),
        ("refine", {"num_inference_steps": 1}, "at least 2"),
        ("refine", {"max_pixels": 0}, "max_pixels is 0"),
        ("refine", {"quickly": 1}, "refine\\(\\) takes no keyword 'quickly'; there are image, strength, class_labels, num_inference_steps"),
        ("refine", {"height": 16, "width": 18}, "width 18 is not a multiple of 4 px"),
    ],
)
def test_bad_words(pipe: FlexVARPipeline, name: str, words: dict, complaint: str) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint):
        getattr(pipe, name)(picture(), **words)


def test_which_of_several_pictures_has_nothing_to_draw(pipe: FlexVARPipeline) -> None:
    masks = [half(), np.zeros((SIDE, SIDE), np.uint8)]
    with pytest.raises(ValueError, match="there is nothing to draw in picture 1, counted from 0: the mask is black everywhere"):
        pipe.inpaint([picture(), picture(1)], masks)


def test_results_that_do_not_fit_are_refused_before_anything_is_drawn(pipe: FlexVARPipeline, monkeypatch) -> None:
    monkeypatch.setattr("flexvar.memory.free_memory", lambda device: 10 * 2**20)
    with pytest.raises(MemoryError, match="not enough memory for a result of 1600 x 1600 px; make it smaller, or free some"):
        pipe.edit_of("upscale", picture(), factor=100)


def test_results_are_finished_one_by_one(pipe: FlexVARPipeline) -> None:
    """So many at once would take several times their own memory; the result is the same."""
    edit = pipe.edit_of("inpaint", [picture(), picture(1)], mask=half(), feather=3)
    drawing = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    alone = [edit.part(slice(i, i + 1)).finish(drawing[i : i + 1]) for i in range(2)]
    assert torch.equal(edit.finish(drawing), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_edits_do_not_depend_on_the_default_dtype(dtype: torch.dtype, pipe: FlexVARPipeline) -> None:
    transparent = picture()
    transparent.putalpha(Image.fromarray(half()))

    def edited() -> list[np.ndarray]:
        calls = [*((name, picture(), words) for name, (words, _) in EDITS.items()), ("inpaint", transparent, {})]
        return [getattr(pipe, name)(given, seed=1, output_type="np", **words).images for name, given, words in calls]

    expected = edited()
    torch.set_default_dtype(dtype)
    try:
        found = edited()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_unknown_edits(pipe: FlexVARPipeline) -> None:
    with pytest.raises(ValueError, match="no edit is named 'sharpen'; there are refine, upscale, inpaint, outpaint"):
        pipe.edit_of("sharpen", picture())
    with pytest.raises(TypeError, match=r"upscale\(\) takes no keyword 'facto'; did you mean 'factor'\?"):
        pipe.edit_of("upscale", picture(), facto=2)


@pytest.mark.parametrize(("name", "width"), [("refine", 36), ("upscale", 38), ("outpaint", 38)])
def test_one_side_alone_keeps_the_proportions_of_the_picture(pipe: FlexVARPipeline, name: str, width: int) -> None:
    assert pipe.edit_of(name, picture(0, 13, 19), height=24 if name == "refine" else 26).size == (24 if name == "refine" else 26, width)


def test_an_edit_has_its_own_size(pipe: FlexVARPipeline) -> None:
    with pytest.raises(ValueError, match="the edit draws 16 x 16 px; leave height and width out"):
        pipe(0, edit=pipe.edit_of("inpaint", picture(), mask=half()), height=32)


# -- pictures as they are given --


def test_every_form_of_a_picture_is_the_same() -> None:
    given = picture()
    array = np.asarray(given)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [array, array[None], array.astype(np.float32) / 255, array.astype(np.uint16) * 257]
    for form in (*forms, tensor, tensor[None], tensor / 255, [given]):
        assert torch.allclose(pictures_of(form), pictures_of(given), atol=1e-6)
    assert pictures_of([given, array]).shape == (2, 4, SIDE, SIDE)


def test_a_path_is_a_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "given.png")
    for path in (tmp_path / "given.png", str(tmp_path / "given.png"), [tmp_path / "given.png"]):
        assert torch.equal(pictures_of(path), pictures_of(picture()))
    with pytest.raises(FileNotFoundError, match=r"there is no picture cat\.png: check the path"):
        pictures_of("cat.png")


def test_modes_and_turned_pictures(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    array = np.array(grey)
    for mode in (grey, deep, grey.convert("CMYK"), grey.convert("P"), grey.convert("LA"), array, torch.from_numpy(array)):
        assert torch.allclose(pictures_of(mode)[0, :3], pictures_of(grey.convert("RGB"))[0, :3], atol=1.5 / 255)
    turned, exif = picture(0, 8, 12), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert pictures_of(image).shape == (1, 4, 12, 8)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (3, "is a int; give a PIL picture, for example from PIL.Image.open, an array, a tensor or a path"),
        ([], "empty list"),
        ([np.zeros((4, 4, 3)), np.zeros((4, 6, 3))], "several sizes"),
        (np.full((4, 4, 3), 2.0), r"outside \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"outside \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "holds int64; give uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "holds int32; give uint8"),
        (Image.new("F", (4, 4), 0.8), "mode F"),
        (np.zeros((4, 4, 2)), "1, 3 or 4 channels"),
        (torch.zeros(3, 0, 4), "has 0 x 4 pixels"),
        (Image.new("RGB", (0, 4)), "has 4 x 0 pixels"),
    ],
)
def test_what_is_no_picture(image, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        pictures_of(image)


def test_masks() -> None:
    assert torch.equal(mask_of(half() > 0, (SIDE, SIDE)), torch.from_numpy(half())[None, None] / 255)
    assert mask_of(Image.new("1", (4, 4), 1), (8, 6)).shape == (1, 1, 8, 6)
    assert mask_of(Image.new("RGBA", (4, 4)), (4, 4)).max() == 0


# -- what an edit is made of --


def test_filling_continues_what_is_known() -> None:
    flat, known = torch.full((1, 3, 13, 9), 0.4), torch.ones(1, 1, 13, 9)
    known[..., 3:9, 2:] = 0
    assert torch.allclose(editing.filled(torch.where(known > 0, flat, -1.0), known), flat, atol=1e-5)
    assert torch.equal(editing.filled(flat, torch.zeros_like(known)), torch.zeros_like(flat))
    assert torch.equal(editing.filled(flat, torch.ones_like(known)), flat)


def test_nearness_falls_with_the_distance() -> None:
    there = torch.zeros(1, 1, 1, 6)
    there[..., 0] = 1
    assert torch.allclose(editing.near(there, 3)[0, 0, 0], torch.tensor([1, 0.75, 0.5, 0.25, 0, 0]))


def test_drawn_cells() -> None:
    white = torch.zeros(1, 1, 8, 8)
    white[..., :5] = 1  # the middle cell of four columns is half white
    columns = {rule: editing.drawn_cells(white, (1, 4), rule)[0, 0].tolist() for rule in ("any", "majority", "all")}
    assert columns == {"any": [True] * 3 + [False], "majority": [True] * 3 + [False], "all": [True] * 2 + [False] * 2}
