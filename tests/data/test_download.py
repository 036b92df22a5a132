"""Downloads from a server of the standard library, on a socket of this machine: whole, or nothing there and one clear
sentence.
"""

import functools
import hashlib
import http.server
import io
import json
import socket
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgpt.data.test_sets import beir_sets
from sgpt.data.test_sets.beir_sets import find_beir_folders, read_beir_folder
from sgpt.data.test_sets.download import fetch
from sgpt.runtime.errors import InputError

REMEDY = "set beir_root=<folder that holds toy/>"
FILES = {
    "toy/corpus.jsonl": json.dumps({"_id": "d", "title": "A", "text": "text"}),
    "toy/queries.jsonl": json.dumps({"_id": "q", "text": "text"}),
    "toy/qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\n",
}  # fmt: skip


def zipped(files: dict[str, str], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


def damaged(content: bytes) -> bytes:
    """With a wrong byte in the compressed text; the table of contents is whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.infolist()[0]
        start = member.header_offset + 30 + len(member.filename)
    return content[:start] + bytes([content[start] | 6]) + content[start + 1 :]


def unknown_compression(content: bytes) -> bytes:
    """Method 97 for every member, in its own header and in the table of contents."""
    changed = bytearray(content)
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = content.find(signature)
        while place >= 0:
            changed[place + offset : place + offset + 2] = (97).to_bytes(2, "little")
            place = content.find(signature, place + 1)
    return bytes(changed)


def linked(name: str, target: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, target)
    return out.getvalue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; of `torn.zip` only the first half, under its whole length."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if not self.path.endswith("torn.zip"):
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[str, Path, list[str]]]:
    """The address, the folder that is served, and the paths asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, server.asked
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_zip_becomes_a_folder_and_nothing_else_stays(served, tmp_path):
    address, folder, _ = served
    (folder / "toy.zip").write_bytes(content := zipped(FILES))
    fetch(f"{address}/toy.zip", tmp_path / "root" / "toy", md5=hashlib.md5(content).hexdigest(), remedy=REMEDY)
    assert {
        str(file.relative_to(tmp_path / "root")): file.read_text() for file in (tmp_path / "root").rglob("*")
        if file.is_file()
    } == FILES
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["toy"]


def test_a_name_of_beir_is_downloaded_once_and_then_read_from_its_root(served, tmp_path, monkeypatch):
    address, folder, asked = served
    content = zipped({name.replace("toy", "scifact"): text for name, text in FILES.items()})
    (folder / "scifact.zip").write_bytes(content)
    with pytest.raises(
        InputError,
        match=rf"scifact\.zip: md5 {hashlib.md5(content).hexdigest()} of {len(content)} bytes, expected "
        rf"5f7d1de60b170fc8"
    ):
        find_beir_folders(["scifact"], None, tmp_path / "root", address=address)  # not the file that BEIR lists
    assert not list((tmp_path / "root").iterdir())
    monkeypatch.setitem(
        beir_sets.BEIR_SETS, "scifact", beir_sets.Rules(hashlib.md5(content).hexdigest(), sub_average=True)
    )
    for _ in range(2):
        [place] = find_beir_folders(["scifact"], None, tmp_path / "root", address=address)
        assert read_beir_folder(place).corpus == {"d": "A text"}
    assert asked == ["/scifact.zip"] * 2  # the refused one and the good one


@pytest.mark.parametrize(("name", "content", "message"), [
    ("torn", zipped(FILES), r"the download broke off after \d+ of \d+ bytes; start again"),
    ("none", None, r"none\.zip: the server answers 404"),
    ("text", b"<html>sorry</html>", r"text\.zip: no whole zip \(File is not a zip file\)"),
    ("empty", b"", r"empty\.zip: no whole zip"),
    ("damaged", damaged(zipped(FILES, zipfile.ZIP_DEFLATED)), r"damaged\.zip: no whole zip \(Error -3"),
    (
        "method", unknown_compression(zipped(FILES)),
        r"method\.zip: no whole zip \(That compression method is not supported\)"
    ),
    ("other", zipped({"elsewhere/corpus.jsonl": "x"}), r"other\.zip: holds no folder toy/"),
    (
        "up", zipped({**FILES, "../outside.txt": "x"}),
        r"up\.zip: its member '\.\./outside\.txt' would be written outside of its folder; set beir_root="
    ),
    ("deep", zipped({**FILES, "toy/../../outside.txt": "x"}), r"'toy/\.\./\.\./outside\.txt' would be written outside"),
    ("root", zipped({**FILES, "/tmp/outside.txt": "x"}), r"'/tmp/outside\.txt' would be written outside"),
    ("drive", zipped({**FILES, "c:/outside.txt": "x"}), r"'c:/outside\.txt' would be written outside"),
    ("link", linked("toy", "/etc"), r"its member 'toy' would be written outside"),
])  # fmt: skip
def test_what_is_broken_or_dangerous_leaves_nothing(name, content, message, served, tmp_path):
    address, folder, _ = served
    if content is not None:
        (folder / f"{name}.zip").write_bytes(content)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        fetch(f"{address}/{name}.zip", tmp_path / "root" / "toy", md5=None, remedy=REMEDY)
    assert str(caught.value).endswith(REMEDY)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "root"}


def test_without_a_network_the_sentence_says_so_and_how_to_do_without(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        message = (
            r"nfcorpus\.zip: cannot be downloaded, is there a network\? \(.*refused\); set beir_root=<folder that "
            r"holds nfcorpus/>"
        )
        with pytest.raises(InputError, match=message):
            find_beir_folders(["nfcorpus"], None, tmp_path, address=address)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_download_left_is_replaced(served, tmp_path):
    address, folder, _ = served
    (folder / "toy.zip").write_bytes(zipped(FILES))
    (tmp_path / "root" / ".toy.unpacked" / "toy").mkdir(parents=True)
    (tmp_path / "root" / ".toy.unpacked" / "toy" / "old.txt").write_text("half")
    (tmp_path / "root" / ".toy.zip").write_bytes(b"half")
    fetch(f"{address}/toy.zip", tmp_path / "root" / "toy", md5=None, remedy=REMEDY)
    assert {
        file.name for file in (tmp_path / "root").rglob("*") if file.is_file()
    } == {Path(name).name for name in FILES}
