"""What a runner is given and what it promises: work that a worker opens once and then does shard by shard.

What belongs here: the protocols, a worker's side of them, and which shards are still to be handed out. What does not: where
workers are (`local.py`, `processes.py`, `cluster.py`), or what is done to a shard.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from scopeatlas.errors import RunnerError, said

Shard = TypeVar("Shard")
Result = TypeVar("Result")
ShardIn = TypeVar("ShardIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

TRIES = 3
"""A shard that was lost so often with its worker is what kills them, and is not tried again."""


class Work(Protocol[ShardIn, ResultOut]):
    """A description of what is done to each shard, which may be pickled; so may shards (named by `str`) and results."""

    def open(self, device: str | None) -> Callable[[ShardIn], ResultOut]:
        """Load, once on each worker, what the work needs. device: the worker's; None in this process, where the work says."""
        ...


class ShardRunner(Protocol):
    """Does work on every shard, wherever its workers are.

    device: where workers work, such as cpu or cuda; None in this process, where the work itself says. sharing: workers that
    share the memory which one of them sees; 0 in this process.
    """

    @property
    def device(self) -> str | None: ...

    @property
    def sharing(self) -> int: ...

    def map(self, work: Work[Shard, Result], shards: Sequence[Shard]) -> Iterator[Result]:
        """The result of each shard as it comes, in no order. A shard whose worker is lost is tried again, TRIES times in all.

        Raises RunnerError naming the shard if its work fails or it is lost too often; workers end with the iterator.
        """
        ...


class OpenedWork(Generic[Shard, Result]):
    """A worker's side: opens its work when it gets a first shard, and says which shard an error is about."""

    def __init__(self, work: Work[Shard, Result], device: str | None, threads: int | None):
        self.work, self.device, self.threads = work, device, threads
        self._run: Callable[[Shard], Result] | None = None

    def __call__(self, shard: Shard) -> Result:
        """Raises RunnerError for whatever goes wrong."""
        try:
            if self._run is None:
                self._set_up_torch()
                self._run = self.work.open(self.device)
            return self._run(shard)
        except Exception as error:
            raise RunnerError(f"shard {shard}: {said(error)}") from error

    def _set_up_torch(self) -> None:
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)  # their number decides the last bits of a product
        if self.device is not None and self.device.startswith("cuda"):
            import torch

            if torch.device(self.device).index is not None:  # else it is the current one, the only one that Ray shows a worker
                torch.cuda.set_device(self.device)  # kernels go to the current device, wherever their tensors lie


class Attempts(Generic[Shard]):
    """Which shards are still to be handed out, and where each has been lost with its worker."""

    def __init__(self, shards: Sequence[Shard], log: Callable[[str], None]):
        self.shards, self.log = shards, log
        self.unfinished = len(shards)
        self._waiting = list(range(len(shards)))
        self._lost: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def take(self, place: str, places: Collection[str]) -> int | None:
        """The number of the next shard for a worker at `place`; None if there is none for it.

        places: all that have a worker. A shard that was lost at one is left to another where it has been lost less often.
        """
        for number in self._waiting:
            lost = self._lost[number]
            if lost[place] <= min(lost[other] for other in places):
                self._waiting.remove(number)
                return number
        return None

    def finish(self) -> None:
        """One shard has its result."""
        self.unfinished -= 1

    def lose(self, number: int, place: str, how: str) -> None:
        """The worker that had the shard is gone. Raises RunnerError if that has happened TRIES times."""
        lost = self._lost[number]
        lost[place] += 1
        if lost.total() == TRIES:
            raise RunnerError(
                f"shard {self.shards[number]} was lost with its worker {TRIES} times, at last on {place}: {how}; see what the "
                "worker printed, and if memory ran out use fewer workers, smaller shards (corpus.shard_bits) or subject.memory_gb"
            )
        self.log(f"{place}: the worker was lost ({how}); shard {self.shards[number]} is tried again")
        self._waiting.insert(0, number)
