"""Training pairs out of documents alone, for those who have texts and no queries.

Whoever wrote a page has put together what belongs together: its title and its first paragraph, a heading and the
paragraph below it, the first sentence of a paragraph and the rest of it. Such pairs are weaker than real queries, and
there are many of them (inverse cloze task: Lee et al. 2019, arXiv 1906.00300; Contriever: Izacard et al. 2022, arXiv
2112.09118).

    rows of a file      a column of texts and, where there is one, a column of titles; a BEIR corpus is such a file
    a folder of texts   .txt and .md files at any depth. The title is the first heading of a .md, else the name of the
                        file; front matter and the signs of headings are no text
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from sgpt.data.feed.example import Example, checked_example, checked_text
from sgpt.data.formats.row import PlacedRows, checked_row
from sgpt.data.sources.columns import DocumentColumns
from sgpt.data.sources.pairs import ParsedRows
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import files_below

log = logging.getLogger(__name__)
TEXT_ENDINGS = (".txt", ".md")
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# of Markdown: a heading (ATX), or a block of code between fences, whose comments may look like one
HEADING_OR_CODE = re.compile(
    r"^ {0,3}(?P<fence>`{3,}(?=[^`\n]*\n)|~{3,})[^\n]*\n.*?(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)|"
    r"^#{1,6}[ \t]+(?P<heading>[^\n]*?)[ \t#]*$",
    re.DOTALL | re.MULTILINE,
)
BLANK_LINES = re.compile(r"\r?\n[ \t\r]*\n")  # of any system, and with blanks in them
MIN_PARAGRAPH_WORDS, MAX_HEADING_WORDS = 20, 14
VERSION = 2  # of the pairs that are made of a document; a change has sources read anew, and is seen by a resumed run


def text_files(path: Path) -> list[Path]:
    """`path` itself, or the text files below it by name; none where it is neither."""
    files = files_below(path) if path.is_dir() else [path]
    return [file for file in files if file.suffix.lower() in TEXT_ENDINGS]


def text_rows(files: list[Path]) -> PlacedRows:
    """("<file>", {"title", "text"}) of each file, or what is wrong with it; blank files are left out, and named."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
            title = file.stem.replace("_", " ").replace("-", " ")
            if file.suffix.lower() == ".md":
                text = FRONT_MATTER.sub("", text)
                headings = (match["heading"] for match in HEADING_OR_CODE.finditer(text))
                title = next(filter(None, headings), title)
                # a heading becomes a block of its own
                text = HEADING_OR_CODE.sub(lambda m: f"\n{m['heading']}\n" if m["fence"] is None else m[0], text)
            if not text.strip():
                log.warning("%s: is blank, and left out", file)
                continue
            yield str(file), checked_row({"title": title, "text": text}, str(file))
        except UnicodeDecodeError as error:
            yield str(file), InputError(f"{file}: byte {error.start} is no UTF-8; save the file as UTF-8")
        except InputError as error:
            yield str(file), error


def document_pairs(rows: PlacedRows, columns: DocumentColumns) -> ParsedRows:
    """The pairs of each row, or what is wrong with it; None for a document too short for any."""
    for where, row in rows:
        if isinstance(row, InputError):
            yield where, row
            continue
        try:
            pairs = _examples(row, columns, where)
        except InputError as error:
            yield where, error
            continue
        yield from ((where, pair) for pair in pairs or [None])


def _examples(row: dict, columns: DocumentColumns, where: str) -> list[Example]:
    text = checked_text(row.get(columns.text), f"{where}, column {columns.text!r}")
    title = row.get(columns.title) if columns.title else None
    if not isinstance(title, str | None):
        raise InputError(f"{where}, column {columns.title!r}: expected text, got {title!r:.80}; give a string")
    pairs = weak_pairs((title or "").strip(), BLANK_LINES.sub("\n\n", text))
    return [checked_example(query, passage, (), where) for query, passage in pairs if query != passage]


def weak_pairs(title: str, text: str) -> Iterator[tuple[str, str]]:
    """Pairs of a page, whose blocks are set apart by blank lines.

    The title and the first paragraph, a heading and the paragraph below it, the first sentence of a paragraph and the
    rest of it, the first sentence of a paragraph and the paragraph after it.
    """
    blocks = [" ".join(block.split()) for block in text.split("\n\n")]
    blocks = [block for block in blocks if block]
    heading, previous, first = "", "", True
    for block in blocks:
        words = len(block.split())
        if words <= MAX_HEADING_WORDS and not block.endswith((".", ":", ";", ",")):
            heading, previous = block, ""
            continue
        if words < MIN_PARAGRAPH_WORDS:  # a caption, a list's item, a line of code
            continue
        if first and len(title.split()) > 1:
            yield title, block
        elif heading:
            yield (f"{title}: {heading}" if len(heading.split()) < 3 else heading), block
        elif previous:
            yield previous, block
        sentence, rest = _first_sentence(block)
        if len(rest.split()) >= MIN_PARAGRAPH_WORDS:
            yield sentence, rest
        previous = sentence if len(sentence.split()) >= 5 else ""
        heading, first = "", False


def _first_sentence(block: str) -> tuple[str, str]:
    """The first sentence and the rest; a block whose first sentence is no good query is left whole, with no rest."""
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", block, maxsplit=1)
    if len(parts) == 2 and 4 <= len(parts[0].split()) <= 40:
        return parts[0], parts[1]
    return block, ""
