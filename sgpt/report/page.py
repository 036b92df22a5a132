"""Pages to look at: one file each without scripts or outside resources, for light and dark screens.

Whoever hands in HTML has escaped it.

Plots are SVG inside the page; their colours and letters are replaced by the page's CSS variables, so that one drawing
serves both colour schemes.
"""

import json
import re
from collections.abc import Callable, Iterable
from html import escape
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {  # CSS variable: light, dark. Plots are drawn in the light ones, so each must differ from the others.
    "paper": ("#fbfbfd", "#11151b"), "card": ("#ffffff", "#191f28"), "grid": ("#e4e8ee", "#2d3642"),
    "ink": ("#1b2430", "#e7ebf1"), "quiet": ("#5f6b7c", "#9ba7b7"), "grey": ("#9aa5b5", "#7c8899"),
    "blue": ("#2f63e0", "#79a9ff"), "amber": ("#d5820a", "#f2b650"), "teal": ("#0c8f84", "#38cfc0"),
    "rise": ("#137a3c", "#55d68a"), "fall": ("#b3261e", "#ff8a80"),
}  # fmt: skip
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
SIDES = {"positive": "teal", "negative": "amber"}
DRAWING: Any = {  # matplotlib settings
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "lines.linewidth": 1.6,
    "axes.formatter.limits": (-3, 5), "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LIGHT["grid"],
    "axes.edgecolor": LIGHT["grey"], "xtick.color": LIGHT["grey"], "ytick.color": LIGHT["grey"],
    "axes.labelcolor": LIGHT["quiet"], "xtick.labelcolor": LIGHT["ink"], "ytick.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["quiet"],
}  # fmt: skip


class Plot(NamedTuple):
    title: str
    draw: Callable[[Axes], None]
    keys: dict[str, str]  # legend: label -> colour
    note: str = ""
    inches: float = 2.7  # height


def page(title: str, *body: str) -> str:
    """The whole file. title: plain text, for the browser's tab."""
    return PAGE.format(name=escape(title), css=_css(), body="\n".join(body))


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def fold(title: str, body: str, *, opened: bool = False) -> str:
    return f"<details class='card'{' open' if opened else ''}><summary>{title}</summary>{body}</details>"


def tree(value: Any) -> str:
    if isinstance(value, dict):
        return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{tree(item)}</dd>" for key, item in value.items()) + "</dl>"
    if isinstance(value, list):
        return "".join(f"<div>{tree(item)}</div>" for item in value)
    return escape(value if isinstance(value, str) else json.dumps(value))


def figures(plots: list[Plot]) -> str:
    """A grid of two columns; of an odd number the first takes a whole row."""
    drawn = []
    for position, plot in enumerate(plots):
        wide = position == 0 and len(plots) % 2 == 1
        keys = "".join(
            f"<span class='key' style='--c:var(--{colour})'>{escape(key)}</span>" for key, colour in plot.keys.items()
        )
        note = f"<p class='quiet'>{escape(plot.note)}</p>" if plot.note else ""
        drawn.append(
            f"<figure class='card{' wide' if wide else ''}'><figcaption><b>{escape(plot.title)}</b>{keys}</figcaption>"
            f"<div class='scroll'>{_svg(plot, 10.6 if wide else 5.2)}</div>{note}</figure>"
        )
    return f"<div class='grid'>{''.join(drawn)}</div>" if drawn else ""


def _svg(plot: Plot, width: float) -> str:
    text = StringIO()
    # Figure without pyplot: no global figures, no backend chosen
    with rc_context(DRAWING | {"svg.hashsalt": plot.title}):
        figure = Figure(figsize=(width, plot.inches), layout="constrained")
        plot.draw(figure.subplots())
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    head, body = re.split(r"(?<=>)\n", text.getvalue().split("<svg", 1)[1], maxsplit=1)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # figure_1, matplotlib.axis_1 …: alike in every drawing of the page
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # would hold for the whole page
    for name, light in LIGHT.items():
        body = body.replace(light, f"var(--{name})")
    box = re.search(r'viewBox="[\d. ]+"', head)
    assert box, "matplotlib gave no viewBox"
    return f'<svg {box[0]} role="img" aria-label="{escape(plot.title)}">{body.strip()}'


def common_bins(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """For histograms that the eye compares."""
    values = np.concatenate(list(arrays))
    return np.linspace(values.min(), values.max() + 1e-6, 49)


def draw_sides(axes: Axes, sides: dict[str, np.ndarray], bins: np.ndarray, *, xlabel: str, ylabel: str) -> None:
    """Histograms of what belongs to positives and to negatives, over each other."""
    for side, values in sides.items():
        share, colour = np.histogram(values, bins)[0] / len(values), LIGHT[SIDES[side]]
        axes.stairs(share, bins, fill=True, color=colour, alpha=0.4)
        axes.stairs(share, bins, color=colour)
    axes.set(xlabel=xlabel, ylabel=ylabel)


def _css() -> str:
    light, dark = (";".join(f"--{name}:{pair[scheme]}" for name, pair in COLOURS.items()) for scheme in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}{STYLE}"


# The policy keeps the promise of the first line even if a text from a file ever slipped through unescaped.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """
*{box-sizing:border-box} p{margin:0}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:48px 20px 80px}
h1{font-size:2.3rem;line-height:1.15;margin:.1em 0 .35em;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:48px 0 14px;letter-spacing:-.01em}
.quiet{color:var(--quiet);font-size:.88rem} .lead{font-size:1.3rem;line-height:1.45}
.after{color:var(--blue)} .rise{color:var(--rise)} .fall{color:var(--fall)} .best{font-weight:700}
.card{background:var(--card);border:1px solid var(--grid);border-radius:12px} .scroll{overflow-x:auto}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:30px 0 0;background:var(--grid);border:1px solid var(--grid);
  border-radius:12px;overflow:hidden}
.tiles div{flex:1 1 170px;background:var(--card);padding:14px 18px}
.tiles dt{color:var(--quiet);font-size:.82rem}
.tiles dd{margin:2px 0 0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.78rem;font-weight:400;color:var(--quiet)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:8px 18px;text-align:right} thead th{color:var(--quiet);font-size:.82rem;font-weight:500}
th:first-child,thead th:nth-child(2),tr.first td:nth-child(2),tr:not(.first) td:first-child{text-align:left}
tbody th{vertical-align:top;font-weight:600} tr.first>*{border-top:1px solid var(--grid)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px}
.scroll+.grid{margin-top:16px}
.wide{grid-column:1/-1} .wide svg{min-width:760px}
figure{margin:0;padding:14px 16px;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline;margin-bottom:8px}
figcaption b{margin-right:auto}
.key{font-size:.82rem;color:var(--quiet);white-space:nowrap}
.key::before{content:"";display:inline-block;width:.7em;height:.7em;margin-right:.45em;border-radius:2px;
  background:var(--c)}
svg{display:block;width:100%;height:auto} svg *{stroke-linejoin:round} svg text{font-family:inherit!important}
details{padding:12px 18px;margin-bottom:12px} summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;margin:12px 0 4px;font:13px/1.5 ui-monospace,Consolas,monospace}
dl dl{margin:0}
details dl{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:3px 18px;font-size:.88rem}
details dt{color:var(--quiet)} details dd{margin:0;overflow-wrap:anywhere}
@media print{figure,table{break-inside:avoid}}
"""
