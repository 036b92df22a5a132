"""A zip from the network, unpacked: whole or not there, and nothing written outside of its folder."""

import hashlib
import http.client
import shutil
import stat
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from sgpt.runtime.errors import InputError
from sgpt.runtime.files import replace_folder
from sgpt.runtime.progress import progress_bar

BLOCK = 1 << 20
TIMEOUT_SECONDS = 30.0  # without a byte


def fetch(address: str, folder: Path, *, md5: str | None, remedy: str) -> None:
    """Downloads a zip that holds a folder of `folder`'s name, and puts that folder there.

    md5: of the zip; None is not checked. What is half done lies under names with a dot before and is removed, by the
    next start at the latest. remedy: how to do without the network, the end of each sentence. InputError for no
    network, a size or sum that is not the stated one, and a zip that would write elsewhere.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive, unpacked = folder.with_name(f".{folder.name}.zip"), folder.with_name(f".{folder.name}.unpacked")
    try:
        _download(address, archive, md5, remedy)
        shutil.rmtree(unpacked, ignore_errors=True)
        _unpack(archive, unpacked, address, remedy)
        if not (unpacked / folder.name).is_dir():
            raise InputError(f"{address}: holds no folder {folder.name}/; {remedy}")
        replace_folder(unpacked / folder.name, folder)
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)


def _download(address: str, archive: Path, md5: str | None, remedy: str) -> None:
    digest, size = hashlib.md5(usedforsecurity=False), 0
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer, archive.open("wb") as out:
            stated = int(answer.headers.get("Content-Length") or 0)
            with progress_bar(f"downloading {archive.name.strip('.')}", stated or 1) as advance:
                while block := answer.read(BLOCK):
                    out.write(block)
                    digest.update(block)
                    size += len(block)
                    advance(len(block))
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer, too, and holds the socket
        raise InputError(f"{address}: the server answers {error.code} {error.reason}; {remedy}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise InputError(
            f"{address}: cannot be downloaded, is there a network? ({getattr(error, 'reason', error)}); {remedy}"
        ) from error
    if stated and size != stated:
        raise InputError(
            f"{address}: the download broke off after {size:,} of {stated:,} bytes; start again, or {remedy}"
        )
    if md5 and digest.hexdigest() != md5:
        raise InputError(
            f"{address}: md5 {digest.hexdigest()} of {size:,} bytes, expected {md5}: not the file that BEIR lists; "
            f"start again, or {remedy}"
        )


def _unpack(archive: Path, folder: Path, address: str, remedy: str) -> None:
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if (
                    path.is_absolute()
                    or ".." in path.parts
                    or ":" in "".join(path.parts[:1])
                    or stat.S_ISLNK(member.external_attr >> 16)
                ):
                    raise InputError(
                        f"{address}: its member {member.filename!r} would be written outside of its folder; {remedy}"
                    )
            packed.extractall(folder)
    # the last is zipfile's, of a compression it does not know
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{address}: no whole zip ({error}); start again, or {remedy}") from error
