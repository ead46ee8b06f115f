"""The wire: one attempt at one chat completion, and what a failure of it means.

What belongs here: the SDK, and telling apart who is at fault, whether it may be billed and whether to try again. What
does not: trying again (`sending.py`), reading an answer (`replies.py`), booking it (`budget.py`).
"""

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from scopeatlas.errors import ConfigError, ExplainerError
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.limits import retry_after
from scopeatlas.llm.replies import NoCompletion, redacted, reply_of
from scopeatlas.llm.requests import ChatReply

if TYPE_CHECKING:
    import openai

_RETRIED = frozenset({408, 409, 429})
# where something between us and the model gave up on it, the model may have gone on and been paid
_MAY_BE_BILLED = frozenset({408, 502, 504, *range(520, 528)})
_OWN_FAULT = re.compile(r"context.?(length|size|window)|content.?(filter|management|policy)", re.IGNORECASE)
_NOTHING_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")  # httpx's or httpx2's, by SDK version


@dataclass(eq=False)
class Failure(Exception):
    """An attempt that brought no answer.

    billable: whether it may have been billed all the same. retry: whether another attempt may bring an answer; wait:
    the seconds that the server asked for before it. throttled: whether the server had too much to do. own_fault:
    whether it says nothing of the server. unreachable: whether there was nobody to ask.
    """

    problem: str
    billable: bool = False
    retry: bool = False
    wait: float | None = None
    throttled: bool = False
    own_fault: bool = False
    unreachable: bool = False


def open_client(config: ServerConfig) -> "openai.AsyncOpenAI":
    """The SDK's client, without its own retries. Raises ConfigError if no key or no SDK is there, or `offline` forbids it."""
    if config.offline and not config.is_local:
        raise ConfigError(f"offline, and {config.url} is not on this machine; leave offline out, or use a local server")
    try:
        import openai
    except ImportError as error:
        raise ConfigError("asking an LLM needs the openai package; install openai, or set no model") from error
    timeout = float(config.timeout_seconds)
    return openai.AsyncOpenAI(api_key=config.api_key() or "none", base_url=config.url, timeout=timeout, max_retries=0)


class ChatClient:
    """One server, asked one attempt at a time by each caller. For one event loop; close it there."""

    def __init__(self, config: ServerConfig):
        self._config = config
        self._client = open_client(config)
        self._key = config.api_key()

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, body: dict[str, JsonValue]) -> ChatReply:
        """Post `body` once. Raises Failure, or ExplainerError where no request will ever be answered."""
        try:
            async with asyncio.timeout(self._config.timeout_seconds):  # the SDK's is for each read: a drip never meets it
                raw = await self._post(body)
        except TimeoutError as error:
            problem = f"no whole answer within {self._config.timeout_seconds:g} seconds"
            raise Failure(problem, billable=True, retry=True, throttled=True) from error
        if raw.lstrip()[:1] == b"<":
            url = self._config.url
            raise ExplainerError(f"{url} answers with a web page: check that base_url is an API's, often ending in /v1")
        try:
            return reply_of(raw, secret=self._key)
        except NoCompletion as error:
            raise Failure(str(error), billable=True, retry=True) from error

    async def _post(self, body: dict[str, JsonValue]) -> bytes:
        import openai

        fields: dict[str, Any] = dict(body)
        try:
            # the raw body, since the SDK takes whatever comes with status 200 for a completion
            response = await self._client.chat.completions.with_raw_response.create(**fields)
            return response.http_response.content
        except UnicodeError as error:
            raise Failure("the prompt holds what is no text (half a surrogate pair)", own_fault=True) from error
        except openai.APIStatusError as error:
            raise self._status_failure(error) from error
        except openai.APIConnectionError as error:
            raise self._connection_failure(error) from error

    def _status_failure(self, error: "openai.APIStatusError") -> Exception:
        status, said = error.status_code, self._brief(error.message)
        where, text = f"{self._config.url} (model {self._config.model})", f"{error.code} {error.type} {said}"
        if status == 402 or "insufficient_quota" in text:
            return ExplainerError(f"{where} says that the account has no quota left; add credit or use another key")
        if status in (401, 403):
            variable = self._config.api_key_variable
            return ExplainerError(f"{where} refused the key in {variable} ({status}: {said}); check both")
        if status == 404:
            return ExplainerError(f"{where} is not there ({status}: {said}); check base_url and model")
        if status in _RETRIED or status >= 500:
            billable, wait = status in _MAY_BE_BILLED, retry_after(error.response.headers)
            throttled = status in (408, 429, 503, 504, 529)
            return Failure(f"the server answered {status}: {said}", billable, True, wait, throttled)
        return Failure(f"the server refused this prompt ({status}: {said})", own_fault=bool(_OWN_FAULT.search(text)))

    def _connection_failure(self, error: "openai.APIConnectionError") -> Failure:
        reason = error.__cause__ or error
        said = self._brief(str(reason)) or type(reason).__name__
        if type(reason).__name__ in _NOTHING_SENT:
            return Failure(f"cannot reach the LLM at {self._config.url} ({said})", retry=True, unreachable=True)
        throttled = "Timeout" in type(reason).__name__
        return Failure(f"the connection to {self._config.url} broke ({said})", billable=True, retry=True, throttled=throttled)

    def _brief(self, text: str) -> str:
        return " ".join(redacted(text, self._key).split())[:300]
