"""What can be set. Unknown names, ranges and contradictions are refused here."""

from dataclasses import dataclass, field

from sgpt.data.sources.columns import COLUMN_ROLES
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, NOT_NEGATIVE, SEED, SHARE, THREADS, Range, check_choice, check_ranges
from sgpt.text.markers import MarkersConfig

NEEDS = {"bm25": None, "model": "model", "run": "trec"}  # source -> the key that it reads
CHOICES = {"source": tuple(NEEDS), "on_error": ("stop", "skip"), "pick": ("top", "random"), "on_few": ("keep", "drop")}


@dataclass
class MineConfig:
    """data, split: BEIR folder and its qrels; or pairs, in a file or a folder of them, whose positives are then the corpus. columns: of

    pairs, query, positive and label; null guesses by the usual names. labels: what numbers as labels mean, in their order from 0.
    on_error, max_error_share: stop at a bad row of pairs, or skip so many and list them in <output>.rejected.jsonl.
    output: the training rows, a new file .jsonl or .jsonl.gz. limit: the first queries only.

    source: bm25; model, with model=<run, export, adapter, base or sentence-transformers folder>, markers and pooling only for a
    base without a contract; or run, with trec=<TREC run, or JSON of query id -> document id -> score>.
    rescore: folder of a decoder (SGPT-CE) or of a cross-encoder of sentence-transformers, whose scores replace the source's inside of
    the window.
    first_rank, last_rank: the window, counted from 1 without positives. negatives_per_query: at most so many.
    pick: top, or random inside the window (by `seed` and query id).
    score_margin: a negative scores at most the weakest positive's score minus this; null for any.
    score_ratio: at most this times the weakest positive's score (below zero: as far below it); null for any.
    on_few: keep or drop queries that have fewer than negatives_per_query.
    queries_per_block, documents_per_block: what a killed run loses at most, per process. threads: per process on a CPU.
    resume: go on with a killed run of the same configuration and data, by any number of processes.
    """

    data: str = ""
    split: str = "train"
    columns: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(COLUMN_ROLES))
    labels: list[str] = field(default_factory=list)
    on_error: str = "stop"
    max_error_share: float = 0.01
    output: str = ""
    limit: int | None = None
    source: str = "bm25"
    model: str | None = None
    markers: MarkersConfig | None = None
    pooling: str | None = None
    trec: str | None = None
    rescore: str | None = None
    first_rank: int = 10
    last_rank: int = 100
    negatives_per_query: int = 8
    pick: str = "top"
    score_margin: float | None = None
    score_ratio: float | None = None
    on_few: str = "keep"
    seed: int = 0
    queries_per_block: int = 256
    documents_per_block: int = 4096
    threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            check_choice(key, getattr(self, key), choices)
        for source, key in NEEDS.items():
            if key and (self.source == source) != bool(getattr(self, key)):
                problem = f"needs {key}=<path>" if self.source == source else f"does not read {key}={getattr(self, key)}; set source={source}, or leave it out"
                raise InputError(f"source={self.source} {problem}")
        check_ranges(
            self, limit=COUNT.or_null("for all queries"), first_rank=COUNT, last_rank=COUNT, negatives_per_query=COUNT, queries_per_block=COUNT,
            documents_per_block=COUNT, threads=THREADS.or_null("to share the cores"), seed=SEED, max_error_share=SHARE,
            score_margin=NOT_NEGATIVE.or_null("for any"), score_ratio=Range("above 0 and at most 1, or null", 0, 1, above=True),
        )  # fmt: skip
        if self.last_rank - self.first_rank + 1 < self.negatives_per_query:
            raise InputError(
                f"first_rank={self.first_rank} to last_rank={self.last_rank} cannot hold negatives_per_query={self.negatives_per_query}; raise last_rank"
            )
