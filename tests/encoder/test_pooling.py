"""Poolings against hand-worked numbers, float64 and sentence-transformers' own `Pooling`."""

import pytest
import torch
from sentence_transformers.models import Pooling

from sgpt.encoder.pooling import POOLINGS, PoolingConfig
from sgpt.runtime.errors import InputError

# three tokens of two numbers; worked by hand below
TOKENS = [[1.0, 2.0], [3.0, -4.0], [5.0, 9.0]]
BY_HAND = {
    "weighted_mean": [(1 * 1 + 2 * 3 + 3 * 5) / 6, (1 * 2 + 2 * -4 + 3 * 9) / 6],  # 22/6, 21/6
    "mean": [3.0, 7 / 3],
    "last_token": [5.0, 9.0],
    "cls": [1.0, 2.0],
    "max": [5.0, 9.0],
}
IN_SENTENCE_TRANSFORMERS = {
    "weighted_mean": "weightedmean",
    "mean": "mean",
    "last_token": "lasttoken",
    "cls": "cls",
    "max": "max",
}


def padded(
    rows: list[list[list[float]]], side: str, width: int, rubbish: float = 77.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings with rubbish on the padding, and the mask."""
    hidden, mask = (
        torch.full((len(rows), width, len(rows[0][0])), rubbish),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        hidden[number, place], mask[number, place] = torch.tensor(row), 1
    return hidden, mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_gives_the_hand_worked_numbers_on_both_padding_sides(name, side):
    one = [-7.0, -8.0]  # a row of one token is that token in every pooling
    hidden, mask = padded([TOKENS, [one]], side, width=5)
    # 1e-6: a float32 rounding or two of numbers below 10
    torch.testing.assert_close(POOLINGS[name](hidden, mask), torch.tensor([BY_HAND[name], one]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_equals_sentence_transformers(name):
    torch.manual_seed(0)
    lengths = [1, 7, 12, 3]
    hidden, mask = padded([torch.randn(length, 8).tolist() for length in lengths], "right", width=12)
    theirs = Pooling(8, pooling_mode=IN_SENTENCE_TRANSFORMERS[name])(
        {"token_embeddings": hidden, "attention_mask": mask}
    )["sentence_embedding"]
    # the order of twelve float32 additions
    torch.testing.assert_close(POOLINGS[name](hidden, mask), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_a_row_without_tokens_gives_zeros_and_no_nan(name):
    hidden, mask = padded([TOKENS, TOKENS], "right", width=4)
    mask[1] = 0
    pooled = POOLINGS[name](hidden, mask)
    assert pooled[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(pooled[0], torch.tensor(BY_HAND[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POOLINGS)
def test_half_types_are_pooled_in_float32_past_position_256(name, dtype):
    """In bfloat16 the positions above 256 would be rounded, and the sum would stop growing."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 700, 4).add(1).to(dtype)
    mask = torch.ones(2, 700, dtype=torch.long)
    mask[1, 500:] = 0
    pooled = POOLINGS[name](hidden, mask)
    exact = POOLINGS[name](hidden.double(), mask)
    assert pooled.dtype == dtype
    # the result is rounded once to the type: half a unit in the last place, and 1e-5 for the float32 sum
    torch.testing.assert_close(pooled.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POOLINGS)
def test_autocast_does_not_take_the_pooling_out_of_float32(name):
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 700, 4).add(1), torch.ones(2, 700, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = POOLINGS[name](hidden, mask)
    torch.testing.assert_close(pooled, POOLINGS[name](hidden, mask), rtol=0, atol=0)


def test_weighted_mean_in_float64_against_the_formula():
    torch.manual_seed(0)
    hidden, mask = torch.randn(1, 9, 3, dtype=torch.float64), torch.ones(1, 9, dtype=torch.long)
    expected = sum((i + 1) * hidden[0, i] for i in range(9)) / (9 * 10 / 2)
    # weights are float32
    torch.testing.assert_close(POOLINGS["weighted_mean"](hidden, mask)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_gradient_reaches_real_tokens_only_and_inputs_are_not_changed(name):
    hidden, mask = padded([TOKENS, TOKENS[:2]], "left", width=4)
    hidden.requires_grad_()
    before, mask_before = hidden.detach().clone(), mask.clone()
    POOLINGS[name](hidden, mask).sum().backward()
    assert torch.equal(hidden.detach(), before)
    assert torch.equal(mask, mask_before)
    assert hidden.grad[mask == 0].eq(0).all()
    # every embedding is an average of its row, so what the row's tokens get adds up to one
    torch.testing.assert_close(hidden.grad.sum(1), torch.ones(2, 2), rtol=0, atol=1e-6)


def test_an_unknown_pooling_is_refused_with_the_others_named():
    with pytest.raises(
        InputError, match=r"pooling\.name='median' is unknown; choose weighted_mean, mean, last_token, cls or max"
    ):
        PoolingConfig("median")
