"""The contract of a model as another project reads it, and what its probes notice when all files are in order."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sgpt.decoder.quantised import SAMPLE
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import FILE
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.encoder.probes import EQUAL_LENGTHS, PROBE_TEXTS, SHORT_PROBE, measure, probe_difference
from sgpt.encoder.verify import verify
from sgpt.retrieval.searcher import load_encoder_and_reranker
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import FAMILIES

TEXTS = ["sort a path", "what?]", "naïve 東京 🙂", "word " * 100, ""]


@pytest.fixture(scope="module")
def folder(tiny_encoder, tmp_path_factory) -> Path:
    """An export."""
    folder = tmp_path_factory.mktemp("contract") / "export"
    export(tiny_encoder("opt"), folder, card="")  # OPT has a special token of its own before every text
    return folder


def adapter_of(encoder: Encoder, folder: Path) -> Path:
    """Trained, and saved with its probes, as training does."""
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit")).eval()
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    with torch.no_grad():
        for value in trainable_parameters(encoder.trunk).values():
            value.add_(torch.randn_like(value) * 0.05)
    measured = measure(encoder)
    return save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, folder, measured=measured)


def signed(stated: dict) -> str:
    """The JSON with the hash over all but the base and itself, as format 2 and 3 have it."""
    kept = {key: value for key, value in stated.items() if key not in ("base", "hash")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
    return json.dumps(stated | {"hash": digest})


def test_the_json_alone_says_which_ids_stand_around_a_text_and_where_it_is_cut(folder, tiny_encoder):
    encoder = tiny_encoder("opt")
    stated = json.loads((folder / FILE).read_text())
    tokenizer = Tokenizer.from_file(f"{encoder.contract.base}/tokenizer.json")
    assert stated["roles"]["query"]["text_before"] == "</s>["
    for role in ROLES:
        rule = stated["roles"][role]
        contents = [tokenizer.encode(text, add_special_tokens=False).ids[: rule["content_tokens"]] for text in TEXTS]
        rows = [rule["ids_before"] + content + rule["ids_after"] for content in contents]
        assert rows == encoder.token_ids(TEXTS, role)
        assert max(map(len, rows)) == rule["max_tokens"] == encoder.contract.markers.max_tokens(role)
    assert (stated["counting"], stated["truncation_side"], stated["similarity"]) == ("sequence", "right", "cosine")


def test_numbers_of_a_probe_are_on_one_line_of_the_json(folder):
    lines = (folder / FILE).read_text().splitlines()
    assert len(lines) < 250
    assert max(map(len, lines)) < 3500


@pytest.mark.parametrize("family", ["gpt_neo", "opt", "bert"])
def test_the_probes_have_texts_of_one_length_of_one_token_of_none_and_beyond_the_limit(family, tiny_encoder):
    assert family in FAMILIES
    encoder = tiny_encoder(family, real_tokenizer=family == "gpt_neo")
    lengths = dict(zip(PROBE_TEXTS, map(len, encoder.token_ids(PROBE_TEXTS, "query")), strict=True))
    assert len({lengths[text] for text in EQUAL_LENGTHS}) == 1
    around = lengths[""]
    assert lengths["a"] == around + 1
    assert max(lengths.values()) == encoder.contract.markers.query_max_tokens
    assert len(encoder.tokenizer(PROBE_TEXTS[9], add_special_tokens=False)["input_ids"]) > 300


@pytest.mark.parametrize(("texts", "role", "message"), [
    ("a text", "query", r"encode takes a list of texts, got one string 'a text'; put it in a list"),
    (None, "query", r"encode takes a list of texts, got NoneType; make a list of it"),
    ((text for text in "ab"), "query", r"encode takes a list of texts, got generator; make a list of it"),
    ({"a": "b"}, "query", r"encode takes a list of texts, got dict; make a list of it"),
    ({"a", "b"}, "query", r"encode takes a list of texts, got set; make a list of it"),
    (["a", 5], "query", r"encode: text 1 is int 5; give strings"),
    (["a", "b \ud83d"], "query", r"encode: text 1 \('b \\ud83d'\) holds half a character"),
    (["a"], "querie", r"role='querie' is unknown; choose query or document"),
])  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(texts, role, message, tiny_encoder):
    with pytest.raises(InputError, match=message):
        tiny_encoder("gpt_neo").encode(texts, role)


def test_a_column_of_pandas_is_its_texts_in_their_order_whatever_their_labels(tiny_encoder):
    texts = ["parse a date", "sort a list", "open a file"]
    encoder = tiny_encoder("gpt_neo")
    for labels in ([2, 0, 1], ["a", "b", "c"], [7, 7, 7]):
        assert np.array_equal(encoder.encode(pandas.Series(texts, labels), "query"), encoder.encode(texts, "query"))


def test_the_same_base_at_another_path_is_the_same_model(tiny_base, tmp_path):
    copy = shutil.copytree(tiny_base("gpt2"), tmp_path / "copy")
    original, copied = Encoder.from_pretrained(tiny_base("gpt2")), Encoder.from_pretrained(copy)
    assert original.contract.base != copied.contract.base
    assert original.fingerprint() == copied.fingerprint() != Encoder.from_pretrained(tiny_base("opt")).fingerprint()


def test_format_2_is_still_read(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "export")
    stated = json.loads((folder / FILE).read_text())
    for key in ("similarity", "counting", "truncation_side", "roles", "origin"):
        del stated[key]
    for role in ROLES:
        del stated["probes"][f"{role}_ids"]
    (old / FILE).write_text(signed(stated | {"format": 2}))
    opened, expected = Encoder.from_pretrained(old), Encoder.from_pretrained(folder)
    assert np.array_equal(opened.encode_queries(TEXTS), expected.encode_queries(TEXTS))
    assert opened.fingerprint() == expected.fingerprint()
    assert [name.split()[0] for name in verify(old, opened)["readers"]] == ["sgpt", "sentence-transformers"]


def test_other_token_ids_are_told_from_other_weights_and_the_library_that_changed_is_named(folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "export")
    stated = json.loads((folder / FILE).read_text())
    stated["origin"]["versions"]["tokenizers"] = "0.1"

    ids = json.loads(json.dumps(stated))
    ids["probes"]["query_ids"][3][1] += 1
    (changed / FILE).write_text(signed(ids))
    with pytest.raises(InputError, match=r"the query 'naïve 東京 🙂' is \d+ tokens .* \(tokenizers 0\.1 -> "):
        Encoder.from_pretrained(changed)

    numbers = json.loads(json.dumps(stated))
    numbers["probes"]["query"][3][1] += 1.0
    (changed / FILE).write_text(signed(numbers))
    with pytest.raises(InputError, match=r"its embeddings differ by .* at equal token ids; .* \(tokenizers 0\.1 -> "):
        Encoder.from_pretrained(changed)

    marker = json.loads(json.dumps(stated))
    marker["roles"]["query"]["ids_after"] = [7]
    (changed / FILE).write_text(signed(marker))
    with pytest.raises(InputError, match=r"ids_after of a query is \[7\] in sgpt\.json, and \[\d+\] with this token"):
        Encoder.from_pretrained(changed)
    assert Encoder.from_pretrained(changed, check=False).contract.roles["query"].ids_after == [7]


def test_a_quantised_trunk_is_asked_for_the_token_ids_of_an_adapter(language_model, tmp_path):
    adapter = adapter_of(Encoder.from_pretrained(language_model("gpt_neo")), tmp_path / "adapter")
    base = Encoder.from_pretrained(language_model("gpt_neo"), dtype="int8")
    stated = json.loads((adapter / FILE).read_text())
    stated["probes"]["query_ids"][3][0] += 1
    (adapter / FILE).write_text(signed(stated))
    for opened in (Encoder.from_pretrained, load_encoder_and_reranker):
        with pytest.raises(InputError, match=r"the query 'naïve 東京 🙂' is \d+ tokens"):
            opened(adapter, dtype="int8")
    with pytest.raises(InputError, match=r"the query 'naïve 東京 🙂' is \d+ tokens"):
        base.load_delta("tuned", adapter)


def test_an_adapter_over_a_base_that_its_hash_does_not_tell_apart_is_refused_by_its_probes(tiny_encoder, tmp_path):
    """The hash is of some numbers of each tensor; one weight between two of these was changed."""
    encoder = tiny_encoder("gpt_neo")
    base = shutil.copytree(encoder.contract.base, tmp_path / "base")
    encoder.contract.base = str(base)
    adapter = adapter_of(encoder, tmp_path / "adapter")
    opened = Encoder.from_pretrained(adapter)
    assert probe_difference(opened.encode, opened.contract.probes) < 1e-6
    assert Encoder.from_pretrained(adapter, dtype="bfloat16").trunk.dtype == torch.bfloat16
    weights = load_file(base / "model.safetensors")
    embeddings = weights["wte.weight"]
    (opening, *_), width = encoder.token_ids(["a"], "query")[0], embeddings.shape[1]
    number = next(n for n in range(opening * width, (opening + 1) * width) if n % (embeddings.numel() // SAMPLE))
    embeddings.view(-1)[number] += 1.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="its embeddings differ by"):
        Encoder.from_pretrained(adapter)


def test_a_prompt_that_is_longer_than_a_short_probe_leaves_probes_to_compare(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo", query_max_tokens=120, document_max_tokens=120)
    encoder.contract.prompts = dict.fromkeys(ROLES, "find what answers this question: " * 5)
    assert min(map(len, encoder.token_ids(PROBE_TEXTS, "query"))) > SHORT_PROBE
    adapter = adapter_of(encoder, tmp_path / "adapter")
    assert Encoder.from_pretrained(adapter).contract.prompts == encoder.contract.prompts
    stated = json.loads((adapter / FILE).read_text())
    stated["probes"]["query"][0][0] += 1.0
    (adapter / FILE).write_text(signed(stated))
    with pytest.raises(InputError, match="its embeddings differ by"):
        Encoder.from_pretrained(adapter)


def test_search_with_re_ranking_checks_the_probes_of_the_adapter(language_model, tmp_path):
    encoder = Encoder.from_pretrained(language_model("gpt_neo"))
    adapter = adapter_of(encoder, tmp_path / "adapter")
    load_encoder_and_reranker(adapter)
    stated = json.loads((adapter / FILE).read_text())
    stated["probes"]["document"][0][5] += 1.0
    (adapter / FILE).write_text(signed(stated))
    with pytest.raises(InputError, match="its embeddings differ by"):
        load_encoder_and_reranker(adapter)
