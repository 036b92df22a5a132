"""Our encoder and our re-ranker as models of MTEB 2 (the extra mteb; https://github.com/embeddings-benchmark/mteb).

    import mteb
    mteb.evaluate(MtebEncoder(Encoder.from_pretrained("runs/pydocs")), mteb.get_task("SciFact"))

Texts are encoded as everywhere here: markers by role, packs, no tokenisation by mteb. The role is what mteb says a text
is. Where it says nothing a task compares equals, and both sides are queries; so are those of the four re-ranking tasks
of the first MTEB, because the paper's numbers were made so (Muennighoff 2022, SGPT; MTEB then knew no roles outside of
retrieval).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.decoder.quantised import held_weights, num_weights
from sgpt.encoder.adapter import base_hash
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import OF_A_RUN
from sgpt.evaluation.evaluate import Results
from sgpt.runtime.errors import InputError
from sgpt.runtime.overrides import argument
from sgpt.runtime.progress import log_progress
from sgpt.text.markers import ROLES, MarkersConfig, Role

SYMMETRIC = {"AskUbuntuDupQuestions", "MindSmallReranking", "SciDocsRR", "StackOverflowDupQuestions"}
UNKNOWN = (  # what mteb asks for, and these models do not know of themselves
    "loader",
    "release_date",
    "languages",
    "memory_usage_mb",
    "license",
    "open_weights",
    "public_training_code",
    "public_training_data",
    "training_datasets",
)


@dataclass
class MtebConfig:
    """What train/evaluate_mteb.py is asked."""

    model: str = ""
    """Run, export, adapter, base (folder or hub id) or sentence-transformers folder; with a prompt, a decoder."""
    tasks: list[str] = field(default_factory=list)
    """Names of mteb's tasks and benchmarks."""
    output: str = "runs/mteb"
    """Folder of mteb's result files; what is there already is not computed again."""
    name: str | None = None
    """Of the model in these files, <organisation>/<model>; null makes one of the path."""
    prompt: str | None = None
    """How a decoder is asked (sgpt/cross_encoder/prompts.py): the model then re-ranks instead of giving embeddings."""
    markers: MarkersConfig | None = None
    """Only for a base, which has no contract: its markers and limits of tokens."""
    pooling: str | None = None
    """Only for a base, which has no contract: a row of POOLINGS."""

    def __post_init__(self) -> None:
        if self.name is not None and "/" not in self.name:
            raise InputError(
                f"name={self.name} must be <organisation>/<model>, for example {argument('name', f'sgpt/{self.name}')}"
            )
        if self.prompt and (self.markers or self.pooling):
            raise InputError(
                f"prompt={self.prompt} re-ranks, and a re-ranker has no markers and no pooling; "
                "leave out one or the others"
            )


class MtebEncoder:
    """mteb's EncoderProtocol.

    Embeddings are float32 [texts, D], of length 1 where the contract says so; similarity is the cosine.
    """

    def __init__(self, encoder: Encoder, name: str = "sgpt/encoder") -> None:
        markers = encoder.contract.markers
        self.encoder = encoder
        self.mteb_model_meta = _meta(
            name, encoder.fingerprint(), encoder.trunk, max(markers.max_tokens(role) for role in ROLES), "dense",
            embed_dim=encoder.embedding_size, similarity_fn_name="cosine", use_instructions=markers.name != "none",
        )  # fmt: skip

    def encode(
        self, inputs: Iterable[dict[str, Any]], *, task_metadata: Any, prompt_type: str | None = None, **options
    ) -> np.ndarray:
        """inputs: batches with a list `text`.

        The other options are sizes and bars of other models' encoders, and not read.
        """
        return self.encoder.encode(_texts(inputs), role_of(task_metadata.name, prompt_type))

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Any:
        """Cosines of all with all, [n, m]."""
        return _mteb().similarity_functions.cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Any:
        """Cosines of each with its own, [n]."""
        return _mteb().similarity_functions.pairwise_cos_sim(embeddings1, embeddings2)


class MtebReranker:
    """mteb's CrossEncoderProtocol, for re-ranking tasks: the documents of each query are given."""

    def __init__(self, reranker: CrossEncoder, name: str = "sgpt/reranker") -> None:
        self.reranker = reranker
        weights = base_hash(held_weights(reranker.model), "float32")
        stated = json.dumps([weights, asdict(reranker.prompt), asdict(reranker.scoring)])
        revision = hashlib.sha256(stated.encode()).hexdigest()
        unstated = {"embed_dim": None, "similarity_fn_name": None}
        self.mteb_model_meta = _meta(
            name, revision, reranker.model, reranker.max_tokens, "cross-encoder", use_instructions=True, **unstated
        )

    def predict(self, inputs1: Iterable[dict[str, Any]], inputs2: Iterable[dict[str, Any]], **options) -> np.ndarray:
        """inputs1: queries. inputs2: as many documents. Scores [pairs], natural logarithm."""
        return self.reranker.score(_texts(inputs1), _texts(inputs2))


def role_of(task: str, prompt_type: str | None) -> Role:
    return "document" if prompt_type == "document" and task not in SYMMETRIC else "query"


def read_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names, and those of benchmarks, each once.

    Raises InputError for a name that mteb does not know.
    """
    mteb = _mteb()
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            named = [mteb.get_task(name)]
        except KeyError as unknown:
            try:
                named = mteb.get_benchmark(name).tasks
            except KeyError:
                raise InputError(
                    "tasks: mteb has no task and no benchmark of this name: "
                    f"{str(unknown.args[0]).removeprefix('KeyError: ')}"
                ) from None
        tasks |= {task.metadata.name: task for task in named}
    return list(tasks.values())


def run(model: MtebEncoder | MtebReranker, tasks: Sequence[Any], output: Path) -> Results:
    """Task -> its main score, by mteb's name for it, 0 to 1.

    mteb's files go to <output>/results/<model>/<revision>/<task>.json.

    The revision is made of the weights and of all that decides an embedding or a score, so results of other weights are
    not taken for these. Raises InputError for a data set that is neither in the cache nor reachable; finished tasks
    stay.
    """
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetNotFoundError

    disable_progress_bars()  # mteb maps each corpus; our own bars show the work
    mteb, results = _mteb(), {}
    cache = mteb.ResultCache(output)
    for task in tasks:
        try:
            with log_progress(f"evaluating on {task.metadata.name}"):
                (result,) = mteb.evaluate(
                    model, task, cache=cache, co2_tracker=False, show_progress_bar=False
                ).task_results
        except (ConnectionError, DatasetNotFoundError) as error:
            raise InputError(
                f"tasks={task.metadata.name}: its data set {task.metadata.dataset['path']} is not in the cache of "
                f"Hugging Face's datasets, and the hub cannot give it ({error}); "
                f"run this once where there is a network, or leave the task out. What is finished is in {output}"
            ) from error
        results[task.metadata.name] = {task.metadata.main_score: float(result.get_score())}
    return results


def name_of(path: str) -> str:
    """<organisation>/<model> of a hub id, a run or an export."""
    parts = [part for part in Path(path).parts if part not in OF_A_RUN]
    return path if not Path(path).exists() and path.count("/") == 1 else f"sgpt/{parts[-1] if parts else 'model'}"


def _texts(inputs: Iterable[dict[str, Any]]) -> list[str]:
    return [text for batch in inputs for text in batch["text"]]


def _meta(name: str, revision: str, trunk: Any, max_tokens: int, kind: str, **stated) -> Any:
    return _mteb().models.ModelMeta(
        name=name,
        revision=revision[:16],
        n_parameters=num_weights(trunk),
        max_tokens=max_tokens,
        framework=["PyTorch"],
        model_type=[kind],
        **dict.fromkeys(UNKNOWN),
        **stated,
    )


def _mteb() -> Any:
    try:
        import mteb
        import mteb.similarity_functions
    except ImportError:
        raise InputError("mteb is not installed; pip install 'sgpt-framework[mteb]'") from None
    return mteb
