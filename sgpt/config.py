"""What the scripts are given, as typed attributes. Hydra composes YAML; past `typed` there are only dataclasses."""

from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgpt.data.readers import DataConfig
from sgpt.errors import InputError
from sgpt.evaluate import EvaluationConfig
from sgpt.loss import LossConfig
from sgpt.markers import ROLES, MarkersConfig
from sgpt.model import ModelConfig
from sgpt.optim import OptimConfig
from sgpt.pooling import PoolingConfig
from sgpt.trainer import TrainerConfig
from sgpt.tuning import TuningConfig


@dataclass
class LoggingConfig:
    """tracker: null or wandb; never a condition of running. mode: online, or offline and `wandb sync` later."""

    tracker: str | None = None
    project: str = "sgpt"
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.tracker not in (None, "wandb"):
            raise InputError(f"logging.tracker={self.tracker!r} is unknown; choose wandb or null")


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
        if self.examples < 1 or self.batches < 0:
            raise InputError(f"examples={self.examples} must be 1 or more, and batches={self.batches} must be 0 or more")


@dataclass
class EvaluateConfig:
    """model: run, export, adapter, base or sentence-transformers folder. markers, pooling: only for bases without a contract.

    output: JSON keyed by set name.
    """

    model: str = ""
    retrieval: list[str] = field(default_factory=list)
    sts: list[str] = field(default_factory=list)
    split: str = "test"
    bm25: bool = True
    output: str | None = None
    pooling: str | None = None
    markers: MarkersConfig | None = None


@dataclass
class ExportConfig:
    """run: folder of a run. output: folder of the export; null is the run's own."""

    run: str = ""
    output: str | None = None


@dataclass
class SearchConfig:
    """run: run or export. query: null asks at a prompt. corpus: JSON lines of _id and text, or a BEIR folder; null takes

    what the run was trained to search. top: results shown.
    """

    run: str = ""
    query: str | None = None
    corpus: str | None = None
    top: int = 10


Config = TypeVar("Config")


def typed(schema: type[Config], composed: DictConfig) -> Config:
    """The dataclass with the composed values; InputError for an unknown key or a value of the wrong type."""
    try:
        plain = OmegaConf.create({key: value for key, value in OmegaConf.to_container(composed, resolve=True).items() if key != "hydra"})
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise InputError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from error


def plain(config: Any) -> dict:
    """As JSON and YAML take it."""
    return asdict(config)
