"""Asking an OpenAI-compatible server: one chat completion with its retries, within a token budget.

What belongs here: the explainer's settings, the budget, sending, retrying, and telling a fault of one request from a
fault of the server. What does not: what is asked and what the answer means (`llm.py`), remembering it (`journal.py`).
"""

import ipaddress
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from scopeatlas.errors import ConfigError, ExplainerError
from scopeatlas.labels.journal import ChatReply

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_WAIT = 120.0  # seconds; a server that asks for more has no time for this request
FAILURES_IN_A_ROW = 10  # so many requests that fail one after another, retries included, are the server's fault

_RETRIED = frozenset({408, 409, 429})
_ONE_REQUESTS_FAULT = re.compile(r"context.?(length|size|window)|content.?(filter|management|policy)", re.IGNORECASE)
_SCHEMA_FAULT = re.compile(r"json.?schema|response.?format|structured|grammar", re.IGNORECASE)


@dataclass(frozen=True)
class ExplainerConfig:
    """Which LLM explains features, and what it may use.

    model: empty means off. base_url: None for OpenAI's own. api_key_variable: the NAME of the environment variable;
    the key is read when the first request goes out. max_tokens_total: prompts and answers of one run together.
    Raises ConfigError for settings that could never work.
    """

    model: str = ""
    base_url: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_output_tokens: int = 300
    timeout_seconds: float = 60
    max_concurrency: int = 4
    max_tokens_total: int = 2_000_000
    max_attempts: int = 4

    def __post_init__(self) -> None:
        for name in ("max_output_tokens", "timeout_seconds", "max_concurrency", "max_attempts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"the explainer's {name} is {getattr(self, name)}; set it above 0")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            parts, usable = None, False
        if parts is not None and (parts.username or parts.password):
            variable = self.api_key_variable
            raise ConfigError(f"the explainer's base_url carries a password; put it into the environment as {variable}")
        if not usable:
            raise ConfigError(f"the explainer's base_url {self.url!r} is no URL; use one such as http://localhost:8000/v1")

    @property
    def enabled(self) -> bool:
        return bool(self.model)

    @property
    def url(self) -> str:
        """The server asked; never left to the SDK, which would take it from the environment."""
        return self.base_url or OPENAI_URL

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, where no key is needed."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def api_key(self) -> str:
        """The key, from the environment. Raises ConfigError naming the variable, and never its content."""
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key and not self.is_local:
            message = f"no API key for {self.url}: set the environment variable {self.api_key_variable}"
            raise ConfigError(f"{message}, or the explainer's api_key_variable to the name of one that is set")
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f"the environment variable {self.api_key_variable} holds no usable key; set it again")
        return key


class RequestError(Exception):
    """One request that brought no answer. It fails one feature's label, not the run."""


class Budget:
    """Tokens that a run may use: reserved before a request, settled after it, never passed. Thread-safe."""

    def __init__(self, total: int):
        self.total = total
        self.used = 0
        self._reserved = 0
        self._spent = False
        self._changed = threading.Condition()

    def reserve(self, tokens: int) -> bool:
        """Set `tokens` aside. Waits while what is under way may still leave room; False for good once there is none."""
        with self._changed:
            while not self._spent and self.used + self._reserved + tokens > self.total:
                if self._reserved == 0:
                    self._spent = True
                    break
                self._changed.wait()
            if not self._spent:
                self._reserved += tokens
            self._changed.notify_all()
            return not self._spent

    def settle(self, reserved: int, used: int) -> None:
        """Give back what was `reserved` and book what was really `used`."""
        with self._changed:
            self._reserved -= reserved
            self.used += used
            self._changed.notify_all()


@dataclass
class _Spending:
    used: int = 0


@dataclass
class _Health:
    answered: bool = False
    failures: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ChatClient:
    """A server, the key to it and the run's budget. Thread-safe. Raises ConfigError if no key or no SDK is there."""

    def __init__(self, config: ExplainerConfig):
        try:
            import openai
        except ImportError as error:
            raise ConfigError("the LLM explainer needs the openai package; install openai, or set no model") from error
        self._openai = openai
        self._config = config
        self._key = config.api_key()
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=config.url, timeout=float(config.timeout_seconds), max_retries=0
        )
        self.budget = Budget(config.max_tokens_total)
        self._health = _Health()
        self._stopped = threading.Event()

    @property
    def answered(self) -> bool:
        """Whether the server has given any answer yet; until it has, one request at a time is enough."""
        return self._health.answered

    def stop(self) -> None:
        """Send nothing more; what is under way still comes in."""
        self._stopped.set()

    def close(self) -> None:
        self._client.close()

    def complete(self, messages: list[dict], *, schema: dict, before_send: Callable[[], None]) -> ChatReply:
        """Ask once, with retries; `before_send` is called when the first attempt is about to go out.

        Raises RequestError where this one request brought nothing, ExplainerError where none ever will.
        """
        body = self._body(messages, schema)
        # three bytes a token is chars/3 for English, and still enough for scripts of one token a character
        estimate = -(-len(json.dumps([messages, schema], ensure_ascii=False).encode("utf-8", "replace")) // 3)
        estimate += self._config.max_output_tokens
        problem, wait = "", 0.0
        for attempt in range(1, self._config.max_attempts + 1):
            if self._stopped.wait(wait):
                raise RequestError("not sent: the run was stopped")
            with self._within_budget(estimate) as spending:
                if attempt == 1:
                    before_send()
                try:
                    spending.used = estimate  # until the server says otherwise
                    reply = self._post(body, spending)
                except self._openai.APIStatusError as error:
                    spending.used = 0
                    problem, wait = self._judge_status(error, attempt)
                except self._openai.APIConnectionError as error:
                    problem, wait = self._judge_connection(error, attempt, spending)
                else:
                    self._note(failed=False)
                    return reply
            if wait > LONGEST_WAIT:
                break
        self._note(failed=True, problem=problem)
        raise RequestError(problem)

    def _body(self, messages: list[dict], schema: dict) -> dict[str, Any]:
        # OpenAI's newer models refuse `max_tokens`, other servers know nothing else
        limit = "max_completion_tokens" if urlsplit(self._config.url).hostname == "api.openai.com" else "max_tokens"
        return {
            "model": self._config.model,
            "messages": messages,
            "temperature": self._config.temperature,
            limit: self._config.max_output_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    @contextmanager
    def _within_budget(self, estimate: int) -> Iterator[_Spending]:
        if not self.budget.reserve(estimate):
            total, used = self.budget.total, self.budget.used
            message = f"not sent: about {estimate} tokens more would pass max_tokens_total={total}, {used} are used"
            raise RequestError(f"{message}; run again to continue, or raise it")
        spending = _Spending()
        try:
            yield spending
        finally:
            self.budget.settle(estimate, spending.used)

    def _post(self, body: dict[str, Any], spending: _Spending) -> ChatReply:
        # the raw body, since the SDK takes whatever comes with status 200 for a completion
        raw = self._client.chat.completions.with_raw_response.create(**body).http_response.content
        try:
            answer = json.loads(raw)
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            message = choice["message"]
            reply = ChatReply(
                text=self._redact(message.get("content")),
                finish_reason=self._redact(choice.get("finish_reason")),
                refusal=self._redact(message.get("refusal")),
                model=self._redact(answer.get("model")),
                prompt_tokens=_count(usage.get("prompt_tokens")),
                completion_tokens=_count(usage.get("completion_tokens")),
                cached_tokens=_count((usage.get("prompt_tokens_details") or {}).get("cached_tokens")),
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = "the server's answer is no chat completion"
            if not self.answered:
                url = self._config.url
                raise ExplainerError(f"{problem}: check that base_url {url} is an API's, often ending in /v1") from error
            self._note(failed=True, problem=problem)
            raise RequestError(problem) from error
        if reply.prompt_tokens is not None and reply.completion_tokens is not None:
            spending.used = reply.prompt_tokens + reply.completion_tokens
        return reply

    def _judge_status(self, error: Any, attempt: int) -> tuple[str, float]:
        """What an HTTP error means: the problem and the seconds to wait before trying again, or an exception."""
        status, said = error.status_code, self._brief(error.message)
        where, text = f"{self._config.url} (model {self._config.model})", f"{error.code} {error.type} {said}"
        if "insufficient_quota" in text:
            raise ExplainerError(f"{where} says that the account has no quota left; add credit or use another key")
        if status in _RETRIED or status >= 500:
            return f"the server answered {status}: {said}", _retry_after(error.response.headers) or _backoff(attempt)
        if status in (401, 403):
            raise ExplainerError(f"{where} refused the key in {self._config.api_key_variable} ({status}); check both")
        if _ONE_REQUESTS_FAULT.search(text):
            raise RequestError(f"the server refused this prompt ({status}): {said}")
        if _SCHEMA_FAULT.search(text):
            message = f"{where} rejects response_format json_schema ({status}: {said})"
            raise ExplainerError(f"{message}; use a server or model that supports it")
        if status == 404 or not self.answered:
            raise ExplainerError(f"{where} refuses requests ({status}: {said}); check base_url, model and parameters")
        raise RequestError(f"the server refused this prompt ({status}): {said}")

    def _judge_connection(self, error: Exception, attempt: int, spending: _Spending) -> tuple[str, float]:
        reason = error.__cause__ or error
        if type(reason).__name__ in ("ConnectError", "ConnectTimeout"):  # httpx's or httpx2's, by SDK version
            spending.used = 0  # nothing was sent, so nothing can be billed
        problem = f"cannot reach the LLM at {self._config.url} ({self._brief(str(reason)) or type(reason).__name__})"
        if attempt == self._config.max_attempts and not self.answered:
            raise ExplainerError(f"{problem}: start the server, or set the explainer's base_url to one that runs") from error
        return problem, _backoff(attempt)

    def _note(self, *, failed: bool, problem: str = "") -> None:
        with self._health.lock:
            self._health.answered = self._health.answered or not failed
            self._health.failures = self._health.failures + 1 if failed else 0
            if self._health.failures >= FAILURES_IN_A_ROW:
                message = f"{self._health.failures} requests in a row failed, the last one so: {problem}"
                raise ExplainerError(f"{message}; run again later, the answers so far are kept")

    def _brief(self, text: str) -> str:
        return " ".join(self._redact(text).split())[:300]

    def _redact(self, text: object) -> str:
        """`text` on its way to a journal, a label or a message, without the key should a server echo it."""
        clean = text if isinstance(text, str) else ""
        return clean.replace(self._key, "[key]") if len(self._key) >= 8 else clean


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _backoff(attempt: int) -> float:
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def _retry_after(headers: Any) -> float | None:
    """The seconds that `Retry-After` asks for, given in seconds or as a date; None without a usable one."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(seconds, 0.0) + random.uniform(0.0, 0.25)
