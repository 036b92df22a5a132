"""The page about a finished run, `report.html`. It reads only what the run folder holds."""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes

from sgpt.report.page import LIGHT, SIDES, Plot, common_bins, draw_sides, figures, fold, page, section, tree
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole

Scores = dict[str, dict[str, float | None]]  # set -> metric -> value; higher is better in all of them
SetResults = dict[str, dict[str, dict[str, float | None]]]  # set -> metric -> before, after, bm25 -> value
Values = list[float | None]
Points = list[tuple[float, float | None]]  # step, value
MODELS = {"before": "grey", "after": "blue", "bm25": "amber"}
KINDS = {"norm": "teal", "attention": "blue", "mlp": "amber"}
BARS = MODELS | KINDS | {"all": "blue"}
METRIC_LABELS = {
    "bm25": "BM25", "mlp": "MLP",
    "ndcg@10": "nDCG@10", "map@100": "MAP@100", "recall@100": "Recall@100", "mrr@10": "MRR@10",
    "spearman_cosine": "Spearman", "pearson_cosine": "Pearson",
    "positive_cosine": "positive", "hardest_negative_cosine": "hardest negative",
    "negatives_per_query": "in the batch", "effective_negatives": "effective",
}  # fmt: skip
CURVES = {  # title: keys of a log line
    "Loss": ("loss",),
    "Cosine with the query": ("positive_cosine", "hardest_negative_cosine"),
    "Alignment and uniformity": ("alignment", "uniformity"),
    "Negatives of a query": ("negatives_per_query", "effective_negatives"),
    "Share of candidates left out": ("masked_share",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
    "Queries per second": ("queries_per_second",),
}
LINE_COLOURS = ("blue", "amber", "teal", "grey", "rise", "fall")  # colours of the lines of a plot, in their order
REMEDY = {
    "config.yaml": "put back the file that training wrote, or train again with name=<another name>",
    "metrics.jsonl": (
        "delete the line and write the report again, or, of a run that has not finished, "
        "start it again with resume=true"
    ),
    "results.json": (
        "of a run that has not finished, delete the file and start it again with resume=true: "
        "it evaluates again, before and after"
    ),
    "analysis.json": "delete the file to leave its plots out",
    "manifest.json": "put back the file that training wrote, or train again with name=<another name>",
}


def write_report(run: Path) -> Path:
    """Writes run/report.html from config.yaml, metrics.jsonl, results.json, manifest.json and, if there, analysis.json.

    Returns the page's path. InputError names the file, and the line if there is one, that is missing or malformed.
    """
    paths = {name: run / name for name in REMEDY}
    config = _text(paths["config.yaml"])
    read_part(paths["config.yaml"], yaml.safe_load)  # shown as it was written, but not when it is broken
    log = read_log(paths["metrics.jsonl"])
    results = _by_set(read_part(paths["results.json"]), paths["results.json"])
    manifest = read_part(paths["manifest.json"])
    analysis = read_part(paths["analysis.json"]) if paths["analysis.json"].exists() else {}

    name = escape(run.resolve().name)
    body = [
        (
            f"<header><p class='quiet'>SGPT training run</p><h1>{name}</h1><p "
            f"class='lead'>{_headline(results)}</p></header>"
        ),
        _tiles(log, manifest, paths["manifest.json"]),
        section("Results", _seen(manifest), _table(results), figures(_score_plots(results))),
        section("Training", _alarms(log), figures(_curve_plots(log))),
        section("Cosine of query and document", figures(_similarity_plots(analysis, paths["analysis.json"]))),
        section("Size of the bias change", _change(analysis, paths["analysis.json"])),
        section(
            "How it was made", fold("Configuration", f"<pre>{escape(config)}</pre>"), fold("Manifest", tree(manifest))
        ),
    ]
    file = run / "report.html"
    write_whole(file, page(f"{run.resolve().name} · SGPT run", *body))
    return file


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
        raise _refusal(
            path, f"not YAML ({error.problem})", error.problem_mark and error.problem_mark.line + 1
        ) from error
    if not isinstance(content, dict):
        raise _refusal(path, f"holds {type(content).__name__}, expected keys with values", line)
    return content


def read_part(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """What a file of a run folder holds; InputError, with what to do, where it is missing or damaged."""
    return _parse(_text(path), path, parse)


def read_log(path: Path, *, unfinished: bool = False) -> list[dict[str, Any]]:
    """Log lines in step order.

    Of a step logged twice (a run that was killed and went on from a checkpoint) the last counts.
    unfinished: the run may be training: there may be no line yet, and the last one may not be whole.
    """
    log: dict[float, dict[str, Any]] = {}
    written = _text(path) if path.exists() or not unfinished else ""
    if unfinished:
        written = written[: written.rfind("\n") + 1]
    for number, text in enumerate(written.splitlines(), start=1):
        line = _parse(text, path, line=number)
        step = _number(line, "step", path=path, line=number)
        if step is None:
            raise _refusal(path, f"no 'step' in {text[:60]!r}", number)
        curves = {key: _number(line, key, path=path, line=number) for keys in CURVES.values() for key in keys}
        norms = line.get("grad_norms") or {}
        read = {
            "step": step,
            **curves,
            "dev": scores_of(line, "dev", path, number),
            "grad_norms": {group: _number(norms, group, path=path, line=number) for group in norms},
            "alarm": line.get("alarm"),
        }
        stated = {key: value for key, value in read.items() if value not in (None, {})}
        log[step] = read | log.get(step, {}) | stated  # a step that was evaluated has two lines
    if not log and not unfinished:
        raise _refusal(path, "no log line")
    return [log[step] for step in sorted(log)]


def _number(data: Any, *keys: str, path: Path, line: int | None = None) -> float | None:
    """The number at data[key][key]…, None when it is absent or null."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    if data is not None and (isinstance(data, bool) or not isinstance(data, int | float)):
        raise _refusal(path, f"'{'.'.join(keys)}' is {data!r}, not a number", line)
    return data


def scores_of(data: dict[str, Any], block: str, path: Path, line: int | None = None) -> Scores:
    scores = data.get(block) or {}
    if not isinstance(scores, dict) or not all(isinstance(metrics, dict) for metrics in scores.values()):
        raise _refusal(path, f"'{block}' is not a table of sets and metrics", line)
    return {
        name: {metric: _number(scores, name, metric, path=path, line=line) for metric in metrics}
        for name, metrics in scores.items()
        if metrics
    }


def _by_set(data: dict[str, Any], path: Path) -> SetResults:
    models = {model: scores_of(data, model, path) for model in MODELS}
    results: SetResults = {}
    for scores in models.values():
        for name, metrics in scores.items():
            for metric in metrics:
                row = {model: models[model].get(name, {}).get(metric) for model in MODELS}
                results.setdefault(name, {})[metric] = row
    return results


def _metric_label(name: str) -> str:
    return METRIC_LABELS.get(name, name)


def _legend(colours: dict[str, str]) -> dict[str, str]:
    return {_metric_label(name): colour for name, colour in colours.items()}


def _main_metric(metrics: Iterable[str]) -> str:
    return next(metric for metric in ("ndcg@10", "spearman_cosine", *metrics) if metric in metrics)


def _headline(results: SetResults) -> str:
    if not results:
        return "This run was not evaluated."
    name, metrics = next(iter(results.items()))
    metric = _main_metric(metrics)
    before, after, bm25 = metrics[metric].values()
    what = f"{escape(_metric_label(metric))} on {escape(name)}"
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
    best = _number(manifest, "best", "step", path=path)
    losses, speeds = ([line[key] for line in log if line[key] is not None] for key in ("loss", "queries_per_second"))
    tiles = {
        "optimizer steps": f"{log[-1]['step']:,}",
        "step taken": f"{best:,} <small>of {log[-1]['step']:,}, the best on the dev sets</small>" if best else "",
        "parameters trained": f"{trained:,} <small>of {total:,} ({trained / total:.2%})</small>"
        if trained and total
        else "",
        "loss, first and last line": f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "",
        "queries per second": f"{np.median(speeds):,.0f} <small>median</small>" if speeds else "",
        "duration": ""
        if seconds is None
        else f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min",
    }
    shown = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in tiles.items() if value)
    return f"<dl class='tiles'>{shown}</dl>"


def _alarms(log: list[dict[str, Any]]) -> str:
    return "".join(f"<p class='fall'>{escape(str(line['alarm']))}</p>" for line in log if line["alarm"])


def _seen(manifest: dict[str, Any]) -> str:
    """Test sets whose queries or pairs were trained on."""
    said = manifest.get("seen_in_training", [])
    return "".join(f"<p class='fall'>{escape(str(one))}</p>" for one in said)


def _table(results: SetResults) -> str:
    rows = []
    for name, metrics in results.items():
        head = f"<th rowspan='{len(metrics)}'>{escape(name)}</th>"
        for metric, values in metrics.items():
            best = max((value for value in values.values() if value is not None), default=None)
            cells = [f"<td>{escape(_metric_label(metric))}</td>"]
            for value in values.values():
                cells.append(
                    "<td>–</td>" if value is None else f"<td{' class=best' if value == best else ''}>{value:.4f}</td>"
                )
            cells += [_difference(values["after"], values[other]) for other in ("before", "bm25")]
            rows.append(f"<tr{' class=first' if head else ''}>{head}{''.join(cells)}</tr>")
            head = ""
    if not rows:
        return ""
    heads = "".join(
        f"<th>{head}</th>" for head in ("Set", "Metric", "Before", "After", "BM25", "After − before", "After − BM25")
    )
    return (
        f"<div class='scroll card'><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _difference(value: float | None, reference: float | None) -> str:
    if value is None or reference is None:
        return "<td>–</td>"
    colour = "rise" if value > reference else "fall" if value < reference else "quiet"
    return f"<td class='{colour}'>{value - reference:+.4f}</td>".replace("-", "−")


def _score_plots(results: SetResults) -> list[Plot]:
    plots = []
    for name, metrics in results.items():
        models = [model for model in MODELS if any(values[model] is not None for values in metrics.values())]
        bars = {model: [values[model] for values in metrics.values()] for model in models}
        draw = partial(_draw_bars, rows=[_metric_label(metric) for metric in metrics], bars=bars)
        plots.append(Plot(name, draw, _legend({model: MODELS[model] for model in models})))
    return plots


def _draw_bars(axes: Axes, rows: list[str], bars: dict[str, Values], *, xlabel: str = "", lying: bool = False) -> None:
    """One group of bars per row, in it one bar per entry of `bars`; an absent value leaves its place empty."""
    # two standing bars get the width of three: slim bars are easier to compare
    width = 0.82 / max(len(bars), 3 - lying)
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


def _curve_plots(log: list[dict[str, Any]]) -> list[Plot]:
    """The curves that have a point, then one plot per set that was evaluated during training."""
    curves: dict[str, dict[str, Points]] = {
        title: {key: [(line["step"], line[key]) for line in log if line[key] is not None] for key in keys}
        for title, keys in CURVES.items()
    }
    curves["Gradient norm by layers"] = {}
    for line in log:
        for group, norm in line["grad_norms"].items():
            curves["Gradient norm by layers"].setdefault(group, []).append((line["step"], norm))
        for name, metrics in line["dev"].items():
            metric = _main_metric(metrics)
            curves.setdefault(f"{_metric_label(metric)} on {name}", {metric: []})[metric].append(
                (line["step"], metrics[metric])
            )
    plots = []
    for title, lines in curves.items():
        colours = dict(zip(lines, LINE_COLOURS, strict=False))
        if any(lines.values()):
            plots.append(
                Plot(
                    title,
                    partial(_draw_curves, lines=lines, colours=colours),
                    _legend(colours) if len(lines) > 1 else {},
                )
            )
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


def _similarity_plots(analysis: dict[str, Any], path: Path) -> list[Plot]:
    """Positives and negatives, before and after in the same bins, so that the eye can compare the two."""
    cosines = {}  # model -> side -> its finite values
    try:
        for model, sides in (analysis.get("similarity") or {}).items():
            arrays = {side: np.array(sides[side], dtype=float) for side in SIDES}
            arrays = {side: values[np.isfinite(values)] for side, values in arrays.items()}
            if all(map(len, arrays.values())):
                cosines[model] = arrays
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refusal(
            path, f"'similarity' does not hold lists of numbers 'positive' and 'negative' ({error!r})"
        ) from error
    if not cosines:
        return []
    draw = partial(
        draw_sides,
        bins=common_bins(values for sides in cosines.values() for values in sides.values()),
        xlabel="cosine",
        ylabel="share of pairs",
    )
    plots = []
    for model, sides in cosines.items():
        positive, negative = sides["positive"], np.sort(sides["negative"])
        lower, upper = (np.searchsorted(negative, positive, side).mean() / len(negative) for side in ("left", "right"))
        note = (

                f"Means {positive.mean():.3f} and {negative.mean():.3f}. "
                f"A random positive is closer than a random negative in {(lower + upper) / 2:.1%} of draws."

        )
        plots.append(Plot(f"{model.capitalize()} training", partial(draw, sides=sides), SIDES, note))
    return plots


def _change(analysis: dict[str, Any], path: Path) -> str:
    """Relative L2 change, mean over the tensors of a row.

    A tensor that was zero before has none, and is counted below.
    """
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
    if not rows:
        return f"<p class='quiet'>{note}</p>" if note else ""
    draw = partial(_draw_bars, lying=True, xlabel="relative change, L2")
    plots = [Plot("Per layer", partial(draw, rows=[row[2] for row in rows], bars=whole), {}, note, inches)]
    if layers:
        plots.append(
            Plot(
                "Per layer and kind",
                partial(draw, rows=[row[2] for row in layers], bars=split),
                _legend(KINDS),
                "",
                inches,
            )
        )
    return figures(plots)


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
