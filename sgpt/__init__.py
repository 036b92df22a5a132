"""SGPT: embeddings from GPT-style decoders, trained by their biases alone (Muennighoff 2022, arXiv 2202.08904).

The rooms, in reading order; each imports only from earlier ones:

    markers, pooling, packing, loss,      pure: tensors and ids, no model, no process
    metrics, fusion, template, prompts,
    errors, files, memory, progress, page
    data/, attention, varlen, model,      parts
    continuation, tuning, distributed,
    optim, contract
    encoder, adapter, probes, step,       joined: texts to embeddings, batches to gradients, pairs to scores
    likelihood, cross_encoder
    checkpoint, run, evaluate, compare,   uses
    useb, index, search, mteb, export,
    report, parts, mine/, rerank,
    inspection, guide
    trainer, pretrain                     the loops
    config, launch, outcome, door         the door, then train/*.py

Letters in every docstring: Q queries of this process, H hard negatives a query, R = 1 + H documents a query, T tokens,
D embedding size, W processes, C = W·Q·R candidates. Documents are query-major everywhere: query i's positive is row i·R,
and row (rank·Q + i)·R after the gather.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpt.encoder import Encoder

__all__ = ["Encoder"]


def __getattr__(name: str) -> object:
    """`from sgpt import Encoder`, without loading torch for those who only want a room of their own."""
    if name == "Encoder":
        from sgpt.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'sgpt' has no attribute {name!r}")
