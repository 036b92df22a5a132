"""The configuration of a training run: the dataclasses of its parts as one tree."""

from dataclasses import dataclass, field

from sgpt.data.readers import DataConfig
from sgpt.decoder.trunk import ModelConfig
from sgpt.encoder.pooling import PoolingConfig
from sgpt.evaluation.evaluate import EvaluationConfig
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_choice, check_ranges
from sgpt.text.markers import ROLES, MarkersConfig
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.trainer import TrainerConfig
from sgpt.training.tuning import TuningConfig


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
