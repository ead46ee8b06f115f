"""Our own count of tokens: what a request can use at most, and what an answer must have used at least.

What belongs here: counting. What does not: what a server reports, and what is booked (`budget.py`).
"""

import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from scopeatlas.errors import ConfigError
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.requests import ChatRequest, Rung, messages_for

# what chat templates put around a conversation (dates, default system texts) and around each message of it
_TEMPLATE_BYTES = 512
_MESSAGE_BYTES = 32


@dataclass(frozen=True)
class Bounds:
    """How many tokens a prompt has: at least `low`, at most `high`, and `likely` that many."""

    low: int
    likely: int
    high: int


class TokenCounter(Protocol):
    """Counts for one server. exact: whether its own tokenizer does the counting."""

    exact: bool

    def prompt(self, request: ChatRequest, rung: Rung) -> Bounds:
        """The tokens of the prompt as the server sees it."""
        ...

    def completion(self, text: str) -> int:
        """The tokens that an answer of this text has at least."""
        ...


class WordsAndBytes:
    """Bounds that hold for every tokenizer in use, without knowing which one it is.

    High: one token a byte (every tokenizer with a byte fallback needs at most that), the chat template and the schema
    included, which some servers put into the prompt. Low: one token a word, since none spans two. Likely: four bytes a
    token, as English has.
    """

    exact = False

    def prompt(self, request: ChatRequest, rung: Rung) -> Bounds:
        messages = messages_for(request, rung)
        contents = sum(_size(message["content"]) + _size(message["role"]) for message in messages)
        around = _TEMPLATE_BYTES + _MESSAGE_BYTES * len(messages) + _size(json.dumps(request.schema))
        low = sum(self.completion(message["content"]) for message in messages)
        return Bounds(low, max(low, -(-contents // 4)), contents + around)

    def completion(self, text: str) -> int:
        # "..." may end up in the token of a word's end, a letter or a digit never in that of another word
        return sum(any(map(str.isalnum, piece)) for piece in text.split())


class ServersTokenizer:
    """Exact counts with the tokenizer and the chat template that the server itself uses."""

    exact = True

    def __init__(self, name: str, *, offline: bool):
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
        except (OSError, ValueError) as error:
            message = f"cannot load the LLM server's tokenizer {name!r} ({str(error).splitlines()[0]})"
            raise ConfigError(f"{message}; set a folder or Hub id, or leave it out") from error
        if not self._tokenizer.chat_template:
            raise ConfigError(f"the LLM server's tokenizer {name!r} has no chat template; use the one the server uses")

    def prompt(self, request: ChatRequest, rung: Rung) -> Bounds:
        messages = messages_for(request, rung)
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = self.completion(str(text))
        return Bounds(tokens, tokens, tokens)

    def completion(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def token_counter(config: ServerConfig) -> TokenCounter:
    """The counter for `config`'s server. Raises ConfigError if its tokenizer cannot be loaded."""
    return WordsAndBytes() if config.tokenizer is None else _servers_tokenizer(config.tokenizer, config.offline)


@cache
def _servers_tokenizer(name: str, offline: bool) -> ServersTokenizer:
    return ServersTokenizer(name, offline=offline)


def _size(text: str) -> int:
    """Bytes of UTF-8, before or after the normalisation that some tokenizers begin with, whichever are more."""
    size = len(text.encode("utf-8", "replace"))
    return size if text.isascii() else max(size, len(unicodedata.normalize("NFKC", text).encode("utf-8", "replace")))
