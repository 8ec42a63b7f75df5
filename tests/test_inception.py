"""The Inception is ADM's graph, stated here a second time: plainly, in float64, with a resize in NumPy."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar.evaluation.extractors import Features, load_extractor
from flexvar.evaluation.inception import Inception, load_inception, resized

SIZES = [(64, 64), (256, 256), (80, 200)]


class Graph:
    """ADM's graph, walked layer by layer in float64. The first walk draws the weights, so that it also states what a file holds."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)
        self.spatial = np.empty(0)

    def weight(self, name: str, *shape: int, low: float, high: float) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.empty(shape).uniform_(low, high, generator=self.random)
        return self.weights[name].double()

    def layer(self, x: Tensor, name: str, channels: int, height: int, width: int, stride: int = 1, padding: str = "SAME") -> Tensor:
        reach = (6 / (x.shape[1] * height * width)) ** 0.5  # keeps the size of the features
        x = F.conv2d(
            x,
            self.weight(f"{name}.conv.weight", channels, x.shape[1], height, width, low=-reach, high=reach),
            stride=stride,
            padding=(height // 2, width // 2) if padding == "SAME" else 0,
        )
        mean = self.weight(f"{name}.bn.running_mean", channels, low=-0.2, high=0.2)
        variance = self.weight(f"{name}.bn.running_var", channels, low=0.3, high=1.5)
        gamma = self.weight(f"{name}.bn.weight", channels, low=0.5, high=1.2)
        beta = self.weight(f"{name}.bn.bias", channels, low=-0.2, high=0.2)
        mean, variance, gamma, beta = (part[:, None, None] for part in (mean, variance, gamma, beta))
        return torch.relu((x - mean) / torch.sqrt(variance + 0.001) * gamma + beta)

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pool, spatial and logits of resized pictures (B, 299, 299, 3)."""
        x = torch.from_numpy(pictures.astype(np.float64)).permute(0, 3, 1, 2) * 0.0078125 - 1
        x = self.layer(x, "Conv2d_1a_3x3", 32, 3, 3, 2, "VALID")
        x = self.layer(x, "Conv2d_2a_3x3", 32, 3, 3, 1, "VALID")
        x = self.layer(x, "Conv2d_2b_3x3", 64, 3, 3)
        x = F.max_pool2d(x, 3, 2)
        x = self.layer(x, "Conv2d_3b_1x1", 80, 1, 1)
        x = self.layer(x, "Conv2d_4a_3x3", 192, 3, 3, 1, "VALID")
        x = F.max_pool2d(x, 3, 2)
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self.mixed_35(x, name, pooled)
        double = self.layer(self.layer(x, "Mixed_6a.branch3x3dbl_1", 64, 1, 1), "Mixed_6a.branch3x3dbl_2", 96, 3, 3)
        double = self.layer(double, "Mixed_6a.branch3x3dbl_3", 96, 3, 3, 2, "VALID")
        x = torch.cat([self.layer(x, "Mixed_6a.branch3x3", 384, 3, 3, 2, "VALID"), double, F.max_pool2d(x, 3, 2)], 1)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = self.mixed_17(x, name, inner)
        three = self.layer(self.layer(x, "Mixed_7a.branch3x3_1", 192, 1, 1), "Mixed_7a.branch3x3_2", 320, 3, 3, 2, "VALID")
        seven = self.layer(self.layer(x, "Mixed_7a.branch7x7x3_1", 192, 1, 1), "Mixed_7a.branch7x7x3_2", 192, 1, 7)
        seven = self.layer(self.layer(seven, "Mixed_7a.branch7x7x3_3", 192, 7, 1), "Mixed_7a.branch7x7x3_4", 192, 3, 3, 2, "VALID")
        x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
        x = self.mixed_8(x, "Mixed_7b", average(x))
        x = self.mixed_8(x, "Mixed_7c", F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-np.inf), 3, 1))
        pool = x.sum((2, 3)) / 64
        self.weight("fc.bias", 1008, low=-9, high=9)  # of no effect
        logits = pool @ self.weight("fc.weight", 1008, 2048, low=-0.1, high=0.1).T
        return pool.numpy(), self.spatial, logits.numpy()

    def mixed_35(self, x: Tensor, name: str, pooled: int) -> Tensor:
        one = self.layer(x, f"{name}.branch1x1", 64, 1, 1)
        five = self.layer(self.layer(x, f"{name}.branch5x5_1", 48, 1, 1), f"{name}.branch5x5_2", 64, 5, 5)
        double = self.layer(self.layer(x, f"{name}.branch3x3dbl_1", 64, 1, 1), f"{name}.branch3x3dbl_2", 96, 3, 3)
        double = self.layer(double, f"{name}.branch3x3dbl_3", 96, 3, 3)
        return torch.cat([one, five, double, self.layer(average(x), f"{name}.branch_pool", pooled, 1, 1)], 1)

    def mixed_17(self, x: Tensor, name: str, inner: int) -> Tensor:
        one = self.layer(x, f"{name}.branch1x1", 192, 1, 1)
        if name == "Mixed_6d":
            self.spatial = one.numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(one), -1)
        seven = self.layer(self.layer(x, f"{name}.branch7x7_1", inner, 1, 1), f"{name}.branch7x7_2", inner, 1, 7)
        seven = self.layer(seven, f"{name}.branch7x7_3", 192, 7, 1)
        double = self.layer(self.layer(x, f"{name}.branch7x7dbl_1", inner, 1, 1), f"{name}.branch7x7dbl_2", inner, 7, 1)
        double = self.layer(self.layer(double, f"{name}.branch7x7dbl_3", inner, 1, 7), f"{name}.branch7x7dbl_4", inner, 7, 1)
        double = self.layer(double, f"{name}.branch7x7dbl_5", 192, 1, 7)
        return torch.cat([one, seven, double, self.layer(average(x), f"{name}.branch_pool", 192, 1, 1)], 1)

    def mixed_8(self, x: Tensor, name: str, pooled: Tensor) -> Tensor:
        one = self.layer(x, f"{name}.branch1x1", 320, 1, 1)
        three = self.layer(x, f"{name}.branch3x3_1", 384, 1, 1)
        double = self.layer(self.layer(x, f"{name}.branch3x3dbl_1", 448, 1, 1), f"{name}.branch3x3dbl_2", 384, 3, 3)
        ends = []
        for trunk, last in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
            ends += [self.layer(trunk, f"{name}.{last}a", 384, 1, 3), self.layer(trunk, f"{name}.{last}b", 384, 3, 1)]
        return torch.cat([one, *ends, self.layer(pooled, f"{name}.branch_pool", 192, 1, 1)], 1)


def average(x: Tensor) -> Tensor:
    """The mean of the 3 x 3 neighbours that are in the picture."""
    kernel = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1]) / F.conv2d(torch.ones_like(x), kernel, padding=1, groups=x.shape[1])


def tensorflow_resize(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W, 3) at (side, side, 3), pixel by pixel as TensorFlow 1 states it, which finds its places in float32."""
    height, width = picture.shape[:2]
    down, across = np.float32(height / side), np.float32(width / side)
    out = np.empty((side, side, 3))
    for i in range(side):
        for j in range(side):
            y, x = float(np.float32(i) * down), float(np.float32(j) * across)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = picture[top, left] * (1 - x + left) + picture[top, right] * (x - left)
            below = picture[bottom, left] * (1 - x + left) + picture[bottom, right] * (x - left)
            out[i, j] = above * (1 - y + top) + below * (y - top)
    return out


def picture(height: int, width: int) -> Tensor:
    """One of smooth colours with noise, (1, 3, H, W)."""
    random = torch.Generator().manual_seed(height * width)
    coarse = F.interpolate(torch.rand(1, 3, 4, 5, generator=random), (height, width), mode="bicubic")
    return (255 * (coarse + 0.1 * torch.randn(coarse.shape, generator=random))).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def expected() -> tuple[Graph, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The graph with its weights, and what it gives for a picture of each size."""
    graph = Graph()
    pictures = [tensorflow_resize(picture(*size)[0].permute(1, 2, 0).double().numpy(), 299) for size in SIZES]
    return graph, graph(np.stack(pictures))


@pytest.fixture(scope="module")
def path(expected: tuple[Graph, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(expected[0].weights, path)
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> list[Features]:
    with pytest.warns(UserWarning, match="do not compare its numbers with published ones"):
        extractor = load_extractor("inception", path)
    return [extractor(picture(*size)) for size in SIZES]


@pytest.mark.parametrize("index", range(len(SIZES)), ids=str)
def test_it_is_the_graph(expected: tuple[Graph, tuple[np.ndarray, ...]], found: list[Features], index: int) -> None:
    features = found[index]
    for given, stated, length in zip((features.pool, features.spatial, features.logits), expected[1], (2048, 2023, 1008), strict=True):
        assert given is not None
        assert given.shape == (1, length)
        assert given.dtype == torch.float32
        assert np.abs(given[0].numpy() - stated[index]).max() < 1e-5 * np.abs(stated[index]).max()


def test_the_comparison_is_of_something(expected: tuple[Graph, tuple[np.ndarray, ...]]) -> None:
    for stated in expected[1]:
        for one, other in combinations(stated, 2):
            assert np.abs(one - other).mean() > 1e-3 * np.abs(stated).max()
        assert (stated > 0).mean() > 0.3


@pytest.mark.parametrize(("height", "width"), [(7, 12), (12, 31), (299, 3), (1, 1)])
@pytest.mark.parametrize("side", [5, 12])
def test_resize_is_tensorflows(height: int, width: int, side: int) -> None:
    given = resized(picture(height, width), side)
    assert given.shape == (1, 3, side, side)
    assert given.dtype == torch.float32
    stated = tensorflow_resize(picture(height, width)[0].permute(1, 2, 0).double().numpy(), side)
    assert np.allclose(given[0].permute(1, 2, 0).numpy(), stated, rtol=0, atol=1e-4)


def test_resize_by_hand() -> None:
    row = torch.tensor([10, 20, 60], dtype=torch.uint8).expand(1, 3, 3, 3)
    assert resized(row, 6)[0, 0, 0].tolist() == [10, 15, 20, 40, 60, 60]  # it reads at 0, 0.5, 1, 1.5, 2 and 2.5, beyond the last
    assert resized(row, 2)[0, 0, 0].tolist() == [10, 40]  # at 0 and 1.5: the darkest pixels, not the centres of the halves
    assert resized(row.mT, 6)[0, 0, :, 0].tolist() == [10, 15, 20, 40, 60, 60]
    assert resized(row, 3).equal(row.float())


def test_each_picture_by_itself(path: Path) -> None:
    inception = load_inception(path)
    pictures = torch.cat([picture(20, 30), picture(20, 30).flip(-1)])
    for together, alone in zip(inception(pictures), inception(pictures[1:]), strict=True):
        assert torch.allclose(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_the_size_of_the_network(path: Path) -> None:
    inception = load_inception(path)
    assert sum(parameter.numel() for parameter in inception.parameters()) == 23_850_960
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    assert not inception.training


def test_files_with_and_without_counters(path: Path, tmp_path: Path) -> None:
    tensors = Inception().state_dict()
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    torch.save(tensors, tmp_path / "counted.pth", _use_new_zipfile_serialization=False)
    assert len(counters) == 94
    assert torch.load(path).keys() == tensors.keys() - set(counters)
    assert load_inception(tmp_path / "counted.pth").fc.weight.equal(tensors["fc.weight"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"fc.weight": None}, "fc.weight is missing"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight has shape \(1000, 2048\) instead of \(1008, 2048\)"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, "AuxLogits.fc.bias is not a tensor of this model"),
    ],
)
def test_files_of_something_else(path: Path, tmp_path: Path, change: dict[str, Tensor | None], complaint: str) -> None:
    tensors = torch.load(path) | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth does not hold the Inception .*{complaint}") as caught:
        load_inception(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_damaged(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.pth"):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"half.pth is damaged or not a torch file; fetch it again"):
        load_inception(tmp_path / "half.pth")
