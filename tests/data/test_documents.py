"""Pairs made of documents alone: which ones, from which files, and what is refused."""

import json
from pathlib import Path

import pytest

from sgpt.data.feed.example import Example
from sgpt.data.readers import SourceConfig, read_examples
from sgpt.data.sources.documents import weak_pairs
from sgpt.runtime.errors import InputError

REST = "which holds many more words than a heading would, so that it is taken for a passage and not for a caption."
SENTENCE, OTHER = "The kidney filters the blood.", "The heart pumps it on."


def test_weak_pairs_of_a_page():
    first, second = (
        "Alpha beta gamma delta. Then " + "word " * 25 + "ends.",
        "Second part starts here. Also " + "more " * 25 + "ends.",
    )
    assert list(weak_pairs("The title", f"{first}\n\nA small heading\n\n{second}\n\n{first}")) == [
        ("The title", first),
        ("Alpha beta gamma delta.", first.split(". ", 1)[1]),
        ("A small heading", second),
        ("Second part starts here.", second.split(". ", 1)[1]),
        # its neighbour's first sentence is too short to be a query
        ("Alpha beta gamma delta.", first.split(". ", 1)[1]),
    ]


def read(tmp_path: Path, **keys) -> list[Example]:
    examples = read_examples(SourceConfig(name="documents", **keys), tmp_path / "cache")
    return [examples[number] for number in range(len(examples))]


def corpus(tmp_path: Path, *rows: dict, name: str = "corpus.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(tmp_path / name)


def test_columns_of_a_corpus_are_guessed_and_a_short_document_gives_nothing(tmp_path):
    path = corpus(
        tmp_path,
        {"_id": "1", "title": "On kidneys", "text": f"{SENTENCE} It is an organ, {REST}"},
        {"_id": "2", "title": "Nothing", "text": "Too short."},
    )
    assert read(tmp_path, path=path) == [
        Example("On kidneys", f"{SENTENCE} It is an organ, {REST}"),
        Example(SENTENCE, f"It is an organ, {REST}"),
    ]


@pytest.mark.parametrize("blank_line", ["\n\n", "\r\n\r\n", "\n  \n", "\n\n\n"])
def test_paragraphs_are_set_apart_by_blank_lines_of_any_system(tmp_path, blank_line):
    first, second = f"It is an organ, {REST}", f"It is a muscle, {REST}"
    path = corpus(tmp_path, {"title": "On kidneys", "text": blank_line.join((first, "On hearts too", second))})
    assert read(tmp_path, path=path) == [Example("On kidneys", first), Example("On hearts too", second)]


def test_columns_are_stated_by_their_roles(tmp_path):
    path = corpus(tmp_path, {"page": f"{OTHER} It is a muscle, {REST}", "head": "On hearts", "text": "no document"})
    named = {"positive": "page", "query": "head"}
    assert read(tmp_path, path=path, columns=named)[0].query == "On hearts"
    without = read(tmp_path, path=path, columns={"positive": "page", "query": ""})
    assert [example.query for example in without] == [OTHER]


def test_a_folder_of_text_files_at_any_depth(tmp_path):
    folder = tmp_path / "pages"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "the-heart_of.md").write_text(f"{OTHER} It is a muscle, {REST}", encoding="utf-8")
    (folder / "a kidney.txt").write_text(f"{SENTENCE} It is an organ, {REST}", encoding="utf-8")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    assert [example.query for example in read(tmp_path, path=str(folder))] == [
        "a kidney", SENTENCE, "the heart of", OTHER,
    ]  # fmt: skip


def test_markdown_is_read_without_its_signs(tmp_path):
    (tmp_path / "page.md").write_text(
        f"---\ntitle: x\ndate: y\n---\n# On the heart\nIt is a muscle, {REST}\n\n"
        f"## Its two chambers\nThey take turns, {REST}\n",
        encoding="utf-8",
    )
    assert read(tmp_path, path=str(tmp_path / "page.md")) == [
        Example("On the heart", f"It is a muscle, {REST}"), Example("Its two chambers", f"They take turns, {REST}"),
    ]  # fmt: skip


def test_a_comment_in_a_block_of_code_is_no_heading(tmp_path):
    """CommonMark, 4.5: a block goes to a fence of the same sign that is as long, or to the end."""
    (tmp_path / "inline.md").write_text(f"```pip install it```\n# On the heart\nIt is a muscle, {REST}\n")
    assert read(tmp_path, path=str(tmp_path / "inline.md"))[0].query == "On the heart"
    (tmp_path / "page.md").write_text(
        f"```sh\n# install it\n~~~\n# and run it\n````\n# On the heart\nIt is a muscle, {REST}\n\n"
        f"~~~\n# beat\n\n# {OTHER}\n",
        encoding="utf-8",
    )
    title, code = read(tmp_path, path=str(tmp_path / "page.md"))[0], "```sh # install it ~~~ # and run it ````"
    assert title.query == "On the heart"
    assert code not in title.query


def test_what_a_folder_of_texts_leaves_out_is_said(tmp_path, caplog):
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "on kidneys.txt").write_text(f"It is an organ, {REST}", encoding="utf-8")
    (pages / "empty.txt").write_text(" \n", encoding="utf-8")
    (pages / "one.html").write_text("<p>", encoding="utf-8")
    assert len(read(tmp_path, path=str(pages))) == 1
    assert "empty.txt: is blank, and left out" in caplog.text
    assert "1 files that are neither .txt nor .md are left out: .html" in caplog.text
    with pytest.raises(InputError, match=r"pages: texts have neither columns nor splits; leave out data\.columns"):
        read(tmp_path, path=str(pages), columns={"positive": "text"})
    corpus(pages, {"title": "On kidneys", "text": f"It is an organ, {REST}"})
    with pytest.raises(InputError, match=r"pages: holds texts \(.*\.txt\) and files of rows \(corpus\.jsonl"):
        read(tmp_path, path=str(pages))


def test_a_changed_text_file_is_read_again(tmp_path):
    file = tmp_path / "pages" / "on kidneys.txt"
    file.parent.mkdir()
    file.write_text(f"It is an organ, {REST}", encoding="utf-8")
    before = read(tmp_path, path=str(file.parent))
    file.write_text(f"It is no organ, {REST}", encoding="utf-8")
    assert read(tmp_path, path=str(file.parent)) != before


def test_bad_documents_are_named_or_listed(tmp_path):
    good = {"title": "On kidneys", "text": f"It is an organ, {REST}"}
    path = corpus(tmp_path, good, {"title": "Blank", "text": " "}, {"title": 7, "text": f"It is an organ, {REST}"})
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 2, column 'text': the text is blank"):
        read(tmp_path, path=path)
    assert len(read(tmp_path, path=path, on_error="skip", max_error_share=1.0)) == 1
    [rejected] = (tmp_path / "cache").glob("*.rejected.jsonl")
    blank, number = rejected.read_text().splitlines()
    assert "blank" in blank
    assert "expected text, got 7" in number

    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "latin.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: byte 1 is no UTF-8"):
        read(tmp_path, path=str(tmp_path / "pages"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"label": "title"}}, r"data\.columns\.label is set, and documents alone have no negatives"),
        ({"columns": {"positive": "txet"}}, r"names no column; it has .*Did you mean 'text'"),
        ({"num_hard_negatives": 1}, r"data\.num_hard_negatives=1: pairs made of documents alone"),
        ({"triples": "t.tsv"}, r"data\.triples=t\.tsv is read by data=beir only"),
    ],
)
def test_what_documents_alone_cannot_have_is_refused(tmp_path, keys, message):
    path = corpus(tmp_path, {"title": "On kidneys", "text": f"It is an organ, {REST}"})
    with pytest.raises(InputError, match=message):
        read(tmp_path, path=path, **keys)


def test_no_column_of_texts_is_said(tmp_path):
    path = corpus(tmp_path, {"id": 1, "lines": "x"})
    with pytest.raises(InputError, match=r"which column holds the documents is not clear .*data\.columns\.positive="):
        read(tmp_path, path=path)
