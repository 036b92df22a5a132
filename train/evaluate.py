"""Evaluate any model: `python train/evaluate.py model=runs/pydocs retrieval=[<folder or BEIR name>] sts=[<file>]`. `--help` shows the keys."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("evaluate", groups=False, verbatim=("prompt",))
def main(composed: DictConfig) -> None:
    import logging
    import sys
    from functools import partial
    from pathlib import Path

    import torch
    from rich.console import Console

    from sgpt.cli.compose import typed
    from sgpt.data.test_sets.beir_sets import places, read_place
    from sgpt.data.test_sets.useb import read_useb
    from sgpt.encoder.encoder import Encoder
    from sgpt.evaluation import compare, evaluate
    from sgpt.evaluation.evaluate import EvaluateConfig
    from sgpt.evaluation.table import beir_averages, table, with_cqadupstack
    from sgpt.evaluation.useb import useb
    from sgpt.runtime.errors import InputError
    from sgpt.runtime.files import check_writable
    from sgpt.runtime.interrupt import keeping
    from sgpt.runtime.progress import under_way

    config, console = typed(EvaluateConfig, composed), Console(width=None if sys.stdout.isatty() else 200, markup=False)
    if not config.model or not (config.retrieval or config.sts or config.useb):
        raise InputError("set model=<folder or hub id> and retrieval=[<BEIR folder or name>,…], sts=[<pairs file>,…] or useb=<folder data-eval>")
    for key, file in (("output", config.output), ("systems_output", config.systems_output)):
        if file and Path(file).is_dir():
            raise InputError(f"{key}={file} is a folder; name a file in it, for example {Path(file) / 'scores.json'}")
        if file:
            check_writable(Path(file), f"another {key}=")
    there = places(config.retrieval, config.split, Path(config.beir_root))  # what is missing stops us now and not after hours
    similar = evaluate.read_sets(evaluate.EvaluationConfig(sts=config.sts, split=config.split))
    tasks = read_useb(Path(config.useb), config.split or "test") if config.useb else []
    if twice := {place.name for place in there} & {pairs.name for pairs in similar.sts}:
        raise InputError(f"two evaluation sets are called {min(twice)!r}, and results are kept by name; rename a folder, or evaluate one after the other")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder.from_pretrained(config.model, markers=config.markers, pooling=config.pooling).to(device)
    names = [place.name for place in there] + [pairs.name for pairs in similar.sts] + ["USEB"] * bool(tasks)
    logging.getLogger("sgpt.evaluation.evaluate").info("%s is evaluated on %s, on %s", config.model, ", ".join(names), device)
    rescore = None
    if config.rerank:
        from sgpt.cross_encoder.cross_encoder import CrossEncoder
        from sgpt.retrieval.rerank import rerank

        ranker = CrossEncoder.from_pretrained(config.rerank, prompt=config.prompt)
        ranker.model.to(device)
        rescore = partial(rerank, ranker)

    sets: dict[str, compare.Systems] = {}
    for place in there:  # one corpus in memory at a time
        chosen = read_place(place)
        dev, reason = compare.tuning_set(place, chosen, config.dev_split) if config.bm25 and config.fuse else (None, "")
        if reason:
            console.print(reason)
        with keeping("the results of the sets before are kept" if sets and (config.output or config.systems_output) else "no set was finished"), \
                under_way(f"evaluating on {place.name}, {len(chosen.qrels):,} queries and {len(chosen.corpus):,} documents"):
            systems = compare.rank(encoder, chosen, dev, bm25=config.bm25, fuse=config.fuse, rescore=rescore, depth=config.depth)
        if config.runs:
            compare.write_runs(Path(config.runs), chosen, systems)
        sets[place.name] = compare.measured(chosen, systems, config.depth)
        record(config, sets)  # after every set: a killed evaluation keeps what it has
    sets = with_cqadupstack(sets)
    sets |= {name: {"model": {"metrics": metrics}} for name, metrics in (evaluate.evaluate(encoder, similar) | useb(encoder, tasks)).items()}
    record(config, sets)
    console.print(table(sets | beir_averages(sets), f"{config.split or 'test'}, results × 100, differences with 95 % intervals"))


def record(config, sets) -> None:
    """output: set -> metrics of the model. systems_output: set -> system -> everything."""
    import json
    from pathlib import Path

    from sgpt.evaluation.table import beir_averages
    from sgpt.runtime.files import write_whole

    everything = {
        "model": config.model, "rerank": config.rerank, "prompt": config.prompt, "depth": config.depth, "sets": sets, "averages": beir_averages(sets),
    }  # fmt: skip
    for file, content in ((config.output, {name: systems["model"]["metrics"] for name, systems in sets.items()}), (config.systems_output, everything)):
        if file:
            write_whole(Path(file), json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
