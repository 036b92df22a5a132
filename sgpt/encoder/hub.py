"""Exports on the model hub: what would go there is shown, and goes only when `dry_run=false` says so."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from sgpt.decoder.base_folder import is_of_hub
from sgpt.decoder.model_files import first_line
from sgpt.encoder import contract as contracts
from sgpt.encoder.adapter import base_of, is_adapter
from sgpt.encoder.export import CARD
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
KEPT = {".gitattributes"}  # of the repository, which the hub writes


def files_to_push(folder: Path) -> dict[str, int]:
    """Name in the repository -> bytes.

    InputError for an adapter over a folder of this machine, which nobody else could open.
    """
    if is_adapter(folder) and not is_of_hub(base := base_of(folder)):
        raise InputError(
            f"{folder}: is an adapter over {base}, a folder of this machine, so nobody else could open it; push "
            "formats=[sentence-transformers], or train over a base by its hub id"
        )
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def push(folder: Path, repository: str) -> str:
    """Uploads the folder as the whole content of the repository, in one commit; a new one is private. Returns its URL.

    What else an earlier export left there is deleted, and named in the log, as is who can read it. In the card the
    repository's id stands in place of the folder's path. InputError without a token, for a repository whose files are
    no export of ours, and for whatever the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise InputError(
            f"push_to_hub={repository}: there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    files = files_to_push(folder)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        readers = "its owners alone" if api.model_info(repository).private else "everybody, as it is public"
        log.info("%s can be read by %s", repository, readers)
        stale = _stale(repository, api.list_repo_files(repository), files)
        operations = [CommitOperationDelete(name) for name in stale]
        for name in files:
            content = of_repository(folder, repository).encode() if name == CARD else folder / name
            operations.append(CommitOperationAdd(name, content))
        api.create_commit(repository, operations, commit_message=f"Export {folder.name}")
    except InputError:
        raise
    except Exception as error:  # of httpx, of the hub, of the system
        raise InputError(
            f"push_to_hub={repository}: the hub could not be reached or refused ({first_line(error)}); nothing else "
            "is wrong with the export, try again"
        ) from error
    return str(address)


def _stale(repository: str, there: Collection[str], files: Collection[str]) -> list[str]:
    """Files of an earlier export that the new one has not; InputError where the repository holds something else.

    there: names of the repository's files. files: of the new ones.
    """
    others = {*there} - KEPT
    if others and contracts.FILE not in others:
        raise InputError(
            f"push_to_hub={repository}: the repository holds {min(others)} and no {contracts.FILE}, so it is no export "
            "of this framework, and an upload would replace its files; name a new one, or delete them first"
        )
    stale = sorted(others - {*files})
    if stale:
        log.warning("%s: these of an earlier export are deleted: %s", repository, ", ".join(stale))
    return stale


def of_repository(folder: Path, repository: str) -> str:
    """The card with the repository's id in place of the folder's path."""
    text = (folder / CARD).read_text(encoding="utf-8")
    return text.replace(f'"{folder}"', f'"{repository}"')


def listing(repository: str, files: Mapping[str, int]) -> str:
    """A line for each file that would go, and their sum."""
    lines = [f"  {size:>14,}  {name}" for name, size in files.items()]
    return "\n".join([f"{repository}: {len(files)} files, {sum(files.values()):,} bytes", *lines])
