"""The journal of paid LLM answers: one JSON line per event, appended and fsynced, replayed when it is opened.

What belongs here: the file, its lock and its lines, and putting them into an object store. What does not: what the events
add up to (`ledger.py`), reading what several machines put there (`sessions.py`), sending (`runner.py`), and any secret: a
journal holds no key and no header.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import JsonValue
from upath import UPath

from scopeatlas.errors import StoreError
from scopeatlas.llm.ledger import Ledger, Reservation, reply_to_json
from scopeatlas.llm.requests import Charge, ChatReply, ChatRequest, Rung
from scopeatlas.llm.sessions import HEADER_ADVICE, has_events, has_header, header, replay_segments
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.segments import append_segment, read_segments
from scopeatlas.storage.uris import Location, local_state

JOURNAL = Path("llm") / "journal.jsonl"
_SEGMENT_SECONDS, _SEGMENT_BYTES = 60.0, 1 << 20
"""After so long, and beyond so much, what stands in the file of a journal in an object store is put there."""


class Journal(Ledger):
    """A ledger that outlives its process: thread-safe, one process at a time.

    Opening waits while another process holds the file, and says so. A line cut short by a crash can only be the last
    one: it is dropped then. What was sent without an end stays reserved, since it may have been billed. Raises
    StoreError where the file cannot be written or is damaged before its last line; `{}` in place of a damaged line keeps
    every other answer, and reserved what was sent in it.
    """

    def __init__(self, path: Path, *, log: Log = silent):
        super().__init__()
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"cannot write the journal {path}: {error.strerror}; make its folder writable") from error
        try:
            self._claim(log)
            self._size = self._restore_events()
            os.ftruncate(self._descriptor, self._size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the journal. Closing twice is harmless."""
        with self.lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def sent(self, request: ChatRequest, reservation: Reservation, *, model: str, attempt: int) -> Reservation:
        """Record that `request` is about to go out for the `attempt`th time; returns the reservation with its number."""
        with self.lock:
            numbered = replace(reservation, send=self.next_send)
            facts = {"sae": request.sae, "feature": request.feature, "model": model, "prompt": request.prompt}
            self._append({"state": "sent", "attempt": attempt, **facts, **asdict(numbered)})
            return numbered

    def received(
        self, reservation: Reservation, reply: ChatReply, *, rung: Rung, charge: Charge, open_tokens: int, open_usd: float
    ) -> None:
        """Record the raw answer; from here on it is never asked for again.

        open_tokens, open_usd: what of the reservation may have been used beyond the charge, and stays reserved.
        """
        facts = {"rung": rung, "reply": reply_to_json(reply), "charge": asdict(charge)}
        self._end(reservation, {"state": "received", **facts, "open_tokens": open_tokens, "open_usd": open_usd})

    def failed(self, reservation: Reservation, problem: str) -> None:
        """Record an attempt that brought nothing and cannot have been billed."""
        self._end(reservation, {"state": "failed", "problem": problem})

    def lost(self, reservation: Reservation, problem: str) -> None:
        """Record an attempt that brought nothing but may have been billed: it stays reserved."""
        self._end(reservation, {"state": "lost", "problem": problem})

    def invalid(self, key: str, problem: str) -> None:
        """Record why the answer to `key` is none. The answer itself stays. Raises KeyError where there is no answer."""
        with self.lock:
            if self._entries[key].invalid != problem:
                self._append({"state": "invalid", "key": key, "problem": problem})

    def note(self, kind: str, key: str, value: JsonValue) -> None:
        """Record a fact that a later run needs; a later note of the same kind and key takes its place."""
        self._append({"state": "note", "kind": kind, "key": key, "value": value})

    def _end(self, reservation: Reservation, event: dict[str, Any]) -> None:
        with self.lock:
            if reservation.send not in self._open:
                raise ValueError(f"attempt {reservation.send} has its end already")
            self._append({"key": reservation.key, "send": reservation.send, **event})

    def _restore_events(self) -> int:
        """Take the past in; returns how many bytes of the file are whole lines."""
        return _replay(self.path, self)

    def _claim(self, log: Log) -> None:
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another run that uses the journal {self.path}")
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # the folder's entry must outlive a power cut as the lines do
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"cannot use the journal {self.path}: {error.strerror}; move it to a local disk") from error

    def _append(self, event: dict[str, Any]) -> None:
        event = {**event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        # ASCII escapes keep even half a surrogate pair, which a reply may hold and UTF-8 may not
        line = (json.dumps(event, sort_keys=True) + "\n").encode("ascii")
        with self.lock:
            self._write(line)
            self.apply(event)

    def _write(self, line: bytes) -> None:
        if self._descriptor < 0:
            raise StoreError(f"the journal {self.path} is closed; open it again")
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(None, "no space for the whole line")
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)  # no half line in front of later ones
            raise StoreError(f"cannot write the journal {self.path}: {error.strerror}; free some space") from error
        self._size += len(line)


class MirroredJournal(Journal):
    """The journal of a store that lies in an object store, where no file can be added to.

    Lines are fsynced into a file of this machine, as ever, and put into the store as a segment now and then and at the end.
    Opening puts there what a killed run left here, and reads the segments of every machine: this one never pays again for
    what was journaled, another never for what was put. Two machines at once lose nothing, but may both pay for one request.
    """

    def __init__(self, root: UPath, *, log: Log = silent):
        self._segments, self._log = root.joinpath(*JOURNAL.with_suffix("").parts), log
        self._header, self._put_at = 0, time.monotonic()
        super().__init__(local_state(root) / JOURNAL, log=log)

    def close(self) -> None:
        """Put the last lines into the store, and let another process have the journal. Closing twice is harmless."""
        with self.lock:
            if self._descriptor >= 0 and self._header:
                self._put()
            super().close()

    def _restore_events(self) -> int:
        for left in _unput(_whole(self.path), read_segments(self._segments), self.path):
            append_segment(self._segments, left)
        replay_segments(read_segments(self._segments), self, place=self._segments)
        os.ftruncate(self._descriptor, 0)
        self._size = 0
        self._write(header(self.next_send))
        self._header = self._size
        return self._size

    def _write(self, line: bytes) -> None:
        super()._write(line)
        if self._header and (self._size > _SEGMENT_BYTES or time.monotonic() - self._put_at > _SEGMENT_SECONDS):
            self._put()

    def _put(self) -> None:
        """Make a segment of the lines; where the store cannot be reached they stay in the file for another time."""
        self._put_at = time.monotonic()
        if self._size == self._header:
            return
        try:
            append_segment(self._segments, self.path.read_bytes()[: self._size])
        except StoreError as error:
            self._log(f"the journal's last lines are in {self.path} alone: {error}")
            return
        os.ftruncate(self._descriptor, self._header)
        self._size = self._header


def open_journal(root: Location, *, log: Log = silent) -> Journal:
    """The journal of the store at `root`, for writing. Says what an earlier run that was killed left open."""
    journal = Journal(root / JOURNAL, log=log) if isinstance(root, Path) else MirroredJournal(root, log=log)
    spent = journal.spent()
    if spent.open_requests:
        message = f"{spent.open_requests} earlier requests have no answer but may have been billed"
        log(f"{message}: {spent.open_tokens:,} tokens stay reserved for what is not known")
    return journal


def read_journal(root: Location) -> Ledger:
    """What the journal of the store at `root` says so far, also while a run is writing it. Raises StoreError if damaged.

    Of one in an object store that is what was put there, and what this machine has not put yet.
    """
    ledger, path = Ledger(), local_state(root) / JOURNAL
    if not isinstance(root, Path):
        place = root.joinpath(*JOURNAL.with_suffix("").parts)
        here = _whole(path)  # first, since lines only ever go from here to there
        segments = read_segments(place)
        replay_segments([*segments, *_unput(here, segments, path)], ledger, place=place)
    elif path.exists():
        _replay(path, ledger)
    return ledger


def _replay(path: Path, ledger: Ledger) -> int:
    """Read every whole line into `ledger`; returns their size in bytes, which a torn last line is not part of."""
    good = 0
    for number, line in enumerate(_lines(path), start=1):
        try:
            ledger.apply(json.loads(line))
        except (ValueError, LookupError, TypeError) as error:
            raise _damaged(number, path) from error
        good += len(line)
    return good


def _whole(path: Path) -> bytes:
    return b"".join(_lines(path)) if path.exists() else b""


def _unput(content: bytes, segments: Sequence[bytes], path: Path) -> list[bytes]:
    """What `path` holds and none of the segments, as the one segment that it is to become. Raises StoreError if damaged."""
    if not has_events(content) or any(segment.startswith(content) for segment in segments):
        return []
    if not has_header(content):  # once it is put, every machine would trip over it
        raise StoreError(f"line 1 of the journal {path} is damaged; {HEADER_ADVICE}")
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError as error:
            raise _damaged(number, path) from error
    return [content]


def _damaged(number: int, path: Path) -> StoreError:
    return StoreError(f"line {number} of the journal {path} is damaged; put {{}} in the place of that line and run again")


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from (line for line in stream if line.endswith(b"\n"))
