"""The one-kernel attention of a GPU. A loop that does what the kernel's documentation says checks what is asked of it.

On this processor the loop is used instead of the kernel, below torch's own function. On a GPU the kernel itself is run.
"""

import logging
import math

import pytest
import torch
from torch import Tensor

from sgpt.cross_encoder.likelihood import log_probabilities
from sgpt.decoder import varlen
from sgpt.decoder.attention import PackContext, _by_blocks, _in_one_kernel, prepare
from sgpt.decoder.families import PACKED_FAMILIES
from sgpt.decoder.packing import Pack, PrefixCache, packs
from sgpt.decoder.trunk import packed_token_embeddings
from tests.conftest import FAMILIES, random_trunk
from tests.cross_encoder.test_likelihood import DECODERS, models, texts

ROWS = [[1] * length for length in (1, 40, 7, 23, 7, 2, 23, 5)]
TO_AGREE = 3  # calls, of whole texts, and of their last tokens in a window and without


def one_text(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, left: int, right: int
) -> Tensor:
    """query [T, heads, size], of the last T keys: a loop over heads, with every position that may be seen named by its
    number.
    """
    places = torch.arange(len(key))
    back = places[len(key) - len(query) :, None] - places[None]
    seen = torch.ones(back.shape, dtype=torch.bool)
    seen &= (back <= left) if left >= 0 else seen
    seen &= (-back <= right) if right >= 0 else seen
    seen &= (back >= 0) if causal else seen
    shared = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // shared].T * (1 / math.sqrt(query.shape[2]) if scale is None else scale)
        heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ value[:, head // shared])
    return torch.stack(heads, 1)


class Kernel:
    """`_flash_attention_forward` and `_flash_attention_backward` on the CPU."""

    def __init__(self) -> None:
        self.calls, self.wrong, self.wrong_backward = 0, 1.0, 1.0
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_flash_attention_forward", self.forward, "CPU")
        self.library.impl("_flash_attention_backward", self.backward, "CPU")

    def compute(
        self, query, key, value, ends, ends_of_keys, longest, longest_of_keys, causal, scale, left, right
    ) -> Tensor:
        assert ends.dtype == ends_of_keys.dtype == torch.int32
        sizes, sizes_of_keys = ends.diff().tolist(), ends_of_keys.diff().tolist()
        assert (longest, longest_of_keys) == (max(sizes), max(sizes_of_keys))
        wide = [query.double().split(sizes), *(tensor.double().split(sizes_of_keys) for tensor in (key, value))]
        texts = [
            one_text(*text, causal, scale, -1 if left is None else left, -1 if right is None else right)
            for text in zip(*wide, strict=True)
        ]
        return torch.cat(texts)

    def forward(
        self, query, key, value, ends, ends_of_keys, longest, longest_of_keys, dropout, causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None, **others,
    ):  # fmt: skip
        self.calls += 1
        found = self.compute(
            query, key, value, ends, ends_of_keys, longest, longest_of_keys, causal, scale, window_size_left,
            window_size_right,
        )  # fmt: skip
        nothing = torch.empty(0)
        return (
            (found * self.wrong).to(query.dtype),
            torch.zeros(query.shape[1], len(query)),
            torch.empty(0, dtype=torch.uint64),
            nothing,
            nothing,
        )

    def backward(
        self,
        gradient,
        query,
        key,
        value,
        out,
        lse,
        ends,
        ends_of_keys,
        longest,
        longest_of_keys,
        dropout,
        causal,
        state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
            found = self.compute(
                *leaves, ends, ends_of_keys, longest, longest_of_keys, causal, scale, window_size_left,
                window_size_right,
            )  # fmt: skip
            return tuple(
                (part * self.wrong_backward).to(query.dtype)
                for part in torch.autograd.grad(found, leaves, gradient.double())
            )


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(varlen, "DEVICES", {"cpu"})
    varlen._agrees.cache_clear()
    made = Kernel()
    yield made
    made.library._destroy()
    varlen._agrees.cache_clear()


def with_gradients(attention, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    found = attention(*leaves)
    found.backward(gradient)
    return [found.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads_of_keys", [4, 2])
def test_it_is_asked_for_what_the_blocks_compute(kernel, causal, window, heads_of_keys):
    (pack,) = packs(ROWS, 1000)
    context = PackContext(pack)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, len(pack), 8, dtype=torch.float64) for heads in (4, heads_of_keys, heads_of_keys)]
    gradient = torch.randn(1, 4, len(pack), 8, dtype=torch.float64)

    def in_one(*tensors: Tensor) -> Tensor:
        first = [tensor[0].transpose(0, 1) for tensor in tensors]
        return varlen.attend(*first, context.ends, 40, scale=0.7, window=window, causal=causal).transpose(0, 1)[None]

    blocks = with_gradients(
        lambda *tensors: _by_blocks(*tensors, context, scale=0.7, window=window, causal=causal), inputs, gradient
    )
    for left, right in zip(blocks, with_gradients(in_one, inputs, gradient), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert kernel.calls == 1


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads_of_keys", [4, 2])
@pytest.mark.parametrize("several", [True, False], ids=["several texts a block", "one"])
def test_behind_a_prefix_it_is_asked_for_what_the_blocks_compute(kernel, several, window, heads_of_keys):
    """Three texts behind 3 of 20 cached tokens and then 4, one behind the 3 and 6 others."""
    torch.manual_seed(0)
    cached = [torch.randn(heads_of_keys, 20, 8, dtype=torch.float64) for _ in range(2)]
    spans = [(slice(0, 3), slice(9, 13)), (slice(0, 3), slice(14, 20))]
    blocks, texts = (((1, 9), (1, 2)), [[4, 3, 2], [2]]) if several else (((3, 4), (1, 2)), None)
    positions = [torch.arange(7, 7 + length) for length in ((4, 3, 2) if several else (4, 4, 4))]
    positions.append(torch.arange(9, 11))
    number = sum(map(len, positions))
    pack = Pack([0, 1, 2, 3], blocks, torch.ones(number, dtype=torch.long), torch.cat(positions))
    context = PackContext(pack, PrefixCache([tuple(cached)], spans, texts))
    inputs = [torch.randn(1, heads, number, 8, dtype=torch.float64) for heads in (4, heads_of_keys, heads_of_keys)]
    in_one = _in_one_kernel(*inputs, context, 0.7, window)
    blocks = _by_blocks(*inputs, context, scale=0.7, window=window)
    torch.testing.assert_close(in_one, blocks, rtol=1e-12, atol=1e-12)
    assert kernel.calls == 1


@pytest.mark.parametrize("family", DECODERS)
def test_scores_in_half_precision_are_computed_by_it(kernel, family):
    """Prefix of all texts, prefixes of documents, queries."""
    ours = models(family, torch.bfloat16)[1]
    in_one = log_probabilities(ours, texts(), tokens_per_pack=128)
    asked = kernel.calls
    varlen.DEVICES.clear()
    blocks = log_probabilities(ours, texts(), tokens_per_pack=128)
    assert kernel.calls == asked
    assert (asked > TO_AGREE) == (family != "bloom")
    assert in_one.tolist() == pytest.approx(blocks.tolist(), rel=0.02, abs=0.1)


@pytest.mark.parametrize("family", sorted(PACKED_FAMILIES))
def test_a_trunk_in_half_precision_attends_by_it(kernel, family):
    trunk = prepare(random_trunk(family, 64)).to(torch.bfloat16).eval()
    (pack,) = packs(ROWS, 1000)
    in_one = packed_token_embeddings(trunk, pack)
    asked = kernel.calls
    varlen.DEVICES.clear()
    blocks = packed_token_embeddings(trunk, pack)
    # the first to see that it agrees; ALiBi is a bias on the scores
    assert asked == (0 if family == "bloom" else TO_AGREE + trunk.config.num_hidden_layers)
    assert kernel.calls == asked
    torch.testing.assert_close(in_one, blocks, rtol=0, atol=0.04 * blocks.abs().max().item())


@pytest.mark.parametrize("told", [True, False])
def test_shared_heads_are_told_to_a_torch_that_can_be_told(told, monkeypatch):
    """torch 2.11's function has no such option, and takes them without."""
    asked = []

    def newer(*inputs, scale, window_size, enable_gqa=False):
        asked.append(enable_gqa)

    def older(*inputs, scale, window_size):
        asked.append(None)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", newer if told else older)
    query, key = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    varlen.attend(query, key, key, torch.tensor([0, 3]), 3, scale=None, window=None, causal=True)
    assert asked == [True if told else None]


@pytest.mark.parametrize("inference", [True, False])
def test_it_is_found_right_by_whoever_asks_first(kernel, inference):
    with torch.inference_mode(inference):
        assert varlen.takes(torch.zeros(1, 4, 9, 8, dtype=torch.bfloat16), 0.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # rotary embedding gives float32 under autocast
def test_under_autocast_every_family_attends_by_it(kernel, family):
    trunk = prepare(random_trunk(family, 64)).eval()
    (pack,) = packs(ROWS, 1000)
    with torch.autocast("cpu", torch.bfloat16):
        packed_token_embeddings(trunk, pack)
    assert kernel.calls == TO_AGREE + trunk.config.num_hidden_layers


def test_what_it_cannot_do_is_left_to_the_blocks(kernel):
    half = torch.zeros(1, 4, 9, 8, dtype=torch.bfloat16)
    assert varlen.takes(half, 0.0)
    assert not varlen.takes(half, 0.1)
    assert not varlen.takes(half.float(), 0.0)
    assert not varlen.takes(half[..., :4], 0.0)


@pytest.mark.parametrize(
    ("wrong", "backward", "told"),
    [(1.1, 1.0, "off by 10."), (1.0, 1.2, "off by 20."), (math.nan, 1.0, "nan"), (1.0, math.nan, "nan")],
)
def test_a_kernel_that_is_wrong_is_not_used(kernel, caplog, wrong, backward, told):
    kernel.wrong, kernel.wrong_backward = wrong, backward
    with caplog.at_level(logging.WARNING):
        assert not varlen.takes(torch.zeros(1, 4, 9, 8, dtype=torch.bfloat16), 0.0)
    assert told in caplog.text


@pytest.mark.parametrize("inference", [True, False])
def test_without_a_kernel_a_warning_says_so_once(monkeypatch, caplog, inference):
    monkeypatch.setattr(varlen, "DEVICES", {"cpu"})
    varlen._agrees.cache_clear()
    with caplog.at_level(logging.WARNING), torch.inference_mode(inference):
        for _ in range(2):
            assert not varlen.takes(torch.zeros(1, 4, 9, 8, dtype=torch.bfloat16), 0.0)
    varlen._agrees.cache_clear()
    assert caplog.text.count("no variable-length attention on cpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_on_a_gpu_the_gradient_is_that_of_the_blocks(family):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    trunk = prepare(random_trunk(family, 64)).to("cuda", torch.bfloat16).eval()
    pack = next(packs(ROWS, 1000)).to("cuda")
    found = []
    for devices in ({"cuda"}, set()):
        varlen.DEVICES.clear()
        varlen.DEVICES.update(devices)
        trunk.zero_grad()
        packed_token_embeddings(trunk, pack).float().square().sum().backward()
        found.append(
            {name: parameter.grad.float() for name, parameter in trunk.named_parameters() if parameter.grad is not None}
        )
    varlen.DEVICES.add("cuda")
    largest = max(gradient.abs().max().item() for gradient in found[1].values())
    for name, gradient in found[1].items():
        # softmax does not see a bias of BERT's keys: its gradient is rounding alone, of numbers as large as any
        own = 1e-4 * largest if name.endswith("self.key.bias") else 0.05 * gradient.abs().max().item() + 1e-3
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=own)
