"""Keys of train/serve.py, and the check that its extra is installed. Imports nothing of it."""

from dataclasses import dataclass, field
from importlib.util import find_spec

from sgpt.decoder.trunk import DTYPES
from sgpt.retrieval.index import IndexConfig
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import (
    COUNT,
    NOT_NEGATIVE,
    Range,
    check_api_key,
    check_choice,
    check_ranges,
    check_unused,
)

PORT = Range("from 0 to 65535", 0, 65535)
TRUNCATIONS = ("say", "refuse")
EXTRA = ("fastapi", "uvicorn", "prometheus_client")


@dataclass
class ServeConfig:
    """Keys of train/serve.py."""

    model: str = ""
    """Folder of a run, export, adapter, sentence-transformers model or base, or a hub id of one of the last two."""
    name: str | None = None
    """What the API calls the model; null takes the name of its folder, which of a run's export is the run's."""
    dtype: str = "float32"
    """What the weights are held in: float32, bfloat16, float16, int8 or nf4."""
    deltas: dict[str, str] = field(default_factory=dict)
    """Name -> folder of further tuned models over the same base, which requests choose by `delta` or `model`."""
    rerank: bool = False
    """Answer /rerank as well, by SGPT-CE with the run's own base, on the same trunk."""
    prompt: str = "G"
    """Of rerank=true: a name of the paper's prompts, or a text with {document} in it."""
    corpus: str | None = None
    """For the search page: JSON lines of _id and text, or a BEIR folder; null serves no page."""
    depth: int = 20
    """Documents that the search page scores again for each query, with rerank=true."""
    host: str = "127.0.0.1"
    """Address to listen at; any other than this machine's own is reached by others, so set api_key too."""
    port: int = 8000
    """Port to listen at; 0 takes a free one and says which."""
    api_key: str | None = None
    """What requests must send as `Authorization: Bearer …`, letters, digits and signs of ASCII; null asks for none."""
    max_batch_tokens: int = 1024
    """Tokens computed at a time, of as many requests as fit; a single text that is longer comes alone."""
    max_wait_ms: float = 2.0
    """Milliseconds that the first text of a batch waits at most for others to share it."""
    max_requests: int = 256
    """Requests that are worked on or wait; any more are refused with 503 and when to come again."""
    max_body_bytes: int = 4_194_304
    """Size of a request; a larger one is refused with 413."""
    max_texts: int = 2048
    """Texts, or documents to re-rank, of one request; more are refused with 422."""
    max_characters: int = 100_000
    """Length of one text; a longer one is refused with 422 before it is tokenised."""
    truncation: str = "say"
    """Of texts longer than the model's limit: say, which lists them in the answer, or refuse, with 422."""
    stop_seconds: float = 30.0
    """Seconds that requests may still take after SIGTERM or Ctrl-C, before they are cut off."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """How the corpus of the search page is kept and searched."""

    def __post_init__(self) -> None:
        counts = ("depth", "max_batch_tokens", "max_requests", "max_body_bytes", "max_texts", "max_characters")
        check_ranges(self, port=PORT, max_wait_ms=NOT_NEGATIVE, stop_seconds=NOT_NEGATIVE)
        check_ranges(self, **dict.fromkeys(counts, COUNT))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("truncation", self.truncation, TRUNCATIONS)
        if not self.host:
            raise InputError("host is empty; set host=127.0.0.1 for this machine alone, or host=0.0.0.0 for all")
        if not self.rerank:
            check_unused(self, ("prompt", "depth"), "rerank=true; set that, or leave it out")
        if self.corpus is None:
            check_unused(self, ("depth", "index"), "corpus; set corpus=<BEIR folder or JSON lines>, or leave it out")
        check_api_key(self.api_key)
        for name, folder in self.deltas.items():
            if not folder:
                raise InputError(f"deltas.{name} is empty; set it to the folder of a run or adapter")


def check_extra() -> None:
    """InputError where a library of the extra `serve` is not installed."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not installed; pip install 'sgpt-framework[serve]'")
