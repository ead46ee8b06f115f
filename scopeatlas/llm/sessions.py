"""The journals of several machines as one: segments in an object store, each with what one session wrote.

What belongs here: a session's header, and replaying segments in the order of the store. What does not: writing them
(`journal.py`).

A session is one opening of a journal. It has read every segment before its first, and numbers its attempts on from there;
where another machine's segments came in between, its numbers are moved up as its segments are replayed.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from scopeatlas.errors import StoreError
from scopeatlas.llm.ledger import Ledger

HEADER_ADVICE = (
    'put {"session": "NAME", "base": N} in the place of that line, NAME being a new word and N the first "send" of a line with '
    '"state": "sent", and run again'
)
"""How to mend a first line: without its session the others mean nothing, so it cannot be left out as they can."""


def header(base: int) -> bytes:
    """The first line of each segment of a new session, whose first attempt has the number `base`."""
    return json.dumps({"session": uuid.uuid4().hex, "base": base}).encode() + b"\n"


def has_header(segment: bytes) -> bool:
    """Whether a segment begins as a session's does."""
    try:
        start = json.loads(segment.split(b"\n", 1)[0])
        return isinstance(start["session"], str) and isinstance(start["base"], int)
    except (ValueError, LookupError, TypeError):
        return False


def has_events(segment: bytes) -> bool:
    """Whether there is anything in a segment but its header."""
    return segment.count(b"\n") > 1


def replay_segments(segments: Sequence[bytes], ledger: Ledger, *, place: object) -> None:
    """Read segments into an empty ledger. Raises StoreError naming the first line that is damaged."""
    sessions: dict[str, _Session] = {}
    for which, segment in enumerate(segments):
        if not has_header(segment):
            raise StoreError(f"line 1 of segment {which} of the journal {place} is damaged; {HEADER_ADVICE}")
        first, *lines = segment.splitlines()
        session = _begun(json.loads(first), sessions, ledger)
        for number, line in enumerate(lines, start=2):
            with _naming(f"line {number} of segment {which} of the journal {place}"):
                _apply(json.loads(line), session, ledger)


@contextmanager
def _naming(line: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{line} is damaged; put {{}} in the place of that line and run again") from error


@dataclass
class _Session:
    """base: the number of its first attempt. next: of its next one. moved: from which number on by how much, ascending."""

    base: int
    next: int
    moved: list[tuple[int, int]] = field(default_factory=list)

    def number(self, own: int) -> int:
        """The number in the ledger of the attempt that is `own` in this session."""
        self.next = max(self.next, own + 1)
        return own if own < self.base else own + next(by for start, by in reversed(self.moved) if start <= own)


def _begun(start: dict[str, Any], sessions: dict[str, _Session], ledger: Ledger) -> _Session:
    """The session that goes on after a header. What came in between moves its next numbers up."""
    session = sessions.setdefault(start["session"], _Session(start["base"], start["base"]))
    session.moved.append((session.next, ledger.next_send - session.next))
    return session


def _apply(event: dict[str, Any], session: _Session, ledger: Ledger) -> None:
    if "send" in event:
        own, known = event["send"], session.next
        event = event | {"send": session.number(own)}
        if event["state"] == "sent" and own < known:
            return  # the segment before holds it too: it was put, but the store's answer was lost
        if event["state"] in ("received", "failed") and ledger.is_ended(event["send"]):
            return  # another machine fetched the same answer, out of the same batch
    ledger.apply(event)
