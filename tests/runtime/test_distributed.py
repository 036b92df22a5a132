"""Two real gloo processes give the gradient of one process that holds the whole batch."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from sgpt.data.feed.collate import collate
from sgpt.data.feed.example import Example
from sgpt.decoder.attention import prepare
from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.distributed import average_gradients, gather, gather_with_gradient
from sgpt.text.markers import MarkersConfig
from sgpt.training.health import batch_statistics
from sgpt.training.loss import LossConfig
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import random_trunk
from tests.starts import in_processes

PROCESSES, QUERIES = 2, 4
HARD_NEGATIVES, SYMMETRIC, KEEP_BYTES = (0, 2), (False, True), (math.inf, 0)
CASES = list(itertools.product(HARD_NEGATIVES, SYMMETRIC, KEEP_BYTES))
IDS = [f"{h} hard negatives{', symmetric' * s}{', recomputed' * (not k)}" for h, s, k in CASES]


def examples(hard_negatives: int) -> list[Example]:
    """Eight; number 5, on the second process, repeats number 0's query, number 6 the positive of number 1."""
    queries = [
        "parse a date",
        "open a file",
        "sort words",
        "sum numbers",
        "join paths",
        "parse a date",
        "read lines",
        "make a folder",
    ]
    positives = [
        "from a string",
        "for reading",
        "by their length",
        "of a list",
        "of folders",
        "with a format",
        "for reading",
        "and its parents",
    ]
    return [
        Example(query, positive, tuple(f"{n} hard negative of {query} {number}" for n in range(hard_negatives)))
        for number, (query, positive) in enumerate(zip(queries, positives, strict=True))
    ]


def gradients(base: str, rank: int, processes: int, case: tuple[int, bool, float]) -> dict:
    """One step of this process' share of the batch.

    In float64: a wrong formula shows, the order of float32 sums does not.
    """
    hard_negatives, symmetric, keep_bytes = case
    tokenizer = load_tokenizer(base)
    trunk = tune(prepare(random_trunk("gpt_neo", len(tokenizer)).double()), TuningConfig("bitfit"))
    encoder = Encoder(trunk, tokenizer, Contract(markers=MarkersConfig(query_max_tokens=24, document_max_tokens=40)))
    share = PROCESSES * QUERIES // processes
    batch = collate(examples(hard_negatives)[rank * share : (rank + 1) * share], tokenizer, encoder.frames)
    config = LossConfig(symmetric=symmetric)
    result = contrastive_step(encoder, batch, config, keep_bytes=keep_bytes)
    parameters = trainable_parameters(trunk)
    average_gradients(parameters.values())
    return {
        "loss": gather(result.loss[None]).mean().item(),
        "health": batch_statistics(result),
        **{name: p.grad for name, p in parameters.items()},
    }


def one_of_two(rank: int, folder: Path, base: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    own = torch.arange(6, dtype=torch.float64).view(3, 2).add(10 * rank).requires_grad_()
    gathered = gather_with_gradient(own)
    # process r owes row i, column j: (2 i + j) (r + 1)
    (gathered * torch.arange(12).view(6, 2) * (rank + 1)).sum().backward()
    ours = {case: gradients(base, rank, PROCESSES, case) for case in CASES}
    torch.save({"gathered": gathered.detach(), "gradient": own.grad, "steps": ours}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tiny_base, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    in_processes(one_of_two, (folder, str(tiny_base("gpt_neo"))), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_two_processes_give_the_gradient_of_the_whole_batch(case, two_processes, tiny_base):
    expected = gradients(str(tiny_base("gpt_neo")), 0, 1, case)
    for process in two_processes:
        ours = process["steps"][case]
        assert ours.keys() == expected.keys()
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        for name in expected.keys() - {"loss", "health"}:
            size = float(expected[name].norm())
            assert size > 0, name
            assert float((ours[name] - expected[name]).norm()) < 1e-10 * size, name


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_both_processes_hold_the_same_gradients(case, two_processes):
    one, other = (process["steps"][case] for process in two_processes)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - {"loss", "health"})


def test_logged_cosines_are_those_of_the_whole_batch(two_processes, tiny_base):
    case = (2, False, math.inf)
    expected = gradients(str(tiny_base("gpt_neo")), 0, 1, case)["health"]
    assert two_processes[1]["steps"][case]["health"] == pytest.approx(expected, rel=1e-6)


def test_gather_is_rank_major_and_sums_what_every_process_owes_a_row(two_processes):
    own = torch.arange(6, dtype=torch.float64).view(3, 2)
    owed = 3 * torch.arange(12, dtype=torch.float64).view(6, 2)  # once from the first process, twice from the second
    for rank, process in enumerate(two_processes):
        assert torch.equal(process["gathered"], torch.cat([own, own + 10]))
        assert torch.equal(process["gradient"], owed[3 * rank : 3 * rank + 3])
