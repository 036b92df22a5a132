"""The inspection as an HTML page."""

from functools import partial
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sgpt.inspection.inspect import (
    PLURAL,
    QUERIES_ON_PAGE,
    InspectedBatch,
    Inspection,
    describe_run,
    describe_sources,
    table_lines,
    title_of,
    warnings,
)
from sgpt.inspection.sample import Lengths
from sgpt.report.page import LIGHT, Plot, figures, fold, page, section, tree
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.text.markers import Role

COLUMNS_ON_PAGE = 126  # of a line of a batch
ROLE_COLOURS: dict[Role, str] = {"query": "blue", "document": "teal"}
BATCHES_NOTE = """<p class='quiet'>Decoded from the token ids that the model gets, with their number. A query's
documents follow it: + its positive, − its hard negatives. Every other document of the batch is a negative of it too,
but for those that are named as none.</p>"""


def check_output(file: Path) -> Path:
    """`file`, if a page may be written there: never over a folder or into a run's."""
    if file.is_dir() or (file.parent / "config.yaml").is_file():
        raise InputError(
            f"output={file}: is a folder, or in the folder of a run, which stays as it is; give an HTML file elsewhere"
        )
    return file


def write_inspection(inspection: Inspection, file: Path, name: str, config: dict) -> None:
    """config: shown as it is. The folder is made."""
    warned = warnings(inspection)
    examples = sum(counts.examples for counts in inspection.counts)
    lead = f"{examples:,} examples, {inspection.feed.batches_per_epoch:,.1f} batches an epoch."
    body = [
        f"<header><p class='quiet'>SGPT training data</p><h1>{escape(name)}</h1><p class='lead'>{lead}</p></header>",
        section(
            "What looks wrong" if warned else "Nothing looks wrong",
            *(f"<p class='fall'>{escape(warning)}.</p>" for warning in warned),
        ),
        section(
            "The data",
            _table([source.name for source in inspection.feed.sources], describe_sources(inspection)),
            figures(_plots(inspection)),
        ),
        section(
            "What a run makes of it, on one process",
            _table([], {label: [value] for label, value in describe_run(inspection).items()}),
        ),
        section("The first batches", BATCHES_NOTE, *map(_batch, inspection.batches)) if inspection.batches else "",
        section("How it was made", fold("Configuration", tree(config))),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, page(f"{name} · SGPT training data", *body))


def _batch(seen: InspectedBatch) -> str:
    lines = list(table_lines(seen, QUERIES_ON_PAGE, COLUMNS_ON_PAGE))
    if seen.num_queries > QUERIES_ON_PAGE:
        lines.append(f"… and {seen.num_queries - QUERIES_ON_PAGE:,} more queries")
    return fold(escape(title_of(seen)), f"<pre>{escape(chr(10).join(lines))}</pre>", opened=seen.number == 0)


def _table(heads: list[str], rows: dict[str, list[str]]) -> str:
    head = "".join(f"<th style='text-align:right'>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for label, values in rows.items()
    )
    thead = f"<thead><tr><th></th>{head}</tr></thead>" if heads else ""
    return f"<div class='scroll card'><table>{thead}<tbody>{body}</tbody></table></div>"


def _plots(inspection: Inspection) -> list[Plot]:
    """Two of each source, side by side: an even number, or the first would be drawn wide."""
    plots = []
    for source, sampled in zip(inspection.feed.sources, inspection.samples, strict=True):
        for role, lengths in sampled.lengths.items():
            note = (
                f"Mean / median / 95 % / most: {lengths}. Over the limit of {lengths.limit}: {lengths.truncated:.1%}. "
                "The last bar holds all longer ones."
            )
            draw = partial(_draw_lengths, lengths=lengths, colour=ROLE_COLOURS[role])
            plots.append(
                Plot(
                    f"{source.name}: tokens of the {PLURAL[role]}",
                    draw,
                    {role: ROLE_COLOURS[role], "limit": "fall"},
                    note,
                )
            )
    return plots


def _draw_lengths(axes: Axes, lengths: Lengths, colour: str) -> None:
    """Up to the longest but for two in a hundred, and always past the limit; the last bar holds all longer ones."""
    end = int(max(np.percentile(lengths.tokens, 98), 1.2 * lengths.limit))
    width = end // 60 + 1  # whole tokens: else some bars hold more lengths than others, and the plot looks like a saw
    bins = np.arange(0, end + 2 * width, width)
    shares = np.histogram(lengths.tokens.clip(max=end), bins)[0] / len(lengths.tokens)
    axes.stairs(shares, bins, fill=True, color=LIGHT[colour], alpha=0.4)
    axes.stairs(shares, bins, color=LIGHT[colour])
    axes.axvline(lengths.limit, color=LIGHT["fall"])
    axes.set(xlabel="tokens, with markers", ylabel="share of texts")
