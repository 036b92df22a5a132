"""The server as its clients see it: a real one on a port of its own, asked by OpenAI's client and by httpx."""

import asyncio
import base64
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.probes import measure
from sgpt.retrieval.index import IndexConfig
from sgpt.retrieval.searcher import Searcher, index_folder, load_encoder_and_reranker
from sgpt.runtime.errors import InputError
from sgpt.serving.config import EXTRA, ServeConfig
from tests.retrieval.test_search import CORPUS, tuned_run
from tests.starts import REPOSITORY

for library in (*EXTRA, "openai", "httpx"):
    pytest.importorskip(library, reason=f"{library} is not installed (pip install -e '.[dev]')")

import httpx  # noqa: E402
import openai  # noqa: E402
import uvicorn  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from sgpt.serving.app import create_app  # noqa: E402
from sgpt.serving.server import bind, open_page, open_served, served_name  # noqa: E402

TEXTS = [
    "parse a date", "", "?", "sort a list of names " * 3, "[[1]] {{a}} what?]", "naïve 東京 🙂", "<|endoftext|>",
    "open a file",
]  # fmt: skip
COSINE_BOUND = 1e-6  # of the distance: what a text is batched with changes the order of sums and nothing else


@contextmanager
def serving(model: Path, **keys) -> Iterator[str]:
    """The URL of a server that is up while this lasts."""
    config = ServeConfig(model=str(model), port=0, **keys)
    served = open_served(config)
    page = open_page(served, config) if config.corpus else None
    listening = bind(config.host, 0)
    server = uvicorn.Server(uvicorn.Config(create_app(served, config, page), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def runs(language_model, tmp_path_factory) -> Path:
    """Two runs, `first` and `legal`, over one base, and a corpus."""
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("first", "legal")):
        tuned_run(language_model("gpt2"), folder / name, seed)
    lines = [json.dumps({"_id": name, "text": text}) + "\n" for name, text in CORPUS.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def url(runs) -> Iterator[str]:
    keys = {"deltas": {"legal": str(runs / "legal")}, "rerank": True, "corpus": str(runs / "corpus.jsonl"), "depth": 3}
    with serving(runs / "first", **keys, max_body_bytes=50_000, max_texts=64, max_characters=3000) as url:
        yield url


@pytest.fixture(scope="module")
def encoders(runs) -> dict[str, Encoder]:
    """Each run by itself, as any script opens it."""
    return {name: Encoder.from_pretrained(runs / name / "adapter") for name in ("first", "legal")}


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """The largest cosine distance between rows, in float64."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return float((1 - (left * right).sum(-1) / norms).max())


def embed(url: str, input: str | list[str], **fields) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"input": input, **fields}, timeout=60)


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data])


# embeddings


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_client_gets_what_the_encoder_gives(url, encoders, encoding):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for role in ("query", "document"):
            answer = client.embeddings.create(
                input=TEXTS, model="first", encoding_format=encoding, extra_body={"input_type": role}
            )
            given = [one.embedding for one in answer.data]
            if encoding == "base64":  # asked for by its name, it comes as it is sent
                given = [np.frombuffer(base64.b64decode(one), "<f4") for one in given]
            expected = encoders["first"].encode(TEXTS, role)
            np.testing.assert_allclose(np.array(given), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
            ids = encoders["first"].token_ids(TEXTS, role)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
            assert (answer.model, answer.input_type, answer.truncated) == ("first", role, [])
        assert [model.id for model in client.models.list()] == ["first", "legal"]
        assert client.models.retrieve("legal").parent == "first"
        by_default = client.embeddings.create(input="parse a date", model="first")
        assert by_default.input_type == "document"
        assert distance([by_default.data[0].embedding], encoders["first"].encode_documents(["parse a date"])) < 1e-6
        with pytest.raises(openai.NotFoundError, match="model='other' is not served here; there are first, legal"):
            client.embeddings.create(input="a", model="other")
        with pytest.raises(openai.UnprocessableEntityError, match="token ids are not taken"):
            client.embeddings.create(input=[[1, 2]], model="first")


def test_64_requests_at_once_give_what_each_gives_alone(url, encoders):
    """Of all lengths, roles and deltas, mixed in batches; equal lengths as well, at which a peer lost its mask."""
    asked = []
    for number in range(64):
        texts = [("what is 7? " * (1 + number % 9))[: 8 + number % 40], f"{number % 10} is behind"][: 1 + number % 2]
        asked.append((texts, ("query", "document")[number % 2], (None, "legal")[number // 2 % 2]))
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda one: embed(url, one[0], input_type=one[1], delta=one[2]), asked))
    for (texts, role, delta), answer in zip(asked, answers, strict=True):
        given = vectors(answer)
        alone = np.concatenate([encoders[delta or "first"].encode([text], role) for text in texts])
        assert distance(given, alone) < COSINE_BOUND
        assert answer.json()["delta"] == delta
    families = {family.name: family for family in metrics(url)}
    largest = [sample for sample in families["sgpt_batch_items"].samples if sample.labels.get("kind") == "embed"]
    counts = {sample.labels["le"]: sample.value for sample in largest if "le" in sample.labels}
    assert counts["+Inf"] > counts["2.0"], "no batch held texts of several requests, so nothing was shown"


def test_a_delta_is_chosen_by_its_field_or_as_the_model_and_in_a_strength(url, encoders):
    by_field, by_model = embed(url, "a date", delta="legal"), embed(url, "a date", model="legal")
    assert by_field.json()["data"] == by_model.json()["data"]
    assert distance(vectors(by_field), encoders["legal"].encode_documents(["a date"])) < COSINE_BOUND
    base = [vectors(embed(url, "a date", delta=delta, strength=0)) for delta in (None, "legal")]
    assert distance(*base) < COSINE_BOUND  # the base is one and the same
    own, tuned = vectors(embed(url, "a date", strength=1.0)), encoders["first"].encode_documents(["a date"])
    assert distance(own, tuned) < COSINE_BOUND
    assert distance(base[0], tuned) > 1e-3
    half = vectors(embed(url, "a date", strength=0.5))
    assert min(distance(half, tuned), distance(half, base[0])) > 1e-4
    refused = embed(url, "a", delta="other")
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "delta")
    assert refused.json()["error"]["message"] == "delta='other' is not served here; there are first, legal"
    refused = embed(url, "a", model="legal", delta="first")
    assert refused.json()["error"]["message"] == "model='legal' and delta='first' are two; send one of them"
    assert embed(url, "a", model="first", delta="legal").json()["delta"] == "legal"


def test_dimensions_are_the_first_numbers_of_length_1(url):
    whole = vectors(embed(url, TEXTS))
    cut = vectors(embed(url, TEXTS, dimensions=8))
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    assert embed(url, "a", dimensions=33).json()["error"]["message"] == "dimensions=33 is more than the 32 of the model"


def test_truncation_is_said_or_refused(url, runs, encoders):
    long = "sort a list of names " * 20
    answer = embed(url, ["a", long, "b", long])
    assert answer.json()["truncated"] == [1, 3]
    assert distance(vectors(answer), encoders["first"].encode_documents(["a", long, "b", long])) < COSINE_BOUND
    refused = embed(url, ["a", long], truncate=False)
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("input[1] is longer than the model reads; shorten it")
    with serving(runs / "first", truncation="refuse") as strict:
        assert embed(strict, long).status_code == 422
        assert embed(strict, long, truncate=True).json()["truncated"] == [0]


@pytest.mark.parametrize(("body", "status", "sentence"), [
    (b'{"input": ["a"', 400, "the body is not valid JSON (EOF while parsing"),
    (b"\xff\xfe", 400, "the body is not valid JSON"),
    (b"[1]", 422, "the body must be a JSON object"),
    (b"{}", 422, "the field 'input' is missing; send it"),
    (b'{"input": []}', 422, "input is empty; send one text at least"),
    (b'{"input": 3}', 422, "input=3: token ids are not taken"),
    (b'{"input": ["a", null]}', 422, "input=['a', None]: must be a string or a list of strings"),
    (b'{"input": "a", "input_typ": "query"}', 422, "the field 'input_typ' is unknown; the fields are input, model"),
    (b'{"input": "a", "input_type": "passage"}', 422, "input_type='passage': input should be 'query' or 'document'"),
    (b'{"input": "a", "dimensions": 0}', 422, "dimensions=0: input should be greater than or equal to 1"),
    (b'{"input": "a", "strength": "much"}', 422, "strength='much': input should be a valid number"),
    (b'{"input": "a", "model": "first", "delta": 3}', 422, "delta=3: input should be a valid string"),
    (json.dumps({"input": ["a"] * 65}).encode(), 422, "input holds 65 texts, and 64 are taken at a time"),
    (json.dumps({"input": ["a", "b" * 3001]}).encode(), 422, "input[1] has 3,001 characters, and 3,000 are taken"),
    (json.dumps({"input": "b" * 60_000}).encode(), 413, "the body is larger than 50,000 bytes"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(url, body, status, sentence):
    answer = httpx.post(f"{url}/v1/embeddings", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(sentence), answer.text
    assert "\n" not in answer.json()["error"]["message"]


def test_a_body_without_a_length_is_counted_as_it_comes(url):
    def parts() -> Iterator[bytes]:
        for _ in range(60):
            yield b" " * 1000

    assert httpx.post(f"{url}/v1/embeddings", content=parts()).status_code == 413


def test_a_text_without_a_token_is_refused_where_there_are_no_markers(tiny_base, runs):
    with serving(tiny_base("gpt2"), corpus=str(runs / "corpus.jsonl")) as url:
        assert embed(url, ["a", ""]).json()["error"]["message"].startswith("input[1] has no token")
        searched = httpx.post(f"{url}/search", json={"query": ""}).json()["error"]
        assert (searched["param"], searched["message"][:22]) == ("query", "query[0] has no token,")
        refused = embed(url, "a", strength=0.5).json()["error"]
        assert refused["message"].startswith("strength=0.5 needs a change to a base")


def test_an_embedding_that_is_no_number_is_refused_and_the_server_goes_on(url, encoders):
    """Next to requests that are good, in the same batch."""
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: embed(url, "a", strength=1e30 if number % 2 else None), range(8)))
    assert [answer.status_code for answer in answers] == [200, 422] * 4
    assert answers[1].json()["error"]["message"].startswith("first gives NaN or infinity for a text")
    expected = encoders["first"].encode_documents(["a"])
    assert all(distance(vectors(answer), expected) < COSINE_BOUND for answer in answers[::2])
    assert httpx.get(f"{url}/health").json()["ready"] is True


def test_half_a_body_is_no_fault_of_the_server(url, caplog):
    caplog.set_level(logging.INFO, "sgpt")
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
    give_up, lines = time.monotonic() + 20, []
    while not lines and time.monotonic() < give_up:
        time.sleep(0.01)
        lines = [line for line in caplog.messages if "POST /v1/embeddings 400" in line]
    assert "the connection ended before the whole body was there" in lines[0]
    assert not [record for record in caplog.records if record.exc_info]


# the re-ranker and the page


def test_documents_are_ranked_as_the_re_ranker_scores_them(url, language_model):
    documents = list(CORPUS.values())
    expected = CrossEncoder.from_pretrained(language_model("gpt2")).score(["a date"] * len(documents), documents)
    for fields in ({"documents": documents}, {"documents": [{"text": one} for one in documents]}):
        answer = httpx.post(f"{url}/rerank", json={"query": "a date", **fields, "top_n": 3, "return_documents": True})
        results = answer.json()["results"]
        assert [one["index"] for one in results] == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose([one["relevance_score"] for one in results], np.sort(expected)[::-1][:3], rtol=1e-5)
        assert [one["document"]["text"] for one in results] == [documents[one["index"]] for one in results]
    # text-embeddings-inference's: its own fields and answer
    answer = httpx.post(f"{url}/rerank", json={"query": "a date", "texts": documents, "raw_scores": True}).json()
    assert [row["index"] for row in answer] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([row["score"] for row in answer], np.sort(expected)[::-1], rtol=1e-5)
    with_text = httpx.post(f"{url}/rerank", json={"query": "a date", "texts": documents, "return_text": True}).json()
    by_its_rule = 1 / (1 + np.exp(-np.sort(expected)[::-1]))
    np.testing.assert_allclose([row["score"] for row in with_text], by_its_rule, rtol=1e-4)
    assert [row["text"] for row in with_text] == [documents[row["index"]] for row in answer]
    for body, said in (
        ({"texts": ["a", "b c d " * 200]}, "texts[1] is longer"),
        ({"documents": [{"text": "a", "title": "b"}]}, "documents.0 is an object of text, title, and only"),
        ({"documents": [{"txt": "a"}]}, "documents.0 is an object of txt, and only text is read"),
        ({"documents": ["a"], "return_text": True}, "return_text: with texts, and neither documents nor return_doc"),
        ({"texts": ["a"], "return_documents": True}, "texts: with texts, and neither documents nor return_documents"),
        ({"texts": ["a"], "truncation_direction": "right"}, "truncation_direction='right': input should be 'left'"),
    ):
        refused = httpx.post(f"{url}/rerank", json={"query": "a date", **body})
        assert refused.status_code == 422
        assert said in refused.json()["error"]["message"]
    cut = httpx.post(f"{url}/rerank", json={"query": "a date", "documents": ["a", "b c d " * 200]})
    assert (cut.json()["truncated"], len(cut.json()["results"])) == ([1], 2)
    by_delta = httpx.post(f"{url}/rerank", json={"query": "a date", "documents": ["a"], "model": "legal"})
    assert by_delta.status_code == 422
    assert "model=legal is a delta, and the re-ranker is the base itself" in by_delta.json()["error"]["message"]
    refused = httpx.post(f"{url}/rerank", json={"query": " ", "documents": ["a"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "query")


def test_embedding_and_re_ranking_at_once_leave_each_other_alone(url, encoders, language_model):
    """Both want the trunk, one with the trained biases and one without."""
    documents = list(CORPUS.values())
    scores = CrossEncoder.from_pretrained(language_model("gpt2")).score(["a date"] * len(documents), documents)
    expected = encoders["first"].encode_documents(documents)

    def ask(number: int) -> None:
        if number % 2:
            assert distance(vectors(embed(url, documents)), expected) < COSINE_BOUND
            return
        answer = httpx.post(f"{url}/rerank", json={"query": "a date", "documents": documents}, timeout=60).json()
        given = [one["relevance_score"] for one in sorted(answer["results"], key=lambda one: one["index"])]
        np.testing.assert_allclose(given, scores, rtol=1e-5)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(48)))


def test_the_page_shows_what_search_finds(url, runs, encoders):
    """By the index that train/search.py has made or will open."""
    systems = httpx.post(f"{url}/search", json={"query": "open the date", "top": 3}).json()["systems"]
    assert [one["title"] for one in systems] == ["base", "tuned", "re-ranked"]
    encoder, reranker = load_encoder_and_reranker(runs / "first")
    folder = index_folder(str(runs / "first"), runs / "corpus.jsonl")
    built = (folder / "embeddings.npy").stat().st_mtime_ns
    for shown, ranker in zip(systems[1:], (None, reranker), strict=True):
        hits = Searcher(encoder, CORPUS, folder, reranker=ranker, depth=3)("open the date", 3)
        assert [one["id"] for one in shown["hits"]] == [hit.document_id for hit in hits]
        np.testing.assert_allclose([one["score"] for one in shown["hits"]], [hit.score for hit in hits], rtol=1e-4)
        assert [one["text"] for one in shown["hits"]] == [hit.text for hit in hits]
    assert (folder / "embeddings.npy").stat().st_mtime_ns == built
    tuned = [one["id"] for one in systems[1]["hits"]]
    assert [one["id"] for one in systems[0]["hits"]] != tuned or systems[0]["hits"] != systems[1]["hits"]
    short = httpx.post(f"{url}/search", json={"query": "open the date", "top": 3}).json()
    assert short["truncated"] is False
    assert not any(hit["truncated"] for hit in short["systems"][-1]["hits"])
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html")
    elsewhere = re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.text)
    assert not elsewhere, "the page loads something that is not here"


def test_a_query_of_the_page_that_is_cut_is_said_or_refused(runs):
    query = {"query": "open the date " * 20}
    corpus = str(runs / "corpus.jsonl")
    with serving(runs / "first", corpus=corpus) as url:
        assert httpx.post(f"{url}/search", json=query).json()["truncated"] is True
    with serving(runs / "first", corpus=corpus, truncation="refuse") as url:
        refused = httpx.post(f"{url}/search", json=query)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "query")


def test_the_index_of_the_base_is_the_same_next_to_a_delta_with_more_biases(language_model, tmp_path, runs):
    base = language_model("qwen2")
    tuned_run(base, tmp_path / "own", add_biases="attention")
    tuned_run(base, tmp_path / "other", 1)
    folder = index_folder(str(tmp_path / "own"), runs / "corpus.jsonl")
    embeddings = folder.with_name(f"{folder.name}-base") / "embeddings.npy"
    built: set[int] = set()
    for deltas in ({}, {"other": str(tmp_path / "other")}):
        config = ServeConfig(model=str(tmp_path / "own"), deltas=deltas, corpus=str(runs / "corpus.jsonl"))
        open_page(open_served(config), config)
        built.add(embeddings.stat().st_mtime_ns)
    assert len(built) == 1


# around


def metrics(url: str) -> list:
    return list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))


def test_metrics_count_requests_texts_and_tokens(url, encoders):
    def value(name: str, **labels: str) -> float:
        samples = [sample for family in metrics(url) for sample in family.samples]
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    of_path = {"endpoint": "/v1/embeddings"}
    counted = [("sgpt_requests_total", {**of_path, "status": status}) for status in ("200", "422")]
    counted += [("sgpt_texts_total", {"kind": "embed"}), ("sgpt_tokens_total", {"kind": "embed"})]
    counted += [("sgpt_request_seconds_count", of_path), ("sgpt_queue_seconds_count", {"kind": "embed"})]
    before = [value(name, **labels) for name, labels in counted]
    embed(url, TEXTS[:3])
    embed(url, [])
    cut = value("sgpt_truncated_texts_total")
    after = [value(name, **labels) for name, labels in counted]
    tokens = sum(map(len, encoders["first"].token_ids(TEXTS[:3], "document")))
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 3, tokens, 2, 1]
    for truncate in (False, True):
        embed(url, "sort a list of names " * 20, truncate=truncate)
    assert value("sgpt_truncated_texts_total") == cut + 1  # a text that was refused was not cut


def test_the_contract_has_probes_that_the_model_gives(url, runs, encoders):
    stated = httpx.get(f"{url}/contract").json()
    assert (stated["model"], stated["embedding_size"], [*stated["deltas"]]) == ("first", 32, ["legal"])
    assert stated["contract"]["markers"]["query_max_tokens"] == encoders["first"].contract.markers.query_max_tokens
    for name, contract in (("first", stated["contract"]), ("legal", stated["deltas"]["legal"])):
        probes = contract["probes"]
        expected = encoders[name].encode_queries(probes["texts"])[:, : len(probes["query"][0])]
        np.testing.assert_allclose(probes["query"], expected, atol=1e-5)


def test_a_path_that_is_not_there_and_another_method_are_one_sentence(url):
    missing, method = httpx.get(f"{url}/v2/embeddings"), httpx.get(f"{url}/v1/embeddings")
    assert (missing.status_code, method.status_code) == (404, 405)
    assert "the paths are /, /contract, " in missing.json()["error"]["message"]
    assert "/v1/embeddings" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_a_key_is_asked_for_and_nothing_is_said_without_it(runs):
    with serving(runs / "first", api_key="secret") as url:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic secret"}):
            for answer in (
                httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, headers=headers),
                httpx.get(f"{url}/contract", headers=headers), httpx.get(f"{url}/metrics", headers=headers),
            ):  # fmt: skip
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert "Authorization: Bearer <key>" in answer.json()["error"]["message"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert len(client.embeddings.create(input="a", model="first").data[0].embedding) == 32
        assert httpx.get(f"{url}/health").json()["ready"] is True


@pytest.mark.parametrize(("key", "sentence"), [
    ("", "is empty; set one of letters"), ("a key", "holds a blank, or what is no ASCII"), ("schlüssel", "is no ASCII"),
])  # fmt: skip
def test_a_key_that_no_request_could_send_is_refused(key, sentence):
    """By an empty one, as of a variable that is not set, whoever sent `Bearer` was let in."""
    with pytest.raises(InputError, match=f"^api_key .*{sentence}"):
        ServeConfig(api_key=key)


def test_a_model_whose_name_has_a_slash_is_listed_and_found(runs):
    with serving(runs / "first", name="org/first") as url, openai.OpenAI(base_url=f"{url}/v1", api_key="no") as client:
        assert client.models.retrieve("org/first").id == "org/first"


def test_a_contract_that_is_asked_for_while_the_server_stops_is_503(runs):
    app = create_app(open_served(ServeConfig(model=str(runs / "first"))), ServeConfig())
    app.state.server.batcher.stop(5)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            return await client.get("/contract")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")


def test_a_model_that_no_longer_gives_its_probes_is_not_served(runs, tmp_path):
    run = shutil.copytree(runs / "first", tmp_path / "first")
    encoder, saved = Encoder.from_pretrained(run / "adapter"), Contract.load(run / "adapter")
    measured = measure(encoder)
    measured["probes"]["query"][0][0] += 5
    saved.of_model(encoder.tokenizer, **measured).save(run / "adapter", saved.files)
    with pytest.raises(InputError, match="adapter: its embeddings differ by"):
        open_served(ServeConfig(model=str(run)))


def test_more_requests_than_are_taken_get_503_and_when_to_come_again(runs):
    with serving(runs / "first", max_requests=2, max_wait_ms=3000) as url, ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(embed, url, f"{number}") for number in range(2)]
        while httpx.get(f"{url}/health").json()["in_flight"] < 2:
            time.sleep(0.01)
        refused = embed(url, "one more")
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert (refused.status_code, int(refused.headers["retry-after"])) == (503, 1)
    assert "2 requests are being worked on or wait" in refused.json()["error"]["message"]


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
    """train/serve.py as a process of its own, and what it has said so far."""
    said = folder / "said.txt"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "train" / "serve.py"), *arguments]
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        yield process, said.read_text
    finally:
        process.kill()
        process.wait()


def test_what_was_taken_is_answered_after_sigterm_and_the_process_ends_with_0(runs, tmp_path):
    arguments = [f"model={runs / 'first'}", "port=0", "max_wait_ms=2000"]
    with started(tmp_path, *arguments) as (process, said), ThreadPoolExecutor(4) as threads:
        while not (line := re.search(r"(http://127\.0\.0\.1:\d+) serves first \(32 numbers\); batches", said())):
            assert process.poll() is None, said()
            time.sleep(0.05)
        url = line[1]
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.05)
        answers = [threads.submit(embed, url, f"text {number}") for number in range(4)]
        while httpx.get(f"{url}/health").json()["in_flight"] < 4:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert [answer.result(30).status_code for answer in answers] == [200] * 4
        assert process.wait(30) == 0, said()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    assert said().splitlines()[-1] == "stopped"
    assert "interrupted" not in said()


def test_a_port_that_is_taken_is_one_sentence_before_anything_is_opened():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"^port={port} of 127\.0\.0\.1 cannot be had \(Address already"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", 0) as first, pytest.raises(InputError, match="cannot be had"):  # its model is opened now
        bind(*first.getsockname())
    for host in ("no such host", "127.0.0..1"):  # Python itself refuses the second, with another error
        with pytest.raises(InputError, match=f"^host={re.escape(host)} is no address"):
            bind(host, 0)


@pytest.mark.parametrize(("keys", "sentence"), [
    ({}, r"^set model=<folder of a run"),
    ({"model": "no/such/folder"}, r"no/such/folder"),
    ({"model": "{base}", "rerank": True}, r"holds no adapter/, so there is no base to re-rank with"),
    ({"model": "{base}", "deltas": {"a": "{other}"}}, r"made from .*gpt2.* .*of this GPTNeoModel is another"),
    ({"model": "{first}", "dtype": "fp16"}, r"^dtype"),
    ({"prompt": "A"}, r"^prompt has no effect without rerank=true; set that, or leave it out"),
    ({"rerank": True, "depth": 5}, r"^depth has no effect without corpus; set corpus=<BEIR folder or JSON lines>, or"),
    ({"index": IndexConfig("faiss")}, r"^index has no effect without corpus"),
    ({"model": "{first}", "deltas": {"first": "{first}"}}, r"^deltas\.first is what the model itself is called"),
])  # fmt: skip
def test_what_cannot_be_served_is_one_sentence(runs, tiny_base, keys, sentence):
    paths = {"{base}": str(tiny_base("gpt_neo")), "{other}": str(runs / "legal"), "{first}": str(runs / "first")}
    keys = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in keys.items()}
    if "deltas" in keys:
        keys["deltas"] = {name: paths[path] for name, path in keys["deltas"].items()}
    with pytest.raises(InputError, match=sentence):
        open_served(ServeConfig(**keys))


@pytest.mark.parametrize(("path", "name"), [
    ("runs/pydocs", "pydocs"), ("runs/pydocs/export", "pydocs"), ("runs/pydocs/adapter/", "pydocs"),
    ("EleutherAI/gpt-neo-125m", "gpt-neo-125m"),
])  # fmt: skip
def test_a_model_is_called_after_its_run_or_folder(path, name):
    assert served_name(path) == name
