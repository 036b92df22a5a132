"""Special tokens that are missing, double or inside of texts: what a base is fed without anybody having meant it."""

import re
from collections.abc import Iterator, Sequence

from sgpt.text.markers import Frame, Role
from sgpt.text.tokens import TokenLists

CHAT_MARKUP = re.compile(
    r"<\|im_(?:start|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>"
    r"|<\|(?:user|assistant|system|end)\|>|^(?:### )?(?:Human|Assistant|Instruction|Response): ?$",
    re.MULTILINE,
)
"""Of ChatML, Llama 2 and 3, Gemma, Phi, Zephyr and Alpaca."""
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>")  # of Llama, Mistral, Phi-3 and Gemma, which saw it before every text
WITHOUT_BEGINNING = ("bloom",)  # has a token <s> and was not pretrained with it


def describe_frame(frame: Frame, tokenizer) -> str:
    """What stands around a text, as in "<s> [ … ]"."""
    before, after = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (frame.before, frame.after))
    return " ".join((*before, "…", *after))


def token_warnings(
    texts: Sequence[str], rows: TokenLists, frames: dict[Role, Frame], tokenizer, config: object
) -> Iterator[str]:
    """A sentence for each thing that looks wrong in a sample of texts.

    rows: their token ids with what stands around them. config: of the base, for the tokens that it was pretrained with.
    """
    yield from _padding_warnings(rows, tokenizer)
    yield from _beginning_warnings(texts, frames["query"], tokenizer, config)
    marked = [match[0] for text in texts if (match := CHAT_MARKUP.search(text))]
    if marked:
        yield (
            f"{_of(len(marked), texts)} texts hold the markup of a chat template, for example {marked[0]!r}; "
            "remove it: the texts that will be searched do not have it"
        )


def _padding_warnings(rows: TokenLists, tokenizer) -> Iterator[str]:
    """The pad token is often the end token, which matters only where it stands inside of a text."""
    padded = sum(tokenizer.pad_token_id in row for row in rows)
    if padded:
        shared = ", which is the end token too," if tokenizer.pad_token_id == tokenizer.eos_token_id else ""
        yield (
            f"the pad token {tokenizer.pad_token}{shared} stands inside {_of(padded, rows)} texts: libraries that tell "
            "padding by its id leave it out of the embedding, training does not; give the tokenizer another pad token, "
            "or take it out of the texts"
        )


def _beginning_warnings(texts: Sequence[str], frame: Frame, tokenizer, config: object) -> Iterator[str]:
    token, number = tokenizer.bos_token, tokenizer.bos_token_id
    if number is None:
        return
    stated = tokenizer.init_kwargs.get("add_bos_token", False)
    pretrained = token in BEGINNINGS and getattr(config, "model_type", "") not in WITHOUT_BEGINNING
    if number not in frame.before and (stated or pretrained):
        yield (
            f"the tokenizer puts no {token} before a text, and bases with this token were pretrained with it; "
            "if this one was, take the tokenizer that adds it"
        )
    of_base = getattr(config, "bos_token_id", None)
    if number in frame.before and isinstance(of_base, int) and of_base != number:
        yield (
            f"the tokenizer puts {token} (id {number}) before every text, and config.json of the base names id "
            f"{of_base} for the beginning; take the tokenizer that belongs to the base"
        )
    doubled = sum(text.startswith(token) for text in texts)
    if number in frame.before and doubled:
        yield (
            f"{_of(doubled, texts)} texts begin with {token}, and the tokenizer puts another one before them; "
            "remove it from the texts"
        )


def _of(part: int, whole: Sequence) -> str:
    return f"{part} of {len(whole)} sampled"
