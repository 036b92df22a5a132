"""Fused operations are transformers' own modules, number for number.

Reference: the module as transformers computes it, and autograd over that, in float64; in bfloat16 what the same
module gives in float32.
"""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from sgpt.decoder.fused import GATED_MLPS, RMS_NORMS, fuse
from tests.training.test_gradient_parity import Float64

WIDTH, TOKENS = 24, 7


def module_of(name: str) -> nn.Module:
    family = name.removesuffix("RMSNorm").removesuffix("MLP")
    modeling = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    torch.manual_seed(0)
    if name in RMS_NORMS:
        module = getattr(modeling, name)(WIDTH, eps=1e-5)
    else:
        configuration = importlib.import_module(f"transformers.models.{family.lower()}")
        shape = {"hidden_size": WIDTH, "intermediate_size": 40, "num_attention_heads": 4}
        config = getattr(configuration, f"{family}Config")(**shape)
        module = getattr(modeling, name)(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1 if name in RMS_NORMS else 0, 0.3)
    return module


def run(module: nn.Module, hidden: Tensor, weights: Tensor) -> list[Tensor]:
    """What it gives, and the gradients of its input and parameters."""
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)
    return [output, *torch.autograd.grad((output * weights).sum(), [hidden, *module.parameters()])]


@pytest.mark.parametrize("name", sorted(RMS_NORMS | GATED_MLPS))
def test_output_and_every_gradient_are_those_of_the_plain_module(name):
    plain = nn.ModuleDict({"last": module_of(name)})
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert "forward" in vars(fused["last"])
    assert "forward" not in vars(plain["last"])
    torch.manual_seed(1)
    hidden, weights = torch.randn(2, TOKENS, WIDTH) * 3, torch.randn(2, TOKENS, WIDTH)
    with Float64():
        expected = run(plain.double()["last"], hidden.double(), weights.double())
        given = run(fused.double()["last"], hidden.double(), weights.double())
    for theirs, ours in zip(expected, given, strict=True):
        assert theirs.dtype == ours.dtype == torch.float64
        assert (theirs - ours).norm() <= 1e-13 * theirs.norm()  # float64 rounds by 1e-16
    rounded = run(fused.bfloat16()["last"], hidden.bfloat16(), weights.bfloat16())
    exact = run(plain.bfloat16().float()["last"], hidden.bfloat16().float(), weights.bfloat16().float())
    for theirs, ours in zip(exact, rounded, strict=True):
        assert (theirs - ours.float()).norm() < 2**-6 * theirs.norm()  # bfloat16 rounds by 2**-9, a few times in a row


def test_gains_of_float32_give_float32_at_the_end_and_the_input_s_dtype_inside_of_blocks():
    norm = module_of("LlamaRMSNorm")
    trunk = nn.ModuleDict({"layers": nn.ModuleList([copy.deepcopy(norm)]), "norm": norm})
    hidden = torch.randn(1, TOKENS, WIDTH).bfloat16()
    assert norm(hidden).dtype == torch.float32
    fuse(trunk)
    assert trunk["layers"][0](hidden).dtype == torch.bfloat16
    assert trunk["norm"](hidden).dtype == torch.float32


def test_a_norm_with_another_formula_and_a_gate_that_is_not_silu_stay_as_they_are():
    from transformers import LlamaConfig
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP

    gated = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=4, hidden_act="gelu"))
    trunk = nn.ModuleList([Gemma2RMSNorm(WIDTH), gated, nn.LayerNorm(WIDTH)])
    fuse(trunk)
    assert not any("forward" in vars(module) for module in trunk.modules())
