"""How an export is used: a few lines of Python for each format, which its card shows and a test runs.

Each defines `encode(texts, role)` and ends by printing a few numbers, which the card shows below it.
"""

from collections.abc import Sequence

import numpy as np

from sgpt.encoder.contract import Contract
from sgpt.encoder.probes import Encode

QUERY = "parse a date from a string"
DOCUMENTS = ("strptime makes a date of a text by a format.", "A list keeps its items in the order they were added in.")
SHOWN_NUMBERS = 4  # of the query's embedding
DIGITS = 3
TOKEN_WEIGHTS = {  # of the tokens of a row, by the pooling: from the mask [texts, T]
    "weighted_mean": "mask * mask.cumsum(1)  # 1, 2, 3 …: later tokens have seen more",
    "mean": "mask",
    "last_token": "mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))",
    "cls": "mask * (mask.cumsum(1) == 1)",
}


def snippet(form: str, contract: Contract, folder: str) -> str:
    """The lines for an export in this format. folder: its path, or its id on the model hub."""
    return SNIPPETS[form](contract, folder) + _usage()


def outputs(embed: Encode) -> str:
    """What the lines print."""
    query, documents = embed([QUERY], "query"), embed(list(DOCUMENTS), "document")
    cosines = documents @ query[0] / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
    return f"{_shown(query[0, :SHOWN_NUMBERS])}\n{_shown(cosines)}"


def _shown(numbers: Sequence[float]) -> str:
    return str([round(float(number), DIGITS) for number in numbers])


def _usage() -> str:
    return f'''
query = encode(["{QUERY}"], "query")
documents = encode([
    "{DOCUMENTS[0]}",
    "{DOCUMENTS[1]}",
], "document")
cosines = documents @ query[0] / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
print([round(float(number), {DIGITS}) for number in query[0, :{SHOWN_NUMBERS}]])
print([round(float(cosine), {DIGITS}) for cosine in cosines])
'''


def _sentence_transformers(contract: Contract, folder: str) -> str:
    return f'''import numpy as np
from sentence_transformers import SentenceTransformer  # 6.0 or newer: older versions leave out markers and limits

model = SentenceTransformer("{folder}")

def encode(texts, role):
    return model.encode_query(texts) if role == "query" else model.encode_document(texts)
'''


def _transformers(contract: Contract, folder: str) -> str:
    return f'''import numpy as np
import torch
from transformers import AutoModel, PreTrainedTokenizerFast

folder = "{folder}"
model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
{_encode_by_hand(contract)}'''


def _peft(contract: Contract, folder: str) -> str:
    return f'''import numpy as np
import torch
from peft import AutoPeftModelForFeatureExtraction
from transformers import PreTrainedTokenizerFast

folder = "{folder}"
model = AutoPeftModelForFeatureExtraction.from_pretrained(folder, dtype=torch.float32).eval()
{_encode_by_hand(contract)}'''


def _encode_by_hand(contract: Contract) -> str:
    """Pooling, and length 1, after the model's last hidden states."""
    if contract.pooling == "max":
        pooled = """    embeddings = hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
    embeddings = embeddings.nan_to_num(neginf=0.0)  # a text without a token gives zeros"""
    else:
        pooled = f'''    weights = {TOKEN_WEIGHTS[contract.pooling]}
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)  # a text without a token gives zeros
    embeddings = (hidden * weights.unsqueeze(-1)).sum(1)'''
    unit = "torch.nn.functional.normalize(embeddings, dim=1)" if contract.normalize else "embeddings"
    return f'''
def encode(texts, role):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, subfolder=role)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state  # [texts, T, D]
{pooled}
    return {unit}.numpy()
'''


def _onnx(contract: Contract, folder: str) -> str:
    return f'''import numpy as np
from onnxruntime import InferenceSession
from transformers import PreTrainedTokenizerFast

folder = "{folder}"
session = InferenceSession(f"{{folder}}/onnx/model.onnx")

def encode(texts, role):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, subfolder=role)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    inputs = {{name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}}
    return session.run(["sentence_embedding"], inputs)[0]
'''


def _openvino(contract: Contract, folder: str) -> str:
    return f'''import numpy as np
import openvino
from transformers import PreTrainedTokenizerFast

folder = "{folder}"
exact = {{"INFERENCE_PRECISION_HINT": "f32"}}  # left to itself it computes in bfloat16 where the processor can
model = openvino.compile_model(f"{{folder}}/openvino/openvino_model.xml", "CPU", exact)

def encode(texts, role):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, subfolder=role)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    inputs = {{name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}}
    return model(inputs)["sentence_embedding"]
'''


SNIPPETS = {
    "sentence-transformers": _sentence_transformers,
    "transformers": _transformers,
    "peft": _peft,
    "onnx": _onnx,
    "onnx-int8": _onnx,
    "openvino": _openvino,
}
