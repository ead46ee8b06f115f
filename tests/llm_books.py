"""The test server's books: how many tokens a request and its answer truly are, and the ledger of what was billed.

What belongs here: counting and remembering. What does not: answering (`llm_server.py`).
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol


class Counts(Protocol):
    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int: ...

    def completion(self, text: str) -> int: ...


class WordCounts:
    """Without a tokenizer: a token per word or mark, four more a message."""

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        return sum(4 + self.completion(message["content"]) for message in messages)

    def completion(self, text: str) -> int:
        return len(re.findall(r"\w+|[^\w\s]", text))


class TokenizerCounts:
    """With a model's folder: its chat template with the generation prompt, tokenised; an answer's text, tokenised.

    The schema and the end-of-turn token are not billed. A message is counted once and remembered: between the template's
    special tokens nothing merges, so that counts add up.
    """

    def __init__(self, folder: str):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._lock = threading.Lock()
        self._message = cache(self._count_message)
        alone = self._render([{"role": "system", "content": ""}], add_generation_prompt=True)
        self._opening = len(alone) - len(self._render([{"role": "system", "content": ""}], add_generation_prompt=False))

    def _render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _count_message(self, role: str, content: str, is_first: bool) -> int:
        # a template may put a default system message in front of a first message of another role
        before = [] if is_first else [{"role": "system", "content": ""}]
        whole = self._render([*before, {"role": role, "content": content}], add_generation_prompt=False)
        return len(whole) - (len(self._render(before, add_generation_prompt=False)) if before else 0)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        with self._lock:
            each = (self._message(m["role"], m["content"], number == 0) for number, m in enumerate(messages))
            return sum(each) + self._opening

    def completion(self, text: str) -> int:
        with self._lock:
            return len(self._tokenizer.encode(text, add_special_tokens=False))


@cache
def tokenizer_counts(folder: str) -> TokenizerCounts:
    """One for each folder, since a tokenizer takes a while to load."""
    return TokenizerCounts(folder)


@dataclass(frozen=True)
class Entry:
    """One request as the server knows it: tokens truly billed (0 if none), and whether all of an answer went out."""

    number: int
    key: str
    fault: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answered: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Ledger:
    """Entries in order of arrival; with a path every change is also one appended line, readable while the server runs."""

    def __init__(self, path: Path | None = None):
        self._stream = path.open("a", encoding="utf-8") if path else None
        self._entries: dict[int, Entry] = {}
        self._lock = threading.Lock()

    def note(self, number: int, **facts: object) -> None:
        """Add an entry or change one; it is in the file before this returns."""
        with self._lock:
            known = asdict(self._entries[number]) if number in self._entries else {"number": number}
            self._entries[number] = Entry(**(known | facts))
            if self._stream:
                self._stream.write(json.dumps({"number": number, **facts}) + "\n")
                self._stream.flush()

    def entries(self) -> list[Entry]:
        with self._lock:
            return [self._entries[number] for number in sorted(self._entries)]


def read_ledger(path: Path) -> list[Entry]:
    """The entries of a ledger file, also of a server in another process."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            facts = json.loads(line)
            found.setdefault(facts["number"], {}).update(facts)
    return [Entry(**found[number]) for number in sorted(found)]
