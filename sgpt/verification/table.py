"""The two tables that a verification ends with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from sgpt.encoder.verify import Deviation
from sgpt.verification.server import Finding

TEXT_SHOWN = 40  # characters of a text


def loaders_table(found: Sequence[tuple[Path, Deviation]], title: str) -> Table:
    """A row for each folder, loader and role: deviations are shares of a row's largest entry."""
    table = Table("folder", "loader", "role", "texts", "deviation", "allowed", "lowest cosine", "", title=title)
    for folder, one in found:
        verdict = "ok" if one.error is None else "WRONG"
        allowed = "by cosine" if one.bound is None else f"{one.bound:.1e}"
        row = (folder.name, one.loader, one.role, str(one.texts), _number(one.difference, ".1e"), allowed)
        table.add_row(*row, _number(one.cosine, ".7f"), verdict)
    return table


def server_table(found: Sequence[Finding], title: str) -> Table:
    """A row for each condition, role and delta."""
    deltas = any(one.delta for one in found)
    names = ["condition", "role", *(["delta"] if deltas else []), "texts", "worst cosine", "asked", ""]
    table = Table(*names, title=title)
    for one in found:
        texts = f"{one.texts}, {one.refused} refused" if one.refused else str(one.texts)
        row = [one.condition, one.role, *([one.delta or "none"] if deltas else []), texts]
        verdict = "ok" if one.texts else "nothing compared"
        row += [_number(one.cosine, ".7f"), f"{one.least_cosine:.7f}", one.fault or verdict]
        table.add_row(*row)
    return table


def summary(found: Sequence[Finding]) -> str:
    """Which conditions broke, by their faults; or that none did, and how many of them are empty."""
    by_fault: dict[str, list[str]] = {}
    for one in found:
        if one.fault:
            of = f"{one.condition} ({one.role}{f', delta {one.delta}' if one.delta else ''})"
            by_fault.setdefault(one.fault.partition(";")[0], []).append(of)  # without how near the nearest came
    if not by_fault:
        empty = sum(not one.texts for one in found)
        without = f"; under {empty} conditions there was none, as the server refuses their texts" if empty else ""
        return f"every served vector is the trained one{without}"
    lines = [f"{fault}: {', '.join(where)}" for fault, where in by_fault.items()]
    worst = min((one for one in found if one.fault), key=lambda one: one.cosine)
    return "\n".join([*lines, f"worst: {worst.text[:TEXT_SHOWN]!r} at a cosine of {worst.cosine:.7f}"])


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)
