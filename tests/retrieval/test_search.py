"""One frozen trunk for the encoder and the re-ranker: each gives what it gives alone, and next to the language model
there are only biases.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.data.formats.beir import read_search_corpus
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import Delta
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.searcher import SearchConfig, Searcher, index_folder, load_encoder_and_reranker
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import LIMITS

CORPUS = {
    f"d{n}": text for n,
    text in enumerate(
        ["parse a date", "open a file", "sort a list of names", "date arithmetic", "close the file again"]
    )
}


def tuned_run(
    base, folder, seed: int = 0, *, blocks: int | None = None, tuning: str = "bitfit", **options
) -> Encoder:  # fmt: skip
    """A run folder whose biases were moved at random, saved as a training run saves them."""
    trunk = tune(load_trunk(ModelConfig(str(base), layers=blocks)), TuningConfig(tuning, **options))
    encoder = Encoder(
        trunk, load_tokenizer(str(base)),
        Contract("weighted_mean", MarkersConfig("brackets", **LIMITS), base=str(base))
    )
    before = {name: value.detach().clone() for name, value in trainable_parameters(trunk).items()}
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in trainable_parameters(trunk).values():
            value.add_(torch.randn_like(value) * 0.3)
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, folder / "adapter")
    return encoder


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "bloom"])
def test_each_gives_what_it_gives_alone(language_model, tmp_path, family):
    alone = tuned_run(language_model(family), tmp_path)
    encoder, reranker = load_encoder_and_reranker(tmp_path)
    expected = alone.encode_documents(list(CORPUS.values()))
    scores = CrossEncoder.from_pretrained(language_model(family)).score(["a date"] * 5, list(CORPUS.values()))
    for _ in range(2):  # one after the other, and again
        assert np.array_equal(encoder.encode_documents(list(CORPUS.values())), expected)
        assert np.array_equal(reranker.score(["a date"] * 5, list(CORPUS.values())), scores)


def test_beside_the_language_model_there_are_only_biases(language_model, tmp_path):
    tuned_run(language_model("gpt_neo"), tmp_path)
    encoder, reranker = load_encoder_and_reranker(tmp_path)
    delta = encoder.delta.trained.values()
    modules = (reranker.model, encoder)
    tensors = [*delta, *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    model = AutoModelForCausalLM.from_pretrained(language_model("gpt_neo"))
    one = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    biases = sum(value.numel() * 4 for name, value in model.named_parameters() if name.endswith("bias"))
    assert sum(storages.values()) <= sum(one.values()) + biases


def test_several_tuned_models_over_one_trunk(language_model, tmp_path):
    """Served side by side from one trunk, each is bit for bit what it is alone."""
    base = language_model("gpt_neo")
    alone = [tuned_run(base, tmp_path / str(seed), seed) for seed in range(3)]
    trunk, tokenizer = load_trunk(ModelConfig(str(base))), load_tokenizer(str(base))
    together = [
        Encoder(trunk, tokenizer, one.contract, delta=Delta(trunk, tmp_path / str(seed) / "adapter")) for seed,
        one in enumerate(alone)
    ]
    for _ in range(2):
        for one, shared in zip(alone, together, strict=True):
            assert np.array_equal(shared.encode_queries(["parse a date"]), one.encode_queries(["parse a date"]))


def test_the_searcher_re_ranks_what_it_found(language_model, tmp_path):
    tuned_run(language_model("gpt_neo"), tmp_path)
    encoder, reranker = load_encoder_and_reranker(tmp_path)
    plain = Searcher(encoder, CORPUS, tmp_path / "index")
    found = plain("open the date", top=3)
    again = Searcher(encoder, CORPUS, tmp_path / "index", reranker=reranker, depth=3)("open the date", top=2)
    names = [hit.document_id for hit in found]
    alone = CrossEncoder.from_pretrained(language_model("gpt_neo")).score(
        ["open the date"] * 3, [CORPUS[name] for name in names]
    )
    scores = dict(zip(names, alone, strict=True))
    assert [hit.document_id for hit in again] == sorted(names, key=lambda name: -scores[name])[:2]
    assert [hit.score for hit in again] == sorted(scores.values(), reverse=True)[:2]


def test_an_index_knows_the_weights_it_was_made_with(language_model, tmp_path):
    """Also where the trunk holds the base's while the index is opened."""
    base = language_model("gpt_neo")
    for seed in range(2):
        tuned_run(base, tmp_path / str(seed), seed)
    first, second = (load_encoder_and_reranker(tmp_path / str(seed))[0] for seed in range(2))
    before = Searcher(first, CORPUS, tmp_path / "index")("a date", 5)
    after = Searcher(second, CORPUS, tmp_path / "index")("a date", 5)
    fresh = Searcher(second, CORPUS, tmp_path / "other")("a date", 5)
    assert [(hit.document_id, hit.score) for hit in after] == [(hit.document_id, hit.score) for hit in fresh]
    assert [hit.score for hit in before] != [hit.score for hit in after]
    # the same model, opened by itself
    assert Searcher(
        Encoder.from_pretrained(tmp_path / "1" / "adapter"), CORPUS, tmp_path / "index"
    )("a date", 5) == after


def test_what_cannot_share_is_refused(language_model, tiny_base, tmp_path):
    tuned_run(language_model("gpt_neo"), tmp_path)
    other = load_trunk(ModelConfig(str(tiny_base("gpt2"))))
    with pytest.raises(InputError, match=r"made from .* and this GPT2Model .* is another"):
        Delta(other, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"holds no adapter/, so there is no base to re-rank with"):
        load_encoder_and_reranker(tiny_base("gpt2"))
    with pytest.raises(InputError, match=r"is no change that could be put on and off: there is no sgpt_delta"):
        Delta(other, tiny_base("gpt2"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": 1}, r"trained over the first 1 blocks of .* \(model.layers\), which are no language model"),
        ({"tuning": "lora"}, r"is not the bias delta .*: it is of low rank .* cannot share one trunk"),
        ({"tuning": "full"}, r"is not the bias delta .*: it changes the matrix \S+\.weight"),
        ({"tuning": "full", "layers": "last:1"}, r"is not the bias delta .*: it changes the matrix \S+\.weight"),
    ],
)
def test_a_run_that_cannot_re_rank_is_told_to_leave_that_out(options, reason, language_model, tmp_path):
    tuned_run(language_model("llama"), tmp_path, **options)
    with pytest.raises(InputError, match=reason + r".*; leave out rerank=true"):
        load_encoder_and_reranker(tmp_path)


def test_every_corpus_and_dtype_has_an_index_of_its_own(tmp_path, monkeypatch):
    """A name as "." has none would make the folder of all indexes the index, and replace it."""
    run = tmp_path / "run"
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "corpus.jsonl").write_text("")
    run.mkdir()
    (run / "sgpt.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "one")
    corpora = [Path("."), Path("../two"), Path("corpus.jsonl"), tmp_path / "two" / "corpus.jsonl"]
    indexes = [index_folder(str(run), corpus) for corpus in corpora]
    assert [index.parent for index in indexes] == [run / "index"] * 4
    assert [index.name for index in indexes] == ["one", "two", "one-corpus.jsonl", "two-corpus.jsonl"]
    assert index_folder(str(run), Path("."), "int8").name == "one-int8"
    for part in ("export", "adapter"):  # the first of which is replaced when the run is exported again
        (run / part).mkdir()
        (run / part / "sgpt.json").write_text("{}")
        assert index_folder(str(run / part), corpora[0]) == indexes[0]


def test_a_quantised_trunk_searches_and_re_ranks(language_model, tmp_path):
    """Its embeddings are off by its rounding, which is no change of the weights."""
    whole = tuned_run(language_model("gpt_neo"), tmp_path)
    encoder, reranker = load_encoder_and_reranker(tmp_path, dtype="int8")
    one, other = (each.encode_queries(["a date"], normalize=True)[0] for each in (whole, encoder))
    assert 0.99 < one @ other < 1 - 1e-7
    assert np.isfinite(reranker.score(["a date"], ["open a file"])).all()


def test_an_id_that_comes_twice_is_refused(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"_id": "1", "text": "cats"}\n{"_id": "1", "text": "dogs"}\n')
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 2: id '1' was used before"):
        read_search_corpus(file)


@pytest.mark.parametrize(
    "options", [{"top": 0}, {"top": -1}, {"depth": 0}, {"query": " "}, {"depth": 9}, {"prompt": "A"}]
)
def test_settings_that_find_nothing_or_have_no_effect_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SearchConfig(run="run", **options)
