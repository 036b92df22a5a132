"""Log-probabilities of the ends of many texts under a decoder, each token computed once.

What texts have in common at their beginning is computed once and kept as keys and values: an instruction for all of
them, a document for every query that meets it. Which part that is, is read from the token ids, so nothing depends on
how a prompt is written. The rest is packed without padding; the last block and the vocabulary are computed where
something is scored only, and of the logits [positions, V] a chunk exists at a time. Memory is bounded by the token
budget, whatever the number of texts.

Texts are computed in one of three ways, which `_score_all` decides:

    prefix of all texts  ->  the rest of a text, alone (`_from_prefix`)
    prefix of all texts  ->  prefix of a group (a document)  ->  the rests of its texts (`_from_groups`)
    whole texts, padded, for families without packs (`_padded`)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, takewhile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.decoder.attention import Layers
from sgpt.decoder.continuation import forward_with_prefix
from sgpt.decoder.mixed import alone_with
from sgpt.decoder.packing import Pack, PrefixCache, packs
from sgpt.decoder.trunk import takes_packs
from sgpt.text.tokens import TokenLists

POSITIONS_AT_A_TIME = 256  # whose logits exist: 51 MB for GPT-2's vocabulary
# The prefix of all texts is cached where it is this share of all tokens or more. Below, computing it again costs less:
# with a cache, attention on a CPU cannot use its causal kernel (benchmarks/rerank.py).
MIN_PREFIX_SHARE = 0.15
MIN_TOKENS_SAVED = 16  # by a group's prefix: with fewer, a pass of its own costs more (benchmarks/rerank.py)
BRANCH_TOKENS = 512  # of a group at a time: the mask between its texts, where they need one, is square
KEYS_OF_A_TOKEN = 16  # copied keys that count as one token: of one layer at a time, where a token has a dozen tensors


@dataclass(frozen=True)
class ScoredText:
    """Token ids of which the last `targets`, one or more, are scored, each given all before it; at least one id is not.

    group: texts of one group may begin alike, as those of one document do. cut: tokens of the document that did not
    fit.
    """

    ids: tuple[int, ...]
    targets: int
    group: int = 0
    cut: int = field(default=0, compare=False)

    @property
    def read(self) -> tuple[int, ...]:
        """What the decoder is given: the last token is only predicted."""
        return self.ids[:-1]

    @property
    def unscored(self) -> int:
        """Leading tokens of `read` whose hidden states predict nothing that is scored."""
        return len(self.ids) - self.targets - 1


@dataclass(frozen=True)
class SharedPrefix:
    """Texts, by their indices, whose first `start` tokens are the same."""

    members: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Request:
    """What `log_probabilities` was asked for, its equal texts once."""

    model: nn.Module
    texts: list[ScoredText]
    tokens_per_pack: int
    choices: tuple[int, ...]

    def members(self, indices: Iterable[int]) -> list[ScoredText]:
        return [self.texts[index] for index in indices]


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the `length` tokens with which all texts begin; none where it is 0."""

    layers: Layers
    length: int

    def cache(self, blocks: int) -> PrefixCache | None:
        """What attention needs of it for a pack of so many blocks, all of which follow it; None without a prefix."""
        return PrefixCache(self.layers, [(slice(0, self.length),)] * blocks) if self.length else None

    def moved(self, pack: Pack) -> Pack:
        """The pack at its positions behind the prefix."""
        return Pack(pack.rows, pack.blocks, pack.input_ids, pack.position_ids + self.length)


@dataclass(frozen=True)
class _Branch:
    """Some texts of a group, which are one block of a pack.

    start: length of what they share, the prefix of all texts included. spans: where the keys and values of that lie.
    """

    members: tuple[int, ...]
    start: int
    spans: tuple[slice, ...]


Scored = Iterator[tuple[list[int], Tensor]]  # indices of texts, and their sums


@torch.inference_mode()
def log_probabilities(
    model: nn.Module,
    texts: Sequence[ScoredText],
    *,
    tokens_per_pack: int,
    choices: Sequence[int] = (),
    share: bool = True,
    advance: Callable[[int], None] = lambda texts: None,
) -> Tensor:
    """Summed natural log-probability of each text's targets: [texts], float64, on the CPU.

    model: a causal language model whose `base_model` is prepared (sgpt/decoder/attention.py); others are padded, with
    logits at every position. Equal texts are computed once. choices: the vocabulary is these ids alone. share=False
    reads every text from its beginning. advance: called with numbers of texts as they are done.
    """
    indices = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    request = _Request(model, list(indices), tokens_per_pack, tuple(choices))
    sums = torch.zeros(len(indices), dtype=torch.float64)
    with alone_with(model.base_model):  # an encoder may put deltas on the same trunk
        for members, values in _score_all(request, share):
            sums[members] = values
            advance(len(members))
    return sums[torch.tensor([indices[text] for text in texts], dtype=torch.long)]


def target_log_probabilities(model: nn.Module, hidden: Tensor, targets: Tensor, choices: Sequence[int] = ()) -> Tensor:
    """hidden [n, D] of the positions before the targets [n]: natural log-probabilities [n], softmax in float32.

    choices: token ids that alone share out the probability; targets are among them.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if choices:
        vocabulary = torch.tensor(choices, device=hidden.device)
        weight, bias = weight[vocabulary], None if bias is None else bias[vocabulary]
        targets = (targets[:, None] == vocabulary).int().argmax(1)
    values = []
    for states, wanted in zip(hidden.split(POSITIONS_AT_A_TIME), targets.split(POSITIONS_AT_A_TIME), strict=True):
        logits = F.linear(states, weight, bias).float()  # [positions, V]
        values.append(-F.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(values)


def _score_all(request: _Request, share: bool) -> Scored:
    """Chooses what is computed once: the prefix of all texts, and that of each group where it saves enough."""
    if not takes_packs(request.model.base_model):
        yield from _padded(request)
        return
    groups: dict[int, list[int]] = {}
    for index, text in enumerate(request.texts):
        groups.setdefault(text.group if share else index, []).append(index)
    length = _common_start(request.texts) if len(groups) > 1 else 0  # what a single group shares is the group's prefix
    tokens = sum(len(request.texts[members[0]].read) for members in groups.values())  # of a text of each group
    if length * len(groups) < MIN_PREFIX_SHARE * tokens:
        length = 0
    prefix = _Prefix([], 0)
    if length:
        layers, _ = _keys_and_values(request.model, [request.texts[0].read[:length]], prefix)
        prefix = _Prefix(layers, length)
    shared: list[SharedPrefix] = []
    alone: list[int] = []
    for members in groups.values():
        start = _common_start(request.members(members))
        if (start - prefix.length) * (len(members) - 1) >= MIN_TOKENS_SAVED:
            shared.append(SharedPrefix(tuple(members), start))
        else:
            alone += members
    yield from _from_prefix(request, alone, prefix)
    yield from _from_groups(request, shared, prefix)


def _from_prefix(request: _Request, indices: list[int], prefix: _Prefix) -> Scored:
    """Texts one by one, after the prefix."""
    rows = [list(text.read[prefix.length :]) for text in request.members(indices)]
    tokens = sum(map(len, rows))
    # every row has keys of its own for the prefix: they count
    budget = request.tokens_per_pack * tokens // max(1, tokens + prefix.length * len(rows))
    for pack in packs(rows, budget):
        members = [indices[row] for row in pack.rows]
        lengths = [len(rows[row]) for row in pack.rows]
        yield members, _sums(request, prefix.moved(pack), prefix.cache(len(pack.blocks)), members, lengths)


def _from_groups(request: _Request, groups: list[SharedPrefix], prefix: _Prefix) -> Scored:
    """Prefixes of groups, as many as fit the budget at a time; then what follows them."""
    longest_first = sorted(groups, key=lambda group: -group.start)
    for some in _budgeted(longest_first, lambda group: group.start - prefix.length, request.tokens_per_pack):
        rows = [request.texts[group.members[0]].read[prefix.length : group.start] for group in some]
        layers, spans = _keys_and_values(request.model, rows, prefix)
        branches: list[_Branch] = []
        for group, span in zip(some, spans, strict=True):
            for members in _budgeted(group.members, partial(_share, request, group.start), BRANCH_TOKENS):
                branches.append(_Branch(tuple(members), group.start, (slice(0, prefix.length), span)))
        for part in _budgeted(branches, partial(_size, request), request.tokens_per_pack):
            yield _branch_sums(request, part, layers)


def _branch_sums(request: _Request, branches: Sequence[_Branch], layers: Layers) -> tuple[list[int], Tensor]:
    """The branches as one pack, a block each, whose texts do not see each other."""
    members, rows, positions, blocks, texts = [], [], [], [], []
    for branch in branches:
        of_branch = _rows(request, branch)
        members += branch.members
        rows += of_branch
        positions += [torch.arange(branch.start, branch.start + len(row)) for row in of_branch]
        texts.append([len(row) for row in of_branch])
        blocks.append((1, sum(texts[-1])))
    lengths = [len(row) for row in rows]
    pack = Pack(members, tuple(blocks), _joined(rows), torch.cat(positions))
    cache = PrefixCache(layers, [branch.spans for branch in branches], texts)
    return members, _sums(request, pack, cache, members, lengths)


def _share(request: _Request, start: int, index: int) -> int:
    """Of a text in BRANCH_TOKENS: its tokens behind the group's prefix, and on a GPU what its copy of that is of a
    pack.
    """
    tokens = len(request.texts[index].read) - start
    if request.model.device.type != "cuda":
        return tokens
    return max(tokens, start * BRANCH_TOKENS // (KEYS_OF_A_TOKEN * request.tokens_per_pack))


def _size(request: _Request, branch: _Branch) -> int:
    """Of a branch in a pack: its tokens; on a GPU, whose kernel in half precision has copies of the keys for each text,
    those too.
    """
    tokens = sum(map(len, _rows(request, branch)))
    if request.model.device.type != "cuda":
        return tokens
    return max(tokens, len(branch.members) * branch.start // KEYS_OF_A_TOKEN)


def _rows(request: _Request, branch: _Branch) -> TokenLists:
    """What of its texts is behind the group's prefix."""
    return [list(text.read[branch.start :]) for text in request.members(branch.members)]


def _sums(
    request: _Request, pack: Pack, cache: PrefixCache | None, members: Sequence[int], lengths: Sequence[int]
) -> Tensor:  # fmt: skip
    """Sums of the texts, whose last `lengths` tokens lie in the pack one after the other; float64 [texts]."""
    texts = request.members(members)
    # the targets are the last tokens of a text, and each is predicted one position before: so are the last ones read
    ranges = [torch.arange(end - text.targets, end) for text, end in zip(texts, accumulate(lengths), strict=True)]
    selected = torch.cat(ranges).to(request.model.device)
    targets = _joined([text.ids[-text.targets :] for text in texts]).to(request.model.device)
    hidden, _ = forward_with_prefix(request.model.base_model, pack.to(request.model.device), cache, selected=selected)
    values = target_log_probabilities(request.model, hidden, targets, request.choices).double().cpu()
    return torch.stack([part.sum() for part in values.split([text.targets for text in texts])])


def _keys_and_values(model: nn.Module, rows: Sequence[Sequence[int]], prefix: _Prefix) -> tuple[Layers, list[slice]]:
    """Computes the keys and values of `rows`, which follow the prefix; returns them behind the prefix's, and where each
    row's are.
    """
    (pack,) = packs([list(row) for row in rows], sum(map(len, rows)))
    nothing = torch.zeros(0, dtype=torch.long, device=model.device)  # hidden states are not asked for
    moved = prefix.moved(pack).to(model.device)
    cache = prefix.cache(len(pack.blocks))
    _, layers = forward_with_prefix(model.base_model, moved, cache, selected=nothing, keep=True)
    if prefix.length:
        joined = []
        for (old_keys, old_values), (keys, values) in zip(prefix.layers, layers, strict=True):
            joined.append((torch.cat([old_keys, keys], 1), torch.cat([old_values, values], 1)))
        layers = joined
    ends = list(accumulate((len(rows[row]) for row in pack.rows), initial=prefix.length))
    spans = {row: slice(start, end) for row, start, end in zip(pack.rows, ends, ends[1:], strict=False)}
    return layers, [spans[row] for row in range(len(rows))]


def _padded(request: _Request) -> Scored:
    """For families that do not take packs: the model's own logits over right-padded rows."""
    rows: TokenLists = [list(text.read) for text in request.texts]
    for pack in packs(rows, request.tokens_per_pack, padded=True):
        input_ids, attention_mask = pack.to(request.model.device).padded(0)
        logits = request.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        sums = []
        for index, row in zip(pack.rows, logits, strict=True):
            text = request.texts[index]
            scored = row[text.unscored : len(text.read)]
            if request.choices:
                choices = torch.tensor(request.choices, device=row.device)
                nothing = torch.full_like(scored, float("-inf"))
                scored = nothing.index_copy(1, choices, scored[:, list(request.choices)])
            targets = torch.tensor(text.ids[-text.targets :], device=row.device)
            sums.append(-F.cross_entropy(scored, targets, reduction="sum").double().cpu())
        yield pack.rows, torch.stack(sums)


def _common_start(texts: Sequence[ScoredText]) -> int:
    """Number of leading tokens that all texts share and of which none predicts a target."""
    read = [text.read for text in texts]
    pairs = zip(min(read), max(read), strict=False)  # what the first and the last in order share, all share
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(common, *(text.unscored for text in texts))


def _budgeted(items: Iterable, size: Callable[..., int], budget: int) -> Iterator[list]:
    """Consecutive items whose sizes sum up to the budget at most; an item that is larger comes alone."""
    batch: list = []
    total = 0
    for item in items:
        if batch and total + size(item) > budget:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def _joined(rows: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)
