"""`pydocs`: semantic search over the documentation of the Python installation that runs this.

Every public function, class and method of the standard library and of this project's own dependencies whose docstring
has a summary and a body becomes one example:

    query          the summary line                  "Return the remainder of the division."
    document       signature and body, without the summary and without the object's own name
    hard negative  the document of another object of the same module

Summary and name are cut out of the document, so that the task is to understand it and not to find a string in it.
Sources are read with `ast` and never imported: importing `antigravity` opens a browser. Objects written in C have no
source and are not found. The split is by top-level package: nothing of an evaluation package is ever trained on.
The result depends only on the installed versions; `manifest.json` next to it records counts and a content hash.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import logging
import multiprocessing
import os
import re
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from sgpt.data.formats.jsonl import write_rows
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import make_once, write_whole
from sgpt.runtime.progress import progress_bar

log = logging.getLogger(__name__)

# Whole packages are held out, chosen for breadth: data frames, graphs, terminal, networking, dates, parsing.
EVALUATION = {
    "dev": ("rich", "aiohttp", "tarfile", "zipfile", "argparse", "logging", "configparser", "multidict", "pydantic"),
    "test": ("networkx", "email", "http", "urllib", "asyncio", "datetime", "statistics", "json", "csv", "random",
             "threading", "subprocess", "pathlib", "tempfile", "shutil", "calendar", "difflib", "textwrap", "httpx",
             "huggingface_hub"),
}
SKIPPED = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "__pycache__",
    "_vendor",
    "vendor",
}
MIN_SUMMARY_WORDS, MAX_SUMMARY_WORDS, MIN_BODY_WORDS = 3, 40, 8
PROJECT = "sgpt-framework"


@dataclass(frozen=True)
class Documented:
    """One object with a docstring: `name` is its dotted path, `module` the dotted path of its file."""

    name: str
    module: str
    package: str
    summary: str
    document: str


def build(folder: Path) -> Path:
    """Harvests into `folder`, unless it holds the harvest of exactly these versions already, and returns it.

    train.jsonl                query, positive, negative, name: the training examples
    pydocs_dev/, pydocs_test/  BEIR folders of the held-out packages, each over its own corpus
    stdlib/, everything/       corpora to search in, ids are dotted names
    manifest.json              counts, versions, content hash
    """
    key = _key()
    make_once(folder, lambda: _read_manifest(folder).get("key") == key, lambda: _build(folder, key))
    return folder


def _read_manifest(folder: Path) -> dict[str, Any]:
    """{} where there is none, or a damaged one: then the harvest is made anew."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _build(folder: Path, key: str) -> None:
    manifest, earlier = folder / "manifest.json", _read_manifest(folder)
    documented = harvest(installed_packages())
    digest = harvest_hash(documented)
    if earlier and earlier.get("sha256") != digest:
        log.warning(
            "%s is harvested anew: it is that of a Python %s with other packages than those of this one, %s, or of "
            "another version of sgpt; scores on it are no longer those of before",
            folder, earlier.get("python"), sys.version.split()[0],
        )  # fmt: skip
    splits: dict[str, list[Documented]] = {"train": [], "dev": [], "test": []}
    for one in documented:
        splits[split_of(one.package)].append(one)
    manifest.unlink(missing_ok=True)  # written last: a killed harvest never looks whole
    write_rows(folder / "train.jsonl", _with_negatives(splits["train"]))
    for split in ("dev", "test"):
        _write_retrieval_set(folder / f"pydocs_{split}", split, splits[split])
    _write_corpus(folder / "stdlib", [one for one in documented if one.package in sys.stdlib_module_names])
    _write_corpus(folder / "everything", documented)
    write_whole(manifest, json.dumps({
        "key": key,
        "objects": {split: len(one) for split, one in splits.items()},
        "packages": {split: sorted({one.package for one in part}) for split, part in splits.items()},
        "python": sys.version.split()[0],
        "sha256": digest,
    }, indent=2) + "\n")


def _write_retrieval_set(folder: Path, split: str, documented: list[Documented]) -> None:
    _write_corpus(folder, documented)
    write_rows(folder / "queries.jsonl", ({"_id": f"q:{one.name}", "text": one.summary} for one in documented))
    (folder / "qrels").mkdir(exist_ok=True)
    lines = [f"q:{one.name}\t{one.name}\t1\n" for one in documented]
    write_whole(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))


def harvest(packages: dict[str, list[Path]]) -> list[Documented]:
    """All documented objects, sorted by name, repeated names, summaries and documents dropped (the first stays)."""
    seen: set[str] = set()
    kept: list[Documented] = []
    order = sorted(packages)
    with (
        ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool,
        progress_bar("reading docstrings", len(order)) as advance,
    ):
        for of_package in pool.map(_documented_in, order, (packages[name] for name in order)):
            advance(1)
            for one in of_package:
                keys = {"n" + one.name, "q" + _normalised(one.summary), "d" + _normalised(one.document)}
                if not keys & seen:
                    seen |= keys
                    kept.append(one)
    return sorted(kept, key=lambda one: one.name)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _documented_in(package: str, files: list[Path]) -> list[Documented]:
    return [one for file in files for one in documented_objects(file, package)]


def _with_negatives(documented: list[Documented]) -> Iterator[dict[str, str]]:
    """The next object of the same module, in a circle; a module with one object borrows its package's next one."""
    by_module: dict[str, list[Documented]] = {}
    for one in documented:
        by_module.setdefault(one.module, []).append(one)
    for position, one in enumerate(documented):
        siblings = by_module[one.module]
        nearest = siblings if len(siblings) > 1 else documented
        here = siblings.index(one) if nearest is siblings else position
        other = nearest[(here + 1) % len(nearest)]
        yield {"name": one.name, "query": one.summary, "positive": one.document, "negative": other.document}


def _write_corpus(folder: Path, documented: list[Documented]) -> None:
    write_rows(folder / "corpus.jsonl", ({"_id": one.name, "text": one.document} for one in documented))


def _key() -> str:
    """Of the interpreter, the dependencies' versions and this file: what the harvest depends on."""
    versions = [f"{name} {version}" for name, version in sorted(_distributions(PROJECT))]
    text = "\n".join([sys.version, *versions, Path(__file__).read_text(encoding="utf-8")])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_of(package: str) -> str:
    """"train", "dev" or "test": a package is wholly in one of them, with its twin in Python: datetime's source is
    _pydatetime since 3.12.
    """
    return next((split for split, packages in EVALUATION.items() if package.removeprefix("_py") in packages), "train")


def installed_packages() -> dict[str, list[Path]]:
    """Top-level package name -> its Python files, for the standard library and this project's dependencies.

    Other packages of the environment are left out: the data must not change because a plotting library was installed.
    """
    packages: dict[str, list[Path]] = {}
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    for name in sys.stdlib_module_names:
        if name not in SKIPPED:
            packages[name] = _python_files(standard_library, name)
    for name, root in _dependencies(PROJECT):
        packages.setdefault(name, _python_files(root, name))
    return {name: files for name, files in packages.items() if files}


def documented_objects(file: Path, package: str) -> Iterator[Documented]:
    """The public documented objects of one source file, in the order of the file.

    A file that is not Python 3 has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's "\\d" outside of raw strings
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken fixtures exist in released packages
        return
    parts = file.with_suffix("").parts
    start = len(parts) - 1 - parts[::-1].index(package) if package in parts else len(parts) - 1
    module = ".".join(part for part in parts[start:] if part != "__init__")
    for prefix, node in _public_nodes(tree, ""):
        docstring = ast.get_docstring(node)
        example = _summary_and_body(docstring, node.name) if docstring else None
        if example:
            summary, body = example
            document = f"{_signature(node)} {body}".strip()
            yield Documented(f"{module}.{prefix}{node.name}", module, package, summary, document)


def harvest_hash(documented: list[Documented]) -> str:
    digest = hashlib.sha256()
    for one in documented:
        digest.update("\x1f".join((one.name, one.summary, one.document)).encode() + b"\n")
    return digest.hexdigest()


def _public_nodes(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix, child
            if isinstance(child, ast.ClassDef):
                yield from _public_nodes(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _public_nodes(child, prefix)


def _summary_and_body(docstring: str, name: str) -> tuple[str, str] | None:
    """The first paragraph and the rest; None when either is too thin to search with."""
    # some write "\0" for "\\0"
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).replace("\0", ""), maxsplit=1)
    if len(paragraphs) < 2:
        return None
    summary, body = (" ".join(part.split()) for part in paragraphs)
    body = re.sub(rf"\b{re.escape(name)}\b", "", body)
    body = " ".join(body.replace(summary, "").split())
    if not MIN_SUMMARY_WORDS <= len(summary.split()) <= MAX_SUMMARY_WORDS or len(body.split()) < MIN_BODY_WORDS:
        return None
    return summary, body


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return "(" + ", ".join(name for name in names if name not in ("self", "cls", node.name)) + ")"


def _python_files(root: Path, name: str) -> list[Path]:
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    folder = root / name
    return sorted(file for file in folder.rglob("*.py") if not SKIPPED & set(file.relative_to(folder).parts))


def _dependencies(project: str) -> list[tuple[str, Path]]:
    """(top-level package, folder) for everything that the project's core requirements pull in."""
    folders: dict[str, Path] = {}
    for name, _ in _distributions(project):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or []:
            top = file.parts[0]
            if file.suffix == ".py" and not top.endswith((".dist-info", ".data")) and top not in ("..", "bin"):
                folders.setdefault(top.removesuffix(".py"), Path(str(distribution.locate_file(""))))
    return sorted(folders.items())


def _distributions(project: str) -> list[tuple[str, str]]:
    """(name, version) of the installed distributions that the project requires, directly or not, itself left out."""
    waiting, met = [project], {}
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in met:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name == project:
                raise InputError(f"the distribution {project} is not installed; run pip install -e . first") from None
            continue  # needed on another platform only
        met[name] = distribution.version
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return sorted((name, version) for name, version in met.items() if name != project)


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
