"""The report of a small, realistic run: what must stand in it, what must not, and what is refused."""

import json
import re
import resource
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from sgpt.report.run import write_report
from sgpt.runtime.errors import InputError

RESULTS = {
    "before": {"pydocs": {"ndcg@10": 0.2134, "map@100": 0.18, "recall@100": 0.6, "mrr@10": 0.2},
               "open-sts": {"spearman_cosine": 0.5511, "pearson_cosine": 0.56}},
    "after": {"pydocs": {"ndcg@10": 0.4321, "map@100": 0.39, "recall@100": 0.81, "mrr@10": 0.42},
              "open-sts": {"spearman_cosine": 0.5411, "pearson_cosine": 0.57}},
    "bm25": {"pydocs": {"ndcg@10": 0.3807, "map@100": 0.33, "recall@100": 0.84, "mrr@10": 0.37}},
}  # fmt: skip
ANALYSIS = {
    "similarity": {
        "before": {"positive": [0.7, 0.8, 0.75], "negative": [0.6, 0.72, 0.5]},
        "after": {"positive": [0.7, 0.8, 0.75], "negative": [0.1, 0.2, 0.3]},
    },
    "change": {
        "transformer.wpe.bias": 0.01, "transformer.h.0.ln_1.bias": 0.2,
        "transformer.h.0.attn.attention.out_proj.bias": 0.4,
        "transformer.h.0.mlp.c_fc.bias": 0.6, "transformer.h.10.mlp.c_fc.bias": 0.5,
        "transformer.h.2.mlp.c_fc.bias": 0.5,
        "transformer.ln_f.bias": 0.123,
    },
}  # fmt: skip
SECTIONS = ["Results", "Training", "Cosine of query and document", "Size of the bias change", "How it was made"]


def log_line(step: int) -> dict:
    line = {
        "step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "grad_norm": 1.5, "queries_per_second": 80.0,
        "tokens_per_second": 9000.0, "padding_share": 0.1, "positive_cosine": 0.7, "hardest_negative_cosine": 0.4,
        "seconds": step,
    }  # fmt: skip
    return line | ({"dev": {"pydocs": {"ndcg@10": 0.3}}} if step % 20 == 0 else {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "nano & co")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an untouched run, drawn once for all tests that only read it."""
    return page_of(make_run(tmp_path_factory.mktemp("report") / "nano & co"))


def make_run(run: Path) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: nano\nnote: <script>alert(1)</script>\nloss: {name: info_nce, scale: 20.0}\n"
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(log_line(step)) + "\n" for step in range(1, 81)))
    write_json(run / "results.json", RESULTS)
    write_json(run / "analysis.json", ANALYSIS)
    parameters = {"trained": 12288, "total": 6402048}
    write_json(
        run / "manifest.json",
        {"parameters": parameters, "seconds": 1830, "git": {"commit": "<b>abc</b>"}, "seeds": [0, 1]}
    )
    return run


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def sections(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def plot_titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", page)


def test_page_lies_in_the_run_folder_with_every_section_in_order(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert sections(page) == SECTIONS
    assert "<h1>nano &amp; co</h1>" in page
    assert "nDCG@10 on pydocs" in plot_titles(page)  # evaluated during training


def test_headline_table_and_tiles_show_the_numbers_of_the_run(page: str) -> None:
    assert "nDCG@10 on pydocs rose from <b>0.213</b> to <b class='after'>0.432</b>; BM25 reaches 0.381." in page
    for scores in RESULTS.values():
        for metrics in scores.values():
            assert all(f">{value:.4f}</td>" in page for value in metrics.values())
    # nDCG@10, after − before and after − BM25
    assert "<td class='rise'>+0.2187</td><td class='rise'>+0.0514</td>" in page
    assert "<td class='fall'>−0.0100</td><td>–</td>" in page  # Spearman fell, and BM25 has none
    assert "<td class=best>0.8400</td>" in page  # BM25's recall is the best of the three
    assert "12,288 <small>of 6,402,048 (0.19%)" in page
    assert "30.5 min" in page


def test_page_needs_nothing_from_outside_and_no_script(page: str) -> None:
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    links = [attributes.get(key) for _, attributes in tags for key in ("href", "xlink:href", "src")]
    assert all(link is None or link.startswith("#") for link in links)
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_text_from_files_is_escaped(run: Path) -> None:
    write_json(run / "results.json", {"after": {"<i>set": {"ndcg@10": 0.5}}})
    page = page_of(run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;abc&lt;/b&gt;" in page
    assert "&lt;i&gt;set" in page
    assert not any(tag in page for tag in ("<script", "<b>abc", "<i>"))


def test_every_element_id_and_reference_in_the_page_is_unambiguous(page: str) -> None:
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_plots_take_every_colour_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#ffffff"}  # matplotlib's invisible patches
    assert re.search(r"<text[^>]*>optimizer step</text>", drawings)  # text stays text


def test_missing_analysis_drops_only_its_sections(run: Path) -> None:
    (run / "analysis.json").unlink()
    assert sections(page_of(run)) == ["Results", "Training", "How it was made"]


@pytest.mark.parametrize(
    ("part", "dropped"), [("similarity", "Cosine of query and document"), ("change", "Size of the bias change")]
)
def test_missing_part_of_the_analysis_drops_only_its_section(run: Path, part: str, dropped: str) -> None:
    write_json(run / "analysis.json", {key: value for key, value in ANALYSIS.items() if key != part})
    assert sections(page_of(run)) == [title for title in SECTIONS if title != dropped]


def test_unevaluated_run_still_has_its_curves(run: Path) -> None:
    write_json(run / "results.json", {"before": {}, "after": None})
    page = page_of(run)
    assert "This run was not evaluated." in page
    assert sections(page) == SECTIONS[1:]


def test_similarity_note_gives_the_share_of_draws_the_positive_wins(page: str) -> None:
    assert "in 88.9% of draws" in page  # before: 8 of 9 pairs by hand
    assert "in 100.0% of draws" in page


def test_bias_change_is_averaged_per_layer_in_layer_order(page: str) -> None:
    drawing = page[page.index('aria-label="Per layer"') : page.index('aria-label="Per layer and kind"')]
    labels = re.findall(r"<text[^>]*>(embeddings|layer \d+|final norm|\.\d{3})</text>", drawing)
    assert labels == [
        "embeddings", "layer 0", "layer 2", "layer 10", "final norm", ".010", ".400", ".500", ".500", ".123"
    ]


def test_tensors_that_were_zero_are_counted_also_where_all_were(run: Path) -> None:
    write_json(run / "analysis.json", {"change": {"layers.0.mlp.up_proj.bias": None, "layers.0.norm.bias": 0.5}})
    assert "zero before training: 1 of 2 tensors" in page_of(run)
    write_json(run / "analysis.json", {"change": {"layers.0.mlp.up_proj.bias": None}})
    page = page_of(run)
    assert "Size of the bias change" in page
    assert "zero before training: 1 of 1 tensors" in page


def test_last_line_counts_when_a_resumed_run_logged_a_step_twice(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(log_line(80) | {"loss": 0.777}) + "\n")
    assert "3.000 → 0.777" in page_of(run)


def test_malformed_log_line_is_refused_with_file_line_and_remedy(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:6], '{"step": 7, "loss"', *lines[7:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 7: not JSON .*delete"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"loss": 2.0}\n', r"metrics\.jsonl, line 2: no 'step'"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', r"metrics\.jsonl, line 1: 'loss' is 'low', not a number"),
        ("metrics.jsonl", "", r"metrics\.jsonl: no log line"),
        ("config.yaml", "model: nano\nloss: [1\n", r"config\.yaml, line 3: not YAML"),
        ("results.json", '{"after":\n oops}', r"results\.json, line 2: not JSON"),
        ("results.json", '{"after": {"pydocs": {"ndcg@10": "high"}}}', r"results\.json: 'pydocs\.ndcg@10' is 'high'"),
        (
            "analysis.json", '{"similarity": {"before": {"positive": [0.1]}}}',
            r"analysis\.json: 'similarity' .*'negative'"
        ),
        ("manifest.json", "[]", r"manifest\.json: holds list"),
    ],
)
def test_malformed_file_is_refused_by_name(run: Path, file: str, text: str, message: str) -> None:
    (run / file).write_text(text)
    with pytest.raises(InputError, match=message):
        write_report(run)


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "results.json", "manifest.json"])
def test_missing_required_file_is_refused_by_name(run: Path, file: str) -> None:
    (run / file).unlink()
    with pytest.raises(InputError, match=f"{re.escape(file)}: the file is missing; "):
        write_report(run)


def test_report_is_repeatable_and_leaves_matplotlib_settings_alone(run: Path) -> None:
    settings = dict(matplotlib.rcParams)
    assert page_of(run) == page_of(run)
    assert dict(matplotlib.rcParams) == settings


def test_a_full_disk_leaves_the_page_that_was_there(run: Path) -> None:
    page = page_of(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(page) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_what_is_advised_for_a_broken_log_line_and_a_broken_analysis_helps(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:6], '{"step": 7, "loss"', *lines[7:]]))
    (run / "analysis.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 7: .*; delete the line and write the report again"):
        write_report(run)
    (run / "metrics.jsonl").write_text("\n".join([*lines[:6], *lines[7:]]))
    with pytest.raises(InputError, match=r"analysis\.json, line 1: .*; delete the file to leave its plots out"):
        write_report(run)
    (run / "analysis.json").unlink()
    assert sections(page_of(run)) == ["Results", "Training", "How it was made"]


def test_health_has_curves_and_the_alarm_and_the_step_taken_are_said(run: Path) -> None:
    health = {
        "alignment": 0.5, "uniformity": -2.0, "negatives_per_query": 63.0, "effective_negatives": 20.0,
        "masked_share": 0.01, "grad_norms": {"embeddings": 0.1, "blocks 0-2": 0.2, "last norm": 0.3},
    }  # fmt: skip
    rows = [log_line(step) | health for step in (1, 20, 40)]
    del rows[1]["dev"], rows[2]["dev"]
    rows[1]["alarm"] = "step 20: different documents have <one> embedding"
    rows += [{"step": step, "dev": {"pydocs": {"ndcg@10": 0.3}}} for step in (20, 40)]  # lines of their own
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", manifest | {"best": {"step": 20, "value": 0.3}})
    page = page_of(run)
    of_health = {"Alignment and uniformity", "Negatives of a query", "Share of candidates left out"}
    assert of_health | {"Gradient norm by layers", "nDCG@10 on pydocs"} <= set(plot_titles(page))
    assert "blocks 0-2" in page
    assert "<p class='fall'>step 20: different documents have &lt;one&gt; embedding</p>" in page
    assert "<dt>step taken</dt><dd>20 <small>of 40, the best on the dev sets</small></dd>" in page
    assert "3.000 → 0.075" in page  # the loss of the last step, whose evaluation has a line after it
