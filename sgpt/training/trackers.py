"""Trackers of experiments, by Accelerate.

They get the numbers of metrics.jsonl under the same names, and in the end the files of the run.
"""

import importlib.util
import logging
import os
import re
import secrets
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from sgpt.runtime.errors import InputError
from sgpt.runtime.provenance import flat
from sgpt.training.config import LoggingConfig, TrainConfig
from sgpt.training.run_folder import RunFolder

log = logging.getLogger(__name__)
ARTIFACTS = ("config.yaml", "manifest.json", "results.json", "metrics.jsonl", "report.html", "adapter")


def check_tracker(tracker: str | None) -> None:
    """InputError for one that is not installed; Accelerate would train on without it and say nothing."""
    if tracker and not importlib.util.find_spec(tracker):
        raise InputError(
            f"logging.tracker={tracker} is not installed; pip install 'sgpt-framework[{tracker}]', or "
            "logging.tracker=null: the numbers are in metrics.jsonl in any case"
        )


def start_trackers(accelerator: Accelerator, config: TrainConfig, run: RunFolder) -> None:
    """To be called once the run folder exists: trackers write into it, or next to it. All processes call it."""
    tracker = config.logging.tracker
    if not tracker:
        if (config.logging.project, config.logging.mode) != (LoggingConfig.project, LoggingConfig.mode):
            log.warning("logging.project and logging.mode have no effect without logging.tracker")
        return
    name, project, tree = config.name, config.logging.project, flat(asdict(config))
    options: dict[str, Any] = {}
    if accelerator.is_main_process:
        if tracker == "wandb":
            run_id = run.read("manifest.json", {}).get("tracker_id") or secrets.token_hex(4)
            run.update("manifest.json", tracker_id=run_id)  # so that a resumed run goes on as the same one
            options = {"name": name, "dir": str(run.folder), "id": run_id, "resume": "allow"}
            os.environ.setdefault("WANDB_MODE", config.logging.mode)
            # what artifacts are made of until it is uploaded; else it would lie in the home folder
            os.environ.setdefault("WANDB_DATA_DIR", str(run.folder / "wandb"))
        elif tracker == "trackio":
            options = {"name": name, "resume": "allow", "embed": False}
            os.environ.setdefault("TRACKIO_DIR", str(run.folder.parent / "trackio"))  # runs of one folder are compared
        else:
            project, tree = "tensorboard", None  # its folder in the run's; the configuration comes as a text
    accelerator.init_trackers(project, config=tree, init_kwargs={tracker: options})


def finish_trackers(accelerator: Accelerator, config: TrainConfig, run: RunFolder, step: int) -> None:
    """Hands over results.json and the files of a finished run: to TensorBoard as texts, to others as an artifact.

    The main process calls it.
    """
    tracker = config.logging.tracker
    if not tracker:
        return
    results = flat(run.read("results.json", {}), "/")  # before/<set>/<metric>, after/…, bm25/…
    accelerator.log(results, step=step)
    opened = accelerator.get_tracker(tracker, unwrap=True)
    files = [run.folder / name for name in ARTIFACTS if (run.folder / name).exists()]
    if tracker == "tensorboard":
        for file in files:
            if file.suffix in (".yaml", ".json"):
                opened.add_text(file.name, f"```\n{file.read_text(encoding='utf-8')}\n```", step)
        return
    library = importlib.import_module(tracker)
    artifact = library.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", config.name)[:128], type="run")  # all that both take
    for file in files:
        if file.is_dir():
            artifact.add_dir(str(file), name=file.name)
        else:
            artifact.add_file(str(file), name=file.name)
    opened.log_artifact(artifact)
