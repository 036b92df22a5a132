"""What known faults of servers would give, computed here, so that a wrong vector is told by the name of its fault.

All of them were seen somewhere: no causal mask where a batch has no padding (text-embeddings-inference #882), an
adapter that is accepted and not applied (dynamo #14111), another pooling (vLLM #15929), texts cut where the server's
default is (text-embeddings-inference #829), end tokens added or left out (mteb #5237).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sgpt.decoder.families import position_limit, takes_position_ids
from sgpt.encoder.contract import Contract, role_tokens
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.pooling import POOLINGS
from sgpt.encoder.verify import row_cosines
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES, MarkersConfig, Role, special_tokens
from sgpt.text.tokens import TokenLists, content_ids

log = logging.getLogger(__name__)
LIMITS = (128, 256, 384, 512)  # in tokens, which servers cut at
EXACT = 1 - 1e-9  # of a cosine: the same vector in float32, so that no other fault is nearer
PUT_BEFORE = ("query: ", "passage: ", "search_query: ", "search_document: ")  # prompts of E5 and Nomic
NO_KNOWN_FAULT = "no known fault gives these vectors"
DIAGNOSED = 6  # of the texts that are off, the worst: all of them must be explained
WITHOUT_MASK = {"bloom"}  # families that compute more than attention from the mask, so it cannot be another one here


@dataclass(frozen=True)
class Trained:
    """What a server is compared with.

    encoder: in float32, whose vectors are expected. others: fault -> opens the model whose vectors would come, as where
    a delta was left out, or put on where none was asked for.
    """

    encoder: Encoder
    others: dict[str, Callable[[], Encoder]] = field(default_factory=dict)


FaultyEmbed = Callable[[Sequence[str]], np.ndarray]  # of texts, [texts, D]


def explain(texts: Sequence[str], role: Role, vectors: np.ndarray, trained: Trained, least_cosine: float) -> str:
    """Names the fault whose vectors are those that the server gave, or says that no known one is.

    texts: those whose vectors [texts, D] are off by more than `least_cosine`, the worst first.
    """
    if not np.isfinite(vectors).all():
        return "NaN or infinity: the weights overflow what the server computes in"
    if not np.abs(vectors).max(1).all():
        return "zeros in place of an embedding"
    shortest_first = sorted(range(min(len(texts), DIAGNOSED)), key=lambda row: len(texts[row]))
    nearest, name = -1.0, ""
    for fault, embed in faults(trained, role):
        try:
            asked = max(nearest, least_cosine)
            explained = _explained([texts[row] for row in shortest_first], vectors[shortest_first], embed, asked)
        except InputError as error:
            log.warning("it is not known whether the fault is %r: %s", fault, error)
            continue
        if explained > nearest:
            nearest, name = explained, fault
        if nearest >= EXACT:
            break
    if nearest >= least_cosine:
        return name
    return f"{NO_KNOWN_FAULT}; nearest is {name}, at a cosine of {nearest:.3f}"


def _explained(texts: Sequence[str], vectors: np.ndarray, embed: FaultyEmbed, least: float) -> float:
    """The lowest cosine of the vectors [texts, D] to those of a fault, of all texts up to one that is below `least`."""
    lowest = 1.0
    for row, text in enumerate(texts):
        cosine = row_cosines(vectors[row : row + 1], embed([text]))
        lowest = min(lowest, float(np.nan_to_num(cosine, nan=-1.0)[0]))
        if not lowest >= least:
            break
    return lowest


def faults(trained: Trained, role: Role) -> Iterator[tuple[str, FaultyEmbed]]:
    """Name, and what a server with this fault makes of texts in this role, which it was asked for."""
    encoder = trained.encoder
    for name, other in trained.others.items():
        yield name, lambda texts, other=other: other().encode(texts, role)
    if encoder.trunk.config.model_type not in WITHOUT_MASK:
        without = "no causal mask: every token sees the whole text"
        yield without, lambda texts: _of_ids(encoder, encoder.token_ids(texts, role), causal=False)
    other_role = ROLES[1 - ROLES.index(role)]
    yield f"wrong role: the text as a {other_role}", lambda texts: encoder.encode(texts, other_role)
    for name, changed in _other_contracts(encoder):
        otherwise = Encoder(encoder.trunk, encoder.tokenizer, changed, head=encoder.head)
        yield name, lambda texts, otherwise=otherwise: otherwise.encode(texts, role)
    for name, token_ids in _other_ids(encoder):
        yield name, lambda texts, ids=token_ids: _of_ids(encoder, ids(texts, role))


def _other_contracts(encoder: Encoder) -> Iterator[tuple[str, Contract]]:
    """Another pooling, no markers, no prompt, or another limit."""
    contract = encoder.contract
    if contract.prompts:
        yield "no prompt", replace(contract, prompts={})
    for pooling in [name for name in POOLINGS if name != contract.pooling]:
        yield f"{pooling} pooling instead of {contract.pooling}", replace(contract, pooling=pooling)
    markers = contract.markers
    for limit in _limits(encoder):
        cut = replace(markers, query_max_tokens=limit, document_max_tokens=limit)
        yield f"truncation to {limit} tokens", replace(contract, markers=cut)
    if markers.name != "none":
        for around in (0, 2):  # tokens that a text is cut by nevertheless
            limits = [max(4, markers.max_tokens(role) - around) for role in ROLES]
            yield "no markers", replace(contract, markers=MarkersConfig("none", *limits))
        for limit in _limits(encoder):
            bare = MarkersConfig("none", limit, limit)
            yield f"no markers, and truncation to {limit} tokens", replace(contract, markers=bare)


def _other_ids(encoder: Encoder) -> Iterator[tuple[str, Callable[[Sequence[str], Role], TokenLists]]]:
    """Token ids as servers get them wrong."""
    tokenizer, contract = encoder.tokenizer, encoder.contract
    rules = role_tokens(contract.markers, tokenizer)

    def cut_whole(texts: Sequence[str], role: Role, limit: int) -> TokenLists:
        """Cut after the markers are there."""
        rule = rules[role]
        contents = content_ids([contract.prompts.get(role, "") + text for text in texts], tokenizer)
        return [(rule.ids_before + ids + rule.ids_after)[:limit] for ids in contents]

    def merged(texts: Sequence[str], role: Role) -> TokenLists:
        """Tokenised as one text with its markers, which are text as any other."""
        rule, prompt = rules[role], contract.prompts.get(role, "")
        rows = content_ids([rule.text_before + prompt + text + rule.text_after for text in texts], tokenizer)
        return [ids[: rule.max_tokens] for ids in rows]

    def without(texts: Sequence[str], role: Role, part: int) -> TokenLists:
        """Without the opening marker, the last token of the text, or the closing marker: the parts 0, 1 and 2."""
        rule, rows = rules[role], []
        for ids in encoder.token_ids(texts, role):
            opening, closing = len(before), len(ids) - len(after) - len(rule.ids_after)
            sizes = len(rule.ids_before), min(1, closing - opening - len(rule.ids_before)), len(rule.ids_after)
            start = (opening, closing - sizes[1], closing)[part]
            rows.append([*ids[:start], *ids[start + sizes[part] :]])
        return rows

    before, after = special_tokens(tokenizer)
    for limit in sorted({*_limits(encoder), *(contract.markers.max_tokens(role) for role in ROLES)}):
        name = f"truncation to {limit} tokens, which cuts the closing marker"
        yield name, lambda texts, role, limit=limit: cut_whole(texts, role, limit)
    if contract.markers.name != "none":
        yield "markers that are tokenised with the text, and merge with it", merged
    for name, part in (("no opening marker", 0), ("the last token left out", 1), ("no closing marker", 2)):
        yield name, lambda texts, role, part=part: without(texts, role, part)
    for prompt in PUT_BEFORE:
        yield f"a prompt put before the text: {prompt!r}", lambda texts, role, prompt=prompt: encoder.token_ids(
            [prompt + text for text in texts], role
        )
    for name, change in (("blanks around a text taken off", str.strip), ("texts in lower case", str.lower)):
        yield name, lambda texts, role, change=change: encoder.token_ids([change(text) for text in texts], role)
    if before or after:
        yield "no special tokens", lambda texts, role: [
            ids[len(before) : len(ids) - len(after)] for ids in encoder.token_ids(texts, role)
        ]
    if (end := tokenizer.eos_token_id) is not None:
        yield "an end token added", lambda texts, role: [[*ids, end] for ids in encoder.token_ids(texts, role)]
    if (start := tokenizer.bos_token_id) is not None:
        yield "a start token added", lambda texts, role: [[start, *ids] for ids in encoder.token_ids(texts, role)]


def _limits(encoder: Encoder) -> list[int]:
    most = position_limit(encoder.trunk)
    limits = {*LIMITS, most} if most else {*LIMITS}
    return sorted(limit for limit in limits if limit and (most is None or limit <= most))


@torch.inference_mode()
def _of_ids(encoder: Encoder, rows: TokenLists, *, causal: bool = True) -> np.ndarray:
    """Embeddings [rows, D] of token ids, one row after the other."""
    pool = POOLINGS[encoder.contract.pooling]
    embeddings: list[Tensor] = []
    for ids in rows:
        length = len(ids)
        shape = (1, length) if causal else (1, 1, length, length)
        inputs = {
            "input_ids": torch.tensor([ids], device=encoder.device),
            "attention_mask": torch.ones(shape, dtype=torch.long if causal else torch.bool, device=encoder.device),
        }
        if takes_position_ids(encoder.trunk):
            inputs["position_ids"] = torch.arange(length, device=encoder.device)[None]
        hidden = encoder.trunk(**inputs).last_hidden_state  # [1, T, D]
        pooled = pool(hidden, hidden.new_ones(1, length, dtype=torch.long))  # [1, D of the trunk]
        embeddings.append((pooled if encoder.head is None else encoder.head(pooled.float()))[0])
    return torch.stack(embeddings).float().cpu().numpy()
