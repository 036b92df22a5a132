"""NLI triplets as SGPT trains on them, from SNLI and MultiNLI in any of their usual forms.

    AllNLI.tsv[.gz]                        split, …, sentence1, sentence2, label: rows of the split `train`
    snli_1.0_train.jsonl, multinli_1.0_train.jsonl     gold_label, sentence1, sentence2
    the same two as .txt                   tabs, a header, no quoting
    pairs.jsonl                            set, premise, hypothesis, label: this project's own, without sets `…_test`
    a folder                               all of these below it; of twins that differ in form only, one is read

The rules are those of `training_nli_v2.py` (Muennighoff/sgpt, after sentence-transformers): every labelled pair counts
in both directions; a sentence with at least one entailment and one contradiction partner gives two triplets,

    (sentence, an entailment partner, a contradiction partner)
    (an entailment partner, sentence, a contradiction partner of the sentence)

with partners drawn once, uniformly and independently. Neutral pairs are read and not used. Sentences are stripped.

What differs: the original draws from unordered sets without a seed; here the draws are a function of the pairs, in
their order, and of the seed. It keeps triplets that name a text twice (its loader compares an example with the others
of the batch, not with itself) or hold a blank one; such triplets teach nothing or the wrong thing and are left out,
counted in the log. They are left out after the draws, so all others are as they would be. Pairs without a gold label,
`-`, are skipped and counted: AllNLI has none of them.
"""

import logging
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sgpt.data.feed.example import Example
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.formats.lines import checked_lines
from sgpt.data.formats.row import listed, same_split, shown
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import files_below

NLI_LABELS = ("entailment", "neutral", "contradiction")
UNLABELLED = "-"
COLUMNS = {"label": ("gold_label", "label"), "first": ("sentence1", "premise"), "second": ("sentence2", "hypothesis")}
TRAINING_FILE = re.compile(r"(AllNLI|(snli|multinli)_.*train|pairs)\.(jsonl|txt|tsv)(\.gz)?")
FILE_FORMS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".tsv", ".tsv.gz")  # of twins the first one is read
log = logging.getLogger(__name__)


def nli_examples(path: Path, seed: int) -> Iterator[Example]:
    """Two triplets of every sentence that has both kinds of partners, in the order in which sentences first appear."""
    sentences, pairs = _numbered(training_files(path))
    triplets = np.array(list(_drawn(len(sentences), pairs, random.Random(seed))), np.int64).reshape(-1, 3)
    blank = np.array([not sentence for sentence in sentences], bool)[triplets].any(1)
    query, positive, negative = triplets.T
    repeated = ~blank & ((query == positive) | (query == negative) | (positive == negative))
    log.info(
        "%s: %d triplets, without %d of them that name a text twice and %d with a blank text",
        path,
        len(triplets),
        repeated.sum(),
        blank.sum(),
    )
    if len(triplets) == 0:
        raise InputError(
            f"{path}: no sentence has both an entailment and a contradiction, so there is no triplet in it; "
            "give more pairs"
        )
    for query, positive, negative in triplets[~blank & ~repeated].tolist():
        yield Example(sentences[query], sentences[positive], (sentences[negative],))


def training_files(path: Path) -> list[Path]:
    """`path` itself, or the training files below it by name; files that differ in form only count once."""
    if path.is_file():
        if not path.name.endswith(FILE_FORMS):
            raise InputError(f"{path}: pairs are read from {', '.join(FILE_FORMS)}; give a file of one of these forms")
        return [path]
    if not path.is_dir():
        raise InputError(
            f"{path}: no such file or folder; give AllNLI.tsv.gz, a training file of SNLI or MultiNLI, or their folder"
        )
    by_stem: dict[Path, list[Path]] = {}
    for file in files_below(path):
        if TRAINING_FILE.fullmatch(file.name):
            by_stem.setdefault(file.parent / _without_form(file.name), []).append(file)
    if not by_stem:
        entries = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        raise InputError(
            f"{path}: no AllNLI.tsv, snli_*_train, multinli_*_train or pairs.jsonl in it; it has {entries}"
        )
    return [min(twins, key=lambda file: FILE_FORMS.index(_form(file.name))) for _, twins in sorted(by_stem.items())]


def _form(name: str) -> str:
    return next(form for form in FILE_FORMS if name.endswith(form))


def _without_form(name: str) -> str:
    return name.removesuffix(_form(name))


def _numbered(files: Iterable[Path]) -> tuple[list[str], dict[str, array]]:
    """Every sentence once, in the order of the pairs; and by label the numbers of each pair, one after the other."""
    numbers: dict[str, int] = {}
    pairs = {label: array("q") for label in NLI_LABELS}
    for file in files:
        left_out: Counter[str] = Counter()
        count = 0
        for label, first, second in _pairs(file, left_out):
            pairs[label].extend((numbers.setdefault(first, len(numbers)), numbers.setdefault(second, len(numbers))))
            count += 1
        log.info(
            "%s: %d pairs%s", file, count, "".join(f", {number} {why} left out" for why, number in left_out.items())
        )
    return list(numbers), pairs


def _pairs(file: Path, left_out: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """label, first, second of every labelled pair of the training part."""
    for where, row in read_rows(file) if ".jsonl" in _form(file.name) else _tab_separated(file):
        if not same_split(str(row.get("split", "train")), "train"):
            left_out["of other splits"] += 1
        elif str(row.get("set", "")).endswith("_test"):
            left_out["of test sets"] += 1
        elif (label := _value(row, "label", where)) == UNLABELLED:
            left_out["without a gold label"] += 1
        elif label not in NLI_LABELS:
            raise InputError(

                    f"{where}, label: {label!r:.80} is unknown; labels are {', '.join(NLI_LABELS)}, "
                    f"or {UNLABELLED} for none"

            )
        else:
            yield label, _value(row, "first", where), _value(row, "second", where)


def _value(row: dict, role: str, where: str) -> str:
    theirs, ours = COLUMNS[role]
    name = theirs if theirs in row else ours
    if name not in row:
        raise InputError(
            f"{where}: no column {theirs} or {ours}; it has {listed(row)}. "
            "Fix it, or give a file of SNLI, MultiNLI or AllNLI"
        )
    if not isinstance(row[name], str):
        raise InputError(
            f"{where}, {name}: expected text, got {type(row[name]).__name__} {row[name]!r:.80}; give a string"
        )
    return row[name].strip()


def _tab_separated(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line n", row) under the first line's names; a quotation mark is a letter, as with csv.QUOTE_NONE."""
    header: list[str] | None = None
    for where, line in checked_lines(file):
        fields = line.split("\t")
        if header is None:
            header = fields
        elif len(fields) > len(header):
            # fewer are usual: the last columns of SNLI and MultiNLI may be left out of a line
            counts = f"{len(fields)} tab-separated fields where the header names {len(header)} columns"
            raise InputError(f"{where}: {counts}: {shown(line.strip())}; take the tabs out of the texts")
        elif line:
            yield where, dict(zip(header, fields, strict=False))


def _drawn(count: int, pairs: dict[str, array], draw: random.Random) -> Iterator[tuple[int, int, int]]:
    """query, positive, negative of every triplet, as numbers of sentences."""
    (entailment_starts, entailments), (contradiction_starts, contradictions) = (
        _partners(pairs[label], count) for label in ("entailment", "contradiction")
    )
    for sentence in range(count):
        entailed = entailments[entailment_starts[sentence] : entailment_starts[sentence + 1]]
        contradicted = contradictions[contradiction_starts[sentence] : contradiction_starts[sentence + 1]]
        if entailed and contradicted:
            yield sentence, draw.choice(entailed), draw.choice(contradicted)
            yield draw.choice(entailed), sentence, draw.choice(contradicted)


def _partners(pairs: array, count: int) -> tuple[list[int], list[int]]:
    """(starts, partners): those of sentence i are partners[starts[i] : starts[i + 1]], each once, in both directions.

    Sorted numbers and not a set for every sentence: of a million sentences those would take a gigabyte.
    """
    first, second = np.frombuffer(pairs, np.int64).reshape(-1, 2).T if pairs else np.empty((2, 0), np.int64)
    sources, partners = np.divmod(
        np.unique(np.concatenate([first * count + second, second * count + first])), max(count, 1)
    )
    return np.searchsorted(sources, np.arange(count + 1)).tolist(), partners.tolist()
