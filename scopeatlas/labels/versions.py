"""Labels that are kept for good: append-only files of JSON lines, fsynced, in the labels stage's folder; in an object store
a folder of segments instead of each file.

What belongs here: adding lines and reading them back. What does not: which labels are kept and which is current
(`stage.py`, `annotations.py`, `choosing.py`).
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scopeatlas.errors import StoreError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.storage.segments import append_segment, read_segments
from scopeatlas.storage.uris import Location


def append(path: Location, entries: Sequence[Mapping[str, object]]) -> None:
    """Add `entries`, one JSON line each; several processes may do so. Raises StoreError if they cannot be written.

    A line that a crash cut short is cut off before the first new one.
    """
    lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries).encode("ascii")
    if not isinstance(path, Path):
        if lines:
            append_segment(path, lines)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.truncate(_whole(path.read_bytes()))
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make the folder writable or free space") from error


def read(path: Location) -> list[dict[str, Any]]:
    """Every whole line, in the order of writing; none if there is no file. Raises StoreError if one is damaged."""
    content = _content(path)
    entries = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise StoreError(f"line {number} of {path} is damaged; delete that line and run again") from error
    return entries


def as_entry(label: Label) -> dict[str, object]:
    """A label as plain data, without what a choice made of it."""
    body = asdict(label)
    return {name: body[name] for name in body if name not in ("current", "select_score")}


def from_entry(entry: Mapping[str, object]) -> Label:
    """The label that `as_entry` was made of."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return Label(**values, current=False)  # type: ignore[arg-type]  # as_entry wrote the fields of a Label


def _content(path: Location) -> bytes:
    if isinstance(path, Path):
        return path.read_bytes() if path.exists() else b""
    return b"".join(read_segments(path))


def _whole(content: bytes) -> int:
    """How many bytes of `content` are whole lines."""
    return content.rfind(b"\n") + 1
