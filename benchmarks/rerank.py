"""How fast does a decoder re-rank? `CrossEncoder.score` and the original's method: one pair at a time, the whole
vocabulary at every position.

    python benchmarks/rerank.py [--shape 125m] [--data scifact] [--documents 40] [--queries 1] [--rounds 3]
    python benchmarks/rerank.py --sentence-transformers --shape neox_125m [--batch-sizes 1 4 8 16]

Every query meets every document. With --queries 1 all documents are fresh; with more, each document is computed once
for all queries, its building included in the time. The original's method gets a share of the pairs (--one-by-one): its
time does not depend on what stands next to a pair. "ours, alone" computes every pair from its beginning, and tells from
which number of queries on sharing pays. No time is shown before the scores are equal: 1e-4 in float32.
--sentence-transformers: against its CrossEncoder, which has no score of a query but one of Yes against No, so prompt L,
and the fastest of its batch sizes. Its padding stands on the left and moves learned positions: with GPT-Neo's, its
scores are ours in batches of one only. --precision bf16: our weights in bfloat16 against the original's method in
float32, as it was run.
"""

import itertools
import random
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from measure.engines import Variant
from measure.given import Setting, setting
from measure.processes import fresh, peak_bytes, settle, stopwatch
from measure.report import Report, compare, fastest, parser, race

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.cross_encoder.likelihood import log_probabilities
from sgpt.data.formats.beir import read_retrieval
from sgpt.runtime.memory import keep_freed_memory

PROMPTS = {False: "G", True: "L"}  # of a query's probability, and of Yes against No
# nats, of scores around -100; what bfloat16 does to a ranking is another question
TOLERANCE = {"fp32": 1e-4, "bf16": 5.0}
COLUMNS = {
    "cpu_seconds": ("CPU s", ".2f"), "wall_seconds": ("wall s", ".2f"), "pairs_per_second": ("pairs/s", ".1f"),
    "pairs": ("pairs", "d"),
    "memory_mb": ("MB", ".0f"), "load": ("load", ".1f"),
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, shape="125m", rounds=3)
    arguments.add_argument(
        "--data", choices=("scifact", "squad"), default="scifact",
        help="queries and documents below --shared (default: %(default)s)"
    )
    arguments.add_argument("--documents", type=int, default=40, help="(default: %(default)s)")
    arguments.add_argument("--queries", type=int, default=1, help="each meets every document (default: %(default)s)")
    arguments.add_argument(
        "--one-by-one", type=int, default=20, help="pairs of the original's method (default: %(default)s)"
    )
    arguments.add_argument("--tokens-per-pack", type=int, default=4096, help="of ours (default: %(default)s)")
    arguments.add_argument(
        "--sentence-transformers", action="store_true",
        help="against its CrossEncoder, by prompt L, not against the original's method"
    )
    arguments.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="of it, to choose from (default: %(default)s)"
    )
    options = arguments.parse_args()
    with setting(
        options, "squad", lambda folder: read_texts(folder / options.data, options.queries, options.documents)
    ) as given:
        report = Report(options, COLUMNS, same_scores(options))
        pairs = options.documents * options.queries
        ours = Variant("ours", "ours", {"pairs": pairs})

        def measure(variant: Variant) -> dict:
            return fresh(score, given, asdict(variant), options.tokens_per_pack, PROMPTS[options.sentence_transformers])

        if options.sentence_transformers:
            rivals = [
                Variant(f"ST batch {size}", "st", {"pairs": pairs, "batch_size": size}) for size in options.batch_sizes
            ]
            chosen = [fastest(report, ours, rivals, measure), ours]
        else:
            chosen = [Variant("one by one", "one_by_one", {"pairs": min(pairs, options.one_by_one)}), ours]
            chosen += [Variant("ours, alone", "alone", {"pairs": pairs})] if options.queries > 1 else []
        rows = race(report, chosen, options.rounds, measure)
    for row in itertools.chain.from_iterable(rows.values()):  # a pair's time
        row.update({key: row[key] / row["pairs"] for key in ("cpu_seconds", "wall_seconds")})
    for rival in chosen:
        if rival is not ours:
            compare(report, rows, ours.name, rival.name)


def read_texts(folder: Path, queries: int, documents: int) -> list:
    chosen = read_retrieval(folder, "test")
    drawn = random.Random(0)
    return [
        drawn.sample(sorted(set(texts.values())), number) for texts,
        number in ((chosen.queries, queries), (chosen.corpus, documents))
    ]


def score(setting: dict, variant: dict, tokens_per_pack: int, prompt: str) -> dict:
    """One row; the first pairs of every engine are the same, spread over the documents."""
    chosen, given = Variant(**variant), Setting(**setting)
    queries, documents = given.texts()
    pairs = [(query, document) for query in queries for document in documents][: int(chosen.options["pairs"])]
    dtype = "bfloat16" if given.precision == "bf16" and chosen.engine in OURS else "float32"
    reranker = CrossEncoder.from_pretrained(given.model, prompt, dtype=dtype, tokens_per_pack=tokens_per_pack)
    if chosen.engine in OURS or given.keep_memory:
        keep_freed_memory()
    others = {key: int(value) for key, value in chosen.options.items() if key != "pairs"}
    scoring = ENGINES[chosen.engine](reranker, **others)
    scoring(pairs[:1])
    before = settle()
    with stopwatch() as spent:
        scores = scoring(pairs)
    return {
        "cpu_seconds": spent["cpu"], "wall_seconds": spent["wall"], "pairs": len(pairs),
        "pairs_per_second": len(pairs) / spent["wall"],
        "memory_mb": (peak_bytes() - before) / 2**20, "scores": scores.tolist(),
    }  # fmt: skip


Pairs = list[tuple[str, str]]  # query and document
Scoring = Callable[[Pairs], np.ndarray]


def ours(reranker: CrossEncoder) -> Scoring:
    return lambda pairs: reranker.score(*map(list, zip(*pairs, strict=True)), progress=False)


def alone(reranker: CrossEncoder) -> Scoring:
    def scoring(pairs: Pairs) -> np.ndarray:
        texts = reranker.scored_texts(*map(list, zip(*pairs, strict=True)))
        return log_probabilities(reranker.model, texts, tokens_per_pack=reranker.pack_size, share=False).numpy()

    return scoring


def one_by_one(reranker: CrossEncoder) -> Scoring:
    """As the original's script computes it, with transformers' attention and its tokenisation of every pair."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        reranker.model.config._name_or_path, dtype=torch.float32, trust_remote_code=False
    ).eval()

    @torch.inference_mode()
    def scoring(pairs: Pairs) -> np.ndarray:
        found = []
        for query, document in pairs:
            (text,) = reranker.scored_texts([query], [document])
            logits = model(torch.tensor([text.read])).logits.log_softmax(-1)[0, -text.targets :]
            found.append(logits.gather(1, torch.tensor(text.ids[-text.targets :])[:, None]).sum().item())
        return np.array(found)

    return scoring


def st(reranker: CrossEncoder, batch_size: int) -> Scoring:
    """Its score is the logit of Yes minus that of No, at the last position; of that the logarithm of a probability is
    made.
    """
    from sentence_transformers import CrossEncoder as TheirCrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    yes, no = reranker.answer_ids
    transformer = Transformer(reranker.model.config._name_or_path, transformer_task="text-generation")
    model = TheirCrossEncoder(modules=[transformer, LogitScore(yes, no)], device="cpu")

    def scoring(pairs: Pairs) -> np.ndarray:
        asked = [(reranker.prompt.before_query(document, query), "") for query, document in pairs]
        return -np.logaddexp(
            0,
            -model.predict(
                asked, batch_size=batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False
            ).astype(float)
        )

    return scoring


ENGINES: dict[str, Callable[..., Scoring]] = {"ours": ours, "alone": alone, "one_by_one": one_by_one, "st": st}


OURS = {"ours", "alone"}


def same_scores(options: Namespace) -> Callable[[dict, dict], str | None]:
    def agree(reference: dict, row: dict) -> str | None:
        both = min(reference["pairs"], row["pairs"])
        row["differs"] = float(np.abs(np.array(reference["scores"][:both]) - np.array(row["scores"][:both])).max())
        allowed = TOLERANCE[options.precision]
        return (
            None if row["differs"] <= allowed else f"scores differ by {row['differs']:.1e} nats, allowed {allowed:.0e}"
        )

    return agree


if __name__ == "__main__":
    main()
