"""Texts and conversations that people bring, from a command's arguments, a file or stdin.

What belongs here: reading them. What does not: tokenising them (`activations/probe.py`), or the corpus (`corpus/sources.py`).
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from scopeatlas.activations.probe import Text, checked_text, checked_texts
from scopeatlas.errors import ConfigError

__all__ = ["STDIN", "Text", "as_texts", "lines_from", "texts_from"]

STDIN = "-"


def as_texts(texts: Text | Iterable[Text]) -> list[Text]:
    """One text or conversation, or several, as a list of them. Raises ConfigError as `checked_texts` does."""
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        return [checked_text(texts)]
    parts = list(texts)
    if any(isinstance(part, Mapping) for part in parts):
        return [checked_text(parts)]  # turns: one conversation
    return checked_texts(parts)


def texts_from(arguments: Sequence[str], file: str | None, *, every_line: bool = False) -> list[Text]:
    """The texts given as arguments, then those of `file`: one text a line, or where its name ends in .jsonl one row a line
    with "text" or with "messages" (turns {"role", "content"}); `-` is stdin, one text a line.

    every_line: as in `lines_from`. Raises ConfigError, naming the file and the line, for what cannot be read, and if there is
    no text at all.
    """
    texts: list[Text] = list(arguments)
    if file is not None and file.endswith(".jsonl"):
        texts += [_row(line, f"{file}, line {number}") for number, line in _lines(file, every_line)]
    elif file is not None:
        texts += lines_from(file, every_line=every_line)
    if not any(texts):
        raise ConfigError(f"no text in {file}; write one a line" if file else "no text given; name some, or a file with --file")
    return checked_texts(texts)


def lines_from(file: str, *, every_line: bool = False) -> list[str]:
    """The lines of a file of text, or for `-` of stdin, without the empty ones.

    every_line: the n-th line belongs to the n-th of another file, so that an empty one before the last text is refused instead
    of passed over. Raises ConfigError, naming the line, for such a one, and if the file cannot be read.
    """
    return [line.strip() for _, line in _lines(file, every_line)]


def _lines(file: str, every_line: bool) -> list[tuple[int, str]]:
    """Lines that are not empty, as \n ends them (other separators of Unicode may stand inside a text), numbered from 1."""
    name = "stdin" if file == STDIN else file
    try:
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text: byte {error.start} is {error.reason}") from error
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for expected, (number, _) in enumerate(kept, 1):
        if every_line and number != expected:
            raise ConfigError(
                f"{name}, line {expected} is blank: what belongs to the lines after it would shift; fill or delete it"
            )
    return kept


def _row(line: str, place: str) -> Text:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is no JSON: {error.msg}") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list):
        with suppress(ConfigError):
            return checked_text(messages)
    raise ConfigError(f'{place} has neither: "text": "..." or "messages": [{{"role": "user", "content": "..."}}, ...]')
