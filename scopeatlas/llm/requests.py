"""What is asked of a chat completions server and what comes back, as plain data.

What belongs here: a request, its identity and the body it becomes on the wire; a reply, raw. What does not: sending
(`client.py`, `runner.py`) and what a reply means (`replies.py`).
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from scopeatlas.llm.config import ServerConfig

Message = dict[str, str]
JsonSchema = dict[str, JsonValue]
Rung = Literal["json_schema", "json_object"]
"""How a server is made to keep to a schema: by enforcing it, or by being told it and asked for JSON."""


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model, about one feature of one SAE.

    purpose ("explain", "detection", ...), sae, feature: what and whom it is asked for; they are booked, and do not change
    the answer. messages: the constant
    prefix first, so that a provider can cache it. schema: {"name": ..., "strict": True, "schema": {...}}. max_output_tokens:
    of its text, thinking apart. prompt: the prompt file's stamp. logprobs: how many alternatives to report for each token of the answer, 0 for none. attempt:
    raised to ask again after an answer that was invalid.
    """

    purpose: str
    sae: str
    feature: int
    messages: tuple[Message, ...]
    schema: JsonSchema
    max_output_tokens: int
    prompt: str
    logprobs: int = 0
    attempt: int = 0

    def output_limit(self, config: ServerConfig) -> int:
        """The most tokens that the answer may have, thinking included."""
        return self.max_output_tokens + config.reasoning_tokens

    def key(self, config: ServerConfig) -> str:
        """The SHA-256, hex, of everything that determines the answer: two requests with one key are asked once."""
        parameters = {
            "temperature": config.temperature,
            "max_output_tokens": self.max_output_tokens,
            "logprobs": self.logprobs,
        }
        if config.reasoning_tokens:  # without it the key is what it was before there was such a setting
            parameters["reasoning_tokens"] = config.reasoning_tokens
        parts = [config.model, self.messages, parameters, self.schema, self.prompt, self.attempt]
        # ASCII escapes, since a message may hold half a surrogate pair and UTF-8 may not
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer, its log-probability, and the likeliest tokens in its place with theirs."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ChatReply:
    """One answer of a chat completions server, raw: nothing in it has been believed yet.

    text: the message's content as it came ("" if there was none). refusal: the server's own refusal text.
    prompt_tokens, completion_tokens, cached_tokens: the server's figures, None where it reported none.
    """

    text: str
    finish_reason: str = ""
    refusal: str = ""
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Charge:
    """What an answer was charged: the larger of the server's report and our own count. usd: None without prices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    usd: float | None = None


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    reply: None if it is unanswered, and `problem` says why. With a reply, `problem` says what plainly makes it none
    (`replies.fault`), and is empty otherwise. reused: it stood in the journal and cost nothing now. rung, time (ISO
    8601, UTC), charge: how, when and for how much the reply was had.
    """

    request: ChatRequest
    key: str
    reply: ChatReply | None
    problem: str = ""
    reused: bool = False
    rung: str = ""
    time: str = ""
    charge: Charge = field(default_factory=Charge)


def messages_for(request: ChatRequest, rung: Rung) -> list[Message]:
    """The messages as sent: on the lower rung the schema stands at the end of the last one, after the constant prefix."""
    messages = [dict(message) for message in request.messages]
    if rung == "json_object":
        schema = json.dumps(request.schema["schema"], ensure_ascii=False)
        messages[-1]["content"] += f"\n\nAnswer with one JSON object that keeps to this JSON schema:\n{schema}"
    return messages


def request_body(request: ChatRequest, config: ServerConfig, rung: Rung) -> dict[str, JsonValue]:
    """The JSON body of `request`, as it goes over the wire or into a batch file."""
    # OpenAI's newer models refuse `max_tokens`, other servers know nothing else
    limit = "max_completion_tokens" if config.is_openai else "max_tokens"
    asked: dict[str, JsonValue] = {"type": "json_object"}
    if rung == "json_schema":
        asked = {"type": "json_schema", "json_schema": request.schema}
    body: dict[str, JsonValue] = {
        "model": config.model,
        "messages": [dict(message) for message in messages_for(request, rung)],
        "temperature": config.temperature,
        limit: request.output_limit(config),
        "response_format": asked,
    }
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    return body
