"""The contract of a model: everything that must be equal at training and at use, kept next to the weights in
`sgpt.json`.

It also knows the files that it belongs to by their hashes, and itself by its own: what was changed after it was written
is named, and not opened.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from sgpt.encoder.pooling import POOLINGS
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import hash_of
from sgpt.text.markers import ROLES, MarkersConfig

FILE = "sgpt.json"
FORMAT = 2  # 1, without hashes and rounding, is still read
MEASURED = ("probes", "rounding", "files")  # of these weights; equal contracts may differ in them
MAY_CHANGE = ("base", "hash")  # a base can be moved; an adapter knows it by its weights


@dataclass
class Contract:
    """How texts become embeddings with these weights."""

    pooling: str = "weighted_mean"
    """A row of POOLINGS."""
    markers: MarkersConfig = field(default_factory=MarkersConfig)
    """What stands around queries and documents, and how long they may be."""
    normalize: bool = False
    """Embeddings are of length 1."""
    base: str = ""
    """Path or hub id of the frozen trunk."""
    probes: dict[str, list] = field(default_factory=dict)
    """Texts and their embeddings by role, as the weights gave them in float32 when they were saved; whoever opens the
    model can check that it still gives them."""
    prompts: dict[str, str] = field(default_factory=dict)
    """By role, what stands before every text and is tokenised with it, as some sentence-transformers models expect."""
    rounding: dict[str, float | None] = field(default_factory=dict, compare=False)
    """dtype -> how far the probes were off with the weights in this dtype, null where they were no numbers."""
    files: dict[str, str] = field(default_factory=dict, compare=False)
    """Name -> hash of each file next to the contract that the embeddings depend on."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")

    def save(self, folder: Path, files: Iterable[str] = ()) -> None:
        """Written last of all: `files`, names in the folder, are there already."""
        hashes = {name: hash_of(folder / name) for name in sorted(files)}
        stated = {"format": FORMAT, **asdict(replace(self, files=hashes))}
        text = json.dumps({**stated, "hash": _hash(stated)}, indent=2, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Contract":
        """InputError when the contract, or a file that it knows, is no longer as it was written."""
        file = folder / FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: not a contract ({error}); export the run again") from error
        stated = _checked(stored, file)
        for name, expected in stated.get("files", {}).items():
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder / name}: the file is missing; copy the whole folder, or make it again from its run"
                )
            if hash_of(folder / name) != expected:
                raise InputError(
                    f"{folder / name}: its hash differs from the one in {FILE} that it was saved with; copy the folder "
                    "again, or make it again from its run"
                )
        return cls(**{**stated, "markers": MarkersConfig(**stated["markers"])})

    def fingerprint(self) -> str:
        """Of everything but what was measured; equal contracts give equal token ids and pooling."""
        stated = {key: value for key, value in asdict(self).items() if key not in MEASURED}
        if not stated["prompts"]:  # as contracts were hashed before there were prompts
            del stated["prompts"]
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]


def _hash(stated: dict) -> str:
    kept = {key: value for key, value in stated.items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def _checked(stored: object, file: Path) -> dict:
    """The fields of the contract, when they are all there, of their types, and as they were written."""
    if not isinstance(stored, dict) or "format" not in stored:
        raise InputError(f"{file}: not a contract (it has no key 'format'); export the run again")
    if stored["format"] not in (1, FORMAT) or isinstance(stored["format"], bool | float):
        raise InputError(
            f"{file}: format {stored['format']!r} is of another version of this framework; use that, or export the run "
            "again"
        )
    old = stored["format"] == 1
    known = {one.name for one in fields(Contract)}
    required = {"pooling", "markers", "normalize", "base", "probes"} if old else known | {"hash"}
    if odd := sorted(required - stored.keys()) or sorted(stored.keys() - required - {"format"}):
        what = "is missing" if odd[0] in required else "is unknown here, as from a newer version"
        raise InputError(f"{file}: key {odd[0]!r} {what}; export the run again")
    for key, is_right in TYPES.items():
        if key in stored and not is_right(stored[key]):
            raise InputError(f"{file}: {key} is {str(stored[key])!r:.80}, which is not valid; export the run again")
    if not old and _hash(stored) != stored["hash"]:
        raise InputError(
            f"{file}: the contract was changed since it was saved (its own hash differs); copy the folder again, "
            "or make it again from its run"
        )
    return {key: stored[key] for key in known if key in stored}


def _is_markers(value: object) -> bool:
    types = {one.name: type(one.default) for one in fields(MarkersConfig)}
    if not isinstance(value, dict) or value.keys() != types.keys():
        return False
    return all(type(value[key]) is kind for key, kind in types.items())


def _is_probes(value: object) -> bool:
    """Empty, or as many rows of finite numbers for each role as there are texts."""
    if value == {}:
        return True
    if not isinstance(value, dict) or value.keys() != {"texts", *ROLES}:
        return False
    texts = value["texts"]
    if not _all(texts, str) or not texts:
        return False
    rows: list[list[float]] = []
    for role in ROLES:
        of_role = value[role]
        if not isinstance(of_role, list) or len(of_role) != len(texts) or not all(_all(row, float) for row in of_role):
            return False
        rows += of_role
    one_length = len({len(row) for row in rows}) == 1
    return one_length and all(math.isfinite(number) for row in rows for number in row)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_rounding(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(number is None or (type(number) is float and 0 <= number < math.inf) for number in value.values())


def _is_prompts(value: object) -> bool:
    return isinstance(value, dict) and value.keys() <= {*ROLES} and _all([*value.values()], str)


def _is_files(value: object) -> bool:
    """Names of files of this very folder, with their hashes."""
    if not isinstance(value, dict):
        return False
    return all(Path(name).name == name and isinstance(expected, str) for name, expected in value.items())


TYPES: dict[str, Callable[[object], bool]] = {
    "pooling": lambda value: isinstance(value, str) and value in POOLINGS,
    "markers": _is_markers,
    "normalize": lambda value: isinstance(value, bool),
    "base": lambda value: isinstance(value, str),
    "probes": _is_probes,
    "rounding": _is_rounding,
    "prompts": _is_prompts,
    "files": _is_files,
}
