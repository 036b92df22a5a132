"""The folder of a training run, `runs/<name>/`: opened, started, read and written.

    config.yaml      the whole configuration        results.json     scores before and after
    metrics.jsonl    the log, a line a step         analysis.json    what the report draws
    checkpoints/     to resume from                 report.html      the page
    adapter/         what was learned               manifest.json    what the run was made of
    export/          the model for others           bad_batch.json   texts of a step without a number, if there was one

`manifest.json` gets its "finished" when all but the export is written.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, unlock, write_whole
from sgpt.runtime.provenance import Inputs, check_same, differences, recorded_threads

SEEN = "seen_in_training"  # key of manifest.json: what is said of test sets whose queries or pairs are trained on
MAY_CHANGE = {  # on resuming: what decides neither weights nor results
    "name", "runs", "resume", "logging", "data.cache",
    "trainer.log_every_steps", "trainer.save_every_steps", "trainer.keep_checkpoints", "trainer.dry_run",
}  # fmt: skip


@dataclass
class RunFolder:
    """A training run's folder, which need not exist yet.

    lock: held by the process that writes the run, from `start_run` to `close`.
    """

    folder: Path
    lock: FileLock | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        return "finished" in self.read("manifest.json", {})

    def read(self, file: str, otherwise: Any) -> Any:
        """Content of a JSON file, or `otherwise` when it is not there."""
        path = self.folder / file
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise
        except ValueError as error:
            raise InputError(
                f"{path}: not JSON ({error}); put back the file that training wrote, or set name=<another name>"
            ) from None

    def write(self, file: str, content: Any) -> None:
        """Writes JSON, whole or not at all."""
        write_whole(self.folder / file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def update(self, file: str, **content: Any) -> None:
        """Adds to what the JSON file holds, or replaces it key by key."""
        self.write(file, self.read(file, {}) | content)

    @property
    def threads(self) -> int | None:
        """Threads of each process when the run was started; None before."""
        return recorded_threads(self.read("manifest.json", {}))

    def check_same(self, inputs: Inputs) -> None:
        """InputError when a run that was started would resume with other data, weights, versions or threads."""
        manifest = self.read("manifest.json", {})
        if manifest or any(self.checkpoints.glob("step-*")):
            check_same(self.folder, manifest, inputs, otherwise="set name=<another name>")

    def close(self) -> None:
        """Lets others write the run: all of it is written."""
        if self.lock is not None:
            unlock(self.lock)
            self.lock = None


def open_run(folder: Path, config: dict, *, resume: bool) -> RunFolder:
    """The run of this folder; nothing is written yet.

    InputError for a run that exists, unless it is to be resumed with the same configuration.
    """
    run = RunFolder(folder)
    if not (folder / "config.yaml").is_file():
        return run
    if not resume:
        state = "a finished run" if run.finished else "an unfinished run"
        raise InputError(f"{folder} holds {state}; resume it with resume=true, or set name=<another name>")
    changed = differences(read_config(folder), config, MAY_CHANGE)
    if changed:
        raise InputError(
            f"{folder} was started with another configuration: {'; '.join(changed[:5])}. "
            "Resume it with that one, or set name=<another name>"
        )
    return run


def read_config(folder: Path) -> dict:
    """The configuration that the run was started with.

    What a run of an older version does not state has the value that computes what that version did.
    """
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    trainer = config.get("trainer", {})
    trainer.setdefault("keep_best", None if trainer.get("evaluate_every_steps") else "mean")
    trainer.setdefault("patience", None)
    trainer.setdefault("deterministic", True)  # of a GPU, which nobody had tried
    for sets in ("evaluation", "dev"):
        config.get(sets, {}).setdefault("pairs", [])
    tuning = config.get("tuning", {})
    tuning.setdefault("layers", "all")
    # bitfit refused a base with too few biases, and bitfit_norm trained its gains alone
    tuning.setdefault("add_biases", "none" if tuning.get("name") == "bitfit_norm" else "all")
    return config


def stated_pack(folder: Path) -> int | None:
    """`trainer.tokens_per_pack` of the run of this folder; None where it states none, or there is no run.

    A run of before, whose default was a number, is resumed with it.
    """
    if not (folder / "config.yaml").is_file():
        return None
    return read_config(folder).get("trainer", {}).get("tokens_per_pack")


def start_run(run: RunFolder, config: dict) -> None:
    """Makes the folder, once everything that can be checked beforehand has been.

    InputError while another process writes it.
    """
    import yaml

    run.lock = lock(run.folder, "set runs=<another folder>")
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / "config.yaml").is_file():
        write_whole(run.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
