"""Files that are whole or not there."""

import shutil
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes beside and renames, so a killed run leaves no half file."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Gives a whole folder its name. The one that had it goes only afterwards: a kill leaves it as `.<name>.old`."""
    old = _put_aside(folder)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Under another name, so that a killed removal leaves no half folder of this name."""
    shutil.rmtree(_put_aside(folder), ignore_errors=True)


def _put_aside(folder: Path) -> Path:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old
