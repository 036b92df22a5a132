"""Exports against ids and means worked out by hand from the base, and against sentence-transformers, for texts that
break exports.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModel, AutoTokenizer

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.encoder.pooling import POOLINGS
from sgpt.encoder.probes import probe_difference
from sgpt.encoder.verify import hostile_texts, verify
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, unlock
from sgpt.text.markers import ROLES, MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import END, FAMILIES, LIMITS, REAL_GPT2, random_trunk

SUFFIX = {"query": ("[", "]"), "document": ("{", "}")}
TEXTS = ["", "[[1]]", "what?", "{}", "]", " both ", "\n", f"[a]{END}[b]", "naïve 東京 🙂", "word " * 200]
TOLERANCE = 2e-6  # entries are about 1; float32 rounding over two layers, and GPT-Neo runs eagerly there, by SDPA here


def exported_to(folder: Path, encoder: Encoder, card: str = "") -> Path:
    export(encoder, folder, card=card)
    return folder


@pytest.fixture(scope="module")
def exported(tiny_encoder, tmp_path_factory):
    """exported(**tiny_encoder arguments) -> (encoder, folder), made once."""
    made: dict[tuple, tuple[Encoder, Path]] = {}

    def make(family: str = "gpt_neo", markers: str = "brackets", **options) -> tuple[Encoder, Path]:
        key = (family, markers, *sorted(options.items()))
        if key not in made:
            encoder = tiny_encoder(family, markers, **options)
            made[key] = encoder, exported_to(tmp_path_factory.mktemp("export") / family, encoder, card=f"# {family}\n")
        return made[key]

    return make


def ids_by_hand(base: str, text: str, role: str, limit: int, markers: str = "brackets") -> list[int]:
    """Special tokens outside, markers inside of them, the text alone between, cut so that everything fits in `limit`.
    """
    tokenizer = Tokenizer.from_file(f"{base}/tokenizer.json")
    name = Path(base).name
    before, after = (
        (["</s>"], []) if name.startswith("opt") else (["[CLS]"], ["[SEP]"]) if name.startswith("bert") else ([], [])
    )
    if markers == "brackets":
        before, after = [*before, SUFFIX[role][0]], [SUFFIX[role][1], *after]
    content = tokenizer.encode(text, add_special_tokens=False).ids[: limit - len(before) - len(after)]
    return [*map(tokenizer.token_to_id, before), *content, *map(tokenizer.token_to_id, after)]


def weighted_mean_by_hand(base: str, rows: list[list[int]]) -> np.ndarray:
    trunk, means = AutoModel.from_pretrained(base).eval(), []
    for row in rows:
        with torch.no_grad():
            hidden = trunk(input_ids=torch.tensor([row])).last_hidden_state[0].double().numpy()
        mean = np.zeros(hidden.shape[1])
        for place, vector in enumerate(hidden, start=1):
            mean += place / (len(row) * (len(row) + 1) / 2) * vector
        means.append(mean)
    return np.array(means)


def st_ids(model: SentenceTransformer, texts: list[str], **task) -> list[list[int]]:
    batch = model.preprocess(texts, **task)
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def st_encode(model: SentenceTransformer, texts: list[str], role: str) -> np.ndarray:
    return (model.encode_query if role == "query" else model.encode_document)(texts, batch_size=4)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_readers_give_ids_and_weighted_means_worked_out_by_hand(family, exported):
    encoder, folder = exported(family)
    ours, theirs = Encoder.from_pretrained(folder), SentenceTransformer(str(folder), device="cpu")
    for role in ROLES:
        rows = [ids_by_hand(encoder.contract.base, text, role, LIMITS[f"{role}_max_tokens"]) for text in TEXTS]
        assert ours.token_ids(TEXTS, role) == rows
        assert st_ids(theirs, TEXTS, task=role) == rows
        means = weighted_mean_by_hand(encoder.contract.base, rows)
        assert np.abs(ours.encode(TEXTS, role) - means).max() < TOLERANCE
        assert np.abs(st_encode(theirs, TEXTS, role) - means).max() < TOLERANCE


def test_real_gpt2_tokenizer_merges_question_mark_and_bracket_and_the_export_does_not(exported):
    encoder, folder = exported("gpt_neo", real_tokenizer=True)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert encoder.tokenizer("what?]", add_special_tokens=False)["input_ids"] == [10919, 26398]
    assert st_ids(theirs, ["what?", ""], task="query") == [[58, 10919, 30, 60], [58, 60]]
    assert st_ids(theirs, ["what?", END], task="document") == [[90, 10919, 30, 92], [90, 50256, 92]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_changes_nothing(side, exported):
    encoder, folder = exported("gpt_neo")
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs.tokenizer.padding_side = side
    for role in ROLES:
        rows = encoder.token_ids(TEXTS, role)
        assert st_ids(theirs, TEXTS, task=role) == rows
        batch = encoder.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            embeddings = Encoder.from_pretrained(folder).embed(batch["input_ids"], batch["attention_mask"]).numpy()
        assert np.abs(embeddings - weighted_mean_by_hand(encoder.contract.base, rows)).max() < TOLERANCE


@pytest.mark.parametrize(("family", "query", "document"), [("gpt2", 24, 24), ("bert", 9, 30)])
def test_without_markers_special_tokens_and_both_limits_are_kept(family, query, document, exported):
    limits = {"query_max_tokens": query, "document_max_tokens": document}
    encoder, folder = exported(family, "none", **limits)
    theirs = SentenceTransformer(str(folder), device="cpu")
    texts = [text for text in TEXTS if text]  # "" has no token at all for GPT-2
    for role in ROLES:
        rows = [ids_by_hand(encoder.contract.base, text, role, limits[f"{role}_max_tokens"], "none") for text in texts]
        assert st_ids(theirs, texts, task=role) == rows
        assert (
            np.abs(st_encode(theirs, texts, role) - weighted_mean_by_hand(encoder.contract.base, rows)).max()
            < TOLERANCE
        )
    assert not (folder / "chat_template.jinja").exists()


def test_text_without_a_token_is_zeros_here_and_in_a_sentence_transformers_batch(exported):
    encoder, folder = exported("gpt2", "none")
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert not encoder.encode_queries(["", "a"])[0].any()
    assert not theirs.encode_query(["", "a"])[0].any()


def test_original_limit_is_one_token_shorter(exported):
    encoder, folder = exported("gpt_neo", original_limit=True)
    ids = st_ids(SentenceTransformer(str(folder), device="cpu"), ["word " * 200], task="query")[0]
    base = encoder.contract.base
    assert len(ids) == 23
    assert ids == [*ids_by_hand(base, "word " * 200, "query", 24)[:-2], ids_by_hand(base, "", "query", 24)[-1]]


def test_plain_encode_has_no_markers(exported):
    encoder, folder = exported("opt")
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert st_ids(theirs, TEXTS) == [ids_by_hand(encoder.contract.base, text, "document", 40, "none") for text in TEXTS]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_and_unit_length_are_exported(pooling, exported):
    encoder, folder = exported("llama", pooling=pooling, normalize=True)
    embeddings = SentenceTransformer(str(folder), device="cpu").encode_query(TEXTS)
    assert np.abs(embeddings - encoder.encode_queries(TEXTS)).max() < TOLERANCE
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] == (
        pooling == "mean"
    )


def test_export_holds_what_other_readers_ask_for(exported):
    _, folder = exported("gpt_neo")
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 2)
    assert not {"_attn_implementation", "attn_implementation"} & config.keys()
    assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": True,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    assert json.loads((folder / "config_sentence_transformers.json").read_text())["requirements"] == {
        "sentence-transformers": ">=6.0"
    }
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (folder / "README.md").read_text() == "# gpt_neo\n"
    assert not [*folder.glob("*.bin"), *folder.glob("*.py")]


def test_sentence_transformers_can_save_it_anew(exported, tmp_path):
    encoder, folder = exported("gpt_neo")
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert (
        np.abs(
            st_encode(SentenceTransformer(str(tmp_path / "again"), device="cpu"), TEXTS, "query")
            - encoder.encode_queries(TEXTS)
        ).max()
        < TOLERANCE
    )
    with pytest.raises(InputError, match="chat template"):  # our reader would leave the markers out
        Encoder.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("family", ["gpt_neo", "qwen2"])
def test_our_reader_gets_the_untouched_tokenizer(family, exported):
    encoder, folder = exported(family)
    ours, base = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(encoder.contract.base)
    assert ours.chat_template is None
    assert ours.backend_tokenizer.pre_tokenizer.__getstate__() == base.backend_tokenizer.pre_tokenizer.__getstate__()
    assert Encoder.from_pretrained(folder).contract.fingerprint() == encoder.contract.fingerprint()


def test_probes_tell_changed_weights(exported):
    _, folder = exported("gpt_neo")
    encoder = Encoder.from_pretrained(folder)
    assert probe_difference(encoder.encode, encoder.contract.probes) < 1e-6
    with torch.no_grad():
        encoder.trunk.ln_f.bias[3] += 0.01
    assert probe_difference(encoder.encode, encoder.contract.probes) > 0.001


def test_an_export_with_other_weights_is_refused_on_loading(exported, tmp_path):
    _, folder = exported("gpt_neo")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["ln_f.bias"] = weights["ln_f.bias"] + 0.1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors: its hash differs"):
        Encoder.from_pretrained(changed)
    contract = Contract.load(folder)
    contract.save(changed, contract.files)  # the probes notice it as well
    with pytest.raises(InputError, match=r"embeddings differ by .* where 1\.0e-03 is allowed in float32"):
        Encoder.from_pretrained(changed)


def test_hostile_texts_lie_around_both_limits(exported):
    encoder, _ = exported("gpt_neo", real_tokenizer=True)
    lengths = {len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in hostile_texts(encoder)}
    assert lengths >= {0, 21, 22, 23, 37, 38, 39}
    assert max(lengths) > 1000


# --- refusing ---


def test_tokenizer_that_cannot_be_expressed_is_refused_and_nothing_is_left(tiny_base, tmp_path):
    """With add_prefix_space every piece gets a blank in front, the marker too."""
    base = shutil.copytree(tiny_base("gpt2"), tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(base / "tokenizer.json"))
    encoder = Encoder(
        load_trunk(ModelConfig(str(base))),
        load_tokenizer(str(base)),
        Contract(markers=MarkersConfig(**LIMITS), base=str(base)),
    )
    with pytest.raises(
        InputError,
        match=r"sentence-transformers .* gives the query .* other token ids .*\] instead of \[.*cannot be expressed",
    ):
        export(encoder, tmp_path / "out" / "export", card="")
    assert not list((tmp_path / "out").iterdir())
    encoder = Encoder(
        encoder.trunk, encoder.tokenizer, Contract(markers=MarkersConfig("none", **LIMITS), base=str(base))
    )
    assert exported_to(tmp_path / "out" / "export", encoder).is_dir()  # without markers it can


def test_verify_names_text_and_ids_of_a_changed_template(exported, tmp_path):
    encoder, folder = exported("gpt_neo")
    folder = shutil.copytree(folder, tmp_path / "export")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("\\ufdd0", ""))  # the reference's failure: `?]` merges
    merged = {
        text: encoder.tokenizer(f"[{text}]", add_special_tokens=False)["input_ids"] for text in hostile_texts(encoder)
    }
    text, theirs = next((text, ids) for text, ids in merged.items() if ids != encoder.token_ids([text], "query")[0])
    ours = encoder.token_ids([text], "query")[0]
    with pytest.raises(InputError) as refusal:
        verify(folder, encoder)
    assert f"gives the query {text!r} other token ids" in str(refusal.value)
    assert f"{theirs} instead of {ours}" in str(refusal.value)


def test_verify_refuses_other_weights_pooling_and_contract(exported, tmp_path):
    encoder, folder = exported("gpt_neo")
    weights = shutil.copytree(folder, tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    tensors["ln_f.bias"][0] += 0.01
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    contract = Contract.load(folder)
    contract.save(weights, contract.files)  # else the hash is refused first
    with pytest.raises(InputError, match=r"saved with|sgpt embeds"):
        verify(weights, encoder)
    pooling = shutil.copytree(folder, tmp_path / "pooling")
    edit(pooling / "1_Pooling" / "config.json", pooling_mode_weightedmean_tokens=False, pooling_mode_mean_tokens=True)
    with pytest.raises(InputError, match=r"sentence-transformers .* embeds"):
        verify(pooling, encoder)
    contract = shutil.copytree(folder, tmp_path / "contract")
    edit(contract / "sgpt.json", pooling="mean")
    with pytest.raises(InputError, match=r"contract|saved with"):
        verify(contract, encoder)


def test_only_an_export_of_ours_is_replaced(exported, tmp_path):
    encoder, _ = exported("gpt_neo")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no export"):
        export(encoder, foreign, card="")
    assert (foreign / "thesis.txt").read_text() == "years of work"
    taken = lock(tmp_path / "ours")  # as another process that exports the same run
    with pytest.raises(InputError, match=r"ours: another process is writing to it; wait until that ends, or choose"):
        export(encoder, tmp_path / "ours", card="")
    unlock(taken)
    for card in ("first", "second"):
        export(encoder, tmp_path / "ours", card=card)
        assert (tmp_path / "ours" / "README.md").read_text() == card
    assert {path.name for path in tmp_path.iterdir()} == {"foreign", "ours"}


# --- other weights ---


def test_opt_that_narrows_its_hidden_states_at_the_end(tiny_base, tmp_path):
    """OPT-350m: hidden size 1024, embeddings of 512."""
    base = shutil.copytree(tiny_base("opt"), tmp_path / "base")
    random_trunk("opt", 701, word_embed_proj_dim=16).save_pretrained(base)
    encoder = Encoder(
        load_trunk(ModelConfig(str(base))),
        load_tokenizer(str(base)),
        Contract(markers=MarkersConfig(**LIMITS), base=str(base)),
    )
    assert encoder.encode_queries(["a"]).shape == (1, 16)
    assert (
        SentenceTransformer(str(exported_to(tmp_path / "export", encoder)), device="cpu").get_embedding_dimension()
        == 16
    )


def test_low_rank_adapters_are_merged_and_the_encoder_keeps_its_own(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    encoder.trunk = tune(encoder.trunk, TuningConfig("lora"))
    with torch.no_grad():
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = {name: parameter.clone() for name, parameter in encoder.trunk.named_parameters()}
    folder = exported_to(tmp_path / "export", encoder)
    assert all(torch.equal(before[name], parameter) for name, parameter in encoder.trunk.named_parameters())
    assert (
        load_file(folder / "model.safetensors").keys()
        == load_file(Path(encoder.contract.base) / "model.safetensors").keys()
    )
    assert (
        np.abs(SentenceTransformer(str(folder), device="cpu").encode_query(TEXTS) - encoder.encode_queries(TEXTS)).max()
        < 1e-5
    )


def test_bfloat16_stays_bfloat16(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt2", dtype="bfloat16")
    folder = exported_to(tmp_path / "export", encoder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.skipif(not REAL_GPT2.is_dir(), reason="no shared/models beside the repository")
def test_sentencepiece_like_tokenizer_exports_without_markers_and_has_none_for_documents(tmp_path):
    base = str(REAL_GPT2.parent / "stories260k-zerobias")
    encoder = Encoder(
        load_trunk(ModelConfig(base)), load_tokenizer(base), Contract(markers=MarkersConfig("none", 64, 64), base=base)
    )
    folder = exported_to(tmp_path / "export", encoder)
    assert st_ids(SentenceTransformer(str(folder), device="cpu"), [" a"], task="query")[0][0] == 1  # <s>
    with pytest.raises(InputError, match="no token"):
        Encoder(encoder.trunk, encoder.tokenizer, Contract(base=base))
