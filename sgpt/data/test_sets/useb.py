"""USEB's four tasks from its folder `data-eval`, in the layout of github.com/UKPLab/useb (Wang, Reimers, Gurevych 2021,
TSDAE).

    askubuntu/    text_tokenized.txt, dev.txt, test.txt      cqadupstack/  corpus.json, retrieval_split.json
    scidocs/      data.json                                  twitterpara/  Twitter_URL_Corpus_test.txt, test.data

All four are read. As there, titles alone are compared in AskUbuntu and SciDocs, and TwitterPara has a test split only.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpt.data.formats.beir import MAX_RELEVANCE, Qrels, RetrievalSet
from sgpt.data.formats.lines import check_is_there, checked_lines, read_json_file
from sgpt.data.formats.row import listed, same_split, shown
from sgpt.data.formats.scored_pairs import PairSet
from sgpt.runtime.errors import InputError

USEB_SPLITS = {"test": "test", "dev": "valid"}  # ours -> USEB's
# TwitterPara's label of pairs that average precision leaves out: above it paraphrases, below it none
NEITHER = 3


@dataclass(frozen=True)
class CandidateSet:
    """A few candidates for each query.

    texts: id -> text; candidates: query id -> document ids, in the source's order.
    """

    name: str
    texts: dict[str, str]
    candidates: dict[str, list[str]]
    qrels: Qrels


@dataclass(frozen=True)
class UsebTask:
    """name: its folder's. parts: forums, sources or kinds of relation, over which the task's result is the mean."""

    name: str
    parts: list[CandidateSet] | list[RetrievalSet] | list[PairSet]


def read_useb(folder: Path, split: str) -> list[UsebTask]:
    """The tasks that are there. Names in no file, and files that are not as described, are refused."""
    theirs = next((name for ours, name in USEB_SPLITS.items() if same_split(ours, split)), None)
    if theirs is None:
        raise InputError(f"split={split}: USEB has test and dev; set one of them, or leave useb={folder} out")
    names = [
        name for name in TASK_READERS if (folder / name).is_dir() and not (name == "twitterpara" and theirs != "test")
    ]
    if not names:
        raise InputError(
            f"useb={folder}: holds none of {', '.join(TASK_READERS)}; give the folder data-eval of USEB's data-eval.zip"
        )
    tasks = [UsebTask(name, TASK_READERS[name](folder / name, theirs)) for name in names]
    for task in tasks:
        if not task.parts or not all(map(_has_something, task.parts)):
            raise InputError(
                f"{folder / task.name}: nothing to score in split {split!r}, or in a part of it; is it whole?"
            )
    return tasks


def _has_something(part: CandidateSet | RetrievalSet | PairSet) -> bool:
    if isinstance(part, PairSet):
        return len(set(part.scores)) > 1
    if isinstance(part, CandidateSet):
        return any(part.candidates.values())
    return any(part.qrels.values()) and bool(part.corpus)


def _askubuntu(folder: Path, split: str) -> list[CandidateSet]:
    """Twenty candidates by BM25 a query; those it judges similar are the relevant ones.

    Queries without any are left out.
    """
    titles = {fields[0].strip(): fields[1].strip() for _, fields in _lines(folder / "text_tokenized.txt", 2)}
    candidates, qrels = {}, {}
    judged_file = folder / ("dev.txt" if split == "valid" else "test.txt")
    for where, (query, similar, listed_names, scores) in _lines(judged_file, 4):
        names, numbers = listed_names.split(), scores.split()
        if len(names) != len(numbers):
            raise InputError(
                f"{where}: {len(names)} candidates and {len(numbers)} scores; there must be as many, fix the line"
            )
        # stable, as the original's
        order = sorted(range(len(names)), key=lambda index: -_number(numbers[index], where))
        if relevant := set(similar.split()) & set(names):
            candidates[query] = [names[index] for index in order]
            qrels[query] = dict.fromkeys(sorted(relevant), 1)
        for name in (query, *names):
            if name not in titles:
                raise InputError(
                    f"{where}: question id {shown(name)} is not in {folder}/text_tokenized.txt; "
                    "the files do not belong together"
                )
    return [CandidateSet("askubuntu", titles, candidates, qrels)]


def _cqadupstack(folder: Path, split: str) -> list[RetrievalSet]:
    """A forum each. Its queries are no documents, so that no query finds itself."""
    corpus, judged = _json(folder / "corpus.json"), _json(folder / "retrieval_split.json", split)
    forums = []
    for forum, relevant in judged.items():
        texts = _of_texts(corpus.get(forum, {}), f"{folder}/corpus.json, {shown(forum)}")
        for query, names in _object(relevant, f"{folder}/retrieval_split.json, {shown(forum)}").items():
            _list_of_texts(names, f"{folder}/retrieval_split.json, {shown(forum)}, query id {shown(query)}")
        if unknown := next((query for query in relevant if query not in texts), None):
            raise InputError(
                f"{folder}/retrieval_split.json: query id {shown(unknown)} of {forum} is not in corpus.json; "
                "the files do not belong together"
            )
        documents = {name: text for name, text in texts.items() if name not in relevant}
        qrels = {query: dict.fromkeys(names, 1) for query, names in relevant.items()}
        forums.append(RetrievalSet(forum, documents, {query: texts[query] for query in relevant}, qrels))
    return forums


def _scidocs(folder: Path, split: str) -> list[CandidateSet]:
    """cite, cocite, coview, coread: some thirty papers a query, five of them related.

    Papers without a title are no candidates.
    """
    data = _json(folder / "data.json")
    if missing := [key for key in ("corpus", split) if key not in data]:
        raise InputError(f"{folder}/data.json: has no {missing[0]!r}; it has {listed(data)}. Is it USEB's file?")
    papers, where = _object(data["corpus"], f"{folder}/data.json, corpus"), f"{folder}/data.json"
    titles = _of_texts(
        {name: _object(paper, f"{where}, paper {shown(name)}").get("title") or "" for name, paper in papers.items()},
        f"{where}, titles",
    )
    for kind, qrels in _object(data[split], f"{where}, {split}").items():
        for query, judged in _object(qrels, f"{where}, {shown(kind)}").items():
            if odd := next(
                (
                    score
                    for score in _object(judged, f"{where}, {shown(kind)}, query id {shown(query)}").values()
                    if not _is_judgement(score)
                ),
                None,
            ):
                raise InputError(
                    f"{where}, {shown(kind)}, query id {shown(query)}: "
                    f"judgement {shown(odd)} is no whole number up to {MAX_RELEVANCE:,}; fix it"
                )
    return [
        CandidateSet(kind, titles, _with_titles(qrels, titles), qrels)
        for kind, qrels in data[split].items()
    ]  # fmt: skip


def _with_titles(qrels: Qrels, titles: dict[str, str]) -> dict[str, list[str]]:
    """query id -> candidates, both only where there is a title to compare."""
    return {
        query: [name for name in judged if titles.get(name)] for query, judged in qrels.items() if titles.get(query)
    }


def _twitterpara(folder: Path, split: str) -> list[PairSet]:
    """Scores are the labels: of the URL corpus how many of six annotators said yes, 0 to 6, of PIT-2015 the expert's, 0
    to 5.
    """
    pairs = {"twitterurl": PairSet("twitterurl", [], [], []), "pit": PairSet("pit", [], [], [])}
    for name, file, columns, label in (
        ("twitterurl", "Twitter_URL_Corpus_test.txt", (0, 1, 2), r"\((\d+), *\d+\)"),
        ("pit", "test.data", (2, 3, 4), r"(\d+)"),
    ):
        for where, fields in _lines(folder / file, max(columns) + 1):
            first, second, given = (fields[column] for column in columns)
            match = re.fullmatch(label, given.strip())
            if not match:
                raise InputError(
                    f"{where}: label {shown(given)} is not of the form {'(4, 6)' if name == 'twitterurl' else '4'}; "
                    "fix it"
                )
            pairs[name].first.append(first)
            pairs[name].second.append(second)
            pairs[name].scores.append(float(match[1]))
    return list(pairs.values())


TASK_READERS = {"askubuntu": _askubuntu, "cqadupstack": _cqadupstack, "twitterpara": _twitterpara, "scidocs": _scidocs}


def _lines(file: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """The place ("file, line n") and the first `columns` tab-separated fields of each line."""
    for where, line in checked_lines(file, "the task needs it"):
        fields = line.split("\t")
        if len(fields) < columns:
            counts = f"{len(fields)} tab-separated fields, {columns} are needed"
            raise InputError(f"{where}: {counts}: {shown(line.strip())}; fix or remove the line")
        yield where, fields[:columns]


def _json(file: Path, key: str | None = None) -> dict[str, Any]:
    """The file's object, or the one under `key` in it."""
    check_is_there(file, "the task needs it")
    content = read_json_file(file, "take it from data-eval.zip again")
    if not isinstance(content, dict) or (key and not isinstance(content.get(key), dict)):
        raise InputError(f"{file}: expected an object{f' with {key!r} in it' if key else ''}; is it USEB's file?")
    return content[key] if key else content


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {type(value).__name__} {shown(value)}; is it USEB's file?")
    return value


def _of_texts(value: object, where: str) -> dict[str, str]:
    if odd := next((name for name, text in _object(value, where).items() if not isinstance(text, str)), None):
        raise InputError(f"{where}: {shown(odd)} is {shown(value[odd])}, which is no text; write it in quotes")
    return value


def _is_judgement(value: object) -> bool:
    return type(value) is int and abs(value) <= MAX_RELEVANCE


def _list_of_texts(value: object, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{where}: expected a list of document ids, got {shown(value)}; fix it")


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: score {shown(text)} is no number; fix it")
    return number
