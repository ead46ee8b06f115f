"""The whole chain through Dagster, on real Gemma 3 270M and real text."""

import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from pipelines.bootstrap import POOLS, PROCESS_LOCK, alive, materialise, register, release_dead_runs
from pipelines.definitions import build_defs
from scopeatlas import open_atlas
from scopeatlas.atlas.tables import FEATURES, open_table
from scopeatlas.storage.store import Store
from scopeatlas.upkeep import prune, status
from tests.pipelines.conftest import World, small_resources

PARTITIONED = ("activation_cache", "feature_examples", "feature_labels", "label_scores", "feature_index")


def materialisations(world: World, asset: str, key: str) -> list[dict]:
    records = world.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key]), limit=50
    ).records
    return [record.asset_materialization.metadata for record in records]


def table(root: Path) -> pl.DataFrame:
    return pl.from_arrow(open_table(root, FEATURES).to_arrow()).sort("key")  # type: ignore[union-attr]


def test_every_partition_of_every_asset_is_materialised(finished: World):
    for asset in PARTITIONED:
        assert finished.instance.get_materialized_partitions(dg.AssetKey(asset)) == set(finished.keys)


def test_each_partition_carries_its_own_numbers(finished: World):
    fvus = {materialisations(finished, "activation_cache", key)[0]["fvu"].value for key in finished.keys}
    assert len(fvus) == len(finished.keys)


def test_each_stage_charts_its_numbers_and_shows_examples(finished: World):
    key = finished.keys[0]
    assert {"tokens_per_second", "l0", "fvu", "dead_share"} <= materialisations(finished, "activation_cache", key)[0].keys()
    assert {"coverage", "status_ok", "refusals", "prompt_tokens"} <= materialisations(finished, "feature_labels", key)[0].keys()
    scores = materialisations(finished, "label_scores", key)[0]
    for control in ("shuffled", "constant", "trigger_tokens"):
        assert {f"rule_execution_{name}_{control}" for name in ("balanced_accuracy", "f1")} <= scores.keys()
    assert "data:image/png;base64" in scores["distribution"].value and "hit:" in scores["preview"].value
    assert "data:image/png;base64" in materialisations(finished, "feature_examples", key)[0]["densities"].value
    assert "F1" in materialisations(finished, "feature_index", key)[0]["preview"].value


def test_labels_pass_their_blocking_checks(finished: World):
    for name in ("no_leak", "answers_valid", "within_budget"):
        record = finished.instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [dg.AssetCheckKey(dg.AssetKey("feature_labels"), name)]
        )
        (found,) = record.values()
        evaluation = found.event.dagster_event.asset_check_evaluation_data  # type: ignore[union-attr]
        assert evaluation.passed and evaluation.blocking


def test_pool_limits_are_set(finished: World):
    for pool, limit in POOLS.items():
        assert finished.instance.event_log_storage.get_concurrency_info(pool).slot_count == limit


def test_the_atlas_holds_every_feature_once_and_answers(finished: World):
    rows = table(finished.store_root)
    assert rows["key"].n_unique() == len(rows)
    assert set(rows["sae"]) == set(finished.keys)
    scores = [hit.score or 0.0 for hit in open_atlas(str(finished.store_root)).search("the", k=3).nearest]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_a_small_atlas_has_no_vector_index_and_passes_its_check(finished: World):
    key = dg.AssetCheckKey(dg.AssetKey("feature_index"), "index_finds_the_nearest")
    record = finished.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])
    (found,) = record.values()
    evaluation = found.event.dagster_event.asset_check_evaluation_data  # type: ignore[union-attr]
    assert evaluation.passed and "search is exact" in evaluation.metadata["indexed"].value


def test_status_calls_a_finished_sae_complete(finished: World):
    lines = {line.sae: line for line in status(Store(finished.store_root))}
    assert all(lines[key].complete and lines[key].shards_done == lines[key].shards for key in finished.keys)


@pytest.mark.slow
def test_a_second_run_reuses_everything_and_changes_no_row(finished: World):
    before = table(finished.store_root)
    assert materialise(finished.instance, finished.resources, finished.keys)
    for asset in PARTITIONED:
        assert materialisations(finished, asset, finished.keys[0])[0]["reused"].value is True
    assert table(finished.store_root).equals(before)


@pytest.mark.slow
def test_pruned_activations_stay_pruned_and_nothing_is_made_again(finished: World, tmp_path: Path):
    root = tmp_path / "store"
    shutil.copytree(finished.store_root, root)
    freed = prune(Store(root))
    assert all(freed[key] > 0 for key in finished.keys)
    releases = Path(finished.resources["saes"].folders[0])  # type: ignore[attr-defined]
    assert materialise(finished.instance, small_resources(root, releases), finished.keys)
    assert all(line.pruned and line.complete for line in status(Store(root)))


def damage(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["w_enc"][0, 0] = float("nan")
    save_file(tensors, weights)


def partition_states(world_instance: dg.DagsterInstance, asset: str, keys: list[str]) -> dict[str, str]:
    """What Dagster shows of each partition: materialised, failed or missing."""
    materialised = world_instance.get_materialized_partitions(dg.AssetKey(asset))
    attempts = world_instance.event_log_storage.get_latest_asset_partition_materialization_attempts_without_materializations(
        dg.AssetKey(asset)
    )
    failed = {k for k, (run, _) in attempts.items() if world_instance.get_run_by_id(run).status == dg.DagsterRunStatus.FAILURE}
    return {key: "materialised" if key in materialised else "failed" if key in failed else "missing" for key in keys}


@pytest.mark.slow
def test_one_damaged_sae_fails_alone_and_can_be_retried_alone(
    finished: World, instance: dg.DagsterInstance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    releases = tmp_path / "releases"
    shutil.copytree(finished.resources["saes"].folders[0], releases)  # type: ignore[attr-defined]
    weights = sorted(releases.rglob("params.safetensors"))[0]
    sound = weights.read_bytes()
    damage(weights)
    resources = small_resources(tmp_path / "store", releases)
    keys = register(instance, resources)
    assert not materialise(instance, resources, keys)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    lines = {line.sae: line for line in status(Store(tmp_path / "store"))}
    (broken,) = [key for key in keys if "NaN" in lines[key].last_error]
    good = [key for key in keys if key != broken]
    assert all(lines[key].complete for key in good)
    assert f"1 of 2 SAEs stopped: {broken}: " in error and "the other 1 are finished" in error
    for asset in PARTITIONED:
        expected = {key: "failed" if key == broken else "materialised" for key in keys}
        assert partition_states(instance, asset, keys) == expected, asset

    weights.write_bytes(sound)  # another file, so another SAE under another key
    mended = [key for key in register(instance, resources) if key not in keys]
    assert len(mended) == 1 and materialise(instance, resources, mended)
    assert partition_states(instance, "feature_index", mended) == {mended[0]: "materialised"}


@pytest.mark.slow
def test_an_sae_that_a_stage_stopped_is_retried_alone_under_its_own_key(
    finished: World, instance: dg.DagsterInstance, tmp_path: Path
):
    releases = tmp_path / "releases"
    shutil.copytree(finished.resources["saes"].folders[0], releases)  # type: ignore[attr-defined]
    resources = small_resources(tmp_path / "store", releases)
    keys = register(instance, resources)
    hidden = sorted(releases.rglob("params.safetensors"))[0]
    hidden.rename(tmp_path / "elsewhere")
    assert not materialise(instance, resources, keys)
    states = partition_states(instance, "feature_index", keys)
    (broken,) = [key for key, state in states.items() if state == "failed"]
    (tmp_path / "elsewhere").rename(hidden)
    assert materialise(instance, resources, [broken])
    assert set(partition_states(instance, "feature_index", keys).values()) == {"materialised"}
    assert all(line.complete for line in status(Store(tmp_path / "store")))


def test_a_run_of_one_damaged_sae_fails_with_one_line_naming_the_file(
    finished: World, instance: dg.DagsterInstance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = sorted(Path(finished.resources["saes"].folders[0]).rglob("params.safetensors"))[0].parent  # type: ignore[attr-defined]
    folder = tmp_path / "releases" / "r" / "resid_post" / "bad"
    shutil.copytree(source, folder)
    damage(folder / "params.safetensors")
    resources = small_resources(finished.store_root, tmp_path / "releases")
    assert not materialise(instance, resources, register(instance, resources))
    error = capsys.readouterr().err.strip()
    assert "params.safetensors: w_enc holds 1 value(s) that are NaN" in error and "\n" not in error


def started_run(instance: dg.DagsterInstance, lock: str) -> dg.DagsterRun:
    """A run that has started and holds the gpu pool's only slot, as a killed process leaves it."""
    instance.event_log_storage.set_concurrency_slots("gpu", 1)
    job = build_defs().resolve_job_def("index_release")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_LOCK: lock})
    instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "activation_cache")
    return run


def test_the_pool_slot_of_a_killed_run_is_freed_and_the_run_marked_failed(instance: dg.DagsterInstance, tmp_path: Path):
    run = started_run(instance, str(tmp_path / "gone.lock"))
    assert release_dead_runs(instance) == [run.run_id]
    assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE


def test_the_run_of_a_living_process_is_left_alone(instance: dg.DagsterInstance):
    with alive(instance) as lock:
        started_run(instance, lock)
        assert release_dead_runs(instance) == []
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 1
