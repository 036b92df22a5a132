"""Strings to token ids: of the text alone (`content_ids`), or with its markers around it (`marked`)."""

from collections.abc import Iterator, Sequence

from sgpt.text.markers import Frame

WHOLE_TEXTS = 256  # tokenised before they are cut
TokenLists = list[list[int]]  # token ids of one text each, ragged


def marked(texts: Sequence[str], tokenizer, frame: Frame) -> TokenLists:
    """Token ids with the frame's markers around them. The text is tokenised alone: nothing can merge with a marker."""
    return [frame.put_around(ids) for ids in content_ids(texts, tokenizer, frame.content_tokens)]


def content_ids(texts: Sequence[str], tokenizer, limit: int | None = None) -> Iterator[list[int]]:
    """Token ids of each text, unmarked and cut to `limit`.

    Uncut ids exist for WHOLE_TEXTS texts at a time, so memory is bounded however many texts there are.
    """
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    for start in range(0, len(texts), WHOLE_TEXTS):
        part = list(texts[start : start + WHOLE_TEXTS])
        for ids in tokenizer(part, **options)["input_ids"]:
            yield ids[:limit]


def is_whole_text(text: str) -> bool:
    """Whether tokenizers take it: half of a surrogate pair, which JSON's escapes can spell, is no character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
