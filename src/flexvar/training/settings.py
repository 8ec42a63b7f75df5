"""What a training run is told, field by field; the comment beside a field is its help. No torch here, so that errors come at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from flexvar.schedule import RandomPolicy, grid_of

Rule = tuple[str, Callable[[Any], bool]]
"""What a setting must be, in words and as a test."""

COUNT: Rule = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Rule = ("a number of at least 0", lambda value: 0 <= value < math.inf)
OR_AUTOMATIC: Rule = ("at least 0, or -1 for what suits the machine", lambda value: value >= -1)
POSITIVE: Rule = ("a number above 0", lambda value: 0 < value < math.inf)
SHARE: Rule = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE: Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)
COUNTS: Rule = ("a list of whole numbers of at least 1", lambda values: bool(values) and min(values) >= 1)
LABELS: Rule = ("a list of labels, each at least 0", lambda values: bool(values) and min(values) >= 0)
BETAS: Rule = ("two numbers, each at least 0 and below 1", lambda pair: len(pair) == 2 and all(0 <= value < 1 for value in pair))
RANGE: Rule = ("two numbers of at least 1, the smaller first", lambda pair: len(pair) == 2 and 1 <= pair[0] <= pair[1] < math.inf)
SIZES: Rule = (
    "a list of pairs [height, width] in pixels, for example [[64, 64]]",
    lambda sizes: bool(sizes) and all(len(size) == 2 and min(size) >= 1 for size in sizes),
)


def _demand(settings: Any, rule: Rule, keys: str) -> None:
    """ValueError naming the first of the keys whose value breaks the rule; keys are written as a user writes them."""
    words, holds = rule
    for key in keys.split():
        if not holds(value := getattr(settings, key.split(".")[-1])):
            raise ValueError(f"{key} is {value}; it must be {words}")


def _demand_unset(settings: Any, keys: str, whom: str) -> None:
    """ValueError naming the first of the keys that is set although it means nothing to somebody."""
    usual = {entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory() for entry in fields(settings)}
    for key in keys.split():
        name = key.split(".")[-1]
        if getattr(settings, name) != usual[name]:
            raise ValueError(f"{key} means nothing to {whom}; remove it, or set {key}={json.dumps(usual[name])}")


def demand_grids(sizes: list[list[int]], downsample: int) -> None:
    """ValueError naming a picture size that has no whole grid of codes, and the nearest that has."""
    for height, width in sizes:
        try:
            grid_of(height, width, downsample)
        except ValueError as error:
            raise ValueError(f"sizes holds [{height}, {width}]: {error}") from error


KINDS_BY_SETTING = {
    "data.path data.held_out": "folder, hub, hub-stream, shards, features",
    "data.split data.image data.label": "hub, hub-stream",
    "data.classes": "hub-stream, shards, emoji",
    "data.views": "emoji, shapes",
    "data.fixed_views": "folder, hub, emoji, shapes",
    "data.flip data.resize": "folder, hub, hub-stream, shards",
    "data.shuffle": "hub-stream, shards",
}
"""The kinds of data to which a setting means something; with all others it must stay as it is."""


@dataclass
class DataConfig:
    """Where the pictures come from."""

    # folder: class folders of pictures; hub: a Hugging Face data set; hub-stream: one too large to be downloaded whole;
    # shards: tar files; features: a folder that `flexvar cache` wrote; emoji, shapes: drawn as they are needed
    kind: Literal["folder", "hub", "hub-stream", "shards", "features", "emoji", "shapes"] = "folder"
    path: str = ""  # folder, features: the folder; hub, hub-stream: a Hub id or a folder; shards: a folder or train-{0000..0099}.tar
    held_out: str = ""  # pictures to measure on: folder: another folder; hub: another split. Drawn pictures are never the same twice
    split: str = "train"  # hub, hub-stream
    image: str = "image"  # hub, hub-stream: the column with the picture
    label: str = "label"  # hub, hub-stream: the column with the class; empty means a single class
    classes: list[str] = field(default_factory=list)  # emoji: those to draw, empty means all; shards, hub-stream: names if they have none
    views: int = 1000  # emoji and shapes: pictures of a class in one epoch
    fixed_views: int = 0  # ways in which a picture is cropped, flipped or composed, the same every epoch; 0 means a new one each time
    flip: bool = True  # photographs: mirror half of the pictures
    resize: list[float] = field(default_factory=lambda: [1.0, 1.136])  # photographs: range of the short side over the crop's
    shuffle: int = 1000  # hub-stream, shards: pictures among which the next one is chosen

    def __post_init__(self) -> None:
        _demand(self, COUNT, "data.views data.shuffle")
        _demand(self, NOT_NEGATIVE, "data.fixed_views")
        _demand(self, RANGE, "data.resize")
        for keys, kinds in KINDS_BY_SETTING.items():
            if self.kind not in kinds.split(", "):
                _demand_unset(self, keys, f"data.kind={self.kind}, only to {kinds}")


@dataclass
class OptimiserConfig:
    """AdamW and the shape of its learning rate (paper, section 4.1; released code)."""

    learning_rate: float = 3e-4  # the highest
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.05  # not on biases, norms, the position table, the start token, scales and codes
    clip: float = 2.0  # largest norm of the gradient; 0 switches clipping off
    warm_up: float = 0.02  # share of the steps, from 0.5 % of the highest rate
    flat: float = 0.05  # share of the steps at the highest rate, then linear to the end
    end: float = 0.1  # last rate over the highest
    ema: float = 0.999  # decay of the averaged weights, which are those that are kept; 0 keeps the weights themselves

    def __post_init__(self) -> None:
        _demand(self, POSITIVE, "optimiser.learning_rate")
        _demand(self, BETAS, "optimiser.betas")
        _demand(self, NOT_NEGATIVE, "optimiser.weight_decay optimiser.clip")
        _demand(self, SHARE, "optimiser.warm_up optimiser.flat optimiser.end")
        _demand(self, BELOW_ONE, "optimiser.ema")


@dataclass
class RunConfig:
    """What both trainings share."""

    run: str = "runs/unnamed"  # folder of the run; the same command again goes on from its last checkpoint
    init_from: str = ""  # weights to begin with: a model's folder or name, or for a tokenizer a released .pth or LlamaGen's vq_ds16_c2i.pt
    seed: int = 0
    steps: int = 10000
    batch: int = 64  # pictures a step, on all processes together
    accumulate: int = 1  # parts in which a process works off its share of a step: less memory, the same step but for terms of whole batches
    sizes: list[list[int]] = field(default_factory=lambda: [[256, 256]])  # (height, width) in pixels; one is drawn each step
    workers: int = -1  # processes that prepare pictures, beside each training process; -1 means as many as there are spare cores, at most 8
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of products and convolutions; auto: bf16 on GPUs that have it, else fp32
    bad_steps: int = 20  # steps in a row without a finite gradient after which the run is saved and stopped; each of them is skipped
    report_every: int = 100
    save_every: int = 500
    sheet_every: int = 1000
    keep: int = 2  # latest checkpoints kept, beside the best one
    measure: int = 4  # batches on which the averaged weights are measured at each save; 0 measures nothing
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise ValueError("run is empty; name the folder of the run")
        _demand(self, COUNT, "steps batch accumulate report_every save_every sheet_every keep bad_steps")
        _demand(self, NOT_NEGATIVE, "seed measure")
        _demand(self, OR_AUTOMATIC, "workers")
        _demand(self, SIZES, "sizes")
        if self.batch % self.accumulate:
            raise ValueError(f"batch is {self.batch} and accumulate {self.accumulate}; the batch must be a multiple")


@dataclass
class TokenizerShape:
    """`flexvar.TokenizerConfig`, as a file says it."""

    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    blocks: int = 2
    z_channels: int = 256
    norm_groups: int = 32
    codebook_size: int = 8912
    code_width: int = 32

    def __post_init__(self) -> None:
        _demand(self, COUNT, "model.channels model.blocks model.z_channels model.norm_groups model.codebook_size model.code_width")
        _demand(self, COUNTS, "model.multipliers")


@dataclass
class PerceptualConfig:
    """LPIPS: the distance of pictures as a VGG-16 sees them."""

    weight: float = 0.0  # LlamaGen's recipe has 1.0
    vgg: str = ""  # torchvision's vgg16-397923af.pth
    linear: str = ""  # lpips' weights/v0.1/vgg.pth

    def __post_init__(self) -> None:
        _demand(self, NOT_NEGATIVE, "perceptual.weight")
        if self.weight and not (self.vgg and self.linear):
            raise ValueError(
                "perceptual.weight needs two files: perceptual.vgg, torchvision's vgg16-397923af.pth, and perceptual.linear, "
                "weights/v0.1/vgg.pth of the lpips package; fetch them, or set perceptual.weight=0"
            )


@dataclass
class AdversaryConfig:
    """A discriminator that judges patches, and learns from the same steps."""

    weight: float = 0.0  # LlamaGen's recipe has 0.5
    start: int = 20000  # step from which it learns and counts
    channels: int = 64
    layers: int = 3
    learning_rate: float = 1.0  # over the tokenizer's

    def __post_init__(self) -> None:
        _demand(self, NOT_NEGATIVE, "adversary.weight adversary.start")
        _demand(self, COUNT, "adversary.channels adversary.layers")
        _demand(self, POSITIVE, "adversary.learning_rate")


@dataclass
class TokenizerRun(RunConfig):
    """Training a tokenizer (paper, section 3.1)."""

    model: TokenizerShape = field(default_factory=TokenizerShape)
    learns: Literal["all", "decoder"] = "all"  # decoder: encoder and codes stay as they are, and fit what was trained on them
    scales: int = 5  # K: random scales a step, the last of them the native one
    target: Literal["area", "bicubic"] = "area"  # how a picture is reduced to the pixels of a coarser scale
    l1: float = 0.0
    l2: float = 1.0
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    smallest: int = 32  # px: the shorter side from which perceptual and adversarial terms see a scale's picture
    small: Literal["mask", "enlarge"] = "enlarge"  # what they do below it: leave the scale out, or see its picture enlarged to `smallest`
    codebook: float = 1.0  # codes towards features; summed over the code's width, of which LlamaGen takes the mean
    commitment: float = 0.25  # features towards codes, likewise
    entropy: float = 0.0  # each feature sure of its code, all codes used alike
    gradient: Literal["straight-through", "rotation"] = "straight-through"  # how it passes the codes
    continuous: float = 0.0  # share of the steps at the start in which features are rebuilt as they are, before codes take their place
    restart_every: int = 100  # steps between two looks for unused codes, which then start anew from features; 0 never

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand(self, COUNT, "scales smallest")
        _demand(self, NOT_NEGATIVE, "l1 l2 codebook commitment entropy restart_every")
        _demand(self, SHARE, "continuous")
        demand_grids(self.sizes, 2 ** (len(self.model.multipliers) - 1))
        if self.small == "mask" and (self.perceptual.weight or self.adversary.weight) and max(map(min, self.sizes)) < self.smallest:
            what = f"small=mask leaves out all pictures below smallest={self.smallest} px on a side, and sizes holds none that has as much"
            raise ValueError(f"{what}; give small=enlarge, or larger sizes")
        if self.adversary.weight and self.adversary.start >= self.steps:
            raise ValueError(f"adversary.start is {self.adversary.start} of {self.steps} steps; lower it, or set adversary.weight=0")
        if self.data.kind == "features":
            raise ValueError("data.kind is features; a tokenizer is trained on pictures")
        if self.learns == "decoder":
            if not self.init_from:
                raise ValueError("learns is decoder; name the tokenizer whose codes it is to paint as init_from, or set learns=all")
            _demand_unset(self, "codebook commitment entropy gradient continuous restart_every", "a run in which only the decoder learns")


@dataclass
class TransformerShape:
    """`flexvar.TransformerConfig`, as a file says it; classes and codes follow from the data and the tokenizer."""

    depth: int = 16
    width: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    trained_grid: int = 0  # side of the largest grid it is trained on; 0 means what follows from the sizes
    table_side: int = 0
    positions: Literal["area", "smooth"] = "smooth"
    shared_modulation: bool = False

    def __post_init__(self) -> None:
        _demand(self, COUNT, "model.depth")
        _demand(self, NOT_NEGATIVE, "model.width model.heads model.table_side model.trained_grid")
        _demand(self, POSITIVE, "model.mlp_ratio")


@dataclass
class ScoresConfig:
    """FID and its kin of what the averaged weights draw, while they are trained."""

    reference: str = ""  # an .npz or a folder, as of `flexvar evaluate model`, of the size that the model draws; empty: nothing is scored
    every: int = 10000  # steps, a multiple of save_every; the last step is scored too
    per_class: int = 5  # pictures of each class; of 1,000 classes that makes 5,000
    extractor: str = "inception"  # or classifier, or a network's file
    weights: str = ""  # the Inception's; empty: fetched once

    def __post_init__(self) -> None:
        _demand(self, COUNT, "scores.every scores.per_class")


@dataclass
class TransformerRun(RunConfig):
    """Training a transformer on the codes of a frozen tokenizer (paper, section 3.2)."""

    tokenizer: str = ""  # a model folder, or a bundled or released name
    model: TransformerShape = field(default_factory=TransformerShape)
    gain_factor: float = 1e-3  # of the modulation's gains at the beginning; 1e-4 in the released d24
    schedules: RandomPolicy = "paper"  # how the scales of a step are drawn
    finest: int = 0  # codes on the longer side of the finest scale; 0 means all that the picture has
    attention: Literal["mask", "by-scale", "flex", "padded"] = "by-scale"  # how it is worked out; all ways give the same
    compile: str = ""  # a backend of torch.compile for what is not attention, for example inductor
    recompute: bool = False  # each block's activations are worked out again for the gradient instead of kept: less memory, a third slower
    label_drop: float = 0.1  # share of the pictures that are learnt without their class
    drop_path: float = 0.0  # of the last block's paths, rising linearly from 0; the released models use 0.1 · depth / 24
    sheet_labels: list[int] = field(default_factory=lambda: list(range(8)))
    guidance_scale: float = 2.5  # of the sheets, and the finished model's default
    top_p: float = 0.95  # likewise: candidates are kept up to this probability, 0 or 1 for all of them
    scores: ScoresConfig = field(default_factory=ScoresConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand(self, BELOW_ONE, "label_drop drop_path")
        _demand(self, LABELS, "sheet_labels")
        _demand(self, NOT_NEGATIVE, "guidance_scale finest")
        _demand(self, SHARE, "top_p")
        _demand(self, POSITIVE, "gain_factor")
        if self.scores.reference and self.scores.every % self.save_every:
            raise ValueError(f"scores.every is {self.scores.every}; it must be a multiple of save_every, which is {self.save_every}")


@dataclass
class CacheRun:
    """Storing the features of a data set, several views of each picture, for the training of transformers."""

    out: str = ""  # folder of the cache; the same command again goes on where it stopped
    tokenizer: str = ""  # a model folder, or a bundled or released name
    seed: int = 0
    sizes: list[list[int]] = field(default_factory=lambda: [[256, 256]])  # (height, width) in pixels; each view is stored at each of them
    views: int = 2  # of each picture, drawn as training draws them
    batch: int = 32  # pictures at a time
    shard: int = 4096  # pictures in one file
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of the tokenizer's encoder
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _demand(self, COUNT, "views batch shard")
        _demand(self, NOT_NEGATIVE, "seed")
        _demand(self, SIZES, "sizes")
        if not self.out:
            raise ValueError("out is empty; name the folder of the cache")
        if self.data.kind in ("features", "shards", "hub-stream"):
            raise ValueError(f"data.kind is {self.data.kind}; features are cached from folder, hub, emoji or shapes")
        _demand_unset(self.data, "data.held_out data.fixed_views", "a cache, which holds `views` of each picture of `data`")
