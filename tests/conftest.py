"""Small random models of the real classes, saved once and opened by the real loading code, with tokenizers trained
here.
"""

import argparse
import copy
import inspect
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.starts import Forks, forks, small_training

REAL_GPT2 = Path(__file__).parents[2] / "shared" / "models" / "tokenizer-gpt2"
END = "<|endoftext|>"
POSITIONS = 128
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
WIDTH = {**SIZES, "intermediate_size": 64}
OLD_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", OLD_SIZES),
    "gpt_neo": ("GPTNeo", {**SIZES, "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "gptj": ("GPTJ", {**OLD_SIZES, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", WIDTH),
    "opt": ("OPT", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("Llama", {**WIDTH, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {**WIDTH, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**WIDTH, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("Mistral", {**WIDTH, "num_key_value_heads": 2, "sliding_window": 16}),
    "gemma": ("Gemma", {**WIDTH, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}),
    "gemma3_text": ("Gemma3Text", {
        **WIDTH, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
    "smollm3": ("SmolLM3", {**WIDTH, "num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "phi": ("Phi", WIDTH),
    "phi3": ("Phi3", {**WIDTH, "num_key_value_heads": 2, "pad_token_id": 0}),
    "bert": ("Bert", WIDTH),
}
BIASES_ADDED = {"qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "smollm3", "phi3"}  # by bitfit, having too few
LIMITS = {"query_max_tokens": 24, "document_max_tokens": 40}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A pytest that a script has started in the background ignores Ctrl-C, and so would all that it starts; inside of
    this it does not.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_base(family, *, real_tokenizer=False): folder of a 2-layer, 32-wide base, saved once a session. Biases are
    not zero.
    """
    saved: dict[tuple[str, bool], Path] = {}

    def make(family: str, *, real_tokenizer: bool = False) -> Path:
        if (family, real_tokenizer) not in saved:
            folder = tmp_path_factory.mktemp(family)
            tokenizer = _tokenizer(family, real_tokenizer)
            tokenizer.save_pretrained(folder)
            random_trunk(family, len(tokenizer)).save_pretrained(folder)
            saved[family, real_tokenizer] = folder
        return saved[family, real_tokenizer]

    return make


@pytest.fixture(scope="session")
def tiny_encoder(tiny_base: Callable[..., Path]) -> Callable[..., Encoder]:
    """tiny_encoder(family, markers="brackets", *, pooling, normalize, real_tokenizer, dtype, **MarkersConfig fields): a
    new encoder each call.
    """

    def make(
        family: str = "gpt_neo", markers: str = "brackets", *, pooling: str = "weighted_mean", normalize: bool = False,
        real_tokenizer: bool = False, dtype: str = "float32", **limits,
    ) -> Encoder:  # fmt: skip
        base = str(tiny_base(family, real_tokenizer=real_tokenizer))
        contract = Contract(pooling, MarkersConfig(markers, **{**LIMITS, **limits}), normalize, base)
        return Encoder(load_trunk(ModelConfig(base, dtype)), load_tokenizer(base), contract)

    return make


def save_moved(encoder: Encoder, seed: int, folder: Path, tuning: str = "bitfit") -> Path:
    """The adapter of a copy of the encoder, in which what `tuning` trains was moved at random.

    One number of each tensor is 1e-10 then, which is lost in base + (trained - base).
    """
    trunk = tune(copy.deepcopy(encoder.trunk), TuningConfig(tuning))
    before = {name: value.detach().clone() for name, value in trainable_parameters(trunk).items()}
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in trainable_parameters(trunk).values():
            value.add_(torch.randn_like(value) * 0.1).flatten()[0] = 1e-10
    return save_adapter(trunk, encoder.tokenizer, encoder.contract, before, folder)


@pytest.fixture(scope="session")
def tiny_delta(
    tiny_encoder: Callable[..., Encoder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """tiny_delta(family, seed, tuning="bitfit", **tiny_encoder's options): an adapter folder, saved once a session."""
    saved: dict[str, Path] = {}

    def make(family: str, seed: int, tuning: str = "bitfit", **options) -> Path:
        key = f"{family}{seed}{tuning}{options}"
        if key not in saved:
            folder = tmp_path_factory.mktemp("run") / "adapter"
            saved[key] = save_moved(tiny_encoder(family, **options), seed, folder, tuning)
        return saved[key]

    return make


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]) -> Callable[[str], Path]:
    """language_model(family): folder of a tiny causal language model with its tokenizer, saved once a session. Biases
    are not zero.
    """
    saved: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in saved:
            folder = tmp_path_factory.mktemp(f"{family}_lm")
            tokenizer = AutoTokenizer.from_pretrained(tiny_base(family))
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_base(family)))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            saved[family] = folder
        return saved[family]

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], str]:
    """hub(name, folder): the folder is had by this id as from the model hub, whose network this stands in for."""
    published: dict[str, Path] = {}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "hub" / name / "snapshots" / "1"
        files = [file.relative_to(published[name]) for file in published[name].rglob("*") if file.is_file()]
        for file in filter_repo_objects(map(str, files), allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(published[name] / file, snapshot / file)
        return str(snapshot)

    def publish(name: str, folder: Path) -> str:
        published[name] = folder
        return name

    monkeypatch.setattr("sgpt.decoder.base_folder.snapshot_download", snapshot_download)
    return publish


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """start(script, *overrides, limit=None): runs train/<script>.py in a folder of the module's own."""
    return forks(tmp_path_factory.mktemp("starts"))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_base) -> Callable[[Path], list[str]]:
    """training(place): overrides of a run of four steps, which writes below `place` alone."""
    return small_training(tmp_path_factory.mktemp("data"), tiny_base("gpt2"))


def random_trunk(family: str, vocabulary: int, seed: int = 0, **changed) -> nn.Module:
    name, shape = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **{**shape, **changed}
    )
    torch.manual_seed(seed)
    trunk = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        # initialised biases are zero, and a lost zero is not seen
        for parameter_name, parameter in trunk.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter_name.endswith("bias") else 0.1))
    return trunk.eval()


def _tokenizer(family: str, real: bool) -> PreTrainedTokenizerFast:
    if real:
        if not REAL_GPT2.is_dir():
            pytest.skip(f"no GPT-2 tokenizer at {REAL_GPT2}")
        return PreTrainedTokenizerFast.from_pretrained(REAL_GPT2)
    return word_piece() if family == "bert" else byte_level(start="</s>" if family == "opt" else None)


def byte_level(start: str | None = None) -> PreTrainedTokenizerFast:
    """BPE in which `?]`, `[[` and `}}` are tokens. start: a special token before every text, as OPT has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, *([start] if start else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False
    )
    tokenizer.train_from_iterator([inspect.getsource(argparse), "what?] [[1]] {{a}} why?} " * 200], trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=start or END)


def word_piece(pad_id: int = 0) -> PreTrainedTokenizerFast:
    """BERT's: [CLS] before, [SEP] after, lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    specials.insert(pad_id, "[PAD]")
    tokenizer.train_from_iterator(
        [inspect.getsource(argparse)],
        trainers.WordPieceTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    )
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]"
    )
