"""The HTTP API over a served model: what each path takes and gives, and what it refuses.

    POST /v1/embeddings          OpenAI's, with input_type, delta, strength and truncate
    POST /rerank, /v1/rerank     Cohere's, or with `texts` text-embeddings-inference's; with rerank=true
    POST /search, GET /          the search page, with a corpus
    GET  /v1/models  /contract  /health  /metrics

A request is parsed, checked and tokenised in threads next to the event loop, and computed by the one thread of
sgpt/serving/batching.py.
"""

import asyncio
import base64
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sgpt.runtime.errors import InputError
from sgpt.serving.batching import Batcher
from sgpt.serving.config import ServeConfig
from sgpt.serving.metrics import Metrics
from sgpt.serving.models import ServedModel, TextRow
from sgpt.serving.schema import EmbeddingRequest, Refusal, RerankRequest, SearchRequest, parse
from sgpt.serving.search_page import SearchPage

log = logging.getLogger(__name__)
SEARCH_PAGE = Path(__file__).with_name("search_page.html")
BODY_SECONDS = 30  # for a body: a client that stalls would keep its place for ever
PREPARING_THREADS = 4  # tokenisers are of Rust and leave Python to the others
IN_THE_LOOP = 16_384  # numbers of an answer that are written in the event loop: a millisecond
Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """One served model: its handlers, and what they share."""

    def __init__(self, model: ServedModel, config: ServeConfig, page: SearchPage | None = None) -> None:
        self.model, self.config, self.page = model, config, page
        self.metrics = Metrics()
        self.created = int(time.time())
        self.in_flight = 0
        self.threads = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        compute = {"embed": model.embed, "rerank": model.rerank, "contract": model.contracts}
        if page is not None:
            compute["search"] = page.search
        self.batcher = Batcher(compute, config.max_batch_tokens, config.max_wait_ms / 1000, self.metrics.observe)

    # what every request goes through

    def answered(self, path: str, handler: Handler, *, needs_key: bool = True) -> Handler:
        """The handler of a path, with the key checked, errors as JSON, a line in the log, and what /metrics counts."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            request.state.note = ""
            try:
                if needs_key:
                    self._check_key(request)
                response = await handler(request)
            except Refusal as refusal:
                request.state.note = refusal.message
                response = as_json(refusal.content(), refusal.status, refusal.headers)
            except InputError as error:  # what the model gave for these texts is no number
                request.state.note = str(error)
                response = as_json(Refusal(422, str(error)).content(), 422)
            except Exception as error:
                log.exception("%s %s", request.method, request.url.path)
                note = f"a fault of the server and not of the request ({type(error).__name__}); its log says more"
                response = as_json(Refusal(500, note).content(), 500)
            seconds = time.perf_counter() - started
            self.metrics.requests.labels(path, response.status_code).inc()
            self.metrics.latency.labels(path).observe(seconds)
            level = logging.INFO if request.method == "POST" or response.status_code >= 400 else logging.DEBUG
            line = "%s %s %d, %.1f ms%s"
            note = request.state.note and f", {request.state.note}"
            log.log(level, line, request.method, request.url.path, response.status_code, 1000 * seconds, note)
            return response

        return answer

    def _check_key(self, request: Request) -> None:
        expected = self.config.api_key
        if expected is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), expected.encode()):
            message = "the API key is missing or wrong; send the header Authorization: Bearer <key>"
            raise Refusal(401, message, www_authenticate="Bearer")

    def worked_on(self, handler: Handler) -> Handler:
        """The handler, where there is room for one more request; else 503, and when to come again."""

        async def admit(request: Request) -> Response:
            if not self.batcher.alive:
                raise Refusal(503, "the server is stopping; try another one, or again in a minute", retry_after="60")
            if self.in_flight >= self.config.max_requests:
                message = f"{self.in_flight} requests are being worked on or wait, and no more are taken; try again"
                raise Refusal(503, message, retry_after="1")
            self.in_flight += 1
            try:
                return await handler(request)
            finally:
                self.in_flight -= 1

        return admit

    async def body(self, request: Request) -> bytes:
        """The body, unless it is larger than it may be."""
        limit = self.config.max_body_bytes
        too_large = Refusal(413, f"the body is larger than {limit:,} bytes; send it in several requests")
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise Refusal(408, f"the body was not there after {BODY_SECONDS} seconds; send it at once") from None
        except ClientDisconnect:
            raise Refusal(400, "the connection ended before the whole body was there; send it again") from None
        return b"".join(parts)

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def _check_texts(self, texts: list[str], field: str) -> None:
        if not texts:
            raise Refusal(422, f"{field} is empty; send one text at least", field)
        if len(texts) > self.config.max_texts:
            message = f"{field} holds {len(texts):,} texts, and {self.config.max_texts:,} are taken at a time"
            raise Refusal(422, f"{message}; send them in several requests", field)
        for number, text in enumerate(texts):
            if len(text) > self.config.max_characters:
                most = f"{self.config.max_characters:,} are taken"
                raise Refusal(422, f"{field}[{number}] has {len(text):,} characters, and {most}; shorten it", field)

    def _check_truncation(self, truncated: list[int], wanted: bool | None, field: str) -> None:
        """Refusal where texts were cut and may not be."""
        may_cut = self.config.truncation == "say" if wanted is None else wanted
        if may_cut:
            self.metrics.truncated.inc(len(truncated))
        elif truncated:
            others = f" and {len(truncated) - 1} more" if len(truncated) > 1 else ""
            message = f"{field}[{truncated[0]}]{others} is longer than the model reads"
            raise Refusal(422, f"{message}; shorten it, or send \"truncate\": true to have it cut and listed", field)

    # the paths

    async def embeddings(self, request: Request) -> Response:
        body = await self.body(request)
        asked, rows, understood = await self.in_thread(self._prepare_embeddings, body)
        tokens = [len(row.ids) for row in rows]
        embeddings = await self.batcher.submit("embed", rows, tokens)
        request.state.note = f"{len(rows)} texts, {sum(tokens)} tokens"
        usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
        answer = partial(_embeddings_answer, asked, embeddings, {"usage": usage, **understood})
        numbers = len(rows) * self.model.embedding_size
        return answer() if numbers <= IN_THE_LOOP else await self.in_thread(answer)

    def _prepare_embeddings(self, body: bytes) -> tuple[EmbeddingRequest, list[TextRow], dict[str, Any]]:
        """The request, its texts as they are computed, and what the answer says of how it was understood."""
        asked = parse(EmbeddingRequest, body)
        texts = asked.texts
        self._check_texts(texts, "input")
        delta = self.model.delta_named(asked.model, asked.delta)
        size = self.model.embedding_size
        if asked.dimensions is not None and asked.dimensions > size:
            raise Refusal(422, f"dimensions={asked.dimensions} is more than the {size} of the model", "dimensions")
        rows, truncated = self.model.prepare(texts, asked.role, delta, asked.strength)
        self._check_truncation(truncated, asked.truncate, "input")
        chosen = {"input_type": asked.role, "delta": delta, "strength": asked.strength}
        return asked, rows, {"model": delta or self.model.name, **chosen, "truncated": truncated}

    async def rerank(self, request: Request) -> Response:
        body = await self.body(request)
        asked, texts, truncated = await self.in_thread(self._prepare_rerank, body)
        tokens = [len(text.read) for text in texts]
        scores = await self.batcher.submit("rerank", texts, tokens)
        request.state.note = f"{len(scores)} documents, {sum(tokens)} tokens"
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
        if asked.texts is not None:
            shown = scores if asked.raw_scores else [1 / (1 + math.exp(min(-score, 700))) for score in scores]
            rows = [{"index": index, "score": shown[index]} for index in best]
            if asked.return_text:
                rows = [row | {"text": asked.documents[row["index"]]} for row in rows]
            return as_json(rows)
        results = []
        for index in best:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if asked.return_documents:
                result["document"] = {"text": asked.documents[index]}
            results.append(result)
        usage = {"total_tokens": sum(tokens)}
        answer = {"model": self.model.name, "results": results, "truncated": truncated, "usage": usage}
        return as_json(answer)

    def _prepare_rerank(self, body: bytes) -> tuple[RerankRequest, list, list[int]]:
        asked = parse(RerankRequest, body)
        self._check_texts(asked.documents, "documents")
        self._check_texts([asked.query], "query")
        if self.model.delta_named(asked.model, None) is not None:
            raise Refusal(
                422, f"model={asked.model} is a delta, and the re-ranker is the base itself; leave model out", "model"
            )
        texts, truncated = self.model.prepare_rerank(asked.query, asked.documents)
        # text-embeddings-inference's answer has no place for what was cut, and its default is to refuse
        truncate = asked.truncate if asked.texts is None else asked.truncate is True
        self._check_truncation(truncated, truncate, "documents" if asked.texts is None else "texts")
        return asked, texts, truncated

    async def search(self, request: Request) -> Response:
        if self.page is None:
            raise Refusal(404, "there is no corpus to search; start the server with corpus=<BEIR folder or JSON lines>")
        asked, rows, truncated = await self.in_thread(self._prepare_search, self.page, await self.body(request))
        answer = await self.page.answer(asked.query, rows, asked.top, self.batcher, self.in_thread)
        return as_json({**answer, "truncated": truncated})

    def _prepare_search(self, page: SearchPage, body: bytes) -> tuple[SearchRequest, dict[str, TextRow], bool]:
        asked = parse(SearchRequest, body)
        self._check_texts([asked.query], "query")
        rows, truncated = page.prepare(asked.query)
        if truncated and self.config.truncation == "refuse":
            raise Refusal(422, "query is longer than the model reads; shorten it", "query")
        self.metrics.truncated.inc(truncated)
        return asked, rows, truncated

    async def search_page(self, request: Request) -> Response:
        if self.page is None:
            raise Refusal(404, "there is no search page; start the server with corpus=<BEIR folder or JSON lines>")
        return HTMLResponse(SEARCH_PAGE.read_text(encoding="utf-8"))

    async def models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": [self._model(name) for name in self.model.names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.model.delta_named(name, None)
        return as_json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self.model.name else self.model.name
        return {"id": name, "object": "model", "created": self.created, "owned_by": "sgpt", "parent": parent}

    async def contract(self, request: Request) -> Response:
        """What the model is: by it a client can tell whether the vectors are those of its own copy."""
        names = self.model.names
        own, *others = await self.batcher.submit("contract", names, [0] * len(names))
        deltas = {name: asdict(contract) for name, contract in zip(names[1:], others, strict=True)}
        stated = {"model": self.model.name, "embedding_size": self.model.embedding_size, "contract": asdict(own)}
        return as_json({**stated, "deltas": deltas})

    async def health(self, request: Request) -> Response:
        ready = self.batcher.alive
        state = {"live": True, "ready": ready, "in_flight": self.in_flight, "queued_tokens": self.batcher.queued_tokens}
        return as_json(state, 200 if ready else 503)

    async def metrics_text(self, request: Request) -> Response:
        self.metrics.in_flight.set(self.in_flight)
        self.metrics.queued_tokens.set(self.batcher.queued_tokens)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def create_app(model: ServedModel, config: ServeConfig, page: SearchPage | None = None) -> FastAPI:
    """The app of one model; its thread ends with it."""
    server = Server(model, config, page)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.batcher.stop, config.stop_seconds)
        server.threads.shutdown(wait=False)

    # its pages for people would be loaded from elsewhere
    app = FastAPI(title="sgpt", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server

    def post(path: str, handler: Handler, schema: type[BaseModel]) -> None:
        described = {"requestBody": {"content": {"application/json": {"schema": schema.model_json_schema()}}}}
        route = server.answered(path, server.worked_on(handler))
        app.post(path, response_model=None, openapi_extra=described, summary=schema.__doc__)(route)

    def get(path: str, handler: Handler, *, needs_key: bool = True) -> None:
        app.get(path, response_model=None)(server.answered(path, handler, needs_key=needs_key))

    post("/v1/embeddings", server.embeddings, EmbeddingRequest)
    for path in ("/rerank", "/v1/rerank"):
        post(path, server.rerank, RerankRequest)
    post("/search", server.search, SearchRequest)
    get("/", server.search_page, needs_key=False)  # which asks for the key itself
    get("/v1/models", server.models)
    get("/v1/models/{name:path}", server.one_model)  # as a hub id has a slash
    get("/contract", server.worked_on(server.contract))  # its probes are computed
    get("/health", server.health, needs_key=False)
    get("/metrics", server.metrics_text)

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> Response:
        server.metrics.requests.labels("other", error.status_code).inc()
        paths = ", ".join(sorted({route.path for route in app.routes}))
        message = f"{request.method} {request.url.path}: {str(error.detail).lower()}; the paths are {paths}"
        return as_json(Refusal(error.status_code, message).content(), error.status_code)

    return app


def _embeddings_answer(asked: EmbeddingRequest, embeddings: Sequence[np.ndarray], said: dict[str, Any]) -> Response:
    """OpenAI's answer, with what else is `said`."""
    data = []
    for index, embedding in enumerate(embeddings):
        if asked.dimensions is not None:
            embedding = embedding[: asked.dimensions]
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        if asked.encoding_format == "base64":
            written = base64.b64encode(embedding.astype("<f4").tobytes()).decode()
        else:
            written = embedding.tolist()
        data.append({"object": "embedding", "index": index, "embedding": written})
    return as_json({"object": "list", "data": data, **said})


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")
