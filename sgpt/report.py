"""The page about a finished run: `report.html`, one file without scripts or outside resources, for light and dark screens.

It reads only what the run folder holds. Plots are SVG inside the page; their colours and letters are replaced by the page's
CSS variables, so that one drawing serves both colour schemes.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sgpt.errors import InputError

Scores = dict[str, dict[str, float | None]]  # set -> metric -> value; higher is better in all of them
Results = dict[str, dict[str, dict[str, float | None]]]  # set -> metric -> before, after, bm25 -> value
Values = list[float | None]
Points = list[tuple[float, float | None]]  # step, value

COLOURS = {  # CSS variable: light, dark. Plots are drawn in the light ones, so each must differ from the others.
    "paper": ("#fbfbfd", "#11151b"), "card": ("#ffffff", "#191f28"), "grid": ("#e4e8ee", "#2d3642"),
    "ink": ("#1b2430", "#e7ebf1"), "quiet": ("#5f6b7c", "#9ba7b7"), "grey": ("#9aa5b5", "#7c8899"),
    "blue": ("#2f63e0", "#79a9ff"), "amber": ("#d5820a", "#f2b650"), "teal": ("#0c8f84", "#38cfc0"),
    "rise": ("#137a3c", "#55d68a"), "fall": ("#b3261e", "#ff8a80"),
}  # fmt: skip
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
MODELS = {"before": "grey", "after": "blue", "bm25": "amber"}
KINDS = {"norm": "teal", "attention": "blue", "mlp": "amber"}
SIDES = {"positive": "teal", "negative": "amber"}
BARS = MODELS | KINDS | {"all": "blue"}
LABELS = {
    "bm25": "BM25", "mlp": "MLP", "ndcg@10": "nDCG@10", "map@100": "MAP@100", "recall@100": "Recall@100", "mrr@10": "MRR@10",
    "spearman_cosine": "Spearman", "pearson_cosine": "Pearson",
    "positive_cosine": "positive", "hardest_negative_cosine": "hardest negative",
}  # fmt: skip
CURVES = {  # title: keys of a log line
    "Loss (nats)": ("loss",),
    "Cosine with the query": ("positive_cosine", "hardest_negative_cosine"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
    "Queries per second": ("queries_per_second",),
}
REMEDY = {
    "config.yaml": "copy it from one of the run's checkpoints, or train again",
    "metrics.jsonl": "a killed run can leave half a line: delete it and write the report again",
    "results.json": "evaluate the run again",
    "analysis.json": "analyse the run again, or delete the file to leave its plots out",
    "manifest.json": "let the run finish, it writes the manifest at its end",
}
DRAWING: Any = {  # matplotlib settings
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "lines.linewidth": 1.6, "axes.formatter.limits": (-3, 5),
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": LIGHT["grid"],
    "axes.edgecolor": LIGHT["grey"], "xtick.color": LIGHT["grey"], "ytick.color": LIGHT["grey"], "text.color": LIGHT["quiet"],
    "axes.labelcolor": LIGHT["quiet"], "xtick.labelcolor": LIGHT["ink"], "ytick.labelcolor": LIGHT["ink"],
}  # fmt: skip


class Plot(NamedTuple):
    title: str
    draw: Callable[[Axes], None]
    keys: dict[str, str]  # legend: name -> colour
    note: str = ""
    inches: float = 2.7  # height


def write_report(run: Path) -> Path:
    """Writes run/report.html from config.yaml, metrics.jsonl, results.json, manifest.json and, if there, analysis.json.

    Returns the page's path. InputError names the file, and the line if there is one, that is missing or malformed.
    """
    paths = {name: run / name for name in REMEDY}
    config = _text(paths["config.yaml"])
    _parse(config, paths["config.yaml"], yaml.safe_load)  # shown as it was written, but not when it is broken
    log = _read_log(paths["metrics.jsonl"])
    results = _by_set(_read(paths["results.json"]), paths["results.json"])
    manifest = _read(paths["manifest.json"])
    analysis = _read(paths["analysis.json"]) if paths["analysis.json"].exists() else {}

    name = escape(run.resolve().name)
    body = [
        f"<header><p class='quiet'>SGPT training run</p><h1>{name}</h1><p class='lead'>{_headline(results)}</p></header>",
        _tiles(log, manifest, paths["manifest.json"]),
        _section("Results", _table(results), _plots(_score_plots(results))),
        _section("Training", _plots(_curve_plots(log))),
        _section("Cosine of query and document", _plots(_similarity_plots(analysis, paths["analysis.json"]))),
        _section("Size of the bias change", _plots(_change_plots(analysis, paths["analysis.json"]))),
        _section("How it was made", _fold("Configuration", f"<pre>{escape(config)}</pre>"), _fold("Manifest", _tree(manifest))),
    ]
    page = run / "report.html"
    page.write_text(PAGE.format(name=name, css=_css(), body="\n".join(body)), encoding="utf-8")
    return page


# Reading


def _refusal(path: Path, problem: str, line: int | None = None) -> InputError:
    place = f"{path}, line {line}" if line else f"{path}"
    return InputError(f"{place}: {problem}; {REMEDY[path.name]}.")


def _text(path: Path) -> str:
    if not path.exists():
        raise _refusal(path, "the file is missing")
    return path.read_text(encoding="utf-8")


def _parse(text: str, path: Path, parse: Callable[[str], Any] = json.loads, line: int | None = None) -> dict[str, Any]:
    """`line` is where the text stands in the file; without it the text is the whole file."""
    try:
        content = parse(text)
    except json.JSONDecodeError as error:
        raise _refusal(path, f"not JSON ({error.msg} at column {error.colno})", line or error.lineno) from error
    except yaml.MarkedYAMLError as error:
        raise _refusal(path, f"not YAML ({error.problem})", error.problem_mark and error.problem_mark.line + 1) from error
    if not isinstance(content, dict):
        raise _refusal(path, f"holds {type(content).__name__}, expected keys with values", line)
    return content


def _read(path: Path) -> dict[str, Any]:
    return _parse(_text(path), path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Log lines in step order. Of a step logged twice (a run that was killed and went on from a checkpoint) the last counts."""
    log: dict[float, dict[str, Any]] = {}
    for number, text in enumerate(_text(path).splitlines(), start=1):
        line = _parse(text, path, line=number)
        step = _number(line, "step", path=path, line=number)
        if step is None:
            raise _refusal(path, f"no 'step' in {text[:60]!r}", number)
        curves = {key: _number(line, key, path=path, line=number) for keys in CURVES.values() for key in keys}
        log[step] = {"step": step, **curves, "dev": _scores(line, "dev", path, number)}
    if not log:
        raise _refusal(path, "no log line")
    return [log[step] for step in sorted(log)]


def _number(data: Any, *keys: str, path: Path, line: int | None = None) -> float | None:
    """The number at data[key][key]…, None when it is absent or null."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    if data is not None and (isinstance(data, bool) or not isinstance(data, int | float)):
        raise _refusal(path, f"'{'.'.join(keys)}' is {data!r}, not a number", line)
    return data


def _scores(data: dict[str, Any], block: str, path: Path, line: int | None = None) -> Scores:
    scores = data.get(block) or {}
    if not isinstance(scores, dict) or not all(isinstance(metrics, dict) for metrics in scores.values()):
        raise _refusal(path, f"'{block}' is not a table of sets and metrics", line)
    return {name: {metric: _number(scores, name, metric, path=path, line=line) for metric in metrics} for name, metrics in scores.items() if metrics}


def _by_set(data: dict[str, Any], path: Path) -> Results:
    models = {model: _scores(data, model, path) for model in MODELS}
    results: Results = {}
    for scores in models.values():
        for name, metrics in scores.items():
            for metric in metrics:
                row = {model: models[model].get(name, {}).get(metric) for model in MODELS}
                results.setdefault(name, {})[metric] = row
    return results


# Results


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _main_metric(metrics: Iterable[str]) -> str:
    return next(metric for metric in ("ndcg@10", "spearman_cosine", *metrics) if metric in metrics)


def _headline(results: Results) -> str:
    if not results:
        return "This run was not evaluated."
    name, metrics = next(iter(results.items()))
    metric = _main_metric(metrics)
    before, after, bm25 = metrics[metric].values()
    what = f"{escape(_label(metric))} on {escape(name)}"
    if before is None or after is None:
        known = {"before training": before, "after training": after, "for BM25": bm25}
        parts = [f"<b>{value:.3f}</b> {when}" for when, value in known.items() if value is not None]
        return f"{what} is {' and '.join(parts) or 'not known'}."
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    end = "." if bm25 is None else f"; BM25 reaches {bm25:.3f}."
    return f"{what} {verb} from <b>{before:.3f}</b> to <b class='after'>{after:.3f}</b>{end}"


def _tiles(log: list[dict[str, Any]], manifest: dict[str, Any], path: Path) -> str:
    trained, total = (_number(manifest, "parameters", key, path=path) for key in ("trained", "total"))
    seconds = _number(manifest, "seconds", path=path)
    losses, speeds = ([line[key] for line in log if line[key] is not None] for key in ("loss", "queries_per_second"))
    tiles = {
        "optimizer steps": f"{log[-1]['step']:,}",
        "parameters trained": f"{trained:,} <small>of {total:,} ({trained / total:.2%})</small>" if trained and total else "",
        "loss, first and last line": f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "",
        "queries per second": f"{np.median(speeds):,.0f} <small>median</small>" if speeds else "",
        "duration": "" if seconds is None else f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min",
    }
    shown = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in tiles.items() if value)
    return f"<dl class='tiles'>{shown}</dl>"


def _table(results: Results) -> str:
    rows = []
    for name, metrics in results.items():
        head = f"<th rowspan='{len(metrics)}'>{escape(name)}</th>"
        for metric, values in metrics.items():
            best = max((value for value in values.values() if value is not None), default=None)
            cells = [f"<td>{escape(_label(metric))}</td>"]
            for value in values.values():
                cells.append("<td>–</td>" if value is None else f"<td{' class=best' if value == best else ''}>{value:.4f}</td>")
            cells += [_difference(values["after"], values[other]) for other in ("before", "bm25")]
            rows.append(f"<tr{' class=first' if head else ''}>{head}{''.join(cells)}</tr>")
            head = ""
    if not rows:
        return ""
    heads = "".join(f"<th>{head}</th>" for head in ("Set", "Metric", "Before", "After", "BM25", "After − before", "After − BM25"))
    return f"<div class='scroll card'><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _difference(value: float | None, reference: float | None) -> str:
    if value is None or reference is None:
        return "<td>–</td>"
    colour = "rise" if value > reference else "fall" if value < reference else "quiet"
    return f"<td class='{colour}'>{value - reference:+.4f}</td>".replace("-", "−")


def _score_plots(results: Results) -> list[Plot]:
    plots = []
    for name, metrics in results.items():
        models = [model for model in MODELS if any(values[model] is not None for values in metrics.values())]
        bars = {model: [values[model] for values in metrics.values()] for model in models}
        draw = partial(_draw_bars, rows=[_label(metric) for metric in metrics], bars=bars)
        plots.append(Plot(name, draw, {model: MODELS[model] for model in models}))
    return plots


def _draw_bars(axes: Axes, rows: list[str], bars: dict[str, Values], *, xlabel: str = "", lying: bool = False) -> None:
    """One group of bars per row, in it one bar per entry of `bars`; an absent value leaves its place empty."""
    width = 0.82 / max(len(bars), 3 - lying)  # two standing bars get the width of three: slim bars are easier to compare
    for position, (name, values) in enumerate(bars.items()):
        places = np.arange(len(rows)) + (position - (len(bars) - 1) / 2) * width
        draw = axes.barh if lying else axes.bar
        drawn = draw(places, np.array(values, dtype=float), 0.9 * width, color=LIGHT[BARS[name]])
        labels = ["" if value is None else f"{value:.3f}".removeprefix("0") for value in values]
        axes.bar_label(drawn, labels, padding=2, fontsize=7.5)
    if lying:
        axes.set_yticks(range(len(rows)), rows)
        axes.margins(y=0.02)
        axes.invert_yaxis()
    else:
        axes.set_xticks(range(len(rows)), rows)
    axes.grid(axis="y" if lying else "x", visible=False)
    axes.set_xlabel(xlabel)


# Training


def _curve_plots(log: list[dict[str, Any]]) -> list[Plot]:
    """The curves that have a point, then one plot per set that was evaluated during training."""
    curves: dict[str, dict[str, Points]] = {
        title: {key: [(line["step"], line[key]) for line in log if line[key] is not None] for key in keys} for title, keys in CURVES.items()
    }
    for line in log:
        for name, metrics in line["dev"].items():
            metric = _main_metric(metrics)
            curves.setdefault(f"{_label(metric)} on {name}", {metric: []})[metric].append((line["step"], metrics[metric]))
    plots = []
    for title, lines in curves.items():
        colours = dict(zip(lines, ("blue", "amber"), strict=False))
        if any(lines.values()):
            plots.append(Plot(title, partial(_draw_curves, lines=lines, colours=colours), colours if len(lines) > 1 else {}))
    return plots


def _draw_curves(axes: Axes, lines: dict[str, Points], colours: dict[str, str]) -> None:
    """Many points are drawn faint, with their moving mean over a twenty-fifth of the run."""
    for name, points in lines.items():
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        colour, window = LIGHT[colours[name]], len(points) // 25
        if window < 2 or name == "learning_rate":  # a schedule has no noise to smooth
            axes.plot(steps, values, color=colour, marker="o" if len(points) <= 25 else "", markersize=4)
        else:
            mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(steps[window // 2 :][: len(mean)], mean, color=colour)
    axes.set_xlabel("optimizer step")
    if "queries_per_second" in lines:
        axes.set_ylim(bottom=0)  # or small changes of speed look like large ones


# Analysis


def _similarity_plots(analysis: dict[str, Any], path: Path) -> list[Plot]:
    """Positives and negatives, before and after in the same bins, so that the eye can compare the two."""
    found = {}
    try:
        for model, sides in (analysis.get("similarity") or {}).items():
            arrays = {side: np.array(sides[side], dtype=float) for side in SIDES}
            arrays = {side: values[np.isfinite(values)] for side, values in arrays.items()}
            if all(map(len, arrays.values())):
                found[model] = arrays
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refusal(path, f"'similarity' does not hold lists of numbers 'positive' and 'negative' ({error!r})") from error
    if not found:
        return []
    everything = np.concatenate([values for sides in found.values() for values in sides.values()])
    bins = np.linspace(everything.min(), everything.max() + 1e-6, 49)
    plots = []
    for model, sides in found.items():
        positive, negative = sides["positive"], np.sort(sides["negative"])
        lower, upper = (np.searchsorted(negative, positive, side).mean() / len(negative) for side in ("left", "right"))
        note = (
            f"Means {positive.mean():.3f} and {negative.mean():.3f}. A random positive is closer than a random negative in {(lower + upper) / 2:.1%} of draws."
        )
        plots.append(Plot(f"{model.capitalize()} training", partial(_draw_histograms, sides=sides, bins=bins), SIDES, note))
    return plots


def _draw_histograms(axes: Axes, sides: dict[str, np.ndarray], bins: np.ndarray) -> None:
    for side, values in sides.items():
        share, colour = np.histogram(values, bins)[0] / len(values), LIGHT[SIDES[side]]
        axes.stairs(share, bins, fill=True, color=colour, alpha=0.4)
        axes.stairs(share, bins, color=colour)
    axes.set(xlabel="cosine", ylabel="share of pairs")


def _change_plots(analysis: dict[str, Any], path: Path) -> list[Plot]:
    """Relative L2 change, mean over the tensors of a row. A tensor that was zero before has none, and is counted below."""
    change = analysis.get("change") or {}
    if not isinstance(change, dict):
        raise _refusal(path, "'change' is not a table of tensor names and numbers")
    values = {name: _number(change, name, path=path) for name in change}
    finite = {name: value for name, value in values.items() if value is not None and np.isfinite(value)}
    rows = sorted({_row(name) for name in finite})
    layers = [row for row in rows if row[0] == 1]

    def mean(row: tuple[int, int, str], kinds: Iterable[str]) -> float | None:
        of_row = [value for name, value in finite.items() if _row(name) == row and _kind(name) in kinds]
        return float(np.mean(of_row)) if of_row else None

    whole = {"all": [mean(row, KINDS) for row in rows]}
    split = {kind: [mean(row, [kind]) for row in layers] for kind in KINDS}
    inches = max(2.7, 0.7 + 0.45 * len(layers))
    left_out = len(values) - len(finite)
    note = f"Left out, because they were zero before training: {left_out} of {len(values)} tensors." if left_out else ""
    draw = partial(_draw_bars, lying=True, xlabel="relative change, L2")
    plots = [Plot("Per layer", partial(draw, rows=[row[2] for row in rows], bars=whole), {}, note, inches)] if rows else []
    if layers:
        plots.append(Plot("Per layer and kind", partial(draw, rows=[row[2] for row in layers], bars=split), KINDS, "", inches))
    return plots


def _row(name: str) -> tuple[int, int, str]:
    layer = re.search(r"(?:^|\.)(?:h|layers|layer|blocks)\.(\d+)\.", name)
    if layer:
        return 1, int(layer[1]), f"layer {layer[1]}"
    if re.search(r"embed|wte|wpe", name):  # before the norm: BLOOM has word_embeddings_layernorm
        return 0, 0, "embeddings"
    return (2, 0, "final norm") if _kind(name) == "norm" else (2, 1, "other")


def _kind(name: str) -> str:
    if re.search(r"norm|(?:^|\.)ln_?\w?\.", name):  # before attention: Llama has post_attention_layernorm
        return "norm"
    return "attention" if "att" in name else "mlp"


def _plots(plots: list[Plot]) -> str:
    """A grid of two columns; of an odd number the first takes a whole row."""
    figures = []
    for position, plot in enumerate(plots):
        wide = position == 0 and len(plots) % 2 == 1
        keys = "".join(f"<span class='key' style='--c:var(--{colour})'>{escape(_label(key))}</span>" for key, colour in plot.keys.items())
        note = f"<p class='quiet'>{escape(plot.note)}</p>" if plot.note else ""
        figures.append(
            f"<figure class='card{' wide' if wide else ''}'><figcaption><b>{escape(plot.title)}</b>{keys}</figcaption>"
            f"<div class='scroll'>{_svg(plot, 10.6 if wide else 5.2)}</div>{note}</figure>"
        )
    return f"<div class='grid'>{''.join(figures)}</div>" if figures else ""


def _svg(plot: Plot, width: float) -> str:
    text = StringIO()
    with rc_context(DRAWING | {"svg.hashsalt": plot.title}):  # Figure without pyplot: no global figures, no backend chosen
        figure = Figure(figsize=(width, plot.inches), layout="constrained")
        plot.draw(figure.subplots())
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, body = re.split(r"(?<=>)\n", text.getvalue().split("<svg", 1)[1], maxsplit=1)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # figure_1, matplotlib.axis_1 …: alike in every drawing of the page
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # would hold for the whole page
    for name, light in LIGHT.items():
        body = body.replace(light, f"var(--{name})")
    box = re.search(r'viewBox="[\d. ]+"', head)
    assert box, "matplotlib gave no viewBox"
    return f'<svg {box[0]} role="img" aria-label="{escape(plot.title)}">{body.strip()}'


# The page


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def _fold(title: str, body: str) -> str:
    return f"<details class='card'><summary>{title}</summary>{body}</details>"


def _tree(value: Any) -> str:
    if isinstance(value, dict):
        return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{_tree(item)}</dd>" for key, item in value.items()) + "</dl>"
    if isinstance(value, list):
        return "".join(f"<div>{_tree(item)}</div>" for item in value)
    return escape(value if isinstance(value, str) else json.dumps(value))


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
<title>{name} · SGPT run</title>
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
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
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
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px} .scroll+.grid{margin-top:16px}
.wide{grid-column:1/-1} .wide svg{min-width:760px}
figure{margin:0;padding:14px 16px;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline;margin-bottom:8px} figcaption b{margin-right:auto}
.key{font-size:.82rem;color:var(--quiet);white-space:nowrap}
.key::before{content:"";display:inline-block;width:.7em;height:.7em;margin-right:.45em;border-radius:2px;background:var(--c)}
svg{display:block;width:100%;height:auto} svg *{stroke-linejoin:round} svg text{font-family:inherit!important}
details{padding:12px 18px;margin-bottom:12px} summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;margin:12px 0 4px;font:13px/1.5 ui-monospace,Consolas,monospace}
dl dl{margin:0} details dl{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:3px 18px;font-size:.88rem}
details dt{color:var(--quiet)} details dd{margin:0;overflow-wrap:anywhere}
@media print{figure,table{break-inside:avoid}}
"""
