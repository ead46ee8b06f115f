"""Sending requests to one server: retries, pace and budget around each attempt, and when to give the server up.

What belongs here: everything between "this must be answered" and the single attempts (`client.py`). What does not: what
was answered before, and the order of answers (`runner.py`).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Literal, Self

from scopeatlas.errors import ExplainerError
from scopeatlas.llm import limits
from scopeatlas.llm.budget import Budget
from scopeatlas.llm.client import ChatClient, Failure
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.ledger import Reservation
from scopeatlas.llm.limits import LONGEST_WAIT, Pace, TokenBucket
from scopeatlas.llm.requests import ChatRequest, Rung, request_body
from scopeatlas.runner.local import Log, Progress, silent

BUSY_PATIENCE = 4  # times max_attempts, where a server only says that it is busy, which costs nothing
FAILURES_IN_A_ROW = 10  # so many requests that fail one after another, retries included, are the server's fault

STOPPED = "not sent: the run was stopped"


class Unanswered(Exception):
    """One request that brought no answer. It fails that request, not the run. why: who is to blame for it."""

    def __init__(self, problem: str, why: Literal["budget", "refused", "failed", "stopped"]):
        super().__init__(problem)
        self.why = why


class Sender:
    """One server within its limits and the budget. An async context manager, for one event loop.

    stopped: once it is set nothing more goes out, and what is under way still comes in and is journaled.
    """

    def __init__(self, config: ServerConfig, journal: Journal, *, stopped: asyncio.Event):
        self._config = config
        self._budget = Budget(config, journal)
        self._client = ChatClient(config)
        self._pace = Pace(config.max_concurrency)
        self._per_minute = TokenBucket(config.requests_per_minute) if config.requests_per_minute else None
        self._tokens_per_minute = TokenBucket(config.tokens_per_minute) if config.tokens_per_minute else None
        self._stopped = stopped
        self._changed = asyncio.Condition()
        self._reserved = 0
        self._failures = 0
        self._error: Exception | None = None

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._wake_when_stopped())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        await self._client.close()

    async def answer_all(self, requests: Mapping[str, ChatRequest], rung: Rung, *, log: Log = silent) -> dict[str, str]:
        """Have all of them answered, into the journal; returns by key why the others are not.

        Raises ExplainerError where the server as a whole is of no use, after everything under way has come in.
        """
        waiting, problems = deque(requests.items()), {}
        progress = Progress(f"asking {self._config.model}", len(requests), "requests", log)

        async def work() -> None:
            while waiting:
                key, request = waiting.popleft()
                try:
                    await self.answer(request, rung)
                except Unanswered as problem:
                    problems[key] = str(problem)
                except Exception as error:
                    self._error = self._error or error
                    await self._notify()
                progress.advance(1)

        await asyncio.gather(*(work() for _ in range(min(self._config.max_concurrency, len(requests)))))
        if self._error is not None:
            raise self._error
        progress.finish()
        return problems

    async def answer(self, request: ChatRequest, rung: Rung) -> None:
        """Have `request` answered, into the journal. Raises Unanswered, or ExplainerError as `answer_all` does."""
        wait = 0.0
        for attempt in count(1):
            await self._sleep(wait)
            failure = await self._attempt(request, rung, attempt)
            if failure is None:
                return
            is_busy = failure.throttled and not failure.billable
            wait = max(failure.wait or 0.0, limits.backoff(attempt))
            enough = self._config.max_attempts * (BUSY_PATIENCE if is_busy else 1)
            if not failure.retry or attempt >= enough or wait > LONGEST_WAIT:
                self._note(failure)
                raise Unanswered(failure.problem, "failed" if failure.retry else "refused")

    async def _attempt(self, request: ChatRequest, rung: Rung, attempt: int) -> Failure | None:
        """Send `request` once as soon as it may be, and book what comes of it; returns what went wrong."""
        await self._until(lambda: self._pace.has_place)
        self._pace.enter()
        try:
            reservation = await self._reserve(request, rung, attempt)
            self._reserved += 1
            try:
                return await self._send(request, rung, reservation)
            finally:
                self._reserved -= 1
        finally:
            self._pace.leave()
            await self._notify()

    async def _reserve(self, request: ChatRequest, rung: Rung, attempt: int) -> Reservation:
        """Wait until the limits allow one more request and the budget has room. Raises Unanswered if it never will."""
        while True:
            while wait := self._rate_wait(request, rung):
                await self._sleep(wait)
            reservation = self._budget.reserve(request, rung, attempt=attempt)
            if reservation is not None:
                return reservation
            self._give_back_rate(self._budget.needed(request, rung).tokens, requests=1)
            if self._reserved == 0:
                raise Unanswered(self._budget.refusal(request, rung), "budget")
            reserved = self._reserved
            await self._until(lambda: self._reserved < reserved)  # noqa: B023, it is awaited here and now

    async def _send(self, request: ChatRequest, rung: Rung, reservation: Reservation) -> Failure | None:
        sent_at = time.monotonic()
        try:
            reply = await self._client.complete(request_body(request, self._config, rung))
        except Failure as failure:
            book = self._budget.lose if failure.billable else self._budget.release
            book(reservation, failure.problem)
            if failure.throttled:
                self._pace.throttled(sent_at, time.monotonic())
            if failure.wait is not None and failure.wait <= LONGEST_WAIT:
                self._pace.pause(time.monotonic() + failure.wait)
            return failure
        except ExplainerError as error:
            self._budget.release(reservation, str(error))
            raise
        charge = self._budget.settle(reservation, reply, rung)
        self._give_back_rate(reservation.tokens - charge.prompt_tokens - charge.completion_tokens)
        self._pace.answered()
        self._failures = 0
        return None

    def _rate_wait(self, request: ChatRequest, rung: Rung) -> float:
        """Take a request, and its tokens, from what may be sent this minute; or the seconds to wait before trying again."""
        now = time.monotonic()
        if wait := self._pace.pause_left(now):
            return wait
        if self._per_minute and (wait := self._per_minute.take(1, now)):
            return wait
        if self._tokens_per_minute and (wait := self._tokens_per_minute.take(self._budget.needed(request, rung).tokens, now)):
            self._give_back_rate(0, requests=1)
            return wait
        return 0.0

    def _give_back_rate(self, tokens: int, *, requests: int = 0) -> None:
        if self._per_minute:
            self._per_minute.give_back(requests)
        if self._tokens_per_minute:
            self._tokens_per_minute.give_back(max(0, tokens))

    def _note(self, failure: Failure) -> None:
        """Count a request that failed for good; raises ExplainerError once that tells of the server."""
        if failure.own_fault:
            return
        self._failures += 1
        if failure.unreachable:
            raise ExplainerError(f"{failure.problem}: start the server, or set base_url to one that runs")
        if self._failures >= FAILURES_IN_A_ROW:
            message = f"{self._failures} requests in a row failed, the last one so: {failure.problem}"
            raise ExplainerError(f"{message}; run again later, the answers so far are kept")

    @property
    def _closing(self) -> bool:
        return self._stopped.is_set() or self._error is not None

    async def _sleep(self, seconds: float) -> None:
        """Wait so long. Raises Unanswered as soon as nothing more is to be sent."""
        try:
            async with asyncio.timeout(seconds):
                await self._until(lambda: False)
        except TimeoutError:
            pass
        if self._closing:
            raise Unanswered(STOPPED, "stopped")

    async def _until(self, so: Callable[[], bool]) -> None:
        """Wait for `so`. Raises Unanswered as soon as nothing more is to be sent."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closing or so())
        if self._closing:
            raise Unanswered(STOPPED, "stopped")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wake_when_stopped(self) -> None:
        await self._stopped.wait()
        await self._notify()
