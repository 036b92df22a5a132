"""Does a run that is killed at any instant, and resumed, end as the one that nobody killed, bit for bit?

    python benchmarks/torture.py [--kills 100] [--processes 2] [--launcher] [--minutes 10]

A run of seconds (a tiny GPT-2 with dropout; documentation harvested, read and tokenised; scores before, while and after
training; checkpoints, adapter, export) is made once undisturbed, and its file operations are noted. Then, again and
again, it is started in an empty folder, killed by SIGKILL, one to three times, and resumed to its end:

- every second time the first kill is aimed, at one of those file operations: just before it, or on the way to it from
  the operation before;
- all other kills come at a time, uniform over the life of the run.

With several processes all of them are killed, or one: a launcher then asks the others to end, and it is told how long
that took and whether they said who was gone. In the end every file of the run and of the data is compared with the
undisturbed run's, but for what is measured (seconds, memory, dates). lost: the run did not reach its end. different:
another byte.

--quick takes rows that it writes itself for the documentation, whose harvest is most of the time.
A start is a fork of this process, which has imported everything; with --launcher it is `accelerate launch`. What is
done is a line of <folder>/trials.jsonl and not repeated: the same command again does the rest, and shows the table.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "train" / "biencoder.py"
RUN = [
    "name=run", "resume=true", "model.path=base", "data.limit=400", "trainer.max_steps=6",
    "markers.query_max_tokens=24", "markers.document_max_tokens=40", "trainer.threads=1", "trainer.save_every_steps=2",
    "trainer.log_every_steps=1", "trainer.evaluate_every_steps=2", "evaluation.limit=10", "dev.limit=10",
]  # fmt: skip
PYDOCS = [
    "data=pydocs", "evaluation.retrieval=[data/raw/pydocs/pydocs_test]", "dev.retrieval=[data/raw/pydocs/pydocs_dev]",
]  # fmt: skip
ROWS = ["data.path=base/rows.jsonl", "evaluation.retrieval=[base/toy]", "dev.retrieval=[base/toy]", "dev.split=test"]
QUERIES = 8  # of a batch, over all processes
HARVEST = "harvesting documentation"
LOG = "training"
KINDS = {  # what a file operation belongs to -> its path below the working directory; the first that fits
    HARVEST: r"^data/raw/",
    "tokenising": r"^data/cache/.*/\.?tokens-",
    "reading the data": r"^data/cache/",
    "saving a checkpoint": r"^runs/run/checkpoints",
    LOG: r"^runs/run/\.?metrics\.jsonl",
    "writing the adapter": r"^runs/run/\.?adapter",
    "exporting": r"^runs/run/\.?export",
    "writing records and report": r"^runs/",
}
SCORES, ANY_TIME = "evaluating", "at any time"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MEASURED = {"queries_per_second", "tokens_per_second", "peak_memory_bytes", "seconds", "finished"}  # keys of JSON files
NOT_COMPARED = {"report.html", "hashes.json"}  # which show, or hash, what is measured
LAUNCHER_NOTICES, LAUNCHER_KILLS = 0.1, 30  # seconds: torchrun's, until it asks the others to end, and until it kills
LONGEST_START = 600  # seconds


@dataclass
class Kill:
    """When and what of a start is killed.

    seconds: after its beginning; with `kind`, after the file operation `number` of that kind by the main process, and 0
    is just before it. everyone: all processes, with what they started, else `rank` alone. row: of the table.
    """

    seconds: float
    rank: int = 0
    everyone: bool = True
    kind: str | None = None
    number: int = 0
    row: str = ANY_TIME


@dataclass
class Ended:
    """How a start has ended.

    others: seconds from the kill of one process to the end of the last; None where none was left. hung: whether one had
    to be killed that was not meant to be. left: processes that were still there later.
    """

    codes: list[int]
    seconds: float
    killed: bool = False
    others: float | None = None
    hung: bool = False
    left: int = 0


# inside of a start: this process becomes the script


def become(folder: str, arguments: list[str], kill: dict | None, trace: bool) -> None:
    """Runs the script, watched; `folder` gets what the one who waits for it reads."""
    faulthandler.enable()
    rank = int(os.environ.get("RANK", "0"))
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 0:
        watch_files(Path(folder), Kill(**kill) if kill else None, trace)
    sys.argv = [str(SCRIPT), *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def watch_files(folder: Path, kill: Kill | None, trace: bool) -> None:
    """Hears of each file operation of this process before it is done: notes it in trace.jsonl, and says that the one
    has come that `kill` names.
    """
    here, started = Path.cwd(), time.monotonic()
    counts: Counter[str] = Counter()
    out = (folder / "trace.jsonl").open("a") if trace else None

    def hear(event: str, arguments: tuple) -> None:
        kind = kind_of(event, arguments, here)
        if kind is None:
            return
        counts[kind] += 1
        if out is not None:
            print(
                json.dumps([time.monotonic() - started, kind, counts[kind], str(arguments[:2])]), file=out, flush=True
            )
        if kill and (kill.kind, kill.number) == (kind, counts[kind]):
            os.close(os.open(folder / "reached", os.O_CREAT | os.O_WRONLY))
            if not kill.seconds and (kill.everyone or kill.rank == 0):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def kind_of(event: str, arguments: tuple, here: Path) -> str | None:
    """The row of KINDS of an audit event that changes a file; None of any other event."""
    opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if not opens and event not in CHANGES:
        return None
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    below = os.path.relpath(os.path.join(here, os.fsdecode(path)), here)
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, below)), None)


# starts


class Starts:
    """Starts of the run in a folder, by forks of this process or by the launcher."""

    def __init__(self, processes: int, launcher: bool, quick: bool) -> None:
        self.processes, self.launcher = processes, launcher
        self.arguments = [*RUN, *(ROWS if quick else PYDOCS), f"trainer.queries_per_process={QUERIES // processes}"]
        if not launcher:
            import_everything()

    def start(self, folder: Path, kill: Kill | None = None, *, trace: bool = False) -> Ended:
        """Runs it in `folder` to its end or its kill. What it says is in <folder>-said.txt."""
        watch = folder.with_name(f"{folder.name}-watch")
        watch.mkdir(exist_ok=True)
        for file in (*watch.glob("pid-*"), watch / "reached"):
            file.unlink(missing_ok=True)
        said(folder).unlink(missing_ok=True)
        given = [str(watch), self.arguments, asdict(kill) if kill else None, trace]
        started = time.monotonic()
        children = [self._launch(folder, given)] if self.launcher else self._fork(folder, given)
        ended = self._wait(children, kill, watch, started)
        ended.left = end_those_in(folder)
        return ended

    def _launch(self, folder: Path, given: list) -> int:
        launch = [sys.executable]
        if self.processes > 1:
            launch += ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines", "1",
                       "--num_processes", str(self.processes), "--main_process_port", "0", "--mixed_precision", "no",
                       "--dynamo_backend", "no"]  # fmt: skip
        command = [*launch, __file__, "--become", json.dumps(given)]
        with said(folder).open("ab") as out:
            process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)
        process.returncode = 0  # `_wait` waits for it
        return process.pid

    def _fork(self, folder: Path, given: list) -> list[int]:
        children, port = [], free_port()
        for rank in range(self.processes):
            child = os.fork()
            if child == 0:
                os._exit(self._in_fork(folder, given, rank, port))
            children.append(child)
        return children

    def _in_fork(self, folder: Path, given: list, rank: int, port: int) -> int:
        """Returns the exit code."""
        os.setsid()
        os.chdir(folder)
        out = os.open(said(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
        if self.processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes),
                "LOCAL_WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        code = 0
        try:
            become(*given)
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        return code

    def _wait(self, children: list[int], kill: Kill | None, watch: Path, started: float) -> Ended:
        """Kills where it is told to, and is the launcher of forks."""
        codes: dict[int, int] = {}
        reached = started if kill and kill.kind is None else None
        killed = failed = None
        waited_for = asked = hung = False
        while len(codes) < len(children):
            for child in [child for child in children if child not in codes]:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            alive, now = [child for child in children if child not in codes], time.monotonic()
            if kill and killed is None:
                if reached is None and (watch / "reached").exists():
                    reached = now
                if reached is not None and now >= reached + kill.seconds and (alive or not kill.seconds):
                    killed = now
                    others = [child for rank, child in enumerate(children) if rank != kill.rank or self.launcher]
                    waited_for = not kill.everyone and self.processes > 1 and any(child in alive for child in others)
                    kill_tree(children) if kill.everyone else kill_one(watch / f"pid-{kill.rank}")
            if failed is None and (killed or any(codes.values())):
                failed = now
            if failed and alive and not self.launcher and not asked and now > failed + LAUNCHER_NOTICES:
                asked = True
                each(alive, signal.SIGTERM)
            patience = 2 * LAUNCHER_KILLS if self.launcher else LAUNCHER_KILLS
            if alive and (now > started + LONGEST_START or (failed and now > failed + patience)):
                if not hung:  # it says where it stands, if it still can
                    each(alive, signal.SIGABRT)
                    time.sleep(1)
                hung = True
                kill_tree(alive)
            time.sleep(0.002)
        now = time.monotonic()
        return Ended(
            [codes[child] for child in children],
            now - started,
            killed=killed is not None,
            others=now - killed if waited_for else None,
            hung=hung,
        )


def import_everything() -> None:
    """Once, in the process that forks."""
    import accelerate  # noqa: F401
    import bm25s  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import rich.console  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch

    torch.set_num_threads(1)
    import sgpt.cli.compose
    import sgpt.cli.launch
    import sgpt.encoder.export
    import sgpt.report.run
    import sgpt.training.trainer  # noqa: F401


def each(processes: list[int], signum: int) -> None:
    for process in processes:
        os.kill(process, signum)


def kill_tree(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
            for one in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def kill_one(pid: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int(pid.read_text()), signal.SIGKILL)


def end_those_in(folder: Path) -> int:
    """Ends what still runs there ten seconds after a start, and returns how many that were."""
    for _ in range(100):
        left = list(running_in(folder))
        if not left:
            return 0
        time.sleep(0.1)
    for process in left:
        process.kill()
    return len(left)


def running_in(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder:
                yield process


def said(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-said.txt")


def source_hash() -> str:
    """Of the framework as it lies there."""
    digest = hashlib.sha256()
    for file in sorted((REPOSITORY / "sgpt").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


# trials


@dataclass
class Operation:
    """One file operation of the undisturbed run's main process, and the one before it, `gap` seconds earlier."""

    row: str
    kind: str
    number: int
    before: tuple[str, int] | None
    gap: float


class Torture:
    """The undisturbed run in <folder>/whole, and trials that are compared with it."""

    def __init__(self, folder: Path, starts: Starts) -> None:
        self.folder, self.starts, self.whole = folder, starts, folder / "whole"
        self.file = folder / "trials.jsonl"
        if not (folder / "whole.json").is_file():
            self._run_undisturbed()
        self.life, harvested, source = json.loads((folder / "whole.json").read_text())
        if source != source_hash():
            raise SystemExit(f"sgpt/ has changed since {self.whole} was made; remove {folder}, or set another --folder")
        self.life_without_harvest = self.life - harvested
        self.operations = self._read_operations()
        self.trials = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []

    def _run_undisturbed(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.whole.mkdir(parents=True)
        # in a process of its own: the thread of its progress bars may hold a lock when this one forks
        maker = get_context("fork").Process(target=make_base, args=(self.folder / "base",))
        maker.start()
        maker.join()
        (self.whole / "base").symlink_to(self.folder / "base")
        ended = self.starts.start(self.whole, trace=True)
        if any(ended.codes):
            raise SystemExit(f"the undisturbed run has failed; see {said(self.whole)}")
        seconds = [second for second, kind, *_ in self._trace() if kind == HARVEST]
        (self.folder / "whole.json").write_text(json.dumps([ended.seconds, max(seconds, default=0.0), source_hash()]))

    def _trace(self) -> list[list]:
        file = self.folder / "whole-watch" / "trace.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def _read_operations(self) -> list[Operation]:
        trace = self._trace()
        lines = (self.whole / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        logged = sum(kind == LOG for _, kind, *_ in trace) - len(lines)  # operations before the first line
        operations = []
        for index, (second, kind, number, what) in enumerate(trace):
            before = trace[index - 1] if index else None
            is_dev = kind == LOG and number > logged and '"dev"' in lines[number - logged - 1]
            operations.append(Operation(
                SCORES if is_dev or "analysis.json" in what else kind, kind, number,
                (before[1], before[2]) if before else None, second - before[0] if before else 0.0,
            ))  # fmt: skip
        return operations

    def aimed(self, chance: random.Random) -> Kill:
        rank = chance.randrange(self.starts.processes)
        everyone = chance.random() < 0.5
        row = chance.choice(sorted({operation.row for operation in self.operations}))
        operation = chance.choice([operation for operation in self.operations if operation.row == row])
        if operation.before and (row == SCORES or chance.random() < 0.5):
            kind, number = operation.before
            return Kill(chance.uniform(0.001, operation.gap), rank, everyone, kind, number, row)
        return Kill(0.0, rank, everyone, operation.kind, operation.number, row)

    def at_any_time(self, chance: random.Random, harvests: bool) -> Kill:
        life = self.life if harvests else self.life_without_harvest
        rank = chance.randrange(self.starts.processes)
        return Kill(chance.uniform(0, life), rank, chance.random() < 0.5)

    def run(self, number: int) -> dict:
        """One trial: kills, and what became of the run. Its folder is kept where that is not as it should be."""
        chance = random.Random(number)
        folder = self.folder / f"trial-{number}"
        for of_trial in (folder, folder.with_name(f"{folder.name}-watch")):
            shutil.rmtree(of_trial, ignore_errors=True)
        said(folder).unlink(missing_ok=True)
        folder.mkdir()
        (folder / "base").symlink_to(self.folder / "base")
        kill = self.aimed(chance) if number % 2 else None
        harvests = HARVEST in (kill.row, kill.kind) if kill else chance.random() < 0.1
        if not harvests:
            (folder / "data").mkdir()
            with contextlib.suppress(FileNotFoundError):
                (folder / "data" / "raw").symlink_to(self.whole / "data" / "raw")
        kills, starts, planned = [], [], chance.choice((1, 1, 2, 3))
        kill = kill or self.at_any_time(chance, harvests)
        while True:
            ended = self.starts.start(folder, kill)
            starts.append(ended)
            if not ended.killed:
                break
            one = {"row": kill.row, "others": ended.others}
            if ended.others is not None:  # by ours, or by torchrun before they knew each other
                names = rf"rank {kill.rank} of \d+ processes has ended|exitcode: -9\) local_rank: {kill.rank} "
                one["named"] = re.search(names, said(folder).read_text()) is not None
            kills.append(one)
            kill = self.at_any_time(chance, False) if len(kills) < planned else None
        if not kills and not harvests:  # the machine may be less busy than it was for the undisturbed run
            self.life_without_harvest = ended.seconds
        lost = any(ended.codes)
        trial = {
            "trial": number, "kills": kills, "lost": lost, "hung": sum(ended.hung for ended in starts),
            "left": sum(ended.left for ended in starts),
            "different": [] if lost else differences(self.whole, folder),
        }  # fmt: skip
        with self.file.open("a") as out:
            out.write(json.dumps(trial) + "\n")
        self.trials.append(trial)
        if not lost and not trial["different"]:
            shutil.rmtree(folder)
            shutil.rmtree(folder.with_name(f"{folder.name}-watch"))
            said(folder).unlink()
        return trial

    def num_kills(self) -> int:
        return sum(len(trial["kills"]) for trial in self.trials)


def make_base(folder: Path) -> None:
    """A GPT-2 of two blocks with dropout and random weights, the tokenizer of data/nano, and the data of --quick."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from sgpt.data.formats.jsonl import write_rows

    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "data" / "nano")
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"query": f"what is {n}?", "positive": f"{n} is behind {n - 1}"} for n in range(64)]
    write_rows(folder / "rows.jsonl", rows)
    (folder / "toy" / "qrels").mkdir(parents=True)
    write_rows(
        folder / "toy" / "corpus.jsonl", ({"_id": f"d{n}", "text": row["positive"]} for n, row in enumerate(rows))
    )
    write_rows(folder / "toy" / "queries.jsonl", ({"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(rows)))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(64))
    (folder / "toy" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


def differences(whole: Path, other: Path) -> list[str]:
    """Files that one of the folders does not have, or has with other content."""
    problems = []
    for part in ("runs/run", "data/cache", "data/raw"):
        files = [
            {str(file.relative_to(folder)) for file in (folder / part).rglob("*") if is_compared(file)}
            for folder in (whole, other)
        ]
        problems += sorted(files[0] ^ files[1])
        problems += [name for name in sorted(files[0] & files[1]) if content(whole / name) != content(other / name)]
    return problems


def is_compared(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts[-3:])
    return file.is_file() and not hidden and file.name not in NOT_COMPARED


def content(file: Path) -> object:
    """Its bytes; of JSON the values, but for what is measured."""
    if file.suffix == ".jsonl" and file.name == "metrics.jsonl":
        return [unmeasured(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name in ("manifest.json", "state.json"):
        return unmeasured(json.loads(file.read_text()))
    if file.name == "README.md":  # the card has a row of how long it took
        return [line for line in file.read_text().splitlines() if not line.startswith("| time |")]
    return file.read_bytes()


def unmeasured(tree: dict) -> dict:
    return {key: value for key, value in tree.items() if key not in MEASURED}


def table(torture: Torture) -> str:
    trials, processes = torture.trials, torture.starts.processes
    rows = {}
    for trial in trials:
        for kill in trial["kills"]:
            row = rows.setdefault(kill["row"], [0, 0, 0])
            row[0] += 1
            row[1] += trial["lost"]
            row[2] += bool(trial["different"])
    lines = ["| killed while | kills | lost | different |", "|---|---|---|---|"]
    order = [ANY_TIME, *KINDS, SCORES]
    lines += [f"| {row} | {' | '.join(map(str, rows[row]))} |" for row in order if row in rows]
    lost, different = sum(trial["lost"] for trial in trials), sum(bool(trial["different"]) for trial in trials)
    text = "\n".join(lines) + (
        f"\n\n{torture.num_kills()} kills of {len(trials)} runs by {processes} process(es): {lost} lost, {different} "
        f"different; {sum(trial['left'] for trial in trials)} processes left behind, "
        f"{sum(trial['hung'] for trial in trials)} starts that did not end by themselves"
    )
    alone = [kill for trial in trials for kill in trial["kills"] if kill["others"] is not None]
    if processes > 1 and alone:
        seconds = [kill["others"] for kill in alone]
        named = sum(kill["named"] for kill in alone)
        text += (
            f"\none process of {processes} was killed {len(alone)} times: the others ended within {max(seconds):.1f} s "
            f"(median {statistics.median(seconds):.1f}), and named it {named} times"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2, 4), help="default: %(default)s")
    parser.add_argument("--launcher", action="store_true", help="start by python and accelerate launch")
    parser.add_argument("--quick", action="store_true", help="train on a few rows, without a harvest")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after so many minutes")
    parser.add_argument("--folder", type=Path, help="default: runs/torture/<processes>[-launcher][-quick]")
    parser.add_argument("--become", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.become:
        become(*json.loads(options.become))
        return
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(REPOSITORY)}
    name = f"{options.processes}{'-launcher' * options.launcher}{'-quick' * options.quick}"
    folder = (options.folder or REPOSITORY / "runs" / "torture" / name).resolve()
    end = time.monotonic() + 60 * options.minutes
    torture = Torture(folder, Starts(options.processes, options.launcher, options.quick))
    print(f"{folder}: the undisturbed run took {torture.life:.1f} s", flush=True)
    while torture.num_kills() < options.kills and time.monotonic() < end:
        trial = torture.run(len(torture.trials))
        if trial["lost"] and not trial["kills"]:
            raise SystemExit(f"a run that nobody killed has failed; see {folder}/trial-{trial['trial']}-said.txt")
        where = ", then ".join(kill["row"] for kill in trial["kills"]) or "not in time"
        became = "LOST" if trial["lost"] else f"DIFFERENT: {trial['different'][:3]}" if trial["different"] else "equal"
        print(f"{torture.num_kills()} of {options.kills} kills; {where}: {became}", flush=True)
    print(f"\n{table(torture)}")
    failed = any(trial["lost"] or trial["different"] or trial["left"] or trial["hung"] for trial in torture.trials)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
