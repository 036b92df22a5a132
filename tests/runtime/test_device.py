"""What a GPU is told; what it does with it is in tests/test_gpu.py."""

import subprocess
import sys

import pytest
import torch

from sgpt.cli.failures import describe_failure
from sgpt.decoder.trunk import ModelConfig, load_trunk
from sgpt.runtime.device import default_device, prepare_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_processor_computes():
    assert default_device() == "cpu"


def test_attention_is_not_cudnns_whoever_opens_a_model(tiny_base):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        load_trunk(ModelConfig(str(tiny_base("bert"))))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("deterministic", [True, False])
def test_it_is_deterministic_where_asked(deterministic):
    try:
        prepare_gpu(deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention would not be
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_cannot_be_deterministic_is_refused_by_the_key_that_allows_it():
    """The words are torch's own."""
    said = (
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism …"
    )
    assert describe_failure(RuntimeError(said), {}) == (
        "cumsum_cuda_kernel does not have a deterministic implementation; set trainer.deterministic=false: last bits "
        "then differ"
    )


def test_a_gpu_that_others_filled_is_told_with_what_they_have():
    """The words are torch's own."""
    free = (
        "CUDA out of memory. Tried to allocate 46.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 23.31 MiB "
        "is free."
    )
    others = "Process 847 has 10.70 GiB memory in use. Process 2113 has 84.90 GiB memory in use."
    own = "Including non-PyTorch memory, this process has 10.72 GiB memory in use"
    rest = "Of the allocated memory 10.01 GiB is allocated by PyTorch, and 92.43 MiB is reserved by PyTorch …"
    error = torch.OutOfMemoryError(f"{free} {others} {own}. {rest}")
    assert describe_failure(error, {"tokens_per_pack": 8192}) == (
        f"not enough memory ({free} {own}, other processes 10.70 GiB, 84.90 GiB); lower tokens_per_pack, or take a "
        "smaller model"
    )


def test_bm25_shows_jax_no_gpu(tmp_path):
    """bm25s imports JAX where it is installed; this one says what it sees."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("import os\nprint('platforms', os.environ.get('JAX_PLATFORMS'))\n")
    (tmp_path / "jax" / "lax.py").write_text("def top_k(scores, number):\n    return None\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sgpt.retrieval.bm25 import bm25_run; "
        "from sgpt.data.formats.beir import RetrievalSet; "
        "found = bm25_run(RetrievalSet('x', {'a': 'one dog', 'b': 'two cats'}, {'q': 'cats'}, {'q': {'b': 1}})); "
        "print(list(found['q']))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["platforms cpu", "['b']"]
