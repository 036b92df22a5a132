"""A GGUF file as a base: its weights, dequantised, and its tokenizer in an ordinary folder, made once.

transformers opens GGUF files with the package gguf, but cannot save what it opened, and leaves out without a word what
it does not know: tensors, scaled rotary frequencies, the rule by which some tokenizers split a text. Here these are
carried over or refused, so that the folder computes what the file says.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sgpt.decoder.gguf_config import settle
from sgpt.decoder.model_files import LFS_POINTER, check_names, first_line
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import check_writable, hash_of, make_once, replace_folder

log = logging.getLogger(__name__)
MAGIC = b"GGUF"
FORM = 2  # of the folder; another one gets another name
ROTARY = "rope_freqs.weight"  # what each rotary frequency is divided by, as the converter of llama.cpp writes it
# tokenizer.ggml.pre: rules by which a byte-level tokenizer splits a text first, where they are not those of GPT-2.
# Published (tokenizer.json of SmolLM2 and StarCoder2) as digits one by one, then GPT-2's rule; transformers leaves the
# digits out, so "x  12" got other ids.
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell")
# Those whose texts begin with a special token where the file does not say otherwise, as older files of Llama 3.
BEGINS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "chameleon")
AS_GPT2 = ("gpt-2", "olmo", "mpt", "jais", "phi-2", "dolly", "gpt3-finnish")


def converted(file: Path, folders: Path) -> Path:
    """The folder below `folders` with the model of a GGUF file: safetensors in float32, config and tokenizer.

    Its name holds the hash of the file's content. It is made where it is not there, by one process while others wait
    for it; a kill leaves none. Raises InputError for a file that is no whole GGUF file, and for a model that would not
    be computed as the file says.
    """
    check_magic(file)
    stat = file.stat()
    digest = _hash_of_content(file.resolve(), stat.st_size, stat.st_mtime_ns)
    folder = folders / f"{file.stem}-{digest[:16]}-{FORM}"
    if not folder.is_dir():
        check_writable(folder, "another working folder")
    make_once(folder, folder.is_dir, lambda: _convert(file, folder))
    return folder


@cache
def _hash_of_content(file: Path, size: int, changed: int) -> str:
    """The hash of a file that still is as its size and time of change say: read once a process."""
    return hash_of(file)


def check_magic(file: Path) -> None:
    """Refuses what does not begin as a GGUF file, by what it is."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if start == LFS_POINTER:
        raise InputError(
            f"{file}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`, or download the file again"
        )
    if not start.startswith(MAGIC):
        raise InputError(f"{file}: is no GGUF file (it begins with {start[:4]!r}); download it again")


def _convert(file: Path, folder: Path) -> None:
    started = time.monotonic()
    log.info("%s: its weights are dequantised into %s, once", file, folder)
    metadata, tensors = _read(file)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with tempfile.TemporaryDirectory() as alone:  # transformers prefers a tokenizer.json that lies next to the file
        linked = Path(alone, file.name)
        linked.symlink_to(file.absolute())
        model = _model(file, linked, metadata, tensors)
        tokenizer = _tokenizer(file, linked, metadata)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error.strerror or first_line(error)}); make room") from error
    size = sum(value.nbytes for value in model.parameters())
    log.info("%s: %.1f MB in float32, after %.0f s", folder, size / 1e6, time.monotonic() - started)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata without the vocabulary, by key, and the file's tensors by name.

    InputError when it is cut or damaged, or holds no tokenizer.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"{file}: GGUF files are opened with the package gguf, which is not installed; "
            "pip install 'sgpt-framework[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
        metadata["general.architecture"]
    except Exception as error:  # of struct, of numpy, of gguf
        raise InputError(
            f"{file}: is cut or damaged, or of another version of GGUF ({first_line(error)}); download it again"
        ) from error
    if metadata.get("tokenizer.ggml.model", "none") == "none":
        raise InputError(f"{file}: holds no tokenizer; give a GGUF file that has one, or the model's own folder")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _model(file: Path, linked: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> PreTrainedModel:
    """The model as transformers opens it, dequantised, in an instance that can be saved.

    linked: the same file in a folder of its own.
    """
    architecture = metadata["general.architecture"]
    try:
        from transformers import GgufConfig

        opened, report = AutoModelForCausalLM.from_pretrained(
            linked.parent, gguf_file=linked.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # whatever transformers raises over a file that it cannot open
        raise InputError(
            f"{file}: transformers {transformers.__version__} cannot open a GGUF file of the architecture "
            f"{architecture!r} ({first_line(error)}); give the model's folder with safetensors instead"
        ) from error
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"], key=str)[0]
        raise InputError(
            f"{file}: {name} is stored as {tuple(stored)} and transformers {transformers.__version__} makes it "
            f"{tuple(wanted)}, so it reads this {architecture} wrongly; give the model's folder with "
            "safetensors instead"
        )
    check_names(str(file), opened, report)
    config = opened.config
    _refuse_lost_tensors(file, opened, tensors)
    _scale_positions(file, metadata, tensors, config)
    settle(file, metadata, config)
    for key in ("quantization_config", "_model_name_or_path"):  # it is dequantised now; no path, but a title
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"):
        model = type(opened)(config)
    model.load_state_dict(opened.state_dict(), assign=True)
    model.tie_weights()
    return model


def _refuse_lost_tensors(file: Path, model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
    """As many numbers in the model as in the file: transformers passes over tensors that it has no name for."""
    unread = {ROTARY}
    if model.config.tie_word_embeddings:
        unread.add("output.weight")  # the embedding table again
    stored = sum(int(tensor.n_elements) for name, tensor in tensors.items() if name not in unread)
    read = sum(parameter.numel() for parameter in model.parameters())
    if stored != read:
        biases = [name for name in tensors if name.endswith(".bias")]
        example = f", such as {biases[0]}," if biases and stored > read else ""
        raise InputError(
            f"{file}: holds {stored:,} numbers and {type(model).__name__} of transformers {transformers.__version__} "
            f"takes {read:,}, so some tensors{example} would be left out; give the model's folder with safetensors "
            "instead"
        )


def _scale_positions(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], config) -> None:
    """Puts the scaled rotary frequencies of Llama 3 into the config; refuses other ones, which would be lost."""
    scaling = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    known = getattr(config, "rope_parameters", None) or {}
    if scaling != "none" and known.get("rope_type", "default") == "default":
        raise InputError(
            f"{file}: scales its positions (rope.scaling.type={scaling}), which transformers does not read from a "
            "GGUF file, so every embedding would be another; give the model's folder with safetensors instead"
        )
    if ROTARY not in tensors:
        return
    divisors = torch.tensor(tensors[ROTARY].data)
    llama3 = {
        "rope_type": "llama3", "rope_theta": known["rope_theta"], "factor": float(divisors.max()),
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    unscaled = known["rope_theta"] ** -(torch.arange(len(divisors)) / len(divisors))
    config.rope_parameters = llama3
    of_llama3, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if divisors.shape != of_llama3.shape or not torch.allclose(unscaled / divisors, of_llama3, rtol=1e-4, atol=0):
        raise InputError(
            f"{file}: {ROTARY} scales its positions in another way than Llama 3, which transformers does not read from "
            "a GGUF file; give the model's folder with safetensors instead"
        )


def _tokenizer(file: Path, linked: Path, metadata: Mapping[str, Any]):
    """The tokenizer as transformers makes it, splitting a text as the file says. linked: as for `_model`."""
    kind, rule = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        tokenizer = AutoTokenizer.from_pretrained(linked.parent, gguf_file=linked.name, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers raise over a vocabulary
        raise InputError(
            f"{file}: transformers {transformers.__version__} cannot make a tokenizer of its vocabulary {kind!r} "
            f"({first_line(error)}); give the model's folder with safetensors instead"
        ) from error
    if rule in DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind == "gpt2" and rule not in (*AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS):
        log.warning(
            "%s: how it splits a text (tokenizer.ggml.pre=%s) is not known here, and GPT-2's way is used; numbers, "
            "spaces and other scripts may get other tokens than the model was trained with",
            file, rule,
        )  # fmt: skip
    if rule in BEGINS and "tokenizer.ggml.add_bos_token" not in metadata and tokenizer.bos_token:
        token, number = tokenizer.bos_token, tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
        )
    return tokenizer
