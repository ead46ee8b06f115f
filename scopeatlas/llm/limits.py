"""How fast requests may go out: how many at once, how many and how large a minute, and how long to wait after a failure.

What belongs here: waiting. What does not: what is waited for (`runner.py`).
"""

import math
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 120.0  # seconds; a server that asks for more has no time for this request
_BURST_SECONDS = 10.0  # providers count by the minute, but cut off bursts well before one is over


def backoff(attempt: int) -> float:
    """Seconds to wait after the `attempt`th failure: doubling from about half a second to half a minute, with jitter."""
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str]) -> float | None:
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


class TokenBucket:
    """So much a minute, with bursts of ten seconds' worth. Amounts larger than a burst go through, and are waited off."""

    def __init__(self, per_minute: float):
        self._rate = per_minute / 60
        self._most = max(self._rate * _BURST_SECONDS, 1.0)
        self._level = self._most
        self._at = -math.inf

    def take(self, amount: float, now: float) -> float:
        """Take `amount` at time `now` (seconds) and return 0, or take nothing and return the seconds until it may be."""
        self._level = min(self._most, self._level + self._rate * max(0.0, now - self._at))
        self._at = max(self._at, now)
        missing = min(amount, self._most) - self._level
        if missing > 1e-9:
            return missing / self._rate
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Return what was taken and not used."""
        self._level += amount


class Pace:
    """How many requests may be under way: half as many after a 429 or a timeout, one more after as many answers.

    Times are seconds of one clock. Nothing here waits; whoever calls does.
    """

    def __init__(self, most: int):
        self._most = most
        self._limit = float(most)
        self._under_way = 0
        self._cut_at = self._resume_at = -math.inf

    @property
    def limit(self) -> int:
        return int(self._limit)

    @property
    def has_place(self) -> bool:
        return self._under_way < self.limit

    def enter(self) -> None:
        self._under_way += 1

    def leave(self) -> None:
        self._under_way -= 1

    def pause(self, until: float) -> None:
        """Send nothing before `until`: the server asked for it, and means all requests."""
        self._resume_at = max(self._resume_at, until)

    def pause_left(self, now: float) -> float:
        return max(0.0, self._resume_at - now)

    def answered(self) -> None:
        self._limit = min(self._most, self._limit + 1 / self._limit)

    def throttled(self, sent_at: float, now: float) -> None:
        """The server had too much to do for a request sent at `sent_at`; what was sent before the last cut tells nothing new."""
        if sent_at >= self._cut_at:
            self._limit = max(1.0, self._limit / 2)
            self._cut_at = now
