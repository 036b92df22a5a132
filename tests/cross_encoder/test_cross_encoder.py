"""SGPT-CE against a short loop over transformers' own model, and its prompts against the original's, written out."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgpt.cross_encoder.cross_encoder import CrossEncoder, ScoreConfig
from sgpt.cross_encoder.prompts import PROMPTS, PromptConfig, build_prompt
from sgpt.runtime.errors import InputError
from tests.conftest import FAMILIES, POSITIONS

DECODERS = [family for family in FAMILIES if family != "bert"]
QUERIES = ["what is it?", "[[1]] parse", "a longer question about the arguments of a parser, with every part of it"]
LONG = "The add_argument method attaches individual argument specifications. " * 12
DOCUMENTS = ["", "ArgumentParser", '"quoted", (and) bracketed}', LONG, " blanks around "]
G = 'Documents are searched to find matches with the same content.\nThe document "{}" is a good search result for "'


@torch.inference_mode()
def as_the_original(folder, query: str, document: str, prompt: str = G, max_tokens: int = POSITIONS) -> float:
    """One pair at a time, the whole vocabulary at every position (crossencoder/beir/sgptce.py); `{}` is the document.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start = tokenizer("")["input_ids"]  # the models of the original have no start token
    context, target = start + tokens(prompt.replace("{}", document)), tokens(query)
    instruction = len(start) + len(tokens(prompt[: prompt.index("{")]))
    ids = context[:instruction] + (context[instruction:] + target)[-(max_tokens + 1 - instruction) :]
    logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(logits[place - len(target), token].item() for place, token in enumerate(target))


@pytest.mark.parametrize("family", DECODERS)
def test_scores_are_the_original_s(language_model, family):
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    random.Random(0).shuffle(pairs)
    reranker = CrossEncoder.from_pretrained(language_model(family), tokens_per_pack=256)
    reranker.max_tokens = POSITIONS  # BLOOM has no table, and is cut here like the others
    found = reranker.score(*zip(*pairs, strict=True))
    expected = [as_the_original(language_model(family), query, document) for query, document in pairs]
    assert found.tolist() == pytest.approx(expected, abs=2e-4)


def test_the_beginning_of_a_long_document_is_cut_and_nothing_else(language_model):
    reranker = CrossEncoder.from_pretrained(language_model("gpt2"))
    (text,) = reranker.scored_texts([QUERIES[0]], [DOCUMENTS[3]])
    read = reranker.tokenizer.decode(text.ids)
    assert len(text.read) == POSITIONS
    assert read.startswith(G[: G.index("{")])
    assert read.endswith(f'{DOCUMENTS[3][-30:]}" is a good search result for "{QUERIES[0]}')


def test_a_query_with_its_prompt_fills_the_model_to_the_last_position(language_model):
    """The last query token is predicted and not read, so a text of one more than the positions fits."""
    reranker = CrossEncoder.from_pretrained(language_model("gpt2"))
    room = POSITIONS + 1 - reranker.instruction_tokens - len(reranker.tokenizer(reranker.prompt.tail)["input_ids"])
    fits = reranker.tokenizer.decode([reranker.tokenizer(" a")["input_ids"][-1]] * room)
    assert np.isfinite(reranker.score([fits], ["document"])).all()
    with pytest.raises(
        InputError, match=r"query ' a a.*of the model's 128 positions the instruction leaves \d+; shorten"
    ):
        reranker.score([fits + " a"], ["document"])


@pytest.mark.parametrize("name", sorted(PROMPTS.keys() - {"L", "M"}))  # those ask for an answer
def test_every_prompt_of_the_original_scores_as_its_loop(language_model, name):
    shots = [["an example document", "an example query"]] if PROMPTS[name].shot else []
    reranker = CrossEncoder.from_pretrained(language_model("gpt_neo"), PromptConfig(name, shots))
    reranker.max_tokens = 10_000  # the long ones do not fit the tiny model, and are not run
    query, document = "short", "doc"
    template = build_prompt(PromptConfig(name, shots))
    (text,) = reranker.scored_texts([query], [document])
    assert reranker.tokenizer.decode(text.ids) == template.instruction + document + template.tail + query
    if len(text.ids) <= POSITIONS:
        assert reranker.score([query], [document]).tolist() == pytest.approx(
            [
                as_the_original(
                    language_model("gpt_neo"), query, document, template.instruction + "{}" + template.tail, 10_000
                )
            ],
            abs=1e-4,
        )


def test_the_prompts_of_the_paper_read_as_they_are_printed():
    written = {
        "A": "DOC QUERY",
        "C": "Document:\nDOC\n\nQuery:\nQUERY",
        "G": "Documents are searched to find matches with the same content.\n"
        'The document "DOC" is a good search result for "QUERY',
        "K": "Document:\nd\nQuery:\nq\nDocument:\nDOC\nQuery:\nQUERY",
        "quoraD": "Question Body: DOC Question Title:QUERY",
    }
    for name, text in written.items():
        prompt = build_prompt(PromptConfig(name, [["d", "q"]] if PROMPTS[name].shot else []))
        assert prompt.before_query("DOC", "QUERY") + "QUERY" == text
    bot = build_prompt(PromptConfig("L"))
    assert bot.before_query("DOC", "QUERY").endswith("\n###\nDocument: DOC\nQuery: QUERY\nBot:")
    assert bot.answers == (" Yes", " No")


def test_yes_and_no_share_out_the_probability(language_model):
    """Only the first tokens of the answers count; that of the first answer is the score."""
    folder = language_model("gpt2")
    own = PromptConfig("D: {document} Q: {query} A:", answers=["yes", "no"])
    found = CrossEncoder.from_pretrained(folder, own).score(QUERIES, DOCUMENTS[:3])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    yes, no = (tokenizer(answer)["input_ids"][0] for answer in ("yes", "no"))
    for score, query, document in zip(found, QUERIES, DOCUMENTS, strict=False):
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer(f"D: {document} Q: {query} A:")["input_ids"]])).logits[0, -1]
        assert score == pytest.approx(logits[[yes, no]].log_softmax(0)[0].item(), abs=1e-4)


def test_answers_that_begin_alike_are_told_apart_by_their_first_difference(language_model):
    """As where " Yes" and " No" are a blank and a word each: the blank is read, and the word is scored."""
    folder = language_model("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yes, no = "parser parse", "parser value"
    shared = tokenizer("parser ")["input_ids"][:1]
    assert tokenizer(yes)["input_ids"][:1] == tokenizer(no)["input_ids"][:1] == shared
    assert tokenizer(yes)["input_ids"][1] != tokenizer(no)["input_ids"][1]
    found = CrossEncoder.from_pretrained(folder, PromptConfig("{document} {query}", answers=[yes, no])).score(
        ["query"], ["document"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer("document query")["input_ids"] + shared])).logits[0, -1]
    choices = [tokenizer(answer)["input_ids"][len(shared)] for answer in (yes, no)]
    assert found[0] == pytest.approx(logits[choices].log_softmax(0)[0].item(), abs=1e-4)


def test_mean_and_prior(language_model):
    folder, queries, documents = language_model("gpt_neo"), QUERIES, DOCUMENTS[1:4]
    plain = CrossEncoder.from_pretrained(folder).score(queries, documents)
    empty = CrossEncoder.from_pretrained(folder).score(queries, [""] * 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = np.array([len(tokenizer(query)["input_ids"]) for query in queries])
    both = CrossEncoder.from_pretrained(folder, scoring=ScoreConfig(mean=True, prior=True)).score(queries, documents)
    assert both == pytest.approx((plain - empty) / lengths, abs=1e-5)


def test_an_empty_context_is_the_end_token(language_model):
    """As in the original: with nothing before the query, the model reads its end-of-text token."""
    folder = language_model("gpt2")
    found = CrossEncoder.from_pretrained(folder, PromptConfig("{document}")).score(["what"], [""])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.eos_token_id, *tokenizer("what")["input_ids"]]
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    assert found[0] == pytest.approx(sum(logits[place, token].item() for place, token in enumerate(ids[1:])), abs=1e-4)


def test_bfloat16_scores_are_close(language_model):
    pairs = QUERIES, DOCUMENTS[:3]
    exact = CrossEncoder.from_pretrained(language_model("gpt2")).score(*pairs)
    half = CrossEncoder.from_pretrained(language_model("gpt2"), dtype="bfloat16").score(*pairs)
    assert half == pytest.approx(exact, rel=0.02)


def test_an_example_that_holds_a_slot_is_left_as_it_is():
    shots = [["print(f'{query}')", "format {document}"], ["d", "q"]]
    prompt = build_prompt(PromptConfig("K", shots))
    assert (
        prompt.instruction
        == "Document:\nprint(f'{query}')\nQuery:\nformat {document}\nDocument:\nd\nQuery:\nq\nDocument:\n"
    )


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (PromptConfig("Z"), r"prompt='Z' is no name of A, B,.* holds \{document\} 0 times"),
        (PromptConfig("{document} {document}"), r"holds \{document\} 2 times; it must hold it once"),
        (PromptConfig("Q {query} D {document}"), r"holds \{query\} before its end"),
        (PromptConfig("{document}", answers=[" Yes", " No"]), r"must hold \{query\} behind \{document\}"),
        (PromptConfig("J"), r"needs an example: set shots="),
        (PromptConfig("G", [["d", "q"]]), r"takes no examples"),
        (PromptConfig("J", [["d"]]), r"shots: \['d'\] is not a document and a query"),
        (PromptConfig("G", answers=["a", "b"]), r"has its own start, shot and answers"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt, told):
    with pytest.raises(InputError, match=told):
        build_prompt(prompt)


def test_bad_input_is_refused(language_model, tiny_base):
    reranker = CrossEncoder.from_pretrained(language_model("gpt2"))
    with pytest.raises(InputError, match=r"query 1 is empty \(' '\).*leave it out"):
        reranker.score(["a", " "], ["b", "c"])
    with pytest.raises(InputError, match=r"as many documents; got 1 and 2"):
        reranker.score(["a"], ["b", "c"])
    with pytest.raises(InputError, match=r"bert predicts no next token; re-rank with a decoder"):
        CrossEncoder.from_pretrained(tiny_base("bert"))
    match = r"lm_head.*is missing, so it is no whole GPTNeoXForCausalLM.*; give .* or the base it was made from"
    with pytest.raises(InputError, match=match):
        CrossEncoder.from_pretrained(tiny_base("gpt_neox"))  # a trunk alone, whose head would be random
    with pytest.raises(InputError, match=r"cannot be told apart by one token"):
        CrossEncoder.from_pretrained(
            language_model("gpt2"), PromptConfig("{document} {query}", answers=[" Yes", " Yes"])
        )
    assert reranker.score([], []).shape == (0,)
