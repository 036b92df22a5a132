"""The contract of a model: everything that must be equal at training and at use, kept next to the weights in
`sgpt.json`.

It also knows the files that it belongs to by their hashes, and itself by its own: what was changed after it was written
is named, and not opened. Written out, too, is what it comes to with this tokenizer (`roles`), for readers that are not
ours, and what the model was made of (`origin`).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from sgpt.encoder.pooling import POOLINGS
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import hash_of
from sgpt.runtime.provenance import computing_versions, tokenizer_hash
from sgpt.text.markers import ROLES, MarkersConfig, frames

FILE = "sgpt.json"
FORMAT = 3  # 2, without roles and origin, is still read, and 1, without hashes and rounding
OF_THE_WEIGHTS = ("probes", "rounding", "files", "roles", "origin")  # equal contracts may differ in them
RULES = {"similarity": "cosine", "counting": "sequence", "truncation_side": "right"}  # what is done here, always
MAY_CHANGE = ("base", "hash")  # a base can be moved; an adapter knows it by its weights


@dataclass
class Origin:
    """What the weights were made of, as far as whoever saved them knew it."""

    revision: str = ""
    """Commit of the base, where it is of the model hub."""
    base_weights: str = ""
    """Hash of every bit of the base before training."""
    tokenizer: str = ""
    """Hash of the base's tokenizer, all of it."""
    dtype: str = ""
    """In which the base was held in training."""
    tuning: str = ""
    """Which parameters learned, a row of TUNINGS."""
    layers: str = ""
    """In which blocks, as tuning.layers says it; "" in contracts that were written before this was kept."""
    training_data: str = ""
    """Hash of all training examples."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that computed the probes."""


@dataclass
class RoleTokens:
    """What stands around a text of one role with this tokenizer, its own special tokens included."""

    text_before: str
    """As text; tokenised with a text it may merge with that, so the ids are what counts."""
    text_after: str
    """As `text_before`."""
    ids_before: list[int]
    """Token ids before the text's own."""
    ids_after: list[int]
    """Token ids after the text's own."""
    content_tokens: int
    """Most tokens of the text itself; a longer one loses its end."""
    max_tokens: int
    """Most tokens of the whole sequence."""


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
    similarity: str = "cosine"
    """By what embeddings are compared."""
    counting: str = "sequence"
    """What a limit in tokens counts: the whole sequence, with markers and special tokens."""
    truncation_side: str = "right"
    """Where a long text is cut."""
    roles: dict[str, RoleTokens] = field(default_factory=dict, compare=False)
    """What the markers are with the model's tokenizer; it follows from the rest, and is for other readers."""
    origin: Origin = field(default_factory=Origin, compare=False)
    """What the model was made of."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")

    def of_model(self, tokenizer, **measured) -> "Contract":
        """As it is saved with a model: what it comes to with its tokenizer, and today's versions of libraries.

        measured: fields of OF_THE_WEIGHTS.
        """
        has_rules = getattr(tokenizer, "backend_tokenizer", None) is not None
        known = self.origin.tokenizer or (tokenizer_hash(tokenizer) if has_rules else "")
        origin = replace(self.origin, tokenizer=known, versions=computing_versions())
        return replace(self, roles=role_tokens(self.markers, tokenizer), origin=origin, **measured)

    def check_roles(self, tokenizer, source: str) -> None:
        """InputError where the markers are other tokens now than when the model was saved. source: for the message."""
        if not self.roles:
            return
        now = role_tokens(self.markers, tokenizer)
        for role in ROLES:
            for one in fields(RoleTokens):
                before, after = getattr(self.roles[role], one.name), getattr(now[role], one.name)
                if before != after:
                    raise InputError(
                        f"{source}: {one.name} of a {role} is {before!r} in {FILE}, and {after!r} with this tokenizer; "
                        "put back the one that the model was trained with"
                    )

    def save(self, folder: Path, files: Iterable[str] = ()) -> None:
        """Written last of all: `files`, names in the folder, are there already."""
        hashes = {name: hash_of(folder / name) for name in sorted(files)}
        stated = {"format": FORMAT, **asdict(replace(self, files=hashes))}
        text = json.dumps({**stated, "hash": _hash(stated)}, indent=2, ensure_ascii=False)
        (folder / FILE).write_text(_in_rows(text) + "\n", encoding="utf-8")

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
        parts: dict = {"markers": MarkersConfig(**stated["markers"])}
        if "origin" in stated:
            parts["origin"] = Origin(**stated["origin"])
            parts["roles"] = {role: RoleTokens(**tokens) for role, tokens in stated["roles"].items()}
        return cls(**stated | parts)

    def fingerprint(self) -> str:
        """Of everything but what was measured and where the base lies; equal contracts give equal token ids and
        pooling.
        """
        return hashlib.sha256(json.dumps(self.stated(), sort_keys=True).encode()).hexdigest()[:16]

    def stated(self) -> dict:
        """What the fingerprint is of."""
        left_out = (*OF_THE_WEIGHTS, *RULES, "base")  # a moved base is the same model; its weights have a hash
        stated = {key: value for key, value in asdict(self).items() if key not in left_out}
        if not stated["prompts"]:  # as contracts were hashed before there were prompts
            del stated["prompts"]
        return stated


def role_tokens(markers: MarkersConfig, tokenizer) -> dict[str, RoleTokens]:
    """By role; as `frames`, with the texts."""
    by_role: dict[str, RoleTokens] = {}
    for role, frame in frames(markers, tokenizer).items():
        texts = ["".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (frame.before, frame.after)]
        by_role[role] = RoleTokens(
            *texts, list(frame.before), list(frame.after), frame.content_tokens, markers.max_tokens(role)
        )
    return by_role


def _in_rows(text: str) -> str:
    """JSON whose lists of numbers are on one line each; within a JSON string no line ends."""
    return re.sub(r"\[\n[-+.\deE,\s]*\]", lambda numbers: re.sub(r"\s*\n\s*", "", numbers[0]).replace(",", ", "), text)


def _hash(stated: dict) -> str:
    kept = {key: value for key, value in stated.items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def _checked(stored: object, file: Path) -> dict:
    """The fields of the contract, when they are all there, of their types, and as they were written."""
    if not isinstance(stored, dict) or "format" not in stored:
        raise InputError(f"{file}: not a contract (it has no key 'format'); export the run again")
    form = stored["format"]
    if type(form) is not int or not 1 <= form <= FORMAT:
        newer = type(form) is int and form > FORMAT
        remedy = "update this one" if newer else "use that, or export the run again"
        raise InputError(
            f"{file}: format {form!r} is of {'a newer' if newer else 'another'} version of this framework, and formats "
            f"1 to {FORMAT} are read here; {remedy}"
        )
    known = {one.name for one in fields(Contract)}
    required = REQUIRED.get(form, known | {"hash"})
    if odd := sorted(required - stored.keys()) or sorted(stored.keys() - required - {"format"}):
        what = "is missing" if odd[0] in required else "is unknown here, as from a newer version"
        raise InputError(f"{file}: key {odd[0]!r} {what}; export the run again")
    for key, is_right in TYPES.items():
        if key in stored and not is_right(stored[key]):
            raise InputError(f"{file}: {key} is {str(stored[key])!r:.80}, which is not valid; export the run again")
    if form > 1 and _hash(stored) != stored["hash"]:
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
    """Empty, or as many rows of finite numbers, and lists of token ids, for each role as there are texts."""
    if value == {}:
        return True
    ids = [f"{role}_ids" for role in ROLES]  # which formats before 3 do not have
    if not isinstance(value, dict) or value.keys() not in ({"texts", *ROLES}, {"texts", *ROLES, *ids}):
        return False
    texts = value["texts"]
    if not _all(texts, str) or not texts:
        return False
    for key in value.keys() & {*ids}:
        if not isinstance(value[key], list) or len(value[key]) != len(texts):
            return False
        if not all(_all(row, int) for row in value[key]):
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


def _is_origin(value: object) -> bool:
    if isinstance(value, dict):
        value = {"layers": "", **value}
    return _has_types(value, Origin()) and all(isinstance(version, str) for version in value["versions"].values())


def _is_roles(value: object) -> bool:
    """Empty, or both roles."""
    if value == {}:
        return True
    if not isinstance(value, dict) or value.keys() != {*ROLES}:
        return False
    tokens = RoleTokens("", "", [], [], 0, 0)
    whole = all(_has_types(of_role, tokens) for of_role in value.values())
    return whole and all(_all(of_role[key], int) for of_role in value.values() for key in ("ids_before", "ids_after"))


def _has_types(value: object, example: Origin | RoleTokens) -> bool:
    """Whether it has the keys of the example, with values of the same types."""
    expected = asdict(example)
    if not isinstance(value, dict) or value.keys() != expected.keys():
        return False
    return all(type(value[key]) is type(expected[key]) for key in expected)


REQUIRED = {  # keys of older formats
    1: {"pooling", "markers", "normalize", "base", "probes"},
    2: {"pooling", "markers", "normalize", "base", "probes", "prompts", "rounding", "files", "hash"},
}
TYPES: dict[str, Callable[[object], bool]] = {
    "pooling": lambda value: isinstance(value, str) and value in POOLINGS,
    "markers": _is_markers,
    "normalize": lambda value: isinstance(value, bool),
    "base": lambda value: isinstance(value, str),
    "probes": _is_probes,
    "rounding": _is_rounding,
    "prompts": _is_prompts,
    "files": _is_files,
    "roles": _is_roles,
    "origin": _is_origin,
    **{key: lambda value, rule=rule: value == rule for key, rule in RULES.items()},
}
