"""A file of pairs or triplets as a retrieval set: each query is to find its positives among all documents there."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sgpt.data.feed.example import Example
from sgpt.data.formats.beir import Qrels, RetrievalSet
from sgpt.data.formats.rows import of_split, rows
from sgpt.data.sources.bad_rows import accepted
from sgpt.data.sources.columns import guess_columns, peek_column_names, refuse_late_columns
from sgpt.data.sources.pairs import examples


def read_own_pairs(
    path: Path, split: str,
    stated: Mapping[str, str | None] | None = None, labels: Sequence[str] = (), positive_score: float | None = None,
) -> RetrievalSet:  # fmt: skip
    """The file may be what `data.path` takes; its columns are those of `stated`, or recognised by their usual names.

    The corpus is its different positives and hard negatives. A query that stands in several rows has all their
    positives. split: rows whose column `split` names another one are left out. labels: as for `examples`.
    positive_score: of scored pairs, all others are hard negatives. InputError for a bad row.
    """
    names, all_rows = peek_column_names(rows(path, split))
    stated = stated or {}
    columns = guess_columns(names, stated, str(path))
    split_rows = of_split(all_rows, split, str(path))
    found = examples(
        refuse_late_columns(split_rows, names, columns, stated, num_hard_negatives=1), columns, num_hard_negatives=0,
        keep_negatives=True, labels=labels, positive_score=positive_score, negative_score=positive_score,
    )  # fmt: skip
    return as_retrieval_set(path.name.split(".")[0], accepted(found))


def as_retrieval_set(name: str, pairs: Iterable[Example]) -> RetrievalSet:
    """Different positives and hard negatives are the corpus; relevant to a query is each positive of its text.

    Ids are q0, q1, … and d0, d1, …, in the order in which the texts come.
    """
    corpus: dict[str, str] = {}  # text -> id
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for example in pairs:
        query = queries.setdefault(example.query, f"q{len(queries)}")
        for text in (example.positive, *example.other_positives, *example.hard_negatives):
            corpus.setdefault(text, f"d{len(corpus)}")
        for text in (example.positive, *example.other_positives):
            qrels.setdefault(query, {})[corpus[text]] = 1
    texts, questions = ({number: text for text, number in table.items()} for table in (corpus, queries))
    return RetrievalSet(name, texts, questions, qrels)
