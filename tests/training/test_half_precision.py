"""Runs in half precision: what they leave opens everywhere with the embeddings of the same weights in float32.

Reference: transformers' own trunk in float32 with the weights worked out here (the base rounded to half precision, what
was trained as it is), pooled by hand; and sentence-transformers. The scripts are started as a user starts them.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModel

from sgpt.cli.compose import plain, typed
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.encoder.probes import probe_difference
from sgpt.encoder.verify import verify
from sgpt.retrieval.searcher import load_encoder_and_reranker
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training import record as outcome
from sgpt.training.config import TrainConfig
from sgpt.training.run_folder import open_run
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import LIMITS, random_trunk
from tests.encoder.test_export import TOLERANCE, weighted_mean_by_hand
from tests.starts import Forked
from tests.test_end_to_end import ROWS, all_started, lines

TEXTS = ["sort a path", "[[1]]", "what?", "naïve 東京 🙂", "word " * 100]


def trained_in_half(encoder: Encoder, tuning: str) -> dict[str, torch.Tensor]:
    """Tunes and moves what is trained by what half precision cannot hold. Returns the values before."""
    encoder.trunk = tune(encoder.trunk, TuningConfig(tuning))
    encoder.eval()
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(encoder.trunk).items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return before


def saved(encoder: Encoder, tuning: str, run: Path) -> Path:
    base = trained_in_half(encoder, tuning)
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, base, run / "adapter")
    export(encoder, run / "export", card="")
    return run


def save_again(folder: Path, change: Callable[[dict, Contract], None]) -> None:
    """With hashes that are right for the change, so that the probes alone can notice it."""
    weights, contract = load_file(folder / "model.safetensors"), Contract.load(folder)
    change(weights, contract)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    contract.save(folder, contract.files)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "tuning"), [("gpt_neo", "bitfit"), ("llama", "bitfit_norm"), ("gpt2", "full")])
def test_export_and_adapter_are_the_rounded_base_with_the_trained_tensors_unrounded(
    family, tuning, dtype, tiny_encoder, tmp_path
):
    encoder = tiny_encoder(family, dtype=dtype)
    base, run = encoder.contract.base, saved(encoder, tuning, tmp_path / "run")
    by_hand = {
        name: value.to(getattr(torch, dtype)).float() for name, value in load_file(f"{base}/model.safetensors").items()
    }
    by_hand |= {name: parameter.detach() for name, parameter in trainable_parameters(encoder.trunk).items()}
    theirs = AutoModel.from_pretrained(run / "export")  # no dtype said: the config's
    assert theirs.dtype == torch.float32
    for opened in (
        theirs,
        Encoder.from_pretrained(run / "export").trunk,
        Encoder.from_pretrained(run / "adapter").trunk,
    ):
        assert all(torch.equal(parameter, by_hand[name]) for name, parameter in opened.named_parameters())
    stored = load_file(run / "export" / "model.safetensors")
    assert {stored[name].dtype for name in trainable_parameters(encoder.trunk)} == {torch.float32}
    assert {value.dtype for name, value in stored.items() if name not in trainable_parameters(encoder.trunk)} <= {
        getattr(torch, dtype)
    }
    ours, sentence = Encoder.from_pretrained(run), SentenceTransformer(str(run / "export"), device="cpu")
    rows = ours.token_ids(TEXTS, "query")
    means = weighted_mean_by_hand(str(run / "export"), rows)
    for embeddings in (
        ours.encode_queries(TEXTS),
        sentence.encode_query(TEXTS),
        Encoder.from_pretrained(run / "adapter").encode_queries(TEXTS),
    ):
        assert np.abs(embeddings - means).max() < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_low_rank_over_half_precision_is_merged_in_float32(family, tiny_encoder, tmp_path):
    """Merged in bfloat16 it would lose what is below the digits of the weights; opened over the unrounded base it would
    be another.
    """
    run = saved(tiny_encoder(family, dtype="bfloat16"), "lora", tmp_path / "run")
    adapter = Encoder.from_pretrained(run / "adapter").encode_documents(TEXTS)
    for embeddings in (
        Encoder.from_pretrained(run / "export").encode_documents(TEXTS),
        SentenceTransformer(str(run / "export"), device="cpu").encode_document(TEXTS),
    ):
        assert np.abs(embeddings - adapter).max() < TOLERANCE


def test_one_trunk_for_search_and_re_ranking_is_the_rounded_base_too(language_model, tmp_path):
    base = str(language_model("gpt_neo"))
    contract = Contract(markers=MarkersConfig(**LIMITS), base=base)
    run = saved(
        Encoder(load_trunk(ModelConfig(base, "bfloat16")), load_tokenizer(base), contract), "bitfit", tmp_path / "run"
    )
    both, _ = load_encoder_and_reranker(run)
    assert np.array_equal(both.encode_queries(TEXTS), Encoder.from_pretrained(run / "adapter").encode_queries(TEXTS))


@pytest.mark.parametrize("tuning", ["bitfit", "lora"])
def test_small_gradients_are_not_lost_in_float16(tuning, tiny_encoder):
    """Of a batch of thousands of queries and long documents; float16 ends at 6e-8, and there was no loss scale."""

    def gradient(dtype: str) -> torch.Tensor:
        encoder = tiny_encoder("gpt2", dtype=dtype)
        torch.manual_seed(0)  # the low-rank matrices
        encoder.trunk = tune(encoder.trunk, TuningConfig(tuning))
        embeddings = encoder(encoder.token_ids(TEXTS, "query")).float()
        (torch.nn.functional.normalize(embeddings, dim=1)[:, 0].sum() / 20_000).backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(encoder.trunk).values()])

    exact = gradient("float32")
    assert (gradient("float16") - exact).norm() / exact.norm() < 0.02  # 2**-11 a rounding, over two layers


# --- opened in half precision ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_opened_in_half_precision_what_rounding_makes_is_allowed_and_a_wrong_model_is_refused(
    dtype, tiny_encoder, tmp_path
):
    run = saved(tiny_encoder("llama", dtype=dtype), "bitfit", tmp_path / "run")
    opened = Encoder.from_pretrained(run, dtype=dtype)
    assert opened.trunk.dtype == getattr(torch, dtype)
    rounding = Contract.load(run / "export").rounding[dtype]
    assert 2**-12 < rounding < 2**-5  # a rounding is 2**-8 and 2**-11 of a number
    # written with three digits
    assert probe_difference(opened.encode, opened.contract.probes) == pytest.approx(rounding, rel=1e-2)

    def shuffled(weights: dict, contract: Contract) -> None:
        weights["layers.0.mlp.down_proj.weight"] = weights["layers.0.mlp.down_proj.weight"].flip(0).contiguous()

    def unmarked(weights: dict, contract: Contract) -> None:
        contract.markers = MarkersConfig("none", **LIMITS)

    def otherwise_pooled(weights: dict, contract: Contract) -> None:
        contract.pooling = "mean"

    differ = rf"differ by .* where .* is allowed in {dtype}"
    markers = r"text_before of a query is '\[' in sgpt\.json, and '' with this tokenizer"
    for change, refusal in ((shuffled, differ), (unmarked, markers), (otherwise_pooled, differ)):
        wrong = shutil.copytree(run / "export", tmp_path / change.__name__)
        save_again(wrong, change)
        with pytest.raises(InputError, match=refusal):
            Encoder.from_pretrained(wrong, dtype=dtype)


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory, tiny_base) -> Path:
    """A base whose attention is a maximum: one rounding turns it to another token, as massive activations do in trained
    models.
    """
    folder = tmp_path_factory.mktemp("sensitive")
    shutil.copytree(tiny_base("llama"), folder, dirs_exist_ok=True)
    trunk = random_trunk("llama", 700, num_hidden_layers=8, hidden_size=64)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
    trunk.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_weights_that_make_much_of_a_rounding_are_exported(dtype, sensitive, tmp_path):
    """Training ended in "the export is wrong … by 5.5e-02 where 5e-02 is allowed … LlamaModel cannot be expressed
    there".
    """
    base = str(sensitive)
    encoder = Encoder(
        load_trunk(ModelConfig(base, dtype)), load_tokenizer(base), Contract(markers=MarkersConfig(**LIMITS), base=base)
    )
    run = saved(encoder, "bitfit", tmp_path / "run")
    embeddings = Encoder.from_pretrained(run).encode_queries(TEXTS)
    rounded = np.abs(encoder.encode_queries(TEXTS) - embeddings).max() / np.abs(embeddings).max()
    assert rounded > (0.05 if dtype == "bfloat16" else 0.02)  # 0.05 was allowed at most
    for name in ("bfloat16", "float16"):
        assert Encoder.from_pretrained(run, dtype=name).trunk.dtype == getattr(torch, name)


def test_a_wrong_export_of_such_weights_is_told_from_rounding(sensitive, tmp_path):
    base = str(sensitive)
    encoder = Encoder(
        load_trunk(ModelConfig(base)), load_tokenizer(base), Contract(markers=MarkersConfig(**LIMITS), base=base)
    )
    export(encoder, tmp_path / "export", card="")
    pooling = tmp_path / "export" / "1_Pooling" / "config.json"
    pooling.write_text(
        json.dumps(
            json.loads(pooling.read_text())
            | {"pooling_mode_weightedmean_tokens": False, "pooling_mode_mean_tokens": True}
        )
    )
    with pytest.raises(
        InputError,
        match=r"sentence-transformers .* embeds .* both in float32, by .* "
        r"It is not rounding, for which \d\.\de-0[3-7] is allowed with",
    ):
        verify(tmp_path / "export", encoder)


def test_weights_that_overflow_float16_are_said_to(tiny_encoder, tmp_path):
    encoder = tiny_encoder("opt")
    with torch.no_grad():
        # float16 ends at 65504, and normalised numbers are often above 1.1
        encoder.trunk.decoder.final_layer_norm.weight[:] = 6e4
    export(encoder, tmp_path / "export", card="")
    assert Contract.load(tmp_path / "export").rounding["float16"] is None
    with pytest.raises(InputError, match=r"(NaN or infinite|no) numbers in (torch\.)?float16"):
        Encoder.from_pretrained(tmp_path / "export", dtype="float16")
    assert np.isfinite(Encoder.from_pretrained(tmp_path / "export", dtype="bfloat16").encode_queries(TEXTS)).all()


def test_an_export_of_format_1_still_opens_and_its_rounding_is_measured_then(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    export(encoder, tmp_path / "export", card="")
    file = tmp_path / "export" / "sgpt.json"
    stored = json.loads(file.read_text())
    old = {"format": 1, **{key: stored[key] for key in ("pooling", "markers", "normalize", "base", "probes")}}
    file.write_text(json.dumps(old))
    assert np.array_equal(
        Encoder.from_pretrained(tmp_path / "export").encode_queries(TEXTS), encoder.encode_queries(TEXTS)
    )
    assert Encoder.from_pretrained(tmp_path / "export", dtype="bfloat16").trunk.dtype == torch.bfloat16
    file.write_text(json.dumps(old | {"pooling": "mean"}))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(InputError, match="differ by"):
            Encoder.from_pretrained(tmp_path / "export", dtype=dtype)
    file.write_text(json.dumps(stored | {"format": 1}))
    with pytest.raises(InputError, match=r"sgpt\.json: key .* is unknown here"):
        Encoder.from_pretrained(tmp_path / "export")


# --- the scripts, for a group that may read (umask 027) ---

TRAIN = [
    "data.path=train.jsonl", "data.num_hard_negatives=1", "data.cache=cache",
    "markers.query_max_tokens=24", "markers.document_max_tokens=40",
    "trainer.queries_per_process=8", "trainer.max_steps=2", "trainer.threads=1",
    "optim.learning_rate=1e-2", "evaluation.retrieval=[toy]",
]  # fmt: skip
RUNS = {"bfloat16": "bitfit", "float16": "lora"}
QUERY = "how to sort every path of the folder"


@pytest.fixture(scope="module")
def project(language_model, tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    (folder / "base").symlink_to(language_model("gpt_neo"))
    lines(folder / "train.jsonl", *ROWS)
    (folder / "toy" / "qrels").mkdir(parents=True)
    lines(folder / "toy" / "corpus.jsonl", *({"_id": f"d{n}", "text": row["positive"]} for n, row in enumerate(ROWS)))
    lines(folder / "toy" / "queries.jsonl", *({"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(ROWS)))
    (folder / "toy" / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(len(ROWS)))
    )
    (folder / "toy" / "qrels" / "train.tsv").write_text((folder / "toy" / "qrels" / "test.tsv").read_text())
    # its tokenizer puts a blank before every piece: no export with markers
    shutil.copytree(tiny_base("gpt2"), folder / "spaced")
    tokenizer = Tokenizer.from_file(str(folder / "spaced" / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(folder / "spaced" / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def private() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def starts(project, private) -> dict[str, Forked]:
    refused = ["biencoder", *TRAIN, "name=refused", "model.path=spaced", "evaluation.retrieval=[]"]
    named = {
        "refused": refused,
        "refused again": [*refused, "resume=true"],
        "refused export": ["export", "run=runs/refused"],
    }
    for dtype, tuning in RUNS.items():
        run = f"runs/{dtype}"
        training = ["biencoder", *TRAIN, f"name={dtype}", "model.path=base", f"model.dtype={dtype}", f"tuning={tuning}"]
        named |= {
            f"train {dtype}": training,
            f"evaluate {dtype}": [
                "evaluate",
                f"model={run}",
                "retrieval=[toy]",
                f"output=out/{dtype}.json",
                "fuse=false",
                "bm25=false",
            ],
            f"search {dtype}": ["search", f"run={run}", "corpus=toy", f"query={QUERY}", "top=3"],
            f"export {dtype}": ["export", f"run={run}", f"output=again/{dtype}"],
        }
    named["mine"] = [
        "mine",
        "data=toy",
        "source=model",
        "model=runs/bfloat16",
        "output=out/mined.jsonl",
        "first_rank=1",
        "threads=1",
    ]
    named["re-rank"] = [
        "search",
        "run=runs/bfloat16",
        "corpus=toy",
        f"query={QUERY}",
        "top=3",
        "rerank=true",
        "depth=3",
    ]
    return dict(zip(named, all_started(project, list(named.values())), strict=True))


@pytest.mark.parametrize("dtype", RUNS)
def test_every_script_takes_the_run(dtype, project, starts):
    for script in ("train", "evaluate", "search", "export"):
        assert starts[f"{script} {dtype}"].code == 0, starts[f"{script} {dtype}"].err
    encoder = Encoder.from_pretrained(project / "runs" / dtype / "export")
    documents = encoder.encode_documents([row["positive"] for row in ROWS], normalize=True)
    best = np.argsort(-(documents @ encoder.encode_queries([QUERY], normalize=True)[0]))[:3]
    assert re.findall(r"\b0\.\d{3}\D+(d\d+)\b", starts[f"search {dtype}"].out) == [f"d{row}" for row in best]
    ranks = np.argsort(
        np.argsort(-(encoder.encode_queries([row["query"] for row in ROWS], normalize=True) @ documents.T), axis=1),
        axis=1,
    )
    gains = [1 / np.log2(rank + 2) if rank < 10 else 0.0 for rank in np.diag(ranks)]
    assert json.loads((project / "out" / f"{dtype}.json").read_text())["toy"]["ndcg@10"] == pytest.approx(
        np.mean(gains), abs=1e-6
    )


@pytest.mark.parametrize("dtype", RUNS)
def test_card_and_manifest_say_what_is_held_in_which_precision(dtype, project, starts):
    manifest = json.loads((project / "runs" / dtype / "manifest.json").read_text())
    assert manifest["precision"] == {"frozen": dtype, "trained": "float32", "computed": dtype}
    numbers = f"{manifest['parameters']['trained']:,}"
    assert (
        f"| learns | {RUNS[dtype]}, {numbers} numbers in float32; the rest frozen in {dtype} |"
        in (project / "runs" / dtype / "export" / "README.md").read_text()
    )


@pytest.mark.parametrize("dtype", RUNS)
def test_adapter_and_export_say_what_they_were_made_of_and_have_probes(dtype, project, starts):
    run = project / "runs" / dtype
    inputs = json.loads((run / "manifest.json").read_text())["inputs"]
    adapter, exported = (json.loads((run / part / "sgpt.json").read_text()) for part in ("adapter", "export"))
    assert adapter["origin"] == exported["origin"]
    origin = adapter["origin"]
    assert (origin["dtype"], origin["tuning"]) == (dtype, RUNS[dtype])
    assert origin["base_weights"] == next(value for name, value in inputs.items() if name.startswith("base model"))
    assert origin["tokenizer"] == next(value for name, value in inputs.items() if name.startswith("tokenizer of"))
    assert origin["training_data"]
    assert origin["versions"]["torch"] == torch.__version__
    for role in ("query", "document"):
        assert adapter["probes"][f"{role}_ids"] == exported["probes"][f"{role}_ids"]
        np.testing.assert_allclose(adapter["probes"][role], exported["probes"][role], atol=1e-4)


def test_mining_and_re_ranking_take_the_run(project, starts):
    for name in ("mine", "re-rank"):
        assert starts[name].code == 0, starts[name].err
    assert len((project / "out" / "mined.jsonl").read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize("dtype", RUNS)
def test_exported_again_it_is_the_same_to_the_byte(dtype, project, starts):
    assert starts[f"export {dtype}"].code == 0, starts[f"export {dtype}"].err
    again, first = content(project / "again" / dtype), content(project / "runs" / dtype / "export")
    again["README.md"] = again["README.md"].replace(b"again/" + dtype.encode(), f"runs/{dtype}/export".encode())
    assert again == first  # but for the path in the card's lines of use


def test_a_refused_export_leaves_a_finished_run_and_the_command_that_makes_it_again(project, starts):
    run = project / "runs" / "refused"
    for name in ("refused", "refused again", "refused export"):
        assert starts[name].code == 2
        sentence = starts[name].err.splitlines()[-1]
        assert re.fullmatch(
            r"error: runs/refused has its adapter, results and report, but no export: the export is wrong: "
            r"sentence-transformers .* cannot be expressed there; use the adapter, or train with markers=none\. "
            r"To export it again: python train/export\.py run=runs/refused",
            sentence,
        ), starts[name].err
    for name in ("refused", "refused again"):
        assert "not exported" in starts[name].out
        assert "pairs per second" in starts[name].out
    assert "learning " in starts["refused"].err
    assert starts["refused again"].err.count("\n") == 1  # nothing was trained again
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "adapter", "results.json", "analysis.json", "report.html",
        "manifest.json",
    }  # fmt: skip
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("left", [(), ("export",)], ids=["before", "after"])
def test_killed_before_or_after_its_export_a_resumed_run_makes_that_alone(left, project, starts, monkeypatch, private):
    """The state that a kill leaves: the run is finished, its manifest knows of no export, and a folder may be there."""
    monkeypatch.chdir(project)
    run = Path("runs/bfloat16")
    whole = content(run)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["export"], manifest["bytes"]["model"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    if "export" in left:
        (run / "export" / "model.safetensors").write_bytes(b"of an earlier checkpoint")
    else:
        shutil.rmtree(run / "export")
    config = typed(TrainConfig, OmegaConf.create(yaml.safe_load((run / "config.yaml").read_text())))
    outcome.export_and_show(open_run(run, plain(config), resume=True), config)
    now = content(run)
    assert now.keys() == whole.keys()
    assert [name for name in whole if now[name] != whole[name]] == []


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_whoever_the_umask_lets_read_may_read_all_that_was_written(project, starts):
    """The weights were for their owner alone."""
    for place in ("runs", "again", "out", "cache"):
        paths = [project / place, *(project / place).rglob("*")]
        assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o640"}
        assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {"0o750"}
