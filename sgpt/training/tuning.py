"""Which parameters learn. Everything else is frozen before the optimizer is built.

`bitfit` (Ben Zaken et al. 2021; SGPT section 4.1): every parameter whose name ends in `bias`, LayerNorm biases
included. Parameters only, never buffers: old GPT-Neo and GPT-J checkpoints call their causal mask
`attn.attention.bias`. A base with no biases, or too few, is given some first (sgpt/decoder/added_biases.py).
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sgpt.decoder.added_biases import PLACES, add_biases, place_of
from sgpt.decoder.base_folder import local_folder
from sgpt.decoder.families import block_of, is_norm
from sgpt.decoder.quantised import num_weights, quantised_dtype
from sgpt.encoder.contract import FILE as CONTRACT
from sgpt.encoder.contract import Contract, Origin
from sgpt.encoder.probes import HALVES
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import BELOW_ONE, COUNT, check_choice, check_ranges

log = logging.getLogger(__name__)
ALTERNATIVES = (
    "use tuning=bitfit_norm (biases and norm gains), tuning=lora or tuning=full, "
    "or a base with biases such as GPT-Neo, GPT-2, OPT, Pythia or BLOOM"
)
GRADIENT_SCALE = 128.0  # inside of a float16 trunk; see _scale_gradients


@dataclass
class TuningConfig:
    """Which parameters learn; the lora_* fields have an effect with tuning=lora alone."""

    name: str = "bitfit"
    """Method, a row of TUNINGS."""
    add_biases: str = "all"
    """Which linear layers of a base with too few biases bitfit gives one of zeros: all, attention, mlp or none."""
    layers: str = "all"
    """Which blocks learn: all (of an export of a run, those of the run), or last:10, the last ten and the norm after
    them, with no backward pass before them.
    """
    lora_rank: int = 8
    """Rank of the two matrices that LoRA adds to each linear layer, at most the width of the base."""
    lora_alpha: int = 16
    """Factor on what LoRA adds: the product of the two matrices is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Share of the inputs of LoRA's matrices that is dropped in training, from 0 to below 1."""

    def __post_init__(self) -> None:
        check_choice("tuning.name", self.name, TUNINGS)
        check_choice("tuning.add_biases", self.add_biases, PLACES)
        self.last_blocks()
        check_ranges(self, "tuning.", lora_rank=COUNT, lora_alpha=COUNT, lora_dropout=BELOW_ONE)
        if self.layers != "all" and self.name == "lora":
            raise InputError(f"tuning.layers={self.layers}: tuning=lora adapts all layers; leave it out")

    def last_blocks(self) -> int | None:
        """How many of the last blocks learn; None for all. InputError for anything but all or last:<number>."""
        if self.layers == "all":
            return None
        last, _, number = self.layers.partition(":")
        if last != "last" or not number.isdecimal() or int(number) < 1:
            raise InputError(f"tuning.layers={self.layers!r} is unknown; choose all, or last:<number>, as in last:10")
        return int(number)


def bitfit(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """Every parameter whose name ends in `bias`; where these are too few, zeros are added by `config.add_biases`.

    InputError where they are too few and none can be added.
    """
    if not _add_biases_where_few(trunk, config) and _has_few_biases(trunk):
        raise _too_few_biases(trunk, config.add_biases)
    _learn_only(trunk, lambda name: name.endswith("bias"), config)
    return trunk


def bitfit_norm(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """As `bitfit`, and the gains of every normalisation."""
    _add_biases_where_few(trunk, config)
    norms = _norms(trunk)
    _learn_only(trunk, lambda name: name.endswith("bias") or name.rpartition(".")[0] in norms, config)
    return trunk


def full(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """Every parameter. InputError for a quantised trunk, whose weights are none."""
    if dtype := quantised_dtype(trunk):
        raise InputError(f"tuning=full {of_quantised(dtype)}")
    _learn_only(trunk, lambda name: True, config)
    return trunk


def of_quantised(dtype: str) -> str:
    """Why tuning=full is refused, the end of a sentence."""
    return (
        f"trains every weight, and in {dtype} those of linear layers are frozen; use tuning=bitfit, bitfit_norm or "
        "lora, or model.dtype=float32"
    )


def lora(trunk: nn.Module, config: TuningConfig) -> nn.Module:
    """Low-rank adapters on all linear layers, by PEFT; returns the wrapped trunk."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if config.lora_rank > trunk.config.hidden_size:
        raise InputError(
            f"tuning.lora_rank={config.lora_rank} is more than the width of the base, {trunk.config.hidden_size}; "
            "lower it, or set tuning=full"
        )
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="FEATURE_EXTRACTION",
        # GPT-2 stores its weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in trunk.modules()),
    )
    return get_peft_model(trunk, settings)


BIASES_ALONE = ("bitfit", "bitfit_norm")  # rows of TUNINGS that train what BitFit does
TUNINGS: dict[str, Callable[[nn.Module, TuningConfig], nn.Module]] = {
    "bitfit": bitfit,
    "bitfit_norm": bitfit_norm,
    "full": full,
    "lora": lora,
}


def tune(trunk: nn.Module, config: TuningConfig, base: str = "") -> nn.Module:
    """Freezes all but what the method trains and returns the trunk (wrapped by PEFT for lora).

    base: path of the trunk. Where it is an export of a run that trained biases, these are the ones that learn, in the
    blocks of that run unless `config.layers` says others, and none are added.

    What learns is float32 also in a trunk of half precision, which stays frozen as it is: a bias of 1 in bfloat16 would
    not move by less than 0.004. The norms go with their biases; the encoder computes the rest under autocast.
    """
    before = origin_of(base) if base else Origin()
    if config.name in BIASES_ALONE and before.tuning in BIASES_ALONE:
        config = replace(config, layers=before.layers or "all") if config.layers == "all" else config
        log.info(
            "%s is an export of a run that trained its biases: of these learn the ones in the blocks of "
            "tuning.layers=%s; others, and more by tuning.add_biases, are to be had over that run's own base",
            base, config.layers,
        )  # fmt: skip
        trunk.has_trained_biases = True
    tuned = TUNINGS[config.name](trunk, config)
    if getattr(trunk, "has_trained_biases", False):
        for name, parameter in trainable_parameters(tuned).items():
            if name.endswith("bias") and not parameter.any():  # its class has them, and the run did not
                parameter.requires_grad_(False)
    if trunk.dtype.itemsize >= 4:
        return tuned
    for parameter in trainable_parameters(tuned).values():
        parameter.data = parameter.data.float()
    for module in tuned.modules():
        if is_norm(module):
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
    if any(parameter.dtype == torch.float16 for parameter in tuned.parameters()):
        _scale_gradients(tuned)
    return tuned


def origin_of(base: str) -> Origin:
    """What a base that is an export of ours was made of; nothing is known of any other base."""
    folder = local_folder(base)
    return Contract.load(folder).origin if (folder / CONTRACT).is_file() else Origin()


class _EnlargeGradient(torch.autograd.Function):
    """The tensor as it is, with a gradient that is GRADIENT_SCALE times larger."""

    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient * GRADIENT_SCALE


def _scale_gradients(trunk: nn.Module) -> None:
    """Inside of the trunk gradients are GRADIENT_SCALE times larger, what learns gets them as they are.

    float16 ends at 6e-8, and a token's gradient falls with the number of queries and tokens. Measured on data/nano: 240
    times smaller than of 8 short queries, 1.6 % of the biases' gradient was lost without this and 0.3 % is with it;
    4,096 times smaller, 25 % and 6 %. bfloat16 reaches as far as float32 and needs none.
    """

    def enlarge(module: nn.Module, inputs: tuple, output: ModelOutput) -> None:
        output.last_hidden_state = _EnlargeGradient.apply(output.last_hidden_state)

    trunk.register_forward_hook(enlarge)
    for parameter in trainable_parameters(trunk).values():
        parameter.register_hook(lambda gradient: gradient / GRADIENT_SCALE)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The learning parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """How many numbers learn, and how many there are."""
    learned = sum(parameter.numel() for parameter in trainable_parameters(module).values())
    return learned, num_weights(module)


def precisions(trunk: nn.Module, precision: str) -> dict[str, str]:
    """Types of the frozen and the learning weights of a tuned trunk, and of its computation, for log and manifest.

    precision: `trainer.precision`. Of a trunk in half precision the computation is in its type, by the encoder.
    """
    types = {str(parameter.dtype).removeprefix("torch.") for parameter in trunk.parameters()}
    half = next((name for name in HALVES if name in types), None)
    frozen = quantised_dtype(trunk) or half or "float32"
    return {"frozen": frozen, "trained": "float32", "computed": half or precision}


def _learn_only(trunk: nn.Module, learns: Callable[[str], bool], config: TuningConfig) -> None:
    """Freezes the parameters but those whose name `learns`, in the blocks of `config.layers`."""
    first = _first_block(trunk, config)
    norms = _norms(trunk)
    for name, parameter in trunk.named_parameters():
        block = block_of(name)
        is_last_norm = block is None and name.rpartition(".")[0] in norms and "emb" not in name
        is_late = config.layers == "all" or is_last_norm or (block is not None and block >= first)
        parameter.requires_grad_(is_late and learns(name))


def _first_block(trunk: nn.Module, config: TuningConfig) -> int:
    """Number of the first block that learns. InputError where the trunk has fewer than `config.layers` says."""
    blocks, last = _number_of_blocks(trunk), config.last_blocks()
    if last is None:
        return 0
    if last > blocks:
        raise InputError(
            f"tuning.layers={config.layers}: {type(trunk).__name__} has {blocks} blocks with weights of their own; "
            f"choose all, or last:{blocks} at most"
        )
    return blocks - last


def _number_of_blocks(trunk: nn.Module) -> int:
    """Those that have parameters: one in ALBERT, whose layers share them."""
    numbers = {block_of(name) for name, _ in trunk.named_parameters()} - {None}
    return max(numbers, default=-1) + 1


def _norms(trunk: nn.Module) -> set[str]:
    """Paths of all normalisations."""
    return {name for name, module in trunk.named_modules() if is_norm(module)}


def _add_biases_where_few(trunk: nn.Module, config: TuningConfig) -> list[str]:
    """Names of the new biases. InputError for a choice of some where the base has enough."""
    if not _has_few_biases(trunk):
        if config.add_biases in ("attention", "mlp") and not getattr(trunk, "has_trained_biases", False):
            raise InputError(
                f"tuning.add_biases={config.add_biases} has no effect: {type(trunk).__name__} has enough biases of its "
                "own, and none are added; leave it out"
            )
        return []
    if config.add_biases == "none":
        return []
    few = "few" if _biases(trunk) else "no"
    added = add_biases(trunk, config.add_biases, _first_block(trunk, config))
    in_attention = sum(place_of(name) == "attention" for name in added)
    log.info(
        "%s has %s biases: %d linear layers, %d of attention and %d of the MLP, are given one of zeros, %s numbers "
        "(tuning.add_biases=%s)",
        type(trunk).__name__, few, len(added), in_attention, len(added) - in_attention,
        f"{_count(map(trunk.get_parameter, added)):,}", config.add_biases,
    )  # fmt: skip
    return added


def _biases(trunk: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in trunk.named_parameters() if name.endswith("bias")]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _has_few_biases(trunk: nn.Module) -> bool:
    """Whether it needs more biases than it has; those that were trained before are enough.

    Few are less than 4·D numbers in a layer, counted in the last one, to which biases may have been added alone.
    GPT-J, the poorest base that SGPT trained, has 6·D; Qwen2's q, k and v biases are under 3·D, and can only shift
    attention.
    """
    if getattr(trunk, "has_trained_biases", False):
        return False
    last = _number_of_blocks(trunk) - 1
    in_last = [value for name, value in trunk.named_parameters() if name.endswith("bias") and block_of(name) == last]
    return _count(in_last) < 4 * trunk.config.hidden_size


def _too_few_biases(trunk: nn.Module, where: str) -> InputError:
    """where: tuning.add_biases, by which none were added."""
    biases = _biases(trunk)
    layers, width = trunk.config.num_hidden_layers, trunk.config.hidden_size
    reason = f"with tuning.add_biases={where}"
    if where != "none":
        reason = f"and tuning.add_biases={where} can add none: no layer there is an nn.Linear (fused experts are none)"
    alternatives = ALTERNATIVES if where == "all" else f"set tuning.add_biases=all, {ALTERNATIVES}"
    return InputError(
        f"tuning=bitfit found {'too few' if biases else 'no'} bias parameters in {type(trunk).__name__} "
        f"({len(biases)} of {sum(1 for _ in trunk.parameters())} tensors, {_count(biases):,} numbers for {layers} "
        f"layers of width {width}) {reason}; {alternatives}"
    )
