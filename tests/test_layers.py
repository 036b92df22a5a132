"""Who may import whom, read from the imports: a rule kept by a test needs no reviewer.

pure -> parts -> joined -> uses -> trainer -> door, each from earlier layers or its own, and never in a circle.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LAYERS: dict[str, set[str]] = {
    # tensors, ids, text and files whole or not: no model, no process
    "pure": {"errors", "files", "memory", "page", "progress", "markers", "pooling", "loss", "metrics", "fusion", "packing", "template", "prompts"},
    "parts": {"data", "attention", "model", "varlen", "contract", "tuning", "distributed", "optim", "continuation"},
    "joined": {"adapter", "encoder", "probes", "step", "likelihood", "cross_encoder"},
    "uses": {"checkpoint", "evaluate", "compare", "useb", "export", "guide", "index", "mteb", "run",
             "search", "report", "mine", "inspection", "parts", "rerank"},
    "trainer": {"trainer", "pretrain"},
    "door": {"config", "launch", "outcome", "door"},
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
ORDER = list(LAYERS)


def rooms() -> dict[str, list[Path]]:
    """Room -> its files; a folder is one room. Scripts are rooms of the last layer's users and not listed."""
    found: dict[str, list[Path]] = {}
    for file in sorted((REPOSITORY / "sgpt").rglob("*.py")):
        room = file.relative_to(REPOSITORY / "sgpt").parts[0].removesuffix(".py")
        found.setdefault(room, []).append(file)
    del found["__init__"]
    return found


def imports(file: Path, *, at_run_time: bool = True) -> set[str]:
    """Dotted names of everything that a file imports, inside of functions too; `if TYPE_CHECKING` is no import."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return names


def imported_rooms(room: str) -> set[str]:
    named = {name.split(".")[1] for file in rooms()[room] for name in imports(file) if name.startswith("sgpt.")}
    return (named & rooms().keys()) - {room}


def test_every_room_has_a_layer():
    assert rooms().keys() == LAYER_OF.keys()


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_from_earlier_layers_or_its_own_only(room):
    too_late = {other for other in imported_rooms(room) if ORDER.index(LAYER_OF[other]) > ORDER.index(LAYER_OF[room])}
    assert not too_late, f"{room} ({LAYER_OF[room]}) imports {too_late}"


def test_no_rooms_import_each_other_in_a_circle():
    TopologicalSorter({room: imported_rooms(room) for room in rooms()}).prepare()  # CycleError names the circle


def users_of(package: str) -> set[str]:
    return {room for room, files in rooms().items() for file in files if any(name.split(".")[0] == package for name in imports(file))}


def test_hydra_and_omegaconf_stay_at_the_door():
    assert users_of("hydra") | users_of("omegaconf") <= {"config", "door"}


def test_accelerate_comes_in_from_the_uses_on():
    early = {room for room in users_of("accelerate") if ORDER.index(LAYER_OF[room]) < ORDER.index("uses")}
    assert early <= {"distributed"}


def test_the_pure_rooms_know_no_model_and_no_process():
    for package in ("transformers", "accelerate", "peft", "datasets", "safetensors"):
        assert not {room for room in users_of(package) if LAYER_OF[room] == "pure"}, package
    assert not {room for room in LAYERS["pure"] for file in rooms()[room] if any(name.startswith("torch.distributed") for name in imports(file))}


@pytest.mark.parametrize("file", ["sgpt/door.py", *(f"train/{path.name}" for path in sorted((REPOSITORY / "train").glob("*.py")))])
def test_the_door_and_the_scripts_import_nothing_heavy_at_the_top(file):
    """`--help` and a misspelt key answer before torch is there."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    top = {name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in [alias.name for alias in node.names]}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not top & {"torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scipy", "rich", "sentence_transformers"}
    ours = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith("sgpt")}
    assert ours <= {"sgpt.door", "sgpt.errors", "sgpt.memory"}
