"""One contrastive step: from a batch of token ids to gradients, at once or in chunks, by the same objective.

`chunked_step` is GradCache (Gao et al. 2021, arXiv 2101.06983): embed everything without a graph, take the loss' gradient
with respect to the embeddings, then embed chunk by chunk again and push that gradient through. The batch is then limited
by time and no longer by memory; the gradient is the same, dropout included, because each chunk's random state is replayed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgpt.data.collate import Batch
from sgpt.distributed import gather, gather_with_gradient, world
from sgpt.encoder import Encoder
from sgpt.loss import LossConfig, duplicates, info_nce, positive_rows, similarities

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class Outcome:
    """loss: scalar, detached, this process' mean. queries [Q, D], candidates [C, D], ignored [Q, C], detached: for the log."""

    loss: Tensor
    queries: Tensor
    candidates: Tensor
    positives: Tensor
    ignored: Tensor


def objective(queries: Tensor, documents: Tensor, batch: Batch, config: LossConfig) -> tuple[Tensor, Outcome]:
    """InfoNCE of this process' queries against the documents of all processes."""
    rank, r = world()[0], batch.documents_per_query
    candidates = gather_with_gradient(documents)  # [W·Q·R, D], rank-major
    all_queries, all_documents = gather(batch.query_hashes.to(queries.device)), gather(batch.document_hashes.to(queries.device))
    positives = positive_rows(len(queries), r, rank, queries.device)
    ignored = duplicates(batch.query_hashes.to(queries.device), all_queries, all_documents, r, rank)
    loss = info_nce(queries, candidates, config.scale, positives, ignored)
    if config.symmetric:  # each positive document finds its query among all queries
        own = positive_rows(len(queries), 1, rank, queries.device)
        ignored_queries = gather(ignored[:, ::r].to(torch.uint8)).bool().T[own]  # [Q, W·Q]
        other = info_nce(documents[::r], gather_with_gradient(queries), config.scale, own, ignored_queries)
        loss = (loss + other) / 2
    return loss, Outcome(loss.detach(), queries.detach(), candidates.detach(), positives, ignored)


def plain_step(encoder: Encoder, batch: Batch, config: LossConfig, backward: Backward) -> Outcome:
    queries = encoder(batch.queries)  # [Q, D]
    documents = encoder(batch.documents)  # [Q·R, D], query-major
    loss, outcome = objective(queries, documents, batch, config)
    backward(loss)
    return outcome


def chunked_step(encoder: Encoder, batch: Batch, config: LossConfig, backward: Backward, chunk_size: int) -> Outcome:
    """As `plain_step`; at most `chunk_size` texts have a graph at a time."""
    chunks = [rows[i : i + chunk_size] for rows in (batch.queries, batch.documents) for i in range(0, len(rows), chunk_size)]
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(encoder.device))
            parts.append(encoder(chunk))
    embeddings = torch.cat(parts).requires_grad_()
    loss, outcome = objective(embeddings[: len(batch.queries)], embeddings[len(batch.queries) :], batch, config)
    backward(loss)
    after = _random_state(encoder.device)
    for chunk, state, gradient in zip(chunks, states, embeddings.grad.split([len(chunk) for chunk in chunks]), strict=True):
        _restore_random_state(state, encoder.device)
        encoder(chunk).backward(gradient)
    _restore_random_state(after, encoder.device)
    return outcome


def health(outcome: Outcome) -> dict[str, float | None]:
    """Mean cosine of the positives and of each query's hardest negative, over all processes; None where nothing is a negative."""
    cosines = similarities(outcome.queries, outcome.candidates, 1.0, outcome.ignored)
    positive = gather(cosines.gather(1, outcome.positives[:, None]))
    hardest = gather(cosines.scatter(1, outcome.positives[:, None], float("-inf")).amax(1))
    hardest = hardest[hardest.isfinite()]
    return {"positive_cosine": positive.mean().item(), "hardest_negative_cosine": hardest.mean().item() if len(hardest) else None}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
