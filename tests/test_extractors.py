"""Extractors come by name or from a file, say what they are, and refuse what would give numbers that mean nothing."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flexvar import zoo
from flexvar.evaluation import extractors, load_classifier
from flexvar.evaluation.extractors import INCEPTION_FILE, Extractor, load_extractor
from flexvar.evaluation.inception import Inception


class Colours(nn.Module):
    """A network that prepares its pictures by itself."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layer(pictures.to(torch.float32).mean((2, 3)) / 255) + torch.arange(self.layer.out_features, device=pictures.device)


class Halves(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float16).mean((2, 3))


class Maps(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32)


class Numbers(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)


class Pair(nn.Module):
    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return pictures.to(torch.float32).flatten(1), pictures


class OnlyOne(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32).flatten(1)[:1]


class Broken(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32).flatten(1).log()


class Floats(nn.Module):
    """A network that waits for someone else to prepare its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layer(pictures).mean((2, 3))


def save_scripted(network: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(network), path)
    return path


def save_exported(network: nn.Module, path: Path) -> Path:
    any_size = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    torch.export.save(torch.export.export(network, (pictures(),), dynamic_shapes=(any_size,)), path)
    return path


def pictures(height: int = 40, width: int = 48, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the Inception, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("extractors") / "weights.pth"
        torch.save(Inception().state_dict(), path)
    return path


@pytest.fixture
def address(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file at the Inception's address, which is where the test's weights lie; the cache folder is empty."""
    monkeypatch.setenv("FLEXVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extractors, "INCEPTION_URL", weights.as_uri())
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", zoo.sha256(weights))
    return tmp_path / "cache" / INCEPTION_FILE


def test_inception(weights: Path) -> None:
    with pytest.warns(UserWarning, match=r"weights.pth is not the usual weights-inception-2015-12-05-6726825d.pth"):
        extractor = load_extractor("inception", weights)
    features = extractor(pictures())
    assert (extractor.name, extractor.sha256) == ("inception", zoo.sha256(weights))
    assert features.spatial is not None
    assert features.logits is not None
    assert (features.pool.shape, features.spatial.shape, features.logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    assert not extractor.published
    assert not features.pool.requires_grad


def test_inception_is_fetched_once(address: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = load_extractor()
        assert address.read_bytes() == weights.read_bytes()
        monkeypatch.setattr(extractors, "INCEPTION_URL", (weights.parent / "gone.pth").as_uri())
        again = load_extractor("inception")
    assert first.sha256 == again.sha256 == zoo.sha256(weights)
    assert first.published
    assert [path.name for path in address.parent.glob("[!.]*")] == [INCEPTION_FILE]  # and the lock that kept others waiting


def unreachable(*_: object, **__: object) -> None:
    raise urllib.error.URLError("Name or service not known")


def silent(*_: object, **__: object) -> None:
    raise TimeoutError("timed out")


def cut_short(*_: object, **__: object) -> io.BytesIO:
    return io.BytesIO(b"the first part")


@pytest.mark.parametrize(
    ("answer", "reason"), [(unreachable, "not known"), (silent, "timed out"), (cut_short, "what came has sha256 [0-9a-f]{64}")]
)
def test_offline(address: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., object], reason: str) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(ConnectionError, match=rf"weights.pth could not be fetched .*{reason}.* or name it with --weights") as caught:
        load_extractor()
    assert str(address.parent) in str(caught.value)
    assert "--extractor classifier needs none" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(address.parent.glob("[!.]*")) == []
    assert list(address.parent.glob("*.unfinished")) == []


def test_a_cache_that_is_damaged_or_in_the_way(address: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address.parent.mkdir()
    address.write_bytes(b"something")
    with pytest.raises(ValueError, match=f"{INCEPTION_FILE} has sha256 .* instead of .*; delete it, so that it is fetched again"):
        load_extractor()
    monkeypatch.setenv("FLEXVAR_CACHE", str(address))
    with pytest.raises(OSError, match=r"could not be kept .*; make room, or name another folder in FLEXVAR_CACHE"):
        load_extractor()


def test_the_usual_file_is_the_one_of_its_name() -> None:
    assert extractors.INCEPTION_URL.endswith(INCEPTION_FILE)
    assert INCEPTION_FILE.endswith(f"-{extractors.INCEPTION_SHA256[:8]}.pth")
    assert len(extractors.INCEPTION_SHA256) == 64


def test_classifier(tmp_path: Path) -> None:
    classifier = load_classifier()
    extractor = load_extractor("classifier")
    features = extractor(pictures())
    images = pictures() / 127.5 - 1
    assert features.spatial is None
    assert features.logits is not None
    assert torch.equal(features.pool, classifier.features(images))
    assert torch.equal(features.logits, classifier(images))
    assert (extractor.name, extractor.published) == ("classifier", False)

    classifier.save(tmp_path / "mine.safetensors")
    mine = load_extractor(str(tmp_path / "mine.safetensors"))
    assert (mine.name, mine.sha256) == ("mine.safetensors", zoo.sha256(tmp_path / "mine.safetensors"))
    assert torch.equal(mine(pictures()).pool, features.pool)
    with pytest.raises(ValueError, match="both sides at least 32 px"):
        extractor(pictures(31, 40))


@pytest.mark.parametrize(("save", "file"), [(save_scripted, "mine.pt"), (save_scripted, "mine.pth"), (save_exported, "mine.pt2")])
def test_networks_of_others(tmp_path: Path, save: Callable[[nn.Module, Path], Path], file: str) -> None:
    network = Colours()
    path = save(network, tmp_path / file)
    extractor = load_extractor(path)
    assert (extractor.name, extractor.sha256) == (file, zoo.sha256(path))
    for batch in (pictures(), pictures(16, 20, 3)):
        given = extractor(batch)
        assert torch.allclose(given.pool, network(batch))
        assert given.spatial is given.logits is None
    assert extractor.to("cpu") is extractor


def test_half_precision_comes_out_whole(tmp_path: Path) -> None:
    features = load_extractor(save_scripted(Halves(), tmp_path / "half.pt"))(pictures())
    assert features.pool.dtype == torch.float32
    assert torch.allclose(features.pool, pictures().float().mean((2, 3)), rtol=1e-2)


def test_an_exported_network_moves(tmp_path: Path) -> None:
    extractor = load_extractor(save_exported(Colours(), tmp_path / "mine.pt2")).to("meta")
    given = extractor.read(extractor.network, pictures().to("meta"))
    assert given.pool.device.type == "meta"


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (Maps(), r"mine.pt gave \(2, 3, 40, 48\) torch.float32 for 2 pictures; it must give one tensor \(2, F\) of floats"),
        (Numbers(), r"mine.pt gave \(2, 5760\) torch.uint8 for 2 pictures"),
        (OnlyOne(), r"mine.pt gave \(1, 5760\) torch.float32 for 2 pictures"),
        (Pair(), "mine.pt gave tuple for 2 pictures"),
        (Floats(), r"mine.pt does not take pictures \(2, 3, 40, 48\) uint8 \(.+\); it must prepare them by itself"),
        (Broken(), "features of the extractor mine.pt are not finite"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_networks_that_give_no_features(tmp_path: Path, network: nn.Module, complaint: str) -> None:
    extractor = load_extractor(save_scripted(network, tmp_path / "mine.pt"))
    with pytest.raises(ValueError, match=complaint) as caught:
        extractor(pictures().fill_(0))
    assert "\n" not in str(caught.value)


def test_an_exported_network_of_another_size(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Colours(), (pictures(),)), tmp_path / "fixed.pt2")
    extractor = load_extractor(tmp_path / "fixed.pt2")
    assert extractor(pictures()).pool.shape == (2, 5)
    with pytest.raises(ValueError, match=r"fixed.pt2 does not take pictures \(3, 3, 40, 48\) uint8") as caught:
        extractor(pictures(count=3))
    assert "\n" not in str(caught.value)


def out_of_memory(_: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_of_memory_is_told_as_it_is(tmp_path: Path) -> None:
    extractor = load_extractor(save_scripted(Colours(), tmp_path / "mine.pt"))
    extractor.network = out_of_memory  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        extractor(pictures())


@pytest.fixture(scope="module")
def classifier_extractor() -> Extractor:
    return load_extractor("classifier")


@pytest.mark.parametrize(
    "given", [torch.zeros(2, 3, 40, 40), torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(2, 40, 40, 3, dtype=torch.uint8)]
)
def test_other_pictures(classifier_extractor: Extractor, given: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the pictures are .*; give \(B, 3, H, W\) uint8"):
        classifier_extractor(given)


@pytest.mark.parametrize("name", ["emoji", "flexvar-d16", *zoo.MODEL_FILES, "."])
def test_the_models_own_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(zoo.bundled_folder("emoji"))
    with pytest.raises(ValueError, match="is a model, whose own tokenizer flatters what it draws"):
        load_extractor(name)
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(Path("tokenizer.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"renamed.safetensors is not a classifier"):
        load_extractor(copy)


def test_files_that_are_none(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no extractor dino; give inception, classifier or the path"):
        load_extractor("dino")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.pth"):
        load_extractor("inception", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="the extractor classifier takes no weights beside it"):
        load_extractor("classifier", weights)
    with pytest.raises(ValueError, match=r"weights.pth holds no network that runs by itself, or is damaged; save one with torch.jit.save"):
        load_extractor(weights)


@pytest.mark.parametrize(("save", "file"), [(save_scripted, "mine.pt"), (save_exported, "mine.pt2")])
def test_files_that_are_damaged(tmp_path: Path, save: Callable[[nn.Module, Path], Path], file: str) -> None:
    path = save(Colours(), tmp_path / file)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file} (is|holds no network that runs by itself, or is) damaged.*; save") as caught:
        load_extractor(path)
    assert "\n" not in str(caught.value)
