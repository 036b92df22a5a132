"""What bias-only training does to each family, measured on a small random model of its real class.

    python -m tests.family_table [family …]

Prints the rows of docs/families.md; tests/decoder/test_family_table.py measures each again and compares it with the
row. The numbers are those of a published shape, whose tensors are never filled: it is built on torch's meta device.

The reference is plain transformers, opened from the export by `AutoModel`, with its eager attention: one text at a
time, without padding, mask or position ids. Of an export that is an adapter this is the base with PEFT's own layers.
"""

import copy
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel

from sgpt.decoder.added_biases import added_biases
from sgpt.decoder.families import block_of, family_of, is_norm
from sgpt.decoder.trunk import takes_packs
from sgpt.encoder.adapter import PEFT, read_delta, save_adapter
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.text.markers import MarkersConfig
from sgpt.text.tokens import TokenLists
from sgpt.training.tuning import TuningConfig, count_parameters, trainable_parameters, tune
from tests.conftest import FAMILIES, POSITIONS, WIDTH, byte_level, word_piece
from tests.training.test_gradient_parity import Float64, Gradient, error

PEFT_WARNS = "Detected that the base layer has no bias term"
TEXTS = [
    "parse a date",
    "a",
    "open a file and read all of its lines, then close it again and say how many of them there were in all",
    "the quick brown fox jumps over the lazy dog",
]
WINDOW = 16  # of layers that have one; the longest text is cut at 40 tokens
GROUPED = {**WIDTH, "num_key_value_heads": 2}
AFTER_PADDING = {**WIDTH, "max_position_embeddings": POSITIONS + 2}  # positions start behind the padding id
HEADS_OF_8 = {**GROUPED, "head_dim": 8}


@dataclass(frozen=True)
class Row:
    """A family, or one of its kinds: how it is built small, and a published shape of it."""

    family: str
    name: str
    small: dict
    published: str
    shape: dict
    """Of the published model; what it does not say is the default of the class."""
    kind: str = ""
    """Class name before Config and Model, where tests/conftest.py does not know the family."""


def _of_conftest(family: str, name: str, published: str, shape: dict, **changed) -> Row:
    kind, small = FAMILIES[family]
    return Row(family, name, {**small, **changed}, published, shape, kind)


def _llama_like(width: int, mlp: int, blocks: int, heads: int, key_value_heads: int, head_dim: int = 0) -> dict:
    """head_dim: 0 is width / heads."""
    shape = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }  # fmt: skip
    return {**shape, "head_dim": head_dim} if head_dim else shape


MISTRAL_7B = _llama_like(4096, 14336, 32, 32, 8)
ROWS = {
    row.name: row
    for row in (
        _of_conftest("gpt2", "GPT-2", "gpt2", {}),
        _of_conftest("gpt_neo", "GPT-Neo", "gpt-neo-125m", {
            "hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]],
        }),
        _of_conftest("gptj", "GPT-J", "gpt-j-6b", {}),
        _of_conftest("gpt_neox", "GPT-NeoX", "pythia-160m", {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        }),
        _of_conftest("opt", "OPT", "opt-125m", {}),
        _of_conftest("bloom", "BLOOM", "bloom-560m", {"hidden_size": 1024, "n_layer": 24, "n_head": 16}),
        _of_conftest("llama", "Llama", "SmolLM2-135M", _llama_like(576, 1536, 30, 9, 3),
                     attention_bias=False, mlp_bias=False),
        Row("mistral", "Mistral", {**GROUPED, "sliding_window": None}, "Mistral-7B-v0.3",
            {**MISTRAL_7B, "sliding_window": None}, "Mistral"),
        Row("mistral", "Mistral with a window", {**GROUPED, "sliding_window": WINDOW}, "Mistral-7B-v0.1",
            {**MISTRAL_7B, "sliding_window": 4096}, "Mistral"),
        _of_conftest("qwen2", "Qwen2", "Qwen2.5-0.5B", _llama_like(896, 4864, 24, 14, 2)),
        _of_conftest("qwen3", "Qwen3", "Qwen3-0.6B", _llama_like(1024, 3072, 28, 16, 8, 128)),
        Row("gemma", "Gemma", HEADS_OF_8, "gemma-2b", _llama_like(2048, 16384, 18, 8, 1, 256), "Gemma"),
        Row("gemma2", "Gemma 2", {**HEADS_OF_8, "sliding_window": WINDOW}, "gemma-2-2b",
            _llama_like(2304, 9216, 26, 8, 4, 256), "Gemma2"),
        Row("gemma3_text", "Gemma 3 (text)", {
            **HEADS_OF_8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
        }, "gemma-3-1b", _llama_like(1152, 6912, 26, 4, 1, 256), "Gemma3Text"),
        Row("smollm3", "SmolLM3", {**GROUPED, "no_rope_layers": [1, 0]}, "SmolLM3-3B", {}, "SmolLM3"),
        Row("olmo2", "OLMo 2", GROUPED, "OLMo-2-1B", _llama_like(2048, 8192, 16, 16, 16), "Olmo2"),
        Row("phi", "Phi", WIDTH, "phi-1", {}, "Phi"),
        Row("phi3", "Phi-3", GROUPED, "Phi-3-mini", {"sliding_window": 2047}, "Phi3"),
        _of_conftest("bert", "BERT", "bert-base", {}),
        Row("roberta", "RoBERTa", AFTER_PADDING, "roberta-base", {}, "Roberta"),
        Row("xlm-roberta", "XLM-RoBERTa", AFTER_PADDING, "xlm-roberta-base", {}, "XLMRoberta"),
        Row("camembert", "CamemBERT", AFTER_PADDING, "camembert-base", {}, "Camembert"),
        Row("mpnet", "MPNet", AFTER_PADDING, "mpnet-base", {}, "MPNet"),
        Row("distilbert", "DistilBERT", {
            "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS,
        }, "distilbert-base", {}, "DistilBert"),
        Row("electra", "ELECTRA", {**WIDTH, "embedding_size": 16}, "electra-base-discriminator", {
            "embedding_size": 768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        }, "Electra"),
        Row("albert", "ALBERT", {**WIDTH, "embedding_size": 16}, "albert-base-v2", {
            "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        }, "Albert"),
        Row("modernbert", "ModernBERT", {**WIDTH, "local_attention": WINDOW, "global_attn_every_n_layers": 2},
            "ModernBERT-base", {}, "ModernBert"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One row's proof; the assertions on it are in tests/decoder/test_family_table.py."""

    start: float
    """Largest difference that adding the biases made to an embedding."""
    values: dict[str, float]
    """By "packed" (or padded by the encoder), "left", "right": embeddings' worst relative difference, in float64."""
    gradients: dict[str, float]
    """The same of the gradient of every trained tensor and of the loss."""
    loaded: float
    """Largest difference of an embedding after the adapter was saved and opened."""
    by_peft: float | None
    """Of the last hidden state by PEFT's own class over the adapter, relative to the largest number; None: no form."""
    by_transformers: float
    """Of embeddings by `AutoModel` over the export, in float32, each relative to its largest number."""
    cells: tuple[str, ...]
    """The row of docs/families.md."""


def measure(row: Row, folder: Path) -> Measured:
    """Everything of one row; writes below `folder`."""
    base = _save_base(row, folder / "base")
    encoder = Encoder.from_pretrained(base, markers=MarkersConfig("brackets", 24, 40))
    untrained = encoder.encode(TEXTS, "document")
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit"))
    start = abs(encoder.eval().encode(TEXTS, "document") - untrained).max()
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    train_at_random(encoder.trunk)
    embeddings = encoder.encode(TEXTS, "document", as_tensor=True)

    adapter = save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, folder / "adapter")
    loaded = Encoder.from_pretrained(adapter).encode(TEXTS, "document", as_tensor=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PEFT_WARNS)
        verified = export(encoder, folder / "export", card="", adapter=adapter)
        plain = AutoModel.from_pretrained(folder / "export", attn_implementation="eager", dtype=torch.float32).eval()
        by_peft = _difference_by_peft(encoder, base, adapter)
    rows = encoder.token_ids(TEXTS, "document")
    by_transformers = _relative(embeddings, _embed_alone(plain, rows).detach())
    values, gradients = _parity(encoder, plain, rows)
    opened_by = [reader.split()[0].replace("peft", "PEFT") for reader in verified["readers"]]
    readers = dict.fromkeys([*opened_by, "transformers"])
    cells = (row.name, *_trained(encoder.trunk), *_published(row), "packed" if takes_packs(encoder.trunk) else "padded",
             "sgpt, PEFT" if (adapter / PEFT).is_file() else "sgpt", _form(folder / "export", row.family),
             ", ".join(readers))  # fmt: skip
    return Measured(
        float(start), values, gradients, float((loaded - embeddings).abs().max()), by_peft, by_transformers, cells
    )


def _save_base(row: Row, folder: Path) -> Path:
    """A random base whose biases and norms are no zeros and ones, for these would hide a lost one."""
    if family_of(row.family).causal:
        tokenizer = byte_level(start="</s>" if row.family == "opt" else None)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    else:
        tokenizer = word_piece(pad_id=1 if row.family == "mpnet" else 0)  # MPNet's code knows no other
    tokenizer.save_pretrained(folder)
    tokens = {"pad_token_id": tokenizer.pad_token_id}
    if row.family == "modernbert":
        tokens |= {"cls_token_id": 0, "sep_token_id": 0}
    build_small(row, {"vocab_size": len(tokenizer), **tokens}).save_pretrained(folder)
    return folder


def build_small(row: Row, tokens: dict) -> nn.Module:
    torch.manual_seed(0)
    trunk = _model(row, {**row.small, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **tokens})
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1))
    return trunk.eval()


def _model(row: Row, shape: dict) -> nn.Module:
    config = getattr(transformers, f"{row.kind}Config")(**shape)
    return getattr(transformers, f"{row.kind}Model")(config)


@torch.no_grad()
def train_at_random(trunk: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for value in trainable_parameters(trunk).values():
        value.add_(torch.randn(value.shape, generator=generator) * 0.3)


# ---- the reference


def _embed_alone(plain: nn.Module, rows: TokenLists) -> Tensor:
    """[rows, D]: token i of n weighs i / (1 + … + n)."""
    embeddings = []
    for ids in rows:
        hidden = plain(input_ids=torch.tensor([ids])).last_hidden_state[0]  # [T, D]
        weights = torch.arange(1, len(ids) + 1, dtype=hidden.dtype)
        embeddings.append(weights @ hidden / weights.sum())
    return torch.stack(embeddings)


def _parity(encoder: Encoder, plain: nn.Module, rows: TokenLists) -> tuple[dict[str, float], dict[str, float]]:
    """Values and gradients in float64 of the encoder's ways, against `plain`."""
    trunk = copy.deepcopy(encoder.trunk).double()
    ours = Encoder(trunk, encoder.tokenizer, encoder.contract, tokens_per_pack=64)  # two packs or more
    pad_id = encoder.tokenizer.pad_token_id
    ways = {
        "packed" if takes_packs(trunk) else "padded": lambda: ours(rows),
        **{side: lambda side=side: ours.embed(*_padded(rows, side, pad_id)) for side in ("right", "left")},
    }
    plain = plain.double()
    by_name = _tensors_of(plain, trainable_parameters(trunk))
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    for tensor in by_name.values():
        tensor.requires_grad_(True)
    direction = torch.randn(len(rows), encoder.embedding_size, generator=torch.Generator().manual_seed(2)).double()

    def gradient(embeddings: Tensor, tensors: dict[str, Tensor]) -> Gradient:
        loss = (embeddings - direction).square().sum()  # of squares, which cannot cancel to nothing
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)  # BERT's pooler is not reached
        filled = {
            name: torch.zeros_like(tensor) if part is None else part
            for (name, tensor), part in zip(tensors.items(), gradients, strict=True)
        }
        shapes = {name: value.shape for name, value in trainable_parameters(trunk).items()}
        return {name: value.reshape(shapes[name]) for name, value in filled.items()} | {"loss": loss.detach()}

    values, gradients = {}, {}
    with Float64():
        expected = _embed_alone(plain, rows)
        expected_gradient = gradient(expected, by_name)
        for way, embed in ways.items():
            embeddings = embed()
            values[way] = _relative(embeddings.detach(), expected.detach())
            gradients[way] = error(gradient(embeddings, trainable_parameters(trunk)), expected_gradient).worst
    return values, gradients


def _tensors_of(plain: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The reference's own tensors by our names: biases of the same name, or PEFT's, which it adds to the layer."""
    theirs = dict(plain.named_parameters())
    return {
        name: theirs[name] if name in theirs else theirs[f"{name.removesuffix('.bias')}.beft_bias.default"]
        for name in trained
    }


def _padded(rows: TokenLists, side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids, attention_mask [rows, T]."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append([pad_id] * gap + row if side == "left" else row + [pad_id] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def _difference_by_peft(encoder: Encoder, base: Path, adapter: Path) -> float | None:
    if not (adapter / PEFT).is_file():
        return None
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), adapter).eval()
    ids = torch.tensor(encoder.token_ids(TEXTS, "document")[2])[None]
    return _relative(stock(input_ids=ids).last_hidden_state[0], encoder.trunk(input_ids=ids).last_hidden_state[0])


def _relative(measured: Tensor, expected: Tensor) -> float:
    """The worst row's difference, relative to the row's largest number."""
    return float(((measured - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


# ---- the table


def _trained(trunk: nn.Module) -> tuple[str, str]:
    """Biases of one block: of its own, and added."""
    last = max(block_of(name) for name, _ in trunk.named_parameters() if block_of(name) is not None)
    in_block = [name for name in trainable_parameters(trunk) if block_of(name) == last]
    added = len({*in_block} & {*added_biases(trunk)})
    own_of_norms = sum(is_norm(trunk.get_submodule(name.rpartition(".")[0])) for name in in_block)
    own = len(in_block) - added
    norms = f", {own_of_norms} of norms" if own_of_norms else ""
    return f"{own}{norms}" if own else "–", str(added) if added else "–"


def _published(row: Row) -> tuple[str, str]:
    with torch.device("meta"):
        trunk = tune(_model(row, row.shape), TuningConfig("bitfit"))
    return row.published, f"{count_parameters(trunk)[0]:,}"


def _form(folder: Path, family: str) -> str:
    if not (folder / "config.json").is_file():
        assert read_delta(folder)["form"] == "beft"
        return "adapter over the base"
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    assert model_type in (family, "llama"), model_type
    return "whole model" if model_type == family else "whole model, as Llama"


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    for name in names or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(ROWS[name], Path(folder))
        print(line(measured.cells), flush=True)
        print("   ", measured, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
