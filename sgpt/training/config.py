"""The configuration of a training run: the dataclasses of its parts as one tree."""

from dataclasses import dataclass, field

from sgpt.data.readers import DataConfig
from sgpt.decoder.quantised import QUANTISED
from sgpt.decoder.trunk import ModelConfig
from sgpt.encoder.pooling import PoolingConfig
from sgpt.evaluation.evaluate import EvaluationConfig
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_choice, check_ranges
from sgpt.text.markers import ROLES, MarkersConfig
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.trainer import TrainerConfig
from sgpt.training.tuning import TuningConfig, of_quantised

TRACKERS = ("wandb", "tensorboard", "trackio")  # names of their modules, of Accelerate's trackers, and of our extras


@dataclass
class LoggingConfig:
    """Where the numbers of metrics.jsonl go as well; never a condition of running."""

    tracker: str | None = None
    """Tracker of experiments: wandb, tensorboard or trackio, or null for none."""
    project: str = "sgpt"
    """Project of the tracker that the run belongs to."""
    mode: str = "offline"
    """Mode of wandb: online; offline, where `wandb sync` uploads later; or disabled."""

    def __post_init__(self) -> None:
        if self.tracker not in (None, *TRACKERS):
            raise InputError(f"logging.tracker={self.tracker!r} is unknown; choose {', '.join(TRACKERS)} or null")
        check_choice("logging.mode", self.mode, ("online", "offline", "disabled"))
        length = len(self.project)
        forbidden = set(self.project) & {*"/\\#?%:"}
        if forbidden or not 1 <= length <= 128:
            problem = f"holds {min(forbidden)!r}" if 1 <= length <= 128 else f"has {length} letters"
            raise InputError(f"logging.project={self.project!r} {problem}; wandb takes 1 to 128, without / \\ # ? % :")


@dataclass
class TrainConfig:
    """One training run, of which each part is a dataclass where it is used."""

    name: str = "run"
    """Folder of the run below `runs`."""
    runs: str = "runs"
    """Folder of all runs."""
    resume: bool = False
    """Whether an existing run of this name is resumed; without it, one is refused."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Base that is trained."""
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    """How the token embeddings of a text become one embedding."""
    markers: MarkersConfig = field(default_factory=MarkersConfig)
    """What is put around queries and documents, and how many tokens they may have."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    """Which parameters learn."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What a training step minimises."""
    data: DataConfig = field(default_factory=DataConfig)
    """Examples that it learns from."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long, in what portions and in what precision it trains."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Test sets that are scored before and after training."""
    dev: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(split="dev", bm25=False))
    """Dev sets that are scored every trainer.evaluate_every_steps."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Trackers that get the numbers as well."""

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(("/", ".")) or ".." in self.name.split("/"):
            raise InputError(
                f"name={self.name!r} cannot be a folder below {self.runs}/; use one that begins with neither / nor . "
                "and holds no .."
            )
        if not self.model.path:
            raise InputError(
                "model.path is empty; set model.path=<folder or hub id>, or choose a model=<name of configs/model>"
            )
        if self.model.dtype in QUANTISED and self.tuning.name == "full":
            raise InputError(f"tuning=full {of_quantised(self.model.dtype)}")
        if self.model.layers is not None and self.tuning.name == "lora":
            raise InputError(
                f"model.layers={self.model.layers} with tuning=lora: PEFT would open its adapter over all blocks; use "
                "another tuning, or leave it out"
            )
        for key in ("evaluation", "dev"):
            check_ranges(getattr(self, key), f"{key}.", limit=COUNT.or_null("for whole sets"))
        longest = max(self.markers.max_tokens(role) for role in ROLES)
        if (self.trainer.tokens_per_pack or longest) < longest:
            raise InputError(
                f"trainer.tokens_per_pack={self.trainer.tokens_per_pack} is less than one text of {longest} tokens "
                "(markers.*_max_tokens); raise it"
            )
        if self.dev.bm25:
            raise InputError("dev.bm25=true has no effect: BM25 is scored on the sets of `evaluation`; leave it out")
        if self.trainer.evaluate_every_steps and not (self.dev.retrieval or self.dev.sts or self.dev.pairs):
            raise InputError(
                "trainer.evaluate_every_steps is set, but dev.retrieval, dev.sts and dev.pairs are empty; "
                "name a dev set or set it to 0"
            )
