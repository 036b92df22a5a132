"""The markers as sentence-transformers 6 can read them: a chat template and one pre-tokenizer in front of the
tokenizer's own.

The template writes opening marker, seam, text, seam, closing marker; the pre-tokenizer removes both seams and so cuts
there: markers become tokens of their own, and the text is tokenised exactly as if it stood alone. Without the cut `?` +
`]` merges. The seam is U+FDD0, a Unicode noncharacter, and it cuts only next to a marker at an end of the text: a text
with brackets, end tokens or even U+FDD0 in it keeps its ids. (A cut at the first and last bracket, without a seam, is
wrong for a bracket next to an end token's text.)
"""

import copy
import json
import re

from tokenizers import Regex, pre_tokenizers

from sgpt.runtime.errors import InputError
from sgpt.text.markers import MARKERS, ROLES, special_tokens

SEAM = "\ufdd0"
SEAM_PATTERN = r"\x{FDD0}"  # tokenizer.json stays ASCII, and the cut can be recognised


def wrap(tokenizer, markers: str):
    """A copy whose chat template, given `task`, puts the markers around the text. `markers` is a row of MARKERS, not
    "none".

    Without a task (plain `encode`) a text gets the tokenizer's own special tokens only.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which an export with markers needs; use markers=none"
        )
    wrapped = copy.deepcopy(tokenizer)
    parts = [pre_tokenizers.Split(Regex(_cut(markers)), "removed"), wrapped.backend_tokenizer.pre_tokenizer]
    wrapped.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([part for part in parts if part is not None])
    wrapped.chat_template = _chat_template(tokenizer, markers)
    return wrapped


def unwrap(tokenizer):
    """The tokenizer without our chat template and cut, in place; any other tokenizer is left as it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.pre_tokenizer is not None:
        parts = json.loads(backend.pre_tokenizer.__getstate__()).get("pretokenizers", [])
        if parts and SEAM_PATTERN in str(parts[0].get("pattern")):
            # a sequence of its own, as Llama 3's and Qwen's tokenizers have, was taken apart when it was put in another
            own = [backend.pre_tokenizer[number] for number in range(1, len(parts))]
            backend.pre_tokenizer = pre_tokenizers.Sequence(own) if len(own) > 1 else next(iter(own), None)
    if json.dumps(SEAM)[1:-1] in str(tokenizer.chat_template):  # as `_literal` writes it
        tokenizer.chat_template = None
    return tokenizer


def _cut(markers: str) -> str:
    """Regular expression (Oniguruma) of the two seams."""
    opening, closing = ("|".join(re.escape(MARKERS[markers][role][side]) for role in ROLES) for side in (0, 1))
    return rf"(?<=\A(?:{opening})){SEAM_PATTERN}|{SEAM_PATTERN}(?=(?:{closing})\z)"


def _chat_template(tokenizer, markers: str) -> str:
    """Special tokens are written out, as sentence-transformers adds none to a rendered template."""
    before, after = ("".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in special_tokens(tokenizer))
    text = "{{ texts[-1]['content'] }}"
    branches = ""
    for role, branch in zip(ROLES, ("if", "elif"), strict=True):
        opening, closing = MARKERS[markers][role]
        left, right = _literal(before + opening + SEAM), _literal(SEAM + closing + after)
        branches += f"{{%- {branch} task == '{role}' %}}{left}{text}{right}\n"
    return (
        "{%- set texts = messages | rejectattr('role', 'equalto', 'system') | list %}\n"
        f"{branches}{{%- else %}}{_literal(before)}{text}{_literal(after)}\n{{%- endif %}}"
    )


def _literal(text: str) -> str:
    """As Jinja writes it; JSON keeps the template in ASCII."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""
