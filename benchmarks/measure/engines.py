"""The engines: one training step each, from strings to gradients; and what of a step no engine gets round."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from measure.given import Setting
from measure.processes import stopwatch
from sgpt.data.feed.collate import Batch, collate
from sgpt.data.feed.example import Example
from sgpt.decoder.packing import distinct
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.memory import keep_freed_memory
from sgpt.training.loss import LossConfig, objective
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import TuningConfig, tune


@dataclass(frozen=True)
class Variant:
    """engine: a row of ENGINES. options: of ours, keep_gigabytes, tokens_per_pack and dtype; of ST, those of its cached
    loss, and none for the plain one.
    """

    name: str
    engine: str
    options: dict[str, float] = field(default_factory=dict)


OURS = Variant("ours", "ours")
COMPETITORS = {
    "mnrl": Variant("ST MNRL", "st"),
    **{f"cached-{size}": Variant(f"ST cached {size}", "st", {"mini_batch_size": size}) for size in (16, 32, 64)},
    **{
        f"cached-{tokens}t": Variant(f"ST cached {tokens}t", "st", {"mini_batch_num_tokens": tokens})
        for tokens in (512, 1024, 2048, 4096)
    },
}
# unpad_inputs, ST's way without padding, asks for FlashAttention 2: a CPU has none, and GPT-Neo and GPT-J could not use
# it.

Step = Callable[[Sequence[Example]], Tensor]  # from strings to gradients; returns the loss


def ours(
    setting: Setting, *, keep_gigabytes: float = math.inf, tokens_per_pack: int | None = None,
    dtype: str | None = None,
) -> tuple[Encoder, Step]:  # fmt: skip
    encoder = open_ours(setting, dtype)
    encoder.tokens_per_pack = tokens_per_pack
    tune(encoder.trunk, TuningConfig())
    encoder.train()

    def step(examples: Sequence[Example]) -> Tensor:
        batch = collate(examples, encoder.tokenizer, encoder.frames)
        return contrastive_step(encoder, batch, LossConfig(), keep_bytes=keep_gigabytes * 1e9).loss

    return encoder, step


def theirs(setting: Setting, **options) -> tuple[nn.Module, Step]:
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.util import batch_to_device

    model = open_theirs(setting)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    model.train()
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=20.0, **options
    ) if options else MultipleNegativesRankingLoss(model, scale=20.0)

    def step(examples: Sequence[Example]) -> Tensor:
        columns = zip(
            *[(example.query, example.positive, *example.hard_negatives) for example in examples], strict=True
        )
        features = [
            model.preprocess(list(texts), task="document" if place else "query") for place, texts in enumerate(columns)
        ]
        value = loss([batch_to_device(feature, setting.device) for feature in features], None)
        value.backward()
        return value.detach()

    return model, step


ENGINES: dict[str, Callable[..., tuple[nn.Module, Step]]] = {"ours": ours, "st": theirs}


def open_ours(setting: Setting, dtype: str | None = None) -> Encoder:
    """dtype: of the frozen weights; None is what the precision says."""
    keep_freed_memory()
    dtype = dtype or ("bfloat16" if setting.precision == "bf16" else "float32")
    contract = Contract("weighted_mean", setting.markers, base=setting.model)
    encoder = Encoder(load_trunk(ModelConfig(setting.model, dtype)), load_tokenizer(setting.model), contract)
    return encoder.to(setting.device)


def open_theirs(setting: Setting) -> nn.Module:
    if setting.keep_memory:
        keep_freed_memory()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(setting.model, model_kwargs={"dtype": torch.float32})  # as its trainer wants them
    transformer.max_seq_length = transformer.document_length = setting.markers.document_max_tokens
    transformer.query_length = setting.markers.query_max_tokens
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="weightedmean")
    return SentenceTransformer(modules=[transformer, pooling], device=setting.device)


def precision(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16")


def count_positions(model: nn.Module) -> list[int]:
    """Grows by the token positions of each forward pass, padding and repetition included."""
    counted: list[int] = []
    table = max(
        (module for module in model.modules() if isinstance(module, nn.Embedding)),
        key=lambda module: module.num_embeddings
    )
    table.register_forward_pre_hook(lambda module, inputs: counted.append(inputs[0].numel()))
    return counted


def matrix_products(encoder: Encoder, batches: Sequence[Batch]) -> float:
    """CPU seconds of the products that no implementation gets round.

    They are outputs and input gradients of every linear layer, over the same tokens in the same packs. Attention's own
    products, which are few, are left out.
    """
    weights = [module.weight.detach() for module in encoder.modules() if isinstance(module, nn.Linear)]
    weights += [module.weight.detach().T for module in encoder.modules() if isinstance(module, Conv1D)]  # [out, in]
    seconds = 0.0
    for batch in batches:
        for pack in encoder.packs(distinct([*batch.queries, *batch.documents])[0]):
            rows = {
                size: torch.randn(len(pack), size, dtype=weights[0].dtype) for weight in weights
                for size in weight.shape
            }
            results = {size: torch.empty_like(row) for size, row in rows.items()}
            with stopwatch() as spent:
                for weight in weights:
                    torch.mm(rows[weight.shape[1]], weight.T, out=results[weight.shape[0]])
                    torch.mm(rows[weight.shape[0]], weight, out=results[weight.shape[1]])
            seconds += spent["cpu"]
    return seconds


def score_matrix(encoder: Encoder, batches: Sequence[Batch]) -> float:
    """CPU seconds of the loss alone, forwards and backwards, from embeddings that are there."""
    seconds = 0.0
    for batch in batches:
        queries, documents = (
            torch.randn(len(rows), encoder.embedding_size, requires_grad=True)
            for rows in (batch.queries, batch.documents)
        )
        with stopwatch() as spent:
            objective(queries, documents, batch, LossConfig())[0].backward()
        seconds += spent["cpu"]
    return seconds


BESIDE = {"products": matrix_products, "scores": score_matrix}
