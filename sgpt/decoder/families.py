"""The facts that differ by family of models, in one table."""

import inspect

from torch import nn

PACKED_FAMILIES = {"gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "llama", "qwen2", "qwen3", "bert"}  # proved by tests/test_gradient_parity.py
# family -> its list of blocks; in a block, the norm that must see all tokens, and the modules that are given selected ones
BLOCKS = {
    "gpt2": ("h", "ln_1", ("attn.c_proj",)),
    "gpt_neo": ("h", "ln_1", ("attn.attention.out_proj",)),
    "gptj": ("h", "ln_1", ("attn.out_proj", "mlp")),  # its MLP reads the same norm
    "gpt_neox": ("layers", "input_layernorm", ("attention.dense",)),
    "opt": ("decoder.layers", "self_attn_layer_norm", ("self_attn.out_proj",)),
    "bloom": ("h", "input_layernorm", ("self_attention.dense",)),
    "llama": ("layers", "input_layernorm", ("self_attn.o_proj",)),
    "qwen2": ("layers", "input_layernorm", ("self_attn.o_proj",)),
    "qwen3": ("layers", "input_layernorm", ("self_attn.o_proj",)),
}
LENGTH_WITHOUT_TABLE = 2048  # BLOOM's training length: ALiBi has no limit of its own
# Families whose tokens look both ways; every other one is taken to be causal.
BIDIRECTIONAL = {"bert", "roberta", "distilbert", "mpnet", "xlm-roberta", "electra", "albert", "camembert", "modernbert"}
POSITION_TABLES = ("max_position_embeddings", "n_positions")
RELATIVE_POSITIONS = {"bloom", "t5"}  # no table that a text could outgrow


def position_limit(trunk: nn.Module) -> int | None:
    """Number of positions the trunk knows; None where any length works."""
    config = trunk.config
    if config.model_type in RELATIVE_POSITIONS:
        return None
    limit = next((value for name in POSITION_TABLES if (value := getattr(config, name, None))), None)
    return limit - position_offset(trunk) if isinstance(limit, int) and limit > 0 else None


def embedding_size(trunk: nn.Module) -> int:
    """D. OPT-350m turns its hidden states into narrower ones at the end."""
    return getattr(trunk.config, "word_embed_proj_dim", None) or trunk.config.hidden_size


def takes_position_ids(trunk: nn.Module) -> bool:
    """Whether positions can be handed in, counted from 0.

    BLOOM's ALiBi counts the mask itself; RoBERTa's start behind the padding id.
    """
    base = trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk
    if getattr(base, "counts_positions_itself", False):  # found by `check_family`
        return False
    return "position_ids" in inspect.signature(base.forward).parameters and not position_offset(base)


def position_offset(trunk: nn.Module) -> int:
    """Rows of the position table that no text uses: in RoBERTa and its kin the first position follows the padding id."""
    for name, module in trunk.named_modules():
        padding_id = getattr(module, "padding_idx", None)  # I-BERT's table is no nn.Embedding
        if name.endswith("position_embeddings") and isinstance(padding_id, int):
            return padding_id + 1
    return 0
