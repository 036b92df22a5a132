"""Studies of a stand-in training script, which needs no torch; Optuna, its database and the processes are real."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from rich.console import Console

from sgpt.cli.compose import compose_training, plain, typed
from sgpt.runtime.errors import InputError
from sgpt.runtime.overrides import CONFIGS
from sgpt.sweeps.process import check_in_fork
from sgpt.sweeps.space import Dimension, check_space, check_values, drawn_overrides
from sgpt.sweeps.study import StudyConfig, check_training, dev_score, dev_scores, open_study, run_study
from sgpt.sweeps.study_report import study_table, write_experiment, write_study_page
from sgpt.training.config import TrainConfig

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")
REPOSITORY = Path(__file__).parents[2]

# four steps, each scored; the best rate is 0.01. It resumes as training does: at the step behind the last line.
SCRIPT = """
import json, math, os, signal, sys, time
from pathlib import Path
keys = dict(item.split("=", 1) for item in sys.argv[1:])
folder = Path(keys["runs"]) / keys["name"]
folder.mkdir(parents=True, exist_ok=True)
metrics = folder / "metrics.jsonl"
def stopped(number, frame):
    (folder / "stopped").touch()
    raise SystemExit(143)
signal.signal(signal.SIGTERM, stopped)
rate, kind = float(keys["rate"]), keys.get("kind")
if kind == "broken":
    raise ValueError("broken, as asked")
quality = 1 / (1 + (math.log10(rate) + 2) ** 2)
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
print(f"starts behind step {done}", flush=True)
for step in range(done + 1, 5):
    time.sleep(float(keys.get("seconds", 0)))
    with metrics.open("a") as out:
        out.write(json.dumps({"step": step, "dev": {"toy": {"ndcg@10": quality * step / 4, "recall@100": 1}}}) + "\\n")
    if kind == "endless":
        time.sleep(600)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(SCRIPT)
    return tmp_path / "toy.py"


def quality(rate: float) -> float:
    return 1 / (1 + (math.log10(rate) + 2) ** 2)


RATE = Dimension("rate", low=1e-4, high=1, log=True)
RATE_OF_TRAINING = Dimension("optim.learning_rate", low=1e-4, high=1, log=True)


def test_a_study_scores_its_trials_and_survives_those_that_fail(tmp_path, script):
    space = [RATE, Dimension("kind", choices=["usual", "broken"])]
    config = StudyConfig("toy", str(tmp_path), trials=3, overrides=["a=b c"], space=space)
    planned = open_study(config)
    for rate, kind in ((0.1, "usual"), (0.1, "broken"), (0.01, "usual")):
        planned.enqueue_trial({"rate": rate, "kind": kind})
    study = run_study(config, script)

    database = f"sqlite:///{tmp_path / 'toy-study' / 'study.db'}"
    trials = optuna.load_study(study_name="toy", storage=database).trials  # by Optuna alone
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [trial.value for trial in trials] == [pytest.approx(quality(0.1)), None, pytest.approx(quality(0.01))]
    assert [*trials[2].intermediate_values] == [1, 2, 3, 4]
    assert trials[1].user_attrs["error"] == (
        f"trial 1 ended with exit code 1; log: {tmp_path / 'toy-study' / '1.log'}"
    )
    assert "ValueError: broken, as asked" in trials[1].user_attrs["last_lines"]
    log = (tmp_path / "toy-study" / "2.log").read_text()
    assert f"toy.py a=b c rate=0.01 kind=usual runs={tmp_path}/toy-study name=2 resume=true\n" in log

    console = Console(width=200, record=True)
    console.print(study_table(study, config))
    rows = [line.replace(" ", "") for line in console.export_text().splitlines() if line.startswith("│")]
    assert rows == ["│0│0.1│usual│finished│0.5000│", "│1│0.1│broken│failed│-│", "│*2│0.01│usual│finished│1.0000│"]
    page = write_study_page(study, config).read_text()
    assert page.count("Plotly.newPlot(") == 4
    assert '<script src=' not in page  # nothing is loaded from elsewhere
    # the same command again finds all done
    assert len(run_study(config, script).trials) == 3


def test_a_worker_counts_the_trials_when_no_other_one_takes_one(tmp_path, script):
    """Two that both saw the last one missing both ran one."""
    config = StudyConfig("toy", str(tmp_path), trials=1, overrides=[], space=[RATE])
    study = open_study(config)
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / "toy-study" / ".trial.lock"):  # as a worker has it that takes the last trial
            other = pool.submit(run_study, config, script)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.7)
            study.optimize(lambda trial: 0.5, n_trials=1)
        assert len(other.result(timeout=30).trials) == 1


def test_workers_that_end_together_write_the_files_in_turn(tmp_path):
    config = StudyConfig("toy", str(tmp_path), space=[RATE])
    study = open_study(config)
    study.optimize(lambda trial: trial.suggest_float("rate", 1e-4, 1, log=True), n_trials=1)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda number: write_experiment(study, config, {"a": number}), range(60)))
    assert "best of 1 trials" in files[0].read_text()


def test_a_trial_below_the_median_is_told_to_stop(tmp_path, script):
    space = [RATE, Dimension("kind", choices=["usual", "endless"])]
    config = StudyConfig("toy", str(tmp_path), trials=2, overrides=[], space=space, startup_trials=1)
    planned = open_study(config)
    planned.enqueue_trial({"rate": 0.01, "kind": "usual"})
    planned.enqueue_trial({"rate": 1.0, "kind": "endless"})  # which would never end by itself
    study = run_study(config, script)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.trials[1].last_step == 1
    assert (tmp_path / "toy-study" / "1" / "stopped").exists()  # by SIGTERM, on which a run saves its step


def test_a_study_in_which_everything_fails_ends_with_the_reason(tmp_path, script):
    config = StudyConfig("toy", str(tmp_path), overrides=["kind=broken"], space=[RATE])
    with pytest.raises(InputError, match=r"3 trials failed and none has a score.* trial 2 ended with exit code 1"):
        run_study(config, script)


def test_a_study_with_other_keys_under_the_same_name_is_refused(tmp_path):
    open_study(StudyConfig("toy", str(tmp_path), space=[RATE]))
    open_study(StudyConfig("toy", str(tmp_path), space=[RATE], trials=99, pruner="none"))  # which may change
    with pytest.raises(InputError, match=r"is a study with other overrides, space or metric: .*give this one another"):
        open_study(StudyConfig("toy", str(tmp_path), space=[RATE, Dimension("loss.scale", low=1, high=2)]))


@pytest.mark.parametrize(("storage", "sentence"), [
    ("nonsense", r"^storage=nonsense: Could not parse .*; give postgresql://<user>:<password>@<host>/<database> of a"),
    ("firebird://me:secret@host/d", r"^storage=firebird://me:…@host/d: .*firebird"),
    ("oracle://me:secret@host/d", r"^storage=oracle://me:…@host/d: the driver of this database is not installed"),
])  # fmt: skip
def test_a_database_that_cannot_be_opened_is_one_sentence_without_its_password(storage, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence) as refused:
        open_study(StudyConfig(name="toy", runs=str(tmp_path), storage=storage))
    assert "secret" not in str(refused.value)


def test_workers_draw_different_values_and_the_same_again_in_another_study(tmp_path):
    """The draw belongs to the number of a trial, and not to the worker that asks."""

    def drawn(name: str, workers: int) -> list[float]:
        config = StudyConfig(name, str(tmp_path), space=[RATE], seed=3)
        joined = [open_study(config) for _ in range(workers)]
        for number in range(4):
            joined[number % workers].optimize(lambda trial: trial.suggest_float("rate", 1e-4, 1, log=True), n_trials=1)
        return [trial.params["rate"] for trial in joined[0].trials]

    assert drawn("one", 1) == drawn("two", 2)
    assert len(set(drawn("three", 2))) == 4


WORKER = """
import sys
from pathlib import Path
from sgpt.sweeps import study
from sgpt.sweeps.process import check_in_fork
from sgpt.sweeps.space import Dimension
study.HEARTBEAT_SECONDS, study.GRACE_SECONDS = 1, 4
space = [Dimension("rate", low=1e-4, high=1, log=True)]
config = study.StudyConfig("toy", ".", trials=4, overrides=["seconds=1"], space=space, pruner="none")
study.run_study(config, Path("toy.py"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_study_of_two_workers_of_which_one_is_ended_comes_to_its_end(tmp_path, script, number, ctrl_c):
    def worker() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", WORKER], cwd=tmp_path, stdout=subprocess.DEVNULL)

    def lines(number: int) -> int:
        file = tmp_path / "toy-study" / str(number) / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    first = worker()
    deadline = time.monotonic() + 120
    while not lines(0) and time.monotonic() < deadline:
        time.sleep(0.02)
    second = worker()
    first.send_signal(number)
    assert first.wait(timeout=60) == -number
    assert second.wait(timeout=200) == 0
    assert worker().wait(timeout=200) == 0  # and what comes later finds all done
    trials = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path}/toy-study/study.db").trials
    assert [trial.state.name for trial in trials].count("FAIL") == 1
    scored = {trial.user_attrs["run"]: trial for trial in trials if trial.state.name == "COMPLETE"}
    again = {trial.user_attrs["run"] for trial in trials if trial.state.name == "FAIL"}
    assert again <= scored.keys()  # run again with the same values, in its folder
    assert len(scored) == 4
    for number, trial in scored.items():
        assert trial.value == pytest.approx(quality(trial.params["rate"]))
        assert lines(number) == 4  # no step was trained twice: it resumed


# what needs no trial


@pytest.mark.parametrize(("space", "message"), [
    ([], "space is empty"),
    ([Dimension(low=1, high=2)], r"space has the keys \[''\]; each member needs a key"),
    ([RATE, RATE], "each key one member"),
    ([Dimension("a", low=1)], "space: a needs low and high, or choices"),
    ([Dimension("a", low=2, high=1)], "space: a has low=2, which must be below high=1"),
    ([Dimension("a", low=0, high=1, log=True)], "must be positive with log"),
    ([Dimension("a", low=1, high=2, log=True, step=1)], "has log and step"),
    ([Dimension("a", choices=["x", "y"], low=1)], "has choices and numbers"),
    ([Dimension("a", choices=["x", "x"])], "give two or more that differ"),
])  # fmt: skip
def test_a_space_that_cannot_be_is_refused(space, message):
    with pytest.raises(InputError, match=message):
        check_space(space)


def test_whole_numbers_are_written_as_such():
    """trainer.queries_per_process=16.0 would be refused."""
    assert drawn_overrides({"a": 16.0, "b": 1e-5, "c": "mean"}) == ["a=16", "b=1e-05", "c=mean"]


def test_dev_lines_are_read_while_they_are_written(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert dev_scores(file, "mean") == {}
    file.write_text(
        '{"step": 1, "loss": 3}\n{"step": 1, "dev": {"a": {"ndcg@10": 0.5}, "b": {"spearman_cosine": 0.25}}}\n'
        '{"step": 2, "dev": {"a": {"ndcg@10": NaN}, "b": {"spearman_cosine": 0.25}}}\n{"step": 3, "dev": {"a": {"ndc'
    )
    assert dev_scores(file, "mean") == {1: 0.375}
    assert dev_scores(file, "b/spearman_cosine") == {1: 0.25, 2: 0.25}
    with pytest.raises(InputError, match=r"metric=c/x is none of the dev results; choose mean or one of a/ndcg@10"):
        dev_score(json.loads('{"a": {"ndcg@10": 1}}'), "c/x")


def test_what_no_trial_could_be_scored_by_is_said_before_the_first():
    composed = compose_training(["experiment=pydocs"])
    with pytest.raises(InputError, match=r"trainer.evaluate_every_steps is 0"):
        check_training(composed)
    with pytest.raises(InputError, match=r"no dev set decides between the trials"):
        check_training(compose_training(["data.path=x", "trainer.evaluate_every_steps=1"]))
    check_training(compose_training(["data.path=x", "trainer.evaluate_every_steps=1", "dev.pairs=[own.csv]"]))
    with pytest.raises(InputError, match=r"optim.learning_rat=1: there is no key .*did you mean optim.learning_rate"):
        compose_training(["experiment=pydocs", "optim.learning_rat=1"])


PER_PROCESS = "trainer.queries_per_process"


def trained_with(drawn: list[str]) -> TrainConfig:
    return typed(TrainConfig, compose_training(["data.path=x", *drawn]))


@pytest.mark.parametrize(("dimension", "sentence"), [
    (Dimension(PER_PROCESS, low=8, high=16), rf"^space: {PER_PROCESS} .* as 8\.5, .*Integer.*give it step: 1,"),
    (Dimension(PER_PROCESS, low=8, high=16, log=True), r"give it step: 1 in place of log, which"),
    (Dimension(PER_PROCESS, low=8, high=16, step=0.25), r"drawn as 8\.25, .*give it step: 1 in place of step: 0\.25"),
    (Dimension(PER_PROCESS, low=7.5, high=16), rf"^{PER_PROCESS}: Value '7\.5' .*could not be converted to Integer"),
    (Dimension(PER_PROCESS, low=0, high=16, step=1), rf"^{PER_PROCESS}=0 "),
    (Dimension("optim.warmup_steps", low=0, high=100), r"drawn as 50\.5, .*give it step: 1,"),  # 0.5 is a share
    (Dimension("pooling", choices=["men", "mean"]), r"^pooling=men: there is no 'men' in configs/pooling/"),
])  # fmt: skip
def test_values_that_training_refuses_are_said_before_the_first_trial(dimension, sentence):
    with pytest.raises(InputError, match=sentence):
        check_values([RATE_OF_TRAINING, dimension], trained_with)


@pytest.mark.parametrize("dimension", [
    Dimension(PER_PROCESS, low=8, high=16, step=1),
    Dimension(PER_PROCESS, low=8, high=64, step=8),
    Dimension("loss.scale", low=10, high=60, log=True),
    Dimension("optim.weight_decay", low=0, high=1),
    Dimension("pooling", choices=["mean", "cls"]),
])  # fmt: skip
def test_values_that_training_takes_are_not_refused(dimension):
    check_values([RATE_OF_TRAINING, dimension], trained_with)


def test_a_study_that_cannot_score_ends_with_an_error(start, tmp_path):
    """Of the script itself: before the first trial where a key counts, and after the last where none has a score."""
    study = ["runs=here", "trials=1", "overrides=[data.path=none.jsonl,dev.sts=[dev],trainer.evaluate_every_steps=1]"]
    refused = start("sweep", *study, "name=ints", "space=[{key: trainer.queries_per_process, low: 8, high: 16}]")
    assert refused.sentence.startswith("space: trainer.queries_per_process may be drawn as 8.5, which training refuses")
    assert refused.sentence.endswith("give it step: 1, which draws whole numbers")
    ended = start("sweep", *study, "name=x", "space=[{key: trainer.queries_per_process, low: 8, high: 16, step: 1}]")
    assert ended.code == 1, ended.said
    assert "none.jsonl" in ended.out  # the end of the trial's output
    assert "plots  here/x-study/study.html\n" in ended.out
    assert ended.err.endswith(
        "error: no trial has a score; why: here/x-study/<trial>.log. Put it right and raise trials=…, or give "
        "the study another name=…\n"
    )


def test_the_best_configuration_is_an_experiment_that_composes_to_itself(tmp_path, script):
    """With options of groups among what differs, whose keys are not those of the defaults."""
    overrides = ["experiment=pydocs", "debug=tiny", "tuning=lora", "markers=none", "trainer.evaluate_every_steps=2"]
    config = StudyConfig("toy", str(tmp_path), trials=1, overrides=overrides, space=[RATE])
    study = run_study(config, script)
    best = plain(typed(TrainConfig, compose_training([*overrides, "pooling=mean", "optim.learning_rate=0.0123"])))
    write_experiment(study, config, best)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = f"hydra.searchpath=[file://{tmp_path}/toy-study]"  # what --config-dir does
        composed = compose("train", overrides=[found, "experiment=toy_best", "name=pydocs"])
    assert plain(typed(TrainConfig, composed)) == best


def test_a_check_that_is_killed_is_said():
    with pytest.raises(InputError, match=r"the check of what is drawn ended with code -9; -9 is for want of memory"):
        check_in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))
