"""The command line as it was typed: texts and paths are put in quotes for Hydra, so nobody needs to know its grammar.

    retrieval=[/x/epoch=3]   name=1e5   data.path=a,b   run=it's   data.sources=[{path: a b=c}]

mean what they say. Passed on as they are: null where a key may be null, what is in quotes already, ${other.key}, and
with -m the commas and functions of a sweep. Imports nothing heavy.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
# Keys whose default in configs/ is null and whose other values are numbers or groups of keys. The YAML does not show
# that, and any other key with null there is taken for a text (`texts`): name a new one of this sort here.
NO_TEXT = {
    "limit", "data.limit", "evaluation.limit", "dev.limit", "evaluation.positive_score", "dev.positive_score",
    "data.positive_score", "data.negative_score", "data.weight", "data.query_max_tokens", "data.document_max_tokens",
    "loss.false_negative_margin", "trainer.max_steps", "trainer.keep_gigabytes", "trainer.threads", "threads",
    "score_margin", "score_ratio", "markers", "model.layers", "weights", "dimensions", "least_cosine",
    "trainer.patience", "trainer.tokens_per_pack", "tokens_per_pack",
}  # fmt: skip
OR_NULL = {"evaluation.split", "dev.split", "trainer.keep_best"}  # their default is a text, and null is allowed as well
SOURCES = "data.sources"  # a list whose members hold keys of data, in braces
ANY = ".*"  # behind a group whose keys have any names
DEPTHS = {"shots": 2}  # lists of lists of texts, which an empty list in the YAML does not show
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
PLAIN = re.compile(r"[\w./-][\w./:@%+?*| -]*", re.ASCII)  # what Hydra reads without quotes
SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|extend_list)\(")
NO_INTERPOLATION = re.compile(r"(?<!\\)\$\{(?![\w.:/@-]+(,[^{}]*)?\})")


class TextKey(NamedTuple):
    """A key that holds texts. depth: 0 of a text, 1 of a list, 2 of a list of lists. nullable: null is no text."""

    depth: int
    nullable: bool


def as_typed(arguments: Sequence[str], config_name: str, verbatim: Sequence[str] = ()) -> list[str]:
    """The arguments of a script, with their texts in quotes for Hydra.

    verbatim: keys whose texts are taken to the letter, ${ included; only \\n is a line break.
    """
    known, sweeping = texts(config_name), bool({"-m", "--multirun"} & {*arguments})
    return [_as_typed(argument, known, verbatim, sweeping) for argument in arguments]


def argument(key: str, value: str | Sequence[str]) -> str:
    """key=value as it has to be typed in a shell, for a script to get exactly this text or list of texts."""
    if not isinstance(value, str):
        texts_of_list = [text if PLAIN.fullmatch(text) else quoted(text) for text in value]
        return shlex.quote(f"{key}=[{','.join(texts_of_list)}]")
    misread = value == "null" or QUOTED.fullmatch(value) or "${" in value
    return shlex.quote(f"{key}={quoted(value) if misread else value}")


def quoted(value: str, *, verbatim: bool = True) -> str:
    """The value in single quotes for Hydra. Without verbatim, ${key} in it stays a reference to that key."""
    value = value.replace("${", "\\${") if verbatim else NO_INTERPOLATION.sub(r"\\${", value)
    # A backslash counts only before a quote and at the end, and is doubled there.
    escaped = re.sub(r"(\\*)('|\Z)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value)
    return f"'{escaped}'"


def unquoted(value: str) -> str:
    """What Hydra makes of a value in quotes: see `quoted`."""
    mark = value[0]
    text = re.sub(rf"(\\+)({mark}|\Z)", lambda end: "\\" * (len(end[1]) // 2) + end[2], value[1:-1])
    return text.replace("\\${", "${")


def _as_typed(argument: str, known: Mapping[str, TextKey], verbatim: Sequence[str], sweeping: bool) -> str:
    """One argument for Hydra. known: the script's keys that hold texts. sweeping: commas may separate values to try."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or key.startswith(("-", "~", "hydra")):
        return argument
    if sweeping and (SWEEP.match(value) or len(_split(value)) > 1):
        return argument
    if f"{name}{ANY}" in known or f"{name.rpartition('.')[0]}{ANY}" in known:
        key = f"++{name}"  # Hydra takes new keys in no other way
    if name in verbatim:
        if QUOTED.fullmatch(value):
            value = unquoted(value)
        elif _stands(value, known[name]):
            return argument
        return f"{key}=" + quoted(value.replace("\\n", "\n"))
    return f"{key}={_value(name, value, known, _kind(name, known))}"


def _value(key: str, value: str, known: Mapping[str, TextKey], kind: TextKey | None) -> str:
    """The value for Hydra. kind: None for a key that holds no text itself; keys in its braces may."""
    inner = value.strip()
    if _stands(inner, kind):
        return value
    if kind and kind.depth == 0:
        return quoted(value, verbatim=False)
    if inner[:1] == "[" and inner[-1:] == "]":
        member = kind and TextKey(kind.depth - 1, False)
        key_of_members = "data" if key == SOURCES else key
        parts = _split(inner[1:-1])
        if member == (0, False):  # texts, which may be paths with commas
            parts = _paths(parts)
        values = [_value(key_of_members, part.strip(), known, member) for part in parts]
        return f"[{','.join(values)}]"
    if inner[:1] == "{" and inner[-1:] == "}":
        pairs = []
        for part in _split(inner[1:-1]):
            name, _, inner_value = part.partition(":")
            full_key = f"{key}.{name.strip()}"
            pairs.append(f"{name.strip()}:{_value(full_key, inner_value.strip(), known, _kind(full_key, known))}")
        return f"{{{','.join(pairs)}}}"
    return value if PLAIN.fullmatch(inner) or "${" in value or not inner else quoted(value)


def _kind(key: str, known: Mapping[str, TextKey]) -> TextKey | None:
    """What the key holds, by itself or as any key of its group; None where that is no text."""
    return known.get(key, known.get(f"{key.rpartition('.')[0]}{ANY}"))


def _paths(parts: list[str]) -> list[str]:
    """Parts joined again where a file has the comma in its name, and no file's name ends at the comma."""
    paths, rest = [], parts
    while rest:
        size = 1
        if not os.path.exists(rest[0].strip()):  # False for what no file can be called, where Path raises
            for longer in range(len(rest), 1, -1):  # the longest name that exists
                if os.path.exists(",".join(rest[:longer]).strip()):
                    size = longer
                    break
        paths.append(",".join(rest[:size]))
        rest = rest[size:]
    return paths


def _stands(value: str, kind: TextKey | None) -> bool:
    """Whether Hydra is to read the value as it stands: an allowed null, or what is in quotes already."""
    return (value == "null" and (kind is None or kind.nullable)) or QUOTED.fullmatch(value) is not None


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no brackets and no quotes.

    Quotes are quotes at the start of a value; elsewhere they are letters.
    """
    parts, depth, position = [""], 0, 0
    while position < len(text):
        starts_value = parts[-1].rstrip()[-1:] in ("", ":", "[", "{", ",")
        in_quotes = QUOTED.match(text, position) if starts_value else None
        if in_quotes:
            parts[-1] += in_quotes[0]
            position = in_quotes.end()
            continue
        letter = text[position]
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
        position += 1
    return parts if text.strip() else []


@cache
def texts(config_name: str) -> dict[str, TextKey]:
    """The keys of a script that are texts or lists of them, by the defaults in its YAML.

    A group that is empty there has keys of any name, which hold texts.
    """
    kinds: dict[str, TextKey] = {}
    for key, value in _leaves(_composed(config_name)):
        if value == {}:
            kinds[f"{key}{ANY}"] = TextKey(0, False)
        holds_keys = isinstance(value, list) and any(isinstance(member, dict) for member in value)
        if key not in NO_TEXT and not holds_keys and (value is None or isinstance(value, str | list)):
            depth = DEPTHS.get(key, int(isinstance(value, list)))
            kinds[key] = TextKey(depth, value is None or key in OR_NULL)
    kinds.pop(SOURCES, None)
    return kinds


def _composed(config_name: str) -> dict[str, Any]:
    """The YAML with those that its defaults name, without Hydra."""
    tree = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8"))
    for default in tree.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":
            tree = _composed(default) | tree
        elif isinstance(default, dict):
            for group, option in default.items():
                if option and not group.startswith("override"):
                    tree[group] = _composed(f"{group}/{option}")
    return {key: value for key, value in tree.items() if key != "hydra"}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves
