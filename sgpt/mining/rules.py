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
from sgpt.decoder.model_files import CONFIG, check_config, read_json
from sgpt.decoder.trunk import ModelConfig, check_vocabulary, describe_errors, load_tokenizer, open_model
from sgpt.encoder.sentence_transformers import is_sentence_transformers
from sgpt.mining.config import MineConfig
from sgpt.mining.rankers import Candidate, Ranked, Source
from sgpt.mining.task import Pool, Query, Task
from sgpt.runtime.errors import InputError

Rescore = Callable[[Sequence[tuple[str, str]]], list[float]]  # (query, document) -> score


def mine_block(queries: Sequence[Query], task: Task, source: Source, rescore: Rescore | None) -> tuple[list[dict], Counter]:
    """The training rows of these queries, and how often each rule left something out."""
    config, counts, rows = task.config, Counter(), []
    found = [Ranked(window(query, ranked.candidates, config, counts), ranked.positives) for query, ranked in zip(queries, source.rank(queries), strict=True)]
    if rescore:
        found = rescored(queries, found, rescore, task.pool)
    for query, ranked in zip(queries, found, strict=True):
        eligible = within_margins(ranked, config, counts)
        chosen = pick(query, eligible, config)
        counts["none"] += not chosen
        few = len(chosen) < config.negatives_per_query
        counts["few"] += few
        if few and config.on_few == "drop":
            continue
        counts.update(rows=1, negatives=len(chosen), spare=len(eligible) - len(chosen))
        rows.append(training_row(query, chosen, ranked.positives, task.pool))
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


def rescored(queries: Sequence[Query], found: Sequence[Ranked], rescore: Rescore, pool: Pool) -> list[Ranked]:
    """The windows by the cross-encoder's scores, best first, and its scores of the positives. All pairs in one call, for full batches."""
    rows = [[*query.positives, *(candidate.row for candidate in ranked.candidates)] for query, ranked in zip(queries, found, strict=True)]
    scores = iter(rescore([(query.text, pool.texts[row]) for query, of_query in zip(queries, rows, strict=True) for row in of_query]))
    again = []
    for query, ranked in zip(queries, found, strict=True):
        positives: list[float | None] = [next(scores) for _ in query.positives]
        candidates = [Candidate(row, next(scores)) for row, _ in ranked.candidates]
        again.append(Ranked(sorted(candidates, key=lambda candidate: -candidate.score), positives))  # equal ones stay in the source's order
    return again


def within_margins(ranked: Ranked, config: MineConfig, counts: Counter) -> list[Candidate]:
    margin, ratio, kept = config.score_margin, config.score_ratio, ranked.candidates
    if not kept or (margin is None and ratio is None):
        return kept
    known = [score for score in ranked.positives if score is not None]
    assert len(known) == len(ranked.positives), "a run file's positives are checked when it is read"
    weakest = min(known)
    ceilings = {
        "margin": math.inf if margin is None else weakest - margin,
        "ratio": math.inf if ratio is None else weakest * (ratio if weakest >= 0 else 2 - ratio),
    }
    for rule, ceiling in ceilings.items():
        left = [candidate for candidate in kept if candidate.score <= ceiling]
        counts[rule] += len(kept) - len(left)
        kept = left
    return kept


def pick(query: Query, eligible: Sequence[Candidate], config: MineConfig) -> list[Candidate]:
    """In ranked order. At random: by the query's own generator, so that neither blocks nor other queries matter."""
    if config.pick == "top" or len(eligible) <= config.negatives_per_query:
        return list(eligible[: config.negatives_per_query])
    drawn = random.Random(f"{config.seed} {query.name}").sample(range(len(eligible)), config.negatives_per_query)
    return [eligible[place] for place in sorted(drawn)]


def training_row(query: Query, chosen: Sequence[Candidate], positives: Sequence[float | None], pool: Pool) -> dict[str, Any]:
    """As training reads it. ids and scores are in the order of the texts; scores to six decimals."""
    texts = [pool.texts[row] for row in query.positives]
    return {
        "query": query.text,
        "positive": texts[0] if len(texts) == 1 else texts,
        "negative": [pool.texts[candidate.row] for candidate in chosen],
        "ids": {"query": query.name, "positive": list(query.positives.values()), "negative": [pool.names[candidate.row] for candidate in chosen]},
        "scores": {
            "positive": [None if score is None else round(score, 6) for score in positives],
            "negative": [round(candidate.score, 6) for candidate in chosen],
        },
    }


def cross_encoder(folder: str, device: torch.device, queries: Sequence[str] = ()) -> Rescore:
    """A decoder scores as SGPT-CE (prompt G), a classifier as sentence-transformers' CrossEncoder. InputError for queries that do not fit it."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"rescore={folder}: no folder with a config.json; give the local folder of a cross-encoder")
    check_config(path, folder)
    heads = [head for head in read_json(path / CONFIG).get("architectures") or [] if isinstance(head, str)]
    if any(head.endswith(("ForCausalLM", "LMHeadModel")) for head in heads):
        return _by_decoder(folder, device, queries)
    if not is_sentence_transformers(path) and not any("SequenceClassification" in head for head in heads):
        raise InputError(f"rescore={folder}: {', '.join(heads) or 'a model without a head'} is no cross-encoder; its scores would come from random weights")
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise InputError(f"rescore={folder}: sentence-transformers is not installed; pip install 'sgpt-framework[st]'") from None
    if not is_sentence_transformers(path):
        # is all of it there? sentence-transformers would fill what is missing at random
        check_vocabulary(load_tokenizer(folder), open_model(ModelConfig(folder), AutoModelForSequenceClassification))
    with describe_errors(f"rescore={folder}"):
        options = {"local_files_only": True, "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
        model = CrossEncoder(folder, device=str(device), **options)
    if model.num_labels != 1:
        raise InputError(f"rescore={folder}: gives {model.num_labels} scores for a pair, one is needed; give a cross-encoder for ranking")

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
    ranker = SgptCrossEncoder.from_pretrained(folder)
    ranker.texts(queries, [""] * len(queries))  # what does not fit is refused now, not when its block comes
    ranker.model.to(device)
    return lambda pairs: ranker.score([query for query, _ in pairs], [document for _, document in pairs], progress=False).tolist()
