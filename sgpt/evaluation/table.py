"""The table of systems that an evaluation ends with."""

from collections.abc import Mapping
from typing import Any

from sgpt.data.test_sets.beir_sets import FORUMS, averages

SYSTEMS = {
    "bm25": "BM25", "model": "bi-encoder", "bm25_reranked": "BM25→CE", "model_reranked": "bi-encoder→CE",
    "reciprocal_rank": "fused by rank", "interpolated": "fused by score",
}  # fmt: skip
FIRST_STAGES = {"bm25_reranked": "bm25", "model_reranked": "model"}
GROUPS = ("metrics", "reranking", "cost")
Systems = dict[str, dict[str, dict[str, Any]]]  # system -> group -> name -> number


def with_cqadupstack(sets: Mapping[str, Systems]) -> dict[str, Systems]:
    """And `cqadupstack`, the mean of its forums, when all twelve are there. Of intervals there is no mean."""
    forums = [sets[name] for name in (f"cqadupstack/{forum}" for forum in FORUMS) if name in sets]
    if len(forums) < len(FORUMS):
        return dict(sets)
    shared = [system for system in forums[0] if all(system in forum for forum in forums)]
    mean = {system: {group: _mean([forum[system][group] for forum in forums]) for group in GROUPS} for system in shared}
    return {**sets, "cqadupstack": mean}


def beir_averages(sets: Mapping[str, Systems]) -> dict[str, Systems]:
    """BEIR's averages of nDCG@10 for each system, when all of their sets are there; in the form of a set's results."""
    by_kind: dict[str, Systems] = {}
    for system in SYSTEMS:
        results = {name: systems[system]["metrics"] for name, systems in sets.items() if system in systems}
        for kind, number in averages(results).items():
            by_kind.setdefault(kind, {})[system] = {"metrics": {"ndcg@10": number}}
    return by_kind


def systems_table(sets: Mapping[str, Systems], title: str):
    """A rich table: a row for each set and number, a column for each system.

    The forums of CQADupStack are left to the files.
    """
    from rich.table import Table

    columns = [system for system in SYSTEMS if any(system in systems for systems in sets.values())]
    rows = Table("set", "metric", *(SYSTEMS[system] for system in columns), title=title)
    for name in sets:
        if name.startswith("cqadupstack/") and "cqadupstack" in sets:
            continue
        numbers = {system: _numbers(groups) for system, groups in sets[name].items()}
        metrics = dict.fromkeys(metric for of_system in numbers.values() for metric in of_system)
        for metric in metrics:
            label = metric.replace("_per_", " per ").replace("@10_", "@10, ").replace("_top_", " of top ")
            rows.add_row(name, label, *(_shown(metric, numbers.get(system, {}).get(metric)) for system in columns))
        for label, other in (
            ("ndcg@10 − BM25's", dict.fromkeys(columns, "bm25")),
            ("ndcg@10 − first stage's", FIRST_STAGES),
        ):
            cells = [
                _interval(sets[name].get(system, {}).get("differences", {}).get(other.get(system)))
                for system in columns
            ]
            if set(cells) != {"–"}:
                rows.add_row(name, label, *cells)
        rows.add_section()
    return rows


def _numbers(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Those of all groups of one system, by metric, in the order of GROUPS."""
    numbers: dict[str, float] = {}
    for group in GROUPS:
        numbers |= groups.get(group, {})
    return numbers


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}


def _shown(metric: str, number: float | None) -> str:
    if number is None:
        return "–"
    if metric in ("queries_per_second", "bytes_per_document"):
        return f"{number:,.0f}" if number >= 10 else f"{number:.2f}"
    return f"{number:.2f}" if metric == "weight" else f"{100 * number:.2f}"


def _interval(difference: Mapping[str, float | None] | None) -> str:
    if difference is None:
        return "–"
    mean = f"{100 * difference['mean']:+.2f}"
    if difference["low"] is None:
        return mean
    return f"{mean} ({100 * difference['low']:+.2f} … {100 * difference['high']:+.2f})"
