import pytest
import torch

from resources.runner import ShardRunnerResource
from scopeatlas.errors import ConfigError
from scopeatlas.runner.cluster import RayRunner
from scopeatlas.runner.local import LocalRunner
from scopeatlas.runner.processes import ProcessRunner


def test_the_default_is_this_process_as_it_is():
    threads = torch.get_num_threads()
    runner = ShardRunnerResource().open()
    assert isinstance(runner, LocalRunner) and runner.device is None
    assert torch.get_num_threads() == threads


def test_a_pool_has_a_process_for_each_device():
    runner = ShardRunnerResource(kind="processes", devices=["cuda:0", "cuda:1"], threads=4).open()
    assert isinstance(runner, ProcessRunner) and runner.devices == ["cuda:0", "cuda:1"] and runner.threads == 4


def test_ray_is_given_what_each_worker_needs():
    runner = ShardRunnerResource(kind="ray", address="head:6379", workers=3, gpus_per_worker=0.5, cpus_per_worker=4).open()
    assert isinstance(runner, RayRunner)
    assert (runner.address, runner.workers, runner.gpus, runner.cpus, runner.threads) == ("head:6379", 3, 0.5, 4, 4)
    assert runner.device == "cuda" and runner.sharing == 2


def test_a_pool_without_devices_and_devices_without_a_pool_are_refused():
    with pytest.raises(ConfigError, match="runner.devices is .*name one or more"):
        ShardRunnerResource(kind="processes").open()
    with pytest.raises(ConfigError, match="runner.devices are for runner.kind processes, and it is local"):
        ShardRunnerResource(devices=["cuda:1"]).open()
