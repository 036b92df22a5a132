"""Commands that are printed work when they are typed, whatever the folders are called; names that no file can have are
one sentence.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sgpt.runtime.overrides import argument, as_typed
from tests.starts import REPOSITORY

NAMES = [
    "a,b", "a b", "it's", "[x]", "e=3", "{q}", "a[/b]", 'd$x `y` "z"', "'z'", "x${y}", "null", "1e5", "n;m&o|p", "é~",
    "-n", "back\\slash"
]


def words(command: str) -> list[str]:
    """As the shell reads it."""
    return subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]


def read(typed: str, script: str) -> object:
    """The value that the script gets."""
    key, value = typed.partition("=")[0], OverridesParser.create().parse_overrides(as_typed([typed], script))[0].value()
    return OmegaConf.to_container(OmegaConf.create({key: value}), resolve=True)[key]


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_is_printed_is_read_as_the_same_text(name):
    for script, key in (
        ("search", "run"), ("export", "run"), ("evaluate", "model"), ("rerank", "data"), ("train", "runs"),
        ("verify", "model"),
    ):
        assert read(*words(argument(key, name)), script) == name
        assert read(*words(argument(key, f"{name}/run")), script) == f"{name}/run"
    assert read(*words(argument("retrieval", [name, "b"])), "evaluate") == [name, "b"]


def test_a_file_with_a_comma_in_its_name_is_one_where_it_is_there(tmp_path, monkeypatch):
    (tmp_path / "a,b ,c").mkdir()
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read("retrieval=[a,b ,c, d]", "evaluate") == ["a,b ,c", "d"]
    assert read("retrieval=[d,c]", "evaluate") == ["d", "c"]


@pytest.mark.parametrize("name", [
    pytest.param("a,b [x] {c} e=3", marks=pytest.mark.slow),
    """it's "q" $x `y` ${z} ~é; n&m|o\\\\""",
    pytest.param("'z'", marks=pytest.mark.slow),
])
def test_the_command_that_a_run_ends_with_finds_when_it_is_typed(tmp_path, start, training, name):
    folder = tmp_path / name
    folder.mkdir()
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"d{n}", "text": f"{n} is behind {n - 1}"}) + "\n" for n in range(9)))
    runs = argument("runs", str(folder))
    ended = start("biencoder", *training(tmp_path), *words(runs))
    assert ended.code == 0, ended.said
    [command] = [
        line.removeprefix("search it   ") for line in ended.said.splitlines() if line.startswith("search it   ")
    ]
    python, script, *arguments = words(
        command.replace("corpus=<JSON lines of _id and text>", argument("corpus", str(corpus)))
    )
    assert (Path(python).name, Path(script)) == (Path(sys.executable).name, REPOSITORY / "train" / "search.py")
    found = start("search", *arguments, "query=7 is behind 6", "top=3")
    assert (found.code, found.said.count("is behind")) == (0, 3), found.said
    exported = start(
        "export", *words(argument("run", str(folder / "run"))), *words(argument("output", str(folder / "again")))
    )
    assert exported.code == 0, exported.said
    assert (folder / "again" / "model.safetensors").read_bytes() == (
        folder / "run" / "export" / "model.safetensors"
    ).read_bytes()


def test_the_line_works_in_a_shell_from_another_folder(tmp_path, start, training):
    ended = start("biencoder", *training(tmp_path), *words(argument("runs", str(tmp_path / "it's, a"))))
    [command] = [
        line.removeprefix("search it   ") for line in ended.said.splitlines() if line.startswith("search it   ")
    ]
    typed = command.replace("corpus=<JSON lines of _id and text>", "query=7 corpus=corpus.jsonl")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "seven"}\n')
    found = subprocess.run(
        ["bash", "-c", typed], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert (found.returncode, found.stdout.split()[1:]) == (0, ["a", "seven"]), found.stderr


@pytest.mark.parametrize(("key", "odd"), [
    ("name", "x" * 300), ("runs", "x/" * 3000), ("data.cache", "x" * 300),
    *(pytest.param(key, odd, marks=pytest.mark.slow) for key in ("name", "data.path", "model.path", "evaluation.sts")
      for odd in ("x" * 300, "x/" * 3000, "a\0b")),
])  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path, start, training, key, odd):
    refused = start("biencoder", *training(tmp_path), f"{key}=[{odd}]" if key == "evaluation.sts" else f"{key}={odd}")
    assert odd[:3].replace("\0", "\\x00") in refused.sentence
    assert len(refused.sentence) < 1500
    assert "\0" not in odd or key in refused.sentence


SCRIPT = f"{sys.executable} {REPOSITORY / 'train' / 'search.py'}"


@pytest.mark.parametrize(("command", "code", "said"), [
    (f"{SCRIPT} querry=0 <&- >&-", 2, "error: querry=0: there is no key 'querry'; did you mean query?\n"),
    (
        f"mkdir gone && cd gone && rmdir ../gone && {SCRIPT} run=x", 2,
        "error: the working directory is not there any more; cd to one that is\n"
    ),
    (
        f"{SCRIPT} --help > /dev/full", 2,
        "error: the output could not be written: the disk is full; make room, then start it again\n"
    ),
    (
        f"{SCRIPT} run=x --config-dir=odd --config-name=latin", 2,
        "not in UTF-8 (invalid continuation byte at byte 7); save it as UTF-8\n"
    ),
    (
        f"{SCRIPT} run=x --config-dir=odd --config-name=open", 2,
        "line 2, column 1: while parsing a flow node; correct the YAML\n"
    ),
    (
        f"{SCRIPT} run=x hydra.run.dir=odd/open.yaml/below", 2,
        "error: odd/open.yaml/below: Not a directory; put it right, or set hydra.run.dir=<another path>\n"
    ),
    (f"{SCRIPT} top={'9' * 5000}", 2, "error: a number has more digits than can be read; write a smaller one\n"),
])  # fmt: skip
def test_what_happens_around_a_script_is_one_sentence(tmp_path, command, code, said):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "latin.yaml").write_bytes("query: é!\n".encode("latin-1"))
    (tmp_path / "odd" / "open.yaml").write_text("query: [1,\n")
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1), ended.stderr
    assert ended.stderr.endswith(said)


def test_a_fault_of_ours_keeps_its_traceback_and_says_that_it_is_one(tmp_path):
    """A script of our kind with a mistake in it."""
    (tmp_path / "faulty.py").write_text(
        'from sgpt.cli.command import script\n\n@script("export", groups=False)\ndef main(composed):\n    '
        '{}["x"]\n\nmain()\n'
    )
    ended = subprocess.run(
        [sys.executable, "faulty.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    expected = (
        "KeyError: 'x'\nThis is a fault of sgpt and not of your input. Please "
        "report it with the lines above and the command.\n"
    )
    assert expected in ended.stderr
