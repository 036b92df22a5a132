"""Which examples make up which step: a function of the seed and the number of steps taken, and of nothing else.

So the position of a run is one integer, and a resumed run draws exactly the batches that it would have drawn.
"""

from dataclasses import dataclass

import torch

from sgpt.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """`queries_per_process` rows on each of `processes` a micro-batch; the last partial batch of an epoch is dropped,

    because every process must hold the same number of queries and a repeated example would be a false negative.
    """

    num_examples: int
    queries_per_process: int
    processes: int
    seed: int

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            raise InputError(
                f"{self.num_examples} training examples do not fill one batch of {self.queries_per_process} queries on each of "
                f"{self.processes} processes; lower trainer.queries_per_process or give more data"
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.num_examples // (self.queries_per_process * self.processes)

    def rows(self, batch: int, rank: int) -> list[int]:
        """Example numbers of one process in micro-batch `batch`, counted over the whole run. An epoch sees a row at most once."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        order = torch.randperm(self.num_examples, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        start = (place * self.processes + rank) * self.queries_per_process
        return order[start : start + self.queries_per_process].tolist()
