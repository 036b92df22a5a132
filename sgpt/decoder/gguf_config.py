"""Whether the numbers that a GGUF file states are those of the config that transformers makes of it.

transformers reads the keys of an architecture that it has a name for and passes over the others, so that a default
takes their place. Here each is compared with the config, put into it, or the file is refused.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from sgpt.runtime.errors import InputError

Settle = Callable[[PretrainedConfig, Any], bool]  # config, value -> whether the config says the same now
# The shapes of the tensors show them, or they change no text that is short enough.
SHOWN_BY_SHAPES = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count_kv",
    "attention.value_length", "expert_feed_forward_length", "expert_shared_feed_forward_length", "tensor_data_layout",
    "rope.scaling.type", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "use_parallel_residual", "pooling_type",  # read from the tensors, and of what stands behind the hidden states
}  # fmt: skip
# Families whose classes read these numbers from the config, whatever they are.
WITH_WINDOW, WITH_PARTIAL_ROTARY = ("mistral", "phi3", "starcoder2"), ("phi3", "stablelm")
# Blocks of the models of 27 billion numbers, whose scores are divided by another root than that of a head's size.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def settle(file: Path, metadata: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Puts what the file states into the config. InputError for a key that cannot be there, or is not known here.

    metadata: by llama.cpp's keys, those of one value.
    """
    architecture = metadata["general.architecture"]
    if architecture in GGUF_CONFIG_ARCHS:  # whose keys transformers reads one by one
        return
    passed = SHOWN_BY_SHAPES | {key for key, name in GGUF_CONFIG_MAPPING.get(architecture, {}).items() if name}
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or (SETTLE[name](config, value) if name in SETTLE else name in passed):
            continue
        raise InputError(
            f"{file}: {key}={value} is not in the config that transformers makes of a GGUF file "
            f"({type(config).__name__}), so every embedding would be another; give the model's folder with "
            "safetensors instead"
        )
    if config.model_type in SCALED_BY_WIDTH:  # as llama.cpp does, whose files do not state it
        by_width = config.num_hidden_layers == SCALED_BY_WIDTH[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if by_width else config.head_dim


def _same(*names: str) -> Settle:
    """Of these names the first that the config has is compared."""

    def compare(config: PretrainedConfig, value: Any) -> bool:
        own = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        return own is not None and math.isclose(own, value, rel_tol=1e-5)

    return compare


def _one_of(*values: Any) -> Settle:
    return lambda config, value: value in values


def _rotary_of(config: PretrainedConfig, layers: str) -> dict:
    """The rotary parameters, of one kind of layers where there are several."""
    stated = getattr(config, "rope_parameters", None) or {}
    return stated.get(layers, stated)


def _rotary(config: PretrainedConfig) -> dict:
    return _rotary_of(config, "full_attention")


def _rotary_base(config: PretrainedConfig, value: float) -> bool:
    rotary = _rotary(config)
    if "rope_theta" in rotary:
        rotary["rope_theta"] = float(value)
    return "rope_theta" in rotary


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_width(config: PretrainedConfig, value: int) -> bool:
    rotary, size = _rotary(config), _head_size(config)
    if config.model_type in WITH_PARTIAL_ROTARY:
        rotary["partial_rotary_factor"] = value / size
    return value == int(size * rotary.get("partial_rotary_factor", 1.0))


def _window(config: PretrainedConfig, value: int) -> bool:
    if config.model_type in WITH_WINDOW:
        config.sliding_window = value or None
    return (getattr(config, "sliding_window", None) or 0) == value


def _scaling(config: PretrainedConfig, value: float) -> bool:
    """Factors, where no rule is stated that the config would have."""
    return value in (0, 1) or _rotary(config).get("rope_type", "default") != "default"


SETTLE: dict[str, Settle] = {
    "attention.head_count": _same("num_attention_heads"),
    "attention.key_length": lambda config, value: _head_size(config) == value,
    "attention.layer_norm_rms_epsilon": _same("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": _same("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"),
    "attention.sliding_window": _window,
    "attention.causal": _one_of(True),
    "attn_logit_softcapping": _same("attn_logit_softcapping"),
    "final_logit_softcapping": _same("final_logit_softcapping"),
    "expert_count": _same("num_experts", "num_local_experts"),
    "expert_used_count": _same("num_experts_per_tok"),
    "rope.freq_base": _rotary_base,
    "rope.freq_base_swa": lambda config, value: _rotary_of(config, "sliding_attention").get("rope_theta") == value,
    "rope.dimension_count": _rotary_width,
    "rope.scale_linear": _one_of(0, 1),
    "rope.scaling.factor": _scaling,
    "rope.scaling.attn_factor": _scaling,
}
