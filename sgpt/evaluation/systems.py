"""What train/evaluate.py asks for: all test sets are found and read, then every system is scored on each of them.

How one set is scored is in compare.py, how the numbers are shown in table.py.

A broken set is refused before the first one is scored, as that may take hours: find_sets reads scored pairs and USEB
whole and finds the split of each retrieval set; read_retrieval_sets then parses every corpus once. Texts stay in memory
up to KEPT_CHARACTERS in all; a set beyond that is dropped and parsed again when its turn comes. Parsing MS MARCO's 8.8
million passages takes about a minute, encoding them hours.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.test_sets.beir_sets import BeirFolder, find_beir_folders, read_beir_folder
from sgpt.data.test_sets.useb import UsebTask, read_useb
from sgpt.decoder.trunk import DTYPES
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation import compare
from sgpt.evaluation.compare import RerankRun
from sgpt.evaluation.evaluate import BEIR_ROOT, EvaluationConfig, Results, Sets, evaluate, read_sets
from sgpt.evaluation.table import Systems, beir_averages, with_cqadupstack
from sgpt.evaluation.useb import useb
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import check_writable, write_whole
from sgpt.runtime.interrupt import interrupt_message
from sgpt.runtime.progress import log_progress
from sgpt.runtime.values import COUNT, check_choice, check_ranges, check_unused
from sgpt.text.markers import MarkersConfig

log = logging.getLogger(__name__)
KEPT_CHARACTERS = 1 << 30  # of all corpora together, about as many bytes of memory


@dataclass
class EvaluateConfig:
    """Keys of train/evaluate.py: a model, test sets, and the systems next to it."""

    model: str = ""
    """Run, export, adapter, base (folder or hub id) or sentence-transformers folder."""
    dtype: str = "float32"
    """Of the model's weights: float32, bfloat16, float16, int8 or nf4."""
    retrieval: list[str] = field(default_factory=list)
    """BEIR folders, or names of BEIR's sets, which are looked for in beir_root and else downloaded to there."""
    sts: list[str] = field(default_factory=list)
    """Files of scored sentence pairs."""
    useb: str | None = None
    """USEB's folder data-eval, with those of its four tasks that are there."""
    split: str | None = None
    """null is each set's own, which is test but for BEIR's msmarco."""
    dev_split: str = "dev"
    """The split on which the weight of the fusion by scores is tuned, never the one that is scored."""
    dev_folder: str | None = None
    """A BEIR folder of other queries and documents, with that split; null is the folder of each set."""
    beir_root: str = BEIR_ROOT
    """The folder of BEIR's sets by name."""
    bm25: bool = True
    """BM25 is scored on the retrieval sets, next to the model."""
    fuse: bool = True
    """BM25 and the model are also scored as one ranking, by ranks and by scores."""
    rerank: str | None = None
    """A decoder, folder or hub id, that scores the best `depth` documents of a query again; null re-ranks nothing."""
    prompt: str = "G"
    """How that decoder is asked: a name of the paper's that needs no examples, or a text with {document} in it."""
    depth: int = 100
    """Documents of a query that it scores."""
    runs: str | None = None
    """Folder of a TREC run for each set and system; null writes none."""
    output: str | None = None
    """JSON file of the model's metrics, keyed by set."""
    systems_output: str | None = None
    """JSON file of all systems' metrics, intervals and bounds."""
    pooling: str | None = None
    """Only for a base, which has no contract: a row of POOLINGS."""
    markers: MarkersConfig | None = None
    """Only for a base, which has no contract: its markers and limits of tokens."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_ranges(self, depth=COUNT)
        if not self.retrieval:
            check_unused(self, ("runs", "dev_split", "dev_folder", "bm25", "fuse"), without="retrieval sets")
        if not self.rerank:
            check_unused(self, ("prompt",), without="rerank=<decoder>")
        if self.rerank and not self.retrieval:
            raise InputError(
                f"rerank={self.rerank} has nothing to rank again; "
                "set retrieval=[<BEIR folder or name>,…], or leave it out"
            )


@dataclass(frozen=True)
class RequestedSets:
    """retrieval: folders that exist, not yet read. pairs (`sts` alone), tasks: read and checked."""

    retrieval: list[BeirFolder]
    pairs: Sets
    tasks: list[UsebTask]

    @property
    def names(self) -> list[str]:
        names = [folder.name for folder in self.retrieval] + [pairs.name for pairs in self.pairs.sts]
        return [*names, "USEB"] if self.tasks else names


@dataclass(frozen=True)
class SetWithDev:
    """A retrieval set, and the queries that tune the fusion by scores; None leaves that fusion out."""

    dataset: RetrievalSet
    dev: RetrievalSet | None


def check_request(config: EvaluateConfig) -> None:
    """InputError when there is nothing to evaluate, or where results cannot be written."""
    if not config.model or not (config.retrieval or config.sts or config.useb):
        raise InputError(
            "set model=<folder or hub id> and retrieval=[<BEIR folder or name>,…], sts=[<pairs file>,…] or "
            "useb=<folder data-eval>"
        )
    if config.dev_folder and not Path(config.dev_folder).is_dir():
        raise InputError(f"dev_folder={config.dev_folder}: no such folder; check the path")
    for key, file in (("output", config.output), ("systems_output", config.systems_output)):
        if file and Path(file).is_dir():
            raise InputError(f"{key}={file} is a folder; name a file in it, for example {Path(file) / 'scores.json'}")
        if file:
            check_writable(Path(file), f"set {key}=<another file>")


def find_sets(config: EvaluateConfig) -> RequestedSets:
    """What can be known without reading a corpus. Names of BEIR's sets are downloaded here."""
    retrieval = find_beir_folders(config.retrieval, config.split, Path(config.beir_root))
    pairs = read_sets(EvaluationConfig(sts=config.sts, split=config.split))
    tasks = read_useb(Path(config.useb), config.split or "test") if config.useb else []
    if twice := {folder.name for folder in retrieval} & {dataset.name for dataset in pairs.sts}:
        raise InputError(
            f"two evaluation sets are called {min(twice)!r}, and results are kept by name; "
            "rename a folder, or evaluate one after the other"
        )
    return RequestedSets(retrieval, pairs, tasks)


def scored_splits(sets: RequestedSets, config: EvaluateConfig) -> str:
    """The split of all sets, and of each that has another: "test", "dev of msmarco" or "test, dev of msmarco"."""
    split = config.split or "test"
    others = [f"{folder.split} of {folder.name}" for folder in sets.retrieval if folder.split != split]
    return ", ".join(others if len(others) == len(sets.names) else [split, *others])


def load_reranker(config: EvaluateConfig, device: str) -> RerankRun | None:
    """The re-ranker as a function of a set and a run; None without `rerank`."""
    if not config.rerank:
        return None
    from sgpt.cross_encoder.cross_encoder import CrossEncoder
    from sgpt.retrieval.rerank import rerank

    reranker = CrossEncoder.from_pretrained(config.rerank, prompt=config.prompt)
    reranker.model.to(device)
    return partial(rerank, reranker)


def read_retrieval_sets(
    folders: list[BeirFolder], config: EvaluateConfig, say: Callable[[str], object]
) -> Iterator[tuple[BeirFolder, SetWithDev]]:
    """Parses every set now, and gives them one by one. say: is called with the reason when a fusion is left out."""
    kept: dict[str, SetWithDev] = {}
    characters_kept = 0
    for folder in folders:
        with log_progress(f"reading {folder.name}"):
            tuned, reason = _read(folder, config)
        if reason:
            say(reason)
        characters = sum(map(len, tuned.dataset.corpus.values()))
        if tuned.dev and tuned.dev.corpus is not tuned.dataset.corpus:
            characters += sum(map(len, tuned.dev.corpus.values()))
        if characters_kept + characters <= KEPT_CHARACTERS or len(folders) == 1:
            kept[folder.name] = tuned
            characters_kept += characters
        del tuned  # or two corpora would be in memory while the next one is parsed
    return ((folder, kept.pop(folder.name, None) or _read(folder, config)[0]) for folder in folders)


def _read(folder: BeirFolder, config: EvaluateConfig) -> tuple[SetWithDev, str]:
    """The set, and why it has no queries to tune on; "" where it has, or needs none."""
    dataset = read_beir_folder(folder)
    if config.runs:
        compare.check_runs(Path(config.runs), dataset)
    if config.fuse and not config.bm25:
        log.info("%s: nothing is fused, as bm25=false", dataset.name)
    if not (config.bm25 and config.fuse):
        return SetWithDev(dataset, None), ""
    dev, reason = compare.tuning_set(folder, dataset, config.dev_split, config.dev_folder)
    return SetWithDev(dataset, dev), reason


def score_all(
    encoder: Encoder,
    sets: RequestedSets,
    retrieval: Iterator[tuple[BeirFolder, SetWithDev]],
    config: EvaluateConfig,
    rerank: RerankRun | None = None,
) -> dict[str, Systems]:
    """Set -> system -> results. What is finished is recorded after every set: a killed evaluation keeps what it has."""
    results: dict[str, Systems] = {}
    for folder, tuned in retrieval:
        with interrupt_message(_what_is_kept(results, config)):
            results[folder.name] = _score(encoder, folder.name, tuned, config, rerank)
        record(config, results)
    results = with_cqadupstack(results)
    results |= _of_the_model(evaluate(encoder, sets.pairs))
    record(config, results)
    results |= _of_the_model(useb(encoder, sets.tasks))
    record(config, results)
    return results


def _score(encoder: Encoder, name: str, tuned: SetWithDev, config: EvaluateConfig, rerank: RerankRun | None) -> Systems:
    dataset = tuned.dataset
    title = f"evaluating on {name}, {len(dataset.qrels):,} queries and {len(dataset.corpus):,} documents"
    with log_progress(title):
        systems = compare.run_systems(
            encoder, dataset, tuned.dev, bm25=config.bm25, fuse=config.fuse, rerank=rerank, depth=config.depth
        )
    if config.runs:
        compare.write_runs(Path(config.runs), dataset, systems)
    return compare.system_metrics(dataset, systems, config.depth)


def _what_is_kept(results: Mapping[str, Systems], config: EvaluateConfig) -> str:
    if results and (config.output or config.systems_output):
        return "the results of the sets before are kept"
    return "no set was finished"


def _of_the_model(results: Results) -> dict[str, Systems]:
    """Pairs and USEB have no other system than the model."""
    return {name: {"model": {"metrics": metrics}} for name, metrics in results.items()}


def record(config: EvaluateConfig, results: Mapping[str, Systems]) -> None:
    """output: set -> metrics of the model. systems_output: set -> system -> everything."""
    if config.output:
        of_the_model = {name: systems["model"]["metrics"] for name, systems in results.items()}
        _write_json(Path(config.output), of_the_model)
    if config.systems_output:
        everything = {
            "model": config.model,
            "rerank": config.rerank,
            "prompt": config.prompt,
            "depth": config.depth,
            "sets": results,
            "averages": beir_averages(results),
        }
        _write_json(Path(config.systems_output), everything)


def _write_json(file: Path, content: object) -> None:
    write_whole(file, json.dumps(content, indent=2) + "\n")
