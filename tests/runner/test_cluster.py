import importlib.util
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import torch

from scopeatlas.errors import ConfigError, RunnerError
from scopeatlas.runner.cluster import RayRunner
from scopeatlas.runner.local import LocalRunner
from scopeatlas.runner.work import TRIES
from tests.runner.ray_nodes import TwoNodes, two_nodes
from tests.runner.tiny_cache import tiny_cache
from tests.runner.works import Noted, Noting, Squares

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as started:
        yield started


def test_every_shard_has_its_result_from_as_many_actors_as_there_is_room_for(nodes, tmp_path):
    work = Noted(Squares(), tmp_path, held={str(n): 2 for n in range(16)})
    assert sorted(nodes.runner(workers=5).map(work, range(16))) == [n**2 for n in range(16)]
    workers = work.workers()
    assert len(workers) == len(set(workers)) == 2 and os.getpid() not in workers
    assert all(len(work.runs(n)) == 1 for n in range(16))


def test_what_goes_wrong_in_an_actor_names_the_shard(nodes):
    with pytest.raises(RunnerError, match="^shard 99: ValueError: 99 is not to be squared$"):
        list(nodes.runner().map(Squares(), [1, 99, 2]))


def test_a_shard_that_kills_whatever_runs_it_is_given_up_by_name(nodes, tmp_path):
    work = Noted(Squares(), tmp_path, deadly={"1": TRIES})
    with pytest.raises(RunnerError, match=f"shard 1 was lost with its worker {TRIES} times"):
        list(nodes.runner(workers=1).map(work, [0, 1]))
    assert len(work.runs(1)) == TRIES


def test_a_cache_that_loses_a_node_half_way_is_byte_for_byte_the_local_one_and_only_what_was_lost_is_done_twice(
    nodes, tmp_path_factory
):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed: {seed}")
    root = tmp_path_factory.mktemp("tiny")
    local = tiny_cache(root, np.random.default_rng(seed))
    threads = torch.get_num_threads()
    local.run(LocalRunner(threads=1))
    torch.set_num_threads(threads)

    elsewhere, said = local.at(root / "elsewhere"), []
    noting = Noting(nodes.runner(log=said.append), root / "notes", slow=0.5)
    shards = [shard.name for shard in local.corpus.shards]
    half_way: dict[str, int] = {}

    ended = threading.Event()

    def kill_half_way() -> None:
        while len(elsewhere.committed()) < len(shards):  # of two SAEs
            assert not ended.wait(0.02), "the run ended before it was half way"
        half_way.update(elsewhere.committed())
        nodes.kill_second()

    with ThreadPoolExecutor(1) as other:
        killed = other.submit(kill_half_way)
        try:
            result = elsewhere.run(noting, memory_bytes=10**9)
        finally:
            ended.set()
        killed.result()
    nodes.start_second()

    assert elsewhere.data() == local.data() and not result.failed
    assert result.shards_done == 2 * len(shards) == result.nulls_done
    again = [shard for shard in shards if len(noting.runs(shard)) > 1]
    lost = [line for line in said if "is tried again" in line]
    assert len(again) <= len(lost) <= 1 and all(f"shard {shard} is" in lost[0] for shard in again)
    assert half_way.items() <= elsewhere.committed().items(), "what was committed was committed again"
    assert len(set(noting.workers())) >= 2


def test_a_node_that_comes_back_works_again(nodes, tmp_path):
    work = Noted(Squares(), tmp_path, held={str(n): 2 for n in range(20)} | {str(n): 3 for n in range(20, 40)})
    running = nodes.runner().map(work, range(40))
    results = [next(running) for _ in range(6)]
    nodes.kill_second()
    results += [next(running) for _ in range(6)]
    nodes.start_second()
    results += running
    assert sorted(results) == [n**2 for n in range(40)]
    assert len(set(work.workers())) == 3


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(
        RunnerError, match="cannot join the Ray cluster at 127.0.0.1:1: ConnectionRefusedError: .*check runner.address"
    ):
        list(RayRunner("127.0.0.1:1", workers=1).map(Squares(), [1]))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "scope-atlas\[ray\]"'):
        RayRunner(workers=1)
