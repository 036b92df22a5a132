"""BM25 (bm25s, Lucene's variant): the lexical first stage and the yardstick."""

import logging
import os
import re

import torch

from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.trec import Run
from sgpt.retrieval.dense import DEPTH, as_results

log = logging.getLogger(__name__)
# Letters of the scripts without blanks: Chinese and Japanese; Thai, Lao; Tibetan, Burmese; Khmer.
# With their marks, which re's \w leaves out.
LETTERS = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf"
    "\u0f20-\u0f33\u0f40-\u0fbc\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17e0-\u17e9"
)
HAN = re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
INDIC = "\u0900-\u0963\u0966-\u0df3"  # with blanks, but with marks inside of words as well
WITHOUT_BLANKS = re.compile(f"[{LETTERS}]+")
WORD = rf"(?u)[{LETTERS}]+|[{INDIC}][{INDIC}\u200c\u200d]+|\b\w\w+\b"  # the last is bm25s' own


def bm25_run(dataset: RetrievalSet, depth: int = DEPTH, index=None) -> Run:
    """The best `depth` documents of each query. A document without any of the query's words is no result.

    index: of `bm25_index`, when it has been built already.
    """
    if index is None:
        index = bm25_index(list(dataset.corpus.values()))
    words = bm25_words(list(dataset.queries.values()))
    most = min(depth + dataset.skip_own_id, len(dataset.corpus))
    rows, scores = index.retrieve(words, k=most, show_progress=False, backend_selection="numpy")
    results = as_results(dataset, torch.from_numpy(scores), torch.from_numpy(rows), depth)
    run: Run = {}
    for query, documents in results.items():
        run[query] = {document: score for document, score in documents.items() if score > 0}
    warn_of_unmatched(dataset.name, sum(not documents for documents in run.values()), len(run))
    return run


def warn_of_unmatched(name: str, without: int, queries: int) -> None:
    """A warning where BM25 finds nothing for most queries: nobody would see in its low score why it is low."""
    if 2 * without > queries:
        log.warning(
            "%s: BM25 finds no document for %d of %d queries, because none of their words is in the corpus; "
            "check that queries and documents are in the same language", name, without, queries,
        )  # fmt: skip


def bm25_index(documents: list[str]):
    """The bm25s index of Lucene's variant, which takes queries as `bm25_words` gives them."""
    bm25s = _bm25s()
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(method="lucene")
    words = bm25_words(documents, return_ids=True)
    if not any(words.ids):  # bm25s cannot do without a word; this one is in no query
        words = bm25s.tokenization.Tokenized([[0] for _ in documents], {"\n": 0})
    index.index(words, show_progress=False)
    return index


def bm25_words(texts: list[str], *, return_ids: bool = False):
    """The words of each text but for English stop words; return_ids: numbered, as an index is built from them.

    Scripts that are written without blanks show no words: of them every two neighbouring letters are one, and every
    Chinese character too, as Lucene's CJKBigramFilter cuts them when it is asked for both.
    """
    bm25s = _bm25s()
    cut = [WITHOUT_BLANKS.sub(_pairs_of_letters, text) for text in texts]
    return bm25s.tokenize(cut, stopwords="en", token_pattern=WORD, return_ids=return_ids, show_progress=False)


def _bm25s():
    """The library. Where JAX is installed it calls that when it is imported, and JAX takes three quarters of a GPU's
    memory, unless it is shown none.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s

    return bm25s


def _pairs_of_letters(run: re.Match[str]) -> str:
    letters = run[0]
    pairs = [letters[start : start + 2] for start in range(len(letters) - 1)]
    single = [letter for letter in letters if HAN.match(letter) or not pairs]
    return f" {' '.join(pairs + single)} "
