"""Draws docs/architecture.svg from the imports: `python docs/draw_architecture.py` (or `make architecture`).

A box is a folder of sgpt/, an arrow says "imports", a folder stands one floor above the highest it imports from.
What is drawn is written into the picture as JSON as well, so that tests/ can compare it with the imports of today.
"""

import argparse
import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

REPOSITORY = Path(__file__).parents[1]
PICTURE = REPOSITORY / "docs" / "architecture.svg"
WIDTH, HEIGHT = 2.5, 0.62  # of a box; floors are 1 apart
ASIDE = {"report": 2.0}  # to the right, or the arrows to it would seem to be those of folders that they pass
DARK, PALE = "#1d3c5c", "#c9d3de"


@dataclass(frozen=True)
class Folder:
    """A folder of sgpt/: what its `__init__.py` says it is for, and how much of it there is."""

    files: int
    lines: int
    parts: tuple[str, ...]
    imports: tuple[str, ...]


def read_folders() -> dict[str, Folder]:
    """The folders of sgpt/ by name. Imports under `if TYPE_CHECKING` and in functions count."""
    folders = {}
    for path in sorted((REPOSITORY / "sgpt").iterdir()):
        if not (path / "__init__.py").is_file():
            continue
        files = sorted(path.rglob("*.py"))
        imports = {name for file in files for name in imported_folders(file)} - {path.name}
        parts = tuple(sorted(part.name for part in path.iterdir() if (part / "__init__.py").is_file()))
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        written = [file for file in files if file.name != "__init__.py"]
        folders[path.name] = Folder(len(written), lines, parts, tuple(sorted(imports)))
    return folders


def imported_folders(file: Path) -> set[str]:
    """Folders of sgpt/ that a file imports from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    folders = {name.split(".")[1] for name in names if name.startswith("sgpt.")}
    return {name for name in folders if (REPOSITORY / "sgpt" / name).is_dir()}


def floors(folders: dict[str, Folder]) -> dict[str, int]:
    """1 for a folder that imports from no other; RecursionError where folders import each other in a circle."""

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in folders[name].imports), default=0)

    return {name: floor(name) for name in folders}


def below(name: str, folders: dict[str, Folder]) -> set[str]:
    """Every folder that is reached by arrows from `name`."""
    reached = set(folders[name].imports)
    for other in folders[name].imports:
        reached |= below(other, folders)
    return reached


def described(folders: dict[str, Folder]) -> dict:
    """What the picture shows, as it is written into it."""
    return {
        "files": {name: folder.files for name, folder in folders.items()},
        "lines": {name: rounded(folder.lines) for name, folder in folders.items()},
        "arrows": {name: list(folder.imports) for name, folder in folders.items()},
    }


def rounded(lines: int) -> int:
    """To hundreds: the picture need not be drawn again for every line."""
    return max(100, round(lines, -2))


def placed(folders: dict[str, Folder]) -> dict[str, tuple[float, float]]:
    """The middle of each box, from the top floor down: a folder stands where those that import it stand."""
    heights = floors(folders)
    places: dict[str, tuple[float, float]] = {}

    def wanted(name: str) -> tuple[float, str]:
        above = [places[other][0] for other, folder in folders.items() if name in folder.imports]
        return sum(above) / max(1, len(above)), name

    for floor in range(max(heights.values()), 0, -1):
        row = sorted((name for name in folders if heights[name] == floor), key=wanted)
        for number, name in enumerate(row):
            # a single box stands off the middle by turns, so that arrows of two floors do not lie on each other
            middle = 0.55 * (-1) ** floor if len(row) == 1 else 0.0
            x = middle + (number - (len(row) - 1) / 2) * (WIDTH + 1.1)
            places[name] = (x + ASIDE.get(name, 0.0), floor)
    return places


def draw(folders: dict[str, Folder], output: Path) -> None:
    """Floors from the ground up. Dark arrows are those that no chain of other arrows implies; the rest is pale."""
    places = placed(folders)
    top = max(floor for _, floor in places.values())
    figure, axes = pyplot.subplots(figsize=(9, 8))
    for name, folder in folders.items():
        for other in folder.imports:
            between = (others for others in folder.imports if others != other)
            implied = any(other in below(one, folders) for one in between)
            draw_arrow(axes, places[name], places[other], implied=implied)
    for name, folder in folders.items():
        draw_box(axes, places[name], name, folder)
    draw_note(axes, top + 0.95, "train/*.py: a script for each command, a table of contents of what it calls", 10)
    legend = "An arrow: imports from. Pale ones are implied by chains of the others. Lines are rounded to hundreds."
    draw_note(axes, 0.45, legend, 8.5)
    for floor in range(1, top + 1):
        axes.text(-5.3, floor, str(floor), va="center", ha="center", fontsize=9, color="#777777")
    axes.set_xlim(-5.5, 5.3)
    axes.set_ylim(0.3, top + 1.15)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    about = json.dumps(described(folders), sort_keys=True)
    if output.suffix == ".svg":
        # text stays text, and nothing in the file depends on the clock or on chance
        with matplotlib.rc_context({"svg.hashsalt": "sgpt", "svg.fonttype": "none"}):
            figure.savefig(output, metadata={"Date": None, "Creator": None, "Description": about})
    else:
        figure.savefig(output, dpi=90)
    pyplot.close(figure)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, implied: bool) -> None:
    color, width = (PALE, 0.9) if implied else (DARK, 1.5)
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    aside = max(-0.4 * WIDTH, min(0.4 * WIDTH, 0.3 * (end[0] - start[0])))
    begins, ends = (start[0] + aside, start[1] - HEIGHT / 2), (end[0] - aside, end[1] + HEIGHT / 2)
    axes.annotate("", xy=ends, xytext=begins, arrowprops=style, zorder=1 if implied else 2)


def draw_box(axes: Axes, place: tuple[float, float], name: str, folder: Folder) -> None:
    x, y = place
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    box = pyplot.Rectangle(corner, WIDTH, HEIGHT, facecolor="#eef3f8", edgecolor=DARK, linewidth=1.2, zorder=3)
    axes.add_patch(box)
    axes.text(x, y + 0.12, f"{name}/", ha="center", va="center", fontsize=11, weight="bold", zorder=4)
    size = f"{folder.files} files, {rounded(folder.lines):,} lines"
    axes.text(x, y - 0.12, size, ha="center", va="center", fontsize=8.5, zorder=4)
    if folder.parts:
        side = x + WIDTH / 2 + 0.12
        names = "\n".join(f"{part}/" for part in folder.parts)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(side, y, names, ha="left", va="center", fontsize=8, bbox=white, zorder=4)


def draw_note(axes: Axes, y: float, text: str, size: float) -> None:
    axes.text(0, y, text, ha="center", va="center", fontsize=size, zorder=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE, help="an .svg, or a .png to look at")
    options = parser.parse_args()
    draw(read_folders(), options.output)
    print(options.output)


if __name__ == "__main__":
    main()
