"""The search page in a browser: what is typed is searched, three columns come, and texts stay texts."""

import json
import shutil

import pytest

from sgpt.serving.config import EXTRA
from tests.retrieval.test_search import tuned_run

for library in EXTRA:
    pytest.importorskip(library, reason=f"{library} is not installed (pip install -e '.[dev]')")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from tests.serving.test_server import serving  # noqa: E402

HTML = "<b>bold</b> <script>document.title = 'owned'</script>"
DOCUMENTS = ["parse a date", HTML, "sort a list of names", "a " * 500]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=shutil.which("chromium"))  # else its own
        except sync_api.Error as error:
            pytest.skip(f"no Chromium for playwright (playwright install chromium): {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    tuned_run(language_model("gpt2"), folder / "run")
    lines = [json.dumps({"_id": f"d{number}", "text": text}) + "\n" for number, text in enumerate(DOCUMENTS)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    return folder


def test_a_query_shows_base_tuned_and_re_ranked_side_by_side(browser, folder):
    corpus = str(folder / "corpus.jsonl")
    with serving(folder / "run", rerank=True, corpus=corpus, depth=4, api_key="secret") as url:
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        page.fill("#query", "a date")
        page.click("#go")
        page.wait_for_selector("#said.wrong")
        assert "API key" in page.inner_text("#said")
        page.fill("#key", "secret")  # which is asked for now
        page.click("#go")
        page.wait_for_selector("section")
        titles = [title.split()[0] for title in page.locator("h2").all_inner_texts()]
        assert titles == ["base", "tuned", "re-ranked"]
        assert page.locator("section").nth(1).locator("li").count() == len(DOCUMENTS)
        widths = [float(bar.get_attribute("style").split()[1].rstrip("%;")) for bar in page.locator(".bar div").all()]
        assert len(widths) == 3 * len(DOCUMENTS)
        assert max(widths) <= 100
        assert widths[-4:] == sorted(widths[-4:], reverse=True)
        assert "<b>bold</b>" in page.inner_text("main")  # and is not HTML
        assert page.title() == "Search"
        assert {request.split("/")[2] for request in requests} == {url.split("/")[2]}  # nothing from elsewhere
