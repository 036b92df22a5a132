"""Every key of every script with values that cannot be: a configuration, or one sentence that names the key and the
value.
"""

import math
import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from sgpt.cli.compose import typed
from sgpt.data.readers import SourceConfig, read_examples
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
from sgpt.serving.config import ServeConfig
from sgpt.sweeps.study import StudyConfig
from sgpt.training.config import TrainConfig
from sgpt.verification.config import VerifyConfig

SCRIPTS = (
    TrainConfig, InspectConfig, EvaluateConfig, ExportConfig, SearchConfig, PretrainConfig, MineConfig, RerankConfig,
    MtebConfig, MergeConfig, ServeConfig, VerifyConfig, EncodeConfig,
    StudyConfig, CompareConfig,
)
HOSTILE = (
    math.nan, math.inf, -math.inf, -1, -1.5, 0, 0.5, 1.5, 1e30, 1e300, 2**31, 2**63, 2**70, 10**400, True, None, "",
    " ", "x" * 100_000,
    "/proc/x", "a\0b", "\udce4", "null", ["a\0b"], [], {}, {"a": 1},
)  # fmt: skip
NEEDED = {  # by keys which nothing reads else
    "guide_margin": {"guide": "a"}, "rerank": {"retrieval": ["a"]}, "grouping_model": {"batches": "hard"},
    "model": {"source": "model"}, "trec": {"source": "run", "first": "run"}, "encoder": {"first": "encoder"},
    "reduce": {"dimensions": 8}, "dimensions": {"reduce": "pca"},
}  # fmt: skip


def nested(schema: type) -> list[type]:
    """The dataclass and those in its fields."""
    inner = [
        option for kind in get_type_hints(schema).values() for option in (kind, *get_args(kind)) if is_dataclass(option)
    ]
    return [schema, *(found for option in inner for found in nested(option))]


SCHEMAS = list(dict.fromkeys(found for script in SCRIPTS for found in nested(script)))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_value_of_every_key_is_taken_or_refused_by_key(schema):
    known = {field.name: get_type_hints(schema)[field.name] for field in fields(schema)}
    inherited = {field.name for field in fields(TrainConfig)} if schema is InspectConfig else set()
    for key in known.keys() - inherited:
        for value in HOSTILE:
            others = {name: needed for name, needed in NEEDED.get(key, {}).items() if name in known}
            try:
                typed(schema, OmegaConf.create(others | {key: value}))
                told = None
            except InputError as error:
                told = str(error)
            if told is not None:
                assert key in told, (value, told)
                assert "\n" not in told
            else:
                assert "\0" not in str(value)
                number = isinstance(value, float | int) and known[key] not in (str, str | None, bool)
                assert not number or abs(value) <= 1e30, f"{key} takes {value}"


@pytest.mark.parametrize("reader", ["file", "beir", "nli", "msmarco"])
def test_a_folder_is_looked_at_for_what_it_holds_before_it_is_read(tmp_path, reader):
    """It holds a file that would take hours, a link to itself and no data."""
    with (tmp_path / "image.iso").open("wb") as large:
        large.truncate(2**43)
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        read_examples(SourceConfig(name=reader, path=str(tmp_path)), tmp_path / "cache")
