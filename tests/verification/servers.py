"""Servers of an export by transformers alone, the right one and those with one fault each; none of our encoder's code.

They batch as real ones do: what comes within a few milliseconds is computed together.
"""

import json
import queue
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

WINDOW_SECONDS = 0.004
MARKERS = {"query": "[]", "document": "{}"}


@dataclass
class Rows:
    """The token ids of one request, and their vectors when they are there."""

    ids: list[list[int]]
    model: str | None
    done: threading.Event = field(default_factory=threading.Event)
    vectors: list[list[float]] = field(default_factory=list)


class ByHand:
    """folders: of exports by the name of their delta, None is the model itself. tokenizer: folder of the base's.

    fault: None, or what is wrong. refuses: of a body, whether it is answered by `refusal` instead of vectors.
    """

    def __init__(
        self, folders: dict[str | None, Path], tokenizer: Path, limit: int, fault: str | None = None,
        refuses: Callable[[dict], bool] = lambda body: False, refusal: int = 422,
    ) -> None:  # fmt: skip
        self.refuses, self.refusal = refuses, refusal
        self.models = {name: AutoModel.from_pretrained(folder).eval() for name, folder in folders.items()}
        self.tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.limit = 128 if fault == "truncation to 128" else limit
        self.fault = fault
        self.waiting: queue.Queue[Rows] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def embed(self, texts: list[str], role: str | None, delta: str | None) -> list[list[float]]:
        opening, closing = MARKERS["document" if role is None or self.fault == "role" else role]
        rows = []
        if self.fault == "prompt":
            texts = [f"query: {text}" for text in texts]
        for text in texts:
            content = self.tokenizer.encode(text, add_special_tokens=False).ids[: self.limit - 2]
            around = [self.tokenizer.token_to_id(marker) for marker in (opening, closing)]
            # a text without any token would be no row, and none of the faults that are meant here
            if self.fault == "last token cut":
                content = content[:-1]
            closing_ids = [] if self.fault == "no closing marker" else around[1:]
            rows.append((content or around) if self.fault == "no markers" else [around[0], *content, *closing_ids])
        asked = Rows(rows, None if self.fault == "delta ignored" else delta)
        self.waiting.put(asked)
        asked.done.wait(600)
        return asked.vectors

    def _work(self) -> None:
        while True:
            together = [self.waiting.get()]
            time.sleep(WINDOW_SECONDS)
            while not self.waiting.empty():
                together.append(self.waiting.get())
            for model in {asked.model for asked in together}:
                self._compute([asked for asked in together if asked.model == model], self.models[model])

    @torch.no_grad()
    def _compute(self, together: list[Rows], model: torch.nn.Module) -> None:
        rows = [ids for asked in together for ids in asked.ids]
        lengths = [len(ids) for ids in rows]
        padded = torch.tensor([ids + [0] * (max(lengths) - len(ids)) for ids in rows])
        mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
        equal = len(rows) > 1 and len(set(lengths)) == 1
        if equal and (self.fault == "mask" or (self.fault == "mask under load" and len(together) > 1)):
            mask = torch.zeros(len(rows), 1, lengths[0], lengths[0])  # added to the scores: no token is hidden
        hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
        vectors = []
        for states, length in zip(hidden, lengths, strict=True):
            weights = torch.arange(1.0, length + 1)[:, None]
            pooled = (states[:length] * weights).sum(0) / weights.sum()
            if self.fault == "last token":
                pooled = states[length - 1]
            if self.fault == "unit lengths in batches" and len(together[0].ids) > 1:
                pooled = pooled / pooled.norm()
            if self.fault == "lengths off by 0.9 %":
                pooled = pooled * 1.009
            vectors.append((pooled * (3 if self.fault == "lengths" and length % 2 else 1)).tolist())
        if self.fault == "mixed up" and len(together) > 1:
            vectors = vectors[1:] + vectors[:1]
        for asked in together:
            asked.vectors, vectors = vectors[: len(asked.ids)], vectors[len(asked.ids) :]
            asked.done.set()


def answer_of(served: ByHand, path: str, body: dict) -> object:
    """In the shape of the API that has this path."""
    if path == "/embed":
        return served.embed(body["inputs"], body.get("prompt_name"), None)
    if path == "/v2/embed":
        role = (body.get("input_type") or "").removeprefix("search_") or None
        return {"embeddings": {"float": served.embed(body["texts"], role, None)}}
    vectors = served.embed(body["input"], body.get("input_type"), body.get("delta"))
    if body.get("encoding_format") == "base64":
        order = ">f4" if served.fault == "big-endian" else "<f4"
        vectors = [b64encode(np.array(vector, order).tobytes()).decode() for vector in vectors]
    first = 1 if served.fault == "index from 1" else 0
    data = [{"index": first + number, "embedding": vector} for number, vector in enumerate(vectors)]
    if served.fault == "numbers as text":
        data = [{"index": row["index"], "embedding": [str(one) for one in row["embedding"]]} for row in data]
    return {"object": "list", "data": data[::-1]}  # any order: the index counts


@contextmanager
def serving(served: ByHand | None, **replies: object) -> Iterator[SimpleNamespace]:
    """Its URL and the bodies that it got. replies: `status`, `text` and `seconds` of an answer that is none of it."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": "served"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(body | {"key": self.headers.get("authorization")})
            time.sleep(replies.get("seconds", 0))
            status = replies.get("status", 200)
            if status != 200 or "text" in replies or served is None:
                self._send(status, str(replies.get("text", "")))
            elif served.refuses(body):
                self._send(served.refusal, '{"error": {"message": "not this"}}')
            else:
                self._send(200, json.dumps(answer_of(served, self.path, body)))

        def _send(self, status: int, text: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        request_queue_size, daemon_threads = 128, True

        def handle_error(self, *arguments: object) -> None:
            """Of a client that does not wait for its answer."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", seen=seen)
        server.shutdown()
        thread.join()
