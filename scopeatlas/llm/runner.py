"""Asking: many requests in, an answer or a reason for each out, and nothing paid for twice.

What belongs here: reuse from the journal, the probe before the rest, direct or batch mode, and stopping in good order.
What does not: single attempts and retries (`sending.py`), what an answer means (the caller's).
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.replies import fault
from scopeatlas.llm.requests import Answer, ChatRequest, Rung
from scopeatlas.llm.rungs import find_rung
from scopeatlas.llm.sending import Sender, Unanswered
from scopeatlas.runner.local import Log, silent

Result = TypeVar("Result")
Problems = dict[str, str]
"""By request key, why it is unanswered."""


def ask(requests: Iterable[ChatRequest], config: ServerConfig, journal: Journal, *, log: Log = silent) -> list[Answer]:
    """An answer, or the reason why there is none, for each of `requests`, in their order.

    What stands in `journal` is reused, equal requests are asked once, and every answer is in the journal before this
    returns or raises. One bad request never raises. Raises ConfigError if the key is missing, ExplainerError if the
    server as a whole is of no use, StoreError if the journal cannot be written. On Ctrl-C or SIGTERM nothing more is
    sent, what is under way still comes in, and then the signal has its effect; a second one cuts that short.
    """
    keyed = [(request.key(config), request) for request in requests]
    if not config.enabled:
        return [Answer(request, key, None, "not sent: no model is configured") for key, request in keyed]
    pending = {key: request for key, request in keyed if journal.reply(key) is None}
    problems = _stoppable(lambda stopped: _ask_all(pending, config, journal, stopped, log)) if pending else {}
    return [_answer(request, key, config, journal, problems, reused=key not in pending) for key, request in keyed]


async def send_all(
    requests: Mapping[str, ChatRequest],
    config: ServerConfig,
    journal: Journal,
    *,
    rung: Rung,
    stopped: asyncio.Event,
    log: Log = silent,
) -> Problems:
    """Have `requests`, by key, answered directly and journaled; returns why the others are not. Raises as `ask` does."""
    async with Sender(config, journal, stopped=stopped) as sender:
        return await sender.answer_all(requests, rung, log=log)


async def _ask_all(
    pending: Mapping[str, ChatRequest], config: ServerConfig, journal: Journal, stopped: asyncio.Event, log: Log
) -> Problems:
    from scopeatlas.llm.batch import run_batch, under_way  # which sends directly, where there is no Batch API, by `send_all`

    elsewhere = {} if config.batch == "provider" else under_way(config, journal)
    problems = {key: elsewhere[key] for key in pending if key in elsewhere}
    pending = {key: request for key, request in pending.items() if key not in elsewhere}
    if not pending:
        return problems
    async with Sender(config, journal, stopped=stopped) as sender:
        try:
            rung = await find_rung(sender, config, journal)
        except Unanswered as problem:
            return problems | dict.fromkeys(pending, str(problem))
        if config.batch == "off":
            return problems | await sender.answer_all(pending, rung, log=log)
    return problems | await run_batch(pending, config, journal, rung=rung, stopped=stopped, log=log)


def _answer(
    request: ChatRequest, key: str, config: ServerConfig, journal: Journal, problems: Problems, *, reused: bool
) -> Answer:
    entry = journal.entry(key)
    if entry is None:
        return Answer(request, key, None, problems.get(key) or "not sent")
    facts = {"rung": entry.rung, "time": entry.time, "charge": entry.charge}
    return Answer(request, key, entry.reply, fault(entry.reply, config.model), reused, **facts)


def _stoppable(main: Callable[[asyncio.Event], Coroutine[None, None, Result]]) -> Result:
    """Run `main` in an event loop of its own thread, so that it may be called from anywhere, a notebook included.

    Whatever interrupts the wait for it (a signal, or a framework's own exception) sets the event it was given, and goes
    on once it has ended; a second interruption cancels it.
    """
    result: Future[Result] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, asyncio.Task[Result]]] = Future()

    async def run() -> Result:
        stopped, task = asyncio.Event(), asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), stopped, task))
        return await main(stopped)

    def in_thread() -> None:
        try:
            result.set_result(asyncio.run(run()))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=in_thread, name="llm", daemon=True)
    with _sigterm_raises():
        thread.start()
        try:
            return result.result()
        except BaseException:
            if not result.done():
                loop, stopped, task = started.result()
                with suppress(RuntimeError):  # it has ended since
                    loop.call_soon_threadsafe(stopped.set)
                try:
                    wait([result])
                except BaseException:
                    with suppress(RuntimeError):
                        loop.call_soon_threadsafe(task.cancel)
                    raise
            raise


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the program the way an exception does, where nobody else handles it."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
