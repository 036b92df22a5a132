"""The encoder: tokenizer, markers, trunk and pooling joined. One path for training, encoding and evaluation.

    encoder = Encoder.from_pretrained("runs/pydocs/export")
    encoder.encode_queries(["parse a date from a string"])  # [1, D]
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.decoder.families import embedding_size, position_limit
from sgpt.decoder.int8 import Outliers, int8_products, multiplies_int8
from sgpt.decoder.packing import Pack, packs
from sgpt.decoder.quantised import QUANTISED, find_outliers, held_weights, quantise, quantised_dtype
from sgpt.decoder.trunk import (
    ModelConfig,
    check_vocabulary,
    load_tokenizer,
    load_trunk,
    packed_token_embeddings,
    takes_packs,
    token_embeddings,
    unquantised,
)
from sgpt.encoder import contract as contracts
from sgpt.encoder import sentence_transformers as sentence_transformers_format
from sgpt.encoder.adapter import base_of, check_tokenizer, open_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.model_folder import find_model
from sgpt.encoder.pooling import POOLINGS
from sgpt.encoder.probes import Encode, check_probes
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import content_hash, tokenizer_hash, weights_hash
from sgpt.text.markers import ROLES, Frame, MarkersConfig, Role, frames
from sgpt.text.tokens import TokenLists, content_ids, marked

TOKENS_PER_PACK = 4096
TEXTS_AT_A_TIME = 16_384  # whose token ids exist


class Encoder(nn.Module):
    """Texts to embeddings: a tokenizer, markers, a trunk and pooling.

    trunk: any decoder or BERT-like encoder. contract: markers, limits, pooling. Training calls `packs`, `embed_pack`
    and `restore_order`; `forward` is the three in one. delta: where others use the trunk as well, what makes it this
    encoder's (sgpt/encoder/delta.py); `encode` puts it on and off.
    """

    def __init__(
        self,
        trunk: nn.Module,
        tokenizer,
        contract: Contract,
        *,
        tokens_per_pack: int = TOKENS_PER_PACK,
        delta: AbstractContextManager | None = None,
    ) -> None:
        super().__init__()
        self._outliers: Outliers | None = None  # of a trunk in int8, found when it first encodes
        self.delta = nullcontext() if delta is None else delta
        self.trunk, self.tokenizer, self.contract = trunk, tokenizer, contract
        check_vocabulary(tokenizer, trunk)
        self.tokens_per_pack = tokens_per_pack
        self.frames: dict[Role, Frame] = frames(contract.markers, tokenizer)
        _check_limits(contract.markers, trunk)
        self.train(trunk.training)  # a new module says it is training, and `encode` would leave its trunk so

    def forward(self, rows: TokenLists) -> Tensor:
        """Token ids of any lengths -> embeddings [rows, D], with gradient, in the order given.

        A row without any token gives zeros.
        """
        all_packs = list(self.packs(rows))
        return self.restore_order(all_packs, [self.embed_pack(pack) for pack in all_packs], len(rows))

    def packs(self, rows: TokenLists) -> Iterator[Pack]:
        """The rows in packs of `tokens_per_pack`, longest first, on this encoder's device."""
        padded = not takes_packs(self.trunk)
        return (pack.to(self.device) for pack in packs(rows, self.tokens_per_pack, padded=padded))

    def embed_pack(self, pack: Pack) -> Tensor:
        """[rows of the pack, D], with gradient. No padding is computed, except for trunks that do not take packs."""
        inside = getattr(self.delta, "inside", True)
        assert inside, "the trunk is the base here: call this inside of `with encoder.delta:`"
        with self._autocast():
            if not takes_packs(self.trunk):
                return self.embed(*pack.padded(self.tokenizer.pad_token_id))
            hidden = packed_token_embeddings(self.trunk, pack)  # [N, D]
            pool = POOLINGS[self.contract.pooling]
            pooled = []
            for block in pack.split(hidden):  # [rows, T, D], every token real
                mask = block.new_ones(block.shape[:2], dtype=torch.long)
                pooled.append(pool(block, mask))
            return torch.cat(pooled)

    def restore_order(self, all_packs: Sequence[Pack], embeddings: Sequence[Tensor], num_rows: int) -> Tensor:
        """The packs' embeddings as [num_rows, D], in the order of the rows; zeros for rows that are in no pack."""
        order = torch.tensor([row for pack in all_packs for row in pack.rows], dtype=torch.long, device=self.device)
        dtype = embeddings[0].dtype if embeddings else None
        nothing = torch.zeros(0, self.embedding_size, device=self.device, dtype=dtype)  # for `cat`, where no pack is
        by_pack = torch.cat([*embeddings, nothing])
        return by_pack.new_zeros(num_rows, self.embedding_size).index_copy(0, order, by_pack)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[rows, T] with padding on either side -> [rows, D]."""
        hidden = token_embeddings(self.trunk, input_ids, attention_mask)
        return POOLINGS[self.contract.pooling](hidden, attention_mask)

    def token_ids(self, texts: Sequence[str], role: Role) -> TokenLists:
        """Marked and truncated ids; the content is tokenised alone, so nothing merges with a marker."""
        return marked(self._prompted(texts, role), self.tokenizer, self.frames[role])

    def _prompted(self, texts: Sequence[str], role: Role) -> Sequence[str]:
        prompt = self.contract.prompts.get(role)
        return [prompt + text for text in texts] if prompt else texts

    def encode_queries(self, texts: Sequence[str], **options) -> np.ndarray | Tensor:
        """As `encode` with role="query"."""
        return self.encode(texts, "query", **options)

    def encode_documents(self, texts: Sequence[str], **options) -> np.ndarray | Tensor:
        """As `encode` with role="document"."""
        return self.encode(texts, "document", **options)

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], role: Role, *,
        normalize: bool | None = None, as_tensor: bool = False, out: Tensor | None = None, progress: bool | None = None,
    ) -> np.ndarray | Tensor:  # fmt: skip
        """Embeddings [texts, D] in float32, on the CPU, in the order given.

        normalize: length 1; None takes the contract's word. out: a tensor to fill and return, a memory map for what
        memory cannot hold; besides it the memory taken does not grow with the texts. A trunk in int8 multiplies in int8
        (sgpt/decoder/int8.py). progress: a bar; None shows one when the work is longer than a few seconds and the
        output is a terminal. A text without any token (empty, without markers) gives zeros. Raises InputError for
        anything but a list of strings, and for embeddings that are not finite.
        """
        if isinstance(texts, str):
            raise InputError(f"encode takes a list of texts, got one string {texts!r:.60}; put it in a list")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"encode: text {number} is {type(text).__name__} {text!r:.60}; give strings")
        was_training = self.training
        self.eval()
        embeddings = torch.empty(len(texts), self.embedding_size) if out is None else out
        unit = self.contract.normalize if normalize is None else normalize
        with self.delta, progress_bar(f"encoding {len(texts):,} {role} texts", len(texts), progress) as advance:
            for start in range(0, len(texts), TEXTS_AT_A_TIME):
                part = embeddings[start : start + TEXTS_AT_A_TIME].zero_()
                for pack in self.packs(self.token_ids(texts[start : start + TEXTS_AT_A_TIME], role)):
                    with self._products():
                        of_pack = self.embed_pack(pack).float()  # [rows of the pack, D]
                    of_pack = (F.normalize(of_pack, dim=1) if unit else of_pack).cpu()
                    if not of_pack.isfinite().all():
                        self._refuse_not_finite(of_pack, [start + row for row in pack.rows], texts, role)
                    part[pack.rows] = of_pack
                    advance(len(pack.rows))
        self.train(was_training)
        return embeddings if as_tensor or out is not None else embeddings.numpy()

    def _refuse_not_finite(self, embeddings: Tensor, numbers: Sequence[int], texts: Sequence[str], role: Role) -> None:
        """Names the first text, in the order given, whose embedding holds NaN or infinity."""
        number = min(number for number, row in zip(numbers, embeddings, strict=True) if not row.isfinite().all())
        raise InputError(
            f"encode: the embedding of {role} {number} ({texts[number]!r:.60}) holds NaN or infinity; "
            f"{type(self.trunk).__name__} overflows in {self.trunk.dtype} or its weights are damaged: try float32, "
            "or another model"
        )

    def truncation_share(self, texts: Sequence[str], role: Role) -> float:
        """Share of texts longer than the limit, 0 to 1."""
        room = self.frames[role].content_tokens
        contents = content_ids(self._prompted(texts, role), self.tokenizer)
        return sum(len(ids) > room for ids in contents) / max(1, len(texts))

    def padding_share(self, rows: TokenLists) -> float:
        """Share of computed positions that are padding, 0 to 1: none in packs."""
        if takes_packs(self.trunk):
            return 0.0
        all_packs = list(self.packs(rows))
        return 1 - sum(map(len, all_packs)) / max(1, sum(pack.padded_tokens for pack in all_packs))

    def fingerprint(self, corpus: Mapping[str, str] | None = None) -> str:
        """Changes with any weight, any rule of the tokenizer and any part of the contract; with a corpus, with any
        document.
        """
        with self.delta:
            weights = weights_hash(held_weights(self.trunk))
        parts = [self.contract.fingerprint(), weights, tokenizer_hash(self.tokenizer)]
        return content_hash(parts, corpus or {})

    def in_dtype(self, dtype: torch.dtype) -> "Encoder":
        """A copy that holds and computes all weights in `dtype`; the encoder itself when it does so already.

        A quantised trunk gets the weights again that it was opened from. Buffers are left as they are, as loading in
        this dtype leaves them: rotary frequencies stay float32.
        """
        if quantised_dtype(self.trunk):
            with self.delta:
                whole = unquantised(self.trunk)
            return self._over(whole).in_dtype(dtype)
        if all(parameter.dtype == dtype for parameter in self.trunk.parameters()):
            return self
        with self.delta:
            trunk = copy.deepcopy(self.trunk)
        for parameter in trunk.parameters():
            parameter.data = parameter.data.to(dtype)
        return self._over(trunk)

    def _over(self, trunk: nn.Module) -> "Encoder":
        return type(self)(trunk, self.tokenizer, self.contract, tokens_per_pack=self.tokens_per_pack)

    def encode_in(self, dtype: torch.dtype) -> Encode:
        """`encode` with all weights in `dtype`."""
        return self.in_dtype(dtype).encode

    def _autocast(self) -> AbstractContextManager:
        """Autocast where half-precision weights meet float32 biases, which learn; else what the caller has set."""
        dtypes = {parameter.dtype for parameter in self.trunk.parameters()}
        half = dtypes - {torch.float32}
        return torch.autocast(self.device.type, half.pop()) if half and len(dtypes) > 1 else nullcontext()

    def _products(self) -> AbstractContextManager:
        """Products in int8, where the trunk is and the processor is fast at them."""
        if quantised_dtype(self.trunk) != "int8" or not multiplies_int8(self.device):
            return nullcontext()
        if self._outliers is None:
            self._outliers = find_outliers(self.trunk)
        return int8_products(self._outliers)

    def train(self, mode: bool = True) -> "Encoder":
        """As every module's; what learns moves, so that the outliers of a trunk in int8 are to be found again."""
        if mode:
            self._outliers = None
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    @property
    def embedding_size(self) -> int:
        return embedding_size(self.trunk)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        markers: MarkersConfig | None = None,
        pooling: str | None = None,
        dtype: str = "float32",
    ) -> "Encoder":
        """Opens an export, adapter or run of ours, a folder of sentence-transformers, or a bare base.

        Of sentence-transformers: Transformer, Pooling and, if it is there, Normalize
        (sgpt/encoder/sentence_transformers.py). markers, pooling: only for models that do not carry a contract; stating
        them against one is refused. An export that no longer gives the embeddings it was saved with is refused, too.
        """
        model = find_model(path)
        folder = model.folder
        if model.is_ours and (markers is not None or pooling is not None):
            raise InputError(f"{folder} carries its markers and pooling in {contracts.FILE}; do not set them")
        if model.kind == "adapter":
            contract = Contract.load(folder)
            tokenizer = load_tokenizer(base_of(folder))
            check_tokenizer(tokenizer, folder)
            return cls(open_trunk(folder, dtype), tokenizer, contract)
        if model.kind == "export":
            contract = Contract.load(folder)
            # probes were computed over the whole weights, and a quantised trunk has them no longer
            encoder = cls(*_load(folder, "float32" if dtype in QUANTISED else dtype), contract)
            check_probes(contract, encoder.trunk.dtype, encoder.encode, encoder.encode_in, str(folder))
            if dtype in QUANTISED:
                quantise(encoder.trunk, dtype, str(folder))
            return encoder
        if model.kind == "sentence-transformers":
            return cls(*_open_foreign(folder, markers, pooling, dtype))
        trunk, tokenizer = _load(path, dtype)
        markers = markers or _unmarked(position_limit(trunk))
        return cls(trunk, tokenizer, Contract(pooling or "weighted_mean", markers, base=str(path)))


def _load(path: str | Path, dtype: str) -> tuple[nn.Module, object]:
    return load_trunk(ModelConfig(str(path), dtype)), load_tokenizer(str(path))


def _unmarked(limit: int | None) -> MarkersConfig:
    """For a base that was not trained with markers: none, and as many tokens as the default where they fit."""
    tokens = min(limit or 300, 300)
    return MarkersConfig("none", tokens, tokens)


def _open_foreign(
    folder: Path, markers: MarkersConfig | None, pooling: str | None, dtype: str
) -> tuple[nn.Module, object, Contract]:  # fmt: skip
    """Trunk, tokenizer and contract of a sentence-transformers folder that is none of our exports."""
    stated = sentence_transformers_format.read(folder)
    trunk = load_trunk(ModelConfig(str(stated.transformer), dtype))
    tokenizer = load_tokenizer(str(stated.transformer), **stated.tokenizer_options)
    if stated.lower_case:
        tokenizer = sentence_transformers_format.lower_cased(tokenizer)
    contract = sentence_transformers_format.contract_of(stated, trunk)
    return trunk, tokenizer, replace(contract, markers=markers or contract.markers, pooling=pooling or contract.pooling)


def _check_limits(markers: MarkersConfig, trunk: nn.Module) -> None:
    limit = position_limit(trunk)
    for role in ROLES:
        if limit is not None and markers.max_tokens(role) > limit:
            raise InputError(
                f"markers.{role}_max_tokens={markers.max_tokens(role)} is more than the {limit} positions of "
                f"{type(trunk).__name__}; lower it to {limit} or less"
            )
