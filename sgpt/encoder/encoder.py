"""The encoder: tokenizer, markers, trunk and pooling joined. One path for training, encoding and evaluation.

    encoder = Encoder.from_pretrained("runs/pydocs/export")
    encoder.encode_queries(["parse a date from a string"])  # [1, D]

Many tuned models of one base are served from one trunk, each a delta of kilobytes:

    encoder.load_delta("legal", "runs/legal")
    encoder.encode_queries(["a claim", "a recipe"], delta=["legal", None])  # each by its model, in one forward pass
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.decoder.added_biases import remove_biases
from sgpt.decoder.families import embedding_size, position_limit
from sgpt.decoder.int8 import Outliers, int8_products, multiplies_int8
from sgpt.decoder.mixed import alone_with, mixed
from sgpt.decoder.packing import PADDED_AT_MOST, Pack, fitting_tokens, packs
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
from sgpt.encoder.adapter import base_config, base_of, check_tokenizer, convert, open_trunk, refuse_other_base
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import Delta
from sgpt.encoder.deltas import DeltaNames, Deltas, Strengths, check_limits
from sgpt.encoder.head import output_size, read_head
from sgpt.encoder.model_folder import find_model
from sgpt.encoder.pooling import POOLINGS
from sgpt.encoder.probes import Encode, check_probe_embeddings, check_probe_ids
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import Advance, progress_bar
from sgpt.runtime.provenance import content_hash, tokenizer_hash, weights_hash
from sgpt.runtime.values import check_choice
from sgpt.text.markers import ROLES, Frame, MarkersConfig, Role, frames
from sgpt.text.tokens import TokenLists, is_whole_text, marked

log = logging.getLogger(__name__)
TEXTS_AT_A_TIME = 16_384  # whose token ids exist


class Encoder(nn.Module):
    """Texts to embeddings: a tokenizer, markers, a trunk and pooling.

    trunk: any decoder or BERT-like encoder. contract: markers, limits, pooling. Training calls `packs`, `embed_pack`
    and `restore_order`; `forward` is the three in one. tokens_per_pack: None is what suits the device. delta: where
    others use the trunk as well, what makes it this encoder's (sgpt/encoder/delta.py); `encode` puts it on and off.
    deltas: other tuned models over the same trunk by name, see `load_delta`. head: what models of others do to an
    embedding behind the pooling (sgpt/encoder/head.py).
    """

    def __init__(
        self,
        trunk: nn.Module,
        tokenizer,
        contract: Contract,
        *,
        tokens_per_pack: int | None = None,
        delta: Delta | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.delta = delta
        self.deltas = Deltas()
        self.head = head
        self._outliers: Outliers | None = None  # of a trunk in int8, found when it first encodes
        self.trunk, self.tokenizer, self.contract = trunk, tokenizer, contract
        check_vocabulary(tokenizer, trunk)
        self.tokens_per_pack = tokens_per_pack
        self.frames: dict[Role, Frame] = frames(contract.markers, tokenizer)
        check_limits(contract.markers, trunk)
        self.train(trunk.training)  # a new module says it is training, and `encode` would leave its trunk so

    def forward(self, rows: TokenLists) -> Tensor:
        """Token ids of any lengths -> embeddings [rows, D], with gradient, in the order given.

        A row without any token gives zeros.
        """
        all_packs = list(self.packs(rows))
        return self.restore_order(all_packs, [self.embed_pack(pack) for pack in all_packs], len(rows))

    def packs(self, rows: TokenLists) -> Iterator[Pack]:
        """The rows in packs of `pack_size` tokens, longest first, on this encoder's device."""
        padded = not takes_packs(self.trunk)
        return (pack.to(self.device) for pack in packs(rows, self.pack_size, padded=padded))

    @property
    def pack_size(self) -> int:
        """Tokens of a pack: `tokens_per_pack`, or what suits the device."""
        return self.tokens_per_pack or fitting_tokens(self.trunk, self.device)

    def embed_pack(self, pack: Pack) -> Tensor:
        """[rows of the pack, D], with gradient. The trunk computes no padding, unless it does not take packs."""
        assert self.delta is None or self.delta.inside, "the trunk is the base here: use `with encoder.delta:`"
        with self._autocast():
            return self._embed(pack, [self.contract.pooling] * len(pack.rows))

    def _embed_with(self, pack: Pack, deltas: Sequence[Delta | None]) -> Tensor:
        """As `embed_pack`, without gradient, each row with its delta; one for all where the trunk takes no packs."""
        distinct = [*dict.fromkeys(deltas)]
        poolings = [self._contract(delta).pooling for delta in deltas]
        if len(distinct) == 1:
            with self._tuned(distinct[0]), self._autocast():
                return self._embed(pack, poolings)
        own = self.delta.values() if self.delta else {}
        versions = [delta.values() if delta else own for delta in distinct]
        of_rows = [distinct.index(delta) for delta in deltas]
        with mixed(self.trunk, pack, versions, of_rows), self._autocast(*versions):
            return self._embed(pack, poolings)

    def _embed(self, pack: Pack, poolings: Sequence[str]) -> Tensor:
        """poolings: of each row of the pack; all equal for a trunk that does not take packs."""
        if not takes_packs(self.trunk):
            input_ids, mask = pack.padded(self.tokenizer.pad_token_id)
            return self._through_head(_pooled(token_embeddings(self.trunk, input_ids, mask), mask, poolings))
        hidden = packed_token_embeddings(self.trunk, pack)  # [N, D]
        if hidden.device.type == "cuda" and pack.padded_tokens <= PADDED_AT_MOST * len(pack):
            # the kernels of each length would take longer to start than to run
            return self._through_head(_pooled(*pack.pad(hidden), poolings))
        pooled: list[Tensor] = []
        start = 0
        for block in pack.split(hidden):  # [rows, T, D], every token real
            mask = block.new_ones(block.shape[:2], dtype=torch.long)
            pooled.append(_pooled(block, mask, poolings[start : start + len(block)]))
            start += len(block)
        return self._through_head(torch.cat(pooled))

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
        return self._through_head(POOLINGS[self.contract.pooling](hidden, attention_mask))

    def _through_head(self, pooled: Tensor) -> Tensor:
        """[rows, D of the trunk] -> [rows, D]."""
        return pooled if self.head is None else self.head(pooled.float())

    def token_ids(self, texts: Sequence[str], role: Role, deltas: Sequence[Delta | None] | None = None) -> TokenLists:
        """Marked and truncated ids; the content is tokenised alone, so nothing merges with a marker.

        deltas: of each text, as `deltas.of_rows` gives them; its markers and limits are used.
        """
        deltas = deltas or [None] * len(texts)
        rows: TokenLists = [[]] * len(texts)
        for delta in dict.fromkeys(deltas):
            numbers = [number for number, of_text in enumerate(deltas) if of_text is delta]
            prompted = self._prompted([texts[number] for number in numbers], role, delta)
            frame = (delta.frames if delta else self.frames)[role]
            for number, ids in zip(numbers, marked(prompted, self.tokenizer, frame), strict=True):
                rows[number] = ids
        return rows

    def _prompted(self, texts: Sequence[str], role: Role, delta: Delta | None = None) -> Sequence[str]:
        prompt = self._contract(delta).prompts.get(role)
        return [prompt + text for text in texts] if prompt else texts

    def _contract(self, delta: Delta | None) -> Contract:
        return delta.contract if delta else self.contract

    def _tuned(self, delta: Delta | None = None) -> AbstractContextManager:
        """Inside, the trunk is tuned by `delta`, or without one as the encoder was opened."""
        return delta or self.delta or nullcontext()

    def encode_queries(self, texts: Sequence[str], **options) -> np.ndarray | Tensor:
        """As `encode` with role="query"."""
        return self.encode(texts, "query", **options)

    def encode_documents(self, texts: Sequence[str], **options) -> np.ndarray | Tensor:
        """As `encode` with role="document"."""
        return self.encode(texts, "document", **options)

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], role: Role, *,
        delta: DeltaNames = None, strength: Strengths = None,
        normalize: bool | None = None, as_tensor: bool = False, out: Tensor | None = None,
        progress: bool | Advance | None = None,
    ) -> np.ndarray | Tensor:  # fmt: skip
        """Embeddings [texts, D] in float32, on the CPU, in the order given.

        delta: name of a loaded delta, whose model, markers, limits, pooling and normalisation are used; one for all
        texts, or one a text. None is the encoder as it was opened. strength: as in `load_delta`, for all or one a text;
        None takes the one from there. Texts of several deltas share forward passes (sgpt/decoder/mixed.py); over trunks
        that take no packs each delta has passes of its own. Threads may share an encoder: one computes at a time.

        normalize: length 1; None takes the contract's word. out: a tensor to fill and return, a memory map for what
        memory cannot hold; besides it the memory taken does not grow with the texts. A trunk in int8 multiplies in int8
        (sgpt/decoder/int8.py). progress: a bar; None shows one when the work is longer than a few seconds and the
        output is a terminal; a function is told how many more texts are done. A text without any token (empty, without
        markers) gives zeros. Raises InputError for anything but a list of strings, and for embeddings that are not
        finite.
        """
        if isinstance(texts, str):
            raise InputError(f"encode takes a list of texts, got one string {texts!r:.60}; put it in a list")
        if hasattr(texts, "to_list"):  # a column of pandas or polars, of which the first finds rows by label
            texts = texts.to_list()
        if not hasattr(texts, "__len__") or isinstance(texts, Mapping | Set):
            raise InputError(f"encode takes a list of texts, got {type(texts).__name__}; make a list of it")
        check_choice("role", role, ROLES)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"encode: text {number} is {type(text).__name__} {text!r:.60}; give strings")
            if not is_whole_text(text):
                raise InputError(f"encode: text {number} ({text!r:.60}) holds half a character, which is no text")
        deltas = self.deltas.of_rows(len(texts), delta, strength)
        was_training = self.training
        self.eval()
        embeddings = torch.empty(len(texts), self.embedding_size) if out is None else out
        try:
            with progress_bar(f"encoding {len(texts):,} {role} texts", len(texts), progress) as advance:
                for start in range(0, len(texts), TEXTS_AT_A_TIME):
                    stop = start + TEXTS_AT_A_TIME
                    part = embeddings[start:stop].zero_()
                    rows = self.token_ids(texts[start:stop], role, deltas[start:stop])
                    for numbers, of_pack in self.embed_rows(rows, deltas[start:stop], normalize=normalize):
                        if not of_pack.isfinite().all():
                            self._refuse_not_finite(of_pack, [start + number for number in numbers], texts, role)
                        part[numbers] = of_pack
                        advance(len(numbers))
        finally:
            self.train(was_training)
        return embeddings if as_tensor or out is not None else embeddings.numpy()

    @torch.inference_mode()
    def embed_rows(
        self, rows: TokenLists, deltas: Sequence[Delta | None] | None = None, *, normalize: bool | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Of each pack the numbers of its rows and their embeddings [rows of the pack, D], in float32, on the CPU.

        rows: token ids; one without any is in no pack. deltas: of each row, as `deltas.of_rows` gives them. normalize:
        None is what each row's contract says. The encoder is to be in evaluation mode.
        """
        deltas = deltas or [None] * len(rows)
        for of_passes in [rows] if takes_packs(self.trunk) else _by_delta(rows, deltas):
            for pack in self.packs(of_passes):
                of_rows = [deltas[row] for row in pack.rows]
                with alone_with(self.trunk), self._products():
                    embeddings = self._embed_with(pack, of_rows).float()
                unit = [self._contract(delta).normalize if normalize is None else normalize for delta in of_rows]
                if any(unit):
                    chosen = torch.tensor(unit, device=embeddings.device)[:, None]
                    embeddings = torch.where(chosen, F.normalize(embeddings, dim=1), embeddings)
                yield pack.rows, embeddings.cpu()

    def load_delta(self, name: str, path: str | Path, strength: float = 1.0) -> None:
        """Holds another model that was tuned by its biases over the same base; `encode` takes its name.

        It costs the kilobytes of its tensors. path: its run or adapter folder. strength: how much of its change is
        used, base + strength · change, so that 1 is the tuned model bit for bit and 0 the base; in between is more of
        the base's general quality.

        This encoder is the base, or a tuned model of it: then the base is opened for a moment, to know its biases.
        Raises InputError for another base or tokenizer, for what changes more than biases and gains of norms, for a
        name that is used, and where the embeddings are not those that the adapter was saved with. Deltas are for
        `encode` and not for training.
        """
        if self.head is not None:
            raise InputError(
                f"{name}: this model has layers behind its pooling, over which no delta was trained; open the base"
            )
        with alone_with(self.trunk):
            self.deltas.load(self.trunk, self.tokenizer, name, path, strength)
            try:
                self.with_delta(name, 1).check(str(self.deltas[name].folder))
            except InputError:
                self.unload_delta(name)
                raise

    def unload_delta(self, name: str) -> None:
        """Forgets a delta, and leaves the trunk as if it had not been loaded. InputError where there is none.

        Encoders that `with_delta` made of it are refused from then on.
        """
        with alone_with(self.trunk):
            self.deltas.unload(self.trunk, name)

    def with_delta(self, name: str, strength: float | None = None) -> "Encoder":
        """A loaded delta as an encoder of its own over the same trunk, for what takes an encoder: an index, a score.

        Encoders of one trunk encode one after the other.
        """
        delta = self.deltas.named(name, strength)
        other = type(self)(
            self.trunk, self.tokenizer, delta.contract, tokens_per_pack=self.tokens_per_pack, delta=delta
        )
        other.deltas.biases = self.deltas.biases
        return other

    def _refuse_not_finite(self, embeddings: Tensor, numbers: Sequence[int], texts: Sequence[str], role: Role) -> None:
        """Names the first text, in the order given, whose embedding holds NaN or infinity."""
        number = min(number for number, row in zip(numbers, embeddings, strict=True) if not row.isfinite().all())
        raise InputError(
            f"encode: the embedding of {role} {number} ({texts[number]!r:.60}) holds NaN or infinity; "
            f"{type(self.trunk).__name__} overflows in {self.trunk.dtype} or its weights are damaged: try float32, "
            "or another model"
        )

    def fingerprint(self, corpus: Mapping[str, str] | None = None) -> str:
        """Changes with any weight, any rule of the tokenizer and any part of the contract; with a corpus, with any
        document.
        """
        hashes = self.hashes()
        return content_hash([self.contract.fingerprint(), *hashes.values()], corpus or {})

    def hashes(self) -> dict[str, str]:
        """Of the weights and the tokenizer, by which whoever stores them can say which has changed.

        A bias of zeros is as none: an export's class may have some that its adapter has not, and loaded deltas bring
        some.
        """
        with self._tuned():
            held = held_weights(self.trunk)
            weights = weights_hash(
                {name: value for name, value in held.items() if not name.endswith("bias") or value.any()}
            )
        head = {} if self.head is None else {"head": weights_hash(self.head.state_dict())}
        return {"weights": weights, "tokenizer": tokenizer_hash(self.tokenizer), **head}

    def in_dtype(self, dtype: torch.dtype) -> "Encoder":
        """A copy that holds and computes all weights in `dtype`; the encoder itself when it does so already.

        A quantised trunk gets the weights again that it was opened from. Buffers are left as they are, as loading in
        this dtype leaves them: rotary frequencies stay float32. Loaded deltas stay behind.
        """
        if quantised_dtype(self.trunk):
            with self._tuned():
                whole = unquantised(self.trunk)
            return self._over(whole).in_dtype(dtype)
        if all(parameter.dtype == dtype for parameter in self.trunk.parameters()):
            return self
        with self._tuned():
            trunk = copy.deepcopy(self.trunk)
        for parameter in trunk.parameters():
            parameter.data = parameter.data.to(dtype)
        return self._over(trunk)

    def alone(self) -> "Encoder":
        """Itself, or a copy with a trunk of its own where this one is tuned by a delta or has biases for others."""
        if self.delta is None and not self.deltas.biases:
            return self
        with self._tuned():
            trunk = copy.deepcopy(self.trunk)
        own = self.delta.trained.keys() if self.delta else set()
        remove_biases(trunk, self.deltas.biases - own)
        return self._over(trunk)

    def _over(self, trunk: nn.Module) -> "Encoder":
        return type(self)(trunk, self.tokenizer, self.contract, tokens_per_pack=self.tokens_per_pack, head=self.head)

    def encode_in(self, dtype: torch.dtype) -> Encode:
        """`encode` with all weights in `dtype`."""
        return self.in_dtype(dtype).encode

    def check(self, source: str) -> None:
        """InputError where markers, token ids or embeddings are no longer those of the contract.

        Of a quantised trunk no rounding was measured, so its embeddings are not asked. source: the model's folder, for
        the message.
        """
        self.contract.check_roles(self.tokenizer, source)
        check_probe_ids(self, source)
        if quantised_dtype(self.trunk) is None:
            check_probe_embeddings(self, self.trunk.dtype, source)

    def _autocast(self, *versions: Mapping[str, Tensor]) -> AbstractContextManager:
        """Autocast where half-precision weights meet float32 biases, which learn; else what the caller has set.

        versions: values that some rows have instead of the trunk's.
        """
        dtypes = {parameter.dtype for parameter in self.trunk.parameters()}
        dtypes |= {value.dtype for values in versions for value in values.values()}
        half = dtypes - {torch.float32}
        return torch.autocast(self.device.type, half.pop()) if half and len(dtypes) > 1 else nullcontext()

    def _products(self) -> AbstractContextManager:
        """Products in int8, where the trunk is and the processor is fast at them."""
        if quantised_dtype(self.trunk) != "int8" or not multiplies_int8(self.device):
            return nullcontext()
        if self._outliers is None:
            with self._tuned():  # as if these values were the trunk's own, so that both ways of opening agree
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
        of_trunk = embedding_size(self.trunk)
        return of_trunk if self.head is None else output_size(self.head, of_trunk)

    @classmethod
    def over_base(
        cls,
        folder: Path,
        *,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        load: Callable[[ModelConfig], nn.Module] = load_trunk,
    ) -> tuple["Encoder", nn.Module]:
        """The encoder of a bias adapter as a delta over its base, and that base as `load` opens it.

        `load` gives a trunk, or a language model around one: what else uses it finds the base, as the delta is put on
        only while texts are encoded. Raises InputError where base, tokenizer or embeddings are not those of the
        training.
        """
        config = base_config(folder, dtype)
        base = load(config)
        refuse_other_base(base.base_model, folder)
        convert(base, dtype)  # a base in half precision under trained biases keeps its rounded values
        tokenizer = load_tokenizer(config.path)
        check_tokenizer(tokenizer, folder)
        trunk = base.to(device).base_model
        delta = Delta(trunk, folder, untuned={})
        encoder = cls(trunk, tokenizer, delta.contract, delta=delta)
        encoder.check(str(folder))
        return encoder, base

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        markers: MarkersConfig | None = None,
        pooling: str | None = None,
        dtype: str = "float32",
        check: bool = True,
    ) -> "Encoder":
        """Opens an export, adapter or run of ours, a folder of sentence-transformers, or a bare base.

        Of sentence-transformers: Transformer, Pooling, and Dense, LayerNorm and Normalize behind them
        (sgpt/encoder/sentence_transformers.py). markers, pooling: only for models that do not carry a contract; stating
        them against one is refused. An export or adapter that no longer gives the token ids and embeddings that it was
        saved with is refused, too; check: false for who measures them (`sgpt/encoder/verify.py`).
        """
        model = find_model(path)
        folder = model.folder
        if model.is_ours and (markers is not None or pooling is not None):
            raise InputError(f"{folder} carries its markers and pooling in {contracts.FILE}; do not set them")
        if model.kind == "adapter":
            contract = Contract.load(folder)
            tokenizer = load_tokenizer(base_of(folder))
            check_tokenizer(tokenizer, folder)
            encoder = cls(open_trunk(folder, dtype), tokenizer, contract)
            if check:
                encoder.check(str(folder))
            return encoder
        if model.kind == "export":
            contract = Contract.load(folder)
            # probes were computed over the whole weights, and a quantised trunk has them no longer
            encoder = cls(*_load(folder, "float32" if dtype in QUANTISED else dtype), contract)
            if check:
                encoder.check(str(folder))
            if dtype in QUANTISED:
                quantise(encoder.trunk, dtype, str(folder))
            return encoder
        if model.kind == "sentence-transformers":
            trunk, tokenizer, contract, head = _open_foreign(str(path), folder, markers, pooling, dtype)
            return cls(trunk, tokenizer, contract, head=head)
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
    path: str, folder: Path, markers: MarkersConfig | None, pooling: str | None, dtype: str
) -> tuple[nn.Module, object, Contract, nn.Module | None]:  # fmt: skip
    """Trunk, tokenizer, contract and head of a sentence-transformers folder that is none of our exports."""
    stated = sentence_transformers_format.read(folder)
    trunk = load_trunk(ModelConfig(str(stated.transformer), dtype))
    tokenizer = load_tokenizer(str(stated.transformer), **stated.tokenizer_options)
    if stated.lower_case:
        tokenizer = sentence_transformers_format.lower_cased(tokenizer)
    said_by = None if markers else sentence_transformers_format.is_published_with_roles(path, stated, tokenizer)
    contract = sentence_transformers_format.contract_of(stated, trunk, roles=said_by is not None)
    if said_by is not None:
        log.warning(
            "%s: by %s it is an asymmetric SGPT model, so queries are put in [ ] and documents in { }, as in its "
            "training; state markers to open it otherwise",
            path, said_by,
        )  # fmt: skip
    head = read_head(stated.head, embedding_size(trunk))
    contract = replace(contract, markers=markers or contract.markers, pooling=pooling or contract.pooling)
    return trunk, tokenizer, contract, head


def _pooled(hidden: Tensor, mask: Tensor, poolings: Sequence[str]) -> Tensor:
    """[rows, T, D] -> [rows, D], each row by its row of POOLINGS. Every pooling sees all rows, as it would alone."""
    first, *others = dict.fromkeys(poolings)
    pooled = POOLINGS[first](hidden, mask)
    for name in others:
        chosen = torch.tensor([pooling == name for pooling in poolings], device=hidden.device)[:, None]
        pooled = torch.where(chosen, POOLINGS[name](hidden, mask), pooled)
    return pooled


def _by_delta(rows: TokenLists, deltas: Sequence[Delta | None]) -> Iterator[TokenLists]:
    """For each delta all rows, of which those of others are empty."""
    for delta in dict.fromkeys(deltas):
        yield [row if of_row is delta else [] for row, of_row in zip(rows, deltas, strict=True)]
