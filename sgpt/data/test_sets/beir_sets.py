"""The sets of BEIR by name: where they are, which split counts, what is left out of results, and what is averaged.

Rules as SGPT scored them (Muennighoff 2022, `biencoder/beir/beir_dense_retriever.py`): MS MARCO on dev, otherwise test;
documents with an empty text left out; CQADupStack is the mean of its twelve forums; the average has 18 sets without MS
MARCO, the sub-average 11. One deviation: the code drops a result with the query's own id everywhere, here only where
query and document of one id are one text (ArguAna, Quora); elsewhere equal ids are chance and the document may be the
answer.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sgpt.data.formats.beir import RetrievalSet, qrels_file, read_retrieval, split_files
from sgpt.data.test_sets.download import fetch
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import make_once

ADDRESS = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
REPRODUCE = "https://github.com/beir-cellar/beir/tree/main/examples/dataset"
FORUMS = (
    "android",
    "english",
    "gaming",
    "gis",
    "mathematica",
    "physics",
    "programmers",
    "stats",
    "tex",
    "unix",
    "webmasters",
    "wordpress",
)


@dataclass(frozen=True)
class Rules:
    """md5: of BEIR's zip, from BEIR's table of data sets; None where the licence forbids a zip.

    average, sub_average: whether the set counts there.
    """

    md5: str | None
    split: str = "test"
    average: bool = True
    sub_average: bool = False
    skip_own_id: bool = False


BEIR_SETS = {
    "msmarco": Rules("444067daf65d982533ea17ebd59501e4", split="dev", average=False),
    "trec-covid": Rules("ce62140cb23feb9becf6270d0d1fe6d1", sub_average=True),
    "bioasq": Rules(None),
    "nfcorpus": Rules("a89dba18a62ef92f7d323ec890a0d38d", sub_average=True),
    "nq": Rules("d4d3d2e48787a744b6f6e691ff534307"),
    "hotpotqa": Rules("f412724f78b0d91183a0e86805e16114", sub_average=True),
    "fiqa": Rules("17918ed23cd04fb15047f73e6c3bd9d9", sub_average=True),
    "signal1m": Rules(None),
    "trec-news": Rules(None),
    "robust04": Rules(None),
    "arguana": Rules("8ad3e3c2a5867cdced806d6503f29b99", sub_average=True, skip_own_id=True),
    "webis-touche2020": Rules("46f650ba5a527fc69e0a6521c5a23563", sub_average=True),
    "cqadupstack": Rules("4e41456d7df8ee7760a7f866133bda78"),
    "quora": Rules("18fb154900ba42a600f84b839c173167", sub_average=True, skip_own_id=True),
    "dbpedia-entity": Rules("c2a39eb420a3164af735795df012ac2c", sub_average=True),
    "scidocs": Rules("38121350fc3a4d2f48850f6aff52e4a9"),
    "fever": Rules("5a818580227bfb4b35bb6fa46d9b6c03", sub_average=True),
    "climate-fever": Rules("8b66f0a9126c521bae2bde127b4dc99d", sub_average=True),
    "scifact": Rules("5f7d1de60b170fc8027bb7898e2efca1", sub_average=True),
}
AVERAGES = {
    "average": frozenset(name for name, rules in BEIR_SETS.items() if rules.average),  # 18
    "sub_average": frozenset(name for name, rules in BEIR_SETS.items() if rules.sub_average),  # 11
}


@dataclass(frozen=True)
class BeirFolder:
    """A set that is there, not yet read.

    name: its results' key. rules: BEIR's for this set, None for any other folder.
    """

    name: str
    folder: Path
    split: str
    rules: Rules | None


def find_beir_folders(given: list[str], split: str | None, root: Path, *, address: str = ADDRESS) -> list[BeirFolder]:
    """Folders, names of folders below `root`, or names of BEIR to be downloaded there.

    split None: the set's own, test for any folder.

    A folder that is called like a set of BEIR, case and all, follows that set's rules. CQADupStack gives its forums.
    InputError for what is no folder and no name, for a split that is not there, and for a set given twice.
    """
    beir_folders: list[BeirFolder] = []
    for entry in given:
        folder = Path(entry) if Path(entry).is_dir() else _named(entry, root, address)
        name = folder.absolute().name
        rules = BEIR_SETS.get(name)
        own_split = split or (rules.split if rules else "test")
        if name == "cqadupstack":
            forums = (BeirFolder(f"{name}/{forum}", folder / forum, own_split, rules) for forum in FORUMS)
            beir_folders.extend(forums)
        else:
            beir_folders.append(BeirFolder(name, folder, own_split, rules))
    for one in beir_folders:
        qrels_file(one.folder, one.split)
    names = [one.name for one in beir_folders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            f"two evaluation sets are called {twice!r}, and results are kept by name; "
            "rename a folder, or evaluate one after the other"
        )
    return beir_folders


def splits(folder: Path) -> list[str]:
    return [file.stem for file in split_files(folder)]


def read_beir_folder(beir_folder: BeirFolder) -> RetrievalSet:
    if beir_folder.rules is None:
        return read_retrieval(beir_folder.folder, beir_folder.split, name=beir_folder.name)
    return read_retrieval(
        beir_folder.folder,
        beir_folder.split,
        name=beir_folder.name,
        skip_empty=True,
        skip_own_id=beir_folder.rules.skip_own_id,
    )


def averages(results: Mapping[str, Mapping[str, float]], metric: str = "ndcg@10") -> dict[str, float]:
    """BEIR's averages of a metric, each only when all of its sets are there: an average of some is another number of
    the same name.
    """
    complete = {kind: names for kind, names in AVERAGES.items() if names <= results.keys()}
    return {kind: sum(results[name][metric] for name in sorted(names)) / len(names) for kind, names in complete.items()}


def _named(name: str, root: Path, address: str) -> Path:
    folder = root / name
    if folder.is_dir():
        return folder
    if name not in BEIR_SETS:
        near = difflib.get_close_matches(name.lower(), BEIR_SETS, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else (
                "a BEIR folder with corpus.jsonl, queries.jsonl and qrels/ is needed, or one of "
                f"{', '.join(BEIR_SETS)}"
            )
        )
        raise InputError(f"{name}: no such folder, none of this name in {root}, and no name of a BEIR set; {hint}")
    if BEIR_SETS[name].md5 is None:
        raise InputError(
            f"{name}: not in {root}, and its licence allows no public copy; make it as {REPRODUCE} says, "
            f"then set beir_root=<folder that holds {name}/> or give its folder"
        )
    remedy = f"set beir_root=<folder that holds {name}/>, or give its folder"
    make_once(
        folder, folder.is_dir, lambda: fetch(f"{address}/{name}.zip", folder, md5=BEIR_SETS[name].md5, remedy=remedy)
    )
    return folder
