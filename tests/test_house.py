"""Where things live and who may import whom, read from the imports: a rule kept by a test needs no reviewer."""

import ast
import json
import re
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FLOORS = {  # a folder imports from lower floors only
    "runtime": 1, "sweeps": 2, "text": 2, "report": 2, "decoder": 3, "data": 3, "encoder": 4, "cross_encoder": 4,
    "retrieval": 5, "verification": 5, "evaluation": 6, "mining": 6, "serving": 6, "training": 7, "inspection": 8,
    "preflight": 8, "pretraining": 8, "cli": 9,
}  # fmt: skip
ONE_MEANING = {  # of constants and types that each module has for itself: sizes, tolerances, versions
    "log", "Made", "Result", "CHOICES", "FORMAT", "MAY_CHANGE", "SAMPLE", "MAIN_METRICS", "main_metric",
    "TOKENS_PER_PACK", "PATIENCE", "PATIENCE_SECONDS", "QUERIES_AT_A_TIME", "ROWS_AT_A_TIME", "TEXTS_AT_A_TIME",
    "TOLERANCE", "ROUNDINGS",
}  # fmt: skip
NO_PATHS = {"docs/s", "sgpt/reranker"}  # documents a second; the name of a model
NO_KEYS = {
    "sep", "dev.txt", "data.json",  # a CSV's first line, files of USEB's
    "hydra.launcher.partition", "hydra.launcher.gpus_per_node",  # of submitit's launcher
}  # fmt: skip
LAUNCHER = "AccelerateLauncherConfig"
FILES = sorted((REPOSITORY / "sgpt").rglob("*.py"))


@cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(text_of(file))


def module_of(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports: inside of functions and of `if TYPE_CHECKING` as well."""
    names: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_modules(module: str) -> set[str]:
    """Modules of ours; `sgpt.encoder.Encoder` is of `sgpt.encoder`."""
    named = {name for name in imports(MODULES[module]) if name.startswith("sgpt.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in named} - {module}


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_every_folder_has_a_floor_and_says_in_a_line_what_it_is_for():
    folders = {folder_of(module) for module in MODULES} - {""}
    assert folders == FLOORS.keys()
    for file in (REPOSITORY / "sgpt").rglob("__init__.py"):
        assert ast.get_docstring(tree_of(file)), file


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
    assert {folder_of(module) for module in users_of("accelerate")} <= {"training", "preflight", "pretraining", "cli"}


def test_the_lowest_floors_know_no_model():
    for package in ("transformers", "accelerate", "peft", "datasets", "safetensors"):
        folders = {folder_of(module) for module in users_of(package)}
        assert not folders & {"runtime", "sweeps", "text", "report"}, package


HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scipy", "rich", "sentence_transformers"}
SCRIPTS = [f"train/{file.name}" for file in sorted((REPOSITORY / "train").glob("*.py"))]


@pytest.mark.parametrize("file", ["sgpt/cli/command.py", *SCRIPTS])
def test_the_command_line_and_the_scripts_import_nothing_heavy_at_the_top(file):
    """`--help` and a misspelt key answer before torch is there."""
    tree = tree_of(REPOSITORY / file)
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not top & HEAVY


# the picture of the folders


def test_the_picture_of_the_folders_is_of_todays_imports():
    """`make architecture` draws it again."""
    picture = text_of(REPOSITORY / "docs" / "architecture.svg")
    [description] = re.findall(r"<dc:description>(.*?)</dc:description>", picture, re.DOTALL)
    shown = json.loads(description)
    arrows: dict[str, set[str]] = {folder: set() for folder in FLOORS}
    for module in MODULES:
        if folder_of(module):
            arrows[folder_of(module)] |= {folder_of(other) for other in imported_modules(module)}
    assert shown["arrows"] == {folder: sorted(others - {"", folder}) for folder, others in arrows.items()}
    for folder in FLOORS:
        files = list((REPOSITORY / "sgpt" / folder).rglob("*.py"))
        lines = sum(len(text_of(file).splitlines()) for file in files)
        assert shown["files"][folder] == sum(file.name != "__init__.py" for file in files), folder
        assert shown["lines"][folder] == pytest.approx(lines, rel=0.2, abs=100), folder


# lines, names, sentences


def said(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


@cache
def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((REPOSITORY / folder).rglob("*.py"))]


CODE = python_files("sgpt", "train", "hydra_plugins", "tests", "benchmarks", "docs")


def test_no_line_is_longer_than_ruff_allows():
    """Ruff says so too, but `make test` does not call it."""
    limit = tomllib.loads(text_of(REPOSITORY / "pyproject.toml"))["tool"]["ruff"]["line-length"]
    for file in CODE:
        long = [number for number, line in enumerate(text_of(file).splitlines(), start=1) if len(line) > limit]
        assert not long, f"{said(file)}: {long}"


def public_names(file: Path) -> set[str]:
    """What a module defines at its top: functions, classes, constants, types."""
    names: set[str] = set()
    for node in tree_of(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_has_one_meaning():
    modules: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        for name in public_names(file):
            modules.setdefault(name, []).append(module)
    twice = {name: where for name, where in modules.items() if len(where) > 1}
    new = twice.keys() - ONE_MEANING
    assert not new, {name: twice[name] for name in new}


def config_classes() -> dict[str, ast.ClassDef]:
    """The dataclasses of the scripts' keys by name: what a script hands to `typed`, and what these consist of."""
    everything = {
        node.name: node
        for file in python_files("sgpt", "hydra_plugins")
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef)
    }
    to_visit = [*SCRIPT_CONFIGS.values(), LAUNCHER]
    reached: dict[str, ast.ClassDef] = {}
    while to_visit:
        name = to_visit.pop()
        if name in reached or name not in everything:
            continue
        reached[name] = everything[name]
        parts = [*everything[name].bases, *(field.annotation for field in fields_of(everything[name]))]
        to_visit += [node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)]
    return dict(sorted(reached.items()))


def fields_of(defined: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in defined.body if isinstance(node, ast.AnnAssign)]


def script_configs() -> dict[str, str]:
    """Script -> the dataclass of its keys, the first that is handed to `typed`."""
    configs = {}
    for file in sorted((REPOSITORY / "train").glob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "typed":
                configs.setdefault(file.name, node.args[0].id)
    return configs


SCRIPT_CONFIGS = script_configs()
CONFIGS = config_classes()


def test_every_script_has_a_dataclass_for_its_keys():
    assert SCRIPT_CONFIGS.keys() == {file.name for file in (REPOSITORY / "train").glob("*.py")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config_has_a_sentence_below_it(name):
    body = CONFIGS[name].body
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            sentence = text_in(below)
            assert sentence is not None, f"{name}.{field.target.id} has no sentence"
            assert sentence.strip().endswith((".", ".)", "?")), f"{name}.{field.target.id}: {sentence!r}"


def text_in(statement: ast.stmt | None) -> str | None:
    """The string that a statement consists of."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return statement.value.value if is_constant and isinstance(statement.value.value, str) else None


def docstrings(file: Path) -> dict[str, str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = [node for node in ast.walk(tree_of(file)) if isinstance(node, kinds)]
    return {getattr(node, "name", "its module"): text for node in nodes if (text := ast.get_docstring(node))}


def test_the_first_paragraph_of_a_docstring_is_a_whole_sentence():
    """Or it leads to a list, with a colon."""
    for file in python_files("sgpt", "train", "hydra_plugins", "benchmarks", "docs"):
        for name, text in docstrings(file).items():
            where = f"{said(file)}: {name}"
            first = text.split("\n\n")[0].strip()
            assert first.endswith((".", ".)", "?", ":")), f"{where}: …{first[-60:]!r}"


# what texts mention

PATH = re.compile(
    r"(?<![\w/.<>*-])((?:sgpt|train|configs|tests|benchmarks|docs|hydra_plugins|constraints|data/nano)/[\w/.*-]*[\w*/])"
)
FILE_NAME = re.compile(r"(?<![\w/.*}-])([a-z_]+\.py)\b")
DOTTED = re.compile(r"\bsgpt((?:\.[a-zA-Z_]\w*)+)")
TARGETS = re.compile(r"(?:`|^ {4}|^)make ([a-z][a-z0-9 -]*)", re.MULTILINE)
KEY = re.compile(r"(?<![\w./=-])([a-z_]+(?:\.[a-z_]+)*)=(?=[^\s=>])([\w./-]*)")
COMMAND = re.compile(r"^ {4}.*(?:\n {8}.*)*", re.MULTILINE)  # of a document, with the lines that continue it
GROUPS = "trainer|data|loss|optim|markers|evaluation|dev|tuning|pooling|logging"
GROUP_KEY = re.compile(rf"(?<![\w./-])((?:{GROUPS})\.[a-z_]+(?:\.[a-z_]+)*)\b(?![(/])")
DOCUMENTS = [
    REPOSITORY / name
    for name in (
        "README.md", "data/README.md", "data/nano/README.md", "benchmarks/RESULTS.md", "docs/architecture.md",
        "docs/families.md", "docs/sweeps.md",
    )
]  # fmt: skip
COMMENTED = [REPOSITORY / "Makefile", REPOSITORY / ".ci" / "run", *sorted((REPOSITORY / "configs").rglob("*.yaml"))]
TEXTS = [*DOCUMENTS, *COMMENTED, *python_files("sgpt", "train", "hydra_plugins", "benchmarks", "docs")]


def exists(path: str) -> bool:
    return any(REPOSITORY.glob(path)) if "*" in path else (REPOSITORY / path).exists()


def test_every_file_that_a_text_mentions_is_there():
    names = {file.name for file in CODE}
    for file in TEXTS:
        missing = {path for path in PATH.findall(text_of(file)) if not exists(path)} - NO_PATHS
        missing |= {*FILE_NAME.findall(text_of(file))} - names
        assert not missing, said(file)


def is_defined(dotted: str) -> bool:
    """Whether `.runtime.memory.keep_freed_memory` is a folder or module of sgpt/, or a word in one."""
    parts = dotted.split(".")[1:]
    folder = REPOSITORY / "sgpt"
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    module = folder / "__init__.py"
    if parts and (folder / f"{parts[0]}.py").is_file():
        module = folder / f"{parts.pop(0)}.py"
    return not parts or re.search(rf"\b{parts[0]}\b", text_of(module)) is not None


def test_every_name_of_ours_that_a_text_mentions_is_defined():
    dotted = {(said(file), name) for file in TEXTS for name in DOTTED.findall(text_of(file))}
    ours = {(file, name) for file, name in dotted if name not in (".json", ".__file__")}  # sgpt.json lies in an export
    assert not {(file, name) for file, name in ours if not is_defined(name)}


def test_every_target_that_a_text_mentions_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of(REPOSITORY / "Makefile"), re.MULTILINE))
    for file in [*DOCUMENTS, *COMMENTED]:
        for mentioned in TARGETS.findall(text_of(file)):
            missing = {*mentioned.split("  ")[0].split()} - targets
            assert not missing, f"{said(file)}: make {mentioned}"


def is_key(dotted: str, config: str) -> bool:
    """Whether a dataclass, what it consists of or what it is derived from has the key."""
    first, _, rest = dotted.partition(".")
    if any(is_key(dotted, base.id) for base in CONFIGS[config].bases if base.id in CONFIGS):
        return True
    for field in fields_of(CONFIGS[config]):
        if field.target.id == first:
            types = {node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)}
            return not rest or "dict" in types or any(is_key(rest, kind) for kind in types & CONFIGS.keys())
    return False


def is_choice(group: str, name: str) -> bool:
    """As in tuning=lora: a file of that name in the folder of configs/."""
    return (REPOSITORY / "configs" / group / f"{name}.yaml").is_file()


@pytest.mark.parametrize("file", DOCUMENTS, ids=said)
def test_every_key_that_a_document_sets_is_read_by_a_script(file):
    anywhere = list(SCRIPT_CONFIGS.values())
    spans = [(span, anywhere) for span in re.findall(r"`([^`\n]+)`", text_of(file))]
    for command in COMMAND.findall(text_of(file)):
        if script := re.search(r"train/(\w+\.py)", command):
            handed_on = ["TrainConfig"] if script[1] == "sweep.py" else []  # in its overrides
            spans.append((command.split("  #")[0], [SCRIPT_CONFIGS[script[1]], *handed_on]))
    for span, configs in spans:
        for key, value in KEY.findall(span):
            of_launcher = key.startswith("hydra.launcher.") and is_key(key.removeprefix("hydra.launcher."), LAUNCHER)
            known = any(is_key(key, config) for config in configs) or of_launcher
            known = known or is_choice(key, value) or key in NO_KEYS
            assert known, f"{key}={value} in {span!r}"


def test_every_key_that_a_message_names_is_read_by_training():
    for file in python_files("sgpt", "train"):
        constants = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Constant)]
        for node in constants:
            for key in GROUP_KEY.findall(node.value) if isinstance(node.value, str) else ():
                assert is_key(key, "TrainConfig") or key in NO_KEYS, f"{said(file)}:{node.lineno}: {key}"
