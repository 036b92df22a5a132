"""The batch whose loss or gradient is no number any more: training stops, and `bad_batch.json` has its texts.

    {"step": …, "loss": "nan", "grad_norm": "nan", "queries": [
    {"process": 0, "batch": …, "query": {"text": …, "token_ids": […], "finite": true}, "documents": […]},
    …]}

The documents of a query are its positive and its hard negatives. finite: whether the text's embedding is, by the
weights that the step began with. Of several processes those are there that have a text whose embedding is not, or all
where none has one, because loss or gradient alone overflowed. Their losses do not tell: all see the candidates of all.
"""

import json
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sgpt.data.feed.collate import DrawnExample
from sgpt.data.feed.sampling import Feed
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.distributed import from_main, gather, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.training.run_folder import RunFolder
from sgpt.training.sharding import in_step

BAD_BATCH = "bad_batch.json"


def refuse_bad_batch(
    run: RunFolder, encoder: Encoder, feed: Feed, batches: Iterable[int], *,
    step: int, loss: Tensor, norm: Tensor, learning_rate: float,
) -> None:  # fmt: skip
    """Writes the file and raises an InputError, on all processes, which all call it before the optimizer's step.

    batches: numbers of the step's micro-batches. loss: scalar, this process' mean. norm: of the averaged gradient.
    learning_rate: at its peak.
    """
    own_rows = [row for number in batches for row in _rows(encoder, feed, number)]
    is_bad = not all(text["finite"] for row in own_rows for text in _texts(row))
    of_processes = _gathered(own_rows if is_bad else None)
    if not any(of_processes):
        of_processes = _gathered(own_rows)
    rows = [row for rows in of_processes for row in rows or ()]
    mean_loss = gather(loss.float()[None]).mean().item()
    head = {"step": step, "loss": str(mean_loss), "grad_norm": str(float(norm))}
    lines = ",\n".join(json.dumps(row) for row in rows)
    from_main(lambda: write_whole(run.folder / BAD_BATCH, f'{json.dumps(head)[:-1]}, "queries": [\n{lines}\n]}}\n'))

    texts = [text for row in rows for text in _texts(row)]
    bad = [text for text in texts if not text["finite"]]
    lower = f"lower optim.learning_rate={learning_rate:.2g}"
    if _is_half(encoder):
        lower += " or compute in float32 (model.dtype=float32, trainer.precision=fp32)"
    if bad and len(bad) < len(texts):
        processes = sorted({row["process"] for row in rows if any(not text["finite"] for text in _texts(row))})
        what = (
            f"{lower}, or take out what cannot be embedded: {len(bad)} of {len(texts)} texts on process "
            f"{', '.join(map(str, processes))}, {bad[0]['text']!r:.60} for one"
        )
    else:
        what = lower + (": no text can be embedded any more" if bad else ": every text can be embedded")
    raise InputError(
        f"step {step}: the loss is {mean_loss}, the gradient norm {float(norm)}; {what}. The batch is in "
        f"{run.folder / BAD_BATCH}. Nothing of this step is saved, and earlier checkpoints are untouched"
    )


def _rows(encoder: Encoder, feed: Feed, number: int) -> Iterator[dict]:
    """A row of the file for each query of this process in a batch."""
    rank = world()[0]
    draws, batch = feed.draws(number, rank), feed.batch(number, rank)
    was_training = encoder.training
    encoder.eval()
    token_ids = [*batch.queries, *batch.documents]
    packs = list(encoder.packs(token_ids))
    with torch.no_grad():
        embedded = [encoder.embed_pack(pack) for pack in in_step(encoder.trunk, packs)][: len(packs)]
        finite = encoder.restore_order(packs, embedded, len(token_ids)).isfinite().all(1).tolist()
    encoder.train(was_training)
    of_query, of_documents = finite[: len(draws)], finite[len(draws) :]
    for i, draw in enumerate(draws):
        documents = range(i * batch.documents_per_query, (i + 1) * batch.documents_per_query)
        yield {
            "process": rank,
            "batch": number,
            "query": _text(draw, draw.query, batch.queries[i], of_query[i]),
            "documents": [
                _text(draw, text, batch.documents[row], of_documents[row])
                for text, row in zip(draw.documents, documents, strict=True)
            ],
        }


def _text(draw: DrawnExample, text: int, token_ids: list[int], finite: bool) -> dict:
    return {"text": draw.examples.texts[text], "token_ids": list(map(int, token_ids)), "finite": finite}


def _texts(row: dict) -> list[dict]:
    return [row["query"], *row["documents"]]


def _gathered(rows: list[dict] | None) -> list[list[dict] | None]:
    """Of all processes."""
    if world()[1] == 1:
        return [rows]
    of_processes: list[list[dict] | None] = [None] * world()[1]
    dist.all_gather_object(of_processes, rows)
    return of_processes


def _is_half(encoder: Encoder) -> bool:
    is_autocast = torch.is_autocast_enabled(encoder.device.type)
    return is_autocast or any(parameter.dtype.itemsize < 4 for parameter in encoder.trunk.parameters())
