"""The encoder as one graph: token ids in, embeddings out, pooling and normalisation inside; ONNX's and OpenVINO's.

A server that knows no weighted mean (text-embeddings-inference, a few lines around ONNX Runtime) so gives the trained
vector. The graph is traced from transformers' own attention over padded rows. Biases that no class of transformers has
a place for are in it like all others.

int8: the weights of linear layers, a scale for each output, and inputs that ONNX Runtime rounds as they come, by one
scale for a whole batch. An input with a few large numbers loses the small ones by that, so layers whose product would
be off by more than LARGEST_ERROR stay in float32. Measured on SmolLM2-135M over hostile texts: the lowest cosine to
float32 is 0.76 with all of 210 layers in int8, and 0.988 with 67 of them in float32, a file of 0.6 times the size.
"""

import copy
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from sgpt.decoder.added_biases import add_named_biases, added_biases
from sgpt.decoder.model_files import first_line
from sgpt.decoder.trunk import token_embeddings
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.pooling import POOLINGS
from sgpt.encoder.probes import PROBE_TEXTS
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES

log = logging.getLogger(__name__)
INPUTS, OUTPUTS = ("input_ids", "attention_mask"), ("last_hidden_state", "sentence_embedding")
OPSET = 17
LARGEST_FILE = 2**31  # bytes of one ONNX file: protobuf counts no further
EXTRA_OF = {"onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}  # package -> extra of pyproject.toml
WEIGHTS_TYPE = "weights"  # key of the graph's metadata
LARGEST_ERROR = 0.08  # of a layer's product in int8, see `int8_errors`; 0.06 and 0.1 give 0.993 and 0.986 there
LEAST_COSINE = 0.98  # of an int8 graph's embeddings to the encoder's; a wrong token, weight or pooling is far below
CALIBRATION = (  # any text does: where the large numbers are is a matter of the weights
    "parse a date from a string",
    "A list keeps its items in the order in which they were added, and an index may be negative.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # [square metres]",
    "In 1969 two people walked on the Moon; 600 million watched, from {Houston} to Tokyo (東京).",
    "what?",
    "naïve café 🙂, 12,345.67 €, https://example.org/a?b=c#d",
    "The committee shall, within thirty days, publish the minutes of each meeting. " * 6,
)
RunGraph = Callable[[np.ndarray, np.ndarray], np.ndarray]  # input_ids, attention_mask [rows, T] int64 -> [rows, D]


class _EmbeddingGraph(nn.Module):
    """What is traced: [rows, T] of padded ids and their mask -> [rows, T, D], [rows, D]."""

    def __init__(self, trunk: nn.Module, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.trunk, self.pool, self.normalize = trunk, POOLINGS[pooling], normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = token_embeddings(self.trunk, input_ids, attention_mask)
        # padding attends to nothing in a row without any token, and NaN times a weight of 0 would be NaN
        hidden = hidden.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)
        pooled = self.pool(hidden, attention_mask)
        return hidden, F.normalize(pooled, dim=1) if self.normalize else pooled


def require(*packages: str) -> None:
    """InputError where a package is not installed, with the extra that has it."""
    missing = [package for package in packages if not is_here(package)]
    if missing:
        extra = EXTRA_OF[missing[0]]
        raise InputError(
            f"this format needs the package {missing[0]}, which is not installed: pip install -e '.[{extra}]'"
        )


def is_here(package: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(package) is not None


def write_graph(encoder: Encoder, file: Path) -> None:
    """Writes the graph of an encoder in float32. InputError for a family that cannot be traced, and beyond 2 GB."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.trunk.parameters())
    family = f"{type(encoder.trunk).__name__} ({encoder.trunk.config.model_type})"
    if size >= LARGEST_FILE:
        raise InputError(
            f"formats=[onnx]: the weights of {encoder.contract.base} are {size / 1e9:.1f} GB, and an ONNX file holds "
            "2 GB at most; use formats=[sentence-transformers] or formats=[transformers]"
        )
    graph = _EmbeddingGraph(_plain(encoder.trunk), encoder.contract.pooling, encoder.contract.normalize).eval()
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    axes = {name: {0: "rows", 1: "tokens"} for name in (*INPUTS, OUTPUTS[0])} | {OUTPUTS[1]: {0: "rows"}}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of values that a trace holds fixed: other shapes are compared by `verify`
            torch.onnx.export(
                graph, (ids, mask), file, input_names=[*INPUTS], output_names=[*OUTPUTS], dynamic_axes=axes,
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, KeyError) as error:
        raise InputError(
            f"formats=[onnx]: {family} cannot be traced into an ONNX graph ({first_line(error)}); use "
            "formats=[sentence-transformers] or formats=[transformers]"
        ) from error


def _plain(trunk: nn.Module) -> nn.Module:
    """The same weights in transformers' own class, whose attention nobody has replaced."""
    implementation = "sdpa" if type(trunk)._supports_sdpa else "eager"
    plain = AutoModel.from_config(
        copy.deepcopy(trunk.config), dtype=torch.float32, attn_implementation=implementation
    )  # fmt: skip
    add_named_biases(plain, added_biases(trunk))
    plain.load_state_dict(trunk.state_dict())
    plain.config.use_cache = False
    plain.counts_positions_itself = getattr(trunk, "counts_positions_itself", False)
    return plain.eval()


def write_int8_graph(encoder: Encoder, graph: Path, file: Path) -> None:
    """Writes the graph again with the weights of linear layers in int8; `graph` is the one in float32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    errors = int8_errors(encoder)
    kept = [_scope(path) for path, error in errors.items() if error > LARGEST_ERROR]
    excluded = []
    for node in onnx.load(graph, load_external_data=False).graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.name.startswith(tuple(kept)):
            excluded += [node.name, f"{node.name}_MatMul"]  # the second is what a Gemm becomes
    log.info("int8: %d of %d linear layers stay in float32, by what int8 would do to them", len(kept), len(errors))
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises in a warning to preprocess the graph, which changes no number
    try:
        quantize_dynamic(
            graph, file, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
            nodes_to_exclude=excluded, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    finally:
        root.setLevel(level)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {WEIGHTS_TYPE: "int8"})
    onnx.save(model, file)


@torch.no_grad()
def int8_errors(encoder: Encoder) -> dict[str, float]:
    """Path of each linear layer -> the error of its product where its inputs are rounded to 8 bits by one scale.

    Of a token the error is a share of the length of its product; of a text the mean over its tokens, among which those
    with small numbers count as much as those with large ones, of which a norm over all would tell alone. The largest
    over the texts of CALIBRATION and the probes, each alone, in both roles.
    """
    errors: dict[str, float] = {}

    def measure(path: str, layer: nn.Module) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            exact = inputs[0].float()
            weight = layer.weight.float() if isinstance(layer, Conv1D) else layer.weight.float().T
            error = (_rounded(exact) - exact) @ weight  # [rows, T, outputs]
            shares = error.norm(dim=-1) / (exact @ weight).norm(dim=-1).clamp(min=1e-9)
            errors[path] = max(errors.get(path, 0.0), float(shares.mean()))

        return hook

    with ExitStack() as hooks:
        for path, layer in encoder.trunk.named_modules():
            if isinstance(layer, nn.Linear | Conv1D):
                hooks.callback(layer.register_forward_pre_hook(measure(path, layer)).remove)
        for role in ROLES:
            for text in (*CALIBRATION, *PROBE_TEXTS):
                encoder.encode([text], role)
    return errors


def _rounded(values: Tensor) -> Tensor:
    """To 256 steps from the smallest to the largest number, of which one is 0: ONNX's DynamicQuantizeLinear."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return (((values / step).round() + zero).clamp(0, 255) - zero) * step


def _scope(path: str) -> str:
    """What the names of a module's nodes begin with: layers.0.mlp.up_proj is /trunk/layers.0/mlp/up_proj/ there."""
    return "/trunk/" + re.sub(r"\.(?!\d)", "/", path) + "/"


def write_openvino(graph: Path, file: Path) -> None:
    """Writes OpenVINO's form of an ONNX graph, its weights in float32."""
    import openvino

    file.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(openvino.Core().read_model(graph), file, compress_to_fp16=False)


def open_onnx_runtime(file: Path) -> tuple[RunGraph, str]:
    """What runs the graph, and the type of its weights: float32 or int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which takes the cores from others
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    kind = session.get_modelmeta().custom_metadata_map.get(WEIGHTS_TYPE, "float32")

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run([OUTPUTS[1]], dict(zip(INPUTS, (ids, mask), strict=True)))[0]

    return run, kind


def open_openvino(file: Path) -> RunGraph:
    """What runs OpenVINO's form, in float32: left to itself it computes in bfloat16 where the processor can."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.compile_model(file, "CPU", settings)

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return model(dict(zip(INPUTS, (ids, mask), strict=True)))[OUTPUTS[1]]

    return run
