"""What the scripts are given, as typed attributes. Hydra composes YAML; past `typed` there are only dataclasses."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from sgpt.cli.command import suggest
from sgpt.runtime.errors import InputError
from sgpt.runtime.overrides import CONFIGS, as_typed
from sgpt.runtime.values import LARGEST, check_shapes, check_texts

Config = TypeVar("Config")


def compose_training(overrides: Sequence[str]) -> DictConfig:
    """What train/biencoder.py would compose of these arguments; InputError for those that it would refuse."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return compose("train", overrides=as_typed(overrides, "train"))
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(suggest(error, "train", list(overrides))) from None


def typed(schema: type[Config], composed: DictConfig) -> Config:
    """The dataclass with the composed values; InputError for an unknown key or a value of the wrong type."""
    try:
        tree = {key: value for key, value in OmegaConf.to_container(composed, resolve=True).items() if key != "hydra"}
        check_shapes(schema, tree)
        _check_numbers_are_finite(tree)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(literal(tree))))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        advice = (
            " (for the characters themselves write \\${ in place of ${)"
            if isinstance(error, InterpolationResolutionError | GrammarParseError)
            else ""
        )
        raise InputError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}{advice}") from error
    check_texts(config)
    return config


def literal(tree: Any) -> Any:
    """With texts in which ${ is ${ to OmegaConf: what has been resolved, or was saved, refers to nothing any more."""
    if isinstance(tree, dict):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def _check_numbers_are_finite(value: Any, key: str = "") -> None:
    """A whole number of hundreds of digits is read as one, and is no fraction where one is asked for."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers_are_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{key}={value} must be at most {LARGEST:g}, as every number of a configuration")


def plain(config: Any) -> dict:
    """As JSON and YAML take it."""
    return asdict(config)
