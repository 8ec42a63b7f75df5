from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from flexvar import TokenizerConfig, TransformerConfig
from flexvar.training.config import read_config
from flexvar.training.settings import (
    CacheRun,
    DataConfig,
    OptimiserConfig,
    RunConfig,
    TokenizerRun,
    TokenizerShape,
    TransformerRun,
    TransformerShape,
)

BOTH = [
    ("steps=0", "steps is 0; it must be at least 1"),
    ("batch=0", "batch is 0; it must be at least 1"),
    ("report_every=0", "report_every is 0; it must be at least 1"),
    ("save_every=-1", "save_every is -1; it must be at least 1"),
    ("sheet_every=0", "sheet_every is 0; it must be at least 1"),
    ("seed=-1", "seed is -1; it must be a number of at least 0"),
    ("workers=-2", "workers is -2; it must be at least 0, or -1"),
    ("accumulate=0", "accumulate is 0; it must be at least 1"),
    ("accumulate=3", "batch is 64 and accumulate 3; the batch must be a multiple"),
    ("keep=0", "keep is 0"),
    ("bad_steps=0", "bad_steps is 0"),
    ("measure=-1", "measure is -1"),
    ("precision=half", "precision: Invalid value 'half'"),
    ("data.shuffle=0", "data.shuffle is 0"),
    ("data.fixed_views=-1", "data.fixed_views is -1"),
    ("sizes=[]", "sizes is []; it must be a list of pairs"),
    ("sizes=[[64]]", "sizes is [[64]]; it must be a list of pairs"),
    ("sizes=[[64,0]]", "sizes is [[64, 0]]; it must be a list of pairs"),
    ("run=", "run is empty; name the folder of the run"),
    ("sizes=[64,64]", "sizes: it must be a list, and sizes one of pairs [height, width], for example [[64, 64]]"),
    ("sizes=64", "sizes: it must be a list"),
    ("data.views=0", "data.views is 0; it must be at least 1"),
    ("data.resize=[1.0]", "data.resize is [1.0]; it must be two numbers"),
    ("data.resize=[0.5,1.0]", "data.resize is [0.5, 1.0]; it must be two numbers"),
    ("data.resize=[1.2,1.1]", "data.resize is [1.2, 1.1]; it must be two numbers"),
    ("data.kind=cats", "data.kind: Invalid value 'cats', expected one of ['folder', 'hub', 'hub-stream', 'shards', 'features', "),
    ("optimiser.learning_rate=0", "optimiser.learning_rate is 0.0; it must be a number above 0"),
    ("optimiser.learning_rate=.nan", "optimiser.learning_rate is nan"),
    ("optimiser.learning_rate=.inf", "optimiser.learning_rate is inf"),
    ("optimiser.learning_rate=fast", "optimiser.learning_rate: Value 'fast'"),
    ("optimiser.betas=[0.9]", "optimiser.betas is [0.9]; it must be two numbers"),
    ("optimiser.betas=[0.9,1.0]", "optimiser.betas is [0.9, 1.0]; it must be two numbers"),
    ("optimiser.weight_decay=-1", "optimiser.weight_decay is -1.0"),
    ("optimiser.clip=-1", "optimiser.clip is -1.0"),
    ("optimiser.warm_up=1.5", "optimiser.warm_up is 1.5; it must be a number from 0 to 1"),
    ("optimiser.flat=-0.1", "optimiser.flat is -0.1"),
    ("optimiser.end=2", "optimiser.end is 2.0"),
    ("optimiser.ema=1", "optimiser.ema is 1.0; it must be at least 0 and below 1"),
    ("optimiser=3", "optimiser: Merge error"),
    ("stps=3", "'steps'"),
    ("optimiser.lerning_rate=3", "Did you mean: 'learning_rate'?"),
    ("optimiser.lr=3", "'lr' not in 'OptimiserConfig'; there are learning_rate, betas,"),
    ("data.viws=3", "Did you mean: 'views'?"),
    ("sizes=[[64", "'sizes=[[64' is not valid YAML"),
]
TOKENIZER = [
    ("scales=0", "scales is 0"),
    ("smallest=0", "smallest is 0"),
    ("entropy=-1", "entropy is -1.0"),
    ("target=round", "target: Invalid value 'round'"),
    ("small=hide", "small: Invalid value 'hide'"),
    ("gradient=none", "gradient: Invalid value 'none'"),
    ("perceptual.weight=1", "perceptual.weight needs two files"),
    ("perceptual.weight=-1", "perceptual.weight is -1.0"),
    ("adversary.weight=-1", "adversary.weight is -1.0"),
    ("adversary.layers=0", "adversary.layers is 0"),
    ("adversary.learning_rate=0", "adversary.learning_rate is 0.0"),
    ("data.kind=features", "a tokenizer is trained on pictures"),
    ("continuous=1.1", "continuous is 1.1"),
    ("restart_every=-1", "restart_every is -1"),
    ("l1=-1", "l1 is -1.0"),
    ("l2=-1", "l2 is -1.0"),
    ("codebook=-1", "codebook is -1.0"),
    ("commitment=-1", "commitment is -1.0"),
    ("model.channels=0", "model.channels is 0"),
    ("model.blocks=0", "model.blocks is 0"),
    ("model.z_channels=-2", "model.z_channels is -2"),
    ("model.norm_groups=0", "model.norm_groups is 0"),
    ("model.codebook_size=0", "model.codebook_size is 0"),
    ("model.code_width=0", "model.code_width is 0"),
    ("model.multipliers=[]", "model.multipliers is []"),
    ("model.multipliers=[1,0]", "model.multipliers is [1, 0]"),
    ("model.chanels=8", "Did you mean one of: 'channels'"),
    ("sizes=[[64,64],[64,72]]", "sizes holds [64, 72]: width 72 is not a multiple of 16"),
]
TRANSFORMER = [
    ("gain_factor=0", "gain_factor is 0.0"),
    ("finest=-1", "finest is -1"),
    ("attention=dense", "attention: Invalid value 'dense'"),
    ("label_drop=1", "label_drop is 1.0; it must be at least 0 and below 1"),
    ("drop_path=-0.1", "drop_path is -0.1"),
    ("sheet_labels=[]", "sheet_labels is []"),
    ("sheet_labels=[0,-1]", "sheet_labels is [0, -1]"),
    ("guidance_scale=-1", "guidance_scale is -1.0"),
    ("top_p=1.5", "top_p is 1.5; it must be a number from 0 to 1"),
    ("model.depth=0", "model.depth is 0"),
    ("model.trained_grid=-1", "model.trained_grid is -1"),
    ("model.width=-64", "model.width is -64"),
    ("model.heads=-2", "model.heads is -2"),
    ("model.table_side=-1", "model.table_side is -1"),
    ("model.mlp_ratio=0", "model.mlp_ratio is 0.0"),
    ("model.positions=round", "model.positions: Invalid value 'round'"),
    ("model.dept=3", "Did you mean: 'depth'?"),
]
UNUSED = {
    "data.path=x": "emoji shapes",
    "data.held_out=x": "emoji shapes",
    "data.split=x": "folder shards features emoji shapes",
    "data.image=x": "folder shards features emoji shapes",
    'data.label=""': "folder shards features emoji shapes",
    "data.classes=[a,b]": "folder hub features shapes",
    "data.views=3": "folder hub hub-stream shards features",
    "data.fixed_views=3": "hub-stream shards features",
    "data.flip=false": "features emoji shapes",
    "data.resize=[1,1]": "features emoji shapes",
    "data.shuffle=3": "folder hub features emoji shapes",
}
CACHE = [
    ('out=""', "out is empty; name the folder of the cache"),
    ("views=0", "views is 0"),
    ("shard=0", "shard is 0"),
    ("data.kind=shards", "features are cached from folder, hub, emoji or shapes"),
    ("data.held_out=x", "data.held_out means nothing to a cache"),
    ("data.fixed_views=2", "data.fixed_views means nothing to a cache"),
    ("outt=x", "Did you mean: 'out'?"),
]
CASES = [
    *((kind, word, words) for kind in (TokenizerRun, TransformerRun) for word, words in BOTH),
    *((TokenizerRun, word, words) for word, words in TOKENIZER),
    *((TransformerRun, word, words) for word, words in TRANSFORMER),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\n")
    return path


def fault(kind: type[RunConfig], path: Path, *words: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_config(kind, path, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "word", "words"), CASES, ids=[f"{kind.__name__}-{word}" for kind, word, _ in CASES])
def test_what_makes_no_sense_is_named_in_one_line(kind: type[RunConfig], word: str, words: str, path: Path) -> None:
    message = fault(kind, path, word)
    assert words in message
    assert str(path) in message or "is not valid YAML" in message


def test_a_setting_that_the_kind_of_data_ignores_is_refused(path: Path) -> None:
    kinds = get_args(get_type_hints(DataConfig)["kind"])
    assert {word.partition("=")[0].removeprefix("data.") for word in UNUSED} == {entry.name for entry in fields(DataConfig)} - {"kind"}
    for word, unused in UNUSED.items():
        key = word.partition("=")[0]
        for kind in kinds:
            if kind not in unused.split():
                read_config(TransformerRun, path, [f"data.kind={kind}", word])
                continue
            message = fault(TransformerRun, path, f"data.kind={kind}", word)
            assert f"{key} means nothing to data.kind={kind}, only to " in message
            read_config(TransformerRun, path, [f"data.kind={kind}", word, message.rpartition("or set ")[2]])


@pytest.mark.parametrize(("word", "words"), CACHE)
def test_what_makes_no_sense_for_a_cache(word: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "cache.yaml").write_text("out: features\n")
    assert words in fault(CacheRun, tmp_path / "cache.yaml", word)


@pytest.mark.parametrize(
    ("shape", "config", "derived"),
    [
        (TokenizerShape(), TokenizerConfig(), set()),
        (TransformerShape(), TransformerConfig(), {"width", "heads", "classes", "codebook_size", "code_width", "table_side"}),
    ],
)
def test_shapes_of_a_file_are_those_of_the_models(shape: object, config: object, derived: set[str]) -> None:
    """The same fields with the same defaults, but for what follows from others or from data and tokenizer, and for our own choices."""
    ours = {"positions": "smooth", "trained_grid": 0}
    for name in set(vars(config)) - derived:
        value = vars(shape)[name]
        assert (tuple(value) if isinstance(value, list) else value) == ours.get(name, vars(config)[name]), name
    assert set(vars(shape)) - set(vars(config)) == set()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- steps\n- batch", "holds a list at its top level; write settings"),
        ("steps: [", "is not valid YAML"),
        ("3", "is not valid YAML"),
        ("model: 3", "model: Merge error"),
        ("model:", "model: "),
        ("steps:", "steps: "),
        ("steps: ${stride}", "steps: Interpolation key 'stride' not found"),
        ("sizes: [64, 64]\nbatch: 8", "sizes: it must be a list"),
        ("optimiser: {clip: -1}\nbatch: 8", "optimiser.clip is -1.0"),
    ],
)
def test_a_file_that_makes_no_sense_is_named_too(text: str, words: str, path: Path) -> None:
    path.write_text(text)
    message = fault(TokenizerRun, path)
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize("kind", [TokenizerRun, TransformerRun])
def test_the_limits_themselves_are_allowed(kind: type[RunConfig], path: Path) -> None:
    words = [
        "optimiser.clip=0",
        "optimiser.warm_up=0",
        "optimiser.flat=1",
        "optimiser.end=0",
        "optimiser.ema=0",
        "data.resize=[1,1]",
        "steps=1",
    ]
    config = read_config(kind, path, [*words, "optimiser.betas=[0,0]"])
    assert config.optimiser == OptimiserConfig(betas=[0, 0], clip=0, warm_up=0, flat=1, end=0, ema=0)
    assert (config.steps, config.data.resize) == (1, [1, 1])
    read_config(TokenizerRun, path, ["workers=-1", "keep=1", "measure=0", "entropy=0", "smallest=1"])
    read_config(TokenizerRun, path, ["restart_every=0", "continuous=1", "l1=0", "l2=0", "scales=1"])
    read_config(TransformerRun, path, ["label_drop=0", "guidance_scale=0", "top_p=1", "sheet_labels=[0]", "sizes=[[40,120]]"])


def test_words_come_after_the_file_and_settings_may_refer_to_one_another(path: Path) -> None:
    path.write_text("steps: 3\nbatch: ${steps}\noptimiser: {clip: 1}\n")
    config = read_config(TokenizerRun, path, ["steps=5", "optimiser.ema=0.5"])
    assert (config.steps, config.batch, config.optimiser.clip, config.optimiser.ema) == (5, 5, 1, 0.5)


def test_a_config_is_read_without_torch(path: Path) -> None:
    script = (
        "import sys; from flexvar.training.config import *; from flexvar.training.settings import *; "
        "read_config(TokenizerRun, sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == 0
