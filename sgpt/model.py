"""Base models: loading a trunk and its tokenizer, and the few facts that differ by family.

The trunk is `AutoModel`: the decoder (or encoder) without its language-model head. Only safetensors and JSON are read.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from sgpt.attention import NAME, PACKED_FAMILIES, packed, prepare
from sgpt.errors import InputError
from sgpt.files import may_be_hub_id
from sgpt.packing import Pack
from sgpt.template import unwrap

# Families whose tokens look both ways; every other one is taken to be causal.
BIDIRECTIONAL = {"bert", "roberta", "distilbert", "mpnet", "xlm-roberta", "electra", "albert", "camembert", "modernbert"}
POSITION_TABLES = ("max_position_embeddings", "n_positions")
RELATIVE_POSITIONS = {"bloom", "t5"}  # no table that a text could outgrow


@dataclass
class ModelConfig:
    """path: local folder, or a hub id such as EleutherAI/gpt-neo-125m. dtype of the frozen weights: float32 or bfloat16."""

    path: str = "data/nano"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"model.dtype={self.dtype!r} is unknown; choose float32, bfloat16 or float16")


def load_trunk(config: ModelConfig) -> nn.Module:
    """The trunk in evaluation mode. Raises InputError when the weights cannot be had or are no safetensors."""
    path = located(config.path)
    try:
        architecture = AutoConfig.from_pretrained(path)
        if architecture.is_encoder_decoder:
            raise InputError(f"{config.path}: {architecture.model_type} is an encoder-decoder; use a decoder or an encoder")
        trunk = AutoModel.from_pretrained(path, dtype=getattr(torch, config.dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise cannot_load(config.path, error) from error
    trunk.config.use_cache = False
    return prepare(trunk).eval()


def load_tokenizer(path: str):
    """The fast tokenizer, without the markers of an export; where it has no pad token the end token serves, as in SGPT."""
    try:
        tokenizer = unwrap(AutoTokenizer.from_pretrained(located(path)))
    except (OSError, ValueError) as error:
        raise cannot_load(path, error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{path}: the tokenizer has neither a pad token nor an end token; set one in its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # limits are ours (markers.*_max_tokens); no second one that warns
    return tokenizer


def located(path: str) -> str:
    """A local path as it is, or below this project when it is not in the working directory; anything else is a hub id."""
    beside_project = Path(__file__).parents[1] / path
    return str(beside_project) if not Path(path).exists() and beside_project.exists() else path


def position_limit(trunk: nn.Module) -> int | None:
    """Number of positions the trunk knows; None where any length works."""
    config = trunk.config
    if config.model_type in RELATIVE_POSITIONS:
        return None
    limit = next((value for name in POSITION_TABLES if (value := getattr(config, name, None))), None)
    if limit and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        limit -= 2  # their tables start after the padding index
    return limit


def embedding_size(trunk: nn.Module) -> int:
    """D. OPT-350m turns its hidden states into narrower ones at the end."""
    return getattr(trunk.config, "word_embed_proj_dim", None) or trunk.config.hidden_size


def token_embeddings(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Last hidden state [rows, T, D].

    attention_mask [rows, T] with padding on either side: positions count real tokens, so both sides give the same result.
    None says: right-padded rows of a causal trunk, where no real token ever sees padding and no mask need be computed.
    """
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        if takes_position_ids(trunk):
            inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return trunk(**inputs).last_hidden_state


def takes_packs(trunk: nn.Module) -> bool:
    """Whether its attention can be told where texts end: of a known family, and prepared (sgpt/attention.py)."""
    return trunk.config.model_type in PACKED_FAMILIES and trunk.config._attn_implementation == NAME


def packed_token_embeddings(trunk: nn.Module, pack: Pack) -> Tensor:
    """Last hidden state [N, D] of the pack's tokens, each attending to its own text only. The trunk `takes_packs`."""
    inputs = {"input_ids": pack.input_ids[None], "attention_mask": torch.ones_like(pack.input_ids)[None]}
    if takes_position_ids(trunk):
        inputs["position_ids"] = pack.position_ids[None]
    with packed(pack):
        return trunk(**inputs).last_hidden_state[0]


def takes_position_ids(trunk: nn.Module) -> bool:
    """Whether positions can be handed in. BLOOM's ALiBi counts the mask itself; RoBERTa's positions are derived from the padding id."""
    base = trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk
    offset_families = ("roberta", "xlm-roberta", "camembert", "mpnet")
    return "position_ids" in inspect.signature(base.forward).parameters and base.config.model_type not in offset_families


def cannot_load(path: str, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    if Path(path).exists():
        return InputError(f"{path}: the folder cannot be loaded ({_first_line(error)}); it needs config.json, model.safetensors and tokenizer files")
    if not may_be_hub_id(path):
        return InputError(f"{path}: no such folder; check the path")
    return InputError(
        f"{path}: no such local folder, and it could not be had from the model hub ({_first_line(error)}). "
        "Without a network, download it elsewhere and give the local folder"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
