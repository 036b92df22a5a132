"""Anyone's data: `data.name` chooses a row of READERS, each of which fills the same store; and the feed of a run over one or several."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

from sgpt.data import beir, jsonl, pydocs
from sgpt.data.sampling import Feed, Source
from sgpt.data.store import Examples, Tokens, Writer, key_of, stored
from sgpt.errors import InputError
from sgpt.markers import MarkersConfig, frames

log = logging.getLogger(__name__)


def _default_columns() -> dict[str, str]:
    return {"query": "query", "positive": "positive", "negative": "negative"}


@dataclass
class SourceConfig:
    """One source of training data.

    name: row of READERS. path: file or folder (for dataset: hub id or folder). split, triples: of a BEIR folder or dataset;
    triples names a TSV of query-id, positive-id, negative-id …. columns: the file's names for query, positive and negative.
    num_hard_negatives: H, for every example. limit: use only so many examples. weight: share of the batches beside other
    sources; null goes by size. query_max_tokens, document_max_tokens, markers: null takes the run's. symmetric: documents
    are put in the queries' markers.
    """

    name: str = "jsonl"
    path: str = ""
    split: str = "train"
    triples: str | None = None
    columns: dict[str, str] = field(default_factory=_default_columns)
    num_hard_negatives: int = 0
    limit: int | None = None
    weight: float | None = None
    markers: str | None = None
    query_max_tokens: int | None = None
    document_max_tokens: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.name not in READERS:
            raise InputError(f"data.name={self.name!r} is unknown; choose one of {', '.join(READERS)}")
        self.columns = _default_columns() | self.columns
        if odd := self.columns.keys() - _default_columns().keys():
            raise InputError(f"data.columns has the unknown key {sorted(odd)[0]!r}; it maps query, positive and negative")
        if self.num_hard_negatives < 0:
            raise InputError(f"data.num_hard_negatives={self.num_hard_negatives} must be 0 or more")
        if self.weight is not None and not self.weight > 0:
            raise InputError(f"data.weight={self.weight} must be positive; leave a source out to give it nothing")


@dataclass
class DataConfig(SourceConfig):
    """Training data: one source, or several in `sources`, which then take the place of the fields above.

    temperature: without weights a source's share is size ** (1 / temperature); 1 sees every example equally often.
    mixed: a batch takes examples of all sources; else each batch is of one, so that in-batch negatives are of its kind.
    cache: folder of what was read and tokenised.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    temperature: float = 1.0
    mixed: bool = False
    cache: str = "data/cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError(f"data.temperature={self.temperature} must be positive; 1 is by size, larger evens the sources out")

    def each(self) -> list[SourceConfig]:
        return self.sources or [SourceConfig(**{chosen.name: getattr(self, chosen.name) for chosen in fields(SourceConfig)})]


def build_feed(config: DataConfig, tokenizer, markers: MarkersConfig, *, queries_per_process: int, processes: int = 1, seed: int = 0) -> Feed:
    """Reads, tokenises (both once, then from the cache) and mixes the sources. InputError for the first thing that is wrong."""
    sources = []
    for source in config.each():
        examples = read_examples(source, Path(config.cache))
        own = replace(
            markers, name=source.markers or markers.name, query_max_tokens=source.query_max_tokens or markers.query_max_tokens,
            document_max_tokens=source.document_max_tokens or markers.document_max_tokens,
        )  # fmt: skip
        framed = frames(own, tokenizer)
        if source.symmetric:
            framed = dict.fromkeys(framed, framed["query"])
        tokens = Tokens(examples, tokenizer, max(frame.content_tokens for frame in framed.values()))
        weight = source.weight or len(examples) ** (1 / config.temperature)
        sources.append(Source(f"data.path={source.path}", examples, tokens, framed, source.num_hard_negatives, weight))
    return Feed(sources, queries_per_process, processes, seed, config.mixed)


def read_examples(config: SourceConfig, cache: Path) -> Examples:
    """All examples, checked, in the order of the source. InputError for the first bad one and for none at all."""
    if not config.path:  # here and not in the dataclass, whose default must be constructible
        raise InputError(f"data.path is empty; set data.path=<file or folder> for data={config.name}")
    reader = READERS[config.name]
    settings = [config.name, config.path, config.split, config.triples, config.columns, config.num_hard_negatives, config.limit]
    examples = stored(cache, key_of(settings, reader.fingerprint(config)), lambda writer: reader.fill(config, writer))
    if not len(examples):
        raise InputError(f"data.path={config.path}: no examples in it")
    return examples


def files_fingerprint(config: SourceConfig) -> str:
    """Of the bytes of a file, or of every file below a folder."""
    path = Path(config.path)
    if not path.exists():
        raise InputError(f"data.path={config.path}: no such file or folder; check the path")
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Reader:
    """fill: writes all of a source. fingerprint: of the source's content, so that a changed one is read again."""

    fill: Callable[[SourceConfig, Writer], None]
    fingerprint: Callable[[SourceConfig], str] = files_fingerprint


def _fill_from(read: Callable[[SourceConfig], object]) -> Callable[[SourceConfig, Writer], None]:
    def fill(config: SourceConfig, writer: Writer) -> None:
        for example in islice(read(config), config.limit):
            writer.example(example)

    return fill


def _jsonl(config: SourceConfig):
    return jsonl.read_examples(Path(config.path), config.columns, config.num_hard_negatives)


def _beir(config: SourceConfig):
    return beir.read_examples(Path(config.path), config.split, config.triples, config.num_hard_negatives)


def _pydocs(config: SourceConfig):
    return jsonl.read_examples(pydocs.build(Path(config.path)) / "train.jsonl", config.columns, config.num_hard_negatives)


def _pydocs_fingerprint(config: SourceConfig) -> str:
    return hashlib.blake2b((pydocs.build(Path(config.path)) / "train.jsonl").read_bytes()).hexdigest()


def _dataset(config: SourceConfig):
    for number, row in enumerate(_load_dataset(config), 1):
        yield jsonl.example_from_row(row, config.columns, config.num_hard_negatives, f"{config.path}, row {number}")


def _load_dataset(config: SourceConfig):
    """A hub data set or a folder saved by `datasets`."""
    import datasets

    path = Path(config.path)
    try:
        saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
        rows = datasets.load_from_disk(config.path) if saved else datasets.load_dataset(config.path, split=config.split)
    except (OSError, ValueError, ConnectionError) as error:
        raise InputError(f"data.path={config.path}: cannot be loaded as a data set ({error}); give a hub id or a folder written by save_to_disk") from error
    if isinstance(rows, datasets.DatasetDict):
        if config.split not in rows:
            raise InputError(f"data.path={config.path}: no split {config.split!r}; it has {', '.join(rows)}. Set data.split=<split>")
        rows = rows[config.split]
    return rows


READERS: dict[str, Reader] = {
    "jsonl": Reader(_fill_from(_jsonl)),
    "beir": Reader(_fill_from(_beir)),
    "pydocs": Reader(_fill_from(_pydocs), _pydocs_fingerprint),
    "dataset": Reader(_fill_from(_dataset), lambda config: _load_dataset(config)._fingerprint),
}


def default_corpus() -> Path:
    """What `pydocs` runs search in: the standard library's part of the harvest, made when it is not there."""
    return pydocs.build(Path("data/raw/pydocs")) / "stdlib"
