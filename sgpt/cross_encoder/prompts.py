"""Prompts of SGPT-CE: what stands around a document before the decoder is asked for the query.

A to M and quoraA to quoraE are the original's (crossencoder/beir of the SGPT repository); G is its choice for search,
quoraD for questions of the same meaning. The paper chose them on BEIR's test sets, so scores there are not quite
zero-shot. A new one is a row of PROMPTS.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sgpt.runtime.errors import InputError

DOCUMENT, QUERY = "{document}", "{query}"
SEARCH, SYMMETRIC = "G", "quoraD"


@dataclass
class PromptConfig:
    """A prompt by name, or written out. Rows of PROMPTS have their own start, shot and answers."""

    prompt: str = SEARCH
    """A row of PROMPTS, or a text of one's own that holds {document} once; the query follows directly and is scored."""
    shots: list[list[str]] = field(default_factory=list)
    """Examples, [document, query] each, put before the prompt as `shot` says."""
    start: str = ""
    """Stands before all, examples included."""
    shot: str | None = None
    """How an example is written; holds {document} and {query}."""
    answers: list[str] = field(default_factory=list)
    """For a prompt that asks a question, whose text holds {query} as well: its answers. The score is the
    log-probability of the first one, in competition with the others, by the first token in which they differ."""


@dataclass(frozen=True)
class Prompt:
    """What stands around a document.

    instruction: before it, and kept whole, whatever is cut. tail: between document and query, kept too; with answers it
    holds {query}.
    """

    instruction: str
    tail: str
    answers: tuple[str, ...] = ()

    def before_query(self, document: str, query: str) -> str:
        """All that the decoder reads before what is scored."""
        return self.instruction + document + self.behind_document(query)

    def behind_document(self, query: str) -> str:
        return self.tail.replace(QUERY, query) if self.answers else self.tail


@dataclass(frozen=True)
class _Row:
    """A row of PROMPTS; the fields are those of PromptConfig, `text` what `prompt` is there."""

    text: str
    start: str = ""
    shot: str | None = None
    answers: tuple[str, ...] = ()


_SAME = "Documents are searched to find matches with the same content.\n"
_BOT = (
    "An intelligent, helpful bot is given. "
    'The bot responds "Yes" if the document is a fit to the query and "No" otherwise.'
)
_ASKED = "\n###\nDocument: {document}\nQuery: {query}\nBot:"
PROMPTS: dict[str, _Row] = {
    "A": _Row("{document} "),
    "B": _Row("{document}\n"),
    "C": _Row("Document:\n{document}\n\nQuery:\n"),
    "D": _Row("Body:{document}\n\nTitle:\n"),
    "E": _Row("selected document:\n{document}\n\nrelevant query:\n"),
    "F": _Row("The selected text is:\n{document}\n\nThe relevant query is:\n"),
    "G": _Row(_SAME + 'The document "{document}" is a good search result for "'),
    "H": _Row(_SAME + 'Document: "{document}"\n\nThe above document is a good match for the query: "'),
    "I": _Row(
        "# Get matching document and query with the same content\n"
        'get_document()\n{document}\nget_query_matching_document()\n"'
    ),
    "J": _Row("Document:\n{document}\nQuery:\n", start=_SAME, shot="Document:\n{document}\nQuery:\n{query}\n"),
    "K": _Row("Document:\n{document}\nQuery:\n", shot="Document:\n{document}\nQuery:\n{query}\n"),
    "L": _Row(_ASKED, start=_BOT, answers=(" Yes", " No")),
    "M": _Row(_ASKED, start=_BOT, shot=_ASKED + " Yes", answers=(" Yes", " No")),
    "quoraA": _Row(
        "Questions are searched to find matches with the same content.\n"
        'The question "{document}" is a good search result for "'
    ),
    "quoraB": _Row(
        "Below are two similar questions asking the same thing.\n"
        'The question "{document}" is similar to "'
    ),
    "quoraC": _Row("These two questions are the same: 1. {document} 2."),
    "quoraD": _Row("Question Body: {document} Question Title:"),
    "quoraE": _Row(
        "Question Body: {document} Question Title:", shot="Question Body: {document} Question Title: {query}\n"
    ),
}


def build_prompt(config: PromptConfig) -> Prompt:
    """The prompt that a configuration says.

    Raises InputError for an unknown name, a text without its slots, and examples that are missing or not asked for.
    """
    named = f"prompt={config.prompt!r}"
    if config.prompt in PROMPTS:
        row = PROMPTS[config.prompt]
        if config.start or config.shot or config.answers:
            raise InputError(
                f"{named} has its own start, shot and answers; leave these out, or write a prompt of your own with "
                f"{DOCUMENT} in it"
            )
    else:
        row = _Row(config.prompt, config.start, config.shot, tuple(config.answers))
    if (slots := row.text.count(DOCUMENT)) != 1:
        raise InputError(
            f"{named} is no name of {', '.join(PROMPTS)}, and as a text it holds {DOCUMENT} {slots} times; it must "
            "hold it once"
        )
    before, behind = row.text.split(DOCUMENT)
    if row.answers and (QUERY not in behind or QUERY in before or len(row.answers) < 2):
        raise InputError(
            f"{named} is answered by one of {list(row.answers)}: it must hold {QUERY} behind {DOCUMENT}, and have two "
            "answers or more"
        )
    if not row.answers and QUERY in row.text.removesuffix(QUERY):
        raise InputError(
            f"{named} holds {QUERY} before its end; the query follows the prompt directly: leave {QUERY} out, or give "
            "answers"
        )
    instruction = row.start + _shots(row.shot, config.shots, named) + before
    tail = behind if row.answers else behind.removesuffix(QUERY)
    return Prompt(instruction, tail, row.answers)


def _shots(shot: str | None, shots: Sequence[Sequence[str]], named: str) -> str:
    """The examples, one after the other. named: the prompt, in messages."""
    if shots and shot is None:
        raise InputError(
            f"{named} takes no examples; leave shots out, or write a prompt of your own with shot=<text of one example>"
        )
    if shot is not None and not shots:
        raise InputError(
            f"{named} needs an example: set shots=[[<document>,<query>]], from training data, or "
            "where there is no such key choose another prompt"
        )
    if bad := next((pair for pair in shots if len(pair) != 2), None):
        raise InputError(f"shots: {bad!r} is not a document and a query")
    if shot is not None and (DOCUMENT not in shot or QUERY not in shot):
        raise InputError(f"shot={shot!r} must hold {DOCUMENT} and {QUERY}")
    return "".join(_filled(shot or "", {DOCUMENT: document, QUERY: query}) for document, query in shots)


def _filled(text: str, values: dict[str, str]) -> str:
    """All slots are filled at once: an example's document may itself hold a slot, as code does."""
    return re.sub("|".join(map(re.escape, values)), lambda slot: values[slot[0]], text)
