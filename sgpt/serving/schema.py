"""What requests may hold and what errors look like: OpenAI's shapes, with `input_type`, `delta`, `strength` and
`truncate` besides.

A field that is not known is refused: `input_typ` would give embeddings of the wrong role, and nobody would see it.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sgpt.text.markers import Role


class Refusal(Exception):
    """A request that is answered by an error: a status, a sentence, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def content(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    input: str | list[str]
    """A text, or texts. Token ids are refused: those of another tokenizer would be other texts."""
    model: str | None = None
    """The served model, or the name of a delta, as `delta` takes it."""
    input_type: Role | None = None
    """Which markers and limit the texts get; null is document, and the answer says so."""
    delta: str | None = None
    """A tuned model over the same base; null is the served model itself."""
    strength: float | None = Field(default=None, allow_inf_nan=False)
    """How much of the change to the base counts: 1 all of it, 0 the base."""
    dimensions: int | None = Field(default=None, ge=1)
    """The first so many numbers of each embedding, made of length 1."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the bytes of little-endian float32 in base64."""
    truncate: bool | None = None
    """Texts longer than the model's limit: true cuts and lists them, false refuses them; null is the server's word."""
    user: str | None = None
    """Of OpenAI's, not read."""

    @field_validator("input", mode="before")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, int | list) for one in values[:1]):
            raise ValueError("token ids are not taken, as another tokenizer's would be other texts; send strings")
        if not all(isinstance(one, str) for one in values):
            raise ValueError("must be a string or a list of strings")
        return value

    @property
    def role(self) -> Role:
        return self.input_type or "document"

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


OF_TEI = ("return_text", "raw_scores", "truncation_direction")  # fields of text-embeddings-inference's /rerank alone


class RerankRequest(_Body):
    """POST /rerank: as Cohere has it with `documents`, as text-embeddings-inference has it with `texts`."""

    query: str
    """What to rank the documents for."""
    documents: list[str]
    """Texts, or objects with a `text` and nothing else."""
    model: str | None = None
    """The served model."""
    top_n: int | None = Field(default=None, ge=1)
    """The best so many alone; null is all."""
    return_documents: bool = False
    """With the documents' texts in the answer."""
    truncate: bool | None = None
    """As of embeddings; a document that is too long is cut at its beginning."""
    texts: list[str] | None = None
    """Instead of `documents`: the answer is text-embeddings-inference's, too."""
    return_text: bool | None = None
    """With the texts in that answer."""
    raw_scores: bool | None = None
    """Of that API: true gives log-probabilities; else they are put between 0 and 1 by its rule, 1 / (1 + exp(-score)).
    """
    truncation_direction: Literal["left", "Left"] | None = None
    """Of that API: a text that is too long is cut at its beginning."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, body: Any) -> Any:
        """`texts` and {"text": …} become a list of strings in `documents`."""
        if not isinstance(body, dict):
            return body
        body = dict(body)
        of_tei = [name for name in ("texts", *OF_TEI) if name in body]
        if isinstance(body.get("texts"), list) and not {"documents", "return_documents"} & body.keys():
            body["documents"] = body["texts"]
        elif of_tei:
            raise ValueError(f"{', '.join(of_tei)}: with texts, and neither documents nor return_documents")
        if isinstance(body.get("documents"), list):
            body["documents"] = [_text_of(number, one) for number, one in enumerate(body["documents"])]
        return body


def _text_of(number: int, document: Any) -> Any:
    """The text of an object, which has nothing else; anything that is none as it is."""
    if not isinstance(document, dict):
        return document
    if document.keys() != {"text"}:
        stated = ", ".join(map(str, document)) or "nothing"
        raise ValueError(f"documents.{number} is an object of {stated}, and only text is read; put all of it there")
    return document["text"]


class SearchRequest(_Body):
    """POST /search, which the search page sends."""

    query: str
    """What to search for."""
    top: int = Field(default=10, ge=1, le=100)
    """Results of each system."""


Body = TypeVar("Body", bound=_Body)


def parse(schema: type[Body], body: bytes) -> Body:
    """The request in a body of JSON; Refusal with 400 for what is no JSON, 422 for fields that cannot be."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_context=False)[0]
    field, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        raise Refusal(400, f"the body is not valid JSON ({message.removeprefix('Invalid JSON: ')}); send an object")
    if error["type"] == "extra_forbidden":
        known = ", ".join(schema.model_fields)
        raise Refusal(422, f"the field {field!r} is unknown; the fields are {known}", field)
    if error["type"] == "missing":
        raise Refusal(422, f"the field {field!r} is missing; send it", field)
    if not field:
        raise Refusal(422, message if error["type"] == "value_error" else "the body must be a JSON object", None)
    raise Refusal(422, f"{field}={error['input']!r:.80}: {message[:1].lower()}{message[1:]}", field)
