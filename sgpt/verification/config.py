"""Keys of train/verify.py."""

from dataclasses import dataclass, field, fields

from sgpt.encoder.probes import HALVES
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, POSITIVE, SHARE, check_api_key, check_choice, check_ranges, check_unused
from sgpt.verification.clients import APIS

CHOICES = {"dtype": ("float32", *HALVES), "markers_by": ("server", "client"), "delta_as": ("delta", "model")}


@dataclass
class VerifyConfig:
    """What is verified: a folder by every loader, or, with `endpoint`, a running server against it."""

    model: str = ""
    """Folder of a run, export, adapter or sentence-transformers model: what was trained."""
    endpoint: str | None = None
    """URL of a server, for example http://127.0.0.1:8000; null opens the folder by every loader that is installed."""
    api: str = "openai"
    """How the server is spoken to: openai (/v1/embeddings), tei (/embed) or cohere (/v2/embed)."""
    api_key: str | None = None
    """Sent as `Authorization: Bearer …`."""
    served_name: str | None = None
    """What the server calls the model; null takes the first one that /v1/models lists."""
    deltas: dict[str, str] = field(default_factory=dict)
    """Name -> folder of further tuned models that the server applies where a request names them."""
    delta_as: str = "delta"
    """Where a request names its delta: in a field `delta`, or in the field `model`, as vLLM has it."""
    markers_by: str = "server"
    """Who puts the markers around a text: server, which is told the role; or client: they are sent as text."""
    dtype: str = "float32"
    """What the server computes in, of which the rounding with these weights is allowed."""
    least_cosine: float | None = None
    """Of a served vector to the trained one; null is what rounding in `dtype` explains."""
    texts_per_request: int = 32
    """Most texts of one request."""
    requests_at_once: int = 64
    """Under load."""
    timeout_seconds: float = 60.0
    """That a server may be silent for, within one request."""

    def __post_init__(self) -> None:
        check_choice("api", self.api, APIS)
        for key, choices in CHOICES.items():
            check_choice(key, getattr(self, key), choices)
        check_ranges(
            self, least_cosine=SHARE.or_null("for what rounding explains"), texts_per_request=COUNT,
            requests_at_once=COUNT, timeout_seconds=POSITIVE,
        )  # fmt: skip
        check_api_key(self.api_key)
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise InputError(f"endpoint={self.endpoint} is no URL; give one such as http://127.0.0.1:8000")
        if self.endpoint is None:
            of_a_server = [one.name for one in fields(self) if one.name not in ("model", "endpoint")]
            check_unused(self, of_a_server, "endpoint; set endpoint=<URL of a server>")
        if self.deltas and self.api == "tei":
            raise InputError("deltas: text-embeddings-inference has no request for one; leave deltas out")
        for name, folder in self.deltas.items():
            if not folder:
                raise InputError(f"deltas.{name} is empty; set it to the folder of a run or adapter")
