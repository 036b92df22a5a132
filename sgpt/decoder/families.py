"""The facts that differ by family of models, in one table.

To add a family, write its row: what a row does not say is as in `Family`. Families without a row are causal, padded and
compared with plain transformers before they are used, and a warning says so (sgpt/decoder/agreement.py). `packed` is
promised only for families that tests/training/test_gradient_parity.py proves; docs/families.md shows what
tests/decoder/test_family_table.py measures of each.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from sgpt.runtime.errors import InputError


@dataclass(frozen=True)
class Family:
    """What has to be known of a family, by transformers' `model_type`."""

    packed: bool = False
    """Its attention takes packs of texts (sgpt/decoder/attention.py); otherwise texts are padded."""
    causal: bool = True
    """Tokens see what stands before them only, unless `looks_both_ways`; otherwise they look both ways."""
    position_table: bool = True
    """Positions are rows of a table that a text could outgrow, counted in config.json; otherwise any length works."""
    blocks: str = ""
    """Path of the list of blocks in the trunk; with the next two, for causal packed families."""
    first_norm: str = ""
    """Path in a block of the norm that must see all tokens, as the keys and values are made of what it gives."""
    narrowed: tuple[str, ...] = ()
    """Paths in the last block of the modules that need the selected tokens alone (sgpt/decoder/continuation.py)."""
    like_llama: bool = False
    """Llama's classes compute the same from the same weights, where no sliding window is set."""


_LLAMA = Family(packed=True, blocks="layers", first_norm="input_layernorm", narrowed=("self_attn.o_proj",))
_BIDIRECTIONAL = Family(causal=False)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(packed=True, blocks="h", first_norm="ln_1", narrowed=("attn.c_proj",)),
    "gpt_neo": Family(packed=True, blocks="h", first_norm="ln_1", narrowed=("attn.attention.out_proj",)),
    # the MLP of GPT-J reads the same norm as its attention
    "gptj": Family(packed=True, blocks="h", first_norm="ln_1", narrowed=("attn.out_proj", "mlp")),
    "gpt_neox": Family(packed=True, blocks="layers", first_norm="input_layernorm", narrowed=("attention.dense",)),
    "opt": Family(
        packed=True, blocks="decoder.layers", first_norm="self_attn_layer_norm", narrowed=("self_attn.out_proj",)
    ),
    "bloom": Family(
        packed=True, position_table=False,
        blocks="h", first_norm="input_layernorm", narrowed=("self_attention.dense",),
    ),
    "llama": _LLAMA,
    "qwen2": replace(_LLAMA, like_llama=True),
    "qwen3": _LLAMA,
    "mistral": replace(_LLAMA, like_llama=True),
    "gemma": _LLAMA,
    "gemma2": Family(),
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": Family(),
    "phi": Family(packed=True, blocks="layers", first_norm="input_layernorm", narrowed=("self_attn.dense", "mlp")),
    "phi3": _LLAMA,
    "bert": Family(packed=True, causal=False),
    "roberta": _BIDIRECTIONAL,
    "distilbert": _BIDIRECTIONAL,
    "mpnet": _BIDIRECTIONAL,
    "xlm-roberta": _BIDIRECTIONAL,
    "electra": _BIDIRECTIONAL,
    "albert": _BIDIRECTIONAL,
    "camembert": _BIDIRECTIONAL,
    "modernbert": _BIDIRECTIONAL,
}  # fmt: skip
PACKED_FAMILIES = {name for name, family in FAMILIES.items() if family.packed}
LENGTH_WITHOUT_TABLE = 2048  # BLOOM's training length: ALiBi has no limit of its own
BLOCK_NUMBER = re.compile(r"\.(\d+)\.")  # in the path of what lies in a block
POSITION_TABLES = ("max_position_embeddings", "n_positions")  # keys of config.json


def family_of(model_type: str) -> Family:
    """Its row, or the defaults."""
    return FAMILIES.get(model_type, Family())


def first_layers(config: PretrainedConfig, layers: int, path: str) -> PretrainedConfig:
    """The config of the same model with its first blocks alone. InputError where the family cannot be cut so.

    path: of the model, for messages.
    """
    total = config.num_hidden_layers
    if layers > total:
        raise InputError(f"model.layers={layers}: {path} has {total} blocks; lower it, or leave it out")
    stated = config.to_dict()
    for key, value in stated.items():
        if isinstance(value, list) and len(value) == total > 1:  # kinds of attention, block by block
            stated[key] = value[:layers]
    if "attention_types" in stated:  # GPT-Neo's, from which its list is made
        stated["attention_types"] = [[stated["attention_layers"], 1]]
    stated[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    cut = type(config).from_dict(stated)
    if cut.num_hidden_layers != layers:
        raise InputError(f"model.layers={layers}: {config.model_type} cannot be cut to its first blocks; leave it out")
    return cut


def looks_both_ways(config: Mapping) -> bool:
    """Whether tokens see what stands behind them, too. config: what config.json says; it may turn a decoder around."""
    turned = config.get("use_bidirectional_attention") in (True, "all")  # "vision" is of images alone
    return turned or config.get("is_causal") is False or not family_of(config["model_type"]).causal


def block_of(path: str) -> int | None:
    """Number of the block in which a module or parameter lies; None for embeddings, the last norm and their like."""
    number = BLOCK_NUMBER.search(path)
    return int(number[1]) if number else None


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises. By the class's name: LayerNorm, LlamaRMSNorm and their like share no base class."""
    return "norm" in type(module).__name__.lower()


def is_post_norm(trunk: nn.Module) -> bool:
    """Whether a block's residual is what its norm gives. Models of one family differ: OPT-350m is, the other OPTs are
    not.
    """
    config = trunk.config
    opt_like = not getattr(config, "do_layer_norm_before", True)
    return opt_like or getattr(config, "apply_residual_connection_post_layernorm", False)


def position_limit(trunk: nn.Module) -> int | None:
    """Number of positions the trunk knows; None where any length works.

    Of a model with two sets of rotary frequencies (longrope: Phi-3 for 128k) those of the first. The second is for
    longer texts, and transformers takes it for all texts of a call as soon as one of them is.
    """
    if not family_of(trunk.config.model_type).position_table:
        return None
    stated = (getattr(trunk.config, key, None) for key in POSITION_TABLES)
    limit = next((value for value in stated if value), None)
    rotary = getattr(trunk.config, "rope_parameters", None) or {}
    if isinstance(limit, int) and rotary.get("rope_type") == "longrope":
        limit = min(limit, rotary.get("original_max_position_embeddings") or limit)
    return limit - position_offset(trunk) if isinstance(limit, int) and limit > 0 else None


def embedding_size(trunk: nn.Module) -> int:
    """D. OPT-350m turns its hidden states into narrower ones at the end."""
    return getattr(trunk.config, "word_embed_proj_dim", None) or trunk.config.hidden_size


def takes_position_ids(trunk: nn.Module) -> bool:
    """Whether positions can be handed in, counted from 0.

    BLOOM's ALiBi counts the mask itself; RoBERTa's start behind the padding id.
    """
    base = trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk
    if getattr(base, "counts_positions_itself", False):  # set by `check_family`
        return False
    return "position_ids" in inspect.signature(base.forward).parameters and not position_offset(base)


def position_offset(trunk: nn.Module) -> int:
    """Rows of the position table that no text uses: RoBERTa's first position, and its kin's, follows the padding id."""
    for name, module in trunk.named_modules():
        padding_id = getattr(module, "padding_idx", None)  # I-BERT's table is no nn.Embedding
        if name.endswith("position_embeddings") and isinstance(padding_id, int):
            return padding_id + 1
    return 0
