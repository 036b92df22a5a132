"""What learns: the counts of the SGPT models, and after a step exactly those tensors have changed."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sgpt.decoder.added_biases import added_biases
from sgpt.decoder.trunk import ModelConfig, load_trunk
from sgpt.runtime.errors import InputError
from sgpt.training.optim import OptimConfig, build_optimizer
from sgpt.training.tuning import TuningConfig, count_parameters, trainable_parameters, tune


def gpt_neo(width: int, layers: int, heads: int) -> GPTNeoConfig:
    return GPTNeoConfig(
        hidden_size=width, num_layers=layers, num_heads=heads, attention_types=[[["global", "local"], layers // 2]]
    )


def on_meta(config: PretrainedConfig) -> torch.nn.Module:
    """Shapes without memory: 6 billion parameters in a second."""
    with torch.device("meta"):
        return AutoModel.from_config(config)


# Muennighoff 2022 and its repository: biases of attention outputs, MLPs and all LayerNorms, the last one included
SGPT_COUNTS = {
    "gpt-neo-125m": (gpt_neo(768, 12, 12), 74_496),
    "gpt-neo-1.3b": (gpt_neo(2048, 24, 16), 395_264),
    "gpt-neo-2.7b": (gpt_neo(2560, 32, 20), 657_920),
    "gpt-j-6b": (GPTJConfig(), 692_224),  # 175e9 / 692,224: the paper's "250,000 times fewer"
    "gpt2": (GPT2Config(), 102_144),
    "bloom-1b7": (BloomConfig(hidden_size=2048, n_layer=24, n_head=16), 544_768),
    "bloom-7b1": (BloomConfig(hidden_size=4096, n_layer=30, n_head=32), 1_359_872),
    "bert-base": (BertConfig(), 102_912),
}


@pytest.mark.parametrize("name", SGPT_COUNTS)
def test_bitfit_trains_as_many_numbers_as_the_original(name):
    config, expected = SGPT_COUNTS[name]
    trunk = tune(on_meta(config), TuningConfig("bitfit"))
    assert count_parameters(trunk)[0] == expected
    assert all(parameter.endswith("bias") for parameter in trainable_parameters(trunk))


def test_bert_base_has_109_million_numbers_of_which_0_094_percent_learn():
    learned, total = count_parameters(tune(on_meta(BertConfig()), TuningConfig("bitfit")))
    assert total == 109_482_240
    assert round(100 * learned / total, 3) == 0.094


def test_buffers_called_bias_are_never_chosen(tiny_base):
    trunk = tune(load_trunk(ModelConfig(str(tiny_base("gpt_neo")))), TuningConfig("bitfit"))
    masks = [name for name, _ in trunk.named_buffers() if name.endswith("bias")]
    assert masks  # GPT-Neo's causal mask is a buffer of that name
    assert not set(masks) & trainable_parameters(trunk).keys()
    assert not any(buffer.requires_grad for buffer in trunk.buffers())


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LlamaConfig(**TINY), r"no bias parameters in LlamaModel \(0 of 20 tensors"),
        # q, k and v only
        (Qwen2Config(**TINY), r"too few bias parameters in Qwen2Model \(6 of 26 tensors, 128 numbers"),
        (Qwen3Config(**TINY, head_dim=8), r"no bias parameters in Qwen3Model"),
    ],
    ids=["llama", "qwen2", "qwen3"],
)
def test_bitfit_refuses_a_base_without_enough_biases_and_names_the_alternatives(config, problem):
    alternatives = (
        r".*add_biases=none; set tuning.add_biases=all, use tuning=bitfit_norm .* tuning=lora or tuning=full, "
        "or a base with biases such as GPT-Neo"
    )
    with pytest.raises(InputError, match=problem + alternatives):
        tune(on_meta(config), TuningConfig("bitfit", add_biases="none"))


@pytest.mark.parametrize(("where", "numbers"), [("all", 155_520), ("attention", 46_080), ("mlp", 109_440)])
def test_smollm2_is_given_as_many_biases_as_its_class_has_when_its_config_says_so(where, numbers):
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 50,
    }  # fmt: skip
    trunk = tune(on_meta(LlamaConfig(**shape)), TuningConfig("bitfit", add_biases=where))
    switched = LlamaConfig(**shape, attention_bias=where in ("all", "attention"), mlp_bias=where in ("all", "mlp"))
    biases = {name for name, _ in on_meta(switched).named_parameters() if name.endswith("bias")}
    assert trainable_parameters(trunk).keys() == biases
    assert count_parameters(trunk)[0] == numbers


def test_a_base_with_biases_of_its_own_is_given_none():
    before = {name for name, _ in on_meta(gpt_neo(768, 12, 12)).named_parameters()}  # q, k and v have no bias there
    trunk = tune(on_meta(gpt_neo(768, 12, 12)), TuningConfig("bitfit"))
    assert {name for name, _ in trunk.named_parameters()} == before
    with pytest.raises(InputError, match=r"tuning\.add_biases=mlp has no effect: GPTNeoModel has enough biases"):
        tune(on_meta(gpt_neo(768, 12, 12)), TuningConfig("bitfit", add_biases="mlp"))


@pytest.mark.parametrize(
    ("config", "method", "expected"),
    [
        (LlamaConfig(**TINY | {"num_hidden_layers": 4}), "bitfit", {"2", "3"}),
        (GPT2Config(n_layer=4), "bitfit", {"2", "3", "ln_f"}),
        (LlamaConfig(**TINY | {"num_hidden_layers": 4}), "bitfit_norm", {"2", "3", "norm"}),
        (BloomConfig(n_layer=4), "bitfit_norm", {"2", "3", "ln_f"}),  # and not the norm of the embeddings
        (GPT2Config(n_layer=4), "full", {"2", "3", "ln_f"}),
    ],
    ids=["llama", "gpt2", "llama-norm", "bloom-norm", "gpt2-full"],
)
def test_only_the_last_blocks_and_the_norm_after_them_learn(config, method, expected):
    trunk = tune(on_meta(config), TuningConfig(method, layers="last:2"))
    parts = {name.split(".")[1] if name.split(".")[0] in ("layers", "h") else name.split(".")[0]
             for name in trainable_parameters(trunk)}  # fmt: skip
    assert parts == expected


@pytest.mark.parametrize("layers", ["last", "last:0", "last:-1", "first:2", "2", "last:2.5", ""])
def test_other_words_for_layers_are_refused(layers):
    with pytest.raises(InputError, match=r"tuning.layers=.* is unknown; choose all, or last:<number>"):
        TuningConfig(layers=layers)


def test_the_last_of_all_blocks_are_not_the_embeddings_and_more_are_refused():
    trunk = tune(on_meta(BloomConfig(n_layer=2)), TuningConfig("full", layers="last:2"))
    assert {name.split(".")[0] for name in trainable_parameters(trunk)} == {"h", "ln_f"}
    for config in (BloomConfig(n_layer=2), LlamaConfig(**TINY)):
        with pytest.raises(InputError, match=r"tuning.layers=last:3: .*Model has 2 blocks .* or last:2 at most"):
            tune(on_meta(config), TuningConfig(layers="last:3"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_biases_are_added_by_the_methods_that_train_biases_alone(method, tiny_base):
    trunk = load_trunk(ModelConfig(str(tiny_base("qwen3"))))
    before = {name for name, _ in trunk.named_parameters()}
    tuned = tune(trunk, TuningConfig(method))
    assert not added_biases(trunk)
    names = {name.replace(".base_layer", "").removeprefix("base_model.model.") for name, _ in tuned.named_parameters()}
    assert {name for name in names if ".lora_" not in name} == before


def test_lora_refuses_layers():
    with pytest.raises(InputError, match=r"tuning.layers=last:2: tuning=lora adapts all layers; leave it out"):
        TuningConfig("lora", layers="last:2")


def test_bitfit_norm_trains_the_gains_of_llama_alone_where_no_biases_are_added():
    trunk = tune(on_meta(LlamaConfig(**TINY)), TuningConfig("bitfit_norm", add_biases="none"))
    layers = [f"layers.{i}.{norm}.weight" for i in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")]
    assert sorted(trainable_parameters(trunk)) == sorted([*layers, "norm.weight"])


def test_bitfit_norm_trains_biases_and_gains_of_gpt_neo():
    trunk = on_meta(gpt_neo(768, 12, 12))
    learned, _ = count_parameters(tune(trunk, TuningConfig("bitfit_norm")))
    assert learned == 74_496 + (2 * 12 + 1) * 768  # and the gains of two norms a layer and of the last


def test_full_trains_everything():
    learned, total = count_parameters(tune(on_meta(GPT2Config()), TuningConfig("full")))
    assert learned == total == 124_439_808  # GPT-2 small without a head


@pytest.mark.bitwise
@pytest.mark.parametrize("method", ["bitfit", "bitfit_norm", "full", "lora"])
def test_a_step_changes_exactly_the_learning_tensors_bit_for_bit(method, tiny_encoder):
    encoder = tiny_encoder("gpt_neo", query_max_tokens=20)
    encoder.trunk = tune(encoder.trunk, TuningConfig(method))
    state = {name: tensor.clone() for name, tensor in encoder.trunk.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in encoder.trunk.named_buffers()}
    optimizer = build_optimizer(trainable_parameters(encoder.trunk), OptimConfig(weight_decay=0.1))
    for _ in range(2):  # LoRA's A has no gradient in the first step, as its B begins at zero
        optimizer.zero_grad()
        embeddings = encoder(encoder.token_ids(["parse a date", "from a string of words"] * 3, "query"))
        (embeddings.square() * torch.linspace(0, 1, 32)).sum().backward()
        optimizer.step()
    changed = {name for name, tensor in encoder.trunk.state_dict().items() if not torch.equal(tensor, state[name])}
    expected = {
        "bitfit": lambda name: name.endswith(".bias"),
        "bitfit_norm": lambda name: name.endswith(".bias") or ".ln_" in f".{name}",
        "full": lambda name: True,
        "lora": lambda name: ".lora_A." in name or ".lora_B." in name,
    }[method]
    assert changed == {name for name in state if expected(name)}
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.trunk.named_buffers())


def test_vectors_are_not_decayed():
    parameters = trainable_parameters(tune(on_meta(GPT2Config()), TuningConfig("full")))
    groups = build_optimizer(parameters, OptimConfig()).param_groups
    decays = {(p.ndim > 1, group["weight_decay"]) for group in groups for p in group["params"]}
    assert decays == {(True, 0.01), (False, 0.0)}


def test_an_unknown_method_is_refused():
    with pytest.raises(
        InputError, match=r"tuning\.name='prefix' is unknown; choose bitfit, bitfit_norm, full or lora"
    ):
        TuningConfig("prefix")


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "llama", "bert"])
def test_over_a_bfloat16_trunk_the_biases_learn_in_float32(family, tiny_encoder):
    encoder = tiny_encoder(family, dtype="bfloat16")
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit"))
    frozen = {name: p.clone() for name, p in encoder.trunk.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(trainable_parameters(encoder.trunk), OptimConfig(learning_rate=1e-5))
    before = {name: p.clone() for name, p in trainable_parameters(encoder.trunk).items()}
    encoder(encoder.token_ids(["parse a date", "from a string of words"], "query")).float().square().mul(
        torch.linspace(0, 1, 32)
    ).sum().backward()
    optimizer.step()
    assert {p.dtype for p in before.values()} == {torch.float32}
    # a step of 1e-5 is lost in bfloat16, whose next number after 0.3 is 0.002 away
    wanted = {
        name: p
        for name, p in trainable_parameters(encoder.trunk).items()
        if p.grad is not None and p.grad.abs().max() > 1e-4
    }  # nobody asks BERT's pooler
    assert all((p != before[name]).any() for name, p in wanted.items())
    assert all(torch.equal(p, frozen[name]) for name, p in encoder.trunk.named_parameters() if name in frozen)
    assert {p.dtype for name, p in encoder.trunk.named_parameters() if p.ndim > 1 and name in frozen} == {
        torch.bfloat16
    }
