"""`data.name` chooses a row of READERS; each reads its source into the same list of `Example`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sgpt.data import beir, jsonl, pydocs
from sgpt.data.example import Example
from sgpt.errors import InputError


def _default_columns() -> dict[str, str]:
    return {"query": "query", "positive": "positive", "negative": "negative"}


@dataclass
class DataConfig:
    """Training data.

    name: row of READERS. path: file or folder (for dataset: hub id or folder). split, triples: of a BEIR folder or dataset;
    triples names a TSV of query-id, positive-id, negative-id …. columns: the file's names for query, positive and negative.
    num_hard_negatives: H, for every example. limit: use only so many examples.
    """

    name: str = "jsonl"
    path: str = ""
    split: str = "train"
    triples: str | None = None
    columns: dict[str, str] = field(default_factory=_default_columns)
    num_hard_negatives: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.name not in READERS:
            raise InputError(f"data.name={self.name!r} is unknown; choose one of {', '.join(READERS)}")
        self.columns = _default_columns() | self.columns
        if odd := self.columns.keys() - _default_columns().keys():
            raise InputError(f"data.columns has the unknown key {sorted(odd)[0]!r}; it maps query, positive and negative")
        if self.num_hard_negatives < 0:
            raise InputError(f"data.num_hard_negatives={self.num_hard_negatives} must be 0 or more")


def read_examples(config: DataConfig) -> list[Example]:
    """All examples, checked, in the order of the source. InputError for the first bad one and for none at all."""
    if not config.path:  # here and not in the dataclass, whose default must be constructible
        raise InputError(f"data.path is empty; set data.path=<file or folder> for data={config.name}")
    examples = list(islice(READERS[config.name](config), config.limit))
    if not examples:
        raise InputError(f"data.path={config.path}: no examples in it")
    return examples


def _read_jsonl(config: DataConfig):
    return jsonl.read_examples(Path(config.path), config.columns, config.num_hard_negatives)


def _read_beir(config: DataConfig):
    return beir.read_examples(Path(config.path), config.split, config.triples, config.num_hard_negatives)


def _read_pydocs(config: DataConfig):
    return jsonl.read_examples(pydocs.build(Path(config.path)) / "train.jsonl", config.columns, config.num_hard_negatives)


def _read_dataset(config: DataConfig):
    """A hub data set or a folder saved by `datasets`; rows as in JSON lines."""
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
    for number, row in enumerate(rows, 1):
        yield jsonl.example_from_row(row, config.columns, config.num_hard_negatives, f"{config.path}, row {number}")


READERS: dict[str, Callable] = {"jsonl": _read_jsonl, "beir": _read_beir, "pydocs": _read_pydocs, "dataset": _read_dataset}


def default_corpus() -> Path:
    """What `pydocs` runs search in: the standard library's part of the harvest, made when it is not there."""
    return pydocs.build(Path("data/raw/pydocs")) / "stdlib"
