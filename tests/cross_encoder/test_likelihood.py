"""log p(end | beginning) against transformers' own model, one text at a time, never prepared by us."""

import random
from functools import cache

import pytest
import torch
import transformers

from sgpt.cross_encoder import likelihood
from sgpt.cross_encoder.likelihood import ScoredText, log_probabilities
from sgpt.decoder.attention import prepare
from tests.conftest import FAMILIES

DECODERS = [family for family in FAMILIES if family != "bert"]
VOCABULARY = 97


@cache
def models(family: str, dtype: torch.dtype = torch.float32, **changed):
    """transformers' model as it comes, with eager attention, and the same weights with ours."""
    name, shape = FAMILIES[family]
    made = []
    for _ in range(2):
        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **{**shape, **changed}
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.config.use_cache = False
        made.append(model.to(dtype))
    prepare(made[1].base_model)
    return made


@torch.inference_mode()
def reference(model, text: ScoredText, choices=()) -> float:
    logits = model(input_ids=torch.tensor([text.ids[:-1]])).logits[0, -text.targets :].double()
    if choices:
        others = torch.ones(VOCABULARY, dtype=torch.bool)
        others[list(choices)] = False
        logits = logits.masked_fill(others, float("-inf"))
    return sum(row.log_softmax(0)[target].item() for row, target in zip(logits, text.ids[-text.targets :], strict=True))


def texts(groups: int = 5, queries: int = 4, prefix: int = 9, seed: int = 0) -> list[ScoredText]:
    """Documents of one token and up, after one instruction; the same queries for each, the shortest of one token."""
    drawn = random.Random(seed)
    ids = lambda count: tuple(drawn.randrange(1, VOCABULARY) for _ in range(count))  # noqa: E731
    start, asked = ids(prefix), [ids(1 + 5 * number) for number in range(queries)]
    return [
        ScoredText(start + document + query, len(query), group)
        for group in range(groups)
        for document in [ids(1 + 17 * group)]
        for query in asked
    ]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
def test_scores_are_those_of_one_text_at_a_time(family, share):
    plain, ours = models(family)
    given = texts()
    found = log_probabilities(ours, given, tokens_per_pack=128, share=share)
    assert found.tolist() == pytest.approx([reference(plain, text) for text in given], abs=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_in_float64_they_are_equal_but_for_rounding(family):
    plain, ours = models(family, torch.float64)
    given = texts(seed=1)
    found = log_probabilities(ours, given, tokens_per_pack=128)
    # the softmax is float32 by design
    assert found.tolist() == pytest.approx([reference(plain, text) for text in given], rel=2e-6)


@pytest.mark.parametrize("tokens_per_pack", [1, 64, 10_000])
@pytest.mark.parametrize("share_from", [1, 10**9])
def test_no_budget_and_no_threshold_changes_a_score(tokens_per_pack, share_from, monkeypatch):
    monkeypatch.setattr(likelihood, "MIN_TOKENS_SAVED", share_from)
    monkeypatch.setattr(likelihood, "BRANCH_TOKENS", 12)
    plain, ours = models("gpt_neo")
    given = texts()
    random.Random(0).shuffle(given)
    found = log_probabilities(ours, given, tokens_per_pack=tokens_per_pack)
    assert found.tolist() == pytest.approx([reference(plain, text) for text in given], abs=1e-4)


def test_every_token_is_computed_once(monkeypatch):
    """10 queries over 3 documents: the instruction once, each document once, each query's own tokens once."""
    computed = []
    real = likelihood.forward_with_prefix

    def counting(trunk, pack, *rest, **options):
        computed.append(len(pack))
        return real(trunk, pack, *rest, **options)

    monkeypatch.setattr(likelihood, "forward_with_prefix", counting)
    _, ours = models("gpt_neo")
    drawn = random.Random(3)
    ids = lambda count, first: (first, *(drawn.randrange(1, 50) for _ in range(count - 1)))  # noqa: E731
    start, documents, queries = (
        ids(9, 1),
        [ids(30, first) for first in (2, 3, 4)],
        [ids(6, 50 + first) for first in range(10)],
    )
    given = [
        ScoredText(start + document + query, 6, group)
        for group, document in enumerate(documents)
        for query in queries
    ]
    log_probabilities(ours, given * 2, tokens_per_pack=100)
    last = 1  # of the document: its hidden state predicts the query's first token, so each query computes it
    assert sum(computed) == 9 + 3 * (30 - last) + 3 * 10 * (last + 6 - 1)


def test_one_document_alone_shares_its_beginning():
    plain, ours = models("gpt2")
    given = texts(groups=4)[-4:]
    assert log_probabilities(ours, given, tokens_per_pack=128).tolist() == pytest.approx(
        [reference(plain, text) for text in given], abs=1e-4
    )


@pytest.mark.parametrize("family", ["gpt_neo", "bloom"])
def test_a_single_text_of_two_tokens(family):
    plain, ours = models(family)
    text = ScoredText((5, 6), 1)
    assert log_probabilities(ours, [text], tokens_per_pack=8).tolist() == pytest.approx(
        [reference(plain, text)], abs=1e-5
    )


def test_choices_share_out_the_probability():
    plain, ours = models("gpt2")
    given = [
        ScoredText((*text.ids[: len(text.ids) - text.targets], choice), 1, text.group)
        for text in texts()
        for choice in (7, 11)
    ]
    found = log_probabilities(ours, given, tokens_per_pack=128, choices=(7, 11))
    assert found.tolist() == pytest.approx([reference(plain, text, (7, 11)) for text in given], abs=1e-4)
    assert found.exp().view(-1, 2).sum(1).tolist() == pytest.approx([1.0] * len(texts()))


def test_a_family_that_takes_no_packs_is_padded():
    config = transformers.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config).eval()
    given = texts()
    expected = [reference(model, text) for text in given]
    prepare(model.base_model)
    assert log_probabilities(model, given, tokens_per_pack=128).tolist() == pytest.approx(expected, abs=1e-4)


def test_opt_with_the_norm_behind_attention():
    """OPT-350m's order of norms: the last block cannot be cut there."""
    plain, ours = models("opt", do_layer_norm_before=False)
    given = texts()
    assert log_probabilities(ours, given, tokens_per_pack=128).tolist() == pytest.approx(
        [reference(plain, text) for text in given], abs=1e-4
    )
