"""hydra/launcher=accelerate: real sweeps of a stand-in training script; it needs no torch, so a job costs the launch
only.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sgpt.runtime.errors import InputError
from sgpt.sweeps.process import cores_of_slots, gpus_of_slots
from tests.starts import small_training

REPOSITORY = Path(__file__).parents[2]

CONFIG = """
name: toy
runs: runs
resume: false
learning_rate: 1
pooling: mean
seed: 0
scored: test
trainer: {threads: null}
hydra:
  output_subdir: null
  run: {dir: .}
  sweep: {dir: "${runs}/${name}-sweep"}
"""

SCRIPT = """
import json, os, time
from pathlib import Path
import hydra

@hydra.main(version_base=None, config_path="configs", config_name="toy")
def main(config):
    folder = Path(config.runs) / config.name
    print(f"started by {os.environ.get('PARTITION')}")
    print(f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} rate {config.learning_rate}",
          f"threads {os.environ['OMP_NUM_THREADS']} of {len(os.sched_getaffinity(0))}",
          f"cpu {os.environ.get('ACCELERATE_USE_CPU')}")
    print(f"training would take {config.trainer.threads} threads")
    if config.resume and (folder / "results.json").exists():
        print("found finished")
        return
    print(f"training with {config.learning_rate}")
    if config.learning_rate == 13 and "MEND" not in os.environ:
        raise ValueError("13 is unlucky")
    if config.learning_rate in (7, 8):  # each waits for the other: they run at a time or not at all
        Path(f"here-{config.learning_rate}").touch()
        deadline = time.monotonic() + 60
        while not Path(f"here-{15 - config.learning_rate}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the other one is not there")
            time.sleep(0.05)
    if config.learning_rate == 99:
        with open("started", "a") as started:
            print(os.getpid(), file=started)
        time.sleep(600)
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        quality = 1 / (1 + config.learning_rate)
        metrics = {"ndcg@10": quality, "recall@100": 0.5}
        results = {"before": {}, "after": {"toy": metrics, "sts": {"spearman_cosine": quality / 2}}, "bm25": {}}
        if config.scored != "test":
            results["after"] = {}
        if config.scored == "dev":
            of_steps = [quality / 4, quality, quality / 2]
            lines = [{"step": step, "loss": 1.0} for step in (1, 2)]
            lines += [{"step": step, "dev": {"toy": {"ndcg@10": value}}} for step, value in enumerate(of_steps, 1)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
            (folder / "manifest.json").write_text('{"best": {"step": 2}}' if config.pooling == "mean" else "{}")
        (folder / "results.json").write_text(json.dumps(results))

main()
"""


def toy_project(folder: Path) -> Path:
    (folder / "train").mkdir()
    (folder / "train" / "configs").mkdir()
    (folder / "train" / "configs" / "toy.yaml").write_text(CONFIG)
    (folder / "train" / "toy.py").write_text(SCRIPT)
    return folder


def environment(**more: str) -> dict[str, str]:
    """This repository's plugin whether or not it is installed; nothing of a launch that pytest may run under."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **more}


def sweep(project: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train/toy.py", "-m", "hydra/launcher=accelerate", *arguments],
        cwd=project,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_sweep(project: Path, name: str = "toy") -> dict:
    return json.loads((project / "runs" / f"{name}-sweep" / "sweep.json").read_text())


def table_rows(output: str) -> list[list[str]]:
    rows = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_project(tmp_path_factory.mktemp("sweep"))


class First(NamedTuple):
    """What the first start left, taken down before the second changes it."""

    exit_code: int
    output: str
    errors: str
    content: dict
    with_results: list[str]


@pytest.fixture(scope="module")
def first(project: Path) -> First:
    """Two jobs, of which the first fails."""
    done = sweep(project, "learning_rate=13,1", "pooling=weighted_mean")
    with_results = [path.parent.name for path in (project / "runs/toy-sweep").glob("*/results.json")]
    return First(done.returncode, done.stdout, done.stderr, read_sweep(project), with_results)


def test_failing_job_is_named_and_the_others_finish(first: First) -> None:
    assert first.exit_code != 0
    assert "[1/2] job 0  learning_rate=13  " in first.output
    assert "ended with exit code 1; log: runs/toy-sweep/0.log" in first.output
    assert "    | ValueError: 13 is unlucky" in first.output  # the last lines of its output
    assert re.search(r"\[2/2\] job 1  learning_rate=1  \d+\.\d min  toy ndcg@10 0\.5000\n", first.output)
    # what Hydra raises at the end, after the table
    assert "InputError: 1 of 2 jobs failed: 0; their output: runs/toy-sweep/<job>.log; typed again" in first.errors
    assert first.with_results == ["1"]


def test_table_shows_differing_overrides_and_every_metric(first: First) -> None:
    assert table_rows(first.output) == [
        ["0", "learning_rate=13", "failed", "-", "-", "-"],
        ["*1", "learning_rate=1", "finished", "0.5000", "0.5000", "0.2500"],
    ]
    assert "toy-sweep pooling=weighted_mean" in first.output  # what all jobs share stands in the title
    assert "* best toy ndcg@10: job 1" in first.output


def test_sweep_json_says_the_same(first: First) -> None:
    assert first.content["shared_overrides"] == ["pooling=weighted_mean"]
    assert (first.content["main_metric"], first.content["best"]) == ("toy ndcg@10", 1)
    failed, finished = first.content["jobs"]
    assert (failed["job"], failed["status"], failed["after"]) == (0, "failed", {})
    assert "exit code 1" in failed["error"]
    assert (finished["status"], finished["main_metric"], finished["error"]) == ("finished", 0.5, None)
    assert finished["overrides"] == ["learning_rate=1", "pooling=weighted_mean"]
    assert finished["after"] == {"toy": {"ndcg@10": 0.5, "recall@100": 0.5}, "sts": {"spearman_cosine": 0.25}}


def test_other_values_under_the_same_name_are_refused(first: First, project: Path) -> None:
    refused = sweep(project, "learning_rate=13,2", "pooling=weighted_mean")
    assert refused.returncode != 0
    assert "job 1 was 'learning_rate=1 pooling=weighted_mean' and is now 'learning_rate=2" in refused.stderr
    assert "[1/2]" not in refused.stdout  # before anything was started


def test_second_start_keeps_what_is_finished(first: First, project: Path) -> None:
    """The script trains only if it is not told to resume or finds no results: the launcher must say resume=true."""
    second = sweep(project, "learning_rate=13,1", "pooling=weighted_mean", MEND="1")
    assert second.returncode == 0, second.stdout + second.stderr
    failed_before, finished_before = ((project / f"runs/toy-sweep/{i}.log").read_text() for i in (0, 1))
    assert failed_before.count("training with 13") == 2
    assert finished_before.count("training with 1") == 1
    assert finished_before.count("found finished") == 1
    assert [row[2] for row in table_rows(second.stdout)] == ["finished", "finished"]
    content = read_sweep(project)
    assert [job["job"] for job in content["jobs"]] == [0, 1]
    assert content["shared_overrides"] == ["pooling=weighted_mean"]
    assert content["best"] == 1


def test_two_processes_start_as_two_ranks_with_the_same_values(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing; this must be two."""
    project = toy_project(tmp_path)
    processes = ["hydra.launcher.num_processes=2", "hydra.launcher.num_cpu_threads_per_process=3"]
    done = sweep(project, "learning_rate=0.5,13", "name='two, quoted'", *processes)
    log = (project / "runs/two, quoted-sweep/0.log").read_text()
    cores = len(os.sched_getaffinity(0))
    assert sorted(re.findall("rank .*", log)) == [
        f"rank 0 of 2 rate 0.5 threads 3 of {cores} cpu true",
        f"rank 1 of 2 rate 0.5 threads 3 of {cores} cpu true",
    ]
    assert [job["status"] for job in read_sweep(project, "two, quoted")["jobs"]] == ["finished", "failed"]
    assert "    | ValueError: 13 is unlucky" in done.stdout  # not buried under what torchrun says of itself
    assert "ChildFailedError" not in done.stdout


def test_job_that_an_earlier_start_left_running_is_not_started_again(tmp_path: Path) -> None:
    """A launcher ended by kill -9 leaves its job behind, which holds the log open, and with it the lock."""
    project = toy_project(tmp_path)
    (project / "runs/toy-sweep").mkdir(parents=True)
    with (project / "runs/toy-sweep/0.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        refused = sweep(project, "learning_rate=1")
    assert refused.returncode != 0
    assert "FAILED: a process of an earlier start still writes to runs/toy-sweep/0.log" in refused.stdout
    assert (project / "runs/toy-sweep/0.log").read_text() == ""


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_jobs_at_a_time_run_at_a_time_and_share_the_cores(tmp_path: Path) -> None:
    project = toy_project(tmp_path)
    done = sweep(project, "learning_rate=13,7,8", "hydra.launcher.jobs_at_a_time=2")
    assert "jobs: 3, 2 at a time, each 1 process of" in done.stdout
    statuses = [job["status"] for job in read_sweep(project)["jobs"]]
    assert statuses == ["failed", "finished", "finished"], done.stdout
    assert "InputError: 1 of 3 jobs failed: 0; their output: runs/toy-sweep/<job>.log; typed again" in done.stderr
    half = max(1, len(os.sched_getaffinity(0)) // 2)  # training counts the cores that it may use
    assert f"threads {half} of {half} cpu" in (project / "runs/toy-sweep/1.log").read_text()


def test_prefix_starts_the_jobs_by_another_command(tmp_path: Path) -> None:
    """As srun does it, whose place `env` takes here."""
    project = toy_project(tmp_path)
    prefix = "hydra.launcher.prefix=[env,'PARTITION=long']"
    refused = sweep(project, "learning_rate=1", prefix)
    assert "set hydra.launcher.num_cpu_threads_per_process" in refused.stderr
    done = sweep(project, "learning_rate=1", prefix, "hydra.launcher.num_cpu_threads_per_process=3")
    assert done.returncode == 0, done.stdout
    log = (project / "runs/toy-sweep/0.log").read_text()
    assert "started by long\n" in log
    assert "threads 3 of " in log


@pytest.mark.parametrize(("pooling", "scores"), [("mean", ["0.2500", "0.5000"]), ("cls", ["0.1250", "0.2500"])])
def test_jobs_without_a_test_set_are_compared_by_dev_sets(pooling: str, scores: list[str], tmp_path: Path) -> None:
    """At the step that the manifest names as the best, which the weights are of, or else at the last one."""
    project = toy_project(tmp_path)
    done = sweep(project, "learning_rate=3,1", "scored=dev", f"pooling={pooling}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table_rows(done.stdout)
    assert rows == [["0", "learning_rate=3", "finished", scores[0]], ["*1", "learning_rate=1", "finished", scores[1]]]
    assert re.search(rf"job 1  learning_rate=1  \d+\.\d min  toy \(dev\) ndcg@10 {scores[1]}\n", done.stdout)
    assert "* best toy (dev) ndcg@10: job 1" in done.stdout
    content = read_sweep(project)
    assert (content["main_metric"], content["best"]) == ("toy (dev) ndcg@10", 1)


def test_jobs_without_any_score_are_finished_and_the_table_says_why_none_is_the_best(tmp_path: Path) -> None:
    project = toy_project(tmp_path)
    done = sweep(project, "learning_rate=3,1", "scored=none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished, with no score\n" in done.stdout
    assert [row[2] for row in table_rows(done.stdout)] == ["finished", "finished"]
    said = " ".join(done.stdout.split())
    assert "nothing to compare the jobs by: they have no test set (evaluation.retrieval, evaluation.sts, " in said
    content = read_sweep(project)
    outcomes = [(job["status"], job["main_metric"], job["error"]) for job in content["jobs"]]
    assert outcomes == [("finished", None, None)] * 2
    assert (content["main_metric"], content["best"]) == (None, None)


@pytest.mark.slow
def test_threads_of_the_launcher_are_those_of_training_unless_the_job_or_its_run_has_its_own(tmp_path: Path) -> None:
    """A run is refused when it resumes with another trainer.threads than its config.yaml has, null included."""
    project = toy_project(tmp_path)
    swept, stated = ["seed=0,1", "trainer.threads=null,2"], "hydra.launcher.num_cpu_threads_per_process=3"

    def last_threads(*arguments: str) -> list[str]:
        done = sweep(project, *swept, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        logs = [(project / f"runs/toy-sweep/{job}.log").read_text() for job in range(4)]
        said.append(done.stdout)
        return [re.findall("training would take (.*) threads", log)[-1] for log in logs]

    said: list[str] = []
    assert last_threads(stated) == ["3", "2", "3", "2"]  # seed=0 twice, then seed=1
    assert last_threads() == ["None", "2", "None", "2"]  # training shares the cores that it may use
    for job, threads in enumerate(["null", 2, 5]):
        (project / f"runs/toy-sweep/{job}/config.yaml").write_text(f"trainer: {{threads: {threads}}}")
    content = read_sweep(project)
    content["jobs"][0]["status"] = "stopped"
    (project / "runs/toy-sweep/sweep.json").write_text(json.dumps(content))
    assert last_threads(stated) == ["None", "2", "5", "2"]
    assert "started with other threads, which are kept: job 0; hydra.launcher.num_cpu_threads" in said[-1]
    assert last_threads() == ["None", "2", "5", "2"]
    assert "which are kept" not in said[-1]
    refused = sweep(project, *swept, "hydra.launcher.num_cpu_threads_per_process=0")
    assert "hydra.launcher.num_cpu_threads_per_process is 0; it must be at least 1" in refused.stderr


@pytest.mark.slow
def test_a_sweep_of_trainings_on_ones_own_pairs_finishes_and_resumes(start, tiny_base, tmp_path: Path) -> None:
    """As data=file has it: no test sets. Each job takes the threads that the launcher is given."""
    overrides = small_training(tmp_path, tiny_base("gpt_neo"))(tmp_path)
    scored = next(item for item in overrides if item.startswith("evaluation.sts")).partition("=")[2]
    other = ("evaluation.sts", "trainer.threads", "trainer.max_steps")
    kept = [item for item in overrides if not item.startswith(other)]
    swept = ["-m", "hydra/launcher=accelerate", "name=sw", *kept, f"dev.sts={scored}", "trainer.max_steps=2"]
    swept += ["trainer.evaluate_every_steps=1", "optim.learning_rate=1e-3,3e-1"]
    folder = tmp_path / "runs" / "sw-sweep"

    def statuses(threads: int) -> list[str]:
        ended = start("biencoder", *swept, f"hydra.launcher.num_cpu_threads_per_process={threads}")
        assert ended.code == 0, ended.said
        assert "* best scored (dev) spearman_cosine: job " in ended.out
        return [job["status"] for job in json.loads((folder / "sweep.json").read_text())["jobs"]]

    assert statuses(3) == ["finished", "finished"]
    for job in json.loads((folder / "sweep.json").read_text())["jobs"]:
        manifest = json.loads((folder / str(job["job"]) / "manifest.json").read_text())
        assert manifest["environment"]["threads"] == 3
        assert job["main_metric"] == pytest.approx(manifest["best"]["value"])  # as training chose its step
    config = folder / "0" / "config.yaml"  # as a sweep of before wrote it
    config.write_text(config.read_text().replace("threads: 3", "threads: null"))
    assert statuses(2) == ["finished", "finished"]


def test_a_sweep_ends_with_a_sentence(start) -> None:
    """Of the script itself, whose jobs `false` ends here before they begin."""
    swept = ["-m", "hydra/launcher=accelerate", "hydra.launcher.prefix=['false']", "name=x"]
    swept.append("hydra.launcher.num_cpu_threads_per_process=1")
    failed = start("biencoder", *swept, "trainer.seed=0,1")
    assert "Error executing job" not in failed.said  # Hydra's own words
    assert failed.sentence == (
        "2 of 2 jobs failed: 0, 1; their output: runs/x-sweep/<job>.log; typed again, the command runs these alone"
    )
    other = start("biencoder", *swept, "trainer.seed=0,2").sentence
    assert "job 1 was 'name='x' trainer.seed=1' and is now 'name='x' trainer.seed=2'" in other
    refused = start("biencoder", *swept, "name=y", "optim.learning_rate=1e-3,-1").sentence
    assert refused.startswith("job 1 (name='y' optim.learning_rate=-1): optim.learning_rate=-1.0 must be positive")
    missing = start("biencoder", *swept[:2], "hydra.launcher.prefix=[srin]", "trainer.seed=0,1").sentence
    assert missing == "hydra.launcher.prefix=srin: there is no command srin on the PATH"
    unknown = start("biencoder", "-m", "hydra/launcher=submitit_other", "trainer.seed=0,1").sentence
    assert re.search(r"Available options .* accelerate .*; pip install .sgpt-framework\[submitit\]", unknown)


@pytest.mark.slow
def test_a_sweep_by_submitit_ends_with_a_sentence(start, tmp_path) -> None:
    """Without Slurm, with one whose controller does not answer, and when a job itself is refused."""
    by_slurm = ["-m", "hydra/launcher=submitit_slurm", "trainer.seed=0,1"]
    said = r"submitit could not run the jobs \({}\); .* \.submitit/ of the sweep's folder; .*hydra/launcher=accelerate"
    path = str(tmp_path)
    assert re.fullmatch(said.format(r"Could not detect .srun.*"), start("biencoder", *by_slurm, PATH=path).sentence)
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: Unable to contact it' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    answer = start("biencoder", *by_slurm, PATH=path).sentence
    assert re.fullmatch(said.format("sbatch: error: Unable to contact .*"), answer)
    local = ["-m", "hydra/launcher=submitit_local", "trainer.seed=0", "data=file", "data.path=none.jsonl"]
    assert re.fullmatch(said.format(r"error: .*none\.jsonl: no such file.*"), start("biencoder", *local).sentence)


def test_each_job_at_a_time_has_its_own_gpus_and_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    of_slots = cores_of_slots(cores)
    assert of_slots is None if cores == 1 else sorted(of_slots) == [[core] for core in sorted(os.sched_getaffinity(0))]
    assert cores_of_slots(1) is None
    assert gpus_of_slots(["0", "1", "5", "7"], slots=2, num_processes=2) == [["0", "1"], ["5", "7"]]
    assert gpus_of_slots(["0", "1"], slots=1, num_processes=2) is None  # all are its own
    assert gpus_of_slots([], slots=2, num_processes=1) is None  # a machine without
    with pytest.raises(InputError, match="need 4 GPUs, and 3 can be used"):
        gpus_of_slots(["0", "1", "2"], slots=2, num_processes=2)


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_stopping_the_sweep_stops_its_jobs_and_nothing_else(
    number: signal.Signals, jobs: int, tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    project = toy_project(tmp_path)
    arguments = [f"learning_rate={','.join(['99'] * jobs)},1", f"hydra.launcher.jobs_at_a_time={jobs}"]
    launcher = subprocess.Popen(
        [sys.executable, "train/toy.py", "-m", "hydra/launcher=accelerate", *arguments],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a pytest started in the background of a script ignores Ctrl-C, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started = project / "started"
    deadline = time.monotonic() + 120
    while not (started.exists() and started.read_text().count("\n") == jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
    scripts = [int(line) for line in started.read_text().splitlines()]
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    for script_id in scripts:
        with pytest.raises(ProcessLookupError):
            os.kill(script_id, 0)
    assert bystander.poll() is None
    statuses = [*["stopped"] * jobs, "waiting"]
    assert [row[2] for row in table_rows(output)] == statuses
    assert [job["status"] for job in read_sweep(project)["jobs"]] == statuses
