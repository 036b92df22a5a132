"""The shape of `nano`, its start, its optimizers, and how it is saved."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from sgpt.decoder.attention import prepare as prepare_attention
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import ordinary_permissions
from sgpt.runtime.values import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, check_choice, check_ranges

END = "<|endoftext|>"  # between documents, and padding; id 0


@dataclass
class NanoConfig:
    """Shape of the decoder; the defaults give 6.4 million parameters."""

    vocabulary: int = 12288
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    positions: int = 384
    window: int = 256

    def __post_init__(self) -> None:
        check_ranges(self, "nano.", **dict.fromkeys((field.name for field in fields(self)), COUNT))
        if self.hidden_size % self.heads:
            raise InputError(f"nano.heads={self.heads} does not divide nano.hidden_size={self.hidden_size}")


@dataclass
class PretrainConfig:
    """Totals are over all processes.

    text: folder of the sources (sgpt/pretraining/open_text.py). pydocs: folder of the docstring harvest, whose training packages
    are read as text. folder: tokenizer, token ids and checkpoints. output: the finished model, fp16 safetensors.
    neighbours: pairs come in runs of so many from one place, whose members are hard negatives of each other.
    head_share: share of document positions that carry the next-token loss in a step of pairs.
    """

    text: str = ""
    pydocs: str = "data/raw/pydocs"
    folder: str = "runs/nano"
    output: str = "data/nano"
    nano: NanoConfig = field(default_factory=NanoConfig)
    lexical_steps: int = 728
    lexical_pairs_per_step: int = 1024
    lexical_learning_rate: float = 1e-2
    joint_steps: int = 1280
    language_steps: int = 120
    window_tokens: int = 384
    windows_per_step: int = 20
    windows_per_forward: int = 4
    pairs_per_step: int = 160
    neighbours: int = 8
    max_query_tokens: int = 48
    max_document_tokens: int = 128
    head_share: float = 0.33
    contrastive_weight: float = 3.0
    scale: float = 20.0
    muon_learning_rate: float = 2e-3
    embedding_learning_rate: float = 2e-3
    head_learning_rate: float = 3e-3
    vector_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    precision: str = "fp32"
    seed: int = 0
    save_every_steps: int = 80
    log_every_steps: int = 5

    def __post_init__(self) -> None:
        rates = ("lexical_learning_rate", "muon_learning_rate", "embedding_learning_rate", "head_learning_rate", "vector_learning_rate", "scale")
        counts = (
            "lexical_pairs_per_step", "window_tokens", "windows_per_step", "windows_per_forward", "pairs_per_step", "neighbours",
            "max_query_tokens", "max_document_tokens", "warmup_steps", "save_every_steps", "log_every_steps",
        )  # fmt: skip
        steps = ("lexical_steps", "joint_steps", "language_steps")
        check_ranges(self, **dict.fromkeys(rates, POSITIVE), **dict.fromkeys(counts, COUNT), **dict.fromkeys(steps, COUNT_OR_NONE), seed=SEED,
                     head_share=SHARE, contrastive_weight=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE)
        check_choice("precision", self.precision, ("fp32", "bf16"))
        for name in ("pairs_per_step", "lexical_pairs_per_step"):
            if getattr(self, name) % self.neighbours:
                raise InputError(f"neighbours={self.neighbours} does not divide {name}={getattr(self, name)}")
        if self.window_tokens > self.nano.positions:
            raise InputError(f"window_tokens={self.window_tokens} is more than nano.positions={self.nano.positions}")


@torch.no_grad()
def start_from(model: GPTNeoForCausalLM, table: Tensor, bias: Tensor) -> None:
    """Makes the trunk compute what the lexical stage computed: its embeddings, no positions, blocks that add nothing."""
    model.transformer.wte.weight.copy_(table)
    model.transformer.wpe.weight.zero_()
    model.transformer.ln_f.bias.copy_(bias)
    for block in model.transformer.h:
        block.attn.attention.out_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()


def build_model(nano: NanoConfig, seed: int) -> GPTNeoForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=nano.vocabulary, hidden_size=nano.hidden_size, num_layers=nano.layers, num_heads=nano.heads,
        attention_types=[[["global", "local"], nano.layers // 2]], window_size=nano.window,
        max_position_embeddings=nano.positions, intermediate_size=4 * nano.hidden_size,
        activation_function="gelu_pytorch_tanh",  # gelu_new's function as one fused operation
        embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, use_cache=False,
    )
    return prepare_attention(GPTNeoForCausalLM(config))


def build_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and ".h." in n]
    groups = [
        {"params": [named["transformer.wte.weight"], named["transformer.wpe.weight"]], "lr": config.embedding_learning_rate, "weight_decay": 0.0},
        {"params": [named["lm_head.weight"]], "lr": config.head_learning_rate, "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "lr": config.vector_learning_rate, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    ]


def save_model(model: GPTNeoForCausalLM, config: PretrainConfig) -> Path:
    """fp16 safetensors and the tokenizer, as every loader expects them."""
    from transformers import PreTrainedTokenizerFast

    output = Path(config.output)
    half = build_model(config.nano, config.seed)
    half.load_state_dict(model.state_dict())
    half.config._attn_implementation = None  # a choice of this process, not of the checkpoint
    half.half().save_pretrained(output)
    PreTrainedTokenizerFast(tokenizer_file=f"{config.folder}/tokenizer.json", eos_token=END, bos_token=END, pad_token=END,
                            padding_side="right").save_pretrained(output)
    ordinary_permissions(output)
    return output
