"""Markers and truncation against ids written by hand, in a vocabulary small enough to read."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig, frames
from sgpt.text.tokens import marked
from tests.conftest import REAL_GPT2

# byte-level BPE (Ġ is the blank): `?]` merges into 9 and ` a` into 10, as GPT-2's vocabulary would merge them
VOCABULARY = {
    "</s>": 0,
    "[": 1,
    "]": 2,
    "{": 3,
    "}": 4,
    "?": 5,
    "a": 6,
    "b": 7,
    "Ġ": 8,
    "?]": 9,
    "Ġa": 10,
    "[CLS]": 11,
    "[SEP]": 12,
}
MERGES = [("?", "]"), ("Ġ", "a")]


def tokenizer(
    vocabulary: dict[str, int] = VOCABULARY, around: str | None = None, **tokens: str
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[pair for pair in MERGES if "".join(pair) in vocabulary]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if around:
        names = [(name, vocabulary[name]) for name in ("</s>", "[CLS]", "[SEP]") if name in around]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=names)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **tokens)


def ids(text: str, role: str, config: MarkersConfig, chosen: PreTrainedTokenizerFast) -> list[int]:
    return marked([text], chosen, frames(config, chosen)[role])[0]


@pytest.mark.parametrize(
    ("text", "query", "document"),
    [
        ("aaa", [1, 6, 6, 6, 2], [3, 6, 6, 6, 4]),  # limit - 1
        ("aaab", [1, 6, 6, 6, 7, 2], [3, 6, 6, 6, 7, 4]),  # at the limit
        ("aaabb", [1, 6, 6, 6, 7, 2], [3, 6, 6, 6, 7, 4]),  # limit + 1
        ("a" * 99, [1, 6, 6, 6, 6, 2], [3, 6, 6, 6, 6, 4]),
        ("", [1, 2], [3, 4]),
    ],
)
def test_truncation_cuts_the_content_and_never_a_marker(text, query, document):
    config = MarkersConfig(query_max_tokens=6, document_max_tokens=6)
    assert ids(text, "query", config, tokenizer()) == query
    assert ids(text, "document", config, tokenizer()) == document


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("a?", [1, 6, 5, 2]),  # pasted as text, `?]` would become 9
        ("a?]", [1, 6, 9, 2]),
        ("[[b]]", [1, 1, 1, 7, 2, 2, 2]),
        ("[", [1, 1, 2]),
        ("]", [1, 2, 2]),
        (" a ", [1, 10, 8, 2]),  # blanks stay
        ("{a}", [1, 3, 6, 4, 2]),
    ],
)
def test_a_text_with_brackets_keeps_its_own_tokens_beside_the_markers(text, query):
    assert ids(text, "query", MarkersConfig(), tokenizer()) == query
    assert ids(text, "document", MarkersConfig(), tokenizer()) == [3, *query[1:-1], 4]


def test_each_role_has_its_own_limit():
    config = MarkersConfig(query_max_tokens=4, document_max_tokens=5)
    assert ids("aaaaaa", "query", config, tokenizer()) == [1, 6, 6, 2]
    assert ids("aaaaaa", "document", config, tokenizer()) == [3, 6, 6, 6, 4]


@pytest.mark.parametrize(("original_limit", "content"), [(False, 298), (True, 297)])
def test_300_tokens_hold_298_of_content_and_the_originals_299_hold_297(original_limit, content):
    config = MarkersConfig(original_limit=original_limit)
    for length in (content - 1, content, content + 1):
        kept = min(length, content)
        assert ids("a" * length, "query", config, tokenizer()) == [1, *[6] * kept, 2]
        assert ids("a" * length, "document", config, tokenizer()) == [3, *[6] * kept, 4]


@pytest.mark.parametrize("original_limit", [False, True])
def test_without_markers_all_75_tokens_are_content(original_limit):
    config = MarkersConfig("none", 75, 75, original_limit)
    for length in (74, 75, 76):
        for role in ("query", "document"):
            assert ids("a" * length, role, config, tokenizer()) == [6] * min(length, 75)
    assert ids("", "query", config, tokenizer()) == []


def test_opts_start_token_stays_outside_of_the_markers():
    opt = tokenizer(around="</s> $A")
    config = MarkersConfig(query_max_tokens=5, document_max_tokens=5)
    assert ids("aab", "query", config, opt) == [0, 1, 6, 6, 2]
    assert ids("aab", "document", config, opt) == [0, 3, 6, 6, 4]
    assert ids("aab", "query", MarkersConfig("none", 4, 4), opt) == [0, 6, 6, 7]


def test_berts_special_tokens_stay_outside_of_the_markers():
    bert = tokenizer(around="[CLS] $A [SEP]")
    config = MarkersConfig(query_max_tokens=6, document_max_tokens=6)
    assert ids("aab", "query", config, bert) == [11, 1, 6, 6, 2, 12]
    assert ids("aab", "document", config, bert) == [11, 3, 6, 6, 4, 12]
    assert ids("aab", "query", MarkersConfig("none", 4, 4), bert) == [11, 6, 6, 12]


def test_the_ids_of_gpt2s_own_vocabulary():
    if not REAL_GPT2.is_dir():
        pytest.skip(f"no GPT-2 tokenizer at {REAL_GPT2}")
    gpt2 = PreTrainedTokenizerFast.from_pretrained(REAL_GPT2)
    config = MarkersConfig(query_max_tokens=5, document_max_tokens=5)
    # the first 94 ids are the ASCII bytes from `!`
    assert ids("a a a a a", "query", config, gpt2) == [58, 64, 257, 257, 60]
    assert ids("a a a a a", "document", config, gpt2) == [90, 64, 257, 257, 92]


@pytest.mark.parametrize("unknown", [{}, {"unk_token": "b"}])
def test_a_vocabulary_without_the_marker_is_refused(unknown):
    chosen = tokenizer(
        {key: value for key, value in VOCABULARY.items() if key not in ("[", "?]", "[CLS]", "[SEP]")}, **unknown
    )
    with pytest.raises(InputError, match=r"query marker '\[' is no token .* use markers=none"):
        frames(MarkersConfig(), chosen)
    assert frames(MarkersConfig("none"), chosen)["query"].before == ()


def test_limits_that_leave_no_room_are_refused():
    with pytest.raises(InputError, match=r"markers\.document_max_tokens=3 leaves no room"):
        MarkersConfig(document_max_tokens=3)
    with pytest.raises(InputError, match=r"markers\.query_max_tokens=4 leaves no room next to 4"):
        frames(MarkersConfig(query_max_tokens=4), tokenizer(around="[CLS] $A [SEP]"))
    with pytest.raises(InputError, match=r"markers\.name='braces' is unknown; choose brackets or none"):
        MarkersConfig("braces")
