"""Markers: a query is put in `[ … ]`, a document in `{ … }`, as token ids around the truncated content.

SGPT (Muennighoff 2022, arXiv 2202.08904, section 4.2 "asymmetric search") tells queries from documents by brackets that
every byte-level vocabulary has, so nothing new needs to be learnt. They are inserted as ids and not as text, because
`?` + `]` is one token in most vocabularies: merged, the marker would be gone. Truncation cuts the content only.

The original adds the opening marker before truncating to `max_tokens - 2` and the closing one after: 297 + 2 tokens for
300. `original_limit` reproduces that; otherwise all of `max_tokens` is used: 298 + 2.
"""

from dataclasses import dataclass
from typing import Literal

from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_choice, check_ranges

Role = Literal["query", "document"]
ROLES: tuple[Role, Role] = ("query", "document")
MARKERS: dict[str, dict[Role, tuple[str, str]]] = {
    "brackets": {"query": ("[", "]"), "document": ("{", "}")},
    "none": {"query": ("", ""), "document": ("", "")},
}


@dataclass
class MarkersConfig:
    """What stands around queries and documents, and how long they may be."""

    name: str = "brackets"
    """A row of MARKERS."""
    query_max_tokens: int = 300
    """Of the whole sequence, markers and special tokens included."""
    document_max_tokens: int = 300
    """Of the whole sequence, markers and special tokens included."""
    original_limit: bool = False
    """One token less of content, as the original cuts it."""

    def __post_init__(self) -> None:
        check_choice("markers.name", self.name, MARKERS)
        check_ranges(self, "markers.", query_max_tokens=COUNT, document_max_tokens=COUNT)
        for role in ROLES:
            if self.max_tokens(role) < 4:
                raise InputError(
                    f"markers.{role}_max_tokens={self.max_tokens(role)} leaves no room for text; use 4 or more"
                )

    def max_tokens(self, role: Role) -> int:
        return self.query_max_tokens if role == "query" else self.document_max_tokens


@dataclass(frozen=True)
class Frame:
    """What stands around a text of one role: ids of special tokens and markers, and how many tokens fit between them.

    content: the text's own tokens.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    content_tokens: int

    @property
    def length(self) -> int:
        """Most ids of a sequence, frame included."""
        return len(self.before) + self.content_tokens + len(self.after)

    def put_around(self, content: list[int]) -> list[int]:
        """content: ids of the bare text, any length. Returns the frame around at most `content_tokens` of them; the
        markers are always there.
        """
        return [*self.before, *content[: self.content_tokens], *self.after]


def frames(config: MarkersConfig, tokenizer) -> dict[Role, Frame]:
    """The frame of each role for a tokenizer, whose own special tokens ([CLS], <s> …) stay outside of the markers.

    Raises InputError when a marker is not exactly one token, as then it would not be the marker that was meant.
    """
    special_before, special_after = special_tokens(tokenizer)
    by_role: dict[Role, Frame] = {}
    for role in ROLES:
        opening, closing = (_marker_id(text, role, tokenizer) for text in MARKERS[config.name][role])
        before = (*special_before, *opening)
        after = (*closing, *special_after)
        around = len(before) + len(after)
        room = config.max_tokens(role) - around
        if config.original_limit and opening:
            room -= 1
        if room < 1:
            raise InputError(
                f"markers.{role}_max_tokens={config.max_tokens(role)} leaves no room next to {around} markers and "
                "special tokens; raise it"
            )
        by_role[role] = Frame(before, after, room)
    return by_role


def special_tokens(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer puts before and after every text: none for GPT, [CLS] and [SEP] for BERT, </s> first for
    OPT.
    """
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(probe) + 1):
        if whole[start : start + len(probe)] == probe:
            return tuple(whole[:start]), tuple(whole[start + len(probe) :])
    raise InputError(
        f"{type(tokenizer).__name__}: the special tokens change the text's own tokens; such a tokenizer is not "
        "supported"
    )


def _marker_id(text: str, role: Role, tokenizer) -> tuple[int, ...]:
    """The marker's id; none for an empty marker."""
    if not text:
        return ()
    # a vocabulary look-up, as sentencepiece would add a blank when encoding
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or token == tokenizer.unk_token_id:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        raise InputError(
            f"the {role} marker {text!r} is no token of {type(tokenizer).__name__} (it becomes {len(ids)} ids: {ids}); "
            "use markers=none, or a base whose vocabulary has it"
        )
    return (token,)
