"""Dev sets scored by all processes of a training run, each of which embeds its share of the texts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Results, Sets, evaluate
from sgpt.runtime.distributed import from_main, gather, on_all, world
from sgpt.runtime.interrupt import break_off
from sgpt.text.markers import Role

TEXTS_OF_A_PROCESS = 1024  # embedded before processes ask each other whether to stop: seconds on a CPU


def evaluate_together(encoder: Encoder, sets: Sets) -> Results:
    """As `evaluate`, called by all processes, which get the same results; embeddings differ in their last bits with the
    number of processes.
    """
    if world()[1] == 1:
        return evaluate(encoder, sets)
    results = evaluate(SharedEncoder(encoder), sets)
    return from_main(lambda: results)  # what is decided by them must not hang on a process' rounding


class SharedEncoder:
    """What `evaluate` asks of an encoder, computed by all processes, which call it with the same texts."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.embedding_size, self.device = encoder.embedding_size, encoder.device

    def encode_queries(self, texts: Sequence[str], **options) -> Tensor:
        return self._encode(texts, "query", **options)

    def encode_documents(self, texts: Sequence[str], **options) -> Tensor:
        return self._encode(texts, "document", **options)

    def _encode(self, texts: Sequence[str], role: Role, *, out: Tensor | None = None, **options) -> Tensor:
        """[texts, D] on the CPU, on every process."""
        rank, processes = world()
        embeddings = torch.empty(len(texts), self.embedding_size) if out is None else out
        size = TEXTS_OF_A_PROCESS * processes
        for start in range(0, len(texts), size):
            break_off()
            block = texts[start : start + size]
            own = on_all(lambda: self.encoder.encode(block[rank::processes], role, **options))  # noqa: B023
            share = torch.zeros(math.ceil(len(block) / processes), self.embedding_size)
            share[: len(own)] = own
            gathered = gather(share.to(self.encoder.device)).view(processes, -1, self.embedding_size)
            in_order = gathered.transpose(0, 1).flatten(0, 1)  # text i is row i // processes of process i % processes
            embeddings[start : start + size] = in_order[: len(block)].cpu()
        return embeddings
