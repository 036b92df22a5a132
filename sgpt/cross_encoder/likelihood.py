"""Log-probabilities of the ends of many texts under a decoder, each token computed once.

What texts have in common at their beginning is computed once and kept as keys and values: an instruction for all of them, a
document for every query that meets it. Which part that is, is read from the token ids, so nothing depends on how a prompt is
written. The rest is packed without padding; the last block and the vocabulary are computed where something is scored only, and
of the logits [positions, V] a chunk exists at a time. Memory is bounded by the token budget, whatever the number of texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.decoder.attention import Layers
from sgpt.decoder.continuation import continued_token_embeddings
from sgpt.decoder.packing import Pack, Past, packs
from sgpt.decoder.trunk import takes_packs
from sgpt.text.tokens import Rows

POSITIONS_AT_A_TIME = 256  # whose logits exist: 51 MB for GPT-2's vocabulary
PREFIX_FROM = 0.15  # of all tokens: a past costs attention its causal kernel, more than a short instruction costs (benchmarks/rerank.py)
SHARE_FROM = 16  # tokens that a group must save: with fewer, a pass of its own costs more (benchmarks/rerank.py)
BRANCH_TOKENS = 512  # of a group at a time: the mask between its texts is square


@dataclass(frozen=True)
class Text:
    """Token ids of which the last `targets`, one or more, are scored, each given all before it; at least one id is not.

    group: texts of one group may begin alike, as those of one document do.
    """

    ids: tuple[int, ...]
    targets: int
    group: int = 0

    @property
    def read(self) -> tuple[int, ...]:
        """What the decoder is given: the last token is only predicted."""
        return self.ids[:-1]

    @property
    def unscored(self) -> int:
        """Leading tokens of `read` whose hidden states predict nothing that is scored."""
        return len(self.ids) - self.targets - 1


@dataclass(frozen=True)
class Branches:
    """Texts that go on from one beginning of `start` tokens."""

    members: tuple[int, ...]
    start: int


Scored = Iterator[tuple[list[int], Tensor]]  # places of texts, and their sums


@torch.inference_mode()
def log_probabilities(
    model: nn.Module, texts: Sequence[Text], *, tokens_per_pack: int, choices: Sequence[int] = (), share: bool = True,
    advance: Callable[[int], None] = lambda texts: None,
) -> Tensor:  # fmt: skip
    """Summed natural log-probability of each text's targets: [texts], float64, on the CPU.

    model: a causal language model whose `base_model` is prepared (sgpt/decoder/attention.py); others are padded, with
    logits at every position. Equal texts are computed once. choices: the vocabulary is these ids alone. share=False reads every text from its beginning.
    advance: told of numbers of texts as they are done.
    """
    different = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    sums = torch.zeros(len(different), dtype=torch.float64)
    for places, values in _scored(model, list(different), tokens_per_pack, tuple(choices), share):
        sums[places] = values
        advance(len(places))
    return sums[torch.tensor([different[text] for text in texts], dtype=torch.long)]


def target_log_probabilities(model: nn.Module, hidden: Tensor, targets: Tensor, choices: Sequence[int] = ()) -> Tensor:
    """hidden [n, D] of the positions before the targets [n]: natural log-probabilities [n], softmax in float32.

    choices: token ids that alone share out the probability; targets are among them.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if choices:
        chosen = torch.tensor(choices, device=hidden.device)
        weight, bias = weight[chosen], None if bias is None else bias[chosen]
        targets = (targets[:, None] == chosen).int().argmax(1)
    chunks = zip(hidden.split(POSITIONS_AT_A_TIME), targets.split(POSITIONS_AT_A_TIME), strict=True)
    return torch.cat([-F.cross_entropy(F.linear(states, weight, bias).float(), wanted, reduction="none") for states, wanted in chunks])


def _scored(model: nn.Module, texts: list[Text], tokens_per_pack: int, choices: tuple[int, ...], share: bool) -> Scored:
    if not takes_packs(model.base_model):
        yield from _padded(model, texts, tokens_per_pack, choices)
        return
    groups: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text.group if share else place, []).append(place)
    prefix = _common_start(texts) if len(groups) > 1 else 0  # else it is the group's
    if prefix * len(groups) < PREFIX_FROM * sum(len(texts[members[0]].read) for members in groups.values()):
        prefix = 0
    beginning = _kept(model, [texts[0].read[:prefix]], [], 0)[0] if prefix else []
    shared, alone = [], []
    for members in groups.values():
        start = _common_start([texts[place] for place in members])
        if (start - prefix) * (len(members) - 1) >= SHARE_FROM:
            shared.append(Branches(tuple(members), start))
        else:
            alone += members
    yield from _from_beginning(model, texts, alone, beginning, prefix, tokens_per_pack, choices)
    yield from _from_groups(model, texts, shared, beginning, prefix, tokens_per_pack, choices)


def _from_beginning(
    model: nn.Module, texts: list[Text], places: list[int], beginning: Layers, prefix: int, tokens_per_pack: int, choices: tuple[int, ...]
) -> Scored:  # fmt: skip
    """Texts one by one, after the prefix."""
    rows = [list(texts[place].read[prefix:]) for place in places]
    tokens = sum(map(len, rows))
    # every row has keys of its own for the prefix: they count
    budget = tokens_per_pack * tokens // max(1, tokens + prefix * len(rows))
    for pack in packs(rows, budget):
        past = Past(beginning, [(slice(0, prefix),)] * len(pack.blocks)) if prefix else None
        moved = Pack(pack.rows, pack.blocks, pack.input_ids, pack.position_ids + prefix)
        chosen = [places[row] for row in pack.rows]
        yield chosen, _ends(model, moved, past, [texts[place] for place in chosen], [len(rows[row]) for row in pack.rows], choices)


def _from_groups(
    model: nn.Module, texts: list[Text], groups: list[Branches], beginning: Layers, prefix: int, tokens_per_pack: int, choices: tuple[int, ...]
) -> Scored:  # fmt: skip
    """Beginnings of groups, as many as fit the budget at a time; then what goes on from them."""
    for chosen in _budgeted(sorted(groups, key=lambda group: -group.start), lambda group: group.start - prefix, tokens_per_pack):
        layers, spans = _kept(model, [texts[group.members[0]].read[prefix : group.start] for group in chosen], beginning, prefix)
        blocks = [
            (branches, group.start, (slice(0, prefix), span))
            for group, span in zip(chosen, spans, strict=True)
            for branches in _budgeted(group.members, lambda place, group=group: len(texts[place].read) - group.start, BRANCH_TOKENS)
        ]
        for part in _budgeted(blocks, lambda block: sum(len(texts[place].read) - block[1] for place in block[0]), tokens_per_pack):
            rows = [list(texts[place].read[start:]) for branches, start, _ in part for place in branches]
            starts = [start for branches, start, _ in part for _ in branches]
            places = [place for branches, _, _ in part for place in branches]
            sizes = [sum(len(texts[place].read) - start for place in branches) for branches, start, _ in part]
            positions = torch.cat([torch.arange(start, start + len(row)) for start, row in zip(starts, rows, strict=True)])
            pack = Pack(places, tuple((1, size) for size in sizes), _joined(rows), positions)
            numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows])).to(model.device)
            past = Past(layers, [span for _, _, span in part], numbers)
            yield places, _ends(model, pack, past, [texts[place] for place in places], [len(row) for row in rows], choices)


def _ends(model: nn.Module, pack: Pack, past: Past | None, texts: Sequence[Text], lengths: Sequence[int], choices: tuple[int, ...]) -> Tensor:
    """Sums of the texts, whose last `lengths` tokens lie in the pack one after the other; float64 [texts]."""
    selected = torch.cat([torch.arange(end - text.targets, end) for text, end in zip(texts, accumulate(lengths), strict=True)])
    targets = _joined([text.ids[-text.targets :] for text in texts])
    hidden, _ = continued_token_embeddings(model.base_model, pack.to(model.device), past, selected=selected.to(model.device))
    values = target_log_probabilities(model, hidden, targets.to(model.device), choices).double().cpu()
    return torch.stack([part.sum() for part in values.split([text.targets for text in texts])])


def _kept(model: nn.Module, rows: Sequence[Sequence[int]], beginning: Layers, prefix: int) -> tuple[Layers, list[slice]]:
    """Keys and values of the prefix and, behind it, of `rows` that follow it; and where each row's are."""
    (pack,) = packs([list(row) for row in rows], sum(map(len, rows)))
    past = Past(beginning, [(slice(0, prefix),)] * len(pack.blocks)) if prefix else None
    moved = Pack(pack.rows, pack.blocks, pack.input_ids, pack.position_ids + prefix).to(model.device)
    nothing = torch.zeros(0, dtype=torch.long, device=model.device)
    _, layers = continued_token_embeddings(model.base_model, moved, past, selected=nothing, keep=True)
    if prefix:
        layers = [(torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)) for old, new in zip(beginning, layers, strict=True)]
    ends = list(accumulate((len(rows[row]) for row in pack.rows), initial=prefix))
    spans = {row: slice(start, end) for row, start, end in zip(pack.rows, ends, ends[1:], strict=False)}
    return layers, [spans[row] for row in range(len(rows))]


def _padded(model: nn.Module, texts: list[Text], tokens_per_pack: int, choices: tuple[int, ...]) -> Scored:
    """For families that cannot be told where a text ends: the model's own logits over right-padded rows."""
    rows: Rows = [list(text.read) for text in texts]
    for pack in packs(rows, tokens_per_pack, padded=True):
        input_ids, attention_mask = pack.to(model.device).padded(0)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        sums = []
        for place, row in zip(pack.rows, logits, strict=True):
            text = texts[place]
            scored = row[text.unscored : len(text.read)]
            if choices:
                scored = torch.full_like(scored, float("-inf")).index_copy(1, torch.tensor(choices, device=row.device), scored[:, list(choices)])
            targets = torch.tensor(text.ids[-text.targets :], device=row.device)
            sums.append(-F.cross_entropy(scored, targets, reduction="sum").double().cpu())
        yield pack.rows, torch.stack(sums)


def _common_start(texts: Iterable[Text]) -> int:
    """Number of leading tokens that all texts share and of which none predicts a target."""
    read = [text.read for text in texts]
    pairs = zip(min(read), max(read), strict=False)  # what the first and the last in order share, all share
    return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), *(text.unscored for text in texts))


def _budgeted(items: Iterable, size: Callable[..., int], budget: int) -> Iterator[list]:
    """Consecutive items whose sizes sum up to the budget at most; an item that is larger comes alone."""
    chosen: list = []
    total = 0
    for item in items:
        if chosen and total + size(item) > budget:
            yield chosen
            chosen, total = [], 0
        chosen.append(item)
        total += size(item)
    if chosen:
        yield chosen


def _joined(rows: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)
