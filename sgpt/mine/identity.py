"""By what a mined file is known: everything that decides its rows, but for the configuration."""

import hashlib
import json
from pathlib import Path

from sgpt.mine.task import Task


def fingerprint(task: Task, source_digest: str) -> str:
    """Changes with every text, judgement, weight and score that is read; the configuration is compared apart."""
    digest = hashlib.sha256(source_digest.encode())
    for name, text in (*task.chosen.corpus.items(), *task.chosen.queries.items()):
        digest.update(f"{name}\x1f{text}\x1e".encode())
    digest.update(json.dumps(task.chosen.qrels).encode())
    for file in sorted(Path(task.config.rescore).rglob("*")) if task.config.rescore else ():
        if file.is_file():
            digest.update(f"{file.name} {file_digest(file)}".encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
