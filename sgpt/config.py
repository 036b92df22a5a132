"""What the scripts are given, as typed attributes. Hydra composes YAML; past `typed` there are only dataclasses."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from sgpt.data.readers import DataConfig
from sgpt.errors import InputError
from sgpt.evaluate import BEIR_ROOT, EvaluationConfig
from sgpt.index import IndexConfig
from sgpt.loss import LossConfig
from sgpt.markers import ROLES, MarkersConfig
from sgpt.model import ModelConfig
from sgpt.optim import OptimConfig
from sgpt.pooling import PoolingConfig
from sgpt.trainer import TrainerConfig
from sgpt.tuning import TuningConfig
from sgpt.values import COUNT, COUNT_OR_NONE, LARGEST, check_choice, check_ranges, check_shapes, check_texts


@dataclass
class LoggingConfig:
    """tracker: null or wandb; never a condition of running. mode: online, or offline and `wandb sync` later."""

    tracker: str | None = None
    project: str = "sgpt"
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.tracker not in (None, "wandb"):
            raise InputError(f"logging.tracker={self.tracker!r} is unknown; choose wandb or null")
        check_choice("logging.mode", self.mode, ("online", "offline", "disabled"))
        if not self.project or len(self.project) > 128 or (odd := set(self.project) & {*"/\\#?%:"}):
            what = f"holds {min(odd)!r}" if self.project and len(self.project) <= 128 else f"has {len(self.project)} letters"
            raise InputError(f"logging.project={self.project!r} {what}; wandb takes 1 to 128, without / \\ # ? % :")


@dataclass
class TrainConfig:
    """One training run. name: its folder below `runs`. resume: go on with an existing one."""

    name: str = "run"
    runs: str = "runs"
    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    markers: MarkersConfig = field(default_factory=MarkersConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dev: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(split="dev", bm25=False))
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(("/", ".")) or ".." in self.name.split("/"):
            raise InputError(f"name={self.name!r} is no folder name below {self.runs}/")
        if not self.model.path:
            raise InputError("model.path is empty; set model.path=<folder or hub id>, or choose a model=<name of configs/model>")
        for key in ("evaluation", "dev"):
            check_ranges(getattr(self, key), f"{key}.", limit=COUNT.or_null("for whole sets"))
        longest = max(self.markers.max_tokens(role) for role in ROLES)
        if self.trainer.tokens_per_pack < longest:
            raise InputError(
                f"trainer.tokens_per_pack={self.trainer.tokens_per_pack} is less than one text of {longest} tokens (markers.*_max_tokens); raise it"
            )
        if self.trainer.evaluate_every_steps and not (self.dev.retrieval or self.dev.sts):
            raise InputError("trainer.evaluate_every_steps is set, but dev.retrieval and dev.sts are empty; name a dev set or set it to 0")


@dataclass
class InspectConfig(TrainConfig):
    """Whatever training takes, so that the same overrides can stand here. output: the page; null is <runs>/<name>.inspection.html.

    examples: drawn at random from each source for what needs the texts themselves. batches: shown as the model will see them.
    """

    output: str | None = None
    examples: int = 20_000
    batches: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, examples=COUNT, batches=COUNT_OR_NONE)


@dataclass
class EvaluateConfig:
    """model: run, export, adapter, base or sentence-transformers folder. markers, pooling: only for bases without a contract.

    retrieval: BEIR folders, or names of BEIR's sets, which are looked for in beir_root and else downloaded there.
    sts: files of scored sentence pairs. useb: USEB's folder data-eval. split: null is each set's own, test but for msmarco.
    bm25, fuse: systems beside the model, on the retrieval sets; the weight of one fusion is tuned on dev_split.
    rerank: a decoder, folder or hub id, that scores the best `depth` documents of a query again by `prompt`.
    runs: folder of a TREC run for each set and system. output: JSON of the model's metrics keyed by set name;
    systems_output: JSON of all systems' metrics, intervals and bounds.
    """

    model: str = ""
    retrieval: list[str] = field(default_factory=list)
    sts: list[str] = field(default_factory=list)
    useb: str | None = None
    split: str | None = None
    dev_split: str = "dev"
    beir_root: str = BEIR_ROOT
    bm25: bool = True
    fuse: bool = True
    rerank: str | None = None
    prompt: str = "G"
    depth: int = 100
    runs: str | None = None
    output: str | None = None
    systems_output: str | None = None
    pooling: str | None = None
    markers: MarkersConfig | None = None

    def __post_init__(self) -> None:
        check_ranges(self, depth=COUNT)
        if self.rerank and not self.retrieval:
            raise InputError(f"rerank={self.rerank} has nothing to rank again; set retrieval=[<BEIR folder or name>,…], or leave it out")


@dataclass
class ExportConfig:
    """run: folder of a run. output: folder of the export; null is the run's own."""

    run: str = ""
    output: str | None = None


@dataclass
class SearchConfig:
    """run: run or export. query: null asks at a prompt. corpus: JSON lines of _id and text, or a BEIR folder; null takes

    what the run was trained to search. top: results shown. index: how the corpus is kept and searched.
    rerank: score the best `depth` documents again by SGPT-CE with `prompt` and the run's own base.
    """

    run: str = ""
    query: str | None = None
    corpus: str | None = None
    top: int = 10
    rerank: bool = False
    prompt: str = "G"
    depth: int = 100
    index: IndexConfig = field(default_factory=IndexConfig)

    def __post_init__(self) -> None:
        check_ranges(self, top=COUNT, depth=COUNT)
        if self.query is not None and not self.query.strip():
            raise InputError("query is empty; leave it out to be asked at a prompt")


Config = TypeVar("Config")


def typed(schema: type[Config], composed: DictConfig) -> Config:
    """The dataclass with the composed values; InputError for an unknown key or a value of the wrong type."""
    try:
        tree = {key: value for key, value in OmegaConf.to_container(composed, resolve=True).items() if key != "hydra"}
        check_shapes(schema, tree)
        _refuse_endless_numbers(tree)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(literal(tree))))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        advice = " (for the characters themselves write \\${ in place of ${)" if isinstance(error, InterpolationResolutionError | GrammarParseError) else ""
        raise InputError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}{advice}") from error
    check_texts(config)
    return config


def literal(tree: Any) -> Any:
    """With texts in which ${ is ${ to OmegaConf: what has been resolved, or was saved, refers to nothing any more."""
    if isinstance(tree, dict):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def _refuse_endless_numbers(value: Any, key: str = "") -> None:
    """A whole number of hundreds of digits is read as one, and is no fraction where one is asked for."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_endless_numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{key}={value} must be at most {LARGEST:g}, as every number of a configuration")


def plain(config: Any) -> dict:
    """As JSON and YAML take it."""
    return asdict(config)
