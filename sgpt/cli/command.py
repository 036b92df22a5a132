"""The command line of every script, which is Hydra's, and errors as one clear sentence with exit code 2.

Imports nothing heavy, so that `--help` and a misspelt key answer at once.
"""

import difflib
import functools
import io
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgpt.cli.failures import describe_failure, describe_lost, lost_ranks, speaks_for
from sgpt.runtime import interrupt, progress
from sgpt.runtime.errors import InputError
from sgpt.runtime.memory import keep_freed_memory
from sgpt.runtime.overrides import CONFIGS, as_typed, quoted

LONG = re.compile(r"\S{1000,}")  # words of a sentence
OTHERS_WAIT_SECONDS = 5  # until the first process, whose sentence is shown, has ended
OPTIONAL = ("experiment", "debug")  # groups that may be null


def script(
    config_name: str, *, groups: bool = True, verbatim: Sequence[str] = ()
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes `main(composed)` a script whose configuration is `configs/<config_name>.yaml`.

    groups: its keys can be groups, folders of `configs/`. Without, `model=x` sets the key of that name and chooses no
    YAML.
    verbatim: keys of texts for people and models, where \\n is a line's end and not even ${ means something to
    Hydra. In all texts and paths commas, braces and blanks are letters (sgpt/runtime/overrides.py).
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            keep_freed_memory()
            _check_streams()
            if not _working_directory():
                exit_with_error("the working directory is not there any more; cd to one that is")
            given = sys.argv[1:]
            sys.argv[1:] = as_typed(_without_empty_groups(given) if groups else given, config_name, verbatim)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra prints its own report and exits with 1
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # "Loading weights" of a few milliseconds
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a trunk without its head is what we ask for
            try:
                guarded = _exiting_with_a_sentence(main, config_name)
                config_path = _search_path(config_name, groups)
                hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)(guarded)()
            except (HydraException, OmegaConfBaseException) as error:
                overrides = [argument for argument in given if "=" in argument]
                exit_with_error(suggest(error, config_name, overrides, groups=groups))
            except InputError as error:  # of a launcher of jobs
                exit_with_error(str(error))
            except KeyboardInterrupt:  # before there was anything to keep
                sys.exit(interrupt.exit_code())
            except Exception as error:  # of Hydra's own work, before and after that of `main`
                overrides = (argument.lstrip("+") for argument in given if "=" in argument)
                _exit_with_sentence_or_traceback(error, dict(override.split("=", 1) for override in overrides))

        return run

    return decorate


def _without_empty_groups(arguments: list[str]) -> list[str]:
    """Without `experiment=null`, which it is anyway; a group that must be something is refused when it is null."""
    kept = []
    for argument in arguments:
        group, _, option = argument.partition("=")
        if option != "null" or not (CONFIGS / group).is_dir():
            kept.append(argument)
        elif group not in OPTIONAL:
            options = ", ".join(sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")))
            exit_with_error(f"{argument}: {group} is one of {options}")
    return kept


def _search_path(config_name: str, groups: bool) -> str | None:
    if groups:
        return str(CONFIGS)
    # found without `configs/` being searched
    ConfigStore.instance().store(config_name, OmegaConf.load(CONFIGS / f"{config_name}.yaml"))
    return None


def suggest(error: Exception, config_name: str, overrides: list[str], *, groups: bool = True) -> str:
    """One sentence; for a key or group option that does not exist, with the nearest ones that do."""
    message = " ".join(str(error).split())
    if override := getattr(error, "override", None):  # Hydra's grammar could not read it
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[+~]{0,2}[\w./@:-]+", key):
            return f"{override}: not of the form key=value; see --help for the keys"
        return (
            f"{override}: what the value holds means something to Hydra; put it into quotes: "
            f"{shlex.quote(f'{key}={quoted(value)}')}"
        )
    if isinstance(error.__cause__, InputError):  # of what Hydra constructs
        return str(error.__cause__)
    if missing := re.search(r"Could not find '([\w/]+)/([^/']+)'", message):
        group, option = missing.groups()
        options = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
        if not options:  # a group of Hydra's own, whose options its message lists
            extra = "; pip install 'sgpt-framework[submitit]'" if option.startswith("submitit") else ""
            return f"{message}{extra}"
        return (
            f"{group}={option}: there is no {option!r} in configs/{group}/; "
            f"{_nearest(option, options, 'it has ' + ', '.join(options))}"
        )
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if f"'{key}'" in message or re.search(rf"Key '{re.escape(key.split('.')[-1])}' is not in struct", message):
            keys = known_keys(config_name, [other for other in overrides if other != override], groups=groups)
            if key in keys:
                return (
                    f"{override}: {key} has other keys; they are "
                    f"{', '.join(name for name in keys if name.startswith(f'{key}.'))}"
                )
            return f"{override}: there is no key {key!r}; {_nearest(key, keys, 'see --help for the keys')}"
    return message


def known_keys(config_name: str, overrides: list[str], *, groups: bool = True) -> list[str]:
    """Every key and group of the configuration as composed with these overrides, or without any when they fail too."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if not groups:
        tree = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml"))
        return sorted(_flat({key: value for key, value in tree.items() if key not in ("defaults", "hydra")}))
    GlobalHydra.instance().clear()
    names = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for kept in (overrides, []):
            try:
                return sorted(
                    {*names, *_flat(OmegaConf.to_container(compose(config_name, overrides=kept), resolve=False))}
                )
            except (HydraException, OmegaConfBaseException):
                continue
    return names


def _nearest(word: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _flat(tree: dict, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flat(value, f"{prefix}{key}.")
    return keys


def _exiting_with_a_sentence(main: Callable[[DictConfig], None], config_name: str) -> Callable[[DictConfig], None]:
    """Errors and interrupts end inside of Hydra's job: an exception that reaches Hydra makes it print a line first."""

    @functools.wraps(main)
    def guarded(composed: DictConfig) -> None:
        progress.start_log()
        try:
            with interrupt.handling_signals(), progress.log_progress(config_name):
                _interruptible(main)(composed)
            sys.stdout.flush()
        except InputError as error:
            exit_with_error(str(error))
        except KeyboardInterrupt as error:
            _end_interrupted(error, resume="resume" in composed)
        except SystemExit as error:  # rich's, when nobody reads its output any more
            if isinstance(error.__context__, BrokenPipeError):
                _exit_with_sentence_or_traceback(error.__context__, {})
            sys.exit(error.code)
        except Exception as error:
            _exit_with_sentence_or_traceback(error, OmegaConf.to_container(composed))

    return guarded


def _interruptible(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """An error that follows an interrupt is its consequence: a process waited for another one that has ended."""

    def run(composed: DictConfig) -> None:
        try:
            main(composed)
        except Exception:
            if interrupt.stop_requested():
                raise KeyboardInterrupt from None
            raise

    return run


def _end_interrupted(error: KeyboardInterrupt, *, resume: bool) -> None:
    """One line: what is kept, and the command that resumes."""
    lost = interrupt.lost_before()
    if speaks_for(lost):
        kept = str(error) or "what was finished is kept"
        if lost:
            kept = f"{describe_lost(lost)}; {kept}"
        again = "resume with" if resume or isinstance(error, interrupt.Interrupted) else "start again with"
        print(f"interrupted: {kept}; {again}: {interrupt.command_again(resume=resume)}", file=sys.stderr)
    sys.exit(interrupt.exit_code())


def _exit_with_sentence_or_traceback(error: BaseException, config: dict) -> None:
    """A sentence for what happened around us; the traceback of what is our own fault."""
    if (lost := lost_ranks(error)) is not None:
        if speaks_for(lost):
            again = "start it again with resume=true" if "resume" in config else "start it again"
            print(f"error: {describe_lost(lost)}; {again}", file=sys.stderr)
        _end(2)
    if sentence := describe_failure(error, config):
        exit_with_error(sentence)
    traceback.print_exception(error)
    print(
        "This is a fault of sgpt and not of your input. Please report it with the lines above and the command.",
        file=sys.stderr,
    )
    _end(1)


def exit_with_error(message: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    # the sentence once, not once a process: when the first process ends it takes the others along, unless it has
    # nothing to say
    if rank:
        time.sleep(OTHERS_WAIT_SECONDS)
    print(f"error: {LONG.sub(lambda word: f'{word[0][:200]}…{word[0][-50:]}', message)}", file=sys.stderr)
    _end(2)


def _end(code: int) -> None:
    """With standard output given up where it cannot be written: the interpreter would complain about it once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:
        return None


def _check_streams() -> None:
    """Any letter can be printed on any terminal; a closed stream becomes one that nobody reads and that is empty."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")
