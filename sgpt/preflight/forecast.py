"""What the steps of a run will take: the packs of its first batches, times what a trial pack took."""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from sgpt.data.feed.collate import Batch
from sgpt.data.feed.sampling import Feed
from sgpt.decoder.packing import distinct
from sgpt.encoder.encoder import Encoder
from sgpt.preflight.trial import positions_of, try_pack
from sgpt.runtime.distributed import gather, on_all
from sgpt.training.config import TrainConfig
from sgpt.training.log import free_memory_bytes, peak_memory_bytes
from sgpt.training.loss import SCORES_AT_A_TIME
from sgpt.training.negatives import Negatives
from sgpt.training.tuning import trainable_parameters

BATCHES, TEXTS = 8, 20_000  # so many of the first batches are looked at, with so many texts at most
SCORE_COPIES = 4  # of a part of the scores, while the loss and its gradient are computed


@dataclass(frozen=True)
class FirstBatches:
    """Means over the first batches of a run and over processes, and the largest of this process's.

    tokens: of different texts. positions: tokens, with the padding of trunks that need it. negatives: of a query, over
    all processes, less those that are left out as equal texts or by the guide.
    """

    tokens: float
    positions: float
    negatives: float
    largest: Batch
    largest_positions: int

    @classmethod
    def of(
        cls, encoder: Encoder, feed: Feed, config: TrainConfig, accelerator: Accelerator, num_batches: int
    ) -> "FirstBatches":
        """num_batches: of the run. All processes call it."""
        texts = max(feed.queries_per_process * (2 + source.num_hard_negatives) for source in feed.sources)
        looked_at = max(1, min(BATCHES, num_batches, TEXTS // texts))
        tokens, negatives = 0, 0.0
        by_size: list[tuple[int, Batch]] = []
        for number in range(looked_at):
            batch = feed.batch(number, accelerator.process_index)
            rows, _ = distinct([*batch.queries, *batch.documents])
            tokens += sum(map(len, rows))
            negatives += _negatives_per_query(batch, config, accelerator.device)
            by_size.append((sum(positions_of(encoder, pack) for pack in encoder.packs(rows)), batch))
        most, largest = max(by_size, key=lambda sized: sized[0])
        positions = sum(size for size, _ in by_size)
        own = torch.tensor([[tokens, positions, negatives]], dtype=torch.float32, device=accelerator.device)
        of_all = gather(own / looked_at).mean(0).tolist()
        return cls(*of_all, largest, most)

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.positions


def _negatives_per_query(batch: Batch, config: TrainConfig, device: torch.device) -> float:
    """Mean, as the loss counts them but for its margin, which depends on what is learned."""
    negatives = Negatives.of(batch, device, guide_margin=config.loss.guide_margin)
    others = len(negatives.all_documents) - 1
    ignored = 0
    for start in range(0, len(batch.queries), rows := max(1, SCORES_AT_A_TIME // (others + 1))):
        ignored += int(negatives.ignored_documents(slice(start, start + rows), torch.empty(0), 1.0).sum())
    return others - ignored / len(batch.queries)


@dataclass(frozen=True)
class Forecast:
    """Of the process that takes most of each.

    peak_bytes: the most that it has in memory while it trains. added_bytes: what it does not have yet of that.
    free_bytes: of memory, now. kept_share: of the activations of a batch; the others are computed twice. step_seconds:
    of an optimizer step. forward_seconds: of a token, without gradient.
    """

    peak_bytes: float
    added_bytes: float
    free_bytes: float
    kept_share: float
    step_seconds: float
    forward_seconds: float


def forecast(
    encoder: Encoder, first: FirstBatches, config: TrainConfig, accelerator: Accelerator, num_batches: int
) -> Forecast:
    """All processes call it. InputError, on all, where a trial gives what is not finite."""
    trainer, device = config.trainer, encoder.device
    keep_bytes, free_bytes = trainer.keep_bytes(device), free_memory_bytes(device)  # before the trial takes some
    trial = on_all(lambda: try_pack(encoder, first.largest, accelerator, first.positions * num_batches))

    kept = float(first.largest_positions)
    if keep_bytes < trial.of(kept).saved_bytes:
        kept = keep_bytes // trial.saved_bytes * trial.positions  # whole packs
    kept_share = kept / first.largest_positions
    others = trial.of(max(0.0, kept - trial.positions)).kept_bytes  # besides the pack under way
    if kept_share < 1:  # a pack that is computed again does not fit into the holes that it left the first time
        others += trial.kept_bytes - trial.saved_bytes
    trained = sum(value.numel() * value.itemsize for value in trainable_parameters(encoder.trunk).values())
    # AdamW's two moments and the values before training; the reduction over processes, and on a GPU AdamW's update of
    # all tensors at once, take a copy each
    copies = 3 + (accelerator.num_processes > 1) + (device.type == "cuda")
    queries, r = len(first.largest.queries), first.largest.documents_per_query
    scores = min(queries * queries * r * accelerator.num_processes, SCORES_AT_A_TIME)
    added = trial.peak_bytes + others + copies * trained + SCORE_COPIES * 4 * scores

    forward_seconds, backward_seconds = (
        seconds / trial.positions for seconds in (trial.forward_seconds, trial.backward_seconds)
    )
    position_seconds = (2 - kept_share) * forward_seconds + backward_seconds
    own = Forecast(
        peak_bytes=max(peak_memory_bytes(device), trial.bytes_before + added),
        added_bytes=added,
        free_bytes=free_bytes,
        kept_share=kept_share,
        step_seconds=position_seconds * first.positions * trainer.gradient_accumulation,
        forward_seconds=forward_seconds,
    )
    return _of_all(own, accelerator.device)


def _of_all(own: Forecast, device: torch.device) -> Forecast:
    """The most of any process, and the least of what is better the more it is."""
    values = torch.tensor([[*vars(own).values()]], dtype=torch.float32, device=device)
    of_all = gather(values)
    most, least = (dict(zip(vars(own), row.tolist(), strict=True)) for row in (of_all.amax(0), of_all.amin(0)))
    return replace(own, **most | {name: least[name] for name in ("free_bytes", "kept_share")})
