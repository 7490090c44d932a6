"""What a client may send, checked as it comes in: OpenAI's fields, and those that choose a trade-off."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from emorl.config import UserError, nearest

MOST_ALTERNATIVES = 20
_MOST_PROMPTS = 256
_MOST_TOKENS = 2**20
_COLDEST = 1e-4  # below it, sampling is greedy but for overflows
_Share = Annotated[float, Field(allow_inf_nan=False)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Request(BaseModel):
    """What both kinds of request have. Fields that say nothing about the answer are taken and left alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(max_length=2000)] = "emorl"
    weights: Annotated[dict[str, _Share], Field(max_length=1000)] = Field(default_factory=dict)
    prefer: Annotated[dict[str, _Share], Field(max_length=1000)] = Field(default_factory=dict)
    max_tokens: int | None = Field(default=None, ge=0, le=_MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=_MOST_TOKENS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _must_say_nothing(cls, value: Any) -> Any:
        if value:
            raise ValueError("not served here; leave it out")
        return value

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def generation(self) -> dict[str, Any]:
        """Settings of decoding, in transformers' words, that replace the run's."""
        settings: dict[str, Any] = {}
        if self.temperature is not None:
            settings["do_sample"] = self.temperature >= _COLDEST
            settings["temperature"] = self.temperature if settings["do_sample"] else None
        if self.top_p is not None:
            settings["top_p"] = self.top_p
        if self.top_k is not None:
            settings["top_k"] = max(0, self.top_k)
        return settings

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=1000)]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=50)] = Field(default_factory=dict)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value:
            raise ValueError("not served here; leave it out")
        return value

    @field_validator("response_format")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if value and value != {"type": "text"}:
            raise ValueError("only text is served here; leave it out")
        return value

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token is told with; None where no log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Request):
    """`POST /v1/completions`"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("best_of")
    @classmethod
    def _all_are_told(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, info.data.get("n") or 1):
            raise ValueError("every text is told; leave it out, or give n of them")
        return value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: Any) -> Any:
        if value:
            raise ValueError("not served here; leave it out")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or tokens."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)

    @property
    def alternatives(self) -> int | None:
        """As `ChatRequest.alternatives`."""
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


Request = ChatRequest | CompletionRequest


class FieldError(UserError):
    """A field of a request that cannot be taken; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """A request of a kind, from JSON.

    Raises:
        FieldError: the first one that is wrong, or unknown.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained-", "str", "function-"))]
        field = where[0] if where else ""
        if first["type"] == "extra_forbidden" and len(where) == 1:
            near = nearest(field[:80], list(kind.model_fields))
            raise FieldError(field[:80], f"unknown field {field!r:.80}; {near}") from None
        place = ".".join(where)
        said = first["msg"].removeprefix("Value error, ")
        raise FieldError(field[:80], f"{place:.120}{': ' if place else ''}{said:.300}") from None
