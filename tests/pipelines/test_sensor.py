"""The release sensor, the runs it asks for, and the nightly retry."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from assets.partitions import SAES_NAME
from pipelines import schedules
from pipelines.definitions import build_defs
from pipelines.runs import RANGE_END, RANGE_START, busy_keys, chunk_requests, keys_of, stretches
from pipelines.schedules import retry_incomplete
from pipelines.sensors import new_saes
from resources.sae import SaeSourceResource, Watch
from resources.store import StoreResource
from scopeatlas.storage.store import Store
from tests.hub_server import HubServer
from tests.pipelines.conftest import small_resources


@pytest.fixture
def watched(tmp_path: Path, small_releases: Path) -> Path:
    folder = tmp_path / "releases"
    shutil.copytree(small_releases, folder)
    return folder


def tick(instance: dg.DagsterInstance, watched: Path, store: Path, **source: object) -> dg.SensorResult:
    saes = SaeSourceResource(**{"folders": [str(watched)], **source})
    subject = small_resources(store, watched)["subject"]
    context = dg.build_sensor_context(instance=instance)
    return new_saes(context, saes=saes, subject=subject, store=StoreResource(root=str(store)))  # type: ignore[return-value]


def add_partitions(instance: dg.DagsterInstance, result: dg.SensorResult) -> list[str]:
    """What the daemon does with a tick's result before it launches the runs."""
    keys = [key for request in result.dynamic_partitions_requests for key in request.partition_keys]
    instance.add_dynamic_partitions(SAES_NAME, keys)
    return keys


def test_the_first_look_only_remembers_what_is_there(instance, watched, tmp_path):
    result = tick(instance, watched, tmp_path / "store")
    assert "2 settling" in result.skip_reason.skip_message and not result.run_requests
    assert Store(tmp_path / "store").registered() == []


def test_saes_unchanged_over_two_looks_become_partitions_and_one_run_over_all_of_them(instance, watched, tmp_path):
    tick(instance, watched, tmp_path / "store")
    result = tick(instance, watched, tmp_path / "store")
    keys = add_partitions(instance, result)
    (request,) = result.run_requests
    assert keys == Store(tmp_path / "store").registered() and len(keys) == 2
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == (keys[0], keys[-1])


def test_a_tick_asks_for_no_more_runs_and_no_larger_ones_than_configured(instance, watched, tmp_path):
    limits = {"per_run": 1, "runs_per_tick": 1}
    tick(instance, watched, tmp_path / "store", **limits)
    asked = []
    for _ in range(3):
        result = tick(instance, watched, tmp_path / "store", **limits)
        asked.append([request.partition_key for request in result.run_requests or []])
        for key in add_partitions(instance, result) if result.run_requests else ():
            Store(tmp_path / "store").record_error(key, "activation_cache", "tried")
    assert [len(keys) for keys in asked] == [1, 1, 0] and asked[0] != asked[1]


def test_a_tick_that_died_after_registering_is_made_good_by_the_next(instance, watched, tmp_path):
    tick(instance, watched, tmp_path / "store")
    tick(instance, watched, tmp_path / "store")  # its result is never seen
    assert len(tick(instance, watched, tmp_path / "store").run_requests) == 1


def test_a_copy_still_under_way_is_not_seen(instance, watched, tmp_path):
    weights = sorted(watched.rglob("params.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "1 settling" in tick(instance, watched, tmp_path / "store").skip_reason.skip_message


def test_a_known_sae_is_not_run_again(instance, watched, tmp_path):
    tick(instance, watched, tmp_path / "store")
    for key in add_partitions(instance, tick(instance, watched, tmp_path / "store")):
        Store(tmp_path / "store").record_error(key, "activation_cache", "tried")
    result = tick(instance, watched, tmp_path / "store")
    assert result.skip_reason and not result.run_requests


def test_a_repo_on_the_hub_is_watched_too_and_what_cannot_be_reached_is_said(instance, watched, tmp_path, monkeypatch):
    source = {"folders": [], "watch": [Watch(author="google", name="gemma-scope-2-*")], "cache": str(tmp_path / "cache")}
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        release = watched / "cut"
        hub.commit("google/gemma-scope-2-270m-pt", {p.relative_to(release).as_posix(): p for p in release.rglob("*.*")})
        tick(instance, watched, tmp_path / "store", **source)
        result = tick(instance, watched, tmp_path / "store", **source)
        keys = add_partitions(instance, result)
        assert len(keys) == 2 and len(result.run_requests) == 1
    for key in keys:
        Store(tmp_path / "store").record_error(key, "activation_cache", "tried")
    assert "cannot be reached" in tick(instance, watched, tmp_path / "store", **source).skip_reason.skip_message


def test_the_nightly_schedule_retries_what_is_not_published_in_shared_runs(instance, watched, tmp_path):
    tick(instance, watched, tmp_path / "store")
    keys = add_partitions(instance, tick(instance, watched, tmp_path / "store"))
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=datetime(2026, 11, 21, 2, tzinfo=UTC))
    saes = SaeSourceResource(folders=[str(watched)])
    (request,) = retry_incomplete(context, store=StoreResource(root=str(tmp_path / "store")), saes=saes)
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == (keys[0], keys[-1])
    assert request.run_key.startswith("2026-11-21:")


def test_a_partition_whose_run_was_never_asked_for_is_asked_for_again(instance, watched, tmp_path):
    """As when the daemon dies between making the partitions and launching the run."""
    tick(instance, watched, tmp_path / "store")
    first = tick(instance, watched, tmp_path / "store")
    add_partitions(instance, first)
    again = tick(instance, watched, tmp_path / "store")
    assert [r.run_key for r in again.run_requests] == [r.run_key for r in first.run_requests]
    assert not again.dynamic_partitions_requests


def test_what_is_in_a_run_or_was_tried_is_not_asked_for_again(instance, watched, tmp_path):
    tick(instance, watched, tmp_path / "store")
    keys = add_partitions(instance, tick(instance, watched, tmp_path / "store"))
    run = instance.create_run_for_job(
        build_defs().resolve_job_def("index_release"), tags={RANGE_START: keys[0], RANGE_END: keys[1]}
    )
    instance.report_run_canceling(run)
    assert busy_keys(instance, keys) == set(keys)
    assert not tick(instance, watched, tmp_path / "store").run_requests
    instance.report_run_canceled(run)
    for key in keys:
        Store(tmp_path / "store").record_error(key, "activation_cache", "tried")
    assert not tick(instance, watched, tmp_path / "store").run_requests


def test_a_stretch_of_neighbouring_keys_is_one_run_of_bounded_length():
    assert stretches(["a", "b", "d"], ["a", "b", "c", "d"]) == [["a", "b"], ["d"]]
    assert stretches(["c", "a"], ["a", "b", "c"]) == [["a"], ["c"]]
    assert stretches(list("abcde"), list("abcde"), longest=2) == [["a", "b"], ["c", "d"], ["e"]]


def test_requests_for_the_same_keys_have_the_same_run_key_unless_the_occasion_differs():
    keys = ["a", "b", "c"]
    one, again = (chunk_requests(keys, keys, per_run=2) for _ in range(2))
    assert [r.run_key for r in one] == [r.run_key for r in again] and len({r.run_key for r in one}) == 2
    assert [keys_of(r, keys) for r in one] == [["a", "b"], ["c"]]
    assert (
        chunk_requests(["a"], keys, per_run=2, occasion="monday:")[0].run_key != chunk_requests(["a"], keys, per_run=2)[0].run_key
    )


def test_the_nightly_schedule_gives_every_sae_its_turn(instance, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(schedules, "MAX_RETRIED", 1)
    tick(instance, watched, tmp_path / "store")
    keys = add_partitions(instance, tick(instance, watched, tmp_path / "store"))
    saes, store = SaeSourceResource(folders=[str(watched)]), StoreResource(root=str(tmp_path / "store"))
    nights = [
        retry_incomplete(
            dg.build_schedule_context(instance=instance, scheduled_execution_time=datetime(2026, 11, day, 2, tzinfo=UTC)),
            store=store,
            saes=saes,
        )
        for day in (21, 22)
    ]
    assert {request.partition_key for requests in nights for request in requests} == set(keys)
