"""Running shards one after the other in this process, reporting rate and time left.

What belongs here: how shards are run. What does not: what is done to a shard, or which shards are pending.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from scopeatlas.runner.work import OpenedWork, Result, Shard, Work

Log = Callable[[str], None]

REPORT_EVERY_SECONDS = 10.0


def silent(_: str) -> None:
    """A log that says nothing."""


class Progress:
    """Logs done, rate and ETA every ten seconds and at the end."""

    def __init__(self, what: str, total: int, unit: str, log: Log):
        self.what, self.total, self.unit, self.log = what, total, unit, log
        self.done = 0
        self.started = self.reported = time.monotonic()

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if self.done < self.total and now - self.reported >= REPORT_EVERY_SECONDS:
            self.reported = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            self.log(f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {self.rate:,.0f} {self.unit}/s, {left:.0f} s left")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        return self.done / max(self.seconds, 1e-9)

    def finish(self) -> None:
        self.log(f"{self.what}: {self.done:,} {self.unit} in {self.seconds:.1f} s ({self.rate:,.0f} {self.unit}/s)")


class LocalRunner:
    """Runs each shard in this process, in order: the torch threads are the parallelism.

    threads: torch's, from now on; None leaves them as they are.
    """

    device: str | None = None
    sharing = 0

    def __init__(self, *, threads: int | None = None):
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def map(self, work: Work[Shard, Result], shards: Sequence[Shard]) -> Iterator[Result]:
        """The result of each shard, in order. Raises RunnerError naming the shard if its work fails."""
        return map(OpenedWork(work, None, None), shards)
