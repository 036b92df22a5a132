"""Short texts as products of matrices; whole packs of all families are in tests/training/test_gradient_parity.py."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sgpt.decoder.attention import _by_products


@pytest.mark.parametrize("scale", [None, 1.0])
def test_products_are_scaled_dot_product_attention(scale):
    """Reference: torch's own in float64, each head of keys and values repeated; two texts of five tokens."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 5, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)]
    query, key, value = inputs
    key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    bias = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1).repeat(3, 1)
    given = _by_products(*inputs, bias, scale)
    weights = torch.randn_like(given)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    ours = torch.autograd.grad((given * weights).sum(), inputs)
    for one, other in zip([expected, *theirs], [given, *ours], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)  # float64 rounds by 1e-16
