"""The shard runner: where shards are encoded. What does not belong here: running them (scopeatlas/runner)."""

from typing import Literal

import dagster as dg
from pydantic import Field

from scopeatlas.errors import ConfigError
from scopeatlas.runner.cluster import RayRunner
from scopeatlas.runner.local import LocalRunner, Log, silent
from scopeatlas.runner.processes import ProcessRunner
from scopeatlas.runner.work import ShardRunner


class ShardRunnerResource(dg.ConfigurableResource):
    """Where the subject model runs over the corpus: in the run's own process, on a pool of processes, or on a Ray cluster."""

    kind: Literal["local", "processes", "ray"] = Field(
        default="local", description="local: this process. processes: one for each of `devices`. ray: actors on a cluster."
    )
    devices: list[str] = Field(
        default=[], description="For processes: one device each, all of one kind: [cuda:0, cuda:1], or [cpu, cpu] for two."
    )
    address: str = Field(
        default="auto",
        description="For ray: host:port of the head, auto (the cluster of this machine) or local (start one here).",
    )
    workers: int = Field(default=1, ge=1, description="For ray: actors at most, as the cluster has room.")
    gpus_per_worker: float = Field(default=0, ge=0, description="For ray: GPUs of each actor; a half lets two share one.")
    cpus_per_worker: int = Field(default=1, ge=1, description="For ray: CPU cores of each actor.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="Torch threads of each worker; they decide the last bits on a CPU. Empty: local leaves torch's own, processes "
        "divide the cores, ray takes cpus_per_worker.",
    )

    def open(self, *, log: Log = silent) -> ShardRunner:
        """Raises ConfigError if the settings do not go together, or Ray is wanted and not installed."""
        if self.devices and self.kind != "processes":
            raise ConfigError(
                f"runner.devices are for runner.kind processes, and it is {self.kind}; for one device, set subject.device"
            )
        if self.kind == "processes":
            return ProcessRunner(self.devices, threads=self.threads, log=log)
        if self.kind == "ray":
            return RayRunner(
                self.address,
                workers=self.workers,
                gpus=self.gpus_per_worker,
                cpus=self.cpus_per_worker,
                threads=self.threads,
                log=log,
            )
        return LocalRunner(threads=self.threads)
