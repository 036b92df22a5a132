"""Scaled-dot-product attention for the two families that transformers still runs eagerly: GPT-Neo and GPT-J.

GPT-2, GPT-NeoX, OPT, BLOOM, Llama, Qwen … have an attention interface and choose SDPA themselves. GPT-Neo and GPT-J, the
bases of SGPT, compute the [rows, heads, T, T] score matrix in float32 and keep it for the backward pass. `use_sdpa`
replaces only their `_attn` method; projections, parameters and checkpoints stay as they are.

Kept exactly: GPT-Neo's local layers see the last `window_size` positions, and its scores are not divided by sqrt(head size).
"""

from types import MethodType

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention


def use_sdpa(trunk: nn.Module) -> nn.Module:
    """Switch every GPT-Neo or GPT-J attention of `trunk` to SDPA, in place, and return it; other families are untouched."""
    for module in trunk.modules():
        if isinstance(module, GPTNeoSelfAttention):
            module._attn = MethodType(_gpt_neo_attention, module)
            module.config._attn_implementation = "sdpa"  # the trunk now builds boolean masks, or none when none is needed
        elif isinstance(module, GPTJAttention):
            module._attn = MethodType(_gpt_j_attention, module)
            module.config._attn_implementation = "sdpa"
    return trunk


def _gpt_neo_attention(self: GPTNeoSelfAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """query, key, value [rows, heads, T, head size]; attention_mask [rows, 1, T, T] boolean, True where it may look, or None."""
    queries, keys = query.shape[-2], key.shape[-2]
    window = self.config.window_size if self.attention_type == "local" else keys
    if window < keys:  # within the window a local layer is an ordinary causal one
        seen = self.bias[:, :, keys - queries : keys, :keys]
        attention_mask = seen if attention_mask is None else attention_mask & seen
    return _attend(query, key, value, attention_mask, scale=1.0, dropout=self.attn_dropout), None


def _gpt_j_attention(self: GPTJAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """As above; rotary embedding was applied by the caller, which may hand on float32 queries and keys."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _attend(query, key, value, attention_mask, scale=None, dropout=self.attn_dropout), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, dropout: nn.Dropout) -> Tensor:
    causal = mask is None and query.shape[-2] > 1
    probability = dropout.p if dropout.training else 0.0
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=probability, is_causal=causal, scale=scale)
