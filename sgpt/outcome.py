"""What a run leaves to read: results before and after, the analysis for the report, the manifest, the card, the last table."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from sgpt import evaluate
from sgpt.checkpoint import TrainState
from sgpt.config import TrainConfig
from sgpt.data.sampling import Feed
from sgpt.encoder import Encoder
from sgpt.evaluate import Sets
from sgpt.model import located
from sgpt.overrides import argument
from sgpt.probes import probes
from sgpt.run import Run, environment
from sgpt.tuning import count, learning

SAMPLE = 512  # pairs in the similarity histogram


def record_start(run: Run, config: TrainConfig, encoder: Encoder, feed: Feed) -> None:
    trained, total = count(encoder.trunk)
    run.update(
        "manifest.json", name=run.name, seed=config.trainer.seed, environment=environment(),
        data={
            "examples": sum(len(source.examples) for source in feed.sources),
            "sources": [{"source": source.name, "examples": len(source.examples), "key": source.examples.key} for source in feed.sources],
        },
        parameters={"trained": trained, "total": total}, contract={"fingerprint": encoder.contract.fingerprint(), **asdict(encoder.contract)},
    )


def record_before(run: Run, encoder: Encoder, sets: Sets, *, bm25: bool) -> None:
    """The untuned base, once; a resumed run finds it there."""
    if "before" in run.read("results.json", {}):
        return
    run.write("analysis.json", {"similarity": {"before": _similarity(encoder, sets)}})
    run.write("results.json", {"before": evaluate.evaluate(encoder, sets), "bm25": evaluate.bm25(sets) if bm25 else {}})


def record_after(run: Run, encoder: Encoder, sets: Sets, base: Mapping[str, Tensor], state: TrainState, *, verified: dict) -> None:
    """The tuned model: what changed, what it scores, what was exported."""
    learned = learning(encoder.trunk)
    change = {name: float((learned[name].detach() - old).norm() / old.norm().clamp(min=1e-12)) for name, old in base.items()}
    similarity = run.read("analysis.json", {}).get("similarity", {}) | {"after": _similarity(encoder, sets)}
    run.write("analysis.json", {"similarity": similarity, "change": change})
    run.update("manifest.json", seconds=state.seconds, steps=state.step, processes=state.processes, export=verified, probes=probes(encoder), bytes={
        name: (run.folder / place).stat().st_size for name, place in (
            ("adapter", "adapter/adapter_model.safetensors"), ("model", "export/model.safetensors"))
    })
    run.update("results.json", after=evaluate.evaluate(encoder, sets))


def finish(run: Run) -> None:
    """From here on the run is finished, and starting it again shows its table."""
    run.update("manifest.json", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    run.close()


def show(run: Run) -> None:
    """The table that a run ends with."""
    from rich.console import Console

    results, manifest = run.read("results.json", {}), run.read("manifest.json", {})
    console = Console(markup=False)  # a name may hold brackets
    if scored := {name: results[name] for name in ("before", "after", "bm25") if results.get(name)}:
        console.print(evaluate.table(scored, f"{run.name}: results × 100"))
    else:
        console.print("no test set was named: evaluation.retrieval=[<BEIR folder>] or evaluation.sts=[<pairs file>] scores the next run", soft_wrap=True)
    queries, size = _queries_seen(run), manifest["bytes"]
    console.print(f"{queries / manifest['seconds']:.1f} pairs per second · {queries:,} pairs · {manifest['seconds'] / 60:.1f} minutes of training")
    console.print(f"trained {manifest['parameters']['trained']:,} of {manifest['parameters']['total']:,} parameters: "
                  f"{_bytes(size['adapter'])} of changes to a model of {_bytes(size['model'])}")
    console.print(f"run folder  {run.folder}   (open {run.folder}/report.html)", soft_wrap=True, highlight=False)
    ours = manifest["data"]["sources"][0]["source"].endswith("pydocs")  # what search looks through when no corpus is named
    what = 'query="parse a date from a string"' if ours else "corpus=<JSON lines of _id and text>"
    search = shlex.quote(_from_here(Path(__file__).parents[1] / "train" / "search.py"))
    console.print(f"search it   {_python()} {search} {argument('run', str(run.folder))} {what}", soft_wrap=True, highlight=False)


def _python() -> str:
    """This interpreter, as the shell finds it from here: .venv/bin/python needs no activation."""
    found = shutil.which("python")
    return "python" if found and Path(found).absolute() == Path(sys.executable).absolute() else shlex.quote(_from_here(Path(sys.executable)))


def _from_here(file: Path) -> str:
    """Relative where it lies below the working directory."""
    return os.path.relpath(file) if file.absolute().is_relative_to(Path.cwd()) else str(file.absolute())


def card(run: Run, config: TrainConfig) -> str:
    """README.md of the export."""
    from huggingface_hub import ModelCardData

    on_hub = "/" in config.model.path and not Path(located(config.model.path)).exists()
    data = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="sentence-similarity", base_model=config.model.path if on_hub else None,
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "sgpt", config.tuning.name],
    )
    manifest = run.read("manifest.json", {})
    roles = "encode_query / encode_document" if config.markers.name != "none" else "encode"
    return f"""---
{data.to_yaml()}
---

# {run.name}

An SGPT bi-encoder: {config.model.path} with {manifest['parameters']['trained']:,} of {manifest['parameters']['total']:,} parameters trained
({config.tuning.name}), pooled by {config.pooling.name}, markers {config.markers.name}, at most {config.markers.query_max_tokens} tokens a query and
{config.markers.document_max_tokens} a document. Compare by cosine.

    from sentence_transformers import SentenceTransformer   # 6.0 or newer; older versions would leave out the markers
    model = SentenceTransformer("{run.folder}/export")        # {roles}

    from sgpt import Encoder
    encoder = Encoder.from_pretrained("{run.folder}/export")
    encoder.encode_queries([...]), encoder.encode_documents([...])

Trained on {manifest['data']['examples']:,} examples ({', '.join(source['key'] for source in manifest['data']['sources'])}),
loss {config.loss.name}, scale {config.loss.scale:g}, {config.trainer.queries_per_process} queries a process,
peak learning rate {config.optim.learning_rate:g}, seed {config.trainer.seed}.
"""


def _similarity(encoder: Encoder, sets: Sets) -> dict[str, list[float]]:
    if not sets.retrieval:
        return {"positive": [], "negative": []}
    chosen = sets.retrieval[0]
    queries = list(chosen.qrels)[:SAMPLE]
    positives = [max(chosen.qrels[query], key=chosen.qrels[query].get) for query in queries]
    return evaluate.similarity_sample(encoder, [chosen.queries[query] for query in queries], [chosen.corpus[document] for document in positives])


def _queries_seen(run: Run) -> int:
    import yaml

    config, manifest = yaml.safe_load((run.folder / "config.yaml").read_text()), run.read("manifest.json", {})
    return manifest["steps"] * config["trainer"]["queries_per_process"] * config["trainer"]["gradient_accumulation"] * manifest["processes"]


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
