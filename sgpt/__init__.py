"""SGPT: embeddings from GPT-style decoders, trained by their biases alone (Muennighoff 2022, arXiv 2202.08904).

The folders, from the ground up; each imports from lower floors only, and never in a circle (docs/architecture.md):

    runtime/        files, locks, processes, progress, provenance, jobs that resume
    sweeps/         sweeps, each job a process of its own
    text/           strings to token ids
    report/         pages to look at
    decoder/        a frozen decoder over packs of texts
    data/           formats/, sources/, feed/, test_sets/: files to batches
    encoder/        texts to embeddings; contract, adapters, exports
    cross_encoder/  SGPT-CE: the query's log-probability
    retrieval/      search, indexes, metrics, re-ranking
    evaluation/     what a model is worth
    verification/   models by every loader, and running servers
    mining/         hard negatives
    serving/        a model over HTTP
    training/       negatives, loss, step, trainer, and what a run leaves
    preflight/      what a run will take, tried before it begins
    inspection/     training data, looked at
    pretraining/    how `nano` was made
    cli/            the command line, then train/*.py

Letters in every docstring: Q queries of this process, H hard negatives a query, R = 1 + H documents a query, T tokens,
D embedding size, W processes, C = W·Q·R candidates. Documents are query-major: query i's positive is row i·R,
and row (rank·Q + i)·R after the gather.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpt.encoder.encoder import Encoder


__all__ = ["Encoder"]


def __getattr__(name: str) -> object:
    """`from sgpt import Encoder`, without loading torch for those who only want a room of their own."""
    if name == "Encoder":
        from sgpt.encoder.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'sgpt' has no attribute {name!r}")
