"""Evaluate any model: `python train/evaluate.py model=runs/pydocs retrieval=[<folder>] sts=[<file>]`. `--help` shows the keys."""

from omegaconf import DictConfig

from sgpt.door import script


@script("evaluate", groups=False)
def main(composed: DictConfig) -> None:
    import json
    from pathlib import Path

    from rich.console import Console

    from sgpt import evaluate
    from sgpt.config import EvaluateConfig, typed
    from sgpt.encoder import Encoder
    from sgpt.errors import InputError
    from sgpt.files import write_whole

    config = typed(EvaluateConfig, composed)
    if not config.model or not (config.retrieval or config.sts):
        raise InputError("set model=<folder or hub id> and retrieval=[<BEIR folder>,…] or sts=[<pairs file>,…]")
    sets = evaluate.read_sets(evaluate.EvaluationConfig(config.retrieval, config.sts, config.split))
    encoder = Encoder.from_pretrained(config.model, markers=config.markers, pooling=config.pooling)
    results = evaluate.evaluate(encoder, sets)
    columns = {Path(config.model).name: results}
    if config.bm25 and sets.retrieval:
        columns["bm25"] = evaluate.bm25(sets)
    Console().print(evaluate.table(columns, f"{config.split}, results × 100"))
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(config.output), json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
