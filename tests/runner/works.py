"""Work for the tests of runners: it can be pickled, and leaves in a folder who did what, how often."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from scopeatlas.runner.work import ShardRunner, Work


class Squares:
    """Squares numbers; 99 raises, and 13 is remarked upon."""

    def open(self, device: str | None) -> Callable[[int], int]:
        def square(number: int) -> int:
            if number == 99:
                raise ValueError("99 is not to be squared")
            if number == 13:
                logging.getLogger("works").warning("thirteen, of all numbers")
            return number**2

        return square


class Threads:
    """Says on which device it is done and with how many torch threads."""

    def open(self, device: str | None) -> Callable[[str], tuple[str | None, int]]:
        import torch

        return lambda _: (device, torch.get_num_threads())


class Notes:
    """What was noted in a folder."""

    folder: Path

    def runs(self, shard: object) -> list[int]:
        """The processes that began a shard, once for each time."""
        return self._processes(f"shard.{shard}.*")

    def workers(self) -> list[int]:
        """The processes that opened the work, once for each time."""
        return self._processes("open.*")

    def _processes(self, pattern: str) -> list[int]:
        return [int(path.name.split(".")[2]) for path in self.folder.glob(pattern)]


@dataclass(frozen=True)
class Noted(Notes):
    """Any work, with a note in `folder` of each opening and each shard that is begun, and by which process.

    deadly: shards that kill their worker, the first so often, by name. when: before the shard is run or after. slow: seconds
    that each takes beside its own. held: shards that begin only once so many workers have opened the work.
    """

    work: Work[Any, Any]
    folder: Path
    deadly: Mapping[str, int] = field(default_factory=dict)
    when: Literal["before", "after"] = "before"
    slow: float = 0.0
    held: Mapping[str, int] = field(default_factory=dict)

    def open(self, device: str | None) -> Callable[[Any], Any]:
        self._note("open", "")
        run = self.work.open(device)

        def noted(shard: Any) -> Any:
            self._note("shard", str(shard))
            while len(self.workers()) < self.held.get(str(shard), 0):
                time.sleep(0.05)
            dies = len(self.runs(shard)) <= self.deadly.get(str(shard), 0)
            if dies and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = run(shard)
            time.sleep(self.slow)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return noted

    def _note(self, what: str, shard: str) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{what}.{shard}.{os.getpid()}.{uuid4().hex[:8]}").touch()


@dataclass(frozen=True)
class Noting(Notes):
    """A runner whose work is noted; the arguments are those of `Noted`."""

    runner: ShardRunner
    folder: Path
    deadly: Mapping[str, int] = field(default_factory=dict)
    when: Literal["before", "after"] = "before"
    slow: float = 0.0

    @property
    def device(self) -> str | None:
        return self.runner.device

    @property
    def sharing(self) -> int:
        return self.runner.sharing

    def map(self, work: Work[Any, Any], shards: Sequence[Any]) -> Iterator[Any]:
        return self.runner.map(Noted(work, self.folder, self.deadly, self.when, self.slow), shards)


def gone(process: int) -> bool:
    """Whether a process ends within seconds; one that nobody has waited for has ended."""
    status = Path(f"/proc/{process}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text(encoding="utf-8"):
            return True
        time.sleep(0.1)
    return False
