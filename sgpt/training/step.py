"""One contrastive step: from a batch of token ids to gradients, in as much memory as it is given.

The texts of a batch are embedded in packs (sgpt/decoder/packing.py). A pack's activations stay in memory until its
backward pass while all together are within `keep_bytes` (trainer.keep_gigabytes). Of the other packs only the
embeddings are computed; when the loss has given the gradient of each embedding, the pack is computed again, with the
random state that it had. With keep_bytes=0 that is GradCache (Gao et al. 2021, arXiv 2101.06983). The gradient is the
same number for number, dropout included; only time and memory differ.

The scores are computed for some queries at a time as well, so a batch is limited by nothing but time.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from sgpt.data.feed.collate import Batch
from sgpt.decoder.packing import Pack, distinct
from sgpt.decoder.trunk import takes_packs
from sgpt.encoder.encoder import Encoder
from sgpt.training.loss import LossConfig, StepResult, objective
from sgpt.training.sharding import agreed, in_step


def contrastive_step(
    encoder: Encoder, batch: Batch, config: LossConfig, *, keep_bytes: float = float("inf"), weight: float = 1.0
) -> StepResult:
    """Adds weight · the loss' gradients to the learning parameters'.

    keep_bytes: of activations that may stay alive between the forward and the backward pass.
    """
    rows, numbers = distinct([*batch.queries, *batch.documents])  # a text that occurs twice is embedded once
    own_packs = list(encoder.packs(rows))
    packs = in_step(encoder.trunk, own_packs)
    embedded = _embed(encoder, packs, keep_bytes)
    own = embedded[: len(own_packs)]
    # The graph of the loss begins at the embeddings. Its gradient there is all that the backward pass of a pack needs.
    parts = [part.embeddings.detach() for part in own]
    embeddings = encoder.restore_order(own_packs, parts, len(rows)).requires_grad_()  # [distinct, D]
    queries, documents = embeddings[numbers].split([len(batch.queries), len(batch.documents)])
    loss, result = objective(queries, documents, batch, config)
    with torch.autocast(encoder.device.type, enabled=False):  # backwards, it would round float32 products
        (loss * weight).backward()
    after = _random_state(encoder.device)
    for number, (pack, part) in enumerate(zip(packs, embedded, strict=True)):
        gradient = embeddings.grad[pack.rows]
        part.backward(encoder, pack, gradient if number < len(own) else torch.zeros_like(gradient))
    _restore_random_state(after, encoder.device)  # as one pass would have left it

    tokens = sum(map(len, own_packs))
    positions = tokens if takes_packs(encoder.trunk) else sum(pack.padded_tokens for pack in own_packs)
    kept_tokens = sum(len(pack) for pack, part in zip(own_packs, own, strict=True) if part.state is None)
    return replace(result, tokens=tokens, positions=positions, kept_tokens=kept_tokens)


@dataclass
class _EmbeddedPack:
    """One pack's embeddings: with their graph, or without it and with the random state to compute them again."""

    embeddings: Tensor
    state: tuple[Tensor, Tensor | None] | None

    def backward(self, encoder: Encoder, pack: Pack, gradient: Tensor) -> None:
        if self.state is not None:
            _restore_random_state(self.state, encoder.device)
            self.embeddings = encoder.embed_pack(pack)
        if self.embeddings.requires_grad:
            with torch.autocast(encoder.device.type, enabled=False):
                self.embeddings.backward(gradient)
        self.embeddings = None  # the graph goes with it


def _embed(encoder: Encoder, packs: list[Pack], keep_bytes: float) -> list[_EmbeddedPack]:
    """Keeps the graphs of the packs that fit.

    What a pack takes is known only once it is computed, so it is estimated from the bytes per token of the packs
    before; the first one is computed unless keep_bytes is 0.
    """
    embedded: list[_EmbeddedPack] = []
    kept_bytes, kept_tokens = 0, 0
    for pack in packs:
        state = _random_state(encoder.device)
        expected = kept_bytes / kept_tokens * len(pack) if kept_tokens else 0
        if agreed(encoder.trunk, keep_bytes > 0 and kept_bytes + expected <= keep_bytes, encoder.device):
            with SavedBytes(encoder.trunk) as saved:
                embeddings = encoder.embed_pack(pack)
            if agreed(encoder.trunk, kept_bytes + saved.bytes <= keep_bytes, encoder.device):
                kept_bytes += saved.bytes
                kept_tokens += len(pack)
                embedded.append(_EmbeddedPack(embeddings, None))
                continue
            keep_bytes = 0  # it does not fit, and no other one is tried
            embedded.append(_EmbeddedPack(embeddings.detach(), state))
            continue
        with torch.no_grad():
            embedded.append(_EmbeddedPack(encoder.embed_pack(pack), state))
    return embedded


class SavedBytes:
    """Counts what autograd keeps for the backward pass: each storage once.

    The weights, of which it keeps views, are not counted: they are there anyway. Those of a sharded trunk are gathered
    for each block, and are known by their type.
    """

    def __init__(self, trunk: nn.Module) -> None:
        tensors = (*trunk.parameters(), *trunk.buffers())
        whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in whole}  # addresses
        self.storages: dict[int, int] = {}  # address -> bytes

    def __enter__(self) -> "SavedBytes":
        self.hooks = saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        whole = tensor if tensor._base is None else tensor._base
        if storage.data_ptr() not in self.weights and not isinstance(whole, nn.Parameter):
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a result itself would hold the operation that keeps it, and both were never freed

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the processor, and of the GPU where there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
