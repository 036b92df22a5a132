"""Our models under mteb: local tasks of real rows, and the scores that our own evaluation gives. No network."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.data.formats.beir import RetrievalSet, read_retrieval
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.formats.scored_pairs import PairSet
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Sets, evaluate
from sgpt.evaluation.mteb import MtebConfig, MtebEncoder, MtebReranker, name_of, read_tasks, role_of, run
from sgpt.retrieval.metrics import ranking
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
MARKERS = MarkersConfig("brackets", query_max_tokens=24, document_max_tokens=40)
mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'sgpt-framework[mteb]'")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import CrossEncoderProtocol, EncoderProtocol  # noqa: E402


def metadata(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name, type=kind, main_score=score, dataset={"path": f"local/{name}", "revision": "0"},
        description="rows of a local file", reference=None,
        category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], date=None, domains=None,
        task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
    )  # fmt: skip


class Retrieval(AbsTaskRetrieval):
    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")

    def __init__(self, chosen: RetrievalSet, candidates: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.chosen, self.candidates = chosen, candidates

    def load_data(self, **options) -> None:
        texts = {
            name: Dataset.from_list([{"id": key, "text": text} for key, text in rows.items()])
            for name, rows in (("corpus", self.chosen.corpus), ("queries", self.chosen.queries))
        }
        relevant = {query: dict(documents) for query, documents in self.chosen.qrels.items()}
        self.dataset = {"default": {"test": {**texts, "relevant_docs": relevant, "top_ranked": self.candidates}}}
        self.data_loaded = True


class Reranking(Retrieval):
    metadata = metadata("LocalReranking", "Reranking", "ndcg_at_10")


class Similarity(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")

    def __init__(self, pairs: PairSet) -> None:
        super().__init__()
        self.pairs = pairs

    def load_data(self, **options) -> None:
        columns = {"sentence1": self.pairs.first, "sentence2": self.pairs.second, "score": self.pairs.scores}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


@pytest.fixture(scope="module")
def scifact() -> RetrievalSet:
    """40 queries of SciFact with their documents and as many others."""
    whole = read_retrieval(DATA / "scifact", "test")
    qrels = dict(islice(whole.qrels.items(), 40))
    judged = {document for documents in qrels.values() for document in documents}
    kept = judged | set(islice(whole.corpus, 40))
    return RetrievalSet(
        "scifact", {key: text for key, text in whole.corpus.items() if key in kept},
        {key: whole.queries[key] for key in qrels}, qrels
    )


@pytest.fixture(scope="module")
def stsb() -> PairSet:
    rows = [row for _, row in islice(read_rows(DATA / "stsb" / "pairs.jsonl.gz"), 60)]
    return PairSet(
        "stsb", [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], [row["score"] for row in rows]
    )


@pytest.fixture(scope="module")
def encoder(tiny_base) -> Encoder:
    return Encoder.from_pretrained(tiny_base("gpt_neo"), markers=MARKERS)


def test_retrieval_and_similarity_score_as_in_our_own_evaluation(encoder, scifact, stsb, tmp_path):
    found = run(MtebEncoder(encoder), [Retrieval(scifact), Similarity(stsb)], tmp_path)
    ours = evaluate(encoder, Sets([scifact], [stsb]))
    # mteb rounds to five digits
    assert found["LocalRetrieval"]["ndcg_at_10"] == pytest.approx(round(ours["scifact"]["ndcg@10"], 5), abs=1e-6)
    assert found["LocalSTS"]["cosine_spearman"] == pytest.approx(ours["stsb"]["spearman_cosine"], abs=1e-6)
    assert 0 < found["LocalRetrieval"]["ndcg_at_10"] < 1


def test_results_are_mtebs_files_by_model_and_revision_and_are_not_computed_again(encoder, stsb, tmp_path, monkeypatch):
    model = MtebEncoder(encoder, "sgpt/tiny")
    found = run(model, [Similarity(stsb)], tmp_path)
    (file,) = (tmp_path / "results").glob("*/*/LocalSTS.json")
    assert (file.parts[-3], file.parts[-2]) == ("sgpt__tiny", model.mteb_model_meta.revision)
    written = json.loads(file.read_text())["scores"]["test"][0]
    # six digits in a file
    assert written["cosine_spearman"] == pytest.approx(found["LocalSTS"]["cosine_spearman"], abs=1e-6)
    assert json.loads((file.parent / "model_meta.json").read_text())["embed_dim"] == 32
    monkeypatch.setattr(encoder, "encode", None)
    again = run(MtebEncoder(encoder, "sgpt/tiny"), [Similarity(stsb)], tmp_path)
    assert again["LocalSTS"] == pytest.approx(found["LocalSTS"], abs=1e-6)


def test_the_revision_changes_with_weights_and_markers(tiny_base, encoder):
    changed = Encoder.from_pretrained(tiny_base("gpt_neo"), markers=MARKERS)
    assert MtebEncoder(changed).mteb_model_meta.revision == MtebEncoder(encoder).mteb_model_meta.revision
    next(parameter for name, parameter in changed.trunk.named_parameters() if name.endswith("bias")).data += 0.1
    plain = Encoder.from_pretrained(tiny_base("gpt_neo"))
    assert len({MtebEncoder(model).mteb_model_meta.revision for model in (encoder, changed, plain)}) == 3


def test_the_protocols_are_kept_and_the_metadata_is_the_contracts(encoder, tiny_head):
    model = MtebEncoder(encoder, "sgpt/tiny")
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert (
        meta.name, meta.embed_dim, meta.max_tokens, meta.similarity_fn_name, meta.use_instructions
    ) == ("sgpt/tiny", 32, 40, "cosine", True)
    reranker = MtebReranker(tiny_head)
    assert isinstance(reranker, CrossEncoderProtocol)
    assert not isinstance(reranker, EncoderProtocol)
    assert (reranker.mteb_model_meta.is_cross_encoder, reranker.mteb_model_meta.max_tokens) == (True, 128)


def test_embeddings_are_those_of_the_role(encoder):
    model, texts = MtebEncoder(encoder), ["a claim", "of two batches"]
    batches = [{"text": texts[:1]}, {"text": texts[1:]}]
    for prompt_type, expected in (
        ("query", encoder.encode_queries), ("document", encoder.encode_documents), (None, encoder.encode_queries)
    ):
        made = model.encode(
            batches, task_metadata=Retrieval.metadata, hf_split="test", hf_subset="default", prompt_type=prompt_type,
            batch_size=1
        )
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, expected(texts))


@pytest.mark.parametrize(
    ("task", "prompt_type", "role"),
    [
        ("SciFact", "document", "document"), ("SciFact", "query", "query"), ("STS12", None, "query"),
        ("SciDocsRR", "document", "query")
    ],
)
def test_equals_are_compared_as_queries(task, prompt_type, role):
    assert role_of(task, prompt_type) == role
    assert mteb.get_task(task).metadata.name == task  # mteb still calls it so


@pytest.fixture(scope="module")
def tiny_head(tmp_path_factory) -> CrossEncoder:
    """A random decoder with its language-model head, opened by the real code."""
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    from tests.conftest import FAMILIES, byte_level

    folder, tokenizer = tmp_path_factory.mktemp("head"), byte_level()
    torch.manual_seed(0)
    GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **FAMILIES["gpt_neo"][1])
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder.from_pretrained(folder, prompt="A")


def test_a_reranker_scores_the_candidates_as_we_do(tiny_head, scifact, tmp_path):
    queries, documents = list(islice(scifact.queries, 8)), list(scifact.corpus)[:5]
    chosen = RetrievalSet(
        "few",
        {key: text[:100] for key, text in scifact.corpus.items()},
        {key: scifact.queries[key][:80] for key in queries},
        {query: {documents[place % 5]: 1} for place, query in enumerate(queries)},
    )
    found = run(MtebReranker(tiny_head), [Reranking(chosen, dict.fromkeys(queries, documents))], tmp_path)
    scores = {
        query: tiny_head.score([chosen.queries[query]] * 5, [chosen.corpus[document] for document in documents])
        for query in queries
    }
    ours = ranking(
        chosen.qrels, {query: dict(zip(documents, scores[query].tolist(), strict=True)) for query in queries}
    )
    assert found["LocalReranking"]["ndcg_at_10"] == pytest.approx(round(ours["ndcg@10"], 5), abs=1e-6)
    assert 0.4 < ours["ndcg@10"] < 1


def test_tasks_and_benchmarks_are_known_by_name_and_others_refused():
    assert [task.metadata.name for task in read_tasks(["STS12", "SciFact", "STS12"])] == ["STS12", "SciFact"]
    assert len(read_tasks(["MTEB(eng, v1)"])) > 50
    with pytest.raises(
        InputError,
        match=r"tasks: mteb has no task and no benchmark of this name: 'SciFat' not found\. Did you mean: 'SciFact'"
    ):
        read_tasks(["SciFat"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tiny"}, r"name=tiny must be <organisation>/<model>, for example name=sgpt/tiny"),
        ({"prompt": "G", "pooling": "mean"}, r"prompt=G re-ranks")
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MtebConfig(**options)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/pydocs", "sgpt/pydocs"), ("runs/pydocs/export", "sgpt/pydocs"),
        ("Muennighoff/SGPT-125M", "Muennighoff/SGPT-125M")
    ]
)
def test_models_are_called_after_their_run_or_hub_id(path, name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "pydocs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert name_of(path) == name


def test_without_mteb_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match=r"mteb is not installed; pip install 'sgpt-framework\[mteb\]'"):
        read_tasks(["STS12"])


@pytest.mark.slow
def test_the_script_offline_says_which_data_set_is_missing_in_one_sentence(tiny_base, tmp_path):
    command = [
        sys.executable, str(REPOSITORY / "train" / "evaluate_mteb.py"), f"model={tiny_base('gpt_neo')}", "tasks=[STS12]"
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    said = (
        r"error: tasks=STS12: its data set mteb/sts12-sts is not in the cache of Hugging Face's datasets, and the hub "
        r"cannot give it .*; run this once .*\n"
    )
    assert re.fullmatch(said, ended.stderr), ended.stderr
