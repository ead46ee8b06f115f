"""A pool of processes on this machine, each owning a device and doing one shard at a time.

What belongs here: starting processes, talking to them, and noticing that one is gone. What does not: which shards are tried
again (`work.py`), or workers on other machines (`cluster.py`).
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, Literal, NamedTuple, cast

from scopeatlas.errors import ConfigError, RunnerError
from scopeatlas.runner.local import Log, silent
from scopeatlas.runner.work import Attempts, OpenedWork, Result, Shard, Work

# Forking a process that has used torch's threads or CUDA hangs or breaks it.
_SPAWN = multiprocessing.get_context("spawn")
_EXIT_SECONDS = 10.0


class ProcessRunner:
    """Runs shards on one process for each of `devices`: "cuda:0", "cuda:1" and so on, or "cpu" as often as wanted.

    threads: torch's, in each process; None divides the cores of this machine among them. A process that dies is replaced,
    and its shard tried again, on another if there is one. All end with the iterator of `map`, or with this process, however
    it ends. Raises ConfigError if there is no device, or more than one kind: results must not depend on who made them.
    """

    def __init__(self, devices: Sequence[str], *, threads: int | None = None, log: Log = silent):
        kinds = {device.partition(":")[0] for device in devices}
        if len(kinds) != 1:
            raise ConfigError(
                f"runner.devices is {list(devices)}: name one or more of one kind, such as [cuda:0, cuda:1] or [cpu, cpu]"
            )
        self.devices, self.log = list(devices), log
        self.device = kinds.pop()
        self.sharing = max(self.devices.count(device) for device in self.devices)
        self.threads = threads or max(1, (os.cpu_count() or 1) // len(self.devices))

    def map(self, work: Work[Shard, Result], shards: Sequence[Shard]) -> Iterator[Result]:
        """The result of each shard as it comes. Raises RunnerError naming the shard if its work fails or it is lost too often."""
        attempts = Attempts(shards, self.log)
        workers = [_Worker(f"process {n} on {device}", device, self.threads, work) for n, device in enumerate(self.devices)]
        names = [worker.name for worker in workers]
        try:
            while attempts.unfinished:
                for worker in workers:
                    if worker.number is None and (number := attempts.take(worker.name, names)) is not None:
                        worker.give(number, shards[number])
                busy = {worker.connection: worker for worker in workers if worker.number is not None}
                for connection in wait(busy):
                    yield from self._heard(busy[cast("Connection", connection)], attempts)
        finally:
            for worker in workers:
                worker.end()

    def _heard(self, worker: "_Worker[Shard, Result]", attempts: Attempts[Shard]) -> Iterator[Result]:
        """What a busy worker has to say: its result, if it is that."""
        try:
            message: _Message = worker.connection.recv()
        except (EOFError, OSError):  # nobody is at the other end
            number, worker.number = cast(int, worker.number), None
            attempts.lose(number, worker.name, worker.ended())
            return
        if message.kind == "log":
            self.log(f"{worker.name}: {message.text}")
        elif message.kind == "error":
            raise RunnerError(message.text) from _InWorker(f"\n{message.value}")
        else:
            worker.number = None
            attempts.finish()
            yield cast(Result, message.value)


class _Message(NamedTuple):
    """What a worker says. value: of a result, the result; of an error, its traceback."""

    kind: Literal["result", "error", "log"]
    text: str = ""
    value: object = None


class _InWorker(Exception):
    """The traceback of an error in another process."""


class _Worker(Generic[Shard, Result]):
    """A process on a device, started when it gets a first shard and anew after it was lost. number: of the shard it has."""

    def __init__(self, name: str, device: str, threads: int, work: Work[Shard, Result]):
        self.name, self.device, self.threads, self.work = name, device, threads, work
        self.number: int | None = None
        self.process: SpawnProcess | None = None

    def give(self, number: int, shard: Shard) -> None:
        if self.process is None or not self.process.is_alive():
            self.connection, theirs = _SPAWN.Pipe()
            self.process = _SPAWN.Process(target=_serve, args=(theirs, self.device, self.threads), daemon=True, name=self.name)
            self.process.start()
            theirs.close()  # or its end would not be noticed here
            self._send(self.work)
        self._send(shard)
        self.number = number

    def _send(self, what: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died; reading from it will say so
            self.connection.send(what)

    def ended(self) -> str:
        """How the process ended."""
        process = cast(SpawnProcess, self.process)
        process.join(_EXIT_SECONDS)
        code = process.exitcode
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def end(self) -> None:
        """An idle process ends by itself once nobody is at the other end; a busy one is killed, and its shard not committed."""
        if self.process is None:
            return
        self.connection.close()
        if self.number is None:
            self.process.join(_EXIT_SECONDS)
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, device: str, threads: int) -> None:
    """A worker's life: take the work, then shard after shard, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.RLock()

    def send(message: _Message) -> None:
        with lock:
            connection.send(message)

    logging.getLogger().addHandler(_ToParent(send))
    with suppress(EOFError):
        run = OpenedWork[Any, Any](connection.recv(), device, threads)
        while True:
            shard = connection.recv()
            try:
                message = _Message("result", value=run(shard))
            except RunnerError as error:
                message = _Message("error", str(error), traceback.format_exc())
            send(message)


def _end_with_parent() -> None:
    """A parent that is killed says nothing, and a shard may take long."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _ToParent(logging.Handler):
    """Hands what is logged in a worker to the parent."""

    def __init__(self, send: Callable[[_Message], None]):
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(_Message("log", record.getMessage()))
