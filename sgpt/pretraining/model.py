"""The shape of `nano`, its start, its optimizers, and how it is saved."""

import json
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from sgpt.decoder.attention import prepare as prepare_attention
from sgpt.decoder.model_files import WEIGHTS
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import hash_of, ordinary_permissions, write_whole
from sgpt.runtime.values import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, check_choice, check_ranges

SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 257, 65_536
WRITTEN_HASHES = "written.json"  # in the run's folder: path of the weights that it wrote -> their hashes
END = "<|endoftext|>"  # between documents, and padding; id 0


@dataclass
class NanoConfig:
    """Shape of the decoder, a GPT-Neo; the defaults give 6.4 million parameters."""

    vocabulary: int = 12288
    """Tokens that the tokenizer knows."""
    hidden_size: int = 256
    """Size of a token embedding, D."""
    layers: int = 4
    """Blocks, whose attention is global and local by turns."""
    heads: int = 8
    """Attention heads of each block; they divide hidden_size."""
    positions: int = 384
    """Tokens of the longest text."""
    window: int = 256
    """Tokens that local attention looks back on."""

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        check_ranges(self, "nano.", **dict.fromkeys(names, COUNT))
        if self.hidden_size % self.heads:
            raise InputError(f"nano.heads={self.heads} does not divide nano.hidden_size={self.hidden_size}")


@dataclass
class PretrainConfig:
    """Pretraining of `nano`, in the three stages of sgpt/pretraining/pretrain.py; totals are over all processes."""

    text: str = ""
    """Folder of the text sources, named in sgpt/pretraining/open_text.py; must be given."""
    pydocs: str = "data/raw/pydocs"
    """Folder of the docstring harvest, whose training packages are read as text."""
    folder: str = "runs/nano"
    """Folder of the tokenizer, the token ids and the checkpoints."""
    output: str = "data/nano"
    """Folder of the finished model, float16 safetensors and its tokenizer."""
    nano: NanoConfig = field(default_factory=NanoConfig)
    """Shape of the model."""
    lexical_steps: int = 728
    """Optimizer steps of the lexical stage."""
    lexical_pairs_per_step: int = 1024
    """Weak pairs of a step of the lexical stage."""
    lexical_learning_rate: float = 1e-2
    """AdamW's peak learning rate in the lexical stage."""
    joint_steps: int = 1280
    """Optimizer steps of the joint stage: three of four on weak pairs, the fourth on windows of text."""
    language_steps: int = 120
    """Optimizer steps of the language stage."""
    window_tokens: int = 384
    """Tokens of a window of text, at most nano.positions."""
    windows_per_step: int = 20
    """Windows of text of a step on them, in total."""
    windows_per_forward: int = 4
    """Windows that a process computes at a time."""
    pairs_per_step: int = 160
    """Weak pairs of a step on them, in total; in-batch negatives are those of one process."""
    neighbours: int = 8
    """Pairs that come one after the other from one page, which makes them hard negatives of each other."""
    max_query_tokens: int = 48
    """Tokens of a pair's query; what is longer is cut."""
    max_document_tokens: int = 128
    """Tokens of a pair's document; what is longer is cut."""
    head_share: float = 0.33
    """Share of the document positions that carry the next-token loss in a step of pairs, from 0 to 1."""
    contrastive_weight: float = 3.0
    """Weight of InfoNCE next to the next-token loss, which weighs 1, in a step of pairs."""
    scale: float = 20.0
    """Factor on the cosines of InfoNCE, 1 / temperature."""
    muon_learning_rate: float = 2e-3
    """Muon's peak learning rate, of the matrices inside the blocks."""
    embedding_learning_rate: float = 2e-3
    """AdamW's peak learning rate of token and position embeddings."""
    head_learning_rate: float = 3e-3
    """AdamW's peak learning rate of the language-model head."""
    vector_learning_rate: float = 1e-3
    """AdamW's peak learning rate of biases and norms."""
    weight_decay: float = 0.01
    """Weight decay of the head and of the matrices inside the blocks."""
    warmup_steps: int = 20
    """Optimizer steps in which the learning rates rise to their peaks, after the lexical stage."""
    precision: str = "fp32"
    """Precision of the computation after the lexical stage: fp32, or bf16 by autocast."""
    seed: int = 0
    """Decides the first weights, the shuffling and the batches."""
    save_every_steps: int = 80
    """Optimizer steps from one checkpoint to the next; the last step is always saved."""
    log_every_steps: int = 5
    """Optimizer steps from one line of metrics.jsonl to the next."""

    def __post_init__(self) -> None:
        positive = (
            "lexical_learning_rate", "muon_learning_rate", "embedding_learning_rate", "head_learning_rate",
            "vector_learning_rate", "scale",
        )  # fmt: skip
        counts = (
            "lexical_pairs_per_step", "window_tokens", "windows_per_step", "windows_per_forward", "pairs_per_step",
            "neighbours", "max_query_tokens", "max_document_tokens", "warmup_steps", "save_every_steps",
            "log_every_steps",
        )  # fmt: skip
        stages = ("lexical_steps", "joint_steps", "language_steps")
        check_ranges(
            self,
            **dict.fromkeys(positive, POSITIVE),
            **dict.fromkeys(counts, COUNT),
            **dict.fromkeys(stages, COUNT_OR_NONE),
            seed=SEED,
            head_share=SHARE,
            contrastive_weight=NOT_NEGATIVE,
            weight_decay=NOT_NEGATIVE,
        )
        check_choice("precision", self.precision, ("fp32", "bf16"))
        for name in ("pairs_per_step", "lexical_pairs_per_step"):
            if getattr(self, name) % self.neighbours:
                raise InputError(f"neighbours={self.neighbours} does not divide {name}={getattr(self, name)}")
        for name in ("window_tokens", "max_query_tokens", "max_document_tokens"):
            if getattr(self, name) > self.nano.positions:
                raise InputError(f"{name}={getattr(self, name)} is more than nano.positions={self.nano.positions}")
        if not SMALLEST_VOCABULARY <= self.nano.vocabulary <= LARGEST_VOCABULARY:
            raise InputError(
                f"nano.vocabulary={self.nano.vocabulary}: it has 256 bytes and the end token at least, and "
                f"{LARGEST_VOCABULARY} words at most, as token ids are kept in two bytes"
            )


@torch.no_grad()
def start_from(model: GPTNeoForCausalLM, table: Tensor, bias: Tensor) -> None:
    """Makes the trunk compute what the lexical stage did: its embeddings, no positions, blocks that add nothing."""
    model.transformer.wte.weight.copy_(table)
    model.transformer.wpe.weight.zero_()
    model.transformer.ln_f.bias.copy_(bias)
    for block in model.transformer.h:
        block.attn.attention.out_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()


def build_model(nano: NanoConfig, seed: int) -> GPTNeoForCausalLM:
    """A new model with random weights; the same seed gives the same ones."""
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=nano.vocabulary,
        hidden_size=nano.hidden_size,
        num_layers=nano.layers,
        num_heads=nano.heads,
        attention_types=[[["global", "local"], nano.layers // 2]],
        window_size=nano.window,
        max_position_embeddings=nano.positions,
        intermediate_size=4 * nano.hidden_size,
        activation_function="gelu_pytorch_tanh",  # gelu_new's function as one fused operation
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
        bos_token_id=0,  # END, for all three
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,  # sgpt/pretraining/pretrain.py says why
        use_cache=False,
    )
    return prepare_attention(GPTNeoForCausalLM(config))


def build_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    named = dict(model.named_parameters())
    matrices = [parameter for name, parameter in named.items() if parameter.ndim == 2 and ".h." in name]
    embeddings = [named["transformer.wte.weight"], named["transformer.wpe.weight"]]
    head = [named["lm_head.weight"]]
    vectors = [parameter for parameter in named.values() if parameter.ndim < 2]
    muon = torch.optim.Muon(
        matrices,
        lr=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that its rate means what AdamW's does
    )
    groups = [
        {"params": embeddings, "lr": config.embedding_learning_rate, "weight_decay": 0.0},
        {"params": head, "lr": config.head_learning_rate, "weight_decay": config.weight_decay},
        {"params": vectors, "lr": config.vector_learning_rate, "weight_decay": 0.0},
    ]
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98))]


def refuse_other_model(config: PretrainConfig) -> None:
    """InputError where `output` holds a model that this run did not write: it may be the base of others."""
    weights = Path(config.output, WEIGHTS)
    if weights.is_file() and hash_of(weights) not in _written(config).get(str(weights.absolute()), []):
        raise InputError(
            f"output={config.output}: {weights} is there, and the run of folder={config.folder} did not write it; set "
            "output=<another folder>, or remove that file"
        )


def _written(config: PretrainConfig) -> dict[str, list[str]]:
    file = Path(config.folder, WRITTEN_HASHES)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def save_model(model: GPTNeoForCausalLM, config: PretrainConfig) -> Path:
    """Writes float16 safetensors and the tokenizer, as every loader expects them; returns their folder.

    Replaces a model that this run wrote, file by file; InputError for another one.
    """
    from transformers import PreTrainedTokenizerFast

    refuse_other_model(config)
    output, temporary = Path(config.output), Path(config.folder, ".output.tmp")
    half = build_model(config.nano, config.seed)
    half.load_state_dict(model.state_dict())
    half.config._attn_implementation = None  # a choice of this process, not of the checkpoint
    half.half().save_pretrained(temporary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{config.folder}/tokenizer.json",
        eos_token=END,
        bos_token=END,
        pad_token=END,
        padding_side="right",
    )
    tokenizer.save_pretrained(temporary)
    output.mkdir(parents=True, exist_ok=True)
    written, place = _written(config), str((output / WEIGHTS).absolute())
    written[place] = [*written.get(place, []), hash_of(temporary / WEIGHTS)]
    write_whole(Path(config.folder, WRITTEN_HASHES), json.dumps(written) + "\n")
    for file in temporary.iterdir():
        shutil.move(file, output / file.name)  # the two may lie on different disks
    temporary.rmdir()
    ordinary_permissions(output)
    return output
