"""BM25 (bm25s, Lucene's variant): the lexical first stage and the yardstick."""

import logging
import re

import torch

from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.trec import Run
from sgpt.retrieval.dense import DEPTH, as_results

log = logging.getLogger(__name__)
LETTERS = (  # of the scripts without blanks: Chinese and Japanese; Thai, Lao; Tibetan, Burmese; Khmer. With their marks, which re's \w leaves out
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf\u0f20-\u0f33\u0f40-\u0fbc\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17e0-\u17e9"
)
HAN = re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
INDIC = "\u0900-\u0963\u0966-\u0df3"  # with blanks, but with marks inside of words as well
WITHOUT_BLANKS = re.compile(f"[{LETTERS}]+")
WORD = rf"(?u)[{LETTERS}]+|[{INDIC}][{INDIC}\u200c\u200d]+|\b\w\w+\b"  # the last is bm25s' own


def bm25_run(chosen: RetrievalSet, depth: int = DEPTH, index=None) -> Run:
    """index: of `bm25_index`, when it is there already. A document without any of the query's words is no result."""
    index, words = index or bm25_index(list(chosen.corpus.values())), bm25_words(list(chosen.queries.values()))
    rows, scores = index.retrieve(words, k=min(depth + chosen.skip_own_id, len(chosen.corpus)), show_progress=False)
    run = as_results(chosen, torch.from_numpy(scores), torch.from_numpy(rows), depth)
    run = {query: {document: score for document, score in documents.items() if score > 0} for query, documents in run.items()}
    tell_unmatched(chosen.name, sum(not documents for documents in run.values()), len(run))
    return run


def tell_unmatched(name: str, without: int, queries: int) -> None:
    """A warning where BM25 finds nothing for most queries: its score is then low for a reason that nobody sees in it."""
    if 2 * without > queries:
        told = "%s: BM25 finds no document for %d of %d queries, as no word of theirs is in the corpus; are both of one language, and texts?"
        log.warning(told, name, without, queries)


def bm25_index(documents: list[str]):
    """The bm25s index of Lucene's variant, to be asked with `bm25_words`."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(method="lucene")
    words = bm25_words(documents, return_ids=True)
    if not any(words.ids):  # bm25s cannot do without a word; this one is in no query
        words = bm25s.tokenization.Tokenized([[0] for _ in documents], {"\n": 0})
    index.index(words, show_progress=False)
    return index


def bm25_words(texts: list[str], *, return_ids: bool = False):
    """The words of each text but for English stop words; return_ids: numbered, as an index is made of them.

    Scripts that are written without blanks have no words to be seen: of them every two neighbouring letters are one, and every
    Chinese character too, as Lucene's CJKBigramFilter cuts them when it is asked for both.
    """
    import bm25s

    cut = [WITHOUT_BLANKS.sub(_pairs_of_letters, text) for text in texts]
    return bm25s.tokenize(cut, stopwords="en", token_pattern=WORD, return_ids=return_ids, show_progress=False)


def _pairs_of_letters(run: re.Match[str]) -> str:
    letters = run[0]
    pairs = [letters[place : place + 2] for place in range(len(letters) - 1)]
    single = [letter for letter in letters if HAN.match(letter) or not pairs]
    return f" {' '.join(pairs + single)} "
