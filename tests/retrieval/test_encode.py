"""Encoded corpora: the encoder's own embeddings, after kills and by two processes, and searched in two databases."""

import ast
import gzip
import json
import os
import random
import re
import shutil
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.encode import EncodeConfig, encode_texts, open_encoded, read_shard
from sgpt.retrieval.smaller import SizeConfig, Sizing
from sgpt.runtime.errors import InputError
from tests.starts import REPOSITORY, Start, beir, blocks, free_port, start_all

WORDS = ["parser", "argument", "help", "option", "value", "name", "type", "action", "group", "error"]
PER_SHARD = 16
SIZED = ["reduce=pca", "dimensions=16", "precision=int8"]


def random_texts(number: int) -> dict[str, str]:
    chance = random.Random(0)
    return {f"d{n}": " ".join(chance.choices(WORDS, k=chance.randint(1, 30))) for n in range(number)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """150 documents, the last of which is empty, and 5 queries."""
    queries = {f"q{n}": " ".join(random.Random(n).sample(WORDS, k=3)) for n in range(5)}
    corpus = random_texts(149) | {"empty": ""}
    return beir(tmp_path_factory.mktemp("encode") / "toy", corpus, queries, {"q0": {"d0": 1}})


@pytest.fixture(scope="module")
def started(toy, tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    (folder / "toy").symlink_to(toy)
    (folder / "runs").mkdir()
    (folder / "runs" / "pydocs").symlink_to(tiny_base("gpt_neo"))
    (folder / "other").symlink_to(tiny_base("gpt2"))
    common = ["texts=toy", "model=runs/pydocs", f"texts_per_shard={PER_SHARD}", "threads=1"]
    return folder, start_all("encode", folder, {
        "whole": Start([*common, "output=vectors"]),
        "killed": Start([*common, "output=killed"], ("killed.part-0", 2)),
        "not resumed": Start([*common, "output=killed"]),
        "other model": Start([*common, "output=killed", "model=other", "resume=true"]),
        "resumed": Start([*common, "output=killed", "resume=true"], port=free_port()),
        "again": Start([*common, "output=vectors", "resume=true"]),
        "sized": Start([*common, "output=sized", "format=npy", *SIZED], port=free_port()),
        "sized, killed": Start([*common, "output=sized_killed", "format=npy", *SIZED], ("sized_killed.part-0", 3)),
        "sized, resumed": Start([*common, "output=sized_killed", "format=npy", *SIZED, "resume=true"]),
        "queries": Start([*common, "output=queries", "role=query", "precision=float16"]),
    })  # fmt: skip


@pytest.fixture(scope="module")
def encoder(started) -> Encoder:
    return Encoder.from_pretrained(started[0] / "runs" / "pydocs")  # by another path than the one that was encoded with


@pytest.fixture(scope="module")
def expected(encoder, toy) -> np.ndarray:
    """[150, D], encoded in slices as large as the shards."""
    texts = [*random_texts(149).values(), ""]
    parts = [texts[start : start + PER_SHARD] for start in range(0, len(texts), PER_SHARD)]
    return np.concatenate([encoder.encode_documents(part, normalize=True) for part in parts])


def vectors_of(folder: Path) -> tuple[list[str], np.ndarray]:
    """As any reader of Parquet has them."""
    table = pa.concat_tables([parquet.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    return table["id"].to_pylist(), np.array(table["vector"].to_pylist())


def test_parquet_holds_the_encoders_embeddings_in_order(started, expected):
    folder, ended = started
    assert ended["whole"].codes == [0], ended["whole"].err
    ids, vectors = vectors_of(folder / "vectors")
    assert ids == [*(f"d{n}" for n in range(149)), "empty"]
    # to rounding: what a text is computed with, and by how many threads, moves its last bits
    np.testing.assert_allclose(vectors.astype(np.float32), expected, atol=1e-6)
    schema = parquet.read_schema(folder / "vectors" / "00000.parquet")
    assert schema.field("vector").type.equals(pa.list_(schema.field("vector").type.value_field, 32))
    assert schema.field("vector").type.value_type == pa.float32()
    assert "encoded 150 texts in" in ended["whole"].err
    assert "texts/s, by 1 process(es)" in ended["whole"].err
    assert "150 texts, 32 dimensions of float32, 10 file(s)" in ended["whole"].out


@pytest.mark.bitwise
def test_a_killed_job_resumes_where_it_was_by_any_number_of_processes(started):
    folder, ended = started
    assert (ended["killed"].codes, ended["resumed"].codes) == ([-9], [0, 0]), ended["resumed"].err
    done = blocks(ended["killed"], "block")
    assert done == list(range(len(done)))
    assert 2 <= len(done) < 10
    assert "killed" not in ended["killed"].files
    assert f"encoded {150 - PER_SHARD * len(done)} texts in" in ended["resumed"].err
    assert "by 2 process(es)" in ended["resumed"].err
    for file in (folder / "vectors").iterdir():
        assert (folder / "killed" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not [name for name in ended["resumed"].files if "building" in name or ".part-" in name]


def test_unfinished_finished_and_other_outputs_are_told_apart(started):
    _, ended = started
    assert ended["not resumed"].codes == ended["other model"].codes == [2]
    assert "killed is unfinished, see killed.manifest.json; resume with resume=true" in ended["not resumed"].err
    assert "killed was started with another configuration: model: runs/pydocs -> other" in ended["other model"].err
    assert ended["again"].codes == [0]
    assert "vectors was finished at 2" in ended["again"].err
    assert "nothing is encoded" in ended["again"].err


@pytest.mark.parametrize("content", ["{", "[]", '{"inputs": {}}', '{"config": 1}'])
def test_a_manifest_that_is_damaged_is_told(content, tiny_base, toy, tmp_path):
    config = EncodeConfig(model=str(tiny_base("gpt_neo")), texts=str(toy), output=str(tmp_path / "out"), threads=1)
    encode_texts(config)
    (tmp_path / "out.manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"out\.manifest\.json is damaged, so .*out cannot be resumed; put that file"):
        encode_texts(replace(config, resume=True))


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_an_output_that_is_no_longer_whole_is_not_called_finished(form, tiny_base, toy, tmp_path):
    config = EncodeConfig(
        model=str(tiny_base("gpt_neo")), texts=str(toy), output=str(tmp_path / "out"), threads=1, format=form
    )
    whole = encode_texts(config)
    config.resume = True
    assert encode_texts(config) == whole
    shard = tmp_path / "out" / f"00000.{form}"
    size = shard.stat().st_size
    os.truncate(shard, 200)
    with pytest.raises(InputError, match=rf"00000\.{form}: the file has 200 of {size:,} bytes; put the whole folder"):
        encode_texts(config)
    shard.unlink()
    with pytest.raises(InputError, match=rf"00000\.{form}: the file is missing; put the whole folder back, or remove"):
        encode_texts(config)
    shutil.rmtree(tmp_path / "out")
    assert encode_texts(config) == whole


def test_a_model_whose_weights_changed_is_refused_on_the_same_output(tiny_base, toy, tmp_path):
    config = EncodeConfig(model=str(tmp_path / "model"), texts=str(toy), output=str(tmp_path / "out"), threads=1)
    (tmp_path / "model").symlink_to(tiny_base("gpt_neo"))
    encode_texts(config)
    (tmp_path / "model").unlink()
    (tmp_path / "model").symlink_to(tiny_base("gpt2"))
    config.resume = True
    with pytest.raises(InputError, match=r"out was started with other inputs .*model .* has changed \(hash"):
        encode_texts(config)


@pytest.mark.bitwise
def test_a_fitted_size_is_that_of_all_embeddings_also_after_a_kill(started, expected):
    folder, ended = started
    assert (ended["sized"].codes, ended["sized, killed"].codes) == ([0, 0], [-9]), ended["sized"].err
    assert ended["sized, resumed"].codes == [0], ended["sized, resumed"].err
    parts = np.array_split(expected, range(PER_SHARD, len(expected), PER_SHARD))
    sizing = Sizing.fit(SizeConfig("pca", 16, "int8"), True, lambda: iter(parts))
    by_hand = np.concatenate([sizing.encode(part) for part in parts])
    for name in ("sized", "sized_killed"):
        files = sorted((folder / name).glob("*.npy"))
        assert len(files) == 10
        assert not list((folder / name).glob("raw*"))
        ids, vectors = zip(*map(read_shard, files), strict=True)
        assert [one for of_file in ids for one in of_file][-1] == "empty"
        assert np.array_equal(np.concatenate(vectors), by_hand)


def test_queries_are_projected_as_the_vectors_were_and_another_model_is_refused(started, encoder, expected):
    folder, _ = started
    opened = open_encoded(folder / "sized", encoder)
    decoded = np.concatenate([opened.sizing.decode(vectors) for _, vectors in opened.shards()])
    scores = opened.queries(["parser argument"]) @ decoded.T
    exact = encoder.encode_queries(["parser argument"], normalize=True) @ expected.T
    assert np.corrcoef(scores[0], exact[0])[0, 1] > 0.99
    with pytest.raises(InputError, match="sized was encoded by another model than this one"):
        open_encoded(folder / "sized", Encoder.from_pretrained(folder / "other"))
    with pytest.raises(InputError, match=r"nowhere/_encoding\.json: no such file; encode with output="):
        open_encoded(folder / "nowhere", encoder)


def test_a_damaged_output_is_refused_in_a_sentence(started, encoder, tmp_path):
    shutil.copytree(started[0] / "vectors", tmp_path / "vectors")
    folder, file = tmp_path / "vectors", tmp_path / "vectors" / "_encoding.json"
    stated = json.loads(file.read_text())
    for text, sentence in [
        ("{", r"_encoding\.json: cannot be read as JSON"),
        (json.dumps({**stated, "format": 2}), r"format 2 is of another version of this framework, and format 1 is"),
        (json.dumps({**stated, "model": None}), r"key 'model' is None; encode the texts again"),
        (json.dumps({**stated, "size": {"reduce": "pca"}}), r"key 'size' is .*; encode the texts again"),
        (json.dumps({**stated, "files": ["00000.parquet", "x"]}), r"vectors/x: the file is missing; put the whole"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=sentence):
            open_encoded(folder, encoder)
    file.write_text(json.dumps(stated))
    whole = (folder / "00001.parquet").read_bytes()
    (folder / "00001.parquet").write_bytes(whole[:100] + bytes(len(whole) - 100))  # of the same size
    with pytest.raises(InputError, match=r"00001\.parquet: cannot be read \(.*\); encode the texts again"):
        list(open_encoded(folder, encoder).shards())


def test_the_queries_of_a_beir_folder_are_encoded_as_queries(started, encoder):
    folder, ended = started
    assert ended["queries"].codes == [0], ended["queries"].err
    ids, vectors = vectors_of(folder / "queries")
    assert ids == [f"q{n}" for n in range(5)]
    texts = [" ".join(random.Random(n).sample(WORDS, k=3)) for n in range(5)]
    assert np.array_equal(vectors, encoder.encode_queries(texts, normalize=True).astype(np.float16))
    description = json.loads((folder / "queries" / "_encoding.json").read_text())
    assert (description["role"], description["contract"]) == ("query", encoder.contract.fingerprint())


# --- databases ---


@pytest.mark.parametrize("database", ["lancedb", "qdrant_client"])
def test_the_lines_of_the_docs_find_what_exact_search_finds(database, started, encoder, expected):
    """docs/vectors.md, run as it stands in a folder that has its run and its vectors."""
    pytest.importorskip(database, reason="the extra `databases` is not installed")
    page = (REPOSITORY / "docs" / "vectors.md").read_text(encoding="utf-8")
    [lines] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if database in block]
    printed = StringIO()
    with chdir(started[0]), redirect_stdout(printed):
        exec(lines, {})
    hits = ast.literal_eval(printed.getvalue())
    scores = encoder.encode_queries(["parse a date from a string"], normalize=True).astype(np.float64) @ expected.T
    order = np.argsort(-scores[0])[:10]
    assert [identifier for identifier, _ in hits] == [f"d{row}" for row in order]
    assert np.abs([score for _, score in hits] - scores[0][order]).max() < 1e-5


# --- refused ---


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"_id": "a", "text": "x"}', '{"_id": "a", "text": "y"}'], "line 2: id 'a' was used before; ids must be"),
        (['{"_id": "a", "text": "x"}', '{"_id": 7, "text": "y"}'], "line 2: _id is 7, which is no text"),
        (['{"_id": "a", "text": "x"}', '{"_id": "b"}'], "line 2: needs the columns _id and text; it has _id"),
        (['{"_id": "a", "text": "x"}', "{"], "line 2: "),
        ([], "no rows in it; give a file with at least one"),
    ],
)
def test_bad_rows_are_refused_by_file_and_line_before_anything_is_written(lines, message, tiny_base, tmp_path):
    file = tmp_path / "texts.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(InputError, match=message) as refused:
        encode_texts(EncodeConfig(model=str(tiny_base("gpt2")), texts=str(file), output=str(tmp_path / "out")))
    assert str(file) in str(refused.value)
    assert [left.name for left in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": ""}, "set model=<folder>, texts=<BEIR folder or file> and output=<folder>"),
        ({"texts": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder; check the path"),
        ({"reduce": "prefix", "dimensions": 64}, "dimensions=64: .* has 32; take at most as many"),
        ({"role": "passage"}, "role='passage' is unknown; choose query or document"),
        ({"format": "csv"}, "format='csv' is unknown; choose parquet or npy"),
    ],
)
def test_what_cannot_be_encoded_is_refused(keys, message, tiny_base, toy, tmp_path):
    given = {"model": str(tiny_base("gpt2")), "texts": str(toy), "output": str(tmp_path / "out"), **keys}
    with pytest.raises(InputError, match=message):
        encode_texts(EncodeConfig(**given))
