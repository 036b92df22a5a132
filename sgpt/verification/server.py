"""A running server against the trained model: every condition, both roles, with and without each delta.

Expected vectors are those of the local model in float32. A server may compute in half precision: what that makes of
these very weights is measured here, and three times as much is allowed. Cosines are blind to length, so lengths are
compared too: they are 1, or those of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from sgpt.decoder.trunk import ModelConfig, load_trunk
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.probes import PROBE_TEXTS
from sgpt.encoder.verify import hostile_texts, row_cosines
from sgpt.runtime.device import default_device
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MARKERS, ROLES, Role
from sgpt.verification.clients import Client, RefusedTexts
from sgpt.verification.conditions import Condition, conditions
from sgpt.verification.config import VerifyConfig
from sgpt.verification.diagnosis import NO_KNOWN_FAULT, Trained, explain

FLOAT32 = 1e-6  # of a cosine to 1, which another order of summation, or a GPU's TF32, does not reach
ROUNDED = 0.99  # a cosine above which rounding may be all that is wrong
ROUNDINGS = 3  # times what half precision makes of these weights here is allowed, as other machines round elsewhere
LENGTH_TOLERANCE = 1e-2  # of a vector's length at most, relative
IGNORED, PUT_ON = "delta ignored: the vector of {}", "wrong delta: the vector of {}"
_NO_ANSWER = np.empty(0)  # of a request that failed
Models = dict[str | None, Encoder]  # by delta, None is the model itself


@dataclass(frozen=True)
class Finding:
    """A condition, in one role, with one delta or without.

    texts: that were compared. refused: that the server does not take. cosine: the lowest of a served vector to the
    trained one, of `text`. fault: what is wrong, None where nothing is.
    """

    condition: str
    role: Role
    delta: str | None
    texts: int
    refused: int
    cosine: float
    least_cosine: float
    text: str
    fault: str | None = None


def verify_server(config: VerifyConfig) -> Iterator[Finding]:
    """One finding after the other. InputError where the server, or the local model, cannot be asked at all."""
    device = default_device()
    models: Models = {None: Encoder.from_pretrained(config.model).to(device)}
    models |= {name: Encoder.from_pretrained(folder).to(device) for name, folder in config.deltas.items()}
    assert config.endpoint is not None
    with Client(
        config.endpoint, config.api, models[None].embedding_size, api_key=config.api_key,
        served_name=config.served_name, delta_as=config.delta_as, timeout_seconds=config.timeout_seconds,
        connections=config.requests_at_once,
    ) as client:  # fmt: skip
        # asked first, by itself: a server that is not there, or knows no such role or delta, is said in a sentence
        for delta, encoder in models.items():
            for role in ROLES:
                _asked(client, PROBE_TEXTS[:1], role, delta, config, encoder)
        lengths = _Lengths()
        for delta, encoder in models.items():
            trained = Trained(encoder, _mistaken(delta, models))
            for role in ROLES:
                yield from _findings(client, trained, role, delta, config, lengths)


def _mistaken(delta: str | None, models: Models) -> dict[str, Callable[[], Encoder]]:
    """By its fault, what would come if another delta was applied than asked for, or none."""
    encoder = models[delta]
    others: dict[str, Callable[[], Encoder]] = {}
    for name, other in models.items():
        if name != delta:
            fault = PUT_ON.format(name) if name else IGNORED.format("the model without it")
            others[fault] = partial(_in_place_of, encoder, other)
            if other.contract.stated() != encoder.contract.stated():
                others[f"{fault}, with its own markers, limits and pooling"] = lambda other=other: other

    @cache
    def base() -> Encoder:
        blocks = encoder.trunk.config.num_hidden_layers  # fewer than the base's where model.layers was set
        trunk = load_trunk(ModelConfig(encoder.contract.base, layers=blocks)).to(encoder.device)
        return Encoder(trunk, encoder.tokenizer, encoder.contract, head=encoder.head)

    if encoder.contract.base:
        others[IGNORED.format("the base")] = base
    return others


def _in_place_of(asked: Encoder, other: Encoder) -> Encoder:
    """The other's weights under the contract of the model that was asked for."""
    return Encoder(other.trunk, other.tokenizer, asked.contract, head=other.head)


def _findings(
    client: Client, trained: Trained, role: Role, delta: str | None, config: VerifyConfig, lengths: "_Lengths"
) -> Iterator[Finding]:  # fmt: skip
    encoder = trained.encoder
    texts = list(dict.fromkeys([*PROBE_TEXTS, *hostile_texts(encoder)]))
    ids = encoder.token_ids(texts, role)
    expected = encoder.encode(texts, role, normalize=False)
    least = config.least_cosine
    if least is None:
        least = _least_cosine(encoder, config.dtype, [text for text, row in zip(texts, ids, strict=True) if row], role)
    frame = encoder.frames[role]
    sizes = {"texts_per_request": config.texts_per_request, "requests_at_once": config.requests_at_once}
    sizes["base64"] = client.api.base64
    refused: set[int] = set()
    around = len(frame.before) + len(frame.after)
    for condition in conditions(ids, len(PROBE_TEXTS), around, frame.length, **sizes):
        requests = [[row for row in rows if row not in refused] for rows in condition.requests]
        condition = replace(condition, requests=[rows for rows in requests if rows])
        rows, vectors, not_taken, failures = _vectors(client, condition, texts, role, delta, config, encoder)
        refused |= not_taken
        found = _finding(
            condition, role, delta, rows, vectors, len(not_taken), texts, expected, trained, least, lengths
        )
        if failures and found.fault is None:
            fault = f"{len(failures)} of {len(condition.requests)} requests have no answer, the first: {failures[0]}"
            found = replace(found, fault=fault)
        if condition.at_once and not_taken and found.fault is None:  # all others were refused before
            fault = f"{len(not_taken)} texts are refused under load that were taken before"
            found = replace(found, fault=fault, text=texts[min(not_taken)])
        yield found


def _vectors(
    client: Client, condition: Condition, texts: Sequence[str], role: Role, delta: str | None, config: VerifyConfig,
    encoder: Encoder,
) -> tuple[list[int], np.ndarray, set[int], list[InputError]]:  # fmt: skip
    """Rows that were answered, their vectors [rows, D], the rows that were refused by themselves, and failed requests.

    Raises RefusedTexts for a batch of which each text is taken alone, InputError where every request failed.
    """
    failures: list[InputError] = []

    def vectors_of(rows: list[int]) -> np.ndarray:
        return _asked(client, [texts[row] for row in rows], role, delta, config, encoder, base64=condition.base64)

    def ask(rows: list[int]) -> np.ndarray | None:
        try:
            return vectors_of(rows)
        except RefusedTexts:
            return None
        except InputError as error:
            failures.append(error)
            return _NO_ANSWER

    if condition.at_once:
        with ThreadPoolExecutor(len(condition.requests) or 1) as threads:
            answers = list(threads.map(ask, condition.requests))
    else:
        answers = [ask(rows) for rows in condition.requests]
    if failures and len(failures) == len(condition.requests):
        raise failures[0]
    rows: list[int] = []
    refused: set[int] = set()
    answered = [np.empty((0, encoder.embedding_size), dtype=np.float32)]
    for asked, vectors in zip(condition.requests, answers, strict=True):
        if vectors is _NO_ANSWER:
            continue
        taken = asked
        if vectors is None:
            alone = {row: ask([row]) for row in asked} if len(asked) > 1 else {}
            taken = [row for row, one in alone.items() if one is not None and one is not _NO_ANSWER]
            refused.update(row for row in asked if alone.get(row) is None)
            vectors = vectors_of(taken) if taken else answered[0]
        rows += taken
        answered.append(vectors)
    return rows, np.concatenate(answered), refused, failures


def _asked(
    client: Client, texts: Sequence[str], role: Role, delta: str | None, config: VerifyConfig, encoder: Encoder, *,
    base64: bool = False,
) -> np.ndarray:  # fmt: skip
    if config.markers_by == "server":
        return client.embed(texts, role, delta, base64=base64)
    # without the tokenizer's own special tokens, which the server adds
    opening, closing = MARKERS[encoder.contract.markers.name][role]
    prompt = encoder.contract.prompts.get(role, "")
    return client.embed([f"{opening}{prompt}{text}{closing}" for text in texts], None, delta, base64=base64)


@np.errstate(over="ignore", invalid="ignore")  # a server may give any numbers
def _finding(
    condition: Condition, role: Role, delta: str | None, rows: list[int], vectors: np.ndarray, refused: int,
    texts: Sequence[str], expected: np.ndarray, trained: Trained, least: float, lengths: "_Lengths",
) -> Finding:  # fmt: skip
    """The condition's worst, and what is wrong there."""
    finding = Finding(condition.name, role, delta, len(rows), refused, np.nan, least, "")
    if not rows:
        return finding
    given = np.nan_to_num(row_cosines(vectors, expected[rows]), nan=-1.0)
    worst = given.argsort(kind="stable")
    finding = replace(finding, cosine=float(given[worst[0]]), text=texts[rows[worst[0]]])
    off = [row for row in worst if given[row] < least]
    if off:
        wrong = vectors[off]
        if _are_mixed_up(wrong, [rows[row] for row in off], expected, least):
            return replace(finding, fault="answers mixed up: the vectors of other texts")
        fault = explain([texts[rows[row]] for row in off], role, wrong, trained, least)
        if fault.startswith(NO_KNOWN_FAULT) and finding.cosine > ROUNDED:
            fault += "; if the server computes in half precision, set dtype=bfloat16 or float16"
        return replace(finding, fault=fault)
    return replace(finding, fault=lengths.fault(vectors, expected[rows], least, trained.encoder.contract.normalize))


def _are_mixed_up(vectors: np.ndarray, rows: Sequence[int], expected: np.ndarray, least: float) -> bool:
    """Whether each vector is that of another text."""
    norms = np.linalg.norm(expected, axis=1, keepdims=True)
    kept = norms[:, 0] > 0
    units = np.where(kept[:, None], expected / np.maximum(norms, 1e-30), 0)
    similar = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)) @ units.T
    best = similar.argmax(1)
    return bool((similar.max(1) >= least).all() and all(other != row for other, row in zip(best, rows, strict=True)))


class _Lengths:
    """What the lengths of a server's vectors are: 1 or the model's, the same under all conditions."""

    def __init__(self) -> None:
        self.served: str | None = None  # as the first vectors show that are not both

    def fault(self, vectors: np.ndarray, expected: np.ndarray, least_cosine: float, normalised: bool) -> str | None:
        """What is wrong with them; normalised: the contract says 1. A cosine that is allowed may move lengths as much.
        """
        lengths, trained = np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1)
        tolerance = min((2 * (1 - least_cosine)) ** 0.5, LENGTH_TOLERANCE)
        units = np.abs(lengths - 1) <= tolerance
        as_trained = np.abs(lengths - trained) <= tolerance * trained
        odd = f"a vector of length {lengths[~units][0] if not units.all() else 1:.4g}"
        if normalised:
            return None if units.all() else f"no normalisation: {odd}, where the contract says 1"
        now = {name for name, holds in (("1", units), ("the model's", as_trained)) if holds.all()}
        if not now:
            return f"{odd}, which is neither 1 nor the model's"
        if self.served is None and len(now) == 1:
            [self.served] = now
        if self.served not in {None, *now}:
            return f"{odd}, where lengths were {self.served} before"
        return None


def _least_cosine(encoder: Encoder, dtype: str, texts: Sequence[str], role: Role) -> float:
    """What rounding in this dtype explains."""
    if dtype == "float32":
        return 1 - FLOAT32
    rounded = encoder.encode_in(getattr(torch, dtype))(texts, role)
    return 1 - max(FLOAT32, ROUNDINGS * (1 - float(row_cosines(rounded, encoder.encode(texts, role)).min())))
