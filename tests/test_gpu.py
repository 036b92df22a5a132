"""What only a GPU can show: `pytest -m gpu`. Reference: the processor, in float64 where a gradient is compared."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sgpt.cross_encoder.likelihood import log_probabilities
from sgpt.data.feed.collate import collate
from sgpt.data.feed.example import Example
from sgpt.decoder import varlen
from sgpt.decoder.families import PACKED_FAMILIES
from sgpt.decoder.quantised import SCHEMES
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.device import prepare_gpu
from sgpt.training.loss import LossConfig
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import FAMILIES
from tests.cross_encoder.test_likelihood import DECODERS, models, reference, texts
from tests.starts import small_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
REPOSITORY = Path(__file__).parents[1]
TEXT = "sort a list of dates by their length and find every name twice in the text"
TEXTS = [" ".join(TEXT.split()[number % 7 : 3 + number]) for number in range(12)]
PAIRS = [Example(text, f"{text} {number}", ()) for number, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def gpu():
    prepare_gpu(deterministic=True)
    yield
    torch.use_deterministic_algorithms(False)


def learning(encoder: Encoder, dtype: torch.dtype, device: str) -> Encoder:
    """A copy on the device, its frozen weights in `dtype`, of whose biases 0.1 are random."""
    encoder = copy.deepcopy(encoder)
    torch.manual_seed(1)
    for name, parameter in encoder.trunk.named_parameters():
        if name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.1
    encoder.trunk = tune(encoder.trunk.to(dtype), TuningConfig())
    if dtype == torch.float64:
        encoder.double()
    return encoder.to(device).eval()  # no dropout


def gradients(encoder: Encoder, keep_bytes: float = float("inf")) -> dict[str, Tensor]:
    batch = collate(PAIRS, encoder.tokenizer, encoder.frames)
    contrastive_step(encoder, batch, LossConfig(), keep_bytes=keep_bytes)
    taken = {}
    for name, value in trainable_parameters(encoder.trunk).items():
        if value.grad is not None:  # BERT's pooler is not used
            taken[name] = value.grad.clone()
    encoder.zero_grad()
    return taken


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all numbers together, relative."""
    one, other = (
        torch.cat([values[name].double().cpu().flatten() for name in expected]) for values in (found, expected)
    )
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_gradient_is_that_of_the_processor_in_float64(family, dtype, bound, tiny_encoder):
    base = tiny_encoder(family)
    expected = gradients(learning(base, torch.float64, "cpu"))
    encoder = learning(base, dtype, "cuda")
    assert distance(gradients(encoder), expected) < bound
    encoder.tokens_per_pack = 40
    assert distance(gradients(encoder, keep_bytes=0), expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "bloom", "llama"])
def test_it_has_the_same_bits_each_time_and_when_it_is_computed_again(family, dtype, tiny_encoder):
    encoder = learning(tiny_encoder(family, document_max_tokens=100), dtype, "cuda")
    first = gradients(encoder)
    for again in (gradients(encoder), gradients(encoder, keep_bytes=0)):
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("pooling", ["weighted_mean", "mean", "last_token", "cls", "max"])
@pytest.mark.parametrize("family", sorted(PACKED_FAMILIES & FAMILIES.keys()))
def test_embeddings_are_those_of_the_processor(family, pooling, tiny_encoder):
    encoder = tiny_encoder(family, pooling=pooling)
    expected = encoder.encode_documents([*TEXTS, ""])
    assert np.abs(encoder.to("cuda").encode_documents([*TEXTS, ""]) - expected).max() < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("family", DECODERS)
def test_the_score_of_a_query_is_that_of_the_processor_one_text_at_a_time(family, dtype, bound):
    plain, ours = models(family, dtype)
    wide = copy.deepcopy(plain).double()
    given = texts()
    expected = torch.tensor([reference(wide, text) for text in given])
    found = log_probabilities(copy.deepcopy(ours).cuda(), given, tokens_per_pack=1000)
    assert ((found - expected).abs() / expected.abs().clamp(min=1)).max() < bound


def test_a_mixed_batch_is_what_each_model_gives_alone(tiny_encoder, tiny_delta):
    encoder = tiny_encoder("llama").to("cuda")
    for seed in (1, 2):
        encoder.load_delta(str(seed), tiny_delta("llama", seed))
    rows = [[None, "1", "2"][number % 3] for number in range(len(TEXTS))]
    mixed = encoder.encode_queries(TEXTS, delta=rows)
    for name in (None, "1", "2"):
        own = [number for number, row in enumerate(rows) if row == name]
        assert np.abs(mixed[own] - encoder.encode_queries(TEXTS, delta=name)[own]).max() < 1e-6


@pytest.mark.parametrize("heads", [(4, 4), (9, 3)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_kernel_for_all_texts_is_there(heads, size):
    assert varlen.takes(torch.zeros(1, heads[0], 9, size, dtype=torch.bfloat16, device="cuda"), 0.0)


@pytest.mark.parametrize("dtype", sorted(SCHEMES))
def test_quantised_weights_are_those_of_the_processor_and_made_without_waiting(dtype):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    scheme = SCHEMES[dtype]
    expected = scheme.dequantise(*scheme.quantise(weight), weight.shape)
    quantised = scheme.quantise(weight.cuda())
    scheme.dequantise(*quantised, weight.shape)  # the first call may copy a table
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = scheme.dequantise(*quantised, weight.shape)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_killed_ends_with_the_same_bits(dtype, tmp_path, tiny_base):
    overrides = small_training(tmp_path, tiny_base("llama"))(tmp_path)
    overrides += [f"model.dtype={dtype}", "trainer.save_every_steps=1", "trainer.max_steps=40"]
    overrides += ["trainer.epochs=5", "trainer.keep_checkpoints=40"]
    found = []
    for name, killed in (("whole", False), ("killed", True)):
        command = [sys.executable, "train/biencoder.py", *overrides, f"name={name}", "resume=true"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if killed:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
            while process.poll() is None and not [*tmp_path.rglob("killed/checkpoints/step-*")]:
                time.sleep(0.01)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert not [*tmp_path.rglob("killed/checkpoints/step-40")]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        found.append(load_file(tmp_path / "runs" / name / "adapter" / "trained.safetensors"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
