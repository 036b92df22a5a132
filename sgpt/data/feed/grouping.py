"""Batches of near queries, so that in-batch negatives are hard.

A walk through all queries goes from neighbour to neighbour and is cut into batches.

Topic-aware sampling (Hofstätter et al. 2021, TAS-B, arXiv 2104.06967) draws each batch from one cluster of k-means over
the queries' embeddings; contextual document embeddings (Morris & Rush 2024, arXiv 2410.02525) do so with clusters as
small as a batch. Here there are no clusters with borders: wherever a walk is cut, a run of it is near, so one walk
serves every batch size, every epoch cuts it elsewhere, and every example still comes exactly once an epoch.
"""

from dataclasses import dataclass

import numpy as np

from sgpt.data.feed.embeddings import Embeddings

LEAF = 256  # queries that are walked one by one; above, queries are halved, which takes n·log n and not n²
SAMPLE = 4096  # of the queries of a part, by which its halves are found
ROWS_AT_A_TIME = 16_384


@dataclass(frozen=True, eq=False)
class Walk:
    """Numbers of all examples [n], each next to its neighbours."""

    examples: np.ndarray


def walk(embeddings: Embeddings, queries: np.ndarray) -> np.ndarray:
    """Numbers of all examples [n], near ones next to each other. queries [n]: the number of each example's query text.

    Examples with the same query are no negatives of each other: the second of each comes when the walk has seen every
    query once, the third after that. Memory: ROWS_AT_A_TIME embeddings and a few numbers an example.
    """
    rows = embeddings.rows(queries)  # [n]: the row of each example's query
    step = np.empty(len(embeddings), dtype=np.int64)  # row -> when the walk comes to it
    step[_neighbours(embeddings)] = np.arange(len(embeddings))
    by_row = np.argsort(rows, kind="stable")
    sorted_rows = rows[by_row]
    earlier = np.empty(len(queries), dtype=np.int64)  # how many examples before have the same query
    earlier[by_row] = np.arange(len(queries)) - np.searchsorted(sorted_rows, sorted_rows)
    return np.lexsort((step[rows], earlier))  # the last key counts first


def order(walked: Walk, batch: int, seed: int, source: int, epoch: int) -> np.ndarray:
    """The numbers of all examples as this epoch draws them: runs of a batch, shuffled.

    The epoch before ended inside of a batch, which the first run here fills. The walk begins elsewhere each epoch, so
    that its cuts change and not the same examples meet for ever.
    """
    draw = np.random.default_rng((seed, source, epoch))
    size = len(walked.examples)
    turned = np.roll(walked.examples, int(draw.integers(size)))
    first = min(-(epoch * size) % batch, size)
    whole = (size - first) // batch
    runs = turned[first : first + whole * batch].reshape(whole, batch)
    return np.concatenate([turned[:first], draw.permutation(runs).ravel(), turned[first + whole * batch :]])


def nearness(embeddings: Embeddings, queries: np.ndarray, walked: np.ndarray, batch: int) -> tuple[float, float]:
    """Mean cosine of two different queries of a batch: of runs of the walk, and of random batches.

    From 64 batches at most.
    """
    draw = np.random.default_rng(0)
    starts = np.arange(0, max(1, len(walked) - batch + 1), batch)
    runs = [walked[start : start + batch] for start in draw.permutation(starts)[:64]]
    random = [draw.choice(len(walked), min(batch, len(walked)), replace=False) for _ in runs]
    means = []
    for batches in (runs, random):
        cosines = [_mean_cosine(embeddings.at(embeddings.rows(queries[examples]))) for examples in batches]
        means.append(float(np.mean(cosines)))
    return means[0], means[1]


def _mean_cosine(block: np.ndarray) -> float:
    """The mean over all pairs of different rows of `block` [n, D], of length 1.

    The square of the length of their sum holds every pair twice, and each row with itself, which is 1.
    """
    pairs = len(block) * (len(block) - 1)
    return (np.square(np.linalg.norm(block.sum(0))) - len(block)) / max(1, pairs)


def _neighbours(embeddings: Embeddings) -> np.ndarray:
    """Rows [n] in the order of the walk.

    Parts are halved until they are small; the half nearer to where the walk stands goes first.
    """
    draw = np.random.default_rng(0)  # there is one walk, whatever the run's seed
    waiting, walked, last = [np.arange(len(embeddings))], [], None
    while waiting:
        rows = waiting.pop()
        if len(rows) <= LEAF:
            block = embeddings.at(rows)
            steps = _one_by_one(block, last)
            walked.append(rows[steps])
            last = block[steps[-1]]
            continue
        halves = _halves(embeddings, rows, draw)
        if last is not None and last @ halves[0][1] > last @ halves[1][1]:
            halves.reverse()
        waiting += [part for part, _ in halves]  # the last one is next
    return np.concatenate(walked)


def _halves(
    embeddings: Embeddings, rows: np.ndarray, draw: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Two parts of `rows` with their centres, by 2-means of a sample.

    The smaller part has at least an eighth, so that the halving ends.
    """
    sample = embeddings.at(np.sort(draw.choice(rows, min(SAMPLE, len(rows)), replace=False)))
    one = sample[np.argmin(sample @ sample[0])]
    centres = np.stack([one, sample[np.argmin(sample @ one)]])
    for _ in range(8):
        second = sample @ (centres[1] - centres[0]) > 0  # of length 1: the nearer centre has the larger cosine
        if second.all() or not second.any():
            break
        centres = np.stack([sample[~second].mean(0), sample[second].mean(0)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True).clip(min=1e-12)
    towards = []  # above 0 for rows nearer to the second centre
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        towards.append(embeddings.at(rows[start : start + ROWS_AT_A_TIME]) @ (centres[1] - centres[0]))
    nearer = np.concatenate(towards)
    eighth = len(rows) // 8
    cut = int(np.clip((nearer <= 0).sum(), eighth, len(rows) - eighth))
    ordered = rows[np.argsort(nearer, kind="stable")]
    return [(np.sort(ordered[:cut]), centres[0]), (np.sort(ordered[cut:]), centres[1])]


def _one_by_one(block: np.ndarray, last: np.ndarray | None) -> np.ndarray:
    """Rows of `block` [n, D] in order: always the nearest that was not visited, first the one nearest to `last`."""
    cosines = block @ block.T
    steps = [0 if last is None else int(np.argmax(block @ last))]
    for _ in range(len(block) - 1):
        cosines[:, steps[-1]] = -np.inf
        steps.append(int(np.argmax(cosines[steps[-1]])))
    return np.array(steps)
