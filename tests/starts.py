"""Scripts as users start them, many in a row, some killed on the way and some by two processes."""

import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch.multiprocessing

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {  # of all starts; much is read when a library is imported
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY),
}  # fmt: skip

# of the one server of forks that Python has
PRELOADED = ["sgpt.training.trainer", "sgpt.training.checkpoint", "transformers.masking_utils", "tests.conftest"]

# Importing costs seconds, so one process does it and every start is a fork of it: one for each rank of a job that it is
# given. It answers with their process ids, and when all have ended with their exit codes. Nothing comes in at their
# stdin, and they end by Ctrl-C, which is ignored when the tests run in the background of a script.
_SERVER = """
import json, os, resource, runpy, signal, subprocess, sys
import accelerate, bm25s, matplotlib.pyplot, peft, rich.console, scipy.stats, sentence_transformers, torch
torch.set_num_threads(1)
import sgpt.cli.compose, sgpt.cli.launch, sgpt.encoder.export, sgpt.evaluation.systems, sgpt.mining, sgpt.report.run
import sgpt.retrieval.rerank, sgpt.retrieval.searcher, sgpt.training.trainer

def become(job, rank):
    os.chdir(job["folder"]), os.umask(job["umask"])
    os.environ.update(job["environment"])
    os.environ.update({key: str(rank) for key in ("RANK", "LOCAL_RANK") if len(job["streams"]) > 1})
    os.dup2(os.pipe()[0], 0)
    for stream in (1, 2):
        file = open(job["streams"][rank][stream - 1], "ab")
        # what it says is written by another, as it is behind a pipe, where files may not grow
        written = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin if job["limit"] else file
        os.dup2(written.fileno(), stream)
        written.close()
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    if job["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.orig_argv = job["command"], ["python", *job["command"]]

def run():
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(len(job["streams"])):
        children.append(os.fork())
        if not children[-1]:
            become(job, rank)
            code = run()
            sys.stdout.flush(), sys.stderr.flush()
            if job["limit"]:
                os.close(1), os.close(2), os.wait(), os.wait()
            os._exit(code)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Start(NamedTuple):
    """arguments of the script. kill: part file and its lines at which the process is killed. port: two processes meet
    there.

    signal: sent to all processes instead. script: another one than the others'.
    before: a shell command that runs first. cores: that the processes may use, all if None.
    """

    arguments: list[str]
    kill: tuple[str, int] | None = None
    port: int | None = None
    signal: int | None = None
    script: str | None = None
    before: str = ""
    cores: int | None = None


class Ended(NamedTuple):
    codes: list[int]
    parts: dict[str, str]
    files: list[str]
    out: str
    err: str


class Forked(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def sentence(self) -> str:
        """What it was refused with; fails when that is anything but one sentence, behind what was logged before."""
        assert self.code == 2, self.said
        assert "Traceback" not in self.said
        told = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert self.err.endswith(told[0] + "\n")
        return told[0].removeprefix("error: ")


Forks = Callable[..., Forked]
Watch = Callable[[list[int], Callable[[], bool]], None]


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@cache
def _server() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        start_new_session=True
    )


def fork(
    script: str, arguments: Sequence[str], folder: Path, streams: list[tuple[Path, Path]], *,
    environment: Mapping[str, str], cores: int | None = None, limit: int | None = None, watch: Watch | None = None
) -> list[int]:  # fmt: skip
    """Exit codes of train/<script>.py, run in `folder` by as many ranks as have `streams`.

    limit: bytes of a file. watch: is given the process ids, and what says whether all have ended.
    """
    server = _server()
    os.umask(umask := os.umask(0o022))  # it can be read in no other way

    def ended() -> bool:
        return bool(select.select([server.stdout], [], [], 0)[0])

    job = {
        "command": [str(REPOSITORY / "train" / f"{script}.py"), *arguments], "folder": str(folder.resolve()),
        "streams": [[str(file.absolute()) for file in of_rank] for of_rank in streams], "environment": environment,
        "umask": umask, "cores": cores, "limit": limit,
    }  # fmt: skip
    try:
        server.stdin.write(json.dumps(job).encode() + b"\n")
        processes = json.loads(server.stdout.readline())
        if watch is not None:
            watch(processes, ended)
        return json.loads(server.stdout.readline())
    except BaseException:  # of a test that took too long: no other may get this one's answer
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
        raise


def start_all(script: str, folder: Path, named: dict[str, Start]) -> dict[str, Ended]:
    """Runs train/<script>.py in `folder` once for each start, one after the other."""
    return {name: _start(script, folder, start, number) for number, (name, start) in enumerate(named.items())}


def _start(script: str, folder: Path, start: Start, number: int) -> Ended:
    if start.before:
        subprocess.run(start.before, shell=True, cwd=folder, check=True)
    ranks = 2 if start.port else 1
    environment = {"ACCELERATE_USE_CPU": "true", "COLUMNS": "200"}
    if start.port:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(start.port)}
        environment |= {**meeting, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def kill(processes: list[int], ended: Callable[[], bool]) -> None:
        file, lines = folder / start.kill[0], start.kill[1]
        while not ended() and (not file.exists() or file.read_bytes().count(b"\n") < lines):
            time.sleep(0.0005)
        for process in processes if start.signal else processes[:1]:
            with suppress(ProcessLookupError):
                os.kill(process, start.signal or signal.SIGKILL)

    streams = [(folder / f"{number}-{rank}.out", folder / f"{number}-{rank}.err") for rank in range(ranks)]
    codes = fork(
        start.script or script, start.arguments, folder, streams,
        environment=environment, cores=start.cores, watch=kill if start.kill else None,
    )  # fmt: skip
    if start.kill and not start.signal:
        with (folder / start.kill[0]).open("ab") as file:  # as a kill inside of a write does
            file.write(b'{"block": 9, "some')
    files = sorted(path.name for path in folder.iterdir())
    parts = {name: (folder / name).read_text() for name in files if ".part-" in name}
    return Ended(codes, parts, files, *(file.read_text() for file in streams[0]))


def forks(folder: Path, columns: int = 400) -> Forks:
    """start(script, *arguments, limit=None, **environment), in `folder`."""

    def start(script: str, *arguments: str, limit: int | None = None, **environment: str) -> Forked:
        with TemporaryDirectory() as place:
            out, err = Path(place, "out"), Path(place, "err")
            environment = {"COLUMNS": str(columns), **environment}
            code, = fork(script, arguments, folder, [(out, err)], environment=environment, limit=limit)
            return Forked(code, out.read_text(), err.read_text())

    return start


def in_processes(function: Callable, arguments: tuple, number: int) -> None:
    """function(rank, *arguments) in so many processes, forks of one that has imported all and has computed nothing."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, arguments, nprocs=number, start_method="forkserver")


def blocks(ended: Ended, kind: str) -> list[int]:
    """Whole lines only: a kill may tear the last."""
    lines = [line for part in ended.parts.values() for line in part.split("\n")[:-1]]
    return [row[kind] for row in map(json.loads, lines) if kind in row]


def beir(folder: Path, corpus: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        )
    judged = "".join(
        f"{query}\t{document}\t{score}\n" for query, documents in qrels.items() for document, score in documents.items()
    )
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def small_training(data: Path, base: Path) -> Callable[[Path], list[str]]:
    """place -> overrides of a run of four steps with two checkpoints, which writes below `place` alone."""
    pairs, scored = data / "pairs.jsonl", data / "scored.jsonl"
    pairs.write_text(
        "".join(json.dumps({"query": f"what is {n}?", "positive": f"{n} is behind {n - 1}"}) + "\n" for n in range(64))
    )
    scored.write_text(
        "".join(json.dumps({"sentence1": f"{n}", "sentence2": f"{n + n % 3}", "score": n % 3}) + "\n" for n in range(6))
    )
    return lambda place: [
        f"runs={place}/runs", f"data.cache={place}/cache", f"model.path={base}", f"data.path={pairs}",
        f"evaluation.sts=[{scored}]",
        "markers.query_max_tokens=24", "markers.document_max_tokens=24", "trainer.threads=1",
        "trainer.queries_per_process=8",
        "trainer.max_steps=4", "trainer.save_every_steps=2", "trainer.log_every_steps=1",
    ]  # fmt: skip
