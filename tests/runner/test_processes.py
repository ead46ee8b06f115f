import os
import signal
import subprocess
import sys
import time

import pytest

from scopeatlas.errors import ConfigError, RunnerError
from scopeatlas.runner.processes import ProcessRunner
from scopeatlas.runner.work import TRIES
from tests.conftest import REPOSITORY
from tests.runner.works import Noted, Squares, Threads, gone


def test_every_shard_has_its_result_and_each_process_opens_the_work_once(tmp_path):
    work = Noted(Squares(), tmp_path, slow=0.05)
    results = list(ProcessRunner(["cpu", "cpu"]).map(work, range(12)))
    assert sorted(results) == [n**2 for n in range(12)]
    workers = work.workers()
    assert len(workers) == len(set(workers)) == 2 and os.getpid() not in workers
    assert all(len(work.runs(n)) == 1 for n in range(12))


def test_no_more_processes_start_than_there_are_shards(tmp_path):
    work = Noted(Squares(), tmp_path)
    assert list(ProcessRunner(["cpu"] * 3).map(work, [5])) == [25]
    assert len(work.workers()) == 1


@pytest.mark.slow
def test_a_shard_whose_process_is_killed_is_run_by_another_and_nothing_else_is_run_again(tmp_path):
    work, said = Noted(Squares(), tmp_path, deadly={"4": 1}, slow=0.05), []
    results = list(ProcessRunner(["cpu", "cpu"], log=said.append).map(work, range(10)))
    assert sorted(results) == [n**2 for n in range(10)]
    assert {n: len(work.runs(n)) for n in range(10)} == {n: 2 if n == 4 else 1 for n in range(10)}
    assert len(set(work.runs(4))) == 2
    assert len(said) == 1 and "was lost (killed by SIGKILL); shard 4 is tried again" in said[0]


@pytest.mark.slow
def test_a_shard_that_kills_whatever_runs_it_is_given_up_by_name(tmp_path):
    work = Noted(Squares(), tmp_path, deadly={"1": TRIES})
    with pytest.raises(RunnerError, match=f"shard 1 was lost with its worker {TRIES} times, .*killed by SIGKILL"):
        list(ProcessRunner(["cpu"]).map(work, [0, 1]))
    assert len(work.runs(1)) == TRIES


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_names_the_shard_shows_where_and_ends_the_others(tmp_path):
    work = Noted(Squares(), tmp_path, slow=0.1)
    with pytest.raises(RunnerError, match="shard 99: ValueError: 99 is not to be squared") as raised:
        list(ProcessRunner(["cpu", "cpu"]).map(work, [0, 1, 99, *range(2, 99)]))
    assert "works.py" in str(raised.value.__cause__)
    assert len(work.runs(99)) == 1 and all(gone(process) for process in work.workers())


def test_processes_end_with_an_iterator_that_is_dropped(tmp_path):
    work = Noted(Squares(), tmp_path, slow=0.05)
    results = ProcessRunner(["cpu"]).map(work, range(100))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert all(gone(process) for process in work.workers())


def test_what_a_process_logs_is_said_here_with_its_name(tmp_path):
    said: list[str] = []
    list(ProcessRunner(["cpu"], log=said.append).map(Noted(Squares(), tmp_path), [13]))
    assert said == ["process 0 on cpu: thirteen, of all numbers"]


def test_torch_has_the_threads_that_are_asked_for_in_each_process():
    assert list(ProcessRunner(["cpu"], threads=3).map(Threads(), ["x"])) == [("cpu", 3)]


def test_cores_are_divided_among_processes():
    assert ProcessRunner(["cpu"] * 2).threads == max(1, (os.cpu_count() or 1) // 2)
    assert ProcessRunner(["cpu"] * 1000).threads == 1


@pytest.mark.parametrize("devices", [[], ["cpu", "cuda:0"]])
def test_devices_must_be_of_one_kind(devices):
    with pytest.raises(ConfigError, match="name one or more of one kind"):
        ProcessRunner(devices)


def test_memory_is_shared_by_the_processes_on_one_device_and_by_no_others():
    assert ProcessRunner(["cpu"] * 3).sharing == 3
    assert ProcessRunner(["cuda:0", "cuda:1"]).sharing == 1 and ProcessRunner(["cuda:0", "cuda:1"]).device == "cuda"


SCRIPT = """
import sys
from pathlib import Path
from scopeatlas.runner.processes import ProcessRunner
from tests.runner.works import Noted, Squares

if __name__ == "__main__":
    for result in ProcessRunner(["cpu", "cpu"]).map(Noted(Squares(), Path(sys.argv[1]), slow=float(sys.argv[2])), range(50)):
        print(result, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_process_outlives_the_one_that_started_it(tmp_path, ending):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "notes").mkdir()
    work = Noted(Squares(), tmp_path / "notes")
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "notes", "60"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while len(work.workers()) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    os.killpg(parent.pid, ending) if ending == signal.SIGINT else parent.kill()  # Ctrl-C reaches the whole group
    assert parent.wait(20) == -ending
    assert all(gone(process) for process in work.workers())
    assert parent.stderr is not None and b"Process Spawn" not in parent.stderr.read()
