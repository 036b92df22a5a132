"""The encoder as one graph: token ids in, embeddings out, pooling and normalisation inside; ONNX's and OpenVINO's.

A server that knows no weighted mean (text-embeddings-inference, a few lines around ONNX Runtime) so gives the trained
vector. The graph is traced from transformers' own attention over padded rows. Biases that no class of transformers has
a place for are in it like all others.

int8: every linear layer multiplies 8-bit inputs, a scale for each token, by 8-bit weights, a scale for each output, in
operations of plain ONNX. So an embedding does not depend on what it is batched with, as it does where a whole batch has
one scale (`quantize_dynamic` of ONNX Runtime). A few channels of a decoder's hidden states are a hundred times larger
than the others, and would leave them nothing: each channel of an input is divided by what its weights are multiplied
with, which changes no product (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438). Lowest cosine to float32, SmolLM2-135M
over hostile texts: 0.76 by `quantize_dynamic`, 0.90 with a scale for each token, 0.987 with balanced channels as well.
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
BALANCE = 0.65  # the inputs' share in what is balanced; over short texts 0.5 gives 0.984, 0.65 0.991 and 0.8 0.986
LEAST_COSINE = 0.98  # of an int8 graph to the encoder: SmolLM2 has 0.987; a wrong token, weight or pooling is far below
CALIBRATION = (  # with the probes; any texts do: which channels are large is a matter of the weights
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
    """Writes the graph again with the linear layers in int8; `graph` is the one in float32."""
    import onnx

    largest = largest_inputs(encoder)
    model = onnx.load(graph)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    multiplied = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    products = {node.name: node for node in multiplied if node.input[1] in constants}
    layers: dict[str, tuple[str, np.ndarray]] = {}  # name of the node -> path of the module, weights [inputs, outputs]
    for name, node in products.items():
        path = next((path for path in largest if name.startswith(_scope(path))), None)
        if path is not None:
            layers[name] = path, _weights_of(node, constants[node.input[1]])
    int8 = _Int8Operations()
    nodes = []
    for node in model.graph.node:
        if node.name in layers:
            together = [layers[other.name] for other in model.graph.node if other.input[:1] == node.input[:1]
                        and other.name in layers]  # fmt: skip
            path, weights = layers[node.name]
            nodes += int8.product(node, weights, _balance(largest[path], [other for _, other in together]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in (*model.graph.initializer, *int8.constants) if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.helper.set_model_props(model, {WEIGHTS_TYPE: "int8"})
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    log.info("int8: %d linear layers", len(layers))
    if left := len(products.keys() - layers.keys()):
        log.warning("%s: %d products by weights stay in float32, as their names are of no linear layer", file, left)


def _weights_of(node, constant) -> np.ndarray:
    """[inputs, outputs] of a MatMul or Gemm, whose attributes say which way round they are stored."""
    from onnx import numpy_helper

    weights = numpy_helper.to_array(constant)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weights.T if transposed else weights


def _balance(largest: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """[inputs]: what each channel of an input is divided by, the same for all layers that read it.

    Larger inputs and smaller weights give more. largest: absolute numbers of each channel.
    """
    of_weights = np.max([np.abs(one).max(1) for one in weights], axis=0).clip(min=1e-6)
    of_inputs = largest.clip(min=1e-5)
    balance = of_inputs**BALANCE / of_weights ** (1 - BALANCE)
    return (balance / balance.mean()).astype(np.float32)


class _Int8Operations:
    """Nodes for products in int8, and the constants that they read. An input that several layers read is rounded once.
    """

    def __init__(self) -> None:
        self.constants: list = []
        self.rounded: dict[str, tuple[str, str]] = {}  # name of an input -> names of its 8 bits and of their scales
        self.steps = self._constant("int8/steps", np.float32(127))
        self.smallest = self._constant("int8/smallest", np.float32(1e-12))
        self.middle = self._constant("int8/middle", np.float32(128))
        self.zero = self._constant("int8/zero", np.uint8(128))  # MatMulInteger is fastest with unsigned inputs

    def _constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def product(self, node, weights: np.ndarray, balance: np.ndarray) -> list:
        """In place of a MatMul or Gemm. weights [inputs, outputs]; balance [inputs], see `_balance`."""
        from onnx import TensorProto, helper

        name = f"int8{node.name}"
        balanced = weights * balance[:, None]
        scales = (np.abs(balanced).max(0) / 127).clip(min=1e-12).astype(np.float32)  # [outputs]
        bits = self._constant(f"{name}/weights", np.round(balanced / scales).astype(np.int8))
        scales = self._constant(f"{name}/scales", scales)
        nodes = []
        if node.input[0] not in self.rounded:
            nodes += self._rounding(node.input[0], name, balance)
        given, of_tokens = self.rounded[node.input[0]]
        has_bias = len(node.input) > 2
        last = f"{name}/product" if has_bias else node.output[0]
        nodes += [
            helper.make_node("MatMulInteger", [given, bits, self.zero], [f"{name}/sum"], name=f"{name}/MatMulInteger"),
            helper.make_node("Cast", [f"{name}/sum"], [f"{name}/float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}/float", of_tokens], [f"{name}/scaled"]),
            helper.make_node("Mul", [f"{name}/scaled", scales], [last]),
        ]
        if has_bias:
            nodes.append(helper.make_node("Add", [last, node.input[2]], [node.output[0]]))
        return nodes

    def _rounding(self, given: str, name: str, balance: np.ndarray) -> list:
        """Of an input [rows, T, inputs]: each token to 127 steps on either side of 0."""
        from onnx import TensorProto, helper

        inverse = self._constant(f"{name}/balance", 1 / balance)
        self.rounded[given] = f"{name}/bits", f"{name}/step"
        return [
            helper.make_node("Mul", [given, inverse], [f"{name}/balanced"]),
            helper.make_node("Abs", [f"{name}/balanced"], [f"{name}/absolute"]),
            helper.make_node("ReduceMax", [f"{name}/absolute"], [f"{name}/largest"], axes=[-1], keepdims=1),
            helper.make_node("Max", [f"{name}/largest", self.smallest], [f"{name}/range"]),
            helper.make_node("Div", [f"{name}/range", self.steps], [f"{name}/step"]),
            helper.make_node("Div", [f"{name}/balanced", f"{name}/step"], [f"{name}/stepped"]),
            helper.make_node("Round", [f"{name}/stepped"], [f"{name}/whole"]),
            helper.make_node("Add", [f"{name}/whole", self.middle], [f"{name}/unsigned"]),
            helper.make_node("Cast", [f"{name}/unsigned"], [f"{name}/bits"], to=TensorProto.UINT8),
        ]


@torch.no_grad()
def largest_inputs(encoder: Encoder) -> dict[str, np.ndarray]:
    """Path of each linear layer -> the largest absolute number in each channel of its inputs.

    Over the texts of CALIBRATION and the probes in both roles.
    """
    largest: dict[str, Tensor] = {}

    def measure(path: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            now = inputs[0].float().abs().flatten(0, -2).amax(0)
            largest[path] = torch.maximum(largest.get(path, now), now)

        return hook

    with ExitStack() as hooks:
        for path, layer in encoder.trunk.named_modules():
            if isinstance(layer, nn.Linear | Conv1D):
                hooks.callback(layer.register_forward_pre_hook(measure(path)).remove)
        for role in ROLES:
            encoder.encode([*CALIBRATION, *PROBE_TEXTS], role)
    return {path: values.cpu().numpy() for path, values in largest.items()}


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
