"""Packs hold every row once, whole, and within the budget; and a thread that is one batch ahead changes nothing."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgpt.data.feed.prefetch import prefetch
from sgpt.decoder.packing import distinct, fitting_tokens, packs
from tests.conftest import random_trunk

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=40)


@given(ROWS, st.integers(1, 60))
def test_every_row_with_a_token_is_whole_in_exactly_one_pack(rows, budget):
    made = list(packs(rows, budget))
    assert sorted(row for pack in made for row in pack.rows) == [row for row in range(len(rows)) if rows[row]]
    for pack in made:
        assert len(pack) <= budget or len(pack.rows) == 1
        members = [row for block in pack.split(pack.input_ids) for row in block]
        assert [row.tolist() for row in members] == [rows[row] for row in pack.rows]
        assert [position.tolist() for block in pack.split(pack.position_ids) for position in block] == [
            list(range(len(row))) for row in members
        ]


@given(ROWS, st.integers(1, 60))
def test_for_padding_the_positions_are_counted(rows, budget):
    made = list(packs(rows, budget, padded=True))
    assert sorted(row for pack in made for row in pack.rows) == [row for row in range(len(rows)) if rows[row]]
    for pack in made:
        input_ids, attention_mask = pack.padded(77)
        assert input_ids.numel() == attention_mask.numel() == pack.padded_tokens
        assert pack.padded_tokens <= budget or len(pack.rows) == 1
        assert [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)] == [
            rows[row] for row in pack.rows
        ]
        assert (input_ids[attention_mask == 0] == 77).all()


def test_padding_keeps_what_stands_at_a_token_and_its_gradient():
    """Reference: torch's pad_sequence."""
    (pack,) = packs([[1], [2, 3, 4], [5, 6]], 10)
    hidden = torch.randn(len(pack), 5, dtype=torch.float64, requires_grad=True)
    padded, mask = pack.pad(hidden)
    expected = torch.nn.utils.rnn.pad_sequence(list(hidden.split([3, 2, 1])), batch_first=True)
    weights = torch.randn_like(expected)
    assert torch.equal(padded, expected)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    ours, theirs = (torch.autograd.grad((rows * weights).sum(), hidden)[0] for rows in (padded, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("width", "blocks", "gigabytes", "tokens"),
    [(576, 30, 150, 49_603), (768, 12, 150, 65_536), (4096, 28, 150, 4_967), (4096, 28, 24, 2_048)],
)
def test_a_gpu_gets_packs_that_keep_it_busy_and_fit_its_memory(width, blocks, gigabytes, tokens, monkeypatch):
    """The first is SmolLM2 on an H200, which takes 70 · 576 bytes a token and block: 60 GB are that many tokens."""
    trunk = random_trunk("llama", 20).to(torch.bfloat16)
    trunk.config.hidden_size, trunk.config.num_hidden_layers = width, blocks
    gpu = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert fitting_tokens(trunk, torch.device("cuda")) == tokens
    assert fitting_tokens(trunk, torch.device("cpu")) == 2_048


def test_equal_lengths_are_one_block():
    (pack,) = packs([[1], [2, 3], [4], [5, 6]], 10)
    assert pack.rows == [1, 3, 0, 2]
    assert pack.blocks == ((2, 2), (2, 1))
    assert pack.input_ids.tolist() == [2, 3, 5, 6, 1, 4]
    assert pack.position_ids.tolist() == [0, 1, 0, 1, 0, 0]


def test_equal_rows_are_computed_once():
    assert distinct([[1, 2], [3], [1, 2], [3, 1]]) == ([[1, 2], [3], [3, 1]], [0, 1, 0, 2])


def test_batches_come_in_order_and_an_error_where_it_belongs():
    assert list(prefetch(lambda number: number * 2, range(5))) == [0, 2, 4, 6, 8]
    assert list(prefetch(lambda number: number, [])) == []
    coming = prefetch(lambda number: 1 / number, [1, 0])
    assert next(coming) == 1
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_splitting_gives_views():
    (pack,) = packs([[1, 2], [3, 4], [5]], 10)
    hidden = torch.zeros(len(pack), 3)
    pack.split(hidden)[0][1, 0] = 1
    assert hidden[2].tolist() == [1, 1, 1]
