"""Opens what is to be served, binds the port, and serves until it is asked to stop."""

import ipaddress
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from sgpt.data.formats.beir import read_search_corpus
from sgpt.encoder.adapter import base_of
from sgpt.encoder.delta import why_no_bias_delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import find_model, run_of
from sgpt.retrieval.index import open_index
from sgpt.retrieval.searcher import index_folder, load_encoder_and_reranker
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import announce, no_progress
from sgpt.serving.app import create_app
from sgpt.serving.config import ServeConfig
from sgpt.serving.models import ServedModel
from sgpt.serving.search_page import PageSystem, SearchPage

log = logging.getLogger(__name__)


def serve(config: ServeConfig, device: torch.device | str = "cpu") -> None:
    """Serves until SIGTERM or Ctrl-C; then finishes what was taken, within `stop_seconds`, and returns.

    InputError for a port that is taken, before anything is opened, and for what cannot be served.
    """
    listening = bind(config.host, config.port)
    announce(f"{config.model} is opened on {device}, to be served at {config.host}:{config.port}")
    with listening:
        model = open_served(config, device)
        page = open_page(model, config) if config.corpus else None
        app = create_app(model, config, page)
        host, port = listening.getsockname()[:2]
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback and config.api_key is None:
            log.warning("host=%s can be reached by others, and there is no api_key: whoever can, may use it", host)
        log.info("%s", start_line(model, config, f"http://{f'[{host}]' if ':' in host else host}:{port}"))
        # clients keep an idle connection for 5 s at most (httpx) and would meet the moment when it is closed
        options = {"log_config": None, "access_log": False, "server_header": False, "timeout_keep_alive": 75}
        settings = uvicorn.Config(app, timeout_graceful_shutdown=math.ceil(config.stop_seconds), **options)
        with no_progress():
            _Server(settings).run(sockets=[listening])
        log.info("stopped")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the port, so that nobody else can; InputError where it cannot be had.

    Who connects before the model is open waits for it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:  # the second for a name that no resolver is asked for: 127.0.0..1
        reason = error.strerror if isinstance(error, socket.gaierror) else error
        raise InputError(f"host={host} is no address ({reason}); set host=127.0.0.1, or one of yours") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise InputError(
            f"port={port} of {host} cannot be had ({error.strerror}); stop what listens there, or set another port, "
            "0 for any that is free"
        ) from None
    return listening


def start_line(model: ServedModel, config: ServeConfig, url: str) -> str:
    """What is served where, and what it takes."""
    parts = [f"{url} serves {model.name} ({model.embedding_size} numbers)"]
    if model.encoder.deltas:
        parts.append(f"deltas {', '.join(model.encoder.deltas)}")
    if model.reranker is not None:
        parts.append("re-ranking")
    parts.append(f"batches of {config.max_batch_tokens} tokens, {config.max_wait_ms:g} ms")
    parts.append(f"at most {config.max_requests} requests of {config.max_texts} texts, {config.max_body_bytes:,} bytes")
    parts.append("with an API key" if config.api_key else "no API key")
    return "; ".join(parts)


class _Server(uvicorn.Server):
    """uvicorn's, which ends with 0 when it was asked to stop and did."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As the original, which raises the signal again at the end: a process would end by it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self.handle_exit) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal cuts off what is still worked on."""
        self.force_exit = self.should_exit
        self.should_exit = True


def open_served(config: ServeConfig, device: torch.device | str = "cpu") -> ServedModel:
    """The model, and what requests may choose instead, over one trunk.

    A run is opened by its adapter over its base, so that the base, other deltas and the re-ranker share the trunk.
    Where its base is not there, its export is served alone. InputError for a delta over another base, and for a
    re-ranker or deltas without a base.
    """
    if not config.model:
        raise InputError("set model=<folder of a run, export, adapter or other model>, for example model=runs/pydocs")
    reranker = None
    if config.rerank:
        encoder, reranker = load_encoder_and_reranker(config.model, config.prompt, dtype=config.dtype, device=device)
    else:
        encoder = _open_encoder(config.model, config.dtype, device)
    for name, path in config.deltas.items():
        encoder.load_delta(name, path)
    encoder.tokens_per_pack = max(encoder.pack_size, config.max_batch_tokens)
    return ServedModel(config.name or served_name(config.model), encoder, reranker)


def _open_encoder(model: str, dtype: str, device: torch.device | str) -> Encoder:
    """By the adapter, with the change to the base put on for the time it encodes; else as any script opens it."""
    found = find_model(model, ("adapter",))
    if found.kind != "adapter" or why_no_bias_delta(found.folder):
        return Encoder.from_pretrained(model, dtype=dtype).to(device)
    try:
        base_of(found.folder)
    except InputError as error:
        if (export := find_model(model)).kind != "export":
            raise
        log.warning("%s is served without its base, and so without strength: %s", export.folder, error)
        return Encoder.from_pretrained(model, dtype=dtype).to(device)
    return Encoder.over_base(found.folder, dtype=dtype, device=device)[0]


def served_name(path: str) -> str:
    """Of a run's export or adapter the run's name, else that of the folder."""
    folder = Path(path).absolute() if Path(path).exists() else Path(path)
    return run_of(folder).name


def open_page(model: ServedModel, config: ServeConfig) -> SearchPage:
    """The search page's systems, with the index that train/search.py keeps, and one of the base next to it."""
    path = Path(config.corpus)
    corpus = read_search_corpus(path)
    folder = index_folder(config.model, path, config.dtype)
    encoder = model.encoder
    systems: list[PageSystem] = []
    title = "model"
    if encoder.delta is not None:
        title = "tuned"
        base = Encoder(encoder.trunk, encoder.tokenizer, encoder.contract, delta=encoder.delta.at(0.0))
        of_base = folder.with_name(f"{folder.name}-base")
        systems.append(PageSystem("base", open_index(base, corpus, of_base, config.index), 0.0))
    systems.append(PageSystem(title, open_index(encoder, corpus, folder, config.index), None))
    return SearchPage(model, corpus, systems, config.depth)
