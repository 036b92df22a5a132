"""Indexes: exact search against one product in memory, kills, stale and half indexes, graphs against exact search."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.index import IndexConfig, open_index
from sgpt.retrieval.searcher import Searcher
from sgpt.retrieval.stored import StoredEmbeddings, read_description
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import hash_of
from sgpt.runtime.provenance import threads

WORDS = ["cat", "dog", "house", "tree", "river", "stone", "cloud", "train", "music", "bread"]
CORPUS = {f"d{n}": f"{WORDS[n % 10]} and {WORDS[n // 10]} {n}" for n in range(100)}
MANY = {f"d{n}": " ".join(WORDS[int(digit)] for digit in str(n)) for n in range(2000)}
QUERIES = ["a house by the river", "music", "bread 7", "and"]
BLOCKS = IndexConfig(documents_per_block=16)


@pytest.fixture(scope="module")
def encoder(tiny_base) -> Encoder:
    return Encoder.from_pretrained(tiny_base("gpt_neo"))


@pytest.fixture(scope="module")
def queries(encoder) -> torch.Tensor:
    return encoder.encode_queries(QUERIES, normalize=True, as_tensor=True)


@pytest.fixture
def encoded(encoder, monkeypatch) -> list[str]:
    """The documents that are encoded from here on."""
    seen: list[str] = []
    whole = encoder.encode_documents

    def noted(texts: list[str], **options) -> np.ndarray | torch.Tensor:
        seen.extend(texts)
        return whole(texts, **options)

    monkeypatch.setattr(encoder, "encode_documents", noted)
    return seen


def in_memory(encoder: Encoder, corpus: dict[str, str]) -> torch.Tensor:
    return encoder.encode_documents(list(corpus.values()), normalize=True, as_tensor=True)


# --- exact ---


# float16 rounds entries below 1 by 2.4e-4 at most
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_exact_search_by_memory_map_finds_what_one_product_in_memory_finds(
    encoder, queries, tmp_path, dtype, tolerance
):
    scores, rows = open_index(
        encoder, CORPUS, tmp_path / "index", IndexConfig(dtype=dtype, documents_per_block=16)
    )(queries, 7)
    product = queries @ in_memory(encoder, CORPUS).T
    torch.testing.assert_close(scores, product.sort(dim=1, descending=True).values[:, :7], rtol=0, atol=tolerance)
    torch.testing.assert_close(product.gather(1, rows), scores, rtol=0, atol=tolerance)
    assert np.load(tmp_path / "index" / "embeddings.npy", mmap_mode="r").dtype == dtype
    expected = {
        "fingerprint": encoder.fingerprint(CORPUS), "documents": 100, "dtype": dtype, "kind": "exact", "encoded": 100
    }
    description = read_description(tmp_path / "index")
    assert description.pop("environment")["threads"] == torch.get_num_threads()
    assert description.pop("model") == {"contract": encoder.contract.stated(), **encoder.hashes()}
    assert description.pop("embeddings_hash") == hash_of(tmp_path / "index" / "embeddings.npy")
    assert description == {**expected, "documents_per_block": 16}


def test_search_in_many_chunks_is_search_in_one(encoder, queries, tmp_path, monkeypatch):
    find = open_index(encoder, CORPUS, tmp_path / "index")
    whole = find(queries, 20)[0]
    monkeypatch.setattr("sgpt.retrieval.stored.CHUNK_BYTES", 4 * encoder.embedding_size * 7)  # 7 documents
    torch.testing.assert_close(find(queries, 20)[0], whole, rtol=0, atol=1e-6)


def test_a_searcher_gives_the_documents_best_first_and_all_of_a_small_corpus(encoder, tmp_path):
    corpus = {"one": "a cat", "two": "a dog", "three": "the river"}
    hits = Searcher(encoder, corpus, tmp_path / "index")("a cat", top=10)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert {hit.document_id: hit.text for hit in hits} == corpus


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_search_leaves_a_chunk_of_the_map_resident_and_not_the_map(tmp_path):
    def resident() -> int:
        return 1024 * int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

    size = 2**26
    np.save(tmp_path / "embeddings.npy", np.ones((size // 1024, 256), dtype=np.float32))
    stored, before, largest = StoredEmbeddings(tmp_path / "embeddings.npy"), resident(), 0
    for start in range(0, len(stored), stored.chunk):
        assert stored[start : start + stored.chunk].sum() > 0
        largest = max(largest, resident() - before)
    assert 2**23 <= largest < 2**24  # a chunk is 8 MiB


# --- building ---


# As a process of its own: each fork of it is killed when it comes to a document.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.index import IndexConfig, open_index
base, folder, corpus, kills = json.load(sys.stdin)
def killed(document):
    encoder = Encoder.from_pretrained(base)
    whole = encoder.encode_documents
    def encode(texts, **options):
        if document in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(texts, **options)
    encoder.encode_documents = encode
    open_index(encoder, corpus, Path(folder), IndexConfig(documents_per_block=16))
ends = []
for kill in kills:
    child = os.fork()
    if not child:
        killed(corpus[kill])
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    description = json.load(open(os.path.join(os.path.dirname(folder), ".index.building", "index.json")))
    ends.append([code, description["encoded"], os.path.exists(folder)])
print(json.dumps(ends))
"""


@pytest.mark.bitwise
def test_a_killed_build_looks_like_no_index_and_resumes_where_it_was_with_as_many_threads(
    encoder, encoded, tiny_base, tmp_path
):
    with threads(1):  # as the killed process has
        open_index(encoder, CORPUS, tmp_path / "whole", BLOCKS)
    encoded.clear()
    given = json.dumps([str(tiny_base("gpt_neo")), str(tmp_path / "index"), CORPUS, ["d20", "d70"]])
    ended = subprocess.run([sys.executable, "-c", KILLED], input=given, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[-9, 16, False], [-9, 64, False]]
    half = np.load(tmp_path / ".index.building" / "embeddings.npy", mmap_mode="r+")
    half[64:] = 7  # as a kill inside of a write leaves them
    half.flush()
    with threads(2):
        # other bits, were it to count
        open_index(encoder, CORPUS, tmp_path / "index", IndexConfig(documents_per_block=50))
        assert torch.get_num_threads() == 2
    assert encoded == list(CORPUS.values())[64:]
    for name in ("embeddings.npy", "index.json"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "whole"]


def test_an_index_is_used_again_until_a_text_a_weight_or_the_dtype_changes(encoder, encoded, tmp_path, caplog):
    folder = tmp_path / "index"

    def encodes(corpus: dict[str, str], **options) -> bool:
        encoded.clear()
        caplog.clear()
        open_index(encoder, corpus, folder, IndexConfig(**options))
        assert encoded in ([], list(corpus.values()))
        return bool(encoded)

    assert encodes(CORPUS)
    assert not encodes(CORPUS)
    assert not caplog.messages
    assert encodes({**CORPUS, "d3": "another text"})
    assert caplog.messages == [f"{folder}: is built again; changed: the documents"]
    assert encodes({**CORPUS, "d3": "another text"}, dtype="float16")
    assert caplog.messages == [f"{folder}: is built again; changed: dtype: float32 -> float16"]
    bias = next(parameter for name, parameter in encoder.trunk.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        bias += 1
    assert encodes({**CORPUS, "d3": "another text"}, dtype="float16")
    assert re.fullmatch(r".*: is built again; changed: weights: \w{64} -> \w{64}", caplog.messages[0])
    assert not encodes({**CORPUS, "d3": "another text"}, dtype="float16")
    with torch.no_grad():
        bias -= 1
    # as before there were dtypes
    (folder / "index.json").write_text(json.dumps({"fingerprint": encoder.fingerprint(CORPUS), "documents": 100}))
    assert encodes(CORPUS)


def zeroed(file: Path) -> None:
    with file.open("r+b") as content:
        content.seek(200)  # behind the header
        content.write(bytes(4000))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("index.json", lambda file: file.write_text(""), "index.json is missing or no JSON object"),
        ("index.json", lambda file: file.write_text("[]"), "index.json is missing or no JSON object"),
        ("embeddings.npy", lambda file: file.write_bytes(file.read_bytes()[:5000]), "embeddings.npy is missing, or"),
        ("embeddings.npy", Path.unlink, "embeddings.npy is missing, or not as it was written"),
        ("embeddings.npy", zeroed, "embeddings.npy is missing, or not as it was written"),
    ],
)
def test_a_damaged_index_is_built_again(encoder, encoded, queries, tmp_path, caplog, name, damage, reason):
    expected = open_index(encoder, CORPUS, tmp_path / "index")(queries, 3)
    encoded.clear()
    damage(tmp_path / "index" / name)
    torch.testing.assert_close(open_index(encoder, CORPUS, tmp_path / "index")(queries, 3), expected)
    assert encoded == list(CORPUS.values())
    assert f"{tmp_path / 'index'}: is built again; {reason}" in caplog.text


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("embeddings.npy", lambda file: file.write_bytes(file.read_bytes()[:5000])),
        ("embeddings.npy", lambda file: file.write_bytes(b"no array" + file.read_bytes()[8:])),
        ("embeddings.npy", Path.unlink),
        ("embeddings.npy", zeroed),
        ("index.json", lambda file: file.write_text(file.read_text().replace("documents_per_block", "other"))),
    ],
)
def test_a_damaged_half_build_is_begun_anew_and_said(encoder, encoded, queries, tmp_path, caplog, name, damage):
    expected = open_index(encoder, CORPUS, tmp_path / "whole")(queries, 3)
    texts, done = list(CORPUS.values()), []

    def killed(of_block: list[str], **options) -> np.ndarray:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(of_block)
        return Encoder.encode_documents(encoder, of_block, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "encode_documents", killed)
        with pytest.raises(KeyboardInterrupt):
            open_index(encoder, CORPUS, tmp_path / "index", BLOCKS)
    damage(tmp_path / ".index.building" / name)
    encoded.clear()
    torch.testing.assert_close(open_index(encoder, CORPUS, tmp_path / "index", BLOCKS)(queries, 3), expected)
    assert encoded == texts
    assert "the unfinished index is built again from the start; it is not as it was written" in caplog.text


def test_the_half_build_of_another_corpus_is_not_gone_on_with(encoder, encoded, tmp_path):
    open_index(encoder, CORPUS, tmp_path / "index", BLOCKS)
    (tmp_path / "index").rename(tmp_path / ".index.building")
    encoded.clear()
    open_index(encoder, {**CORPUS, "d3": "another text"}, tmp_path / "index", BLOCKS)
    assert len(encoded) == 100


def test_a_half_build_by_another_version_is_begun_anew_and_said(encoder, encoded, tmp_path, caplog):
    open_index(encoder, CORPUS, tmp_path / "index", BLOCKS)
    (tmp_path / "index").rename(building := tmp_path / ".index.building")
    description = read_description(building)
    description["environment"]["versions"]["torch"] = "1.0"
    (building / "index.json").write_text(json.dumps({**description, "encoded": 64}))
    encoded.clear()
    open_index(encoder, CORPUS, tmp_path / "index", BLOCKS)
    assert len(encoded) == 100
    assert "because the environment has changed: torch 1.0 -> " in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hnsw"}, r"index\.kind='hnsw' is unknown; choose exact or faiss"),
        ({"dtype": "int8"}, r"index\.dtype='int8' is unknown; choose float32 or float16"),
        ({"documents_per_block": 0}, r"index\.documents_per_block=0 must be 1 or more"),
    ],
)
def test_an_unknown_choice_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        IndexConfig(**options)


def test_a_corpus_without_documents_is_refused(encoder, tmp_path):
    with pytest.raises(InputError, match=r"index: the corpus is empty, so there is nothing to index; give one"):
        open_index(encoder, {}, tmp_path / "index")


def test_without_faiss_its_kind_is_refused_before_anything_is_encoded(encoder, encoded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        InputError,
        match=r"index\.kind=faiss: faiss is not installed; pip install 'sgpt-framework\[faiss\]', or .* "
        r"index\.kind=exact"
    ):
        open_index(encoder, CORPUS, tmp_path / "index", IndexConfig("faiss"))
    assert not encoded
    assert not list(tmp_path.iterdir())


# --- graphs ---


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_graphs_find_99_percent_of_what_exact_search_finds(encoder, tmp_path, monkeypatch, dtype, tolerance):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    monkeypatch.setattr("sgpt.retrieval.graph.GRAPH_BYTES", 32 * 4 * 900)  # several files
    find = open_index(encoder, MANY, tmp_path / "index", IndexConfig("faiss", dtype))
    description, documents = read_description(tmp_path / "index"), in_memory(encoder, MANY)
    assert description["kind"] == "faiss"
    assert 16 <= description["effort"] < 2000
    assert description["recall_at_10"] >= 0.99
    ends = ["0-900", "1800-2000", "900-1800"] if dtype == "float32" else ["0-1800", "1800-2000"]
    assert sorted(file.stem for file in (tmp_path / "index").glob("*.faiss")) == [f"graph-{end}" for end in ends]
    scores, rows = find(documents, 10)  # all documents, where the index took a sample
    product = documents @ documents.T
    torch.testing.assert_close(scores, product.gather(1, rows), rtol=0, atol=tolerance)
    expected = product.topk(10, dim=1).values
    assert (product.gather(1, rows) >= expected[:, -1:] - tolerance).float().mean() >= 0.98


def test_graphs_are_opened_by_memory_map(encoder, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    find = open_index(encoder, CORPUS, tmp_path / "index", IndexConfig("faiss"))
    assert len(find.parts) == 1
    assert str(tmp_path / "index" / "graph-0-100.faiss") in Path("/proc/self/maps").read_text()


def test_a_killed_build_of_graphs_keeps_those_that_are_whole(encoder, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    monkeypatch.setattr("sgpt.retrieval.graph.GRAPH_BYTES", 32 * 4 * 40)
    folder, write, written = tmp_path / "index", faiss.write_index, []

    def full(index: object, file: str) -> None:
        if len(written) == 2:
            raise OSError("no space left")
        written.append(file)
        write(index, file)

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match="no space left"):
        open_index(encoder, CORPUS, folder, IndexConfig("faiss"))
    assert read_description(folder)["kind"] == "exact"
    written.clear()
    rows = open_index(encoder, CORPUS, folder, IndexConfig("faiss"))(in_memory(encoder, CORPUS), 1)[1]
    assert [Path(file).name for file in written] == ["graph-80-100.tmp"]
    assert rows.flatten().tolist() == list(range(100))


@pytest.mark.parametrize("damage", ["truncated", "a byte", "missing"])
def test_a_damaged_graph_is_built_again(encoder, encoded, tmp_path, caplog, damage):
    """faiss itself checks no more than the beginning and the end."""
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    folder = tmp_path / "index"
    queries = in_memory(encoder, CORPUS)
    expected = open_index(encoder, CORPUS, folder, IndexConfig("faiss"))(queries, 3)
    encoded.clear()
    graph = folder / "graph-0-100.faiss"
    whole = graph.read_bytes()
    half = len(whole) // 2
    graph.unlink()
    if damage != "missing":
        graph.write_bytes(whole[:half] + (bytes([whole[half] ^ 64]) + whole[half + 1 :] if damage == "a byte" else b""))
    torch.testing.assert_close(open_index(encoder, CORPUS, folder, IndexConfig("faiss"))(queries, 3), expected)
    assert not encoded
    assert "graph-0-100.faiss: is built again; it is missing, or not as it was written" in caplog.text


def test_another_kind_uses_the_same_embeddings(encoder, encoded, queries, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    exact = open_index(encoder, CORPUS, tmp_path / "index")(queries, 3)
    encoded.clear()
    for kind in ("faiss", "exact", "faiss"):
        scores, rows = open_index(encoder, CORPUS, tmp_path / "index", IndexConfig(kind))(queries, 3)
        assert rows.shape == scores.shape == (4, 3)
    assert not encoded
    torch.testing.assert_close(open_index(encoder, CORPUS, tmp_path / "index")(queries, 3), exact)


def test_all_documents_are_found_where_all_are_asked_for(encoder, queries, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    scores, rows = open_index(encoder, CORPUS, tmp_path / "index", IndexConfig("faiss"))(queries, 1000)
    assert rows.sort(dim=1).values.tolist() == [list(range(100))] * 4
    torch.testing.assert_close(
        scores, (queries @ in_memory(encoder, CORPUS).T).sort(dim=1, descending=True).values, rtol=0, atol=1e-6
    )


def test_a_graph_of_one_document_finds_it(encoder, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install 'sgpt-framework[faiss]'")
    hits = Searcher(encoder, {"only": "a cat"}, tmp_path / "index", IndexConfig("faiss"))("a dog")
    assert [hit.document_id for hit in hits] == ["only"]
    cosine = F.cosine_similarity(
        encoder.encode_queries(["a dog"], as_tensor=True), encoder.encode_documents(["a cat"], as_tensor=True)
    )
    assert hits[0].score == pytest.approx(cosine.item(), abs=1e-5)
