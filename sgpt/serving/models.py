"""What is served: one trunk, the tuned models over it that requests choose from, and perhaps the re-ranker.

What of it tokenises (`prepare…`) may be called by many threads; what computes (`embed`, `rerank`, `contracts`) by one
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.cross_encoder.likelihood import ScoredText, log_probabilities
from sgpt.decoder.quantised import quantised_dtype
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import Delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.probes import probes
from sgpt.runtime.errors import InputError
from sgpt.serving.schema import Refusal
from sgpt.text.markers import Role
from sgpt.text.tokens import content_ids


@dataclass(frozen=True)
class TextRow:
    """A text as it is computed: its ids with markers, and by which model.

    delta: None is the served model itself. strength: None is the one that the delta was loaded with.
    """

    ids: list[int]
    delta: str | None = None
    strength: float | None = None


class ServedModel:
    """An encoder by the name that requests call it, with its loaded deltas (`Encoder.load_delta`).

    encoder.delta, where it has one, is the model's own change to the base, whose strength can be chosen as well.
    """

    def __init__(self, name: str, encoder: Encoder, reranker: CrossEncoder | None = None) -> None:
        self.name, self.encoder, self.reranker = name, encoder.eval(), reranker
        if name in encoder.deltas:
            raise InputError(f"deltas.{name} is what the model itself is called; give it another name, or set name")
        self._contracts: dict[str, Contract] = {}
        # This first call leaves the tokenizer as all later ones need it: from then on threads only read it.
        encoder.token_ids([""], "query")

    @property
    def names(self) -> list[str]:
        """The model's, and those of its deltas."""
        return [self.name, *self.encoder.deltas]

    @property
    def embedding_size(self) -> int:
        return self.encoder.embedding_size

    def delta_named(self, model: str | None, delta: str | None) -> str | None:
        """Which delta a request means, None for the model itself; Refusal with 404, and the names, where there is none.
        """
        for field, name in (("model", model), ("delta", delta)):
            if name is not None and name not in self.names:
                raise Refusal(404, f"{field}={name!r:.80} is not served here; there are {', '.join(self.names)}", field)
        meant = {name for name in (model, delta) if name not in (None, self.name)}
        both = delta == self.name and model not in (None, self.name)  # the other way round is a delta of the model
        if len(meant) > 1 or both:
            raise Refusal(422, f"model={model!r} and delta={delta!r} are two; send one of them", "delta")
        return meant.pop() if meant else None

    def prepare(
        self, texts: Sequence[str], role: Role, delta: str | None, strength: float | None, field: str = "input"
    ) -> tuple[list[TextRow], list[int]]:
        """The texts with the markers and limits of the model they are for, and the indices of those that were cut.

        field: of the request, that holds them. Refusal for a text without any token, as an empty one is where there
        are no markers: its embedding would be zeros, which are similar to nothing.
        """
        if strength is not None and delta is None and self.encoder.delta is None:
            message = f"strength={strength:g} needs a change to a base, and {self.name} is served whole; name a delta"
            raise Refusal(422, message, "strength")
        loaded = None if delta is None else self.encoder.deltas.named(delta)
        contract: Contract = self.encoder.contract if loaded is None else loaded.contract
        frame = (self.encoder.frames if loaded is None else loaded.frames)[role]
        prompt = contract.prompts.get(role, "")
        rows: list[TextRow] = []
        truncated: list[int] = []
        for index, ids in enumerate(content_ids([prompt + text for text in texts], self.encoder.tokenizer)):
            if len(ids) > frame.content_tokens:
                truncated.append(index)
            rows.append(TextRow(frame.put_around(ids), delta, strength))
            if not rows[-1].ids:
                raise Refusal(422, f"{field}[{index}] has no token, so there is nothing to embed; leave it out", field)
        return rows, truncated

    def embed(self, rows: Sequence[TextRow]) -> list[np.ndarray]:
        """Of each row float32 [D], as `Encoder.encode` gives it. Rows of any requests, roles and deltas."""
        different = {(row.delta, row.strength): self._delta(row.delta, row.strength) for row in rows}
        deltas = [different[row.delta, row.strength] for row in rows]
        embeddings: list[np.ndarray] = [np.empty(0)] * len(rows)
        for numbers, of_pack in self.encoder.embed_rows([row.ids for row in rows], deltas):
            self._check_finite(of_pack, "send a smaller strength")
            for number, embedding in zip(numbers, of_pack.numpy(), strict=True):
                embeddings[number] = embedding
        return embeddings

    def _delta(self, name: str | None, strength: float | None) -> Delta | None:
        if name is not None:
            return self.encoder.deltas.named(name, strength)
        own = self.encoder.delta
        return None if strength is None or own is None or strength == own.strength else own.at(strength)

    def prepare_rerank(self, query: str, documents: Sequence[str]) -> tuple[list[ScoredText], list[int]]:
        """The pairs as the re-ranker reads them, and the indices of documents that were cut."""
        if self.reranker is None:
            raise Refusal(404, "there is no re-ranker; start the server with rerank=true")
        try:
            texts = self.reranker.scored_texts([query] * len(documents), documents)
        except InputError as error:  # an empty query, or one that is too long
            raise Refusal(422, str(error), "query") from None
        return texts, [index for index, text in enumerate(texts) if text.cut]

    def rerank(self, texts: Sequence[ScoredText]) -> list[float]:
        """Natural log-probability of the query behind each document; pairs of any requests."""
        reranker = self.reranker
        assert reranker is not None
        apart = [replace(text, group=number) for number, text in enumerate(texts)]  # they are counted by request
        options = {"tokens_per_pack": reranker.pack_size, "choices": reranker.answer_ids}
        scores = log_probabilities(reranker.model, apart, **options)
        self._check_finite(scores, "leave that text out")
        return scores.tolist()

    def contracts(self, names: Sequence[str]) -> list[Contract]:
        """Of the model and its deltas, with what they give for the probe texts where the weights are float32."""
        for name in names:
            if name in self._contracts:
                continue
            encoder = self.encoder if name == self.name else self.encoder.with_delta(name)
            exact = encoder.trunk.dtype == torch.float32 and quantised_dtype(encoder.trunk) is None
            measured = probes(encoder.encode, encoder.token_ids) if exact else encoder.contract.probes
            self._contracts[name] = replace(encoder.contract, probes=measured)
        return [self._contracts[name] for name in names]

    def _check_finite(self, numbers: Tensor, remedy: str) -> None:
        if not numbers.isfinite().all():
            dtype = self.encoder.trunk.dtype
            remedy += "" if dtype == torch.float32 else ", or serve it in float32"
            raise InputError(f"{self.name} gives NaN or infinity for a text, as {dtype} overflows; {remedy}")
