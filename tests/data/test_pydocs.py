"""`pydocs` on a small installation written here: nothing of it may be imported, and nothing held out may be trained on.
"""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from sgpt.data.formats import beir
from sgpt.data.readers import DataConfig, read_examples
from sgpt.data.sources import pydocs
from sgpt.data.sources.pydocs import Documented, documented_objects, split_of

BODY = "More words about it follow here, enough of them to be found by."
SIDE_EFFECT = "import pathlib\npathlib.Path({mark!r}).touch()\nraise SystemExit('imported')\n"


def function(name: str, summary: str, body: str = BODY, signature: str = "()") -> str:
    return f'def {name}{signature}:\n    """{summary}\n\n    {body}\n    """\n'


def found_in(tmp_path: Path, source: str, file: str = "toolbox/dates.py") -> dict[str, Documented]:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return {found.name: found for found in documented_objects(path, "toolbox")}


def test_the_first_paragraph_is_the_summary_and_the_rest_with_the_signature_the_document(tmp_path):
    source = '''
def parse(text, *, strict=True, **options):
    """Turn a text
    into a date.

    Accepts many   forms, such as
    ISO dates and others:

        and what is indented.
    """
'''
    assert found_in(tmp_path, source) == {
        "toolbox.dates.parse": Documented(
            name="toolbox.dates.parse", module="toolbox.dates", package="toolbox", summary="Turn a text into a date.",
            document="(text, strict) Accepts many forms, such as ISO dates and others: and what is indented.",
        )
    }  # fmt: skip


def test_the_objects_own_name_and_the_summary_are_cut_out_of_the_document(tmp_path):
    body = "Use parse to read. Turn it into dates. A parser parses with parse() and never fails when called."
    document = found_in(tmp_path, function("parse", "Turn it into dates.", body))["toolbox.dates.parse"].document
    assert document == "() Use to read. A parser parses with () and never fails when called."


def test_classes_and_methods_are_found_under_their_dotted_names_without_self(tmp_path):
    now = function("now", "Give the present moment.", signature="(self, zone)")
    method = "".join(f"    {line}\n" for line in now.splitlines())
    source = f'''
class Clock:
    """Shows the time of day.

    {BODY}
    """
{method}
    @classmethod
    async def at(cls, zone):
        """Make a clock of it.

        {BODY}
        """
'''
    found = found_in(tmp_path, source)
    assert {name: one.document.removesuffix(BODY).strip() for name, one in found.items()} == {
        "toolbox.dates.Clock": "", "toolbox.dates.Clock.now": "(zone)", "toolbox.dates.Clock.at": "(zone)",
    }  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        function("_hidden", "Not for you to see."),
        f"class _Hidden:\n    {function('shown', 'Not for you either, sorry.').replace(chr(10), chr(10) + '    ')}",
        f"class Shown:\n    {function('__len__', 'The number of its parts.').replace(chr(10), chr(10) + '    ')}",
        f"def outer():\n    {function('inner', 'Inside of another function only.').replace(chr(10), chr(10) + '    ')}",
        'def short():\n    """Only a summary is here."""\n',
        function("thin", "Two words."),
        function("thin", "Enough words for a summary.", "Too few words to search."),
        function("long", " ".join(["word"] * 41)),
        "def undocumented(): pass\n",
        "def broken(:\n",
        "print 'Python 2'\n",
        "\0",
    ],
)
def test_what_is_private_thin_or_no_python_is_left_out(source, tmp_path):
    assert found_in(tmp_path, source) == {}


def test_objects_under_conditions_are_found(tmp_path):
    inner = function("fast", "The fast way of it.").replace("\n", "\n    ")
    assert list(
        found_in(tmp_path, f"try:\n    import missing\nexcept ImportError:\n    pass\nif True:\n    {inner}")
    ) == ["toolbox.dates.fast"]


def test_invalid_escapes_in_other_peoples_sources_are_no_matter(tmp_path):
    assert list(
        found_in(tmp_path, 'PATTERN = "\\d"\n' + function("match", "Find the first digit."))
    ) == ["toolbox.dates.match"]


@pytest.fixture
def installation(tmp_path, monkeypatch) -> Path:
    """A standard library of five packages and no dependencies. Importing any of them would leave a mark."""
    library, mark = tmp_path / "lib", str(tmp_path / "imported")
    sources = {
        "toolbox/__init__.py": "",
        "toolbox/dates.py": function("parse", "Turn text into dates.", BODY + " One.")
        + function("write", "Turn dates into text.", BODY + " Two.")
        + function("_secret", "Turn nothing into nothing.", BODY),
        "toolbox/alone.py": function("only", "Nobody else is here.", BODY + " Three."),
        "toolbox/tests/test_dates.py": function("check", "Check all of the dates.", BODY + " Four."),
        "toolbox/broken.py": "def broken(:\n",
        "zoo.py": function("one", "The only file there is.", BODY + " Five.")
        + function("again", "Turn text into dates.", BODY + " Six."),
        "json/__init__.py": function("loads", "Read it from a string.", BODY + " Seven.")
        + function("dumps", "Write it to a string.", BODY + " Eight."),
        "_pydatetime.py": function("today", "The day that it is.", BODY + " Nine."),
        "rich/__init__.py": function("show", "Print it in many colours.", BODY + " Ten."),
    }  # fmt: skip
    for name, source in sources.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(SIDE_EFFECT.format(mark=mark) + source)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(
        sys, "stdlib_module_names", frozenset({"toolbox", "zoo", "json", "_pydatetime", "rich", "not_there"})
    )
    monkeypatch.setattr(pydocs, "PROJECT", "packaging")  # an installed distribution that requires nothing
    yield library
    assert not Path(mark).exists()


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_harvest_splits_by_package_and_imports_nothing(installation, tmp_path):
    folder = pydocs.build(tmp_path / "pydocs")
    train = rows(folder / "train.jsonl")
    # not zoo.again: its summary is known
    assert [row["name"] for row in train] == [
        "toolbox.alone.only", "toolbox.dates.parse", "toolbox.dates.write", "zoo.one"
    ]
    assert json.loads((folder / "manifest.json").read_text())["packages"] == {
        "train": ["toolbox", "zoo"], "dev": ["rich"], "test": ["_pydatetime", "json"]
    }
    for split, names in (("dev", ["rich.show"]), ("test", ["_pydatetime.today", "json.dumps", "json.loads"])):
        found = beir.read_retrieval(folder / f"pydocs_{split}", split)
        assert list(found.corpus) == names
        assert found.qrels == {f"q:{name}": {name: 1} for name in names}
    assert [row["_id"] for row in rows(folder / "everything" / "corpus.jsonl")] == [
        "_pydatetime.today", "json.dumps", "json.loads", "rich.show", *(row["name"] for row in train),
    ]  # fmt: skip


def test_the_hard_negative_is_another_object_of_the_same_module(installation, tmp_path):
    by_name = {row["name"]: row for row in rows(pydocs.build(tmp_path / "pydocs") / "train.jsonl")}
    assert by_name["toolbox.dates.parse"]["negative"] == by_name["toolbox.dates.write"]["positive"]
    assert by_name["toolbox.dates.write"]["negative"] == by_name["toolbox.dates.parse"]["positive"]
    assert by_name["toolbox.alone.only"]["negative"] != by_name["toolbox.alone.only"]["positive"]  # alone in its module


def test_the_harvest_is_deterministic_and_its_hash_tells_any_change(installation, tmp_path):
    one, two = pydocs.build(tmp_path / "one"), pydocs.build(tmp_path / "two")
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    (installation / "zoo.py").write_text(function("one", "The only file there is.", BODY + " Changed."))
    three = pydocs.build(tmp_path / "three")
    hashes = [json.loads((folder / "manifest.json").read_text())["sha256"] for folder in (one, two, three)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_whole_harvest_is_used_again_and_a_killed_one_is_not(installation, tmp_path):
    folder = pydocs.build(tmp_path / "pydocs")
    (folder / "train.jsonl").write_text("kept")
    assert (pydocs.build(folder) / "train.jsonl").read_text() == "kept"
    (folder / "manifest.json").unlink()  # written last
    assert len(rows(pydocs.build(folder) / "train.jsonl")) == 4


def test_a_harvest_of_other_packages_in_its_place_is_said(installation, tmp_path, monkeypatch, caplog):
    """The tests that scores were measured on are other ones then."""
    folder, version = pydocs.build(tmp_path / "pydocs"), sys.version.split()[0]
    monkeypatch.setattr(sys, "version", f"{sys.version} of another build")
    pydocs.build(folder)
    assert not caplog.text  # the same texts: nobody need know
    monkeypatch.setattr(sys, "version", "3.99.0")
    (installation / "zoo.py").write_text(function("one", "The only file there is.", BODY + " Changed."))
    pydocs.build(folder)
    assert f"{folder} is harvested anew: it is that of a Python {version} with other" in caplog.text
    assert "than those of this one, 3.99.0, or of another version of sgpt; scores on it are no longer" in caplog.text


def test_the_reader_gives_the_harvest_as_examples(installation, tmp_path):
    examples = read_examples(DataConfig("pydocs", str(tmp_path / "pydocs"), num_hard_negatives=1), tmp_path / "cache")
    assert [(example.query, len(example.hard_negatives)) for example in examples][-1] == ("The only file there is.", 1)


def test_evaluation_packages_and_their_python_twins_are_held_out():
    expected = {
        "json": "test", "datetime": "test", "_pydatetime": "test", "rich": "dev", "ast": "train", "_pyio": "train",
        "numpy": "train"
    }
    assert {package: split_of(package) for package in expected} == expected
    assert not set(pydocs.EVALUATION["dev"]) & set(pydocs.EVALUATION["test"])


def test_a_character_that_no_reader_takes_is_left_out(tmp_path):
    """Some docstrings spell "\\0" in a string that is not raw, and a NUL is no text for any tokenizer or data file."""
    body = "The end is marked by a \\0 character as C programs mark it, and nothing behind is read."
    (tmp_path / "held.py").write_text(f'def cut(text):\n    """Cuts the text at its end.\n\n    {body}\n    """\n')
    (found,) = documented_objects(tmp_path / "held.py", "held")
    assert "\0" not in found.summary + found.document
    assert "marked by a character" in " ".join(found.document.split())
