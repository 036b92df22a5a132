"""Scripts as users start them, many in a row, some killed on the way and some by two processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]

# One process imports everything; every start is a fork of it. It kills one when a file has so many lines, and leaves
# half a line there,
# as a kill inside of a write does; or it sends all of one start a signal then, as a terminal does. Nothing comes in at
# their stdin.
_STARTER = """
import json, os, runpy, signal, sys, time
import accelerate, bm25s, rich.console, torch
torch.set_num_threads(1)
import sgpt.cli.compose, sgpt.cli.launch, sgpt.mining, sgpt.retrieval.rerank
jobs = json.load(sys.stdin)
if any(job["command"][0].endswith("biencoder.py") for job in jobs):
    import matplotlib.pyplot, peft, sentence_transformers, sgpt.encoder.export, sgpt.report.run, sgpt.training.trainer
def started(number, job, rank):
    child = os.fork()
    if child:
        return child
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}-{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if job["port"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    if job["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:job["cores"]])
    os.dup2(os.pipe()[0], 0)
    # which is ignored when the tests run in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.orig_argv, code = job["command"], ["python", *job["command"]], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
def lines(file):
    return open(file, "rb").read().count(b"\\n") if os.path.exists(file) else 0
for number, job in enumerate(jobs):
    if job["before"] and os.system(job["before"]):
        raise SystemExit(job["before"])
    children = [started(number, job, rank) for rank in range(2 if job["port"] else 1)]
    if job["kill"]:
        looking = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while lines(job["kill"][0]) < job["kill"][1] and not os.waitid(os.P_PID, children[0], looking):
            time.sleep(0.0005)
        for child in children if job["signal"] else children[:1]:
            os.kill(child, job["signal"] or signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if job["kill"] and not job["signal"]:
        with open(job["kill"][0], "ab") as file:
            file.write(b'{"block": 9, "some')
    parts = [name for name in os.listdir(".") if ".part-" in name]
    print(json.dumps([codes, {name: open(name).read() for name in parts}, sorted(os.listdir("."))]), flush=True)
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


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def start_all(script: str, folder: Path, named: dict[str, Start]) -> dict[str, Ended]:
    """Runs train/<script>.py in `folder` once for each start, one after the other."""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "COLUMNS": "200"
    }
    jobs = []
    for start in named.values():
        path = str(REPOSITORY / "train" / f"{start.script or script}.py")
        jobs.append({**start._asdict(), "command": [path, *start.arguments]})
    ended = subprocess.run(
        [sys.executable, "-c", _STARTER], input=json.dumps(jobs), cwd=folder, env=environment, capture_output=True,
        text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    texts = [
        [(folder / f"{number}-0.{stream}").read_text() for stream in ("out", "err")] for number in range(len(jobs))
    ]
    return {name: Ended(*one, *text) for name, one, text in zip(named, told, texts, strict=True)}


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


# The same one start after another, as a test asks for them: each with what it said, and with files of no more than
# `limit` bytes.
_FORKER = """
import json, os, resource, runpy, sys
import rich.console, sentence_transformers, torch
torch.set_num_threads(1)
import sgpt.cli.compose, sgpt.cli.launch, sgpt.report.run, sgpt.retrieval.searcher
for line in sys.stdin:
    limit, command = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        sys.argv, code = command, 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read) as said:
        text = said.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


class Forked(NamedTuple):
    code: int
    said: str

    @property
    def sentence(self) -> str:
        """What it was refused with; fails when that is anything but one sentence, behind what was logged before."""
        assert self.code == 2, self.said
        assert "Traceback" not in self.said
        told = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert self.said.endswith(told[0] + "\n")
        return told[0].removeprefix("error: ")


Forks = Callable[..., Forked]


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """start(script, *overrides, limit=None), in `folder`."""
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY)
    }
    forker = subprocess.Popen(
        [sys.executable, "-c", _FORKER], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True
    )

    def start(script: str, *overrides: str, limit: int | None = None) -> Forked:
        forker.stdin.write(json.dumps([limit, [str(REPOSITORY / "train" / f"{script}.py"), *overrides]]) + "\n")
        forker.stdin.flush()
        return Forked(*json.loads(forker.stdout.readline()))

    try:
        yield start
    finally:
        forker.stdin.close()
        forker.wait(timeout=60)
        forker.stdout.close()


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
