"""A Ray cluster of two nodes on this machine, one core each, that notices within seconds when a node is gone."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

from scopeatlas.runner.cluster import RayRunner

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# A refused connection counts at once; a busy machine is given time to answer.
_QUICKLY = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 20000,
    "health_check_failure_threshold": 3,
}


class TwoNodes:
    """A head, and a second node that can be killed and replaced."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": _QUICKLY}
        )
        self.start_second()

    def start_second(self) -> None:
        self.second = self.cluster.add_node(**NODE)

    def kill_second(self) -> None:
        """As a machine that loses its power: every process of the node at once."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def runner(self, *, workers: int = 2, log=lambda _: None) -> RayRunner:
        return RayRunner(self.cluster.address, workers=workers, threads=1, log=log)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    ray.init(address=nodes.cluster.address, log_to_driver=False)  # once; a runner takes a connection that is there
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()
