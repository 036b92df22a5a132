"""What a path holds: a run, an export, an adapter, a folder of sentence-transformers, or a bare base."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sgpt.decoder.base_folder import local_folder
from sgpt.decoder.model_files import INDEX, WEIGHTS
from sgpt.encoder import contract as contracts
from sgpt.encoder.adapter import is_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.sentence_transformers import is_sentence_transformers, read
from sgpt.runtime.errors import InputError
from sgpt.runtime.provenance import differences

log = logging.getLogger(__name__)
GRAPH, OPENVINO = "onnx/model.onnx", "openvino/openvino_model.xml"  # where servers look for them
OF_A_RUN = ("export", "adapter")  # folders of a run that hold its model, the one that needs no base first


@dataclass(frozen=True)
class ModelFolder:
    """folder: where the model itself lies, which of a run is one of its folders."""

    folder: Path
    kind: Literal["export", "adapter", "sentence-transformers", "base"]

    @property
    def is_ours(self) -> bool:
        """Whether it carries a contract."""
        return self.kind in OF_A_RUN


def is_graph(folder: Path) -> bool:
    """Whether it holds a graph in place of weights."""
    has_weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    return not has_weights and any((folder / name).is_file() for name in (GRAPH, OPENVINO))


def find_model(path: str | Path, of_a_run: tuple[str, ...] = OF_A_RUN) -> ModelFolder:
    """The model of a local path or hub id. of_a_run: what to look for in a run, in this order.

    Raises InputError where there is no folder, and for an export that holds a graph in place of weights; what else is
    in a folder is checked when it is opened.
    """
    root = local_folder(str(path))
    if (root / contracts.FILE).is_file() and is_graph(root):
        raise InputError(
            f"{path}: holds a graph for ONNX Runtime or OpenVINO, used as its README.md shows, and no weights; give "
            "the run, its export or its adapter"
        )
    for folder in (*(root / part for part in of_a_run), root):
        if (folder / contracts.FILE).is_file():
            return ModelFolder(folder, "adapter" if is_adapter(folder) else "export")
    return ModelFolder(root, "sentence-transformers" if is_sentence_transformers(root) else "base")


def announce_base(path: str, contract: Contract) -> None:
    """Warns of what the folder of a base states beside its decoder, and a run of this contract does not keep.

    That is other markers, limits or pooling, and of a folder of sentence-transformers the modules behind its pooling
    and its prompts. path: of the base.
    """
    base = find_model(path, of_a_run=())
    if base.kind == "export":
        before = Contract.load(base.folder)
        stated = [{"markers": asdict(one.markers), "pooling": one.pooling} for one in (before, contract)]
        if changed := differences(*stated):
            log.warning(
                "%s was made with another contract, and is trained with that of this run (%s); to keep its own, set "
                "markers and pooling as it had them",
                path, "; ".join(changed),
            )  # fmt: skip
    if base.kind == "sentence-transformers":
        try:
            stated_by_others = read(base.folder)
        except InputError as error:
            log.warning("its decoder alone is trained: %s", error)
            return
        lost = [kind for kind, _ in stated_by_others.head]
        lost += [f"the prompt {prompt!r}" for prompt in stated_by_others.prompts.values() if prompt]
        if stated_by_others.pooling != contract.pooling:
            lost.append(f"pooling {stated_by_others.pooling} (this run's is {contract.pooling})")
        if lost:
            log.warning("%s: its decoder alone is trained and exported, without %s", path, ", ".join(lost))


def run_of(folder: Path) -> Path:
    """The run of an export or adapter by its usual name, else the folder itself."""
    return folder.parent if folder.name in OF_A_RUN else folder


def exports_in_other_formats(run: Path) -> list[Path]:
    """Of a run, the exports next to its first one, by their names: export-onnx and so on."""
    return sorted(folder for folder in run.glob("export-*") if (folder / contracts.FILE).is_file())
