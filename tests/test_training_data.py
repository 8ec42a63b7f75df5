"""What reaches a training, and in which order: at any number of processes, from streams, from a feature cache."""

from __future__ import annotations

import dataclasses
import io
import tarfile
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexvar.checkpoint import load, save
from flexvar.cli import main
from flexvar.data import FeatureCache, Shapes
from flexvar.data.shards import Sample, ShardSource, TarShards
from flexvar.training.config import read_config
from flexvar.training.order import Batch, Steps, picture_at, position_random
from flexvar.training.pictures import batches_of, measured_batches
from flexvar.training.settings import TokenizerRun, TransformerRun
from flexvar.training.start import _same_classes
from flexvar.training.stream import PICTURES_A_SHARD, Stream
from flexvar.training.transformer import TransformerWorkshop
from training_runs import assert_same_end, newest_state, reports, tokenizer_config, transformer_config


@pytest.mark.parametrize("count", [1, 23, 30])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_picture_once_an_epoch_at_any_number_of_processes(processes: int, count: int) -> None:
    """24 pictures a step and epochs of other lengths: batches run over the borders, nothing is dropped or repeated."""

    class Numbers:
        class_names = ("number",)

        def __len__(self) -> int:
            return count

        def draw(self, index: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, int]:
            return np.full((*size, 3), index, np.uint8), 0

    steps = -(-3 * count // 24)
    ranks = [Steps(Numbers(), 5, 24, [(2, 2)], rank, processes) for rank in range(processes)]
    seen = [index for step in range(steps) for rank in ranks for index in rank[step].pictures[:, 0, 0, 0].tolist()]
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert seen == [picture_at(5, position, count) for position in range(24 * steps)]


def test_no_two_random_streams_are_the_same() -> None:
    """Of places, of purposes, of seeds, and of places beyond 32 bits, as those of shards are."""
    places = (0, 1, 2, 1 << 32, (1 << 32) + 1, 2 << 32)
    streams = [position_random(seed, place, purpose) for seed in (0, 1) for place in places for purpose in range(5)]
    assert len({stream.integers(1 << 62).item() for stream in streams}) == 60


def test_parts_of_a_batch() -> None:
    batch = Steps(Shapes(views=3), 0, 6, [(8, 8)])[2]
    parts = batch.parts(3)
    assert [part.positions for part in parts] == [(12, 13), (14, 15), (16, 17)]
    assert torch.equal(torch.cat([part.pictures for part in parts]), batch.pictures)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def test_what_is_measured_on_comes_in_parts_no_larger_than_those_of_a_step(tmp_path: Path) -> None:
    config = read_config(TokenizerRun, tokenizer_config(tmp_path), ["batch=24", "accumulate=3", "measure=2"])
    whole = measured_batches(Shapes(views=3), read_config(TokenizerRun, tokenizer_config(tmp_path), ["batch=24", "measure=2"]), 1)
    parts = measured_batches(Shapes(views=3), config, 2)
    assert [len(batch.positions) for batch in whole] == [24, 24]
    assert [len(batch.positions) for batch in parts] == [4] * 12
    assert torch.equal(torch.cat([batch.labels for batch in parts]), torch.cat([batch.labels for batch in whole]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five tar files of 3 to 7 pictures, 25 in all; picture n is grey n and has the label n % 2."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "classes.txt").write_text("even\nodd\n")
    number = 0
    for shard, count in enumerate((5, 3, 7, 4, 6)):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for _ in range(count):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (number, number, number)).save(picture, "PNG")
                for name, content in ((f"{number:03d}.png", picture.getvalue()), (f"{number:03d}.cls", str(number % 2).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                number += 1
    return folder


def numbers(batch: Batch) -> list[int]:
    return batch.pictures[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_stream_reads_every_shard_once_an_epoch(processes: int, shards: Path) -> None:
    lanes = [Stream(TarShards(str(shards)), 3, processes, [(8, 8)], rank, processes, shuffle=4) for rank in range(processes)]
    read: dict[int, list[int]] = {}
    for lane in lanes:
        for batch in islice(lane, 60):
            assert batch.labels.tolist() == [number % 2 for number in numbers(batch)]
            place = batch.positions[0] // PICTURES_A_SHARD
            assert place % processes == lane.rank
            read.setdefault(place, []).extend(numbers(batch))
    for epoch in range(60 * processes // 25 - 1):
        pictures = [number for place in range(5 * epoch, 5 * epoch + 5) for number in read[place]]
        assert sorted(pictures) == list(range(25))
    orders = [tuple(read[place]) for place in read]
    assert len(set(orders)) > 5  # another order each epoch


def test_shards_without_pictures_are_passed_over_however_often_a_reader_meets_them(tmp_path: Path) -> None:
    """Of three shards and two readers, one meets the empty shard several times in a row."""

    class Three(ShardSource):
        class_names = ("grey",)
        shards = 3
        unreadable = ()

        def read(self, shard: int) -> Iterator[Sample]:
            yield from [] if shard == empty else [Sample(lambda: Image.new("RGB", (2, 2)), 0) for _ in range(20)]

        def fit(self, picture: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
            return np.zeros((*size, 3), np.uint8)

    empty = 2
    for seed in range(5):
        for rank in (0, 1):
            places = [batch.shard for batch in islice(Stream(Three(), seed, 8, [(2, 2)], rank, 2), 1000)]
            assert len(set(places)) > 100
            assert all(picture_at(seed, place, 3) != empty for place in places)
    Three.read = lambda *_: iter(())  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="none of the shards holds a picture"):
        next(iter(Stream(Three(), 0, 8, [(2, 2)])))


def test_a_stream_goes_on_at_a_shard(shards: Path) -> None:
    def stream(**start: int) -> Stream:
        return Stream(TarShards(str(shards)), 3, 2, [(8, 8), (8, 16)], shuffle=4, **start)

    whole = list(islice(stream(), 20))
    assert [batch.step for batch in whole] == list(range(20))
    place = whole[9].shard
    again = next(iter(stream(first_step=10, first_shard=place)))
    assert again.step == 10
    assert again.shard == place
    first_of_shard = next(batch for batch in whole if place in [position // PICTURES_A_SHARD for position in batch.positions])
    assert again.positions[0] // PICTURES_A_SHARD == place
    assert first_of_shard.step <= 10
    assert again.pictures.shape[-2:] == whole[10].pictures.shape[-2:]  # the size follows from the step


def test_a_stream_without_pictures_ends_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("one\n")
    for damaged in (False, True):
        with tarfile.open(tmp_path / f"{damaged}.tar", "w") as tar:
            if damaged:
                entry = tarfile.TarInfo("a.png")
                entry.size = 9
                tar.addfile(entry, io.BytesIO(b"no pixels"))
        stream = iter(Stream(TarShards(str(tmp_path)), 0, 1, [(8, 8)]))
        with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match="none of the shards holds a picture"):
            next(stream)


def test_no_more_readers_than_shards(shards: Path) -> None:
    source, config = TarShards(str(shards)), TokenizerRun(batch=4, sizes=[[16, 16]])
    assert batches_of(source, config, 5, 0, 1)(0, 1, 0).num_workers == 5
    with pytest.warns(UserWarning, match="5 shards for 2 x 4 readers, of which each needs its own: now there are 2 x 2"):
        assert batches_of(source, config, 4, 0, 2)(0, 1, 0).num_workers == 2
    with pytest.warns(UserWarning, match="now there are 1 x 5"):
        assert batches_of(source, config, 8, 0, 1)(0, 1, 0).num_workers == 5
    assert batches_of(Shapes(views=1), config, 8, 0, 1)(0, 1, 0).num_workers == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_shards(workers: int, shards: Path, tmp_path: Path, capsys) -> None:
    data = [f"data={{kind: shards, path: {shards}, held_out: {shards}}}", f"workers={workers}", "batch=5"]
    config = str(tokenizer_config(tmp_path))
    assert main(["train", "tokenizer", config, "steps=8", *data]) == 0
    assert newest_state(tmp_path / "tokenizer")["first_shard"] > 0
    assert main(["train", "tokenizer", config, "steps=12", *data]) == 0
    assert [report["step"] for report in reports(tmp_path / "tokenizer")] == list(range(1, 13))
    assert main(["train", "transformer", str(transformer_config(tmp_path, tmp_path / "tokenizer" / "model")), *data]) == 0
    assert load(tmp_path / "transformer" / "model").class_names == ("even", "odd")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert main(["train", "tokenizer", str(tokenizer_config(folder))]) == 0
    return folder / "tokenizer" / "model"


def cache_config(folder: Path, tokenizer: Path, data: str = "{kind: shapes, views: 3}") -> list[str]:
    path = folder / "cache.yaml"
    path.write_text(
        f"out: {folder / 'cache'}\ntokenizer: {tokenizer}\nviews: 3\nbatch: 4\nshard: 8\nsizes: [[16, 16], [16, 24]]\ndata: {data}\n"
    )
    return ["cache", str(path)]


def test_training_from_the_cache_is_training_through_the_tokenizer(tokenizer: Path, tmp_path: Path, capsys) -> None:
    assert main(cache_config(tmp_path, tokenizer)) == 0
    runs = {"online": ["data.views=3", "data.fixed_views=3"], "cached": ["data.kind=features", f"data.path={tmp_path / 'cache'}"]}
    for name, words in runs.items():
        assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer, 6, name)), "measure=0", *words]) == 0
    for online, cached in zip(reports(tmp_path / "online"), reports(tmp_path / "cached"), strict=True):
        assert online["loss"] == pytest.approx(cached["loss"], rel=1e-5)
        assert online["accuracy_by_scale"] == cached["accuracy_by_scale"]
    assert load(tmp_path / "cached" / "model").class_names == Shapes().class_names


def test_a_cache_goes_on_is_checked_and_refused(tokenizer: Path, tmp_path: Path, capsys) -> None:
    command = cache_config(tmp_path, tokenizer)
    assert main(command) == 0
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 4  # 30 pictures, 8 in each
    before = [path.read_bytes() for path in files]
    files[1].unlink()
    data = ["data.kind=features", f"data.path={tmp_path / 'cache'}"]
    training = ["train", "transformer", str(transformer_config(tmp_path, tokenizer)), *data]
    assert main(training) == 2
    assert "unfinished" in capsys.readouterr().err
    assert main(command) == 0
    assert sorted(files[1].read_bytes()) == sorted(before[1])  # the same numbers; names of metadata come in any order
    before[1] = files[1].read_bytes()
    assert main([*command, "--check"]) == 0
    files[2].write_bytes(before[2][:-9] + bytes([before[2][-9] ^ 1]) + before[2][-8:])
    assert main([*command, "--check"]) == 2
    assert files[2].name in capsys.readouterr().err
    assert main([*command, "views=2"]) == 2
    assert "views is 3, not 2" in capsys.readouterr().err
    assert main([*command, "views=2", "--overwrite"]) == 0
    assert main([*training, "sizes=[[16, 16], [24, 24]]"]) == 2
    assert "size 24x24 is not cached" in (error := capsys.readouterr().err)
    assert "holds 16x16, 16x24 (height x width)" in error
    other = tokenizer_config(tmp_path, name="other")
    assert main(["train", "tokenizer", str(other), "seed=1"]) == 0
    assert main([*training, f"tokenizer={tmp_path / 'other' / 'model'}"]) == 2
    assert "was made with another tokenizer" in capsys.readouterr().err


def test_a_cache_of_a_folder_with_a_corrupt_picture(tokenizer: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "shapes", str(tmp_path / "shapes"), "--count", "2", "--height", "20", "--width", "20"]) == 0
    broken = [tmp_path / "shapes" / name for name in ("arrow/0001.png", "cross/0000.png", "star/0000.png", "star/0001.png")]
    for path in broken:
        path.write_bytes(b"not a picture")
    command, line = cache_config(tmp_path, tokenizer, f"{{kind: folder, path: {tmp_path / 'shapes'}}}"), "4 pictures could not be read"
    assert main(command) == 0
    assert f"{line} and were skipped: arrow/0001.png, cross/0000.png, star/0000.png ...\n" in capsys.readouterr().out
    assert FeatureCache(tmp_path / "cache").unreadable == broken
    (tmp_path / "cache" / "features-00000.safetensors").unlink()
    assert main(command) == 0  # of all shards, those too that were written before
    assert line in capsys.readouterr().out
    assert main([*command, "--check"]) == 0
    data = [f"data={{kind: features, path: {tmp_path / 'cache'}}}"]
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer)), *data]) == 0
    assert line in capsys.readouterr().out
    assert len(load(tmp_path / "transformer" / "model").class_names) == 10


def test_a_single_class_has_no_name_to_differ_in() -> None:
    assert _same_classes(("train",), ("unseen",))
    assert _same_classes(("a", "b"), ("a", "b"))
    assert not _same_classes(("a", "b"), ("a", "c"))
    assert not _same_classes(("a",), ("a", "b"))


def test_held_out_pictures(tmp_path: Path, capsys) -> None:
    for name, count in (("train", 3), ("unseen", 2)):
        assert main(["data", "shapes", str(tmp_path / name), "--count", str(count), "--height", "20", "--width", "20"]) == 0
    data = [f"data={{kind: folder, path: {tmp_path / 'train'}, held_out: {tmp_path / 'unseen'}}}"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *data]) == 0
    model = tmp_path / "tokenizer" / "model"
    assert main(["train", "transformer", str(transformer_config(tmp_path, model)), *data]) == 0
    for path in (tmp_path / "unseen" / "arrow").iterdir():
        path.unlink()
    (tmp_path / "unseen" / "arrow").rmdir()
    assert main(["train", "transformer", str(transformer_config(tmp_path, model, name="again")), *data]) == 2
    assert "has other classes than" in capsys.readouterr().err


def test_a_run_that_reads_files_beside_itself_goes_on_to_the_bit(tmp_path: Path, capsys) -> None:
    assert main(["data", "shapes", str(tmp_path / "shapes"), "--count", "2", "--height", "20", "--width", "20"]) == 0
    words = [f"data={{kind: folder, path: {tmp_path / 'shapes'}}}", "workers=2", "optimiser.flat=1", "restart_every=0"]
    for name, pieces in (("whole", [4]), ("pieces", [2, 4])):
        for steps in pieces:
            assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, steps, name)), *words]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "pieces")


def test_one_class_means_no_class(tmp_path: Path, capsys) -> None:
    """A folder of pictures alone: a model that draws without being told what."""
    assert main(["data", "shapes", str(tmp_path / "shapes"), "--count", "3", "--height", "20", "--width", "20"]) == 0
    data = [f"data={{kind: folder, path: {tmp_path / 'shapes' / 'star'}}}"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *data]) == 0
    config = str(transformer_config(tmp_path, tmp_path / "tokenizer" / "model"))
    assert main(["train", "transformer", config, *data, "steps=1", "optimiser.learning_rate=1e-12"]) == 0
    before = newest_state(tmp_path / "transformer")["workshop"]["transformer.class_embedding.weight"].clone()
    assert main(["train", "transformer", config, *data]) == 0
    model = tmp_path / "transformer" / "model"
    assert load(model).class_names == ("star",)
    learnt = newest_state(tmp_path / "transformer")["workshop"]["transformer.class_embedding.weight"]
    assert torch.equal(learnt[0], learnt[1])  # naming the class changes nothing
    assert learnt[1].sub(before[1]).abs().max() > 0.01  # four steps of 1e-2: what is drawn without a class is what learns
    for words in ([], ["star"]):
        assert main(["sample", *words, "--model", str(model), "--height", "16", "--width", "16", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "unconditional-seed0.png").is_file()
    assert (tmp_path / "out" / "star-seed0.png").is_file()


def test_fine_tuning_on_other_classes(tokenizer: Path, tmp_path: Path, capsys) -> None:
    """Classes are matched by name, new ones begin as the null class, which is kept; another position table is resampled."""
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer))]) == 0
    first = load(tmp_path / "transformer" / "model").transformer
    assert main(["data", "shapes", str(tmp_path / "shapes"), "--count", "2", "--height", "20", "--width", "20"]) == 0
    (tmp_path / "shapes" / "circle").rename(tmp_path / "shapes" / "zebra")
    still = ["steps=1", "optimiser.learning_rate=1e-12", "optimiser.weight_decay=0", f"data={{kind: folder, path: {tmp_path / 'shapes'}}}"]
    words = [f"init_from={tmp_path / 'transformer' / 'model'}", *still]
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer, name="tuned")), *words, "model.table_side=12"]) == 0
    assert "knows 9 of the 10 classes by name; the others begin as its null class" in capsys.readouterr().err
    model = load(tmp_path / "tuned" / "model")
    tuned, names = model.transformer, model.class_names
    ours, theirs = tuned.class_embedding.weight, first.class_embedding.weight
    assert names[-1] == "zebra"
    torch.testing.assert_close(ours[names.index("zebra")], theirs[-1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[names.index("star")], theirs[Shapes().class_names.index("star")], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tuned.head.weight, first.head.weight, atol=1e-6, rtol=1e-5)
    assert tuned.config.table_side == 12
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer, name="wider")), *words, "model.width=32"]) == 2
    assert "does not fit the config's model" in capsys.readouterr().err


def test_what_is_told_of_another_transformer_is_left_out(tokenizer: Path, tmp_path: Path) -> None:
    """Of the one that came with the tokenizer."""
    config = read_config(TransformerRun, transformer_config(tmp_path, tokenizer))
    told = {"tokenizer": 1, "transformer": 2, "earlier runs of the transformer": [3], "licence": "MIT"}
    workshop = TransformerWorkshop(config, dataclasses.replace(load(tokenizer), provenance=told), ("a", "b"))
    assert workshop.finished(workshop.network, {"steps": 4}).provenance == {"tokenizer": 1, "licence": "MIT", "transformer": {"steps": 4}}


def test_a_transformer_begun_on_other_codes_is_told(tokenizer: Path, tmp_path: Path, capsys) -> None:
    """By `init_from` and on going on: a warning, or an error where the number of codes differs. Rounding makes no other codes."""
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, name="other")), "seed=1"]) == 0
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, name="more")), "model.codebook_size=32"]) == 0
    other, more, half = tmp_path / "other" / "model", tmp_path / "more" / "model", tmp_path / "half"
    save(load(tokenizer), half, dtype=torch.bfloat16)
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer, 2, "first"))]) == 0
    first = tmp_path / "first" / "model"

    def said(name: str, codes: Path, steps: int, *words: str) -> str:
        capsys.readouterr()
        status = main(["train", "transformer", str(transformer_config(tmp_path, codes, steps, name)), *words])
        said = capsys.readouterr()
        assert status == (2 if "32 of width 4" in said.err else 0), said.err
        return "".join(line for line in said.err.splitlines() if "flexvar:" in line)

    assert said("same", half, 1, f"init_from={first}") == ""
    told = f"{first} was trained on other codes than {other} has, and must learn these; tokenizer={first} has its own"
    assert told in said("tuned", other, 1, f"init_from={first}")
    assert said("tuned", other, 2, f"init_from={first}") == ""  # the run goes on with its own codes
    sizes = f"{first} was trained on 16 codes of width 4, and {more} has 32 of width 4; take its own, tokenizer={first}, or begin anew"
    assert sizes in said("larger", more, 1, f"init_from={first}")
    assert sizes in said("first", more, 4)
    assert said("first", half, 4) == ""
    assert told in said("first", other, 6)
