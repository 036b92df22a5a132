"""Servers made by hand with one fault each: every fault is told by its name, and the right server passes."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.encoder.head import Dense
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from sgpt.verification.clients import Client
from sgpt.verification.config import VerifyConfig
from sgpt.verification.diagnosis import Trained, explain
from sgpt.verification.server import Finding, _asked, verify_server
from sgpt.verification.table import server_table, summary
from tests.conftest import byte_level, random_trunk
from tests.starts import free_port
from tests.verification.servers import ByHand, serving

LIMIT = 200  # tokens; faults cut at 128
MASK = "no causal mask: every token sees the whole text"
EQUAL = {"equal lengths together", "12 at once, equal lengths"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("base"), byte_level()
    tokenizer.save_pretrained(folder)
    random_trunk("llama", len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    return folder


def tuned(
    base: Path, folder: Path, seed: int, *, normalize: bool = False, pooling: str = "weighted_mean"
) -> Path:  # fmt: skip
    """An export whose biases are the base's, moved at random."""
    contract = Contract(pooling, MarkersConfig("brackets", LIMIT, LIMIT), normalize, str(base))
    trunk = tune(load_trunk(ModelConfig(str(base))), TuningConfig("bitfit"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    export(Encoder(trunk, load_tokenizer(str(base)), contract), folder, card="")
    return folder


@pytest.fixture(scope="module")
def models(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tuned(base, folder / name, seed) for seed, name in enumerate(("own", "legal"))}


@pytest.fixture(scope="module")
def findings(base, models) -> Callable[..., list[Finding]]:
    """findings(fault, **keys of VerifyConfig): of a server with that fault, None is the right one."""

    def found(fault: str | None, **keys) -> list[Finding]:
        own = base if fault == "base" else models["own"]
        served = ByHand({None: own, "legal": models["legal"]}, base, LIMIT, fault)
        keys = {"model": str(models["own"]), "requests_at_once": 12, **keys}
        with serving(served) as server:
            return list(verify_server(VerifyConfig(endpoint=server.url, **keys)))

    return found


def faults(findings: list[Finding]) -> set[str]:
    return {finding.fault for finding in findings if finding.fault}


def broken(findings: list[Finding]) -> set[str]:
    return {finding.condition for finding in findings if finding.fault}


@pytest.mark.parametrize("api", ["openai", "tei", "cohere"])
def test_the_right_server_gives_the_trained_vectors_under_every_condition(api, findings, models):
    deltas = {"legal": str(models["legal"])} if api == "openai" else {}
    at_once = 64 if api == "openai" else 12
    found = findings(None, api=api, deltas=deltas, requests_at_once=at_once)
    assert not faults(found)
    assert {finding.condition for finding in found} == {
        "one at a time", "empty and of one token", "as long as the limit, and longer", "one batch",
        "equal lengths together", f"{at_once} requests at once", f"{at_once} at once, equal lengths",
        *(["in base64"] if api == "openai" else []),
    }  # fmt: skip
    assert {(finding.role, finding.delta) for finding in found} == {
        (role, delta) for role in ("query", "document") for delta in (None, *deltas)
    }
    assert all(finding.cosine > 1 - 1e-9 and finding.texts for finding in found)
    assert sum(finding.refused for finding in found) == 0


def test_a_mask_skipped_on_equal_lengths_breaks_those_conditions_alone_and_is_named(findings):
    found = findings("mask")
    assert faults(found) == {MASK}
    assert EQUAL <= broken(found) <= {*EQUAL, "12 requests at once"}
    assert min(finding.cosine for finding in found) < 0.999


def test_a_mask_skipped_under_load_alone_is_seen_by_requests_at_once_alone(findings):
    found = findings("mask under load")
    assert faults(found) == {MASK}
    assert {"12 at once, equal lengths"} <= broken(found) <= {"12 at once, equal lengths", "12 requests at once"}


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("base", {"delta ignored: the vector of the base"}),
        ("last token", {"last_token pooling instead of weighted_mean"}),
        ("no markers", {"no markers"}),
        ("role", {"wrong role: the text as a document"}),
        pytest.param("prompt", {"a prompt put before the text: 'query: '"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_with_every_text_breaks_every_condition_by_one_name(fault, named, findings):
    found = findings(fault)
    assert faults(found) == named
    of_role = [finding for finding in found if fault != "role" or finding.role == "query"]
    assert all(finding.fault for finding in of_role)


@pytest.mark.parametrize(("fault", "named"), [
    ("no closing marker", "no closing marker"),
    pytest.param("last token cut", "the last token left out", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_token_that_is_left_out_is_named(fault, named, findings):
    """Of hundreds of tokens one does not show; a text of one token becomes the empty one, whose vector is known."""
    found = findings(fault)
    assert faults(found) - {"answers mixed up: the vectors of other texts"} == {named}
    assert {finding.fault for finding in found if finding.condition in ("one at a time", "in base64")} == {named}


def test_truncation_to_128_breaks_what_holds_long_texts(findings):
    found = findings("truncation to 128")
    assert faults(found) == {"truncation to 128 tokens"}
    assert broken(found) >= {"as long as the limit, and longer", "one batch"}
    assert not broken(found) & {"one at a time", "empty and of one token", "12 at once, equal lengths"}


def test_a_delta_that_is_ignored_is_told_from_a_wrong_model(findings, models):
    found = findings("delta ignored", deltas={"legal": str(models["legal"])})
    assert faults(found) == {"delta ignored: the vector of the model without it"}
    assert {finding.delta for finding in found if finding.fault} == {"legal"}


def test_an_ignored_delta_of_another_contract_is_known_by_the_vectors_of_the_model(findings, base, tmp_path):
    other = tuned(base, tmp_path / "other", 7, pooling="last_token")
    found = findings("delta ignored", deltas={"legal": str(other)})
    assert faults(found) == {
        "delta ignored: the vector of the model without it, with its own markers, limits and pooling"
    }


def test_answers_that_are_mixed_up_under_load_are_called_so(findings):
    found = findings("mixed up")
    assert faults(found) == {"answers mixed up: the vectors of other texts"}
    assert broken(found) <= {"12 requests at once", "12 at once, equal lengths"}


@pytest.mark.parametrize(("fault", "said", "conditions"), [
    ("unit lengths in batches", r"a vector of length 1, where lengths were the model's before", "one batch"),
    pytest.param(
        "lengths off by 0.9 %", r"a vector of length [\d.]+, which is neither 1 nor the model's", "one at a time",
        marks=pytest.mark.slow,
    ),
    ("big-endian", r"no known fault gives these vectors|NaN or infinity", "in base64"),
])  # fmt: skip
def test_what_cosines_or_plain_numbers_do_not_show_is_seen(fault, said, conditions, findings):
    found = findings(fault)
    assert conditions in broken(found)
    assert all(re.match(said, one) for one in faults(found)), faults(found)
    if fault == "big-endian":
        assert broken(found) == {"in base64"}


@pytest.mark.parametrize(("fault", "sentence"), [
    ("index from 1", r"/v1/embeddings: numbers 1 vectors \[1\], where clients look for 0, 1, …"),
    ("numbers as text", r"holds no list of vectors as of api=openai"),
])  # fmt: skip
def test_an_answer_that_a_client_would_misread_is_refused(fault, sentence, findings):
    with pytest.raises(InputError, match=sentence):
        findings(fault)


@pytest.mark.slow
def test_lengths_that_are_neither_1_nor_the_models_are_said_where_cosines_are_blind(findings):
    found = findings("lengths")
    assert all(fault.startswith("a vector of length") for fault in faults(found))
    assert broken(found) >= {"one at a time", "one batch"}
    assert all(finding.cosine > 1 - 1e-6 for finding in found)


@pytest.mark.slow
def test_a_contract_that_promises_length_1_is_held_to_it(base, tmp_path):
    folder = tuned(base, tmp_path / "unit", 0, normalize=True)
    with serving(ByHand({None: folder}, base, LIMIT)) as server:
        found = list(verify_server(VerifyConfig(model=str(folder), endpoint=server.url, requests_at_once=2)))
    assert all(finding.fault.startswith("no normalisation: a vector of length") for finding in found)


@pytest.mark.slow
def test_markers_that_are_sent_as_text_merge_with_it_and_are_said_to(base, models):
    """`?]` is one token of this tokenizer."""
    served = ByHand({None: models["own"]}, base, LIMIT, "no markers")
    with serving(served) as server:
        keys = {"model": str(models["own"]), "requests_at_once": 2}
        config = VerifyConfig(endpoint=server.url, markers_by="client", **keys)
        found = list(verify_server(config))
        assert all("input_type" not in body for body in server.seen)
        assert any(text == "[what?]" for body in server.seen for text in body["input"])
    assert faults(found) & {"markers that are tokenised with the text, and merge with it"}


def test_markers_as_text_have_a_prompt_between_them_and_no_token_that_the_server_adds():
    tokenizer = byte_level(start="</s>")
    contract = Contract("mean", MarkersConfig("brackets", 20, 20), prompts={"query": "find: "})
    trunk = random_trunk("opt", len(tokenizer), max_position_embeddings=64)
    sent: list[str] = []
    client = SimpleNamespace(embed=lambda texts, role, delta, base64: sent.extend(texts))
    config = VerifyConfig(endpoint="http://a", markers_by="client")
    for role in ("query", "document"):
        _asked(client, ["a"], role, None, config, Encoder(trunk, tokenizer, contract))
    assert sent == ["[find: a]", "{a}"]


@pytest.mark.parametrize("refuses", [
    lambda body: "delta" in body, lambda body: body["input_type"] == "document",
])  # fmt: skip
def test_a_delta_or_role_that_is_refused_is_no_right_server(refuses, base, models):
    """By texts_per_request=1 every text of it was counted as refused, and nothing as wrong."""
    served = ByHand({None: models["own"], "legal": models["legal"]}, base, LIMIT, refuses=refuses)
    keys = {"model": str(models["own"]), "deltas": {"legal": str(models["legal"])}, "texts_per_request": 1}
    with serving(served) as server, pytest.raises(InputError, match=r"422, the server refuses the request \(not this"):
        list(verify_server(VerifyConfig(endpoint=server.url, requests_at_once=2, **keys)))


@pytest.mark.slow
def test_texts_that_a_server_refuses_are_left_out_of_its_batches(base, models):
    def is_blank(body: dict) -> bool:
        return not all(text.strip() for text in body["input"])

    with serving(ByHand({None: models["own"]}, base, LIMIT, refuses=is_blank)) as server:
        found = list(verify_server(VerifyConfig(str(models["own"]), server.url, requests_at_once=12)))
    assert not faults(found)
    refused = {finding.condition: finding.refused for finding in found if finding.role == "query"}
    assert (refused["empty and of one token"], refused["one batch"]) == (1, 2)  # " " and a line end
    assert min(finding.texts for finding in found) > 0


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_one_sentence(base, models):
    served = ByHand({None: models["own"]}, base, LIMIT, refuses=lambda body: len(body["input"]) > 16)
    sentence = r"422, .*fewer texts, texts_per_request=<fewer>"
    with serving(served) as server, pytest.raises(InputError, match=sentence):
        list(verify_server(VerifyConfig(str(models["own"]), server.url, requests_at_once=2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (422, r"texts are refused under load that were taken before$"),
        (500, r"^\d+ of 12 requests have no answer, the first: .* 500 instead of an answer \(not this\)"),
    ],
)
def test_a_server_that_answers_but_not_under_load_has_a_fault(base, models, status, sentence):
    together = 0

    def is_much(body: dict) -> bool:
        nonlocal together
        together += 1
        time.sleep(0.05)
        much, together = together > 4, together - 1
        return much

    with serving(ByHand({None: models["own"]}, base, LIMIT, refuses=is_much, refusal=status)) as server:
        found = list(verify_server(VerifyConfig(str(models["own"]), server.url, requests_at_once=12)))
    assert all(re.search(sentence, fault) for fault in faults(found))
    assert "12 requests at once" in broken(found) <= {"12 requests at once", "12 at once, equal lengths"}


def test_a_condition_without_any_text_is_not_called_ok():
    empty = Finding("empty and of one token", "query", None, 0, 2, float("nan"), 0.9, "")
    assert [*server_table([empty], "").columns[-1].cells] == ["nothing compared"]
    assert summary([empty]) == (
        "every served vector is the trained one; under 1 conditions there was none, as the server refuses their texts"
    )


def test_a_fault_of_a_model_with_layers_behind_its_pooling_is_named(base):
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(0)
    head = torch.nn.Sequential(Dense((32, 16), True, torch.nn.Identity(), False))
    contract = Contract("mean", MarkersConfig("brackets", 20, 20))
    encoder = Encoder(load_trunk(ModelConfig(str(base))), tokenizer, contract, head=head)
    texts = ["parse a date", "sort a list of names"]
    for fault, changed in (
        ("max pooling instead of mean", replace(contract, pooling="max")),
        ("no markers", replace(contract, markers=MarkersConfig("none", 20, 20))),
    ):
        served = Encoder(encoder.trunk, tokenizer, changed, head=encoder.head).encode(texts, "query")
        assert explain(texts, "query", served, Trained(encoder), 1 - 1e-6) == fault
    ids = [[*row, tokenizer.eos_token_id] for row in encoder.token_ids(texts, "query")]
    served = encoder(ids).detach().numpy()
    assert explain(texts, "query", served, Trained(encoder), 1 - 1e-6) == "an end token added"


@pytest.mark.slow
def test_what_half_precision_makes_of_the_weights_is_allowed_where_it_is_said_and_only_there(base, models):
    served = ByHand({None: models["own"]}, base, LIMIT)
    served.models[None] = served.models[None].bfloat16()
    with serving(served) as server:
        keys = {"model": str(models["own"]), "endpoint": server.url, "requests_at_once": 2}
        assert faults(list(verify_server(VerifyConfig(**keys))))
        assert not faults(list(verify_server(VerifyConfig(**keys, dtype="bfloat16"))))


def test_key_model_and_delta_are_sent_where_the_server_looks_for_them(base, models):
    served = ByHand({None: models["own"], "legal": models["legal"]}, base, LIMIT)
    keys = {"model": str(models["own"]), "deltas": {"legal": str(models["legal"])}, "api_key": "secret"}
    keys["requests_at_once"] = 2
    with serving(served) as server:
        findings = verify_server(VerifyConfig(endpoint=f"{server.url}/v1/", **keys))
        next(findings)
        findings.close()
        assert server.seen[0]["key"] == "Bearer secret"
        assert server.seen[0]["model"] == "served"  # the first that the server lists
        assert "delta" not in server.seen[0]
    with serving(served) as server:
        with Client(server.url, "openai", 32, served_name="own", delta_as="model") as client:
            client.embed(["a"], "query")
            client.embed(["a"], "query", "legal")
        assert [body["model"] for body in server.seen] == ["own", "legal"]


@pytest.mark.parametrize(
    ("replies", "sentence"),
    [
        ({"status": 401, "text": '{"error": {"message": "bad key"}}'}, r"401, the key is missing or wrong \(bad key\)"),
        ({"status": 404, "text": "Not Found"}, r"404, there is no such path, model or delta \(Not Found\); api=openai"),
        ({"status": 422, "text": '{"detail": "no field input_type"}'}, r"422, .* refuses .*\(no field input_type\)"),
        ({"status": 500, "text": "oops"}, r"500 instead of an answer \(oops\); see the server's log"),
        ({"text": "<html>hello</html>"}, r"answers '<html>hello</html>', which is no JSON"),
        ({"text": '{"vectors": []}'}, r"holds no list of vectors as of api=openai"),
        ({"text": '{"data": [{"index": 0, "embedding": [1, 2]}]}'}, r"gives 1 vectors of 2 numbers .* 32 for each"),
        ({"seconds": 5.0}, r"silent for 0\.3 s; raise timeout_seconds"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_server_that_gives_no_vectors_is_one_sentence(replies, sentence, models):
    with serving(None, **replies) as server:
        config = VerifyConfig(model=str(models["own"]), endpoint=server.url, timeout_seconds=0.3)
        with pytest.raises(InputError, match=rf"^{server.url}/v1/embeddings: .*{sentence}") as refusal:
            list(verify_server(config))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("endpoint", "reason"), [("http://[::1", "Invalid port"), ("http://127.0.0..1:80", "encoding")]
)
def test_an_endpoint_that_is_no_url_is_one_sentence(endpoint, reason, models):
    with pytest.raises(InputError, match=rf"^{re.escape(endpoint)}/v1/embeddings: no server answers \({reason}"):
        list(verify_server(VerifyConfig(model=str(models["own"]), endpoint=endpoint)))


def test_an_endpoint_where_nobody_listens_is_one_sentence(models):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=rf"^{url}/v1/embeddings: no server answers .*; start it, or check host"):
        list(verify_server(VerifyConfig(model=str(models["own"]), endpoint=url)))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"endpoint": "localhost:8000"}, r"endpoint=localhost:8000 is no URL; give one such as http"),
        ({"api": "grpc"}, r"api"),
        ({"deltas": {"a": "b"}}, r"^deltas has no effect without endpoint; set endpoint"),
        ({"least_cosine": 0.99}, r"^least_cosine has no effect without endpoint"),
        ({"dtype": "bfloat16"}, r"^dtype has no effect without endpoint"),
        ({"timeout_seconds": 5.0}, r"^timeout_seconds has no effect without endpoint"),
        (
            {"endpoint": "http://a", "api": "tei", "deltas": {"a": "b"}},
            r"deltas: text-embeddings-inference has no request for one",
        ),
        ({"endpoint": "http://a", "deltas": {"a": ""}}, r"deltas\.a is empty"),
        ({"endpoint": "http://a", "api_key": "ключ"}, r"api_key holds a blank, or what is no ASCII"),
        ({"markers_by": "both"}, r"markers_by"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, sentence):
    with pytest.raises(InputError, match=sentence):
        VerifyConfig(**keys)
