"""Which parameters learn. Everything else is frozen before the optimizer is built.

`bitfit` (Ben Zaken et al. 2021; SGPT section 4.1): every parameter whose name ends in `bias`, LayerNorm biases included.
Parameters only, never buffers: old GPT-Neo and GPT-J checkpoints call their causal mask `attn.attention.bias`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sgpt.decoder.families import is_norm
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import BELOW_ONE, COUNT, check_ranges

ALTERNATIVES = "use tuning=bitfit_norm (biases and norm gains), tuning=lora or tuning=full, or a base with biases such as GPT-Neo, GPT-2, OPT, Pythia or BLOOM"
GRADIENT_SCALE = 128.0  # over a float16 trunk


@dataclass
class TuningConfig:
    """`name` is a row of TUNINGS; the lora_* fields count for tuning=lora only."""

    name: str = "bitfit"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in TUNINGS:
            raise InputError(f"tuning.name={self.name!r} is unknown; choose one of {', '.join(TUNINGS)}")
        check_ranges(self, "tuning.", lora_rank=COUNT, lora_alpha=COUNT, lora_dropout=BELOW_ONE)


def bitfit(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    chosen = _learn_only(trunk, lambda name: name.endswith("bias"))
    _refuse_without_biases(trunk, chosen)
    return trunk


def bitfit_norm(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """Biases and the gains of every normalisation; works on bias-free families (Llama, Qwen3) too."""
    norms = {name for name, module in trunk.named_modules() if is_norm(module)}
    _learn_only(trunk, lambda name: name.endswith("bias") or name.rpartition(".")[0] in norms)
    return trunk


def full(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    _learn_only(trunk, lambda name: True)
    return trunk


def lora(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """Low-rank adapters on all linear layers, by PEFT; returns the wrapped trunk."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if config.lora_rank > trunk.config.hidden_size:
        raise InputError(f"tuning.lora_rank={config.lora_rank} is more than the width of the base, {trunk.config.hidden_size}; lower it, or set tuning=full")
    return get_peft_model(trunk, LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules="all-linear", task_type="FEATURE_EXTRACTION",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in trunk.modules()),  # GPT-2 keeps its weights transposed
    ))


TUNINGS: dict[str, Callable[[nn.Module, TuningConfig], nn.Module]] = {
    "bitfit": bitfit, "bitfit_norm": bitfit_norm, "full": full, "lora": lora,
}


def tune(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """Freezes all but what the method trains and returns the trunk (wrapped by PEFT for lora).

    What learns is float32 also in a trunk of half precision, which stays frozen as it is: a bias of 1 in bfloat16 would not
    move by less than 0.004. The norms go with their biases; the encoder computes the rest under autocast.
    """
    tuned = TUNINGS[config.name](trunk, config)
    if trunk.dtype.itemsize < 4:
        norms = [module for module in tuned.modules() if is_norm(module)]
        for parameter in (*learning(tuned).values(), *(parameter for norm in norms for parameter in norm.parameters())):
            parameter.data = parameter.data.float()
        if any(parameter.dtype == torch.float16 for parameter in tuned.parameters()):
            _scale_gradients(tuned)
    return tuned


class _Scaled(torch.autograd.Function):
    """The tensor as it is, with a gradient that is larger."""

    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient * GRADIENT_SCALE


def _scale_gradients(trunk: nn.Module) -> None:
    """Inside of the trunk gradients are GRADIENT_SCALE times larger, what learns gets them as they are: float16 ends at 6e-8.

    A token's gradient falls with the number of queries and tokens. Measured on data/nano: 240 times smaller than of 8
    short queries, 1.6 % of the biases' gradient was lost without this and 0.3 % is with it; 4,096 times smaller, 25 % and
    6 %. bfloat16 reaches as far as float32 and needs none.
    """

    def enlarge(module: nn.Module, inputs: tuple, output: ModelOutput) -> None:
        output.last_hidden_state = _Scaled.apply(output.last_hidden_state)

    trunk.register_forward_hook(enlarge)
    for parameter in learning(trunk).values():
        parameter.register_hook(lambda gradient: gradient / GRADIENT_SCALE)


def learning(module: nn.Module) -> dict[str, nn.Parameter]:
    """The learning parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def count(module: nn.Module) -> tuple[int, int]:
    """(learning, total) numbers."""
    return sum(p.numel() for p in learning(module).values()), sum(p.numel() for p in module.parameters())


def _learn_only(trunk: nn.Module, chosen: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(chosen(name))
    return learning(trunk)


def _refuse_without_biases(trunk: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    """GPT-J, the poorest base that SGPT trained, has 6·D biases a layer; Qwen2's q, k and v biases are under 3·D and

    can only shift attention. Below 4·D a layer there is too little to train.
    """
    found, layers, width = sum(p.numel() for p in chosen.values()), trunk.config.num_hidden_layers, trunk.config.hidden_size
    if found < 4 * width * layers:
        tensors = sum(1 for _ in trunk.parameters())
        raise InputError(
            f"tuning=bitfit found {'no' if not chosen else 'too few'} bias parameters in {type(trunk).__name__} "
            f"({len(chosen)} of {tensors} tensors, {found:,} numbers for {layers} layers of width {width}); {ALTERNATIVES}"
        )
