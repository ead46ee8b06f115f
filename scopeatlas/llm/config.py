"""Which OpenAI-compatible server is asked, within which limits, and what its tokens cost.

What belongs here: the settings and what can be told from them alone. What does not: sending (`client.py`), what was
spent so far (`journal.py`).
"""

import ipaddress
import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from scopeatlas.errors import ConfigError

OPENAI_URL = "https://api.openai.com/v1"

_ABOVE_ZERO = (
    "timeout_seconds",
    "max_concurrency",
    "max_attempts",
    "requests_per_minute",
    "tokens_per_minute",
    "max_tokens_total",
    "max_usd_total",
)
_PRICES = ("usd_per_million_input", "usd_per_million_cached", "usd_per_million_output")
_NOT_BELOW_ZERO = (*_PRICES, "temperature", "reasoning_tokens")


@dataclass(frozen=True)
class ServerConfig:
    """A server, a model on it, and what may be used of both.

    model: empty means off. base_url: None for OpenAI's own. api_key_variable: the NAME of the environment variable;
    the key is read when the first request goes out. timeout_seconds: for a whole request, answer included.
    max_attempts: at one request, four times as many where the server only says that it is busy.
    max_tokens_total, max_usd_total: over all that the store's journal holds, open reservations included, by whatever
    model; the money is counted only if the prices are known. reasoning_tokens: what an answer may use for thinking, beyond
    what its text needs; for a model that reasons. tokenizer: a folder or Hub id of the server's own
    tokenizer, for exact counts; without it, reservations are counted from bytes (an upper bound) and what an answer must
    at least have used from words. batch: "provider" for the server's Batch API, "local" for the same files driven by
    our own runner. offline: never contact a host other than this machine.
    Raises ConfigError for settings that could never work.
    """

    model: str = ""
    base_url: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    timeout_seconds: float = 60
    max_concurrency: int = 8
    max_attempts: int = 5
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_tokens_total: int = 2_000_000
    max_usd_total: float | None = None
    usd_per_million_input: float | None = None
    usd_per_million_cached: float | None = None
    usd_per_million_output: float | None = None
    tokenizer: str | None = None
    batch: Literal["off", "provider", "local"] = "off"
    offline: bool = False
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"the LLM server's {name} is {value}; set it above 0")
        for name in _NOT_BELOW_ZERO:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"the LLM server's {name} is {value}; set it to 0 or more")
        if self.batch not in ("off", "provider", "local"):
            raise ConfigError(f"the LLM server's batch is {self.batch!r}; set it to off, provider or local")
        self._check_prices()
        self._check_url()

    def _check_prices(self) -> None:
        known = [self.usd_per_million_input is not None, self.usd_per_million_output is not None]
        if any(known) != all(known) or (self.usd_per_million_cached is not None and not all(known)):
            raise ConfigError("one price of the LLM server is missing; set usd_per_million_input and usd_per_million_output")
        if self.max_usd_total is not None and not all(known):
            message = "max_usd_total cannot be kept without prices"
            raise ConfigError(f"{message}; set usd_per_million_input and usd_per_million_output, or leave it out")

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            parts, usable = None, False
        if parts is not None and (parts.username or parts.password):
            variable = self.api_key_variable
            raise ConfigError(f"the LLM server's base_url carries a password; put it into the environment as {variable}")
        if not usable:
            raise ConfigError(f"the LLM server's base_url {self.url!r} is no URL; use one such as http://localhost:8000/v1")

    @property
    def enabled(self) -> bool:
        return bool(self.model)

    @property
    def url(self) -> str:
        """The server asked; never left to the SDK, which would take it from the environment."""
        return self.base_url or OPENAI_URL

    @property
    def is_openai(self) -> bool:
        return urlsplit(self.url).hostname == "api.openai.com"

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
            raise ConfigError(f"{message}, or api_key_variable to the name of one that is set")
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f"the environment variable {self.api_key_variable} holds no usable key; set it again")
        return key

    def usd(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float | None:
        """What so many tokens cost, or None where the prices are unknown. `cached_tokens` are among the prompt's."""
        if self.usd_per_million_input is None or self.usd_per_million_output is None:
            return None
        cached_price = self.usd_per_million_input if self.usd_per_million_cached is None else self.usd_per_million_cached
        cached = min(cached_tokens, prompt_tokens)
        dollars = (prompt_tokens - cached) * self.usd_per_million_input + cached * cached_price
        return (dollars + completion_tokens * self.usd_per_million_output) / 1e6
