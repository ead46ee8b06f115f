import pytest
import torch

from scopeatlas.errors import RunnerError
from scopeatlas.runner.local import LocalRunner
from tests.runner.works import Noted, Squares, Threads


def test_shards_run_one_after_the_other_in_this_process(tmp_path):
    work = Noted(Squares(), tmp_path)
    assert list(LocalRunner().map(work, [3, 1, 2])) == [9, 1, 4]
    assert len(work.workers()) == 1


def test_nothing_is_opened_for_no_shards_and_nothing_is_done_before_it_is_asked_for(tmp_path):
    work = Noted(Squares(), tmp_path)
    assert list(LocalRunner().map(work, [])) == []
    results = LocalRunner().map(work, [1, 2])
    assert not work.workers()
    assert next(results) == 1 and not work.runs(2)


def test_what_goes_wrong_names_the_shard_and_keeps_its_cause():
    results = LocalRunner().map(Squares(), [1, 99])
    assert next(results) == 1
    with pytest.raises(RunnerError, match="shard 99: ValueError: 99 is not to be squared") as raised:
        next(results)
    assert isinstance(raised.value.__cause__, ValueError)


def test_threads_are_set_if_they_are_given():
    before = torch.get_num_threads()
    try:
        assert list(LocalRunner(threads=before + 1).map(Threads(), ["x"])) == [(None, before + 1)]
        torch.set_num_threads(before)
        assert list(LocalRunner().map(Threads(), ["x"])) == [(None, before)]
    finally:
        torch.set_num_threads(before)
