"""Search in a corpus with a stored index.

An index is a folder: `embeddings.npy` [documents, D] float32 of length 1, opened by memory map, `ids.json`, and `index.json`
with the fingerprint of model, contract and corpus. An index with another fingerprint is stale and is built again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sgpt.data.beir import read_corpus
from sgpt.data.jsonl import read_rows
from sgpt.encoder import Encoder
from sgpt.errors import InputError
from sgpt.evaluate import search
from sgpt.files import write_whole


@dataclass(frozen=True)
class Hit:
    """score: cosine. name: the document's id."""

    score: float
    name: str
    text: str


class Searcher:
    """An encoder and the index of one corpus; builds or opens the index when made."""

    def __init__(self, encoder: Encoder, corpus: dict[str, str], folder: Path) -> None:
        self.encoder, self.corpus, self.names = encoder, corpus, list(corpus)
        stored = folder / "index.json"
        wanted = {"fingerprint": fingerprint(encoder, corpus), "documents": len(corpus)}
        if not stored.is_file() or json.loads(stored.read_text()) != wanted:
            stored.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / "embeddings.npy", encoder.encode_documents(list(corpus.values()), normalize=True))
            write_whole(stored, json.dumps(wanted))
        self.embeddings = np.load(folder / "embeddings.npy", mmap_mode="c")

    def __call__(self, query: str, top: int = 10) -> list[Hit]:
        """The best documents, best first."""
        vector = self.encoder.encode_queries([query], normalize=True, as_tensor=True)
        scores, rows = search(vector, torch.from_numpy(self.embeddings), top)
        return [Hit(score, self.names[row], self.corpus[self.names[row]]) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]


def read_documents(path: Path) -> dict[str, str]:
    """id -> text of a BEIR folder or of a file of JSON lines with `_id` and `text`."""
    if path.is_dir():
        return read_corpus(path)
    documents = {}
    for where, row in read_rows(path):
        if not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise InputError(f"{where}: needs text columns _id and text; it has {', '.join(row)}")
        documents[row["_id"]] = f"{row.get('title') or ''} {row['text']}".strip()
    return documents


def fingerprint(encoder: Encoder, corpus: dict[str, str]) -> str:
    """Changes with any weight, any part of the contract, any document."""
    digest = hashlib.sha256(encoder.contract.fingerprint().encode())
    for name, parameter in encoder.trunk.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    for name, text in corpus.items():
        digest.update(f"{name}\x1f{text}\x1e".encode())
    return digest.hexdigest()
