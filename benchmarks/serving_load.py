"""Does the server give every vector right under load, and how fast is it next to one-by-one encoding and a peer?

    python benchmarks/serving_load.py [--requests 10000] [--concurrency 64] [--data squad] [--threads 2]
        [--peer <infinity_emb>]

A request is one text. One after the other by `Encoder.encode`; then by train/serve.py, `--concurrency` at a time over
as many connections; then, with --peer, by infinity-emb (its executable, in an environment of its own as it needs
numpy 1) over the same export, float32, by the same client. Every vector is compared with the encoder's: the cosine
distance is 1e-6 at most, or it is counted as wrong; what has no answer of status 200 is lost. One run, one machine:
client and server share its cores, in every row. CPU time, which other processes hardly change, is the server's alone.
"""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import torch
from measure.given import REPOSITORY, read_documents, refuse
from measure.report import about

from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole

BOUND = 1e-6  # of the cosine distance
UP_SECONDS = 300  # that a server may take to be there
PORT, PEER_PORT = 8731, 8732
PEER_ENVIRONMENT = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


@dataclass(frozen=True)
class Row:
    """What was measured of one way to get the embeddings. Latencies in milliseconds; worst: cosine distance.

    cpu: milliseconds of all cores for a text, of the server without the client.
    """

    name: str
    texts: int
    texts_per_second: float
    cpu: float
    p50: float
    p99: float
    wrong: int
    lost: int
    worst: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/nano", help="a base or run; it is exported (default: %(default)s)")
    parser.add_argument("--data", choices=("squad", "medquad"), default="squad", help="default: %(default)s")
    parser.add_argument("--characters", type=int, help="that each text is cut to; default: whole texts")
    parser.add_argument("--shared", default="../shared", help="folder with data/ (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time (default: %(default)s)")
    parser.add_argument("--one-by-one", type=int, default=1000, help="texts of that row (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of ours; the peer's is float32 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on each side (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], help="keys of train/serve.py, as max_batch_tokens=512")
    parser.add_argument("--peer", help="the executable infinity_emb")
    parser.add_argument("--output", help="JSON file of all rows")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    different = min(options.requests, 1500)
    try:
        texts = read_documents(options.data, different, (REPOSITORY / options.shared).resolve() / "data")
    except InputError as error:
        refuse(str(error))
    # sentence-transformers 3, which the peer needs, strips texts
    texts = [text[: options.characters].strip() for text in texts]
    with tempfile.TemporaryDirectory(prefix="sgpt-serving-") as folder:
        rows = measure(options, texts, Path(folder) / "model")
    alone, ours, *peers = rows
    print(f"texts/s over one by one: {ours.texts_per_second / alone.texts_per_second:.2f}")
    for peer in peers:
        ratio, cpu = ours.texts_per_second / peer.texts_per_second, peer.cpu / ours.cpu
        print(f"texts/s over {peer.name}: {ratio:.2f}; its CPU time over ours: {cpu:.2f}")
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        stated = about(options) | {"rows": [asdict(row) for row in rows]}
        write_whole(Path(options.output), json.dumps(stated, indent=1) + "\n")


def measure(options: argparse.Namespace, texts: list[str], model: Path) -> list[Row]:
    """The rows, printed as they come. model: where the export is written."""
    export(Encoder.from_pretrained(options.model), model, card="")
    encoder = Encoder.from_pretrained(model, dtype=options.dtype)
    expected = encoder.encode_documents(texts, progress=False).astype(np.float64)
    tokens = sum(map(len, encoder.token_ids(texts, "document"))) / len(texts)
    print(f"{options.requests:,} requests, {options.concurrency} at a time, {tokens:.0f} tokens each on average")
    print("| | texts | texts/s | CPU ms a text | p50 ms | p99 ms | wrong | lost | worst distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [one_by_one(encoder, texts, expected, options.one_by_one)]
    asked = [texts[number % len(texts)] for number in range(options.requests)]
    wanted = expected[np.arange(options.requests) % len(texts)]
    keys = [f"model={model}", f"port={PORT}", f"max_requests={2 * options.concurrency}"]
    keys += [f"dtype={options.dtype}", *options.set]
    ours = [sys.executable, str(REPOSITORY / "train" / "serve.py"), *keys]
    with started(ours, f"{PORT}/health", options.threads) as server:
        rows.append(load("train/serve.py", server, PORT, "/v1/embeddings", asked, wanted, options.concurrency))
    if options.peer:
        named = ["--model-id", str(model), "--served-model-name", "model"]
        given = ["--device", "cpu", "--engine", "torch", "--dtype", "float32", "--port", str(PEER_PORT)]
        command = [options.peer, "v2", *named, *given, "--no-model-warmup"]
        with started(command, f"{PEER_PORT}/health", options.threads) as server:
            rows.append(load("infinity-emb", server, PEER_PORT, "/embeddings", asked, wanted, options.concurrency))
    return rows


def one_by_one(encoder: Encoder, texts: list[str], expected: np.ndarray, number: int) -> Row:
    encoder.encode_documents(texts[:8], progress=False)
    seconds, given = [], []
    cpu = time.process_time()
    for text in texts[:number]:
        started_at = time.perf_counter()
        given.append(encoder.encode_documents([text], progress=False)[0])
        seconds.append(time.perf_counter() - started_at)
    cpu = time.process_time() - cpu
    return row("Encoder.encode, one by one", seconds, sum(seconds), cpu, given, expected[:number])


def load(
    name: str, server: psutil.Process, port: int, path: str, texts: list[str], expected: np.ndarray, concurrency: int
) -> Row:  # fmt: skip
    """`concurrency` connections, each of which sends its next request when it has its answer."""
    asyncio.run(exchange(port, path, texts[: 4 * concurrency], concurrency))  # warm
    cpu, started_at = cpu_seconds(server), time.perf_counter()
    bodies, seconds = asyncio.run(exchange(port, path, texts, concurrency))
    elapsed, cpu = time.perf_counter() - started_at, cpu_seconds(server) - cpu
    given = [None if body is None else embedding_in(body) for body in bodies]
    return row(name, seconds, elapsed, cpu, given, expected)


def cpu_seconds(server: psutil.Process) -> float:
    """Of the process and of those that it has started."""
    return sum(sum(one.cpu_times()[:2]) for one in (server, *server.children(recursive=True)))


def row(
    name: str, seconds: Sequence[float], elapsed: float, cpu: float, given: Sequence[np.ndarray | None],
    expected: np.ndarray,
) -> Row:  # fmt: skip
    """A row of the table, which is printed."""
    answered = [number for number, embedding in enumerate(given) if embedding is not None]
    left, right = np.array([given[number] for number in answered], np.float64), expected[answered]
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    distances = 1 - (left * right).sum(1) / norms
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    wrong, lost = int((~(distances <= BOUND)).sum()), len(given) - len(answered)
    rate, cpu = len(answered) / elapsed, 1000 * cpu / len(given)
    measured = Row(name, len(given), rate, cpu, p50, p99, wrong, lost, float(distances.max()))
    print(
        f"| {name} | {measured.texts:,} | {rate:.1f} | {cpu:.2f} | {p50:.1f} | {p99:.1f} | {wrong} | {lost} | "
        f"{measured.worst:.1e} |", flush=True,
    )  # fmt: skip
    return measured


def embedding_in(body: bytes) -> np.ndarray:
    return np.array(json.loads(body)["data"][0]["embedding"])


async def exchange(
    port: int, path: str, texts: list[str], concurrency: int
) -> tuple[list[bytes | None], list[float]]:
    """The body of each answer, None where its status is not 200 or the connection ended; and each one's seconds.

    HTTP by hand, on connections that stay: a client library would take more of the shared cores than the server.
    """
    bodies: list[bytes | None] = [None] * len(texts)
    seconds = [0.0] * len(texts)
    numbers = iter(range(len(texts)))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        for number in numbers:
            body = json.dumps({"model": "model", "input": texts[number]}).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            started_at = time.perf_counter()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            try:
                answer_head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(answer_head.partition("content-length:")[2].partition("\r\n")[0])
                answer = await reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            seconds[number] = time.perf_counter() - started_at
            if answer_head.startswith("http/1.1 200"):
                bodies[number] = answer
        writer.close()

    await asyncio.gather(*(connection() for _ in range(concurrency)))
    return bodies, seconds


@contextmanager
def started(command: list[str], health: str, threads: int) -> Iterator[psutil.Process]:
    """A server that is up while this lasts."""
    if is_up(health):
        raise SystemExit(f"something answers at {health} already, and would be measured in place of {command[0]}")
    environment = os.environ | PEER_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            give_up = time.monotonic() + UP_SECONDS
            while not is_up(health):
                if process.poll() is not None or time.monotonic() > give_up:
                    said.seek(0)
                    raise SystemExit(f"{command[0]} did not start:\n{said.read()[-2000:]}")
                time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def is_up(health: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{health}", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    main()
