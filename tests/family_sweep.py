"""Every text encoder and decoder of the installed transformers that can be built small: right or refused, never wrong.

    PYTHONPATH=. python tests/family_sweep.py [family …]

Each family is built at random from its own config class, saved with a tokenizer, opened by `Encoder.from_pretrained`,
and its embeddings of texts of different lengths are compared with plain transformers: each text alone, without any
mask. Printed for comparison: how far plain transformers itself is from that in a batch padded on the right and on the
left.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from tests.conftest import byte_level

TEXTS = [
    "parse a date",
    "the quick brown fox jumps over the lazy dog and sleeps",
    "a",
    "open a file and read all of its lines",
]
RIGHT = 1e-5  # of the largest number: float32 sums in another order over two layers
SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "embedding_size": 32, "dim": 32, "hidden_dim": 64,
    "ffn_dim": 64, "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "intermediate_size": 64, "n_inner": 64,
    "moe_intermediate_size": 16, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "rotary_dim": 4, "word_embed_proj_dim": 32,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "attention_window": 16,
    "entity_emb_size": 16, "state_size": 8, "n_input_layers": 1, "n_output_layers": 1, "entity_vocab_size": 50,
    "default_language": "en_XX", "n_groups": 1, "num_heads": 4, "expand": 2,
}  # fmt: skip
ONCE_MORE = [  # for families whose sizes must agree otherwise; the first that can be built counts
    {},
    {"head_dim": 4, "num_key_value_heads": 4},
    {"num_key_value_heads": 4},
    {"d_kv": 8, "d_head": 8, "d_inner": 64},
    {"attention_types": [[["global", "local"], 1]]},
    {"embedding_size": 32, "hidden_size": 32, "num_key_value_heads": 1},
    {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
    {"layers_block_type": ["attention", "attention"]},
    {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    {"mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "num_heads": 8, "head_dim": 8},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attention_head_size": 8},
    {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    {"attn_layer_period": 2, "attn_layer_offset": 1},
    {"rotary_dim": None, "head_dim": None},
    {"layer_types": None},
]


@dataclass(frozen=True)
class Row:
    family: str
    outcome: str  # right, refused, not built, WRONG
    ours: float = 0.0
    padded_right: float = 0.0
    padded_left: float = 0.0
    reason: str = ""


def families() -> list[str]:
    """Of the model mapping, in order of their names."""
    return sorted(name for name in MODEL_MAPPING_NAMES if name in CONFIG_MAPPING)


def build(family: str, vocabulary: int) -> torch.nn.Module:
    """A random trunk. Raises whatever the last try of its class raised."""
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    if default.is_encoder_decoder:
        raise ValueError("an encoder-decoder")
    if getattr(config_class, "sub_configs", None) or hasattr(default, "vision_config"):
        raise ValueError("of several modalities")
    known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    if not {"vocab_size", "n_vocab"} & known:
        raise ValueError("no vocabulary: not a model of text")
    failure: Exception = ValueError("")
    for more in ONCE_MORE:
        sizes = {
            name: value
            for name, value in {**SMALL, **more}.items()
            if name in known or (name in more and name in SMALL)
        }
        sizes |= {name: value for name, value in more.items() if name in known}
        if "kv_lora_rank" in known:  # latent attention has a key for every head
            sizes |= {"num_key_value_heads": 4, "head_dim": 4}
        tokens = {name: 0 for name in ("bos_token_id", "eos_token_id") if name in known}
        pad = {"pad_token_id": 1} if getattr(default, "pad_token_id", None) is not None else {}
        try:
            torch.manual_seed(0)
            config = config_class(**{**sizes, "vocab_size": vocabulary, **tokens, **pad})
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
            if size > 2e7:
                raise ValueError(f"cannot be built small: {size:,} parameters")
            trunk = AutoModel.from_config(config).eval()
            with torch.no_grad():
                for parameter in trunk.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                trunk(input_ids=torch.arange(8)[None])
            return trunk
        except Exception as error:  # any class, any size: the reason is printed
            failure = error
    raise failure


def plain(folder: Path, tokenizer, side: str | None) -> torch.Tensor:
    """Mean of the last hidden state by plain transformers: of each text alone (side None), or of a padded batch."""
    trunk = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if side is None:
            ids = [torch.tensor(row) for row in tokenizer(TEXTS)["input_ids"]]
            return torch.stack([trunk(input_ids=row[None]).last_hidden_state[0].mean(0) for row in ids])
        batch = tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt", return_token_type_ids=False)
        hidden, mask = trunk(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)


def sweep(family: str, folder: Path) -> Row:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    try:
        trunk = build(family, len(tokenizer) + 3)
    except Exception as error:
        return Row(
            family,
            "not built",
            reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:110],
        )
    trunk.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    try:
        encoder = Encoder.from_pretrained(folder, markers=MarkersConfig("none", 100, 100), pooling="mean")
        embeddings = torch.from_numpy(encoder.encode(TEXTS, "document"))
    except InputError as error:
        return Row(family, "refused", reason=str(error).removeprefix(f"{folder}: "))
    except Exception as error:
        return Row(family, "WRONG", float("nan"), reason=f"{type(error).__name__}: {error}")
    alone = plain(folder, tokenizer, None)
    largest = alone.abs().max()
    made = [embeddings]
    for side in ("right", "left"):
        try:
            made.append(plain(folder, tokenizer, side))
        except Exception:  # plain transformers cannot do it at all
            made.append(torch.full_like(alone, torch.inf))
    ours, right, left = (float((one - alone).abs().max() / largest) for one in made)
    return Row(family, "right" if ours <= RIGHT else "WRONG", ours, right, left)


def main(chosen: list[str]) -> int:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    rows = []
    chosen = (
        [name for name in families() if name >= chosen[0].removeprefix("from:")]
        if chosen and chosen[0].startswith("from:")
        else chosen
    )
    for family in chosen or families():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            rows.append(sweep(family, Path(folder)))
        row = rows[-1]
        numbers = (
            f"ours {row.ours:.1e}, plain batch {row.padded_right:.1e} right, {row.padded_left:.1e} left"
            if row.outcome in ("right", "WRONG")
            else row.reason
        )
        print(f"{row.family:28} {row.outcome:9} {numbers}", flush=True)
    print(dict(Counter(row.outcome for row in rows)))
    return int(any(row.outcome == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
