"""The backends that sentence-transformers runs fastest on a CPU, int8 in ONNX Runtime and OpenVINO, called directly.

Its own backend="onnx" and "openvino" need optimum, which is for older versions of transformers. So the model is traced
here with its pooling, quantised as its guide does, and run over batches that sentence-transformers itself tokenises,
longest texts first, as its `encode` does.

    onnx-int8       linear layers in int8, activations in int8 with a scale a batch (onnxruntime.quantization,
                    quantize_dynamic)
    openvino-int8   weights in int8, a scale a row; activations in int8 in groups, as OpenVINO does by itself where
                    weights are; no calibration
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from measure.engines import open_theirs
from measure.given import Setting
from sgpt.encoder.pooling import POOLINGS

INPUTS, OUTPUT = ["input_ids", "attention_mask"], "sentence_embedding"
Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # input_ids and attention_mask [rows, T] -> embeddings [rows, D]


def backend(setting: Setting, name: str, batch_size: int) -> Callable[[list[str]], np.ndarray]:
    """Texts -> embeddings [texts, D] by a row of BACKENDS; its file is made when it is first asked for."""
    model = open_theirs(setting)
    run = BACKENDS[name](model[0].auto_model, Path(setting.folder))

    def encode(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        embeddings = []
        for start in range(0, len(texts), batch_size):
            batch = [texts[row] for row in order[start : start + batch_size]]
            features = model.preprocess(batch, task="document")
            embeddings.append(run({key: features[key].numpy() for key in INPUTS}))
        return np.concatenate(embeddings)[np.argsort(order)]

    return encode


class _Pooled(nn.Module):
    """What is traced: the trunk and weighted mean."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return POOLINGS["weighted_mean"](hidden, attention_mask)


def _traced(trunk: nn.Module, folder: Path) -> Path:
    """model.onnx in float32, compared with torch on another shape than the traced one."""
    file = folder / "model.onnx"
    if file.is_file():
        return file
    pooled = _Pooled(trunk).eval()
    ids, mask = torch.arange(34).view(2, 17) % 100, torch.ones(2, 17, dtype=torch.long)
    axes = {name: {0: "rows", 1: "tokens"} for name in INPUTS}
    with torch.no_grad():
        torch.onnx.export(
            pooled, (ids, mask), file, input_names=INPUTS, output_names=[OUTPUT], dynamic_axes=axes, dynamo=False
        )
        ids, mask = torch.arange(93).view(3, 31) % 100, torch.ones(3, 31, dtype=torch.long)
        mask[1, 20:] = 0
        expected = pooled(ids, mask).numpy()
    given = _onnx_session(file)({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max(), "the traced model is not the model"
    return file


def _onnx_session(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, batch)[0]


def _onnx_int8(trunk: nn.Module, folder: Path) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "int8.onnx"
    if not file.is_file():
        quantize_dynamic(
            _traced(trunk, folder), file, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
        )
    return _onnx_session(file)


def _openvino_int8(trunk: nn.Module, folder: Path) -> Run:
    import openvino

    file = folder / "int8.xml"
    if not file.is_file():
        weights_in_int8(_traced(trunk, folder), folder / "weights.onnx")
        openvino.save_model(openvino.convert_model(folder / "weights.onnx"), file, compress_to_fp16=False)
    options = {"INFERENCE_NUM_THREADS": os.environ["OMP_NUM_THREADS"], "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(file, "CPU", options).create_infer_request()
    return lambda batch: request.infer(batch)[0].copy()


def weights_in_int8(source: Path, target: Path) -> None:
    """Every matrix of a linear layer as int8 with a scale for each output, dequantised in the graph."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    nodes = []
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
            continue
        name = node.input[1]
        tensor = weights.pop(name)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        values, outputs = numpy_helper.to_array(tensor), 0 if transposed else 1
        scale = np.abs(values).max(1 - outputs, keepdims=True) / 127
        codes = np.round(values / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.int8)
        graph.initializer.remove(tensor)
        parts = {"codes": codes, "scale": scale.reshape(-1), "zero": np.zeros(scale.size, np.int8)}
        graph.initializer.extend(numpy_helper.from_array(value, f"{name}.{part}") for part, value in parts.items())
        inputs = [f"{name}.{part}" for part in parts]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=outputs))
    for node in nodes:
        graph.node.insert(0, node)
    onnx.save(model, target)


BACKENDS: dict[str, Callable[[nn.Module, Path], Run]] = {"onnx-int8": _onnx_int8, "openvino-int8": _openvino_int8}
