"""What a run leaves to read: results before and after, the analysis, the manifest, the export and the last table."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from torch import Tensor

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import FILLING, Feed
from sgpt.data.readers import read_examples
from sgpt.decoder.base_folder import revision_of
from sgpt.decoder.quantised import held_weights
from sgpt.decoder.trunk import load_tokenizer, load_trunk
from sgpt.encoder import contract as contracts
from sgpt.encoder.adapter import TRAINED, check_tokenizer, is_adapter, refuse_other_base
from sgpt.encoder.contract import Contract, Origin
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import DEFAULT, export
from sgpt.encoder.probes import Encode
from sgpt.evaluation import evaluate
from sgpt.evaluation.evaluate import Sets
from sgpt.retrieval.metrics import main_metric
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock
from sgpt.runtime.overrides import argument
from sgpt.runtime.provenance import Inputs, content_hash, environment, set_threads, tokenizer_hash, weights_hash
from sgpt.training import checkpoint
from sgpt.training.card import card
from sgpt.training.checkpoint import TrainState
from sgpt.training.config import TrainConfig
from sgpt.training.run_folder import SEEN, RunFolder
from sgpt.training.tuning import count_parameters, precisions, trainable_parameters, tune

SAMPLE = 512  # pairs in the similarity histogram


def run_inputs(encoder: Encoder, feed: Feed, sets: Sets, dev: Sets) -> Inputs:
    """Everything that decides a run's weights and results, but for its configuration.

    encoder: of the untuned base.
    """
    inputs: dict[str, str | int] = {"processes": feed.processes}
    for source in feed.sources:
        inputs[f"training data {source.name}"] = source.examples.key
        if source.lacks_hard_negatives:
            inputs[f"version of the rule that fills missing hard negatives of {source.name}"] = FILLING
        for side, embeddings in (source.guide or {}).items():
            inputs[f"guide's embeddings of each {side} of {source.name}"] = embeddings.key
        if source.walk is not None:
            inputs[f"grouping of {source.name}"] = content_hash(source.walk.examples.tolist())
    for purpose, of_purpose in (("test set", sets), ("dev set", dev)):
        for dataset in of_purpose.retrieval:
            inputs[f"{purpose} {dataset.name}"] = content_hash(dataset.corpus, dataset.queries, dataset.qrels)
        for pairs in of_purpose.sts:
            inputs[f"{purpose} {pairs.name}"] = content_hash(pairs.first, pairs.second, pairs.scores)
    return inputs | base_inputs(encoder)


def base_inputs(encoder: Encoder) -> Inputs:
    """Hashes of the trunk before training, and of its tokenizer."""
    base = encoder.contract.base
    return {
        f"base model {base}": weights_hash(held_weights(encoder.trunk)),
        f"tokenizer of {base}": tokenizer_hash(encoder.tokenizer),
    }


def origin(config: TrainConfig, base: str, inputs: Inputs) -> Origin:
    """What a run's weights are made of, for the contract of its adapter and export. inputs: of `run_inputs`."""
    data = {name: key for name, key in inputs.items() if name.startswith("training data ")}
    return Origin(
        revision=revision_of(base),
        base_weights=str(inputs.get(f"base model {base}", "")),
        tokenizer=str(inputs.get(f"tokenizer of {base}", "")),
        dtype=config.model.dtype,
        tuning=config.tuning.name,
        layers=config.tuning.layers,
        training_data=content_hash(data),
    )


def record_start(
    run: RunFolder, config: TrainConfig, encoder: Encoder, feed: Feed, inputs: Inputs, seen: Sequence[str] = ()
) -> None:  # fmt: skip
    """Writes the manifest once, when the run starts; a resumed run has its inputs checked against these.

    seen: what is said of test sets whose queries or pairs are trained on.
    """
    if run.read("manifest.json", {}):
        return
    trained, total = count_parameters(encoder.trunk)
    sources = [
        {"source": source.name, "examples": len(source.examples), "key": source.examples.key} for source in feed.sources
    ]
    run.update(
        "manifest.json",
        name=run.name,
        seed=config.trainer.seed,
        environment=environment(),
        inputs=dict(inputs),
        data={"examples": sum(len(source.examples) for source in feed.sources), "sources": sources},
        parameters={"trained": trained, "total": total},
        contract={"fingerprint": encoder.contract.fingerprint(), **asdict(encoder.contract)},
        precision=precisions(encoder.trunk, config.trainer.precision),
        **{SEEN: list(seen)},
    )


def record_before(run: RunFolder, encoder: Encoder, sets: Sets, *, bm25: bool) -> None:
    """Scores the untuned base, once: a resumed run keeps what the first start wrote."""
    if "before" in run.read("results.json", {}):
        return
    before, queries = evaluate.evaluate_queries(encoder, sets)
    run.write("analysis.json", {"similarity": {"before": _similarity(encoder, sets)}, "queries": {"before": queries}})
    run.write("results.json", {"before": before, "bm25": evaluate.bm25(sets) if bm25 else {}})


def record_after(run: RunFolder, encoder: Encoder, sets: Sets, base: Mapping[str, Tensor], state: TrainState) -> None:
    """Scores the tuned model, and writes how far each parameter has moved from `base`."""
    change = relative_change(base, trainable_parameters(encoder.trunk))
    after, queries = evaluate.evaluate_queries(encoder, sets)
    analysis = run.read("analysis.json", {})
    similarity = analysis.get("similarity", {}) | {"after": _similarity(encoder, sets)}
    of_queries = analysis.get("queries", {}) | {"after": queries}  # runs of older versions do not say before
    gains = evaluate.gains(queries, of_queries.get("before", {}))
    run.write(
        "analysis.json",
        {"similarity": similarity, "change": change, "queries": of_queries, "differences": gains},
    )
    adapter = run.folder / "adapter" / "adapter_model.safetensors"
    run.update(
        "manifest.json",
        seconds=state.seconds,
        steps=state.step,
        processes=state.processes,
        probes=Contract.load(run.folder / "adapter").probes,
        bytes={"adapter": adapter.stat().st_size},
    )
    if state.best_step:
        run.update("manifest.json", best={"step": state.best_step, "value": state.best_value})
    run.update("results.json", after=after)


def relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float | None]:
    """How far each tensor has moved, as a share of its length before; None where that was 0, as of added biases."""
    change: dict[str, float | None] = {}
    for name, value in before.items():
        moved, length = (after[name].detach() - value).norm(), value.norm()
        change[name] = float(moved / length) if length else None
    return change


def finish_run(run: RunFolder) -> None:
    """Marks the run as finished: starting it again shows its table, and exports it if the export is missing."""
    run.update("manifest.json", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def is_exported(run: RunFolder) -> bool:
    return "export" in run.read("manifest.json", {}) and (run.folder / "export" / contracts.FILE).is_file()


def write_export(run: RunFolder, config: TrainConfig, encoder: Encoder) -> None:
    """Exports a finished run and says so in the manifest. InputError names the command that exports it again."""
    try:
        verified = export_as(run, config, encoder, DEFAULT, run.folder / "export")
    except InputError as error:
        again = f"python train/export.py {argument('run', str(run.folder))}"
        raise InputError(
            f"{run.folder} has its adapter, results and report, but no export: {error}. To export it again: {again}"
        ) from error
    size = run.read("manifest.json", {})["bytes"]
    if not is_adapter(run.folder / "export"):  # whose weights are those of the base
        size |= {"model": sum(file.stat().st_size for file in (run.folder / "export").glob("*.safetensors"))}
    run.update("manifest.json", export=verified, bytes=size)


def export_as(
    run: RunFolder, config: TrainConfig, encoder: Encoder, form: str, folder: Path, examples: int = 0
) -> dict:  # fmt: skip
    """Exports a run in one format, with its card, and returns what `verify` found.

    examples: so many of the training examples are shown in the card.
    """
    shown = list(islice(_training_examples(config), examples))

    def text(verified: dict, embed: Encode) -> str:
        return card(run, config, verified, embed, folder=folder, form=form, examples=shown)

    return export(encoder, folder, card=text, adapter=run.folder / "adapter", form=form)


def _training_examples(config: TrainConfig) -> Iterator[Example]:
    """Of all sources in their order, from the cache where they were read before."""
    for source in config.data.source_configs():
        yield from read_examples(source, Path(config.data.cache))


def reopen(run: RunFolder, config: TrainConfig) -> tuple[Encoder, Path]:
    """The encoder as it was when the best checkpoint was written, else the newest, and that checkpoint.

    Of a finished run whose checkpoints were deleted it is that of the adapter, which has the same tensors.
    """
    chosen = checkpoint.best(run.checkpoints) or run.folder / "adapter"
    if not (chosen / TRAINED).is_file():
        remedy = "let it train until the first one"
        if run.finished:
            remedy = "open its adapter with PEFT, which alone holds low-rank matrices of a run without checkpoints"
        raise InputError(f"{run.folder} has no checkpoint; {remedy}")
    if run.threads:
        set_threads(run.threads)  # the last digits of the probes belong to them
    model = config.model.resolved()
    trunk, tokenizer = load_trunk(model), load_tokenizer(model.path)
    if is_adapter(run.folder / "adapter"):
        refuse_other_base(trunk, run.folder / "adapter")
        check_tokenizer(tokenizer, run.folder / "adapter")
    contract = Contract(config.pooling.name, config.markers, base=model.path)
    encoder = Encoder(trunk, tokenizer, contract, tokens_per_pack=config.trainer.tokens_per_pack)
    manifest = run.read("manifest.json", {})
    if "inputs" not in manifest:
        raise InputError(f"{run.folder / 'manifest.json'} is missing or not whole; put back what training wrote")
    recorded = manifest["inputs"]
    for name, now in base_inputs(encoder).items():
        if name not in recorded:  # model.path where the run had model.hub, or the other way round
            before = next(known for known in recorded if known.startswith("base model "))
            raise InputError(
                f"{run.folder} was started with the {before}, and model.path={config.model.path} is now {model.path}; "
                "put that base back, and export again"
            )
        if recorded.get(name, now) != now:
            raise InputError(
                f"{run.folder}: {name} has changed since the run was started; put it back, and export again"
            )
    encoder.contract.origin = origin(config, model.path, recorded)
    encoder.trunk = tune(encoder.trunk, config.tuning, model.path)
    encoder.eval()
    checkpoint.load_parameters(chosen / TRAINED, trainable_parameters(encoder.trunk))
    return encoder, chosen


def export_and_show(run: RunFolder, config: TrainConfig, encoder: Encoder | None = None) -> None:
    """Ends a finished run: exports it where that is missing, and shows its table, whatever the export says.

    encoder: as it was trained; without, the one of `reopen`, after an export that was refused or killed.
    """
    if int(os.environ.get("RANK", "0")):  # the main process does it; none of the others has to wait
        return
    try:
        if encoder is not None or not is_exported(run):
            run.lock = run.lock or lock(run.folder, "set runs=<another folder>")
            write_export(run, config, encoder or reopen(run, config)[0])
        else:
            finished = run.read("manifest.json", {})["finished"]
            print(f"{run.folder} was finished at {finished}; nothing was trained or read again, and this is its table")
    finally:
        run.close()
        show_run(run)


def show_run(run: RunFolder) -> None:
    """Prints the table that a run ends with, and the command that searches with it."""
    from rich.console import Console

    results, manifest = run.read("results.json", {}), run.read("manifest.json", {})
    console = Console(markup=False)  # a name may hold brackets
    if scored := {name: results[name] for name in ("before", "after", "bm25") if results.get(name)}:
        console.print(evaluate.metrics_table(scored, f"{run.name}: results × 100"))
    else:
        console.print(
            "no test set was named: evaluation.retrieval=[<BEIR folder>], evaluation.pairs=[<pairs or triplets>] or "
            "evaluation.sts=[<scored pairs>] scores the next run",
            soft_wrap=True,
        )
    for name, after in results.get("after", {}).items():
        metric, value = main_metric(after)
        if value < (before := results["before"][name][metric]):
            console.print(
                f"warning: training made {name} worse, {metric} {100 * before:.2f} before and {100 * value:.2f} now; a "
                "lower optim.learning_rate, fewer steps or other data may not",
                soft_wrap=True,
            )
    queries, seconds = _queries_seen(run), manifest["seconds"]
    console.print(
        f"{queries / seconds:.1f} pairs per second · {queries:,} pairs · {seconds / 60:.1f} minutes of training"
    )
    if best := manifest.get("best"):
        console.print(f"taken from step {best['step']:,} of {manifest['steps']:,}, the best on the dev sets")
    parameters, size = manifest["parameters"], manifest["bytes"]
    model = ", not exported"
    if "export" in manifest:
        model = f" to a model of {_bytes(size['model'])}" if "model" in size else f" to {manifest['contract']['base']}"
    console.print(
        f"trained {parameters['trained']:,} of {parameters['total']:,} parameters: "
        f"{_bytes(size['adapter'])} of changes{model}"
    )
    console.print(f"run folder  {run.folder}   (open {run.folder}/report.html)", soft_wrap=True, highlight=False)

    # pydocs' corpus is what search reads when none is named
    is_pydocs = manifest["data"]["sources"][0]["source"].endswith("pydocs")
    arguments = 'query="parse a date from a string"' if is_pydocs else "corpus=<JSON lines of _id and text>"
    search = shlex.quote(_from_here(Path(__file__).parents[2] / "train" / "search.py"))
    command = f"{_python()} {search} {argument('run', str(run.folder))} {arguments}"
    console.print(f"search it   {command}", soft_wrap=True, highlight=False)


def _python() -> str:
    """This interpreter, as the shell calls it from here: .venv/bin/python needs no activation."""
    on_path, this = shutil.which("python"), Path(sys.executable)
    if on_path and Path(on_path).absolute() == this.absolute():
        return "python"
    return shlex.quote(_from_here(this))


def _from_here(file: Path) -> str:
    """Its path, relative where it lies below the working directory."""
    return os.path.relpath(file) if file.absolute().is_relative_to(Path.cwd()) else str(file.absolute())


def _similarity(encoder: Encoder, sets: Sets) -> dict[str, list[float]]:
    """Cosines of queries of the first test set with their best document and with another one, for the histogram."""
    if not sets.retrieval:
        return {"positive": [], "negative": []}
    dataset = sets.retrieval[0]
    best: dict[str, str] = {}
    for query, judged in dataset.qrels.items():
        # a judged document may be no candidate: BEIR leaves those with an empty text out
        relevant = [document for document, score in judged.items() if score > 0 and document in dataset.corpus]
        if relevant and len(best) < SAMPLE:
            best[query] = max(relevant, key=judged.get)
    queries = [dataset.queries[query] for query in best]
    documents = [dataset.corpus[document] for document in best.values()]
    return evaluate.similarity_sample(encoder, queries, documents)


def _queries_seen(run: RunFolder) -> int:
    """Of all steps and processes, repeated ones included."""
    import yaml

    trainer = yaml.safe_load((run.folder / "config.yaml").read_text())["trainer"]
    manifest = run.read("manifest.json", {})
    batches = manifest["steps"] * trainer["gradient_accumulation"] * manifest["processes"]
    return batches * trainer["queries_per_process"]


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
