"""The format of sentence-transformers, both directions: folders of others are read, and our exports are written.

What a folder says of reading a text is applied as version 6.2 does, or refused.
A folder lists modules (modules.json): here a Transformer, a Pooling, and what changes embeddings
(sgpt/encoder/head.py). The Transformer's own file says how long texts may be, and whether they are lower-cased;
config_sentence_transformers.json says what stands before queries and documents. A key that is neither applied nor
known to change nothing is refused by its name.
"""

import copy
import importlib.util
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.normalizers import Lowercase, Sequence
from torch import nn

from sgpt.decoder.families import position_limit
from sgpt.decoder.model_files import CONFIG, TOKENIZER, TOKENIZER_CONFIG, read_json
from sgpt.encoder.contract import Contract
from sgpt.encoder.head import READERS_OF_MODULES
from sgpt.encoder.pooling import POOLINGS
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES, MarkersConfig, frames
from sgpt.text.template import wrap

log = logging.getLogger(__name__)
MODULE = "sentence_transformers.models"  # the old spelling of the types opens in sentence-transformers 2 to 6
# Makes transformers read tokenizer.json as it stands. For qwen2, phi3 and others it would else build its own class'
# pre-tokenizer, whatever tokenizer_class says. (Saving the model anew by sentence-transformers drops this key: then
# only those families break.)
TOKENIZER_TYPE = "gpt_bigcode"
MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
TRANSFORMER_CONFIG = "sentence_bert_config.json"
EARLY_FAMILIES = ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # a file for each, once
TRANSFORMER_CONFIGS = [TRANSFORMER_CONFIG, *(f"sentence_{family}_config.json" for family in EARLY_FAMILIES)]
WRITTEN = {MODULES, SETTINGS, TRANSFORMER_CONFIG, "chat_template.jinja"}  # files that our own reader does not need
# Two forms of the file of a pooling, each with their name -> ours. From version 6 on: one of these as `pooling_mode`.
POOLING_MODES = {"weightedmean": "weighted_mean", "mean": "mean", "lasttoken": "last_token", "cls": "cls", "max": "max"}
# Before, and in every published SGPT model: one of these is true. All versions read this form, so exports have it.
POOLING_FLAGS = {
    "pooling_mode_weightedmean_tokens": "weighted_mean", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip
SQUARE_ROOT = "pooling_mode_mean_sqrt_len_tokens"
POOLING_KEYS = {
    "word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode", SQUARE_ROOT, *POOLING_FLAGS,
}  # fmt: skip
TRANSFORMER_KEYS = (  # which are applied
    "max_seq_length", "do_lower_case", "query_length", "document_length", "processor_kwargs", "tokenizer_args",
)  # fmt: skip
PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
TRANSFORMER_VALUES = {  # what each key may say where it changes nothing here
    "transformer_task": ("feature-extraction",), "module_output_name": ("token_embeddings",),
    "processing_kwargs": (None, {}),
    "unpad_inputs": (None, True, False), "query_expansion": (None, False), "modality_config": ({"text": PLAIN_TEXT},),
    "model_args": ({},), "model_kwargs": ({},), "config_args": ({},), "config_kwargs": ({},),
}  # fmt: skip
SUPPORTED = "Transformer, Pooling, Dense, LayerNorm and Normalize"
_TWO_WAYS = "sends queries and documents through modules of their own, and here both go through one decoder"
OBSTACLES = {  # modules that people have, and why they are not applied here
    "Router": _TWO_WAYS, "Asym": _TWO_WAYS,
    "WeightedLayerPooling": "mixes the hidden states of all layers, and here the last ones alone are computed",
    "StaticEmbedding": "has no decoder, but a table of words",
    "WordWeights": "weighs words by a table, before they are pooled",
}  # fmt: skip
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
UNLIMITED = 1e6  # a model_max_length beyond it says that there is none


@dataclass
class Stated:
    """What the folder says.

    head: kind and folder of the modules behind the pooling, but for a last Normalize, which is `normalize`. limits: of
    query and document in tokens, None where the model's own are meant, and the file and key that state it.
    """

    transformer: Path
    pooling: str
    head: list[tuple[str, Path]]
    normalize: bool
    lower_case: bool
    limits: dict[str, tuple[int | None, str]]
    prompts: dict[str, str]
    tokenizer_options: dict[str, Any] = field(default_factory=dict)


def is_sentence_transformers(folder: Path) -> bool:
    return (folder / MODULES).is_file()


def stated_kind(folder: Path) -> str:
    """As sentence-transformers reads it: SentenceTransformer, CrossEncoder or SparseEncoder."""
    file = folder / SETTINGS
    return read_json(file).get("model_type", "SentenceTransformer") if file.is_file() else "SentenceTransformer"


def read(folder: Path) -> Stated:
    """InputError with file and key for whatever is missing, broken, or said in a way that is not applied here."""
    (_, transformer), (_, pooling), *head = _modules(folder)
    own = next((transformer / name for name in TRANSFORMER_CONFIGS if (transformer / name).is_file()), None)
    stated = read_json(own) if own else {}
    file = own or transformer / TRANSFORMER_CONFIG
    _check_transformer(file, stated)
    options = next((stated[key] for key in ("processor_kwargs", "tokenizer_args") if stated.get(key)), {})
    if not isinstance(options, dict) or set(options) - {"tokenizer_type"}:
        raise InputError(
            f"{file}: processor_kwargs={options!r} is not applied here; open it with sentence-transformers, or save "
            "the tokenizer with these settings"
        )
    tokenizer = read_json(transformer / TOKENIZER_CONFIG) if (transformer / TOKENIZER_CONFIG).is_file() else {}
    if (side := tokenizer.get("truncation_side", "right")) != "right":
        raise InputError(
            f"{transformer / TOKENIZER_CONFIG}: truncation_side={side!r} is not supported: long texts are cut at "
            "their end here; set it to right"
        )
    prompts = _prompts(folder)
    is_unit = bool(head) and head[-1][0] == "Normalize"
    return Stated(
        transformer=transformer,
        pooling=_pooling(pooling / CONFIG, prompts),
        head=head[:-1] if is_unit else head,
        normalize=is_unit,
        lower_case=bool(stated.get("do_lower_case")),
        limits=_limits(file, stated, transformer, tokenizer),
        prompts=prompts,
        tokenizer_options=options,
    )


def contract_of(stated: Stated, trunk: nn.Module, *, roles: bool = False) -> Contract:
    """Limits that the folder states must fit the model; where it leaves them open, they are the model's.

    roles: queries stand in brackets and documents in braces, which published SGPT models say by their names alone.
    """
    table = position_limit(trunk)
    tokens = {}
    for role, (limit, where) in stated.limits.items():
        if limit is None:
            limit = table or 512
        elif where.startswith(str(stated.transformer / TOKENIZER_CONFIG)) and table:
            limit = min(limit, table)  # as sentence-transformers takes the smaller one
        if table and limit > table:
            raise InputError(
                f"{where}={limit} is more than the {table} positions of {type(trunk).__name__}; lower it to {table} "
                "or less"
            )
        tokens[f"{role}_max_tokens"] = limit
    try:
        markers = MarkersConfig("brackets", original_limit=True, **tokens) if roles else MarkersConfig("none", **tokens)
    except InputError as error:
        raise InputError(f"{next(iter(stated.limits.values()))[1]}: {error}") from None
    return Contract(stated.pooling, markers, stated.normalize, str(stated.transformer), prompts=stated.prompts)


def is_published_with_roles(path: str, stated: Stated, tokenizer) -> str | None:
    """What says that it is an asymmetric SGPT model as published, and that its folder has no key for; else None.

    path: folder or hub id as it was given. Source: Muennighoff/sgpt, whose asymmetric models are called
    SGPT-<size>-weightedmean-msmarco-specb-bitfit. Their training put the tokens [SOS] and {SOS} into the vocabulary,
    and replaced them by the brackets' ids.
    """
    config = stated.transformer / CONFIG
    folder = Path(path)
    names = [(folder.parent.parent if folder.parent.name == "snapshots" else folder).name]  # in the hub's cache
    if config.is_file():
        names.append(str(read_json(config).get("_name_or_path", "")))
    if named := next((name for name in names if "specb" in name.lower()), None):
        return f"the name {named}"
    vocabulary = tokenizer.get_vocab()
    return "the tokens [SOS] and {SOS} of its vocabulary" if {"[SOS]", "{SOS}"} <= vocabulary.keys() else None


def lower_cased(tokenizer):
    """Lower case before all else, in place, as in sentence-transformers; one that does so already is left as it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{tokenizer.name_or_path}: do_lower_case=true needs a tokenizer.json, which {type(tokenizer).__name__} "
            "has not"
        )
    if not _has_lower_case(backend.normalizer):
        steps = list(backend.normalizer) if isinstance(backend.normalizer, Sequence) else [backend.normalizer]
        backend.normalizer = Sequence([Lowercase(), *(step for step in steps if step is not None)])
    return tokenizer


def _has_lower_case(normalizer) -> bool:
    if isinstance(normalizer, Sequence):
        return any(_has_lower_case(step) for step in normalizer)
    return isinstance(normalizer, Lowercase) or bool(getattr(normalizer, "lowercase", False))


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each module, in their order: a Transformer, a Pooling, and what changes embeddings."""
    file = folder / MODULES
    modules: list[tuple[str, Path]] = []
    for module in read_json(file, list):
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise InputError(f"{file}: module {module!r:.80} must state a type and a path; fetch it again")
        kind, path = module["type"].rsplit(".", 1)[-1], Path(module["path"])
        if not module["type"].startswith("sentence_transformers."):
            raise InputError(
                f"{file}: type={module['type']!r} is a class of its own, whose code is never run here; "
                f"{SUPPORTED} are supported"
            )
        if kind in OBSTACLES:
            raise InputError(f"{file}: module {kind} {OBSTACLES[kind]}; open it with sentence-transformers")
        if kind not in ("Transformer", "Pooling", *READERS_OF_MODULES):
            raise InputError(f"{file}: module {kind} is not supported; {SUPPORTED} are")
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{file}: path={module['path']!r} leaves the folder; a module must lie in it")
        if module.get("kwargs"):
            raise InputError(
                f"{file}: kwargs={module['kwargs']!r} of module {kind} is not applied here; open it with "
                "sentence-transformers"
            )
        if kind in ("Transformer", "Pooling") and kind in dict(modules):
            raise InputError(f"{file}: lists {kind} twice; one is supported")
        modules.append((kind, folder / path))
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        problem = f"has the order {', '.join(kinds)}"
        for kind in ("Pooling", "Transformer"):
            if kind not in kinds:
                problem = f"lists no {kind} module, so it makes no embedding of a text"
        raise InputError(
            f"{file}: {problem}; Transformer and Pooling must come first, and what changes embeddings "
            f"({', '.join(READERS_OF_MODULES)}) behind them"
        )
    return modules


def _check_transformer(file: Path, stated: dict) -> None:
    if isinstance(modalities := stated.get("modality_config"), dict) and "message" in modalities:
        raise InputError(
            f"{file.parent}: its texts go through a chat template, which only sentence-transformers reads; open our "
            "own export of it"
        )
    for key, value in stated.items():
        if key not in TRANSFORMER_KEYS and key not in TRANSFORMER_VALUES:
            raise InputError(
                f"{file}: key {key!r} is not known here, so it cannot be applied; remove it if it has no effect, or "
                "open it with sentence-transformers"
            )
        if key in TRANSFORMER_VALUES and value not in TRANSFORMER_VALUES[key]:
            raise InputError(f"{file}: {key}={value!r:.80} is not applied here; open it with sentence-transformers")
    if not isinstance(stated.get("do_lower_case", False), bool):
        raise InputError(f"{file}: do_lower_case={stated['do_lower_case']!r} must be true or false")


def _limits(file: Path, stated: dict, transformer: Path, tokenizer: dict) -> dict[str, tuple[int | None, str]]:
    """Of each role the limit, and the file and key that state it.

    sentence-transformers takes max_seq_length, else the smaller one of the tokenizer's and the table's.
    """
    if stated.get("max_seq_length") is not None:
        general = _count(file, "max_seq_length", stated["max_seq_length"]), f"{file}: max_seq_length"
    else:
        source = transformer / TOKENIZER_CONFIG
        length = tokenizer.get("model_max_length")
        if isinstance(length, (int, float)) and length > UNLIMITED:
            length = None
        if length is not None:
            length = _count(source, "model_max_length", length)
        general = length, f"{source}: model_max_length"
    limits = {}
    for role in ROLES:
        key = f"{role}_length"
        limits[role] = general if stated.get(key) is None else (_count(file, key, stated[key]), f"{file}: {key}")
    return limits


def _count(file: Path, key: str, value: object) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 <= value < float("inf") or value != int(value):
        raise InputError(f"{file}: {key}={value!r:.40} must be a number of tokens, 1 or more")
    return int(value)


def _pooling(file: Path, prompts: dict[str, str]) -> str:
    stated = read_json(file)
    if unknown := sorted(stated.keys() - POOLING_KEYS):
        raise InputError(
            f"{file}: key {unknown[0]!r} is not known here, so it cannot be applied; "
            f"{', '.join(sorted(POOLING_KEYS))} are"
        )
    for key in (SQUARE_ROOT, "include_prompt", *POOLING_FLAGS):
        if not isinstance(stated.get(key, True), bool):
            raise InputError(f"{file}: {key}={stated[key]!r} must be true or false")
    if not stated.get("include_prompt", True) and any(prompts.values()):
        raise InputError(
            f"{file}: include_prompt=false leaves the prompts {prompts} out of the pooling, which is not done here; "
            "open it with sentence-transformers"
        )
    if "pooling_mode" in stated:
        modes = stated["pooling_mode"] if isinstance(stated["pooling_mode"], list) else [stated["pooling_mode"]]
        named = [POOLING_MODES.get(mode, mode) if isinstance(mode, str) else mode for mode in modes]
    else:
        named = [name for key, name in POOLING_FLAGS.items() if stated.get(key)]
        if stated.get(SQUARE_ROOT):
            named.append("mean_sqrt_len_tokens")
        named = named or ["mean"]  # as sentence-transformers
    if len(named) != 1 or named[0] not in list(POOLINGS):  # a list: what stands there may not be hashable
        raise InputError(f"{file}: pooling {named} is not supported; one of {', '.join(POOLINGS)} is")
    return named[0]


def _prompts(folder: Path) -> dict[str, str]:
    """By role. Of other names sentence-transformers uses the default in its plain `encode` alone, which has no role."""
    file = folder / SETTINGS
    stated = read_json(file) if file.is_file() else {}
    if (kind := stated_kind(folder)) != "SentenceTransformer":
        raise InputError(
            f"{file}: model_type={kind!r} is no model that gives one embedding for a text; a SentenceTransformer is"
        )
    if stated.get("truncate_dim") is not None:
        raise InputError(
            f"{file}: truncate_dim={stated['truncate_dim']!r} is not applied here; open it with "
            "sentence-transformers, or remove the key for whole embeddings"
        )
    similarity = stated.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise InputError(f"{file}: similarity_fn_name={similarity!r} is unknown; cosine is what is used here")
    if similarity != "cosine":
        log.warning("%s: similarity_fn_name=%s; here texts are compared by cosine", file, similarity)
    prompts = stated.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, (str, type(None))) for text in prompts.values()):
        raise InputError(f"{file}: prompts={prompts!r:.80} must give a text to each name")
    default = stated.get("default_prompt_name")
    if default is not None and default not in [*ROLES, *prompts]:  # a list: what stands there may not be hashable
        raise InputError(f"{file}: default_prompt_name={default!r} is none of its prompts ({', '.join(prompts)})")
    unused = [name for name, text in prompts.items() if text and name not in ROLES]
    if unused:
        log.warning(
            "%s: prompts %s stand before neither queries nor documents, as in sentence-transformers' encode_query "
            "and encode_document",
            file,
            unused,
        )
    return {role: prompts[role] for role in ROLES if prompts.get(role)}


def write_tokenizer(tokenizer, markers: MarkersConfig, folder: Path) -> None:
    """The tokenizer, with the markers in it (sgpt/text/template.py), and the document's limit."""
    document_length = frames(markers, tokenizer)["document"].length
    if markers.name != "none":
        tokenizer = wrap(tokenizer, markers.name)
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = None  # of an instruct base: sentence-transformers would render texts through it
    save_tokenizer(tokenizer, folder, document_length)


def save_tokenizer(tokenizer, folder: Path, length: int) -> None:
    """As every reader takes it as it stands: padding and cutting on the right, to `length` tokens."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / TOKENIZER_CONFIG).read_text())
    for key in ("is_local", "local_files_only"):  # how the tokenizer was opened here
        config.pop(key, None)
    if (folder / TOKENIZER).is_file():
        # GPT2Tokenizer would build its own pre-tokenizer and drop ours
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config |= {
        "padding_side": "right",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token_type_ids as if they were words
        "model_max_length": length,
    }
    write_json(folder / TOKENIZER_CONFIG, config)


def write_modules(
    contract: Contract, tokenizer, embedding_size: int, folder: Path, *, adapter: bool = False
) -> None:  # fmt: skip
    """All files of the format but the weights and the tokenizer.

    adapter: the weights are a base's, which its own folder may say to open in half precision.
    """
    role_frames = frames(contract.markers, tokenizer)
    query_length, document_length = (role_frames[role].length for role in ROLES)
    marked = contract.markers.name != "none"
    transformer: dict = {"max_seq_length": document_length, "do_lower_case": False}
    if marked or query_length != document_length:  # otherwise the old form, which every version reads
        modalities: dict = {"text": PLAIN_TEXT}
        if marked:
            modalities["message"] = {**PLAIN_TEXT, "format": "flat"}
        transformer |= {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "token_embeddings",
            "processor_kwargs": {"tokenizer_type": TOKENIZER_TYPE},
            "query_length": query_length,
            "document_length": document_length,
        }
    if adapter:
        transformer["model_kwargs"] = {"dtype": "float32"}
    settings = {
        "model_type": "SentenceTransformer",
        "__version__": {
            "sentence_transformers": installed_version("sentence-transformers"),
            "transformers": installed_version("transformers"),
            "pytorch": installed_version("torch"),
        },
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if "query_length" in transformer:  # 5.6 refuses by itself, with a TypeError for these keys
        settings["requirements"] = {"sentence-transformers": ">=6.0"}
    # where all flags are false, sentence-transformers takes the mean without a word
    assert contract.pooling in POOLING_FLAGS.values(), f"{contract.pooling} has no row in POOLING_FLAGS"
    pooling = {
        "word_embedding_dimension": embedding_size,
        SQUARE_ROOT: False,
        **{key: name == contract.pooling for key, name in POOLING_FLAGS.items()},
        "include_prompt": True,
    }
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    if contract.normalize:
        kinds["Normalize"] = "2_Normalize"
    modules = []
    for number, (kind, path) in enumerate(kinds.items()):
        (folder / path).mkdir(exist_ok=True)
        modules.append({"idx": number, "name": str(number), "path": path, "type": f"{MODULE}.{kind}"})
    write_json(folder / TRANSFORMER_CONFIG, transformer)
    write_json(folder / SETTINGS, settings)
    write_json(folder / kinds["Pooling"] / CONFIG, pooling)
    write_json(folder / MODULES, modules)


def installed_version(package: str) -> str:
    """Installed version; of sentence-transformers, which need not be installed, the one this form was measured with."""
    return importlib.metadata.version(package) if package != "sentence-transformers" or is_installed() else "6.2.0"


def write_json(file: Path, content: dict | list) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_installed() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None
