"""Where things live and who may import whom, read from the imports: a rule kept by a test needs no reviewer."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FLOORS = {  # a folder imports from lower floors only
    "runtime": 1, "sweeps": 1, "text": 2, "report": 2, "decoder": 3, "data": 3, "encoder": 4, "cross_encoder": 4, "retrieval": 5,
    "evaluation": 6, "mining": 6, "training": 7, "inspection": 8, "pretraining": 8, "cli": 9,
}  # fmt: skip
FILES = sorted((REPOSITORY / "sgpt").rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports: inside of functions and of `if TYPE_CHECKING` as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_modules(module: str) -> set[str]:
    """Modules of ours; `sgpt.encoder.Encoder` is of `sgpt.encoder`."""
    named = imports(MODULES[module])
    return {name if name in MODULES else name.rpartition(".")[0] for name in named if name.startswith("sgpt.")} - {module}


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_every_folder_has_a_floor_and_says_in_a_line_what_it_is_for():
    folders = {folder_of(module) for module in MODULES} - {""}
    assert folders == FLOORS.keys()
    for file in (REPOSITORY / "sgpt").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_imports_from_lower_floors_only(folder):
    for module in (name for name in MODULES if folder_of(name) == folder):
        others = {other for other in imported_modules(module) if folder_of(other) not in ("", folder)}
        upwards = {other for other in others if FLOORS[folder_of(other)] >= FLOORS[folder]}
        assert not upwards, f"{module} imports {upwards}"


def test_no_modules_import_each_other_in_a_circle():
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}  # which only pass names on
    graph = {module: imported_modules(module) - packages for module in MODULES if module not in packages}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def users_of(package: str) -> set[str]:
    return {module for module, file in MODULES.items() if any(name.split(".")[0] == package for name in imports(file))}


def test_hydra_and_omegaconf_are_imported_by_the_command_line_alone():
    assert {folder_of(module) for module in users_of("hydra") | users_of("omegaconf")} == {"cli"}


def test_accelerate_is_imported_where_something_is_trained_alone():
    assert {folder_of(module) for module in users_of("accelerate")} <= {"training", "pretraining", "cli"}


def test_the_lowest_floors_know_no_model():
    for package in ("transformers", "accelerate", "peft", "datasets", "safetensors"):
        assert not {module for module in users_of(package) if folder_of(module) in ("runtime", "sweeps", "text", "report")}, package


@pytest.mark.parametrize(
    "file", ["sgpt/cli/command.py", *(f"train/{path.name}" for path in sorted((REPOSITORY / "train").glob("*.py")))]
)
def test_the_command_line_and_the_scripts_import_nothing_heavy_at_the_top(file):
    """`--help` and a misspelt key answer before torch is there."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scipy", "rich", "sentence_transformers"}
    assert not top & heavy
