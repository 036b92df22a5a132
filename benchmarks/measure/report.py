"""Rows as they come, verdicts that know their spread, and the options that the scripts have in common."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from measure.engines import COMPETITORS, Variant
from measure.given import REPOSITORY, SHAPES, SOURCES, refuse
from measure.processes import source_hash
from sgpt.runtime.files import write_whole


class Report:
    """Rows as they come, on the terminal and in --output; the first is held back until a second engine has said the
    same.

    columns: key -> (heading, format). agree(reference, row): what is wrong between the two, or nothing.
    """

    def __init__(
        self, options: argparse.Namespace, columns: dict[str, tuple[str, str]],
        agree: Callable[[dict, dict], str | None] | None = None
    ) -> None:
        self.columns, self.agree, self.file = columns, agree, options.output
        self.reference: dict | None = None
        self.agreed, self.differ = agree is None, 0.0
        self.held: list[dict] = []
        self.rows: list[dict] = []
        self.verdicts: list[dict] = []
        self.about = about(options)
        self.widths = {key: max(len(heading), 7) for key, (heading, _) in columns.items()}
        hardware = self.about["hardware"]
        print(
            f"{hardware['cpu']}, {hardware['cores']} core(s), {options.threads} thread(s), load "
            f"{hardware['load']:.1f}; torch {torch.__version__}, "
              f"commit {self.about['commit']}, source {self.about['source']}", flush=True)  # fmt: skip
        print(
            " ".join(f"{key} {value}" for key, value in vars(options).items() if key not in ("output", "shared")),
            flush=True
        )

    def add(self, row: dict) -> None:
        if row["source"] != self.about["source"]:
            refuse("sgpt/ was edited while the benchmark ran, so its rows do not compare; start again")
        self.rows.append(row)
        self.held.append(row)
        if self.agree and "failed" not in row:
            if self.reference is None:
                self.reference = row
            elif wrong := self.agree(self.reference, row):
                raise SystemExit(
                    f"{row['name']} does not do the same work as {self.reference['name']}: {wrong}; no time is shown"
                )
            else:
                self.reference = max(self.reference, row, key=lambda row: len(row.get("losses", ())))
                self.agreed = True
                self.differ = max(self.differ, row["differs"])
        if self.agreed:
            for shown in self.held:
                self._show(shown)
            self.held.clear()

    def _show(self, row: dict) -> None:
        if row is self.rows[0]:
            print(
                f"{'':32s}" + "  ".join(heading.rjust(self.widths[key]) for key, (heading, _) in self.columns.items())
            )
        values = (format(row[key], style) if key in row else "" for key, (_, style) in self.columns.items())
        cells = "  ".join(value.rjust(self.widths[key]) for value, key in zip(values, self.columns, strict=True))
        print(f"{row['name'][:31]:32s}" + row.get("failed", cells), flush=True)
        self._write()

    def verdict(self, what: str, ratios: Sequence[float], *, against: float | None = 1.0) -> None:
        """Median and spread of the rounds' ratios. against: what they must all be above or below to mean anything;
        None: just a number.
        """
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        decided = against is None or (len(ratios) > 1 and not low <= against <= high)
        self.verdicts.append(
            {"what": what, "median": median, "low": low, "high": high, "rounds": len(ratios), "decided": decided}
        )
        note = "" if decided else "   no verdict: " + (
            "one round" if len(ratios) == 1 else f"the spread includes {against:g}"
        )
        print(f"{what}: {median:.2f} ({low:.2f} to {high:.2f}, {len(ratios)} round(s)){note}", flush=True)
        self._write()

    def note(self, found: dict) -> None:
        self.verdicts.append(found)
        self._write()

    def _write(self) -> None:
        if self.file:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            write_whole(
                Path(self.file),
                json.dumps(self.about | {"rows": self.rows, "verdicts": self.verdicts}, indent=1) + "\n"
            )


def about(options: argparse.Namespace) -> dict:
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "sentence-transformers", "tokenizers")
    }
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit, "source": source_hash(),
        "options": vars(options), "versions": versions | {"python": platform.python_version()},
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": psutil.virtual_memory().total / 1e9, "load": os.getloadavg()[0],
        },
    }  # fmt: skip


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def same_losses(precision: str) -> Callable[[dict, dict], str | None]:
    """Loss and gradient norm of every step agree; after the first, the steps before were the same steps, too."""
    # bf16 rounds by 4e-3
    tolerances = {
        "fp32": {"losses": 1e-4, "gradient_norms": 1e-3}, "bf16": {"losses": 1e-2, "gradient_norms": 1e-1}
    }[precision]

    def agree(reference: dict, row: dict) -> str | None:
        row["differs"] = 0.0
        for key, tolerance in tolerances.items():
            pairs = list(zip(reference[key], row[key], strict=False))  # as many steps as both took
            worst = max(abs(left - right) / abs(left) for left, right in pairs)
            row["differs"] = max(worst, row["differs"])
            if not worst <= tolerance:
                return (
                    f"{key} {[left for left, _ in pairs]} and {[right for _, right in pairs]} differ by {worst:.1e}, "
                    f"allowed {tolerance:.0e}"
                )
        return None

    return agree


def race(
    report: Report, variants: Sequence[Variant], rounds: int, measure: Callable[[Variant], dict], label: str = ""
) -> dict[str, list[dict]]:
    """A B C A B C …: rows by name, one a round; what does not fit into memory is tried once and left out."""
    rows: dict[str, list[dict]] = {variant.name: [] for variant in variants}
    for number in range(1, rounds + 1):
        for variant in [variant for variant in variants if number == 1 or rows[variant.name]]:
            row = measure(variant) | {"name": label + variant.name, "round": number}
            report.add(row)
            rows[variant.name] += [row] if "failed" not in row else []
    return {name: found for name, found in rows.items() if found}


def fastest(report: Report, ours: Variant, rivals: Sequence[Variant], measure: Callable[[Variant], dict]) -> Variant:
    """Of a competitor's options, by one short row of each, beside one of ours that says whether they do the same work.
    """
    if len(rivals) == 1:
        return rivals[0]
    rows = race(report, [ours, *rivals], 1, measure, "choosing: ")
    return min((rival for rival in rivals if rival.name in rows), key=lambda rival: rows[rival.name][0]["cpu_seconds"])


def compare(report: Report, rows: dict[str, list[dict]], ours: str, rival: str) -> None:
    """Time of the rival over ours, of each round."""
    print(f"largest difference between the results of the engines: {report.differ:.1e}")
    for key, name in {"cpu_seconds": "CPU seconds", "wall_seconds": "wall seconds"}.items():
        ratios = [theirs[key] / own[key] for own, theirs in zip(rows[ours], rows[rival], strict=True)]
        report.verdict(f"{rival} / {ours}, {name}", ratios)


def parser(description: str | None, *, shape: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--shape", choices=SHAPES, default=shape, help="of the model; its weights are random (default: %(default)s)"
    )
    arguments.add_argument(
        "--rounds", type=int, default=rounds, help="of every variant once, in fresh processes (default: %(default)s)"
    )
    arguments.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    arguments.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32",
        help="bf16: autocast, and our frozen weights in bfloat16 (default: fp32)"
    )
    arguments.add_argument(
        "--keep-memory", action="store_true",
        help="of theirs, too, as our scripts do: freed memory is not handed back to the system"
    )
    arguments.add_argument(
        "--shared", default="../shared",
        help="folder with data/ and models/, from the repository's root (default: %(default)s)"
    )
    arguments.add_argument("--output", help="JSON file of all rows and verdicts, written row by row")
    return arguments


def training_parser(
    description: str | None, *, shape: str, rounds: int, steps: int, batch: int, competitors: Sequence[str]
) -> argparse.ArgumentParser:
    """And those of the scripts that train next to ST."""
    arguments = parser(description, shape=shape, rounds=rounds)
    arguments.add_argument(
        "--data", choices=[name for name in SOURCES if name != "pairs"], default="nli",
        help="real texts below --shared (default: %(default)s)"
    )
    arguments.add_argument("--batch", type=int, default=batch, help="examples a step (default: %(default)s)")
    arguments.add_argument(
        "--steps", type=int, default=steps, help="timed steps of each process (default: %(default)s)"
    )
    arguments.add_argument(
        "--competitors", nargs="+", choices=COMPETITORS, default=list(competitors),
        help="options of ST (default: %(default)s)"
    )
    return arguments
