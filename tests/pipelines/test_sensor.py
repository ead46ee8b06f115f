"""The sensor on release folders and the nightly retry."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from assets.partitions import SAES_NAME
from pipelines.schedules import retry_incomplete
from pipelines.sensors import new_saes
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from scopeatlas.storage.store import Store


@pytest.fixture
def watched(tmp_path: Path, small_releases: Path) -> Path:
    folder = tmp_path / "releases"
    shutil.copytree(small_releases, folder)
    return folder


def tick(instance: dg.DagsterInstance, watched: Path, store: Path, cursor: str | None = None):
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    result = new_saes(context, saes=SaeSourceResource(folders=[str(watched)]), store=StoreResource(root=str(store)))
    return result, result.cursor


def test_the_first_look_only_remembers_what_is_there(instance, watched, tmp_path):
    result, cursor = tick(instance, watched, tmp_path / "store")
    assert result.skip_reason and not result.run_requests
    assert len(json.loads(cursor)) == len(list(watched.rglob("params.safetensors")))


def test_an_sae_unchanged_over_two_looks_becomes_a_partition_a_run_and_a_registered_sae(instance, watched, tmp_path):
    _, cursor = tick(instance, watched, tmp_path / "store")
    result, _ = tick(instance, watched, tmp_path / "store", cursor)
    keys = {request.partition_key for request in result.run_requests}
    assert keys == set(result.dynamic_partitions_requests[0].partition_keys) == set(Store(tmp_path / "store").registered())


def test_a_copy_still_under_way_is_not_seen(instance, watched, tmp_path):
    weights = sorted(watched.rglob("params.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    _, cursor = tick(instance, watched, tmp_path / "store")
    assert not any(weights.parent.name in key for key in json.loads(cursor))


def test_a_known_sae_is_not_run_again(instance, watched, tmp_path):
    _, cursor = tick(instance, watched, tmp_path / "store")
    instance.add_dynamic_partitions(SAES_NAME, json.loads(cursor))
    result, _ = tick(instance, watched, tmp_path / "store", cursor)
    assert result.skip_reason and not result.run_requests


def test_an_sae_that_changes_between_looks_waits(instance, watched, tmp_path):
    _, cursor = tick(instance, watched, tmp_path / "store")
    for config in watched.rglob("config.json"):
        config.write_text(config.read_text() + "\n")
    result, _ = tick(instance, watched, tmp_path / "store", cursor)
    assert result.skip_reason and not result.run_requests


def test_the_nightly_schedule_retries_what_is_not_published(instance, watched, tmp_path):
    _, cursor = tick(instance, watched, tmp_path / "store")
    tick(instance, watched, tmp_path / "store", cursor)
    keys = json.loads(cursor)
    instance.add_dynamic_partitions(SAES_NAME, keys)
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=datetime(2026, 11, 21, 2, tzinfo=UTC))
    requests = retry_incomplete(context, store=StoreResource(root=str(tmp_path / "store")))
    assert {request.partition_key for request in requests} == set(keys)
