"""What mining shows: the counts as a table, and a page with counts, scores and a few rows to read."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sgpt.mining.config import MineConfig
from sgpt.report.page import SIDES, Plot, common_bins, draw_sides, figures, fold, page, section, tree
from sgpt.runtime.files import write_whole

SHOWN_NEGATIVES = 3  # of each row on the page
COUNTS = {  # as shown, in this order
    "queries": "judged queries",
    "unusable": "  left out: no text, or no positive",
    "rows": "rows written",
    "few": "queries with fewer than {negatives_per_query} (on_few={on_few})",
    "none": "queries without any negative",
    "negatives": "negatives written",
    "spare": "candidates left over",
    "positives": "  left out: a positive, or the query",
    "before": "  left out: before first_rank={first_rank}",
    "margin": "  left out: score_margin={score_margin}",
    "ratio": "  left out: score_ratio={score_ratio}",
    "documents": "documents",
    "blank": "  left out: blank",
    "copies": "  left out: text of an earlier one",
}


def describe_statistics(config: MineConfig, statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """What was counted, and how the written scores are spread: words and numbers."""
    unset = {key for key, value in (("margin", config.score_margin), ("ratio", config.score_ratio)) if value is None}
    lines = []
    for key, label in COUNTS.items():
        if key in statistics["counts"] and key not in unset:
            lines.append((label.format(**asdict(config)), f"{statistics['counts'][key]:,}"))
    for side, values in statistics["scores"].items():
        for name, value in values.items():
            lines.append((f"{side} scores, {name}", f"{value:.3f}"))
    return lines


def table(config: MineConfig, statistics: dict[str, Any]):
    """The statistics as a rich table."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("", "", title=f"{config.output}: hard negatives by {config.source}", show_header=False)
    shown.columns[1].justify = "right"
    for line in describe_statistics(config, statistics):
        shown.add_row(*map(Text, line))
    return shown


def page_of(config: MineConfig) -> Path:
    """The file of the page, next to the output."""
    output = Path(config.output)
    name = output.name.removesuffix(".gz").removesuffix(".jsonl")
    return output.with_name(f"{name}.report.html")


def write_page(
    config: MineConfig, statistics: dict[str, Any], scores: dict[str, list[float]], samples: Sequence[dict]
) -> None:  # fmt: skip
    """Writes the page. scores: of the written texts, by side. samples: rows, shown with their first negatives."""
    name = Path(config.output).name
    sides = {side: np.array(values) for side, values in scores.items() if values}
    plots = []
    if sides:
        bins = common_bins(sides.values())
        draw = partial(draw_sides, sides=sides, bins=bins, xlabel="score", ylabel="share of texts")
        plots.append(Plot("Scores of what was written", draw, {side: SIDES[side] for side in sides}))
    cells = ""
    for what, value in describe_statistics(config, statistics):
        cells += f"<tr><td>{escape(what)}</td><td>{value}</td></tr>"
    body = [
        f"<header><p class='quiet'>SGPT hard negatives, by {escape(config.source)}</p><h1>{escape(name)}</h1></header>",
        section("Counts", f"<div class='scroll card'><table><tbody>{cells}</tbody></table></div>"),
        section("Scores", figures(plots)),
        section(f"{len(samples)} of the rows", *map(_sample, samples)),
        section("How it was made", fold("Configuration", tree(asdict(config)))),
    ]
    write_whole(page_of(config), page(f"{name} · SGPT hard negatives", *body))


def _sample(row: dict) -> str:
    positives = [row["positive"]] if isinstance(row["positive"], str) else row["positive"]
    items = ""
    for side, texts in (("positive", positives), ("negative", row["negative"][:SHOWN_NEGATIVES])):
        for text, score in zip(texts, row["scores"][side], strict=False):
            number = "" if score is None else f"{score:.3f}"
            ending = " …" if len(text) > 300 else ""
            items += f"<dt>{side} {number}</dt><dd>{escape(text[:300])}{ending}</dd>"
    return fold(escape(row["query"]), f"<dl>{items}</dl>", opened=True)
