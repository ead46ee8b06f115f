"""Workers on a Ray cluster: actors that hold what the work needs, each doing one shard at a time, wherever there is room.

What belongs here: hiring actors, and noticing that one is gone. What does not: which shards are tried again (`work.py`), or how
a cluster is started (docs/deploy.md).
"""

import importlib.util
import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic

from scopeatlas.errors import ConfigError, RunnerError, said
from scopeatlas.runner.local import Log, silent
from scopeatlas.runner.work import TRIES, Attempts, OpenedWork, Result, Shard, Work

WAIT_SECONDS = 600.0
"""How long to wait for a first worker, or for another once all are lost, before giving up: a node may be on its way."""
_LOOK_SECONDS = 10.0


class RayRunner:
    """Runs shards on `workers` Ray actors, of `cpus` cores and `gpus` GPUs each.

    address: of the cluster's head (host:port), "auto" for the one that this machine belongs to, "local" to start one here; a
    connection that this process has already is used as it is. threads: torch's, in each worker; None takes `cpus`. Actors
    start as the cluster has room: one that is lost with its node is replaced when another node is free or the node is back,
    and its shard goes to a worker elsewhere meanwhile. Each has one shard at a time; nothing is queued behind it. Raises
    ConfigError if Ray is not installed.
    """

    def __init__(
        self,
        address: str = "auto",
        *,
        workers: int,
        gpus: float = 0,
        cpus: int = 1,
        threads: int | None = None,
        log: Log = silent,
    ):
        if importlib.util.find_spec("ray") is None:
            raise ConfigError('runner.kind is ray, which is not installed: pip install "scope-atlas[ray]"')
        self.address, self.workers, self.gpus, self.cpus, self.log = address, workers, gpus, cpus, log
        self.threads = threads or cpus
        self.device = "cuda" if gpus else "cpu"
        # Which nodes the actors will share is not known beforehand: of main memory, the worst is assumed.
        self.sharing = max(1, int(1 / gpus)) if gpus else workers

    def map(self, work: Work[Shard, Result], shards: Sequence[Shard]) -> Iterator[Result]:
        """The result of each shard as it comes. Raises RunnerError naming the shard if its work fails or it is lost too often."""
        with _connected(self.address):
            team = _Team(self, work, Attempts(shards, self.log))
            try:
                while team.attempts.unfinished:
                    team.hire()
                    team.hand_out()
                    yield from team.listen()
            finally:
                team.dismiss()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Be connected to a cluster; a connection made here ends here."""
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if host := re.fullmatch(r"([^:/]+):(\d+)", address):
            socket.create_connection((host[1], int(host[2])), timeout=_LOOK_SECONDS).close()  # Ray would try for minutes
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except Exception as error:  # of many types, among them Ray's own
        raise RunnerError(
            f"cannot join the Ray cluster at {address}: {said(error)}; check runner.address, that a node runs here (ray start), "
            "and that RAY_AUTH_TOKEN is the cluster's"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Actor(Generic[Shard, Result]):
    """What lives on a worker. It loads nothing before its first shard, so that what goes wrong there is about a shard."""

    def __init__(self, work: Work[Shard, Result], device: str, threads: int):
        self._run = OpenedWork(work, device, threads)

    def node(self) -> str:
        import ray

        return f"node {ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"

    def run(self, shard: Shard) -> Result:
        return self._run(shard)


@dataclass
class _Member:
    """An actor. node: where it is, once it is anywhere. number: of the shard it has."""

    actor: Any
    node: str = ""
    number: int | None = None


class _Team(Generic[Shard, Result]):
    """The actors of one map. waiting: for each answer that is due, the member that owes it."""

    def __init__(self, runner: RayRunner, work: Work[Shard, Result], attempts: Attempts[Shard]):
        import ray

        self.runner, self.ray, self.work, self.attempts = runner, ray, work, attempts
        self.kind = ray.remote(num_cpus=runner.cpus, num_gpus=runner.gpus)(_Actor)
        self.members: list[_Member] = []
        self.waiting: dict[Any, _Member] = {}
        self.stillborn = 0  # actors in a row that were lost before they were anywhere
        self.alive_at = time.monotonic()

    def hire(self) -> None:
        """Ask for as many actors as there is work for."""
        while len(self.members) < min(self.runner.workers, self.attempts.unfinished):
            member = _Member(self.kind.remote(self.work, self.runner.device, self.runner.threads))
            self.members.append(member)
            self.waiting[member.actor.node.remote()] = member

    def hand_out(self) -> None:
        """Give a shard to every member that is somewhere and has none."""
        nodes = {member.node for member in self.members if member.node}
        for member in self.members:
            if member.node and member.number is None:
                number = self.attempts.take(member.node, nodes)
                if number is not None:
                    member.number = number
                    self.waiting[member.actor.run.remote(self.attempts.shards[number])] = member

    def listen(self) -> Iterator[Result]:
        """Wait until something is heard; the results among it."""
        heard, _ = self.ray.wait(list(self.waiting), num_returns=1, timeout=_LOOK_SECONDS)
        if any(member.node for member in self.members):
            self.alive_at = time.monotonic()
        elif time.monotonic() - self.alive_at > WAIT_SECONDS:
            raise RunnerError(
                f"no Ray worker could start in {WAIT_SECONDS:.0f} s: each asks for {self.runner.cpus} CPUs and {self.runner.gpus} "
                f"GPUs, and the cluster has {self.ray.cluster_resources()}; start nodes or ask for less (section runner)"
            )
        for reference in heard:
            member = self.waiting.pop(reference)
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raise RunnerError(str(error.cause)) from error
            except self.ray.exceptions.RayError as error:
                self._lose(member, said(error))
                continue
            if member.number is None:
                member.node, self.stillborn = answer, 0
                continue
            member.number = None
            self.attempts.finish()
            yield answer

    def _lose(self, member: _Member, how: str) -> None:
        self.members.remove(member)
        self.ray.kill(member.actor)  # it may only be out of reach
        if member.number is not None:
            self.attempts.lose(member.number, member.node, how)
            return
        self.stillborn += 1
        if self.stillborn == TRIES * self.runner.workers:
            raise RunnerError(
                f"Ray workers end before they have begun: {how}; is scope-atlas on every node, and RAY_AUTH_TOKEN the same?"
            )

    def dismiss(self) -> None:
        for member in self.members:
            self.ray.kill(member.actor)
