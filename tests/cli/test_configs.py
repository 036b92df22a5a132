"""Every YAML becomes its dataclass, says what the dataclass says, and what is misspelt is refused with the nearest
name.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sgpt.cli.command import _without_empty_groups
from sgpt.cli.compose import plain, typed
from sgpt.cli.launch import _check_processes, accelerate
from sgpt.data.sources.columns import COLUMN_ROLES
from sgpt.encoder.export import ExportConfig
from sgpt.evaluation.mteb import MtebConfig
from sgpt.evaluation.runs import CompareConfig
from sgpt.evaluation.strength import MergeConfig
from sgpt.evaluation.systems import EvaluateConfig
from sgpt.inspection.inspect import InspectConfig
from sgpt.mining.config import MineConfig
from sgpt.pretraining.model import PretrainConfig
from sgpt.retrieval.encode import EncodeConfig
from sgpt.retrieval.rerank import RerankConfig
from sgpt.retrieval.searcher import SearchConfig
from sgpt.runtime.errors import InputError
from sgpt.runtime.overrides import TextKey, as_typed, texts
from sgpt.serving.config import ServeConfig
from sgpt.sweeps.study import StudyConfig
from sgpt.training.config import TrainConfig
from sgpt.training.tuning import TuningConfig
from sgpt.verification.config import VerifyConfig

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
SCHEMAS = {
    "train": TrainConfig, "evaluate": EvaluateConfig, "search": SearchConfig, "export": ExportConfig,
    "pretrain": PretrainConfig, "mine": MineConfig,
    "encode": EncodeConfig, "inspect_data": InspectConfig, "rerank": RerankConfig, "evaluate_mteb": MtebConfig,
    "merge": MergeConfig, "serve": ServeConfig, "verify": VerifyConfig, "sweep": StudyConfig,
    "compare": CompareConfig,
}  # fmt: skip
SCRIPTS = {"biencoder": "train"} | {name: name for name in SCHEMAS if name != "train"}
OPTIONS = sorted((file.parent.name, file.stem) for file in CONFIGS.glob("*/*.yaml") if file.parent.name != "accelerate")


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def start(script: str, *arguments: str, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, *options, str(REPOSITORY / "train" / f"{script}.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_every_script_and_config_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == SCHEMAS.keys()
    assert {path.stem for path in (REPOSITORY / "train").glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_every_yaml_of_every_group_becomes_a_training_configuration(group, option):
    config = typed(TrainConfig, composed("train", f"{group}={option}"))
    assert type(config) is TrainConfig
    if hasattr(getattr(config, group, None), "name"):
        assert getattr(config, group).name == option  # the option is the row of the table that it is called after


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
def test_the_first_blocks_of_every_model_are_a_key_of_the_command_line(model):
    assert typed(TrainConfig, composed("train", f"model={model}", "model.layers=2")).model.layers == 2


@pytest.mark.parametrize("method", ["bitfit", "bitfit_norm"])
def test_where_biases_are_added_and_which_blocks_learn_are_keys_of_the_command_line(method):
    """A key that the YAML of its group does not state would be unknown there."""
    overrides = (f"tuning={method}", "tuning.add_biases=attention", "tuning.layers=last:2")
    config = typed(TrainConfig, composed("train", *overrides))
    assert config.tuning == TuningConfig(method, add_biases="attention", layers="last:2")
    assert typed(TrainConfig, composed("train", "tuning=full", "tuning.layers=last:2")).tuning.layers == "last:2"


@pytest.mark.parametrize("experiment", [option for group, option in OPTIONS if group == "experiment"])
def test_every_experiment_can_be_shrunk_and_overridden(experiment):
    config = typed(
        TrainConfig,
        composed("train", f"experiment={experiment}", "debug=tiny", "optim.learning_rate=0.5", "trainer.seed=7")
    )
    assert config.name == experiment
    assert (config.trainer.max_steps, config.data.limit) == (4, 96)  # debug is stronger than the experiment
    assert (config.optim.learning_rate, config.trainer.seed) == (0.5, 7)  # and the command line than both


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_defaults_of_the_yaml_are_those_of_the_dataclasses(name):
    assert asdict(typed(SCHEMAS[name], composed(name))) == asdict(SCHEMAS[name]())


@pytest.mark.parametrize("group", ["tuning", "loss", "optim", "trainer", "data", "markers", "pooling", "model"])
def test_every_option_of_a_group_stands_alone_with_known_keys(group):
    """Read as plain YAML: a key that no dataclass has would be refused on composing; one that is not there keeps its
    default.
    """
    known = asdict(TrainConfig())[group].keys()
    for file in (CONFIGS / group).glob("*.yaml"):
        assert yaml.safe_load(file.read_text()).keys() - {"defaults"} <= known


# The original's settings: its own command lines, reference sgpt.md 1.2 and 1.3.
NLI = {"125m": 128, "1_3b": 32, "2_7b": 12, "5_8b": 4}
MSMARCO = {"125m": 32, "1_3b": 8, "2_7b": 8, "5_8b": 2}


@pytest.mark.parametrize("size", NLI)
def test_the_symmetric_presets_are_the_originals(size):
    config = typed(TrainConfig, composed("train", f"experiment=nli_{size}"))
    assert (
        config.trainer.queries_per_process, config.optim.learning_rate, config.optim.warmup_steps, config.trainer.epochs
    ) == (128, 32e-5, 0.1, 1)
    assert f"chunk size: {NLI[size]}" in (CONFIGS / "experiment" / f"nli_{size}.yaml").read_text()
    assert (
        config.markers.name, config.markers.query_max_tokens, config.markers.document_max_tokens
    ) == ("none", 75, 75)
    assert (
        config.tuning.name, config.pooling.name, config.loss.scale, config.loss.symmetric
    ) == ("bitfit", "weighted_mean", 20, False)
    assert config.data.num_hard_negatives == 1


@pytest.mark.parametrize("size", MSMARCO)
def test_the_asymmetric_presets_are_the_originals(size):
    config = typed(TrainConfig, composed("train", f"experiment=msmarco_{size}"))
    assert (
        config.trainer.queries_per_process, config.optim.learning_rate, config.optim.warmup_steps, config.trainer.epochs
    ) == (32, 4e-4, 1000, 10)
    assert f"chunk size: {MSMARCO[size]}" in (CONFIGS / "experiment" / f"msmarco_{size}.yaml").read_text()
    assert (
        config.markers.name, config.markers.query_max_tokens, config.markers.original_limit
    ) == ("brackets", 300, True)
    assert (config.tuning.name, config.pooling.name, config.loss.scale) == ("bitfit", "weighted_mean", 20)


def test_the_saved_configuration_is_read_back_equal():
    config = typed(TrainConfig, composed("train", "experiment=nli_125m", "optim.learning_rate=1e-5"))
    again = typed(TrainConfig, OmegaConf.create(yaml.safe_load(yaml.safe_dump(plain(config), sort_keys=False))))
    assert again == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.queries_per_process=many",
            r"trainer\.queries_per_process: Value 'many' of type 'str' could not be converted to Integer"
        ),
        ("trainer.queries_per_process=0", r"trainer\.queries_per_process=0 must be 1 or more"),
        ("trainer.precision=fp8", r"trainer\.precision='fp8' is unknown; choose fp32 or bf16"),
        ("trainer.max_steps=0", r"trainer\.max_steps=0 must be 1 or more, or null for whole epochs"),
        ("trainer.evaluate_every_steps=5", r"dev\.retrieval, dev\.sts and dev\.pairs are empty; name a dev set"),
        ("optim.learning_rate=-1", r"optim\.learning_rate=-1\.0 must be positive"),
        ("optim.schedule=steps", r"optim\.schedule='steps' is unknown; choose linear, cosine or constant"),
        ("optim.warmup_steps=-1", r"optim\.warmup_steps=-1\.0 must be 0 or more"),
        ("loss.scale=0", r"loss\.scale=0\.0 must be positive"),
        ("model.dtype=int4", r"model\.dtype='int4' is unknown; choose float32, bfloat16, float16, int8 or nf4"),
        ("pooling.name=median", r"pooling\.name='median' is unknown"),
        ("logging.tracker=paper", r"logging\.tracker='paper' is unknown; choose wandb, tensorboard, trackio or null"),
        ("name=../elsewhere", r"name='\.\./elsewhere' cannot be a folder below runs/; use one that"),
        ("+optim.lr=1", r"optim\.lr: Key 'lr' not in 'OptimConfig'"),
        (
            "+data.columns.anchor=query",
            r"data\.columns has the unknown key 'anchor'; it maps query, positive, negative, label, score"
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(override, message):
    with pytest.raises(InputError, match=message) as caught:
        typed(TrainConfig, composed("train", override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "biencoder", ["experiment=pydocs", "trainer.max_step=1"],
            "trainer.max_step=1: there is no key 'trainer.max_step'; did you mean trainer.max_steps"
        ),
        (
            "biencoder", ["pooling=weighted"],
            "pooling=weighted: there is no 'weighted' in configs/pooling/; did you mean weighted_mean"
        ),
        (
            "biencoder", ["experiment=pydoc"],
            "experiment=pydoc: there is no 'pydoc' in configs/experiment/; did you mean pydocs"
        ),
        ("biencoder", ["tunning=bitfit"], "tunning=bitfit: there is no key 'tunning'; did you mean tuning"),
        (
            "biencoder", ["data.columns={anchor: a}"],
            "data.columns={anchor: a}: data.columns has other keys; they are data.columns.label, data."
        ),
        ("evaluate", ["modell=x"], "modell=x: there is no key 'modell'; did you mean model"),
        ("search", ["querry=x"], "querry=x: there is no key 'querry'; did you mean query"),
    ],
)
def test_a_misspelt_key_or_option_is_refused_with_the_nearest_and_exit_code_2(script, arguments, message, tmp_path):
    ended = start(script, *arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_keys_and_does_not_import_torch(script, tmp_path):
    ended = start(script, "--help", cwd=tmp_path, options=("-X", "importtime"))
    assert ended.returncode == 0
    assert all(f"\n{key}:" in ended.stdout for key in asdict(SCHEMAS[SCRIPTS[script]]()) if key != "markers")
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "numpy", "accelerate", "datasets"}


@pytest.mark.parametrize(("typed_in", "read"), [
    ("parse a date, from a string", None), ("what is x = y?", None), ("it's {a} [b] $c", None), ('say "hi"', None),
    ("true", None), ("5", None),
    ("back\\slash", None), ("an end\\", None), ("a \\' quote", None), ("${oc.env:HOME}", None), ("", None),
    ("{document}\\n", "{document}\n"), ("'in quotes, already'", "in quotes, already"),
])  # fmt: skip
def test_a_text_is_read_as_it_was_typed(typed_in, read):
    value = OverridesParser.create().parse_overrides(
        as_typed([f"query={typed_in}"], "search", ("query", "prompt"))
    )[0].value()
    assert OmegaConf.create({"query": value}).query == (typed_in if read is None else read)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_keys_that_are_taken_for_texts_are_those_of_the_dataclasses(name):
    """Lists of keys in braces, data.sources, are no texts; null by default or by its type is null."""
    def keys(schema: type, prefix: str = "") -> dict[str, TextKey]:
        found: dict[str, TextKey] = {}
        for key, kind in get_type_hints(schema).items():
            plain, nullable = (get_args(kind)[0], True) if type(None) in get_args(kind) else (kind, False)
            if depth := {str: 0, list[str]: 1, list[list[str]]: 2}.get(plain, -1) + 1:
                found[prefix + key] = TextKey(depth - 1, nullable)
            elif plain == dict[str, str | None]:
                found |= {f"{prefix}{key}.{role}": TextKey(0, True) for role in COLUMN_ROLES}
            elif plain == dict[str, str]:
                found[f"{prefix}{key}.*"] = TextKey(0, False)
            elif is_dataclass(plain) and not nullable:
                found |= keys(plain, f"{prefix}{key}.")
        return found

    assert texts(name) == keys(SCHEMAS[name])


@pytest.mark.parametrize(("script", "typed_in", "key", "read"), [
    ("train", "name=1e5", "name", "1e5"), ("train", "name=null", "name", "null"),
    ("train", "name=true", "name", "true"),
    ("train", "name=007", "name", "007"), ("train", "name=1_000", "name", "1_000"),
    ("train", "name=0x1f", "name", "0x1f"),
    ("train", "runs=a,b", "runs", "a,b"),
    ("train", "data.path=/x/it's {a} [b] = c\\n", "data.path", "/x/it's {a} [b] = c\\n"),
    ("train", "data.path=~/$x/é", "data.path", "~/$x/é"), ("train", "data.path=a${b", "data.path", "a${b"),
    ("train", "data.path='a b'", "data.path", "a b"),
    ("train", "data.path=\\${name}", "data.path", "${name}"), ("train", "data.path=end\\", "data.path", "end\\"),
    ("train", "data.columns.query=the question, asked", "data.columns.query", "the question, asked"),
    ("train", "data.columns={query: it's, label: null}", "data.columns.query", "it's"),
    ("train", "name=of-${tuning.name}", "name", "of-bitfit"),  # as ever
    ("train", "evaluation.split=null", "evaluation.split", None), ("train", "loss.guide=null", "loss.guide", None),
    ("train", "evaluation.retrieval=[/x/epoch=3, /y z]", "evaluation.retrieval", ["/x/epoch=3", "/y z"]),
    (
        "train", "evaluation.sts=['/a,b',it's,/c[1,2],1e5,true]", "evaluation.sts",
        ["/a,b", "it's", "/c[1,2]", "1e5", "true"]
    ),
    ("train", "evaluation.sts=[]", "evaluation.sts", []),
    ("train", "data.sources=[{path: /x y=3, limit: 7}, {path: 1e5}]", "data.sources[0].path", "/x y=3"),
    ("train", "data.sources=[{path: /x y=3, limit: 7}, {path: 1e5}]", "data.sources[1].path", "1e5"),
    ("train", "data.sources=[{path: /x y=3, limit: 7}, {path: 1e5}]", "data.sources[0].limit", 7),
    ("serve", "deltas={legal: runs/a b, health: runs/it's}", "deltas.legal", "runs/a b"),
    ("serve", "deltas={legal: runs/a b, health: runs/it's}", "deltas.health", "runs/it's"),
    ("serve", "deltas.legal=1e5", "deltas.legal", "1e5"), ("serve", "deltas={a: 1e5}", "deltas.a", "1e5"),
    ("serve", "api_key=${oc.env:PWD}", "api_key", os.environ.get("PWD")), ("serve", "prompt=${a}", "prompt", "${a}"),
    ("serve", "prompt='{document}\\n\"it\\'s\"'", "prompt", '{document}\n"it\'s"'),
    ("serve", "prompt='in \\${x}: {document}'", "prompt", "in ${x}: {document}"),
    ("serve", 'prompt="{document}\\n"', "prompt", "{document}\n"),
    ("evaluate", "runs=[x]", "runs", "[x]"), ("evaluate", "split=1e5", "split", "1e5"),
    ("evaluate", "markers={name: none, query_max_tokens: 30}", "markers.query_max_tokens", 30),
    ("rerank", "shots=[[a document, true],['b, c',d=e]]", "shots", [["a document", "true"], ["b, c", "d=e"]]),
])  # fmt: skip
def test_what_is_typed_is_what_the_script_gets(script, typed_in, key, read):
    besides = {  # to have an effect
        "shots": ["prompt={document}", "shot={document}{query}"], "prompt": ["rerank=true"],
        "runs": ["retrieval=[x]"] if script == "evaluate" else [],
    }  # fmt: skip
    given = as_typed([typed_in, *besides.get(key, [])], script, ("prompt", "shot"))
    tree = composed(script, *given)
    assert OmegaConf.select(tree, key) == read
    typed(SCHEMAS[script], tree)


def test_a_sweep_keeps_its_commas_and_functions():
    swept = ["-m", "tuning.name=bitfit,full", "data.path=choice(a,b)"]
    assert as_typed(swept, "train") == swept
    assert as_typed(["-m", "data.path='a,b'", "runs=a b"], "train") == ["-m", "data.path='a,b'", "runs='a b'"]


def test_the_advice_for_a_value_that_hydra_cannot_read_works_when_typed(tmp_path):
    """Of Hydra's own keys, which reach it as they are."""
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(REPOSITORY / 'train' / 'biencoder.py'))}"
    first = subprocess.run(
        ["bash", "-c", f"{command} \"hydra.run.dir=it's {{a}} = b\""], cwd=tmp_path, capture_output=True, text=True
    )
    said, _, advice = first.stderr.strip().partition("; put it into quotes: ")
    assert (first.returncode, said) == (
        2, "error: hydra.run.dir=it's {a} = b: what the value holds means something to Hydra"
    )
    again = subprocess.run(["bash", "-c", f"{command} {advice}"], cwd=tmp_path, capture_output=True, text=True)
    error = again.stderr.splitlines()[-1]  # a busy machine says before that it is still at it
    assert error == "error: data.path is empty; set data.path=<file or folder> for data=file"
    assert [path.name for path in tmp_path.iterdir()] == ["it's {a} = b"]


def test_a_group_that_may_be_empty_is_left_out_by_null_and_another_is_refused(capsys):
    assert _without_empty_groups(["experiment=null", "debug=null", "name=null"]) == ["name=null"]
    with pytest.raises(SystemExit) as end:
        _without_empty_groups(["pooling=null"])
    assert end.value.code == 2
    expected = (
        "error: pooling=null: pooling is one of cls, last_token, "
        "max, mean, weighted_mean\n"
    )
    assert capsys.readouterr().err == expected


def test_fewer_processes_than_were_asked_for_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError,
        match=r"2 processes were asked for, and 1 runs by itself\. On a CPU start them as ACCELERATE_USE_CPU=true"
    ):
        _check_processes(1)


def test_a_wrapper_of_accelerate_that_would_have_no_effect_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"distributed_type: DEEPSPEED has no effect.*trainer\.shard_trunk=true"):
        accelerate(precision="fp32", seed=0)
