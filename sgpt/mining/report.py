"""What there is to see: the counts as a table, and a page with counts, scores and a few rows to read."""

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


def told(config: MineConfig, statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """What was counted, and how the written scores are spread, in words and numbers."""
    unset = {key for key, value in (("margin", config.score_margin), ("ratio", config.score_ratio)) if value is None}
    counts = {key: count for key, count in statistics["counts"].items() if key not in unset}
    counted = [(label.format(**asdict(config)), f"{counts[key]:,}") for key, label in COUNTS.items() if key in counts]
    return counted + [(f"{side} scores, {name}", f"{value:.3f}") for side, values in statistics["scores"].items() for name, value in values.items()]


def table(config: MineConfig, statistics: dict[str, Any]):
    """As a rich table."""
    from rich.table import Table
    from rich.text import Text

    made = Table("", "", title=f"{config.output}: hard negatives by {config.source}", show_header=False)
    made.columns[1].justify = "right"
    for line in told(config, statistics):
        made.add_row(*map(Text, line))
    return made


def page_of(config: MineConfig) -> Path:
    output = Path(config.output)
    return output.with_name(f"{output.name.removesuffix('.gz').removesuffix('.jsonl')}.report.html")


def write_page(config: MineConfig, statistics: dict[str, Any], scores: dict[str, list[float]], samples: Sequence[dict]) -> None:
    """scores: of the written texts, by side. samples: rows, shown with their first negatives."""
    name, sides = Path(config.output).name, {side: np.array(values) for side, values in scores.items() if values}
    plots = []
    if sides:
        draw = partial(draw_sides, sides=sides, bins=common_bins(sides.values()), xlabel="score", ylabel="share of texts")
        plots.append(Plot("Scores of what was written", draw, {side: SIDES[side] for side in sides}))
    cells = "".join(f"<tr><td>{escape(what)}</td><td>{value}</td></tr>" for what, value in told(config, statistics))
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
    shown = []
    for side, texts in (("positive", positives), ("negative", row["negative"][:SHOWN_NEGATIVES])):
        for text, score in zip(texts, row["scores"][side], strict=False):
            shown.append(f"<dt>{side} {'' if score is None else f'{score:.3f}'}</dt><dd>{escape(text[:300])}{' …' if len(text) > 300 else ''}</dd>")
    return fold(escape(row["query"]), f"<dl>{''.join(shown)}</dl>", opened=True)
