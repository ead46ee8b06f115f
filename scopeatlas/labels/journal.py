"""The journal of paid LLM answers: one JSON line per event, appended and fsynced, replayed when it is opened.

What belongs here: recording that a request was sent, what came back, and finding an answer again. What does not:
sending (`chat.py`), what an answer means (`llm.py`), and any secret: a journal holds no key and no header.
"""

import fcntl
import json
import os
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from scopeatlas.errors import StoreError

JournalState = Literal["sent", "received", "invalid"]


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


class Journal:
    """What was asked and answered so far, by request key; thread-safe, one process at a time.

    A line cut short by a crash can only be the last one: it is dropped when the journal is next opened, and the
    request it told of counts as unanswered. Raises StoreError where the file cannot be written, is damaged
    before its last line, or is held by another process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._states: dict[str, JournalState] = {}
        self._replies: dict[str, ChatReply] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"cannot write the journal {path}: {error.strerror}; make its folder writable") from error
        try:
            self._claim()
            self._size = self._replay()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the journal. Closing twice is harmless."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def reply(self, key: str) -> ChatReply | None:
        """The answer to request `key`, valid or not, or None if none was ever recorded."""
        with self._lock:
            return self._replies.get(key)

    def state(self, key: str) -> JournalState | None:
        """How far request `key` got, or None if it was never sent."""
        with self._lock:
            return self._states.get(key)

    def counts(self) -> dict[str, int]:
        """How many requests stand in each state."""
        with self._lock:
            return dict(Counter(self._states.values()))

    def sent(self, key: str, *, model: str, prompt_hash: str, sae: str, feature: int) -> None:
        """Record that request `key` is about to go out, and for which feature."""
        facts = {"model": model, "prompt_hash": prompt_hash, "sae": sae, "feature": feature}
        self._append({"state": "sent", "key": key, **facts})

    def received(self, key: str, reply: ChatReply) -> None:
        """Record the raw answer to `key`; from here on it is never asked for again."""
        self._append({"state": "received", "key": key, "reply": asdict(reply)})

    def invalid(self, key: str, error: str) -> None:
        """Record why the answer to `key` is no label. The answer itself stays."""
        self._append({"state": "invalid", "key": key, "error": error})

    def _claim(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the folder's entry must outlive a power cut as the lines do
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BlockingIOError as error:
            raise StoreError(f"the journal {self.path} is in use by another run; wait for it or stop it") from error
        except OSError as error:
            raise StoreError(f"cannot use the journal {self.path}: {error.strerror}; move it to a local disk") from error

    def _replay(self) -> int:
        """Read every whole line, cut a torn last one off, and return the size in bytes of what is good."""
        good = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    message = f"line {number} of the journal {self.path} is damaged; delete that line and run again"
                    raise StoreError(message) from error
                good += len(line)
        os.ftruncate(self._descriptor, good)
        return good

    def _apply(self, event: dict) -> None:
        key, state = event["key"], event["state"]
        if state == "received":
            self._replies.setdefault(key, ChatReply(**event["reply"]))
        elif state not in ("sent", "invalid"):
            raise ValueError(f"unknown state {state!r}")
        if state != "sent" or key not in self._replies:
            self._states[key] = state

    def _append(self, event: dict) -> None:
        event = {**event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        # ASCII escapes keep even half a surrogate pair, which a reply may hold and UTF-8 may not
        line = (json.dumps(event, sort_keys=True) + "\n").encode("ascii")
        with self._lock:
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
            self._apply(event)
