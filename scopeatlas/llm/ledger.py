"""What a journal's events add up to: answers by request key, what they cost, and what may still turn out to have cost.

What belongs here: the meaning of each event, and every question about the past. What does not: the file the events stand
in (`journal.py`), what may still be spent (`budget.py`).
"""

import threading
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from pydantic import JsonValue

from scopeatlas.llm.requests import Charge, ChatReply, Rung, TokenLogprob

RequestState = Literal["sent", "received", "invalid", "failed", "lost"]


@dataclass(frozen=True)
class Reservation:
    """One attempt that was sent, and what it can cost at most. send: its number in the journal.

    prompt_low, prompt_high: bounds on the prompt's tokens. output: the most tokens the answer can have. usd: of the
    upper bounds, None without prices. exact: whether the bounds were counted with the server's own tokenizer.
    """

    send: int
    key: str
    purpose: str
    prompt_low: int
    prompt_high: int
    output: int
    usd: float | None
    exact: bool

    @property
    def tokens(self) -> int:
        return self.prompt_high + self.output


@dataclass(frozen=True)
class Spent:
    """What requests cost. open: reserved for attempts of which nobody knows whether, or how much, they were billed.

    prompt_tokens, completion_tokens, cached_tokens: charged, the cached ones being among the prompt's. usd: of what had
    known prices. open_requests: attempts without an answer that may have been billed.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    open_tokens: int = 0
    settled_usd: float = 0.0
    open_usd: float = 0.0
    answers: int = 0
    open_requests: int = 0

    @property
    def settled_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(*(mine - others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


_NOTHING = Spent()
_UNKNOWN = "unknown"  # the purpose of an attempt that was sent in a missing event
_MOST_MISSING = 1000  # attempts in a row whose lines are gone; a number beyond is itself the damage


@dataclass(frozen=True)
class Entry:
    """An answer. rung, time: how and when it was had. invalid: why it is no answer, if it was found to be none."""

    reply: ChatReply
    rung: Rung
    time: str
    charge: Charge
    invalid: str = ""


class Ledger:
    """What was asked and answered so far; thread-safe. `apply` takes the events in the order in which they happened.

    An event may be missing: an empty one, or nothing, stands in its place. An attempt that was sent in it, which gaps in
    the numbers of attempts tell, stays reserved as if it were the largest of all, until its end is told; the rest is as
    if it had not happened.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._states: dict[str, RequestState] = {}
        self._entries: dict[str, Entry] = {}
        self._open: dict[int, Reservation] = {}
        self._sends: dict[str, list[int]] = defaultdict(list)
        self._costs: list[Spent] = []
        self._largest = _NOTHING  # of one attempt, open
        self._vague: set[int] = set()  # attempts without an end that were sent in missing events
        self._missing = 0  # empty events since the last attempt: each may have been another one
        self._totals: dict[str, Spent] = defaultdict(Spent)
        self._notes: dict[str, dict[str, JsonValue]] = defaultdict(dict)

    def reply(self, key: str) -> ChatReply | None:
        """The answer to request `key`, valid or not, or None if none was ever recorded."""
        entry = self.entry(key)
        return entry.reply if entry else None

    def entry(self, key: str) -> Entry | None:
        """The answer to request `key` with how, when and for how much it was had."""
        with self.lock:
            return self._entries.get(key)

    def state(self, key: str) -> RequestState | None:
        """How far request `key` got, or None if it was never sent. "sent" after a kill: it may have been billed."""
        with self.lock:
            return self._states.get(key)

    def counts(self) -> dict[str, int]:
        """How many requests stand in each state."""
        with self.lock:
            return dict(Counter(self._states.values()))

    def open_sends(self, key: str) -> list[Reservation]:
        """The attempts at `key` of which it is not known what they cost, of this or an earlier process, newest last."""
        with self.lock:
            return [self._open[send] for send in self._sends.get(key, []) if send in self._open]

    def is_ended(self, send: int) -> bool:
        """Whether attempt `send` was made and its end is told."""
        with self.lock:
            return send < len(self._costs) and send not in self._open

    def noted(self, kind: str) -> dict[str, JsonValue]:
        """The facts of one kind that were noted, by key."""
        with self.lock:
            return dict(self._notes.get(kind, {}))

    def spent(self) -> Spent:
        """What everything so far cost."""
        with self.lock:
            return sum(self.spent_by_purpose().values(), _NOTHING)

    def spent_by_purpose(self) -> dict[str, Spent]:
        """The same, told apart by what it was asked for."""
        with self.lock:
            reserved = [self._largest] * (len(self._vague) + self._missing)
            unknown = sum(reserved, self._totals.get(_UNKNOWN, _NOTHING))
            return dict(sorted({**self._totals, **({_UNKNOWN: unknown} if reserved else {})}.items()))

    def apply(self, event: dict[str, Any]) -> None:
        """Take one event in. Raises KeyError, TypeError or ValueError for what is no event, or ends what is not open."""
        with self.lock:
            if not event and isinstance(event, dict):
                self._missing += 1
                return
            key, state = event["key"], event["state"]
            if state == "note":
                self._notes[event["kind"]][key] = event["value"]
                return
            if state == "sent":
                self._sent(event)
            elif state == "received":
                self._received(event)
            elif state == "failed":
                self._book(self._ended(event), _NOTHING)
            elif state == "lost":
                self._restore(event["send"] + 1)
            elif state == "invalid" and key in self._entries:
                self._entries[key] = replace(self._entries[key], invalid=event["problem"])
            elif state == "invalid":
                return  # the line with its answer is gone
            else:
                raise ValueError(f"unknown state {state!r}")
            if key not in self._entries or state in ("received", "invalid"):
                self._states[key] = state

    def _sent(self, event: dict[str, Any]) -> None:
        reservation = Reservation(**{name: event[name] for name in _RESERVATION})
        if reservation.send < len(self._costs):
            raise ValueError(f"attempt {reservation.send} is out of order")
        self._restore(reservation.send)
        self._missing = 0  # whichever of them was an attempt has its number before this one
        self._open[reservation.send] = reservation
        self._sends[reservation.key].append(reservation.send)
        self._costs.append(_NOTHING)
        cost = Spent(open_tokens=reservation.tokens, open_usd=reservation.usd or 0.0, open_requests=1)
        most = self._largest
        tokens, usd = max(most.open_tokens, cost.open_tokens), max(most.open_usd, cost.open_usd)
        self._largest = replace(cost, open_tokens=tokens, open_usd=usd)
        self._book(reservation, cost)

    def _restore(self, sends: int) -> None:
        """Take those attempts before number `sends` that are not known for sent in missing events."""
        missing = max(0, sends - len(self._costs))
        if missing > _MOST_MISSING:
            raise ValueError(f"attempt {sends} is out of order")
        for send in range(len(self._costs), sends):
            self._open[send] = Reservation(send, "", _UNKNOWN, 0, 0, 0, None, False)
            self._vague.add(send)
            self._costs.append(_NOTHING)
        self._missing = max(0, self._missing - missing)

    def _ended(self, event: dict[str, Any]) -> Reservation:
        """The attempt that an event ends, open no more."""
        self._restore(event["send"] + 1)
        reservation = self._open.pop(event["send"])
        if reservation.send in self._vague:
            self._vague.remove(reservation.send)
            self._sends[event["key"]].append(reservation.send)
        return reservation

    @property
    def next_send(self) -> int:
        """The number of the next attempt, which leaves room for those that missing events may have been."""
        return len(self._costs) + self._missing

    def _received(self, event: dict[str, Any]) -> None:
        reply, charge = reply_from_json(event["reply"]), Charge(**event["charge"])
        entry = Entry(reply, event["rung"], event["time"], charge)
        tokens = (charge.prompt_tokens, charge.completion_tokens, charge.cached_tokens, event["open_tokens"])
        self._book(self._ended(event), Spent(*tokens, charge.usd or 0.0, event["open_usd"], answers=1))
        self._entries.setdefault(event["key"], entry)

    def _book(self, reservation: Reservation, now: Spent) -> None:
        """Let one attempt have cost `now`, instead of what it was taken to cost so far."""
        self._totals[reservation.purpose] += now - self._costs[reservation.send]
        self._costs[reservation.send] = now


_RESERVATION = tuple(field.name for field in fields(Reservation))


def reply_to_json(reply: ChatReply) -> dict[str, JsonValue]:
    """`reply` as plain data; `reply_from_json` gives it back."""
    logprobs: JsonValue = [[token.token, token.logprob, [[*other] for other in token.top]] for token in reply.logprobs]
    return {**asdict(replace(reply, logprobs=())), "logprobs": logprobs}


def reply_from_json(data: dict[str, Any]) -> ChatReply:
    tokens = (TokenLogprob(token, value, tuple((t, v) for t, v in top)) for token, value, top in data["logprobs"])
    return ChatReply(**{**data, "logprobs": tuple(tokens)})
