"""From a ranking to training rows: the window, the cross-encoder, the margins, the pick."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from sgpt.cross_encoder.cross_encoder import CrossEncoder as SgptCrossEncoder
from sgpt.decoder.base_folder import is_gguf, local_folder
from sgpt.decoder.model_files import CONFIG, check_config, read_json
from sgpt.decoder.trunk import ModelConfig, check_vocabulary, describe_errors, load_tokenizer, open_model
from sgpt.encoder.sentence_transformers import is_sentence_transformers, stated_kind
from sgpt.mining.config import MineConfig
from sgpt.mining.rankers import Candidate, Ranker, Ranking
from sgpt.mining.task import Pool, Query, Task
from sgpt.runtime.errors import InputError

Rescore = Callable[[Sequence[tuple[str, str]]], list[float]]  # (query, document) -> score


def mine_block(
    queries: Sequence[Query], task: Task, ranker: Ranker, rescore: Rescore | None
) -> tuple[list[dict], Counter]:  # fmt: skip
    """The training rows of these queries, and counts by the keys of `report.COUNTS`: rows, negatives, what each rule
    left out.
    """
    config, counts, rows = task.config, Counter(), []
    rankings = []
    for query, ranking in zip(queries, ranker.rank(queries), strict=True):
        rankings.append(Ranking(window(query, ranking.candidates, config, counts), ranking.positives))
    if rescore:
        rankings = rescored(queries, rankings, rescore, task.pool)
    for query, ranking in zip(queries, rankings, strict=True):
        eligible = within_margins(ranking, config, counts)
        negatives = pick(query, eligible, config)
        counts["none"] += not negatives
        few = len(negatives) < config.negatives_per_query
        counts["few"] += few
        if few and config.on_few == "drop":
            continue
        counts.update(rows=1, negatives=len(negatives), spare=len(eligible) - len(negatives))
        rows.append(training_row(query, negatives, ranking.positives, task.pool))
    return rows, counts


def window(query: Query, candidates: Sequence[Candidate], config: MineConfig, counts: Counter) -> list[Candidate]:
    """Ranks first_rank … last_rank of what is not barred."""
    kept: list[Candidate] = []
    for candidate in candidates:
        if len(kept) == config.last_rank:
            break
        if candidate.row in query.barred:
            counts["positives"] += 1
        else:
            kept.append(candidate)
    counts["before"] += min(len(kept), config.first_rank - 1)
    return kept[config.first_rank - 1 :]


def rescored(
    queries: Sequence[Query], rankings: Sequence[Ranking], rescore: Rescore, pool: Pool
) -> list[Ranking]:  # fmt: skip
    """The windows by the cross-encoder's scores, best first, and its scores of the positives."""
    pairs: list[tuple[str, str]] = []  # all of them in one call, for full batches
    for query, ranking in zip(queries, rankings, strict=True):
        rows = [*query.positives, *(candidate.row for candidate in ranking.candidates)]
        pairs += [(query.text, pool.texts[row]) for row in rows]
    scores = iter(rescore(pairs))
    new_rankings = []
    for query, ranking in zip(queries, rankings, strict=True):
        positives: list[float | None] = [next(scores) for _ in query.positives]
        candidates = [Candidate(row, next(scores)) for row, _ in ranking.candidates]
        best_first = sorted(candidates, key=lambda candidate: -candidate.score)  # equal ones stay in the ranker's order
        new_rankings.append(Ranking(best_first, positives))
    return new_rankings


def within_margins(ranking: Ranking, config: MineConfig, counts: Counter) -> list[Candidate]:
    """The candidates that score enough less than the weakest positive: others may be positives that nobody judged."""
    margin, ratio, kept = config.score_margin, config.score_ratio, ranking.candidates
    if not kept or (margin is None and ratio is None):
        return kept
    known = [score for score in ranking.positives if score is not None]
    assert len(known) == len(ranking.positives), "a ranker without scores of positives refuses margins before"
    weakest = min(known)
    ceilings = {
        "margin": math.inf if margin is None else weakest - margin,
        # Below zero a share of the score would be above it: as far below instead, -2 with 0.9 gives -2.2.
        "ratio": math.inf if ratio is None else weakest * (ratio if weakest >= 0 else 2 - ratio),
    }
    for rule, ceiling in ceilings.items():
        below = [candidate for candidate in kept if candidate.score <= ceiling]
        counts[rule] += len(kept) - len(below)
        kept = below
    return kept


def pick(query: Query, eligible: Sequence[Candidate], config: MineConfig) -> list[Candidate]:
    """At most negatives_per_query of them, in ranked order."""
    most = config.negatives_per_query
    if config.pick == "top" or len(eligible) <= most:
        return list(eligible[:most])
    generator = random.Random(f"{config.seed} {query.id}")  # of this query: neither blocks nor other queries matter
    ranks = generator.sample(range(len(eligible)), most)
    return [eligible[rank] for rank in sorted(ranks)]


def training_row(
    query: Query, negatives: Sequence[Candidate], positives: Sequence[float | None], pool: Pool
) -> dict[str, Any]:  # fmt: skip
    """A row as training reads it; ids and scores are in the order of the texts, scores to six decimals."""
    texts = [pool.texts[row] for row in query.positives]
    return {
        "query": query.text,
        "positive": texts[0] if len(texts) == 1 else texts,
        "negative": [pool.texts[candidate.row] for candidate in negatives],
        "ids": {
            "query": query.id,
            "positive": list(query.positives.values()),
            "negative": [pool.document_ids[candidate.row] for candidate in negatives],
        },
        "scores": {
            "positive": [None if score is None else round(score, 6) for score in positives],
            "negative": [round(candidate.score, 6) for candidate in negatives],
        },
    }


def load_rescorer(folder: str, device: torch.device, queries: Sequence[str] = ()) -> Rescore:
    """A decoder scores as SGPT-CE (prompt G), a classifier as the CrossEncoder of sentence-transformers.

    Raises InputError for a folder that is neither, and for queries that do not fit the model.
    """
    path = local_folder(folder) if is_gguf(folder) else Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"rescore={folder}: no folder with a config.json; give the local folder of a cross-encoder")
    check_config(path, folder)
    architectures = [name for name in read_json(path / CONFIG).get("architectures") or [] if isinstance(name, str)]
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return _by_decoder(folder, device, queries)
    saved_by_them = is_sentence_transformers(path)  # who give a saved bi-encoder a random head, without an error
    if saved_by_them:
        is_cross_encoder = stated_kind(path) == "CrossEncoder"
    else:
        is_cross_encoder = any("SequenceClassification" in name for name in architectures)
    if not is_cross_encoder:
        kind = ", ".join(architectures) or "a model without a head"
        raise InputError(
            f"rescore={folder}: {kind} is no cross-encoder; its scores would come from random weights; "
            "give the folder of a decoder or of a cross-encoder"
        )
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        remedy = "pip install 'sgpt-framework[st]'"
        raise InputError(f"rescore={folder}: sentence-transformers is not installed; {remedy}") from None
    if not saved_by_them:
        # Refuses a folder that lacks a weight, which sentence-transformers would fill at random.
        check_vocabulary(load_tokenizer(folder), open_model(ModelConfig(folder), AutoModelForSequenceClassification))
    with describe_errors(f"rescore={folder}"):
        options = {"local_files_only": True, "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
        model = CrossEncoder(folder, device=str(device), **options)
    if model.num_labels != 1:
        raise InputError(
            f"rescore={folder}: gives {model.num_labels} scores for a pair, one is needed; "
            "give a cross-encoder for ranking"
        )

    def rescore(pairs: Sequence[tuple[str, str]]) -> list[float]:
        scores = model.predict(list(pairs), show_progress_bar=False).tolist() if pairs else []
        bad = next((number for number, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            query, document = pairs[bad]
            raise InputError(
                f"rescore={folder}: gives {scores[bad]} for query {query!r:.60} and document {document!r:.60}; its "
                "weights are damaged"
            )
        return scores

    return rescore


def _by_decoder(folder: str, device: torch.device, queries: Sequence[str]) -> Rescore:
    scorer = SgptCrossEncoder.from_pretrained(folder)
    scorer.scored_texts(queries, [""] * len(queries))  # InputError for a query that is too long, before hours of mining
    scorer.model.to(device)

    def rescore(pairs: Sequence[tuple[str, str]]) -> list[float]:
        queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
        return scorer.score(queries, documents, progress=False).tolist()

    return rescore
