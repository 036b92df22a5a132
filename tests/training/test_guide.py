"""A guide: its embeddings are made once, shared out and never stale; its mask is GISTEmbedLoss', curated hard negatives
apart.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

from sgpt.data.feed.collate import Batch, collate
from sgpt.data.feed.embeddings import _start as start_embedding
from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed
from sgpt.data.readers import DataConfig, SourceConfig, build_feed
from sgpt.decoder.attention import prepare
from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.runtime.distributed import average_gradients
from sgpt.runtime.errors import InputError
from sgpt.runtime.provenance import threads
from sgpt.text.markers import MarkersConfig
from sgpt.training.guide import with_guide, with_hard_batches
from sgpt.training.health import batch_statistics
from sgpt.training.loss import LossConfig, objective
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import random_trunk
from tests.starts import in_processes

WORDS = [
    "parse a date", "open a file", "sort words", "sum numbers", "join paths", "read lines", "make a folder", "find text"
]
EXAMPLES = [Example(word, f"how to {word} from a string", (f"never {word}", f"{word} or not")) for word in WORDS]


@pytest.fixture(scope="module")
def guide(tiny_encoder, tmp_path_factory) -> Path:
    """A folder of sentence-transformers' layout without our contract would do as well; this one has markers."""
    folder = tmp_path_factory.mktemp("guide") / "export"
    export(tiny_encoder("gpt2", pooling="mean"), folder, card="")
    return folder


def feed_of(folder: Path, tokenizer, *, examples=EXAMPLES, queries=8, processes=1, **options) -> Feed:
    file = folder / "train.jsonl"
    if not file.is_file():
        file.write_text(
            "".join(
                json.dumps({"query": e.query, "positive": e.positive, "negative": [*e.hard_negatives]}) + "\n"
                for e in examples
            )
        )
    config = DataConfig(**{"path": str(file), "cache": str(folder / "cache"), "num_hard_negatives": 1, **options})
    return build_feed(
        config, tokenizer, MarkersConfig(query_max_tokens=24, document_max_tokens=40), queries_per_process=queries,
        processes=processes
    )


def batch_with_guide(batch: Batch, queries: torch.Tensor, documents: torch.Tensor) -> Batch:
    return replace(batch, guide_queries=queries, guide_documents=documents)


# --- what is stored ---


def test_batches_bring_the_guides_embeddings_in_query_major_order_each_text_in_its_role(guide, tmp_path, tiny_encoder):
    encoder = Encoder.from_pretrained(guide)
    feed = with_guide(feed_of(tmp_path, tiny_encoder("gpt2").tokenizer), LossConfig(guide=str(guide)))
    batch, source = feed.batch(0, 0), feed.sources[0]
    drawn = [source.draw(example, epoch, feed.seed) for _, example, epoch in feed.drawn_examples(0, 0)]
    queries = [source.examples.texts[one.query] for one in drawn]
    documents = [source.examples.texts[text] for one in drawn for text in one.documents]
    # texts next to each other change the last bits
    assert np.abs(batch.guide_queries.numpy() - encoder.encode_queries(queries, normalize=True)).max() < 1e-6
    assert np.abs(batch.guide_documents.numpy() - encoder.encode_documents(documents, normalize=True)).max() < 1e-6


def test_a_symmetric_sources_documents_are_queries_to_the_guide(guide, tmp_path, tiny_encoder):
    encoder = Encoder.from_pretrained(guide)
    source = with_guide(
        feed_of(tmp_path, tiny_encoder("gpt2").tokenizer, symmetric=True), LossConfig(guide=str(guide))
    ).sources[0]
    text = source.examples.positives[3][0]
    expected = encoder.encode_queries([source.examples.texts[text]], normalize=True)[0]
    assert np.abs(source.guide["document"][text] - expected).max() < 1e-6


def test_embeddings_are_made_once_and_a_killed_start_resumes(guide, tmp_path, tiny_encoder, monkeypatch):
    monkeypatch.setattr("sgpt.data.feed.embeddings.TEXTS_AT_A_TIME", 5)
    tokenizer, config = tiny_encoder("gpt2").tokenizer, LossConfig(guide=str(guide))
    made: list[int] = []
    real = Encoder.encode

    def counted(self, texts, *arguments, **options):
        made.append(len(texts))
        if len(made) == 3 and killed:
            raise KeyboardInterrupt
        return real(self, texts, *arguments, **options)

    killed = True
    check = Encoder.from_pretrained(guide)  # its probes are encoded, too: not counted
    monkeypatch.setattr(Encoder, "from_pretrained", lambda folder: check)
    monkeypatch.setattr(Encoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        with_guide(feed_of(tmp_path, tokenizer), config)
    killed = False
    first = with_guide(feed_of(tmp_path, tokenizer), config).batch(0, 0)
    assert made == [5, 3, 5, 5, 5, 5, 5, 4]  # 8 queries, 24 documents; the third block was lost
    again = with_guide(feed_of(tmp_path, tokenizer), config).batch(0, 0)
    assert len(made) == 8
    assert torch.equal(first.guide_documents, again.guide_documents)


def test_runs_that_start_together_take_the_threads_of_the_first(tmp_path):
    """Each in threads of its own, which meet before they look."""
    together = threading.Barrier(4)

    def started(folder: Path) -> int:
        together.wait()
        return start_embedding(folder, [])[1]

    with ThreadPoolExecutor(4) as pool:
        for number in range(50):
            folder = tmp_path / str(number)
            assert len(set(pool.map(started, [folder] * 4))) == 1
    (folder / "threads.json").write_text("{")
    with pytest.raises(InputError, match=r"threads\.json is damaged; remove the folder"):
        start_embedding(folder, [])


@pytest.mark.bitwise
def test_a_block_that_is_made_again_has_the_bits_of_the_first_start_whatever_the_threads_are_now(
    guide, tmp_path, tiny_encoder
):
    feed, config = feed_of(tmp_path, tiny_encoder("gpt2").tokenizer), LossConfig(guide=str(guide))
    with threads(1):
        with_guide(feed, config)
    first = stored(tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.unlink()
    with threads(2):
        with_guide(feed, config)
    assert stored(tmp_path / "cache") == first


def test_another_model_is_never_served_the_embeddings_of_the_first(guide, tiny_encoder, tmp_path):
    tokenizer = tiny_encoder("gpt2").tokenizer
    other = tmp_path / "other"
    export(tiny_encoder("gpt2", pooling="last_token"), other, card="")
    one, two = (
        with_guide(feed_of(tmp_path, tokenizer), LossConfig(guide=str(folder))).batch(0, 0) for folder in (guide, other)
    )
    assert not torch.allclose(one.guide_queries, two.guide_queries)


# --- the mask ---


def st_model(tiny_encoder, folder: Path, family: str) -> tuple[Encoder, SentenceTransformer]:
    encoder = tiny_encoder(family, "none", query_max_tokens=40)
    export(encoder, folder, card="")
    return encoder, SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.01), ("relative", 0.0)])
@pytest.mark.parametrize("hard_negatives", [0, 1])
def test_the_loss_is_gist_embed_loss_where_no_curated_negative_is_above_the_threshold(
    hard_negatives, strategy, margin, tiny_encoder, tmp_path
):
    """Their relative margin is a share of the positive's score, so another difference for each query: only without one
    is it ours.
    """
    encoder, model = st_model(tiny_encoder, tmp_path / "model", "gpt_neo")
    judge, st_judge = st_model(tiny_encoder, tmp_path / "judge", "gpt2")
    pool = [
        *(f"{word} {n} {word[:3]}" for word in WORDS for n in range(4)),
        *(f"{'?! ' * n}{word[::-1]}" for word in WORDS for n in range(4))
    ]
    seen = judge.encode(WORDS, "query", normalize=True) @ judge.encode(pool, "query", normalize=True).T
    chosen, taken = [], set()
    # a positive that others beat, and a curated negative that does not
    for word, scores in zip(WORDS, seen, strict=True):
        ranked = [int(text) for text in np.argsort(-scores) if text not in taken]
        positive, negative = ranked[6], ranked[-1]
        taken |= {positive, negative}
        assert scores[negative] < scores[positive] - margin
        chosen.append(Example(word, pool[positive], (pool[negative],)[:hard_negatives]))
    batch = collate(chosen, encoder.tokenizer, encoder.frames)
    columns = [
        WORDS, [e.positive for e in chosen], *([[e.hard_negatives[0] for e in chosen]] if hard_negatives else [])
    ]
    documents = [text for e in chosen for text in (e.positive, *e.hard_negatives)]
    batch = batch_with_guide(
        batch, *(judge.encode(texts, "query", normalize=True, as_tensor=True) for texts in (WORDS, documents))
    )
    theirs = GISTEmbedLoss(
        model, st_judge, temperature=1 / 20, margin_strategy=strategy, margin=margin, contrast_anchors=False,
        contrast_positives=False
    )
    assert not theirs.must_retokenize
    expected = theirs([model.preprocess(column) for column in columns], None)
    with torch.no_grad():
        value, outcome = objective(
            encoder(batch.queries), encoder(batch.documents), batch, LossConfig(guide="judge", guide_margin=margin)
        )
    assert 0.05 < batch_statistics(outcome)["masked_share"] < 0.95
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


def test_gist_embed_loss_leaves_out_curated_negatives_above_the_threshold_and_we_do_not(tiny_encoder, tmp_path):
    """The guide takes each hard negative for better than the positive: theirs is the loss without hard negatives' own
    part, ours is larger.
    """
    encoder, model = st_model(tiny_encoder, tmp_path / "model", "gpt_neo")
    judge, st_judge = st_model(tiny_encoder, tmp_path / "judge", "gpt2")
    # curated: nearly the query itself
    chosen = [Example(word, f"?! ?! {word[::-1]}", (f"{word} {word}",)) for word in WORDS]
    batch = collate(chosen, encoder.tokenizer, encoder.frames)
    documents = [text for e in chosen for text in (e.positive, *e.hard_negatives)]
    batch = batch_with_guide(
        batch, *(judge.encode(texts, "query", normalize=True, as_tensor=True) for texts in (WORDS, documents))
    )
    seen = batch.guide_queries @ batch.guide_documents.T
    assert all(seen[i, 2 * i + 1] > seen[i, 2 * i] for i in range(8))
    theirs = GISTEmbedLoss(model, st_judge, temperature=1 / 20, contrast_anchors=False, contrast_positives=False)
    expected = theirs([model.preprocess(column) for column in (WORDS, documents[::2], documents[1::2])], None)
    with torch.no_grad():
        queries, candidates = encoder(batch.queries), encoder(batch.documents)
        ours = objective(queries, candidates, batch, LossConfig(guide="judge"))[0].item()
        scores = 20 * torch.cosine_similarity(queries[:, None], candidates[None], dim=-1)
    above = seen > seen[torch.arange(8), 2 * torch.arange(8)][:, None]
    without = [
        scores[i, [c for c in range(16) if c == 2 * i or not above[i, c]]].logsumexp(0) - scores[i, 2 * i]
        for i in range(8)
    ]
    with_own = [
        scores[i, [c for c in range(16) if c // 2 == i or not above[i, c]]].logsumexp(0) - scores[i, 2 * i]
        for i in range(8)
    ]
    assert expected.item() == pytest.approx(float(sum(without)) / 8, abs=1e-6)
    assert ours == pytest.approx(float(sum(with_own)) / 8, abs=1e-6)
    assert ours > expected.item() + 0.01


def random_guide(batch: Batch, seed: int = 0) -> Batch:
    """Unit vectors at random, float64; about half of the candidates score above the positive."""
    drawn = torch.randn(
        len(batch.queries) + len(batch.documents), 6, generator=torch.Generator().manual_seed(seed)
    ).double()
    return batch_with_guide(
        batch, *torch.nn.functional.normalize(drawn, dim=1).split([len(batch.queries), len(batch.documents)])
    )


def encoder_of(base: str) -> Encoder:
    tokenizer = load_tokenizer(base)
    trunk = tune(prepare(random_trunk("gpt_neo", len(tokenizer)).double()), TuningConfig("bitfit"))
    return Encoder(trunk, tokenizer, Contract(markers=MarkersConfig(query_max_tokens=24, document_max_tokens=40)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_candidates_above_the_guides_threshold_are_left_out_in_both_directions_and_curated_ones_stay(
    margin, symmetric, tiny_base
):
    """Written out in float64. Random guides score many curated negatives above the positive; GISTEmbedLoss would leave
    them out.
    """
    encoder = encoder_of(str(tiny_base("gpt_neo")))
    batch = random_guide(collate(EXAMPLES, encoder.tokenizer, encoder.frames))
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
        value, outcome = objective(
            queries, documents, batch, LossConfig(guide="g", guide_margin=margin, symmetric=symmetric)
        )
        scores = 20 * torch.stack(
            [torch.stack([torch.cosine_similarity(q, d, dim=0) for d in documents]) for q in queries]
        )
    seen, total, left_out, curated = batch.guide_queries @ batch.guide_documents.T, 0.0, 0, 0
    for i in range(8):
        threshold = seen[i, 3 * i] - margin
        kept = [c for c in range(24) if c // 3 == i or seen[i, c] <= threshold]
        left_out += 24 - len(kept)
        curated += sum(bool(seen[i, c] > threshold) for c in (3 * i + 1, 3 * i + 2))
        total += float(scores[i, kept].logsumexp(0) - scores[i, 3 * i])
        if symmetric:
            kept = [j for j in range(8) if j == i or seen[j, 3 * i] <= threshold]
            total += float(scores[kept, 3 * i].logsumexp(0) - scores[i, 3 * i])
    assert 0 < left_out < 8 * 21
    assert curated
    assert value.item() == pytest.approx(total / 8 / (1 + symmetric), rel=1e-10)
    assert batch_statistics(outcome)["masked_share"] == pytest.approx(left_out / 8 / 23)


@pytest.mark.parametrize("symmetric", [False, True])
def test_recomputed_and_in_chunks_it_is_the_same_step(symmetric, tiny_base, monkeypatch):
    encoder, config = encoder_of(str(tiny_base("gpt_neo"))), LossConfig(
        guide="g", guide_margin=0.1, symmetric=symmetric
    )
    batch = random_guide(collate(EXAMPLES, encoder.tokenizer, encoder.frames))
    encoder.tokens_per_pack = 60

    def step(keep_bytes: float) -> tuple[dict, dict]:
        outcome = contrastive_step(encoder, batch, config, keep_bytes=keep_bytes)
        found = {name: p.grad.clone() for name, p in trainable_parameters(encoder.trunk).items()}
        encoder.zero_grad()
        return found, batch_statistics(outcome) | {"loss": float(outcome.loss)}

    expected, seen = step(float("inf"))
    monkeypatch.setattr("sgpt.training.loss.SCORES_AT_A_TIME", 3 * 24)  # three queries at a time
    for keep_bytes in (float("inf"), 0):
        found, again = step(keep_bytes)
        assert again == pytest.approx(seen, rel=1e-12)
        assert all(
            float((found[name] - gradient).norm()) <= 1e-10 * float(gradient.norm()) for name,
            gradient in expected.items()
        )


def test_a_text_that_is_the_positive_to_the_guide_is_treated_alike_in_chunks_of_any_size(tiny_base, monkeypatch):
    """Capitals mean nothing to many guides. Such a tie is no false negative, whichever way the products round."""
    encoder = encoder_of(str(tiny_base("gpt_neo")))
    batch = collate([Example(f"query {n}", f"text {n}") for n in range(8)], encoder.tokenizer, encoder.frames)
    queries = torch.nn.functional.normalize(torch.randn(8, 384, generator=torch.Generator().manual_seed(0)), dim=1)
    # every document is one and the same to it
    batch = batch_with_guide(batch, queries, queries[:1].expand(8, -1).contiguous())
    for size in (1, 8, 24, 10**6):
        monkeypatch.setattr("sgpt.training.loss.SCORES_AT_A_TIME", size)
        with torch.no_grad():
            outcome = objective(encoder(batch.queries), encoder(batch.documents), batch, LossConfig(guide="g"))[1]
        assert batch_statistics(outcome)["masked_share"] == 0


# --- two processes ---

LOSSES = {
    "one way": LossConfig(guide="g", guide_margin=0.002),
    "both ways": LossConfig(guide="g", guide_margin=0.002, symmetric=True)
}


def steps(base: str, guide: str, folder: Path, rank: int, processes: int) -> dict:
    """Every loss once, by the whole path: read, embedded, grouped, batched; 8 queries in total."""
    encoder = encoder_of(base)
    data = {"batches": "hard", "grouping_model": guide}
    feed = feed_of(folder, encoder.tokenizer, queries=8 // processes, processes=processes)
    feed = with_guide(with_hard_batches(feed, DataConfig(**data)), LossConfig(guide=guide))
    found = {}
    for name, config in LOSSES.items():
        outcome = contrastive_step(encoder, feed.batch(0, rank), config, keep_bytes=0)
        parameters = trainable_parameters(encoder.trunk)
        average_gradients(parameters.values())
        found[name] = {key: p.grad.clone() for key, p in parameters.items()} | {"health": batch_statistics(outcome)}
        encoder.zero_grad()
    return found


def one_of_two(rank: int, folder: Path, base: str, guide: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 0:
        feed_of(folder, load_tokenizer(base))  # one process reads and tokenises first
    dist.barrier()
    import sgpt.data.feed.embeddings

    sgpt.data.feed.embeddings.TEXTS_AT_A_TIME = 5  # so that both have blocks to make
    torch.save(steps(base, guide, folder, rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def stored(cache: Path) -> dict[tuple[str, ...], bytes]:
    """Below the source's own folder, whose name holds its path."""
    return {file.relative_to(cache).parts[1:]: file.read_bytes() for file in cache.rglob("*.npy")}


@pytest.mark.bitwise
def test_two_processes_give_the_gradient_of_the_whole_batch(guide, tiny_base, tmp_path, monkeypatch):
    base = str(tiny_base("gpt_neo"))
    (tmp_path / "two").mkdir()
    in_processes(one_of_two, (tmp_path / "two", base, str(guide)), 2)
    monkeypatch.setattr("sgpt.data.feed.embeddings.TEXTS_AT_A_TIME", 5)
    (tmp_path / "one").mkdir()
    with threads(1):  # as each of the two has
        whole = steps(base, str(guide), tmp_path / "one", 0, 1)
    assert len(stored(tmp_path / "one" / "cache")) == 2 + 5 + 1
    # the embeddings and the walk, bit for bit
    assert stored(tmp_path / "one" / "cache") == stored(tmp_path / "two" / "cache")
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"{rank}.pt")
        for name, expected in whole.items():
            assert 0 < expected["health"]["masked_share"] < 0.9
            assert found[name]["health"] == pytest.approx(expected["health"], rel=1e-6)
            for key in expected.keys() - {"health"}:
                assert float(
                    (found[name][key] - expected[key]).norm()
                ) < 1e-10 * float(expected[key].norm()), (name, key)


# --- what is refused ---


def test_a_sentence_transformers_folder_serves_with_its_prompts(tmp_path, tiny_encoder, caplog):
    """Against sentence-transformers itself, without prompts and with one for queries."""
    folder = tmp_path / "st"
    st_model(tiny_encoder, folder, "gpt2")
    (folder / "sgpt.json").unlink()
    feed = feed_of(tmp_path, tiny_encoder("gpt2").tokenizer)
    text = feed.sources[0].examples.queries[2]
    for prompts in ({}, {"query": "query: ", "document": ""}):
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
        found = with_guide(feed, LossConfig(guide=str(folder))).sources[0].guide["query"]
        theirs = SentenceTransformer(str(folder), device="cpu").encode_query(
            [feed.sources[0].examples.texts[text]], normalize_embeddings=True
        )
        assert np.abs(found[text] - theirs[0]).max() < 1e-6
    assert not caplog.text


def test_bad_settings_are_refused(tmp_path, tiny_base, tiny_encoder):
    feed = feed_of(tmp_path, tiny_encoder("gpt2").tokenizer)
    with pytest.raises(
        InputError,
        match=r"loss\.guide=nowhere: no such folder; give a run, an export or a sentence-transformers folder"
    ):
        with_guide(feed, LossConfig(guide="nowhere"))
    with pytest.raises(
        InputError, match=r"data\.grouping_model=.*: a base model that was not trained .*; give a run, an export or"
    ):
        with_hard_batches(feed, DataConfig(batches="hard", grouping_model=str(tiny_base("gpt2"))))
    with pytest.raises(
        InputError,
        match=r"loss\.guide_margin=0\.1 has no effect without a guide; set loss\.guide=<folder of a model>, or leave "
        r"it 0"
    ):
        LossConfig(guide_margin=0.1)
    with pytest.raises(InputError, match=r"loss\.guide_margin=nan must be a number"):
        LossConfig(guide="g", guide_margin=float("nan"))
    with pytest.raises(InputError, match=r"data\.batches='near' is unknown; choose random or hard"):
        DataConfig(batches="near")
    with pytest.raises(InputError, match=r"data\.batches=hard needs data\.grouping_model=<folder of a model>"):
        DataConfig(batches="hard")
    with pytest.raises(
        InputError, match=r"data\.batches=random does not read data\.grouping_model; set data\.batches=hard"
    ):
        DataConfig(grouping_model="g")
    with pytest.raises(
        InputError, match=r"data\.batches=hard groups the queries of one source, and data\.mixed=true puts all sources"
    ):
        DataConfig(
            batches="hard", grouping_model="g", mixed=True, sources=[SourceConfig(path="a"), SourceConfig(path="b")]
        )
