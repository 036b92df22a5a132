"""The lexical stage: token embeddings alone, pooled as bags of tokens, trained on weak pairs."""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.pretraining.corpus import Corpus, pair_numbers
from sgpt.pretraining.model import PretrainConfig
from sgpt.training.loss import info_nce
from sgpt.training.negatives import scaled_cosines, unit

log = logging.getLogger(__name__)


def lexical_stage(config: PretrainConfig, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Token embeddings [V, D], of standard deviation 1, and the last norm's bias [D]; one process does it for all."""
    torch.manual_seed(config.seed)
    width = config.nano.hidden_size
    table = nn.Parameter(0.02 * torch.randn(config.nano.vocabulary, width))
    bias = nn.Parameter(torch.zeros(width))
    optimizer = torch.optim.AdamW([table, bias], lr=config.lexical_learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    positions = torch.arange(config.lexical_pairs_per_step)
    for step in range(config.lexical_steps):
        warmup, decay = min(1.0, (step + 1) / 10), 1 - 0.9 * step / config.lexical_steps
        for group in optimizer.param_groups:
            group["lr"] = config.lexical_learning_rate * warmup * decay
        numbers = pair_numbers(corpus.num_pairs, config.lexical_pairs_per_step, config, step)
        queries, documents = corpus.pairs(numbers, config)
        normed = F.layer_norm(table, (width,), bias=bias)  # of each token once, not of each occurrence
        loss = pair_loss(bag_of_tokens(normed, queries), bag_of_tokens(normed, documents), positions, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            log.info("lexical step %d/%d  contrastive %.3f", step, config.lexical_steps, loss.item())
    return (table / table.std()).detach(), bias.detach()  # the last norm does not see the scale, the blocks do


def bag_of_tokens(table: Tensor, rows: list[list[int]]) -> Tensor:
    """[rows, D]: position-weighted mean of the rows of `table`; what a trunk without blocks computes."""
    lengths = torch.tensor([len(row) for row in rows])
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths) + 1
    weights = positions / (lengths * (lengths + 1) / 2).repeat_interleave(lengths)
    tokens = torch.tensor([token for row in rows for token in row])
    return F.embedding_bag(tokens, table, starts, mode="sum", per_sample_weights=weights)


def pair_loss(queries: Tensor, documents: Tensor, positions: Tensor, config: PretrainConfig) -> Tensor:
    """InfoNCE of weak pairs in both directions, a scalar.

    queries and documents [pairs, D] of any length; positions [pairs], where in the step's batch each pair stands.
    """
    queries, documents = unit(queries), unit(documents)
    own = torch.arange(len(queries), device=queries.device)
    shared = overlapping(positions, config)

    def ignored(rows: slice, scores: Tensor, scale: float) -> Tensor:
        return shared[rows]  # in both directions: who overlaps whom is symmetric

    forwards = info_nce(queries, documents, config.scale, own, ignored)
    backwards = info_nce(documents, queries, config.scale, own, ignored)
    return (forwards + backwards) / 2


@torch.no_grad()
def share_ranked_first(queries: Tensor, documents: Tensor, positions: Tensor, config: PretrainConfig) -> Tensor:
    """Share of the queries whose own document has the highest cosine, a scalar. Arguments as `pair_loss`."""
    cosines = scaled_cosines(unit(queries), unit(documents), 1.0)
    cosines = cosines.masked_fill(overlapping(positions, config), float("-inf"))
    own = torch.arange(len(queries), device=queries.device)
    return (cosines.argmax(1) == own).float().mean()


def overlapping(positions: Tensor, config: PretrainConfig) -> Tensor:
    """[pairs, pairs] boolean: who is no negative of whom.

    Pairs up to two apart in one run of neighbours share a sentence or a paragraph, so neither is the other's negative.
    """
    run = positions // config.neighbours
    distance = (positions[:, None] - positions[None]).abs()
    return (run[:, None] == run[None]) & (distance > 0) & (distance <= 2)
