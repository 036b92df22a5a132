"""The model card of an export: what it is, how to use it and what that prints, what it was made of, what it is worth.

All of it is read from the run's files or computed by the export itself. No text of the training data is in it, unless
`examples` asks for some.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgpt.data.feed.example import Example
from sgpt.decoder.base_folder import is_of_hub, local_folder
from sgpt.decoder.model_files import first_line
from sgpt.encoder.contract import Contract
from sgpt.encoder.export import CARD, DEFAULT, agreement, rounded_down
from sgpt.encoder.probes import Encode
from sgpt.encoder.snippets import outputs, snippet
from sgpt.report.run import METRIC_LABELS
from sgpt.retrieval.metrics import main_metric
from sgpt.training.checkpoint import best
from sgpt.training.config import TrainConfig
from sgpt.training.run_folder import SEEN, RunFolder

log = logging.getLogger(__name__)
LIBRARIES = {  # of the hub, by the format
    "transformers": "transformers", "peft": "peft", "onnx": "onnx", "onnx-int8": "onnx", "openvino": "openvino",
}  # fmt: skip
BY_THIS_FRAMEWORK = """The same numbers by this framework:

    from sgpt import Encoder
    encoder = Encoder.from_pretrained("{folder}")
    encoder.encode_queries([...]), encoder.encode_documents([...])
"""
TOKENIZERS = """`query/` and `document/` hold a tokenizer each, which puts the markers around a text and cuts it.
The one at the root is {root}.
"""
ADAPTER = """The weights are an adapter over `{base}`, which must be where its name says. sentence-transformers opens
the folder, too (`encode_query`, `encode_document`).
"""
GRAPH = """Pooling{normalised} in the graph: input_ids and attention_mask [texts, T] in, `sentence_embedding` [texts, D]
out.
"""
SERVER = """text-embeddings-inference serves documents from the folder as it stands (`--pooling mean`, which the graph
makes void); for queries give it a copy of the folder with the files of `query/` at the root.
"""
INT8 = """Linear layers multiply in int8, by plain ONNX operations, with a scale for each token: an embedding does not
depend on what it is batched with.
"""
NOTES = {
    DEFAULT: [BY_THIS_FRAMEWORK],
    "transformers": [TOKENIZERS],
    "peft": [ADAPTER],
    "onnx": [GRAPH, TOKENIZERS, SERVER],
    "onnx-int8": [GRAPH, INT8, TOKENIZERS, SERVER],
    "openvino": [GRAPH, TOKENIZERS],
}


def card(
    run: RunFolder, config: TrainConfig, verified: Mapping, embed: Encode, *,
    folder: Path, form: str = DEFAULT, examples: Sequence[Example] = (),
) -> str:  # fmt: skip
    """The text of the export's README.md.

    verified: what `verify` found. embed: as the export does. folder: where it will lie. examples: of the training data,
    which are shown.
    """
    manifest = {**_so_far(run), **run.read("manifest.json", {})}
    contract = Contract(config.pooling.name, config.markers, base=manifest["contract"]["base"])
    parts = [
        f"---\n{_front_matter(run, config, form)}\n---\n\n# {run.name}\n",
        _what(manifest, config),
        _use(form, contract, folder, embed),
        f"This folder {agreement(verified)}.\n",
        _recipe(manifest, config),
        _results(run),
        _limits(config, verified),
    ]
    if examples:
        rows = [{"query": one.query, "positive": one.positive, **_negatives(one)} for one in examples]
        lines = "\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
        parts.append(f"## Training examples\n\n{lines}\n")
    return "\n".join(parts)


def _so_far(run: RunFolder) -> dict:
    """Steps, seconds and processes of the checkpoint that is exported of a run that is not finished."""
    exported = best(run.checkpoints)
    state = json.loads((exported / "state.json").read_text()) if exported else {"step": 0, "seconds": 0, "processes": 1}
    return {"steps": state["step"], "seconds": state["seconds"], "processes": state["processes"]}


def _negatives(example: Example) -> dict[str, list[str]]:
    return {"hard_negatives": [*example.hard_negatives]} if example.hard_negatives else {}


def _front_matter(run: RunFolder, config: TrainConfig, form: str) -> str:
    """What the model hub reads: YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    base = run.read("manifest.json", {})["contract"]["base"]
    scores = []
    seen = {said.partition(": ")[0] for said in run.read("manifest.json", {}).get(SEEN, [])}
    for name, metrics in run.read("results.json", {}).get("after", {}).items():
        if name in seen:  # no result to be compared with others'
            continue
        task = "information-retrieval" if "ndcg@10" in metrics else "semantic-similarity"
        for metric, value in metrics.items():
            label = f"cosine_{metric}" if task == "information-retrieval" else metric
            scores.append(EvalResult(
                task_type=task, dataset_type=name, dataset_name=name, metric_type=label, metric_value=round(value, 6),
            ))  # fmt: skip
    data = ModelCardData(
        library_name=LIBRARIES.get(form, "sentence-transformers"),
        pipeline_tag="sentence-similarity",
        base_model=base if is_of_hub(base) else None,
        license=_license(base),
        tags=["sentence-similarity", "feature-extraction", "embeddings", "sgpt", config.tuning.name, form],
        model_name=run.name if scores else None,
        eval_results=scores or None,
    )
    return data.to_yaml()


def _license(base: str) -> str | None:
    """The base's, where its folder has a card that states one."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    file = local_folder(base) / CARD
    try:
        stated = (metadata_load(file) or {}) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s cannot be read (%s), so the export's card states no license", file, first_line(error))
        return None
    return stated.get("license") if isinstance(stated.get("license"), str) else None


def _what(manifest: Mapping, config: TrainConfig) -> str:
    parameters, markers = manifest["parameters"], config.markers
    marked = {"none": "without markers", "brackets": "queries in `[ ]`, documents in `{ }`"}[markers.name]
    blocks = f"the first {config.model.layers} blocks of " if config.model.layers else ""
    return (
        f"An SGPT bi-encoder: {blocks}`{manifest['contract']['base']}` with {parameters['trained']:,} of its "
        f"{parameters['total']:,} parameters\ntrained (`{config.tuning.name}`), pooled by `{config.pooling.name}`, "
        f"{marked}. Compare embeddings by cosine.\n"
    )


def _use(form: str, contract: Contract, folder: Path, embed: Encode) -> str:
    facts = {
        "folder": folder,
        "base": contract.base,
        "normalised": " and normalisation are" if contract.normalize else " is",
        "root": "the base's, without markers" if form == "transformers" else "the documents'",
    }
    notes = "\n".join(note.format(**facts) for note in NOTES[form])
    return (
        f"## Use\n\n```python\n{snippet(form, contract, str(folder))}```\n\nIt prints, but for the last digit:\n\n"
        f"```\n{outputs(embed)}\n```\n\n{notes}"
    )


def _recipe(manifest: Mapping, config: TrainConfig) -> str:
    precision = manifest.get("precision", {})  # runs of older versions do not say
    frozen = precision.get("frozen", "float32")
    inputs = manifest.get("inputs", {})
    base = manifest["contract"]["base"]
    steps = f"{manifest['steps']:,} steps{'' if 'finished' in manifest else ' of a run that is not finished'}"
    rows = {
        "base": f"`{base}`, weights {_short(inputs.get(f'base model {base}'))}, "
        f"tokenizer {_short(inputs.get(f'tokenizer of {base}'))}",
        "learns": f"{config.tuning.name}, {manifest['parameters']['trained']:,} numbers in float32; the rest frozen in "
        f"{frozen}",
        "loss": f"{config.loss.name}, scale {config.loss.scale:g}",
        "batch": f"{config.trainer.queries_per_process} queries in each of {manifest['processes']} processes, "
        f"gradients of {config.trainer.gradient_accumulation} added",
        "optimizer": f"peak learning rate {config.optim.learning_rate:g}, {steps}, seed {manifest['seed']}",
        "time": f"{manifest['seconds'] / 60:.1f} minutes on {_processor(manifest)}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["environment"]["versions"].items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    lines[1:1] = [
        f"| data | {source['examples']:,} examples, hash {_short(source['key'])} |"
        for source in manifest["data"]["sources"]
    ]
    return "## Recipe\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _short(digest: object) -> str:
    return f"`{str(digest)[:16]}`" if digest else "not recorded"


def _processor(manifest: Mapping) -> str:
    environment = manifest["environment"]
    return str(environment.get("processor") or environment.get("device") or "a machine that was not recorded")


def _results(run: RunFolder) -> str:
    """Before and after, and the interval of the difference where there are queries to resample."""
    results = run.read("results.json", {})
    gains = run.read("analysis.json", {}).get("differences", {})
    if not results.get("after"):
        if results.get("before"):
            return "## Results\n\nThe run was not finished when this was exported, so nothing was measured yet.\n"
        return "## Results\n\nNo test set was named, so nothing was measured.\n"
    lines = []
    for name, after in results["after"].items():
        before, bm25 = (results.get(system, {}).get(name, {}) for system in ("before", "bm25"))
        for metric, value in after.items():
            gain = gains.get(name) if metric == main_metric(after)[0] else None
            cells = [_percent(before.get(metric)), _percent(value), _interval(gain), _percent(bm25.get(metric))]
            lines.append(f"| {name} | {METRIC_LABELS.get(metric, metric)} | {' | '.join(cells)} |")
    lines += [f"\n**Not of new texts alone:** {said}." for said in run.read("manifest.json", {}).get(SEEN, [])]
    return (
        "## Results\n\nTimes 100. In brackets the 95 % interval of the difference: a paired bootstrap over queries.\n\n"
        "| set | metric | base | trained | difference | BM25 |\n|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _interval(gain: Mapping | None) -> str:
    if gain is None or gain["low"] is None:
        return "–"
    return f"{100 * gain['mean']:+.2f} ({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f})"


def _limits(config: TrainConfig, verified: Mapping) -> str:
    markers = config.markers
    lines = [
        f"A query loses what is beyond {markers.query_max_tokens} tokens, a document what is beyond "
        f"{markers.document_max_tokens}, markers and special tokens included.",
        "Subjects and languages are those of the base and of the training data; biases of both are in it.",
        "What is measured is said under Results, and nothing else was.",
    ]
    if markers.name != "none":
        lines.append(
            "Queries and documents are different roles: a text that is encoded without its markers, or with the other "
            "role's, gets another vector."
        )
    if "min_cosine" in verified:
        lines.append(f"Rounded to int8: the lowest cosine to float32 was {rounded_down(verified['min_cosine'])}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
