"""Embeddings from a running server: how each API is asked, and a sentence for each way in which it does not answer.

How a query is told from a document: openai by `input_type` (query or document; OpenAI's own API has no such field, and
servers that do not know it ignore it, which shows, or refuse it, which is said), text-embeddings-inference by
`prompt_name`, Cohere's API by `input_type` search_query or search_document. With markers_by=client no role is sent: the
marker's text stands around the text, as somebody does whose server knows of no roles.
"""

import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sgpt.runtime.errors import InputError
from sgpt.text.markers import Role

if TYPE_CHECKING:
    import httpx

BUSY = (429, 503)  # asked again
ATTEMPTS = 6


class RefusedTexts(InputError):
    """The server does not take these texts: empty, too long or too many."""


@dataclass(frozen=True)
class Question:
    """What a request asks. role: None where the server is not told. base64: vectors as text, where the API has that."""

    texts: Sequence[str]
    role: Role | None
    base64: bool = False


@dataclass(frozen=True)
class Api:
    """path: of the URL. body: the JSON of a question. vectors: of an answer, in the order of the texts. base64: whether
    it has vectors as text.
    """

    path: str
    body: Callable[[Question], dict[str, Any]]
    vectors: Callable[[Any], list]
    base64: bool = False


def _openai(question: Question) -> dict[str, Any]:
    encoding = "base64" if question.base64 else "float"
    return {"input": list(question.texts), "encoding_format": encoding, "input_type": question.role}


def _openai_vectors(answer: Any) -> list:
    rows = sorted(answer["data"], key=lambda row: row["index"])
    numbers = [row["index"] for row in rows]
    if numbers != list(range(len(rows))):
        raise InputError(f"numbers {len(rows)} vectors {numbers!s:.40}, where clients look for 0, 1, …")
    return [row["embedding"] for row in rows]


def _tei(question: Question) -> dict[str, Any]:
    return {"inputs": list(question.texts), "prompt_name": question.role, "truncate": True, "normalize": True}


def _cohere(question: Question) -> dict[str, Any]:
    kind = f"search_{question.role}" if question.role else None
    return {"texts": list(question.texts), "input_type": kind, "embedding_types": ["float"], "truncate": "END"}


def _cohere_vectors(answer: Any) -> list:
    embeddings = answer["embeddings"]
    return embeddings["float"] if isinstance(embeddings, dict) else embeddings  # a list in version 1 of the API


APIS = {
    "openai": Api("/v1/embeddings", _openai, _openai_vectors, base64=True),
    "tei": Api("/embed", _tei, lambda answer: answer),
    "cohere": Api("/v2/embed", _cohere, _cohere_vectors),
}


class Client:
    """One server, asked by many threads; `with` closes its connections.

    api: a row of APIS. size: numbers of an embedding, D. delta_as: the field that names a delta.
    """

    def __init__(
        self, endpoint: str, api: str, size: int, *, api_key: str | None = None, served_name: str | None = None,
        delta_as: str = "delta", timeout_seconds: float = 60.0, connections: int = 64,
    ) -> None:  # fmt: skip
        import httpx

        self.api_name, self.api, self.size, self.delta_as = api, APIS[api], size, delta_as
        root = endpoint.rstrip("/").removesuffix("/v1")
        self.url = root + self.api.path
        self.timeout_seconds = timeout_seconds
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # shorter than servers keep an idle one (uvicorn 5 s), or a request may meet the very moment when it is closed
        limits = httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=1
        )
        self.http: httpx.Client = httpx.Client(headers=headers, timeout=timeout_seconds, limits=limits)
        self.model = served_name or (self._listed(f"{root}/v1/models") if api != "tei" else None)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *failure) -> None:
        self.http.close()

    def embed(
        self, texts: Sequence[str], role: Role | None, delta: str | None = None, *, base64: bool = False
    ) -> np.ndarray:  # fmt: skip
        """Vectors [texts, D], float32.

        Raises RefusedTexts where the server says that it does not take them, InputError for everything else that is no
        answer.
        """
        question = Question(texts, role, base64)
        body = {**self.api.body(question), "model": self.model}
        if delta is not None:
            body[self.delta_as] = delta
        sent = {key: value for key, value in body.items() if value is not None}
        vectors = self._vectors(self._answer(sent), base64)
        if vectors.shape != (len(texts), self.size):
            raise InputError(
                f"{self.url}: gives {vectors.shape[0]} vectors of {vectors.shape[1]} numbers for {len(texts)} texts, "
                f"and the model gives {self.size} for each; it serves another model, or cuts dimensions"
            )
        return vectors

    def _answer(self, body: dict[str, Any]) -> Any:
        """The JSON of the answer; a server that is busy is asked again."""
        for attempt in range(ATTEMPTS):
            response = self._post(body)
            if response.status_code not in BUSY or attempt == ATTEMPTS - 1:
                break
            seconds = response.headers.get("retry-after", "")
            time.sleep(min(float(seconds) if seconds.isdecimal() else 0.2 * 2**attempt, 5))
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return response.json()
        except ValueError:
            raise InputError(
                f"{self.url}: answers {response.text[:60]!r}, which is no JSON; is it an embedding server of "
                f"api={self.api_name}?"
            ) from None

    def _post(self, body: dict[str, Any]) -> "httpx.Response":
        import httpx

        try:
            return self.http.post(self.url, json=body)
        except httpx.TimeoutException:
            raise InputError(
                f"{self.url}: silent for {self.timeout_seconds:g} s; raise timeout_seconds, or see what the "
                "server is busy with"
            ) from None
        except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:  # the last for a host like 127.0.0..1
            raise InputError(
                f"{self.url}: no server answers ({str(error) or type(error).__name__}); start it, or check host and "
                "port"
            ) from None

    def _refusal(self, response: "httpx.Response") -> InputError:
        """What a status that is not 200 means, with the server's own words."""
        status, said = response.status_code, _message(response)
        if status in (401, 403):
            return InputError(f"{self.url}: {status}, the key is missing or wrong ({said}); set api_key=<key>")
        if status in (404, 405):
            return InputError(
                f"{self.url}: {status}, there is no such path, model or delta ({said}); api={self.api_name} asks at "
                f"{self.api.path}: check endpoint, api, served_name and deltas"
            )
        if status in (400, 413, 422):
            return RefusedTexts(
                f"{self.url}: {status}, the server refuses the request ({said}); if it takes no role, set "
                "markers_by=client; no field for a delta, delta_as=model; fewer texts, texts_per_request=<fewer>"
            )
        return InputError(f"{self.url}: {status} instead of an answer ({said}); see the server's log")

    def _vectors(self, answer: Any, base64: bool) -> np.ndarray:
        try:
            rows = self.api.vectors(answer)
            if base64:  # as OpenAI's own client reads it: float32, the lowest byte first; numbers, where there are
                rows = [np.frombuffer(b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]
            vectors = np.array(rows)
        except InputError as error:
            raise InputError(f"{self.url}: {error}") from None
        except (KeyError, TypeError, ValueError, IndexError):
            vectors = np.empty(0)
        if vectors.ndim != 2 or vectors.dtype.kind not in "iuf":
            raise InputError(
                f"{self.url}: its answer {str(answer)[:60]!r} holds no list of vectors as of api={self.api_name}; "
                "choose the server's own api"
            )
        with np.errstate(over="ignore"):
            return vectors.astype(np.float32)

    def _listed(self, url: str) -> str | None:
        """The first model that the server lists, None where it lists none."""
        import httpx

        try:
            return self.http.get(url, timeout=min(5, self.timeout_seconds)).json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
            return None


def _message(response: "httpx.Response") -> str:
    """What the server says of an error, shortened."""
    try:
        content = response.json()
    except ValueError:
        content = response.text
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return " ".join(str(content).split())[:200]
