"""What can be set in mining. Unknown names, numbers out of range and contradictions are refused here."""

from dataclasses import dataclass, field

from sgpt.data.sources.columns import COLUMN_ROLES
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import (
    COUNT,
    NOT_NEGATIVE,
    SEED,
    SHARE,
    THREADS,
    Range,
    check_choice,
    check_path_of_choice,
    check_ranges,
    check_unused,
)
from sgpt.text.markers import MarkersConfig

PATH_OF_SOURCE = {"bm25": None, "model": "model", "run": "trec"}  # source -> the key that holds what it reads, if any
CHOICES = {"on_error": ("stop", "skip"), "pick": ("top", "random"), "on_few": ("keep", "drop")}


@dataclass
class MineConfig:
    """Keys of train/mine.py."""

    data: str = ""
    """A BEIR folder; or pairs, in a file or a folder of files, whose positives are then the corpus."""
    split: str = "train"
    """The qrels of a BEIR folder to read, or the split of the pairs."""
    columns: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(COLUMN_ROLES))
    """Of pairs: the names of their columns (query, positive, label …); null guesses by the usual names."""
    labels: list[str] = field(default_factory=list)
    """Of pairs: what numbers as labels mean, in their order from 0."""
    on_error: str = "stop"
    """Of pairs: stop at a bad row, or skip it and list it in <output>.rejected.jsonl."""
    max_error_share: float = 0.01
    """Of pairs: on_error=skip stops when more than this share of the rows is bad."""
    output: str = ""
    """A new file for the training rows: .jsonl or .jsonl.gz."""
    limit: int | None = None
    """Only the first queries, for trying things out; null for all."""
    source: str = "bm25"
    """What ranks the documents: bm25; model, which needs `model`; or run, which needs `trec`."""
    model: str | None = None
    """Of source=model: a run, export, adapter, base or sentence-transformers folder."""
    markers: MarkersConfig | None = None
    """Of source=model with a base that has no contract: its markers and limits."""
    pooling: str | None = None
    """Of source=model with a base that has no contract: its pooling."""
    trec: str | None = None
    """Of source=run: a TREC run, or JSON of query id -> document id -> score."""
    rescore: str | None = None
    """Folder of a decoder (SGPT-CE) or a cross-encoder; it scores the window and the positives again."""
    first_rank: int = 10
    """The first rank of the window, counted from 1 without the positives."""
    last_rank: int = 100
    """The last rank of the window."""
    negatives_per_query: int = 8
    """At most so many hard negatives of each query."""
    pick: str = "top"
    """Which candidates of the window are taken, of those that pass the margins: the top ones, or a random choice by
    `seed` and the query's id.
    """
    score_margin: float | None = None
    """A negative scores at most the weakest positive's score minus this; null for any score."""
    score_ratio: float | None = None
    """A negative scores at most this times the weakest positive's score (below zero: as far below it); null for any."""
    on_few: str = "keep"
    """keep or drop queries that have fewer than `negatives_per_query`."""
    seed: int = 0
    """Of pick=random."""
    queries_per_block: int = 256
    """Queries mined at a time: what a killed job loses at most, per process."""
    documents_per_block: int = 4096
    """Documents encoded at a time, of source=model: what a killed job loses at most, per process."""
    threads: int | None = None
    """Threads of each process on a CPU; null shares out the cores."""
    resume: bool = False
    """Continue a killed job of the same configuration and data, by any number of processes."""

    def __post_init__(self) -> None:
        check_path_of_choice(self, "source", PATH_OF_SOURCE)
        for key, choices in CHOICES.items():
            check_choice(key, getattr(self, key), choices)
        check_ranges(
            self,
            limit=COUNT.or_null("for all queries"),
            max_error_share=SHARE,
            first_rank=COUNT,
            last_rank=COUNT,
            negatives_per_query=COUNT,
            score_margin=NOT_NEGATIVE.or_null("for any"),
            score_ratio=Range("above 0 and at most 1, or null", 0, 1, above=True),
            seed=SEED,
            queries_per_block=COUNT,
            documents_per_block=COUNT,
            threads=THREADS.or_null("to share the cores"),
        )
        if self.source != "model":
            check_unused(self, ("markers", "pooling", "documents_per_block"), without="source=model")
        if self.pick != "random":
            check_unused(self, ("seed",), without="pick=random")
        if self.on_error != "skip":
            check_unused(self, ("max_error_share",), without="on_error=skip")
        if self.last_rank - self.first_rank + 1 < self.negatives_per_query:
            raise InputError(
                f"first_rank={self.first_rank} to last_rank={self.last_rank} cannot hold "
                f"negatives_per_query={self.negatives_per_query}; raise last_rank"
            )
