"""From the keys `data.*` to the feed of a run: `build_feed` reads each source, tokenises it and mixes the sources.

How a source is read is a row of READERS, chosen by `data.name`. Each row fills the same store
(sgpt/data/feed/store.py), so everything after it knows one form of examples.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens, Writer, cached_examples, key_of
from sgpt.data.formats import beir
from sgpt.data.formats.rows import is_hub_dataset, is_saved_dataset, kind_of, of_split, rows
from sgpt.data.sources import documents, msmarco, nli, pairs, pydocs
from sgpt.data.sources.bad_rows import accepted
from sgpt.data.sources.columns import (
    COLUMN_ROLES,
    DocumentColumns,
    describe,
    guess_columns,
    guess_document_columns,
    peek_column_names,
    refuse_late_columns,
)
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import files_below
from sgpt.runtime.values import (
    COUNT,
    COUNT_OR_NONE,
    FINITE,
    MOST,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    check_choice,
    check_ranges,
)
from sgpt.text.markers import Frame, MarkersConfig, Role, frames

log = logging.getLogger(__name__)


@dataclass
class SourceConfig:
    """One source of training data, as `data.<key>` or as one entry of `data.sources`.

    A key that neither the source's reader (`Reader.keys`) nor the feed (FEED_KEYS) reads is refused when it is set.
    """

    name: str = "file"
    """The reader, a row of READERS: file, documents, beir, nli, msmarco or pydocs."""
    path: str = ""
    """File or folder, or the id of a data set of the hub."""
    split: str = "train"
    """Of a BEIR folder, a data set, or a file that has a column `split`."""
    subset: str | None = None
    """Of a data set of the hub, which calls it a configuration; null where it has one only."""
    streaming: bool = False
    """Of a data set of the hub: rows are read while they are downloaded, and the whole is never on the disk."""
    triples: str | None = None
    """Of a BEIR folder: a TSV in it of query-id, positive-id, negative-id …; null takes the positives of the qrels."""
    columns: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(COLUMN_ROLES))
    """The file's names for query, positive, negative, label and score; null guesses by the usual names, and says so."""
    labels: list[str] = field(default_factory=list)
    """What numbers in the column of labels mean, in their order from 0: [entailment, neutral, contradiction]."""
    positive_score: float | None = None
    """A pair that is scored so or higher is a positive, in the unit of the file's scores."""
    negative_score: float | None = None
    """A pair that is scored lower is a hard negative of its query; null makes none."""
    num_hard_negatives: int = 0
    """H: hard negatives of every example, 0 or more; each query has 1 + H documents in a batch."""
    limit: int | None = None
    """Only so many examples, the first ones of the source, or of each of the sources; null takes all."""
    on_error: str = "stop"
    """stop: the first bad row ends the run. skip: bad rows are left out and listed next to the cache."""
    max_error_share: float = 0.01
    """Share of the rows, 0 to 1, that on_error=skip leaves out at most; more of them end the run."""
    systems: list[str] = field(default_factory=list)
    """Of msmarco: the mining systems whose negatives are taken, in this order; none takes all of them."""
    negatives_per_system: int = 5
    """Of msmarco: new negatives that each system gives a query at most, counted from its best."""
    score_margin: float = 3.0
    """Of msmarco: a negative scores this much less than the weakest positive, in the cross-encoder's logits."""
    use_all_queries: bool = False
    """Of msmarco: queries without negatives are kept, too."""
    seed: int = 0
    """Of what nli and msmarco draw: partners of a sentence, the order of a query's negatives."""
    weight: float | None = None
    """Share of the batches, relative to the other sources'; given for all or for none, which then go by size."""
    markers: str | None = None
    """Markers of this source's texts, a row of MARKERS; null takes the run's."""
    query_max_tokens: int | None = None
    """Tokens of a query, markers included; null takes the run's limit."""
    document_max_tokens: int | None = None
    """Tokens of a document, markers included; null takes the run's limit."""
    symmetric: bool = False
    """Documents get the queries' markers and limit, as in data whose two sides are of one kind."""

    def __post_init__(self) -> None:
        check_choice("data.name", self.name, READERS)
        self.columns = dict.fromkeys(COLUMN_ROLES) | self.columns
        if odd := self.columns.keys() - {*COLUMN_ROLES}:
            raise InputError(f"data.columns has the unknown key {sorted(odd)[0]!r}; it maps {', '.join(COLUMN_ROLES)}")
        self._check_numbers()
        if self.num_hard_negatives > 1 and self.name == "nli":
            raise InputError(
                f"data.num_hard_negatives={self.num_hard_negatives}: data=nli has one hard negative for each example; "
                "set it to 1 or 0"
            )
        if self.num_hard_negatives and self.name == "documents":
            raise InputError(
                f"data.num_hard_negatives={self.num_hard_negatives}: pairs made of documents alone have no hard "
                "negatives; leave it out, or mine some (train/mine.py) and train on those with data=file"
            )
        check_choice("data.on_error", self.on_error, ("stop", "skip"))
        if self.on_error == "skip" and "on_error" not in READERS[self.name].keys:
            others = " or ".join(f"data={name}" for name in _readers_of("on_error"))
            raise InputError(
                f"data.on_error=skip is read by {others} only, not by data={self.name}, whose files have a fixed form; "
                "leave it out"
            )
        if self.symmetric and self.document_max_tokens is not None:
            raise InputError(
                f"data.document_max_tokens={self.document_max_tokens} has no effect with data.symmetric=true, where "
                "documents are cut as queries are; set data.query_max_tokens"
            )
        self._check_keys()

    def _check_numbers(self) -> None:
        tokens = Range("4 or more", 4, MOST).or_null("for the run's")
        check_ranges(
            self,
            "data.",
            num_hard_negatives=COUNT_OR_NONE,
            limit=replace(COUNT, words="1 or more; null takes every example"),
            seed=SEED,
            max_error_share=SHARE,
            positive_score=FINITE,
            negative_score=FINITE,
            score_margin=FINITE,
            negatives_per_system=COUNT,
            weight=replace(POSITIVE, words="positive; leave a source out to give it nothing"),
            query_max_tokens=tokens,
            document_max_tokens=tokens,
        )

    def _check_keys(self) -> None:
        """Refuses a key that is set and not read: it would have no effect, and whoever set it expects one."""
        read = {*COMMON_KEYS, *FEED_KEYS, *READERS[self.name].keys}
        for key in SOURCE_KEYS:
            value = getattr(self, key)
            if key not in read and value != _default(key):
                others = " or ".join(f"data={name}" for name in _readers_of(key))
                of = f" of {self.path}" if self.path else ""
                raise InputError(
                    f"data.{key}={value} is read by {others} only, not by data={self.name}{of}; leave it out"
                )


@dataclass
class DataConfig(SourceConfig):
    """Training data: one source, or several in `sources`; the fields of a source are then left as they are here."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources, each with the fields above."""
    temperature: float = 1.0
    """Without weights a source's share is size ** (1 / temperature): 1 sees every example equally often."""
    mixed: bool = False
    """A batch takes examples of all sources; else each batch is of one, so that in-batch negatives are of its kind."""
    batches: str = "random"
    """random; or hard: of near queries, so that in-batch negatives are hard, and more of them false."""
    grouping_model: str | None = None
    """The model that says which queries are near, for batches=hard: run, export or sentence-transformers folder."""
    cache: str = "data/cache"
    """The folder of what was read and tokenised; equal data and keys are read from it again."""

    def __post_init__(self) -> None:
        if self.sources:
            self._check_sources()
        self._check_mixture()
        super().__post_init__()
        # below 0.1 a size to the power of 1 / temperature is no number
        evens = Range("positive and 0.1 or more; 1 is by size, larger evens the sources out", 0.1)
        check_ranges(self, "data.", temperature=evens)
        check_choice("data.batches", self.batches, ("random", "hard"))
        if self.batches == "hard" and not self.grouping_model:
            raise InputError("data.batches=hard needs data.grouping_model=<folder of a model>")
        if self.batches != "hard" and self.grouping_model:
            raise InputError(f"data.batches={self.batches} does not read data.grouping_model; set data.batches=hard")
        if self.batches == "hard" and self.mixed:
            raise InputError(
                "data.batches=hard groups the queries of one source, and data.mixed=true puts all sources into each "
                "batch; choose one of them"
            )

    def _check_sources(self) -> None:
        """Keys of a source that are set next to `sources` would be read by nobody.

        Weights of some sources would be compared with the sizes of others.
        """
        own_keys = [key for key in SOURCE_KEYS if key != "limit"]
        if unread := [f"data.{key}" for key in own_keys if getattr(self, key) != _default(key)]:
            raise InputError(
                f"{', '.join(unread)}: set next to data.sources, where nothing reads it; "
                "set it in each of the sources (data=file sets none)"
            )
        without = [source.path for source in self.sources if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise InputError(
                f"data.sources: {', '.join(without)} has no weight and others have; give each one a weight, or none"
            )

    def _check_mixture(self) -> None:
        """Refuses keys that mix sources, where there is nothing to mix."""
        several = len(self.sources) > 1
        weighted = any(source.weight is not None for source in self.sources)
        if not several and (self.mixed or self.weight is not None or self.temperature != 1):
            raise InputError("data.mixed, data.weight and data.temperature have no effect on one source; leave it out")
        if weighted and self.temperature != 1:
            raise InputError(
                f"data.temperature={self.temperature} has no effect where the sources have weights; leave one out"
            )

    def source_configs(self) -> list[SourceConfig]:
        if self.sources and self.limit is not None:
            return [replace(source, limit=source.limit or self.limit) for source in self.sources]
        return self.sources or [SourceConfig(**{key: getattr(self, key) for key in SOURCE_KEYS})]


SOURCE_KEYS = tuple(declared.name for declared in fields(SourceConfig))


def _readers_of(key: str) -> list[str]:
    return [name for name, reader in READERS.items() if key in reader.keys]


def _default(key: str) -> object:
    """Without making a SourceConfig, which would check itself for this again."""
    [declared] = (declared for declared in fields(SourceConfig) if declared.name == key)
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def build_feed(
    config: DataConfig,
    tokenizer,
    markers: MarkersConfig,
    *,
    queries_per_process: int,
    processes: int = 1,
    seed: int = 0,
) -> Feed:
    """Reads and tokenises the sources (both once, then from the cache) and mixes them.

    InputError for the first thing that is wrong.
    """
    configs, sources = config.source_configs(), []
    for source in configs:
        earlier = sum(other.path == source.path for other in configs[: len(sources)])
        name = f"{source.path} ({earlier + 1})" if earlier else source.path  # what is recorded of each goes by it
        examples = read_examples(source, Path(config.cache))
        frames_by_role = _frames_of(source, markers, tokenizer)
        # cut once, at the longer of the two limits: a text may be a query here and a document there
        longest = max(frame.content_tokens for frame in frames_by_role.values())
        tokens = Tokens(examples, tokenizer, longest)
        weight = source.weight or len(examples) ** (1 / config.temperature)
        sources.append(
            Source(name, examples, tokens, frames_by_role, source.num_hard_negatives, weight, source.symmetric)
        )
    feed = Feed(sources, queries_per_process, processes, seed, config.mixed)
    if len(sources) > 1:
        shares = ", ".join(f"{source.name} {feed.share(source):.1%}" for source in sources)
        log.info("%s by source: %s", "queries" if config.mixed else "batches", shares)
    return feed


def _frames_of(source: SourceConfig, markers: MarkersConfig, tokenizer) -> dict[Role, Frame]:
    """What stands around its queries and documents: the run's markers and limits, where the source sets no others."""
    own = replace(
        markers,
        name=source.markers or markers.name,
        query_max_tokens=source.query_max_tokens or markers.query_max_tokens,
        document_max_tokens=source.document_max_tokens or markers.document_max_tokens,
    )
    frames_by_role = frames(own, tokenizer)
    return dict.fromkeys(frames_by_role, frames_by_role["query"]) if source.symmetric else frames_by_role


def read_examples(config: SourceConfig, cache: Path) -> Examples:
    """All examples, checked, in the order of the source; from the cache when they were read before.

    InputError for the first bad one (with on_error=skip: for too many of them), and when there is none at all.
    """
    if not config.path:  # here and not in the dataclass, whose default must be constructible
        raise InputError(f"data.path is empty; set data.path=<file or folder> for data={config.name}")
    reader = READERS[config.name]
    # only keys that this reader reads: setting another one must not read everything again
    settings = {key: getattr(config, key) for key in (*COMMON_KEYS, *reader.keys)}
    key = key_of(settings, reader.fingerprint(config))
    rejected = cache / f"{key}.rejected.jsonl"
    examples = cached_examples(cache, key, lambda writer: reader.fill(config, writer, rejected))
    if not len(examples):
        raise InputError(f"data.path={config.path}: no examples in it; check the path and data.split")
    if rejected.is_file() and rejected.stat().st_size:
        log.warning("data.path=%s: rows were skipped; %s lists them with their reasons", config.path, rejected)
    return examples


def files_fingerprint(config: SourceConfig) -> str:
    """Hash of the bytes of a file, or of those files of a folder that the source's reader reads (`Reader.files`)."""
    path = Path(config.path)
    digest = hashlib.blake2b(digest_size=16)
    for file in READERS[config.name].files(path) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(os.fsencode(file.relative_to(path)))
            digest.update(_digest(file))
    return digest.hexdigest()


def _row_files(folder: Path) -> list[Path]:
    """Every file of a format that is read by rows (sgpt/data/formats/rows.py)."""
    if is_saved_dataset(folder):
        return files_below(folder)
    return sorted(file for file in folder.iterdir() if kind_of(file))


def _document_files(folder: Path) -> list[Path]:
    return [*documents.text_files(folder), *_row_files(folder)]


def _beir_files(folder: Path) -> list[Path]:
    texts = [folder / f"{part}.jsonl{packed}" for part in ("corpus", "queries") for packed in ("", ".gz")]
    return [*texts, *sorted(folder.glob("qrels/*.tsv"))]


def _msmarco_files(folder: Path) -> list[Path]:
    parts = (msmarco.COLLECTION, msmarco.QUERIES, msmarco.MINED, msmarco.SCORES)
    return [folder / f"{part}{packed}" for part in parts for packed in ("", ".gz")]


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").digest()


def revision(hub_id: str) -> str:
    """The commit that the hub has of a data set now; nothing, and a warning, when it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_id, timeout=10).sha
    except Exception as error:  # whatever its parts raise: of the network, of the hub, of being told to stay offline
        log.warning(
            "data.path=%s: the hub cannot be asked whether it has changed (%s); "
            "what was last read without asking it is taken",
            hub_id,
            type(error).__name__,
        )
        return ""


@dataclass(frozen=True)
class Reader:
    """How one kind of source is read, and by what it is known that it has changed since."""

    fill: Callable[[SourceConfig, Writer, Path], None]
    """fill(config, writer, rejected) writes all of a source; bad rows that are skipped are listed in `rejected`."""
    keys: tuple[str, ...]
    """Keys of SourceConfig that it reads, besides COMMON_KEYS; a change of one reads the source again."""
    files: Callable[[Path], list[Path]] = _row_files
    """Files of a folder that it reads, in a fixed order; some need not be there. Files that are missing in this list
    may change and the cache is still used."""
    fingerprint: Callable[[SourceConfig], str] = files_fingerprint
    """Hash of the source's content: when it differs, the source is read again. By default, of the bytes of `files`."""


def _fill_rows(config: SourceConfig, writer: Writer, rejected: Path) -> None:
    """Files, folders and data sets of rows: one generator after the other, so that one row is held at a time."""
    all_rows = rows(Path(config.path), config.split, subset=config.subset, streaming=config.streaming)
    names, all_rows = peek_column_names(all_rows)
    columns = guess_columns(names, config.columns, config.path)
    log.info("%s: %s", config.path, describe(columns, config.num_hard_negatives, names, config.labels))
    split_rows = of_split(all_rows, config.split, config.path)
    checked_rows = refuse_late_columns(split_rows, names, columns, config.columns, config.num_hard_negatives)
    parsed_rows = pairs.examples(
        checked_rows,
        columns,
        num_hard_negatives=config.num_hard_negatives,
        labels=config.labels,
        positive_score=config.positive_score,
        negative_score=config.negative_score,
    )
    _write_accepted(parsed_rows, config, writer, rejected)


def _write_accepted(parsed_rows: pairs.ParsedRows, config: SourceConfig, writer: Writer, rejected: Path) -> None:
    examples = accepted(
        parsed_rows,
        on_error=config.on_error, rejected=rejected, max_error_share=config.max_error_share, limit=config.limit,
    )  # fmt: skip
    for example in examples:
        writer.example(example)


def _refuse_mixed(path: Path, texts: list[Path]) -> None:
    """InputError for a folder of texts that has files of rows as well; files that are neither are named."""
    others = [file for file in files_below(path) if file not in texts] if path.is_dir() else []
    if with_rows := [file for file in others if kind_of(file) not in (None, ".json")]:
        raise InputError(
            f"{path}: holds texts ({texts[0].name}) and files of rows ({with_rows[0].name}); give one file, or a "
            "folder of one kind"
        )
    if others:
        endings = sorted({file.suffix or "no ending" for file in others})
        message = "%s: %d files that are neither .txt nor .md are left out: %s"
        log.warning(message, path, len(others), ", ".join(endings[:10]))


def _fill_documents(config: SourceConfig, writer: Writer, rejected: Path) -> None:
    path = Path(config.path)
    if files := documents.text_files(path):
        _refuse_mixed(path, files)
        if any(config.columns.values()) or config.split != _default("split") or config.subset:
            raise InputError(f"{path}: texts have neither columns nor splits; leave out data.columns, split and subset")
        columns, document_rows = DocumentColumns("text", "title"), documents.text_rows(files)
    else:
        all_rows = rows(path, config.split, subset=config.subset, streaming=config.streaming)
        names, all_rows = peek_column_names(all_rows)
        columns = guess_document_columns(names, config.columns, config.path)
        document_rows = of_split(all_rows, config.split, config.path)
    title = f"titles from {columns.title!r}" if columns.title else "no titles"
    log.info("%s: documents from %r, %s; pairs are made of each", config.path, columns.text, title)
    _write_accepted(documents.document_pairs(document_rows, columns), config, writer, rejected)


def _fill_pydocs(config: SourceConfig, writer: Writer, rejected: Path) -> None:
    _fill_rows(replace(config, path=str(pydocs.build(Path(config.path)) / "train.jsonl")), writer, rejected)


def _fill_beir(config: SourceConfig, writer: Writer, rejected: Path) -> None:
    parsed_rows = beir.beir_examples(Path(config.path), config.split, config.triples, config.num_hard_negatives)
    _write_accepted(parsed_rows, config, writer, rejected)


def _fill_nli(config: SourceConfig, writer: Writer, rejected: Path) -> None:
    for example in islice(nli.nli_examples(Path(config.path), config.seed), config.limit):
        writer.example(example)


def _fill_msmarco(config: SourceConfig, writer: Writer, rejected: Path) -> None:
    msmarco.fill(
        Path(config.path),
        writer,
        systems=config.systems,
        negatives_per_system=config.negatives_per_system,
        score_margin=config.score_margin,
        use_all_queries=config.use_all_queries,
        limit=config.limit,
        seed=config.seed,
    )


def _pydocs_fingerprint(config: SourceConfig) -> str:
    return hashlib.blake2b((pydocs.build(Path(config.path)) / "train.jsonl").read_bytes()).hexdigest()


def _rows_fingerprint(config: SourceConfig) -> str:
    return revision(config.path) if is_hub_dataset(Path(config.path)) else files_fingerprint(config)


def _documents_fingerprint(config: SourceConfig) -> str:
    return f"{_rows_fingerprint(config)}-{documents.VERSION}"


def _beir_fingerprint(config: SourceConfig) -> str:
    """The triples may lie anywhere."""
    triples = Path(config.path, config.triples or "")
    return files_fingerprint(config) + (_digest(triples).hex() if triples.is_file() else "")


COMMON_KEYS = ("name", "path", "limit")  # which every reader reads
BAD_ROW_KEYS = ("on_error", "max_error_share")
JUDGED_PAIR_KEYS = ("labels", "positive_score", "negative_score")
READERS: dict[str, Reader] = {
    "file": Reader(
        _fill_rows,
        ("split", "subset", "streaming", "columns", *JUDGED_PAIR_KEYS, "num_hard_negatives", *BAD_ROW_KEYS),
        fingerprint=_rows_fingerprint,
    ),
    "documents": Reader(
        _fill_documents,
        ("split", "subset", "streaming", "columns", *BAD_ROW_KEYS),
        _document_files,
        _documents_fingerprint,
    ),
    "beir": Reader(
        _fill_beir,
        ("split", "triples", "num_hard_negatives", *BAD_ROW_KEYS),
        _beir_files,
        _beir_fingerprint,
    ),
    "nli": Reader(_fill_nli, ("seed",), nli.training_files),
    "msmarco": Reader(
        _fill_msmarco,
        ("systems", "negatives_per_system", "score_margin", "use_all_queries", "seed"),
        _msmarco_files,
    ),
    "pydocs": Reader(_fill_pydocs, ("num_hard_negatives", *BAD_ROW_KEYS), fingerprint=_pydocs_fingerprint),
}
# of every source, read by `build_feed`: what a batch takes of the examples; a change of one does not read them again
FEED_KEYS = ("num_hard_negatives", "weight", "markers", "query_max_tokens", "document_max_tokens", "symmetric")


def default_corpus() -> Path:
    """The corpus that `pydocs` runs search: the documentation of the standard library, built when it is not there."""
    return pydocs.build(Path("data/raw/pydocs")) / "stdlib"
