"""How training fares beyond its loss: the numbers of a log line, and an alarm when all embeddings become one.

Alignment and uniformity: Wang & Isola 2020, arXiv 2005.10242. All of it is computed on steps that are logged, from
embeddings and gradients that are there anyway.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sgpt.decoder.families import block_of
from sgpt.runtime.distributed import gather
from sgpt.training.loss import StepResult, row_chunks, score
from sgpt.training.negatives import scaled_cosines

TEXTS_COMPARED = 256  # documents of a batch whose cosines with each other are computed, all if there are fewer
COLLAPSED = -0.02  # uniformity above which different texts have one embedding: a mean cosine over 0.995
FIRST_STEPS = 0.1  # share of the steps without an alarm: the embeddings of many a base begin alike
FEWEST_STEPS = 20  # as many at least


def batch_statistics(*results: StepResult) -> dict[str, float | None]:
    """What the loss alone does not show, over all queries of these micro-batches on all processes, which all call it.

    positive_cosine, hardest_negative_cosine: means over the queries; the second is None where nothing is a negative.
    alignment: mean squared distance of query and positive, 2 - 2·cosine. uniformity: see there.
    negatives_per_query: mean number of negatives. effective_negatives: how many of them the softmax sees, the mean of
    exp(entropy) of the softmax over a query's negatives alone: as many as there are where all are equally near, 1 where
    one outweighs the others. masked_share: of the candidates, left out as duplicates or false negatives.
    """
    positive_cosines, hardest_cosines, num_negatives, effective, masked_shares = [], [], [], [], []
    for result in results:
        negatives = result.negatives
        num_others = len(result.candidates) - 1
        for rows in row_chunks(len(result.queries), len(result.candidates)):
            own = negatives.positives[rows, None]
            cosines, is_ignored = score(result.queries, result.candidates, 1.0, rows, negatives.ignored_documents)
            num_ignored = is_ignored.sum(1).float()
            positive_cosines.append(cosines.gather(1, own))
            of_negatives = cosines.scatter_(1, own, float("-inf"))  # -inf where ignored, too
            hardest_cosines.append(of_negatives.amax(1))
            num_negatives.append(num_others - num_ignored)
            entropy = torch.special.entr((result.scale * of_negatives).softmax(1)).sum(1)
            effective.append(entropy.exp().where(num_ignored < num_others, 0.0))
            masked_shares.append(num_ignored / max(1, num_others))
    hardest = gather(torch.cat(hardest_cosines))
    hardest = hardest[hardest.isfinite()]
    positive_cosine = gather(torch.cat(positive_cosines)).mean().item()
    return {
        "positive_cosine": positive_cosine,
        "hardest_negative_cosine": hardest.mean().item() if len(hardest) else None,
        "alignment": 2 - 2 * positive_cosine,
        "uniformity": uniformity(results),
        "negatives_per_query": gather(torch.cat(num_negatives)).mean().item(),
        "effective_negatives": gather(torch.cat(effective)).mean().item(),
        "masked_share": gather(torch.cat(masked_shares)).mean().item(),
    }


def uniformity(results: Iterable[StepResult]) -> float | None:
    """log of the mean of exp(-2 · squared distance) over pairs of different documents: 0 where all are one, towards -4
    where they are spread over the sphere.

    Of the positives of all queries and processes, TEXTS_COMPARED a micro-batch. None where all texts are equal. Every
    process has the candidates of all, so nothing is gathered.
    """
    closeness = []
    for result in results:
        positives = slice(None, None, result.negatives.documents_per_query)
        documents, hashes = result.candidates[positives], result.negatives.all_documents[positives]
        some = slice(None, None, -(-len(documents) // TEXTS_COMPARED))
        documents, hashes = documents[some], hashes[some]
        squared_distances = 2 - 2 * scaled_cosines(documents, documents, 1.0)
        is_different = hashes[:, None] != hashes[None]
        closeness.append((-2 * squared_distances[is_different]).exp())
    pairs = torch.cat(closeness)
    return pairs.mean().log().item() if len(pairs) else None


def gradient_norms(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each group of layers that learns: embeddings, four quarters of the blocks, last norm.

    Scalars on the device of the gradients; their squares sum to that of the whole gradient.
    """
    blocks = 1 + max((block for name in parameters if (block := block_of(name)) is not None), default=-1)
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            groups.setdefault(_group_of(name, blocks), []).append(parameter.grad)
    return {group: nn.utils.get_total_norm(gradients) for group, gradients in groups.items()}


def _group_of(name: str, blocks: int) -> str:
    """As in "blocks 0-5", of the block numbers from 0 on."""
    block = block_of(name)
    if block is None:
        return "embeddings" if any(part in name for part in ("emb", "wte", "wpe")) else "last norm"
    quarter = [other for other in range(blocks) if 4 * other // blocks == 4 * block // blocks]
    return f"blocks {quarter[0]}-{quarter[-1]}" if len(quarter) > 1 else f"block {block}"


def collapse_alarm(uniformity: float | None, step: int, steps: int) -> str | None:
    """One sentence where the embeddings of different texts are all nearly the same and training had time to change it.

    steps: of the whole run.
    """
    if uniformity is None or uniformity < COLLAPSED or step < max(FIRST_STEPS * steps, FEWEST_STEPS):
        return None
    mean_cosine = 1 + uniformity / 4  # to first order
    return (
        f"step {step}: different documents have nearly the same embedding (uniformity {uniformity:.3f}, a mean cosine "
        f"of {mean_cosine:.3f}), so the model has collapsed or learns nothing: lower optim.learning_rate if the loss "
        "has risen, else raise it, and look at a few rows of the training data"
    )
