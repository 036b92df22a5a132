"""Base models: opening a trunk and its tokenizer, and the few facts that differ by family.

The trunk is `AutoModel`: the decoder (or encoder) without its language-model head. `open_model` is the one way by which
weights are opened, whoever asks, so that no check can be forgotten. No code of a folder is run: its JSON and
safetensors are read, and of older files the tensors (sgpt/decoder/pickled.py).
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.auto_factory import _get_model_class

from sgpt.decoder.agreement import check_agreement
from sgpt.decoder.attention import NAME, packed, prepare
from sgpt.decoder.base_folder import how_to_have, local_folder, resolve, writer_of
from sgpt.decoder.families import (
    FAMILIES,
    block_of,
    embedding_size,
    family_of,
    first_layers,
    looks_both_ways,
    position_limit,
    takes_position_ids,
)
from sgpt.decoder.model_files import (
    CONFIG,
    OUTER,
    TOKENIZER,
    TOKENIZER_CONFIG,
    UNUSED,
    check_config,
    check_names,
    check_numbers,
    first_line,
    read_json,
    refuse_foreign_code,
    stored_dtype,
    stored_tensors,
    unloadable,
    without_wrappers,
)
from sgpt.decoder.packing import Pack, packs
from sgpt.decoder.quantised import (
    QUANTISED,
    WeightSample,
    quantise,
    quantised_dtype,
    quantised_layers,
    replace_module,
)
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_choice, check_ranges
from sgpt.text.template import unwrap

log = logging.getLogger(__name__)
FLOATS = ("float32", "bfloat16", "float16")
DTYPES = (*FLOATS, *QUANTISED)
_WARNED: set[str] = set()  # families, by `check_family` in this process


@dataclass
class ModelConfig:
    """Which base is opened, and how its weights are held."""

    path: str = "data/nano"
    """Local folder, GGUF file, or a hub id such as EleutherAI/gpt-neo-125m."""
    dtype: str = "float32"
    """Of the frozen weights: float32, bfloat16, float16, or int8 or nf4 for those of linear layers, and float32 for the
    rest (sgpt/decoder/quantised.py).

    What learns is float32 in any case.
    """
    hub: str | None = None
    """Of a preset, hub id of the base that is loaded where the folder `path`, which a command of this project writes,
    is not there; of no effect for any other path.
    """
    layers: int | None = None
    """Only the first so many blocks, and the norm after the last one; null takes all of them."""

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        check_ranges(self, "model.", layers=COUNT.or_null("for all"))

    def resolved(self) -> "ModelConfig":
        """The base that is opened, `path` or `hub`, as `path`; the log says which, where it can be either."""
        if self.hub is None:
            return self
        if writer_of(self.path) is None:
            if not resolve(self.path).exists():
                log.info("model.hub=%s is of a preset's own folder, and not asked for %s", self.hub, self.path)
            return replace(self, hub=None)
        if resolve(self.path).exists():
            log.info("%s is there and is used; %s is not loaded from the hub", self.path, self.hub)
            return replace(self, hub=None)
        remedy = how_to_have(self.path)
        log.warning("%s: no such folder (%s); %s is loaded from the hub instead", self.path, remedy, self.hub)
        return replace(self, path=self.hub, hub=None)


def load_trunk(config: ModelConfig) -> nn.Module:
    """The trunk in evaluation mode, its attention prepared. Raises InputError for whatever is wrong with the folder."""
    trunk = prepare(open_model(config))
    check_family(config.path, trunk)
    return trunk


def open_model(config: ModelConfig, auto: type = AutoModel) -> nn.Module:
    """The model as it lies on disk, in evaluation mode, with transformers' own attention; or InputError.

    auto: by which class. Weights that are missing, left over, of another shape, NaN or too large for the dtype are
    refused by name; prefixes of wrappers (torch.compile, DDP, PEFT, sentence-transformers) are taken off, and said to
    be.
    """
    config = config.resolved()
    path, folder = config.path, local_folder(config.path)
    check_config(folder, path)
    with describe_errors(path):
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if architecture.is_encoder_decoder:
            raise InputError(f"{path}: {architecture.model_type} is an encoder-decoder; use a decoder or an encoder")
        architecture.return_dict = True  # a config may say otherwise, and its forward would give a tuple
        if config.layers is not None:
            architecture = first_layers(architecture, config.layers, path)
    stored = stored_tensors(folder, path)
    with describe_errors(path):
        # what half precision holds exactly is read in it, and takes half of the memory until it is quantised
        dtype = stored_dtype(stored) if config.dtype in QUANTISED else config.dtype
        model, report = _loaded(path, folder, architecture, auto, dtype, stored)
    if config.layers is not None:  # the blocks behind are stored, and not wanted
        dropped = {name for name in report["unexpected_keys"] if (block_of(name) or 0) >= config.layers}
        report["unexpected_keys"] = [name for name in report["unexpected_keys"] if name not in dropped]
        model.base_model.first_layers = config.layers
    check_names(path, model, report)
    check_numbers(path, model, stored)
    if config.dtype in QUANTISED:
        quantise(model, config.dtype, path)
    model.config.use_cache = False
    with torch.no_grad():
        for name in report["missing_keys"]:
            if UNUSED.search(name):  # random otherwise, and so another base each time
                model.get_parameter(name).zero_()
    _try(path, model.eval())
    return model


def unquantised(trunk: nn.Module) -> nn.Module:
    """The trunk itself, or where it is quantised a copy of it with the float32 weights of the model that it was opened
    from.

    All that is not quantised, trained biases and low-rank adapters among it, is the trunk's. Raises InputError where
    that model has changed since.
    """
    dtype = quantised_dtype(trunk)
    if dtype is None:
        return trunk
    trunk = copy.deepcopy(trunk)
    layers = quantised_layers(trunk)
    source = next(iter(layers.values())).source
    log.info("%s is opened again for its weights, which the %s trunk has no longer", source, dtype)
    base = open_model(ModelConfig(source))
    for path, layer in layers.items():
        linear = base.get_submodule(layer.name)
        now, then = WeightSample.of(linear.weight), layer.sample
        if now.shape != then.shape or not torch.equal(now.numbers, then.numbers.to(now.numbers)):
            raise InputError(f"{source}: {layer.name}.weight has changed since it was quantised; put it back")
        linear.weight.requires_grad_(False)
        linear.bias = layer.bias
        replace_module(trunk, path, linear.to(layer.codes.device).train(layer.training))
    return trunk


def check_family(path: str, trunk: nn.Module, *, causal: bool = False) -> None:
    """Refuses a trunk that does not compute padded rows as each alone, unless its family is proved by tests.

    causal: no token may see what follows, either. A family that is right only when it counts positions itself is left
    to do so. Of a family that no test knows, a warning says what was measured, once in a process. A packed family whose
    config makes it look both ways must compute packs as each text alone, too.
    """
    family = trunk.config.model_type
    if family_of(family).packed:
        if family_of(family).causal and looks_both_ways(trunk.config.to_dict()):
            _check_agreement(path, trunk, causal)
            _check_agreement(path, trunk, causal, partial(_packed_rows, trunk))
        return
    try:
        measured = _check_agreement(path, trunk, causal)
    except InputError:
        if not takes_position_ids(trunk):
            raise
        trunk.counts_positions_itself = True
        measured = _check_agreement(path, trunk, causal)
    if family not in FAMILIES and family not in _WARNED:
        _WARNED.add(family)
        log.warning(
            "%s: no test knows the family %s, and it runs padded. Checked on these weights: rows of different lengths "
            "are as each alone to %.1e of the largest number, where rounding explains %.1e",
            path, family, *measured,
        )  # fmt: skip


def _check_agreement(
    path: str, trunk: nn.Module, causal: bool, embed: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """embed: None is `token_embeddings`."""
    with describe_errors(path, running=trunk):
        width, limit = embedding_size(trunk), position_limit(trunk)
        return check_agreement(path, trunk, embed or partial(token_embeddings, trunk), width, limit, causal=causal)


def _packed_rows(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """As `token_embeddings`, computed as a pack."""
    rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids, attention_mask, strict=True)]
    [pack] = packs(rows, input_ids.numel())
    pack = pack.to(input_ids.device)
    hidden, _ = pack.pad(packed_token_embeddings(trunk, pack))
    return hidden[torch.tensor(pack.rows).argsort()]


@contextmanager
def describe_errors(path: str, *, read: Path | None = None, running: nn.Module | None = None) -> Iterator[None]:
    """Whatever transformers raises inside over a user's files becomes an InputError of one sentence that names the
    folder.

    read: a file that is named if it is no JSON. running: the model, where it is opened already and run.
    """
    quieted = [logging.getLogger(name) for name in ("transformers.modeling_utils", "transformers.configuration_utils")]
    for logger in quieted:  # they print a table of missing weights: what matters of it is refused here by name
        logger.disabled = True
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of tokenizers, which is no Exception
        if not isinstance(error, Exception) and not panic:
            raise
        if read is not None and read.is_file():
            read_json(read)
        if running is not None:
            family = running.config.model_type
            raise InputError(
                f"{path}: {type(running).__name__} ({family}) cannot be run over the tokens of a text "
                f"({first_line(error)}); a value in {CONFIG} is wrong, or this family cannot be used here"
            ) from error
        raise unloadable(path, first_line(error)) from error
    finally:
        for logger in quieted:
            logger.disabled = False


def _loaded(
    path: str, folder: Path, architecture, auto: type, dtype: str, stored: dict[str, Path]
) -> tuple[nn.Module, dict]:
    """The model and what transformers reports of missing, left-over and misshaped weights."""
    model_class = _get_model_class(architecture, auto._model_mapping)
    options = {
        "config": architecture, "dtype": getattr(torch, dtype),
        "output_loading_info": True, "ignore_mismatched_sizes": True,
        "attn_implementation": "sdpa" if model_class._supports_sdpa else "eager",  # whatever the config says
    }  # fmt: skip
    own = without_wrappers(stored)
    is_renamed = own != {name: name for name in stored}
    if not is_renamed and all(file.parent == folder for file in stored.values()):
        model, report = model_class.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options)
    else:
        if is_renamed:
            prefix = _taken_off(own)
            message = "%s: its weights were saved from within a wrapper; prefixes such as %r are taken off"
            log.warning(message, path, prefix)
        model, report = model_class.from_pretrained(None, state_dict=_renamed(stored, own), **options)
    # names that still do not fit may have an outer prefix, which is tried: some families' own names begin with "model."
    bare = without_wrappers(stored, also=OUTER)
    if bare != own and any(not UNUSED.search(name) for name in report["missing_keys"]):
        again, second = model_class.from_pretrained(None, state_dict=_renamed(stored, bare), **options)
        if all(UNUSED.search(name) for name in second["missing_keys"]):
            prefix = _taken_off(bare)
            log.warning("%s: its weights were saved from within a wrapper; the prefix %r is taken off", path, prefix)
            return again, second
    return model, report


def _renamed(stored: dict[str, Path], own: dict[str, str]) -> dict[str, Tensor]:
    """All stored tensors by the model's own names."""
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(stored.values()):
        tensors |= {own[name]: tensor for name, tensor in load_file(file).items()}
    return tensors


def _taken_off(own: dict[str, str]) -> str:
    """The prefix, of the first name that has one; a wrapper in the middle of a name is shown by the whole name."""
    stored, name = next((stored, name) for stored, name in own.items() if stored != name)
    return stored.removesuffix(name) if stored.endswith(name) else stored


@torch.no_grad()
def _try(path: str, model: nn.Module) -> None:
    """A few tokens: some values of a config fail, or give NaN, only when the model runs."""
    with describe_errors(path, running=model):
        ids = torch.arange(8)[None] % model.get_input_embeddings().weight.shape[0]
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if not output[0].isfinite().all():
        raise InputError(
            f"{path}: {type(model).__name__} gives NaN or infinite numbers in {model.dtype}; a value in config.json "
            "or the dtype is wrong"
        )


def load_tokenizer(path: str, **options):
    """The fast tokenizer, without the markers of an export; the end token pads where there is no pad token, as in SGPT.

    Raises InputError for foreign code, for a missing vocabulary, and for ids beyond the embedding table.
    """
    folder = local_folder(path)
    if (folder / TOKENIZER_CONFIG).is_file():
        refuse_foreign_code(folder / TOKENIZER_CONFIG, read_json(folder / TOKENIZER_CONFIG), known=True)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    refuse_foreign_code(folder / CONFIG, config, known=True)
    with describe_errors(path, read=folder / TOKENIZER):
        tokenizer = unwrap(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options))
        _refuse_without_vocabulary(path, folder, tokenizer)
        rows = config.get("vocab_size")  # of the embedding table, known before weights are opened or data are read
        if isinstance(rows, int):
            _check_ids(tokenizer, rows)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"{path}: the tokenizer has neither a pad token nor an end token; set one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # limits are ours (markers.*_max_tokens); no second one that warns
    return tokenizer


def _refuse_without_vocabulary(path: str, folder: Path, tokenizer) -> None:
    """transformers makes a tokenizer that knows no word where the vocabulary's files are missing."""
    files = {kind: name for kind, name in tokenizer.vocab_files_names.items() if kind != "tokenizer_file"}
    slow_files = files and all((folder / name).is_file() for name in files.values())
    whole = (folder / TOKENIZER).is_file() or slow_files
    byte_level = not tokenizer.vocab_files_names  # ByT5 and CANINE need none
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = len(tokenizer) if backend is None else backend.get_vocab_size(with_added_tokens=False)
    if not (whole or byte_level) or not words:
        forms = [TOKENIZER, " and ".join(files.values())] if files else [TOKENIZER]
        wanted = " or ".join(dict.fromkeys(forms))
        raise InputError(f"{path}: the tokenizer has no vocabulary; the folder lacks {wanted}, fetch it again whole")
    # some settings fail only now, and a missing unknown token only with a character that no vocabulary has
    tokenizer("a b 東 \U0010fffd")


def check_vocabulary(tokenizer, model: nn.Module) -> None:
    """Refuses a tokenizer that can give ids beyond the embedding table, by the text that gives one."""
    _check_ids(tokenizer, model.get_input_embeddings().weight.shape[0])


def _check_ids(tokenizer, size: int) -> None:
    """size: rows of the embedding table."""
    beyond = sorted((number, text) for text, number in tokenizer.get_vocab().items() if number >= size)
    if beyond:
        number, text = beyond[0]
        more = f" ({len(beyond) - 1} more are beyond it)" if len(beyond) > 1 else ""
        raise InputError(
            f"{tokenizer.name_or_path}: the text {text!r} has token id {number}, and the embedding table ends after "
            f"{size} rows{more}; the tokenizer is of another model, or tokens were added to it alone: take them out, "
            "or resize the table and train it"
        )
    around = [number for number in tokenizer("a")["input_ids"] if not 0 <= number < size]
    if around:
        raise InputError(
            f"{tokenizer.name_or_path}: puts token id {around[0]} around a text, and the embedding table ends after "
            f"{size} rows; fetch it again"
        )


def token_embeddings(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Last hidden state [rows, T, D].

    attention_mask [rows, T] with padding on either side: positions count real tokens, so both sides give the same
    result. None says: right-padded rows of a causal trunk, where no real token ever sees padding and no mask need be
    computed.
    """
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        if takes_position_ids(trunk):
            inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return trunk(**inputs).last_hidden_state


def takes_packs(trunk: nn.Module) -> bool:
    """Whether its attention knows where texts of a pack end: a packed family, prepared (sgpt/decoder/attention.py)."""
    return family_of(trunk.config.model_type).packed and trunk.config._attn_implementation == NAME


def packed_token_embeddings(trunk: nn.Module, pack: Pack) -> Tensor:
    """Last hidden state [N, D] of the pack's tokens, each attending to its own text only. The trunk `takes_packs`."""
    inputs = {"input_ids": pack.input_ids[None], "attention_mask": torch.ones_like(pack.input_ids)[None]}
    if takes_position_ids(trunk):
        inputs["position_ids"] = pack.position_ids[None]
    with packed(pack):
        return trunk(**inputs).last_hidden_state[0]
