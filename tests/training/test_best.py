"""The best step by the dev sets is kept and taken in the end, also after an interruption; patience ends a run."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file

from sgpt.data.formats.scored_pairs import PairSet
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Sets, evaluate
from sgpt.evaluation.shared import SharedEncoder, evaluate_together
from sgpt.runtime.errors import InputError
from sgpt.runtime.interrupt import Interrupted, Stop
from sgpt.training.checkpoint import TrainState, whole_checkpoints
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import trainable_parameters
from tests.starts import in_processes
from tests.training.test_resume import EXAMPLES, Stopped, feed_of, fresh_encoder, lines

STEPS = 12
VALUES = [0.1, 0.3, 0.2, 0.5, 0.4, 0.45, 0.6, 0.5, 0.55, 0.6, 0.2, 0.1]  # of nDCG@10 after each step; 7 is the best
OTHER_VALUES = [0.2, 0.3, 0.4, 0.7, 0.6, 0.5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # of MRR@10; 4 is


def trained(
    folder: Path, encoder: Encoder, *, fails_at: int | None = None, interrupted_at: int | None = None, **config
) -> TrainState:
    """Trains with dev values that are a function of the step, as the log tells it.

    fails_at, interrupted_at: of the evaluations, in the middle of which the process dies or gets Ctrl-C.
    """
    folder.mkdir(exist_ok=True)
    evaluations = []

    def evaluate() -> dict:
        evaluations.append(1)
        if len(evaluations) == fails_at:
            raise Stopped
        if len(evaluations) == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)
        index = max(line["step"] for line in lines(folder)) - 1
        return {"toy": {"ndcg@10": VALUES[index], "mrr@10": OTHER_VALUES[index]}}

    settings = {
        "queries_per_process": 8, "epochs": 2, "max_steps": STEPS, "log_every_steps": 1, "save_every_steps": 3,
        "evaluate_every_steps": 1,
    } | config  # fmt: skip
    given, loss, optim = TrainerConfig(**settings), LossConfig(), OptimConfig(learning_rate=1e-2)
    feed = feed_of(EXAMPLES, encoder, given.queries_per_process)
    return train(encoder, feed, Accelerator(cpu=True), RunFolder(folder), given, loss, optim, evaluate)


def dev_values(folder: Path) -> dict[int, float]:
    rows = [line for line in lines(folder) if "dev" in line]
    assert len({line["step"] for line in rows}) == len(rows)
    return {line["step"]: line["dev"]["toy"]["ndcg@10"] for line in rows}


def steps_kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in whole_checkpoints(folder / "checkpoints")]


def assert_holds(encoder: Encoder, checkpoint: Path) -> None:
    stored = load_file(checkpoint / "trained.safetensors")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in trainable_parameters(encoder.trunk).items())


@pytest.mark.parametrize(("keep_best", "best", "value"), [("mean", 7, 0.6), ("toy/mrr@10", 4, 0.7)])
def test_the_best_step_is_kept_besides_the_newest_ones_and_its_weights_are_taken(
    keep_best, best, value, tiny_encoder, tmp_path
):
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    state = trained(tmp_path, encoder, keep_best=keep_best)
    assert list(dev_values(tmp_path).values()) == VALUES
    assert (state.best_step, state.best_value) == (best, value)
    assert steps_kept(tmp_path) == [best, 9, 12]
    assert_holds(encoder, tmp_path / "checkpoints" / f"step-{best}")


def test_without_keep_best_the_last_step_is_taken(tiny_encoder, tmp_path):
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    state = trained(tmp_path, encoder, keep_best=None)
    assert state.best_step == 0
    assert steps_kept(tmp_path) == [9, 12]
    assert_holds(encoder, tmp_path / "checkpoints" / f"step-{STEPS}")


def test_the_last_step_is_scored_too(tiny_encoder, tmp_path):
    trained(tmp_path, fresh_encoder(tiny_encoder, "bitfit"), evaluate_every_steps=5)
    assert list(dev_values(tmp_path)) == [5, 10, 12]


@pytest.mark.bitwise
@pytest.mark.parametrize("how", ["fails_at", "interrupted_at", "measured and not saved"])
def test_an_interrupted_run_has_the_best_step_of_the_uninterrupted_one(how, ctrl_c, tiny_encoder, tmp_path):
    whole, other, expected = tmp_path / "whole", tmp_path / "other", fresh_encoder(tiny_encoder, "bitfit")
    state = trained(whole, expected, patience=3)
    for number in (2, 6):  # again, after some that count
        at = {"interrupted_at" if how == "measured and not saved" else how: number}
        with pytest.raises((Stopped, Interrupted)):
            trained(other, fresh_encoder(tiny_encoder, "bitfit"), patience=3, **at)
        if how == "measured and not saved":  # killed after the line of an evaluation, before the state that counts it
            last = steps_kept(other)[-1]
            with (other / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": last, "dev": {"toy": {"ndcg@10": 0.0, "mrr@10": 0.0}}}) + "\n")
    resumed = fresh_encoder(tiny_encoder, "bitfit")
    again = trained(other, resumed, patience=3)
    assert dev_values(other) == dev_values(whole)
    again.seconds = state.seconds
    assert again == state
    assert_holds(resumed, whole / "checkpoints" / f"step-{state.best_step}")
    assert steps_kept(other)[-1] == steps_kept(whole)[-1] == state.step


def test_patience_ends_a_run_and_resuming_it_takes_no_further_step(tiny_encoder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="sgpt"):
        state = trained(tmp_path, fresh_encoder(tiny_encoder, "bitfit"), patience=2)
    assert (state.step, state.best_step) == (6, 4)
    assert "stopped after step 6 of 12: the last 2 evaluations were not better (trainer.patience)" in caplog.text
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    assert trained(tmp_path, encoder, patience=2) == state
    assert_holds(encoder, tmp_path / "checkpoints" / "step-4")


def test_a_best_checkpoint_that_is_gone_is_said_and_the_last_step_taken(tiny_encoder, tmp_path, caplog):
    state = trained(tmp_path, fresh_encoder(tiny_encoder, "bitfit"))
    (tmp_path / "checkpoints" / f"step-{state.best_step}").rename(tmp_path / "elsewhere")
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    assert trained(tmp_path, encoder).best_step == 0
    assert f"step-{state.best_step}, the best step, is gone: the weights of step {STEPS} are kept" in caplog.text
    assert_holds(encoder, tmp_path / "checkpoints" / f"step-{STEPS}")


@pytest.mark.parametrize(("key", "message"), [
    ({"patience": 3}, r"trainer\.patience=3 has no effect without evaluations that are compared; set trainer\.eval"),
    ({"keep_best": "toy/mrr@10"}, r"trainer\.keep_best='toy/mrr@10' has no effect without evaluations; name a dev set"),
])  # fmt: skip
def test_what_needs_evaluations_is_refused_without(key, message):
    with pytest.raises(InputError, match=message):
        TrainerConfig(**key)


# --- the whole run ---


def test_adapter_export_results_and_report_are_of_the_best_step(start, training, tmp_path):
    """The set is both dev and test set, so the result of the run has to be the best value of its dev lines."""
    scored = next(one.split("=")[1] for one in training(tmp_path) if one.startswith("evaluation.sts"))
    more = [f"dev.sts={scored}", "trainer.evaluate_every_steps=1", "optim.learning_rate=0.3"]
    refused = start("biencoder", *training(tmp_path), *more, "trainer.keep_best=scored/ndcg@10").sentence
    assert refused == (
        "trainer.keep_best='scored/ndcg@10' is no metric of the dev sets; choose mean or one of "
        "scored/spearman_cosine, scored/pearson_cosine"
    )
    ended = start("biencoder", *training(tmp_path), *more, "trainer.keep_best=scored/pearson_cosine")
    assert ended.code == 0, ended.said
    run = tmp_path / "runs" / "run"
    values = {line["step"]: line["dev"]["scored"] for line in lines(run) if "dev" in line}
    best = max(values, key=lambda step: values[step]["pearson_cosine"])
    assert best != 4, values  # else the last step would have been taken as well
    assert json.loads((run / "results.json").read_text())["after"]["scored"] == values[best]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["best"] == {"step": best, "value": values[best]["pearson_cosine"]}
    assert f"taken from step {best} of 4, the best on the dev sets" in ended.said
    report = (run / "report.html").read_text()
    assert f"<dt>step taken</dt><dd>{best} <small>of 4, the best on the dev sets</small>" in report

    def scores(model: Path) -> dict[str, float]:
        texts = [json.loads(line) for line in Path(scored.strip("[]")).read_text().splitlines()]
        first, second, gold = ([row[key] for row in texts] for key in ("sentence1", "sentence2", "score"))
        return evaluate(Encoder.from_pretrained(model), Sets([], [PairSet("scored", first, second, gold)]))["scored"]

    for model in ("adapter", "export"):
        assert scores(run / model) == pytest.approx(values[best], abs=1e-5)
    again = start("export", f"run={run}", f"output={tmp_path / 'again'}")
    assert again.code == 0, again.said
    assert f"step-{best} exported to" in again.said
    assert scores(tmp_path / "again") == pytest.approx(values[best], abs=1e-5)
    shutil.rmtree(run / "checkpoints")  # as docs/run_folder.md allows: the adapter has the same tensors
    from_adapter = start("export", f"run={run}", f"output={tmp_path / 'from_adapter'}")
    assert from_adapter.code == 0, from_adapter.said
    assert f"{run / 'adapter'} exported to" in from_adapter.said
    assert "worse" not in ended.said
    results = json.loads((run / "results.json").read_text())
    results["before"]["scored"]["spearman_cosine"] = 0.5  # had the base been better
    (run / "results.json").write_text(json.dumps(results))
    shown = start("biencoder", *training(tmp_path), *more, "trainer.keep_best=scored/pearson_cosine", "resume=true")
    now = 100 * results["after"]["scored"]["spearman_cosine"]
    assert f"warning: training made scored worse, spearman_cosine 50.00 before and {now:.2f} now; a lower" in shown.said
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "from_adapter"))
    assert one == other


# --- two processes ---

PAIRS = PairSet(
    "pairs",
    [f"sort {n} lists" for n in range(9)],
    [f"{n % 5} of {n}" for n in range(9)],
    [float(n % 4) for n in range(9)],
)


def one_of_two(rank: int, folder: Path, encoder: Encoder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    texts = [f"text {number} of this" for number in range(7)]
    embeddings = SharedEncoder(encoder).encode_documents(texts, normalize=True, as_tensor=True)
    results = evaluate_together(encoder, Sets([], [PAIRS]))
    evaluations = []

    def interrupted() -> dict:
        evaluations.append(evaluate_together(encoder, Sets([], [PAIRS])))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_together(encoder, Sets([], [PAIRS]))

    with Stop() as stop:
        evaluations.append(stop.unless_requested(interrupted))
    torch.save({"embeddings": embeddings, "results": results, "evaluations": evaluations}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_an_evaluation_and_leave_it_together(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt2")
    in_processes(one_of_two, (tmp_path, encoder), 2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = encoder.encode_documents([f"text {n} of this" for n in range(7)], normalize=True, as_tensor=True)
    torch.testing.assert_close(one["embeddings"], expected, rtol=0, atol=1e-6)
    assert torch.equal(one["embeddings"], other["embeddings"])
    assert one["results"] == other["results"]
    assert one["results"]["pairs"] == pytest.approx(evaluate(encoder, Sets([], [PAIRS]))["pairs"], abs=1e-5)
    # rank 1 alone was asked to end: neither has a second result, and neither waits for the other
    assert one["evaluations"] == other["evaluations"] == [one["results"], None]
