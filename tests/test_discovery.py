"""Looking at folders and at a Hub, the catalog as a queue, registration and download, one after the other."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from scopeatlas import discovery
from scopeatlas.atlas.catalog import read_catalog
from scopeatlas.dictionaries.registration import fetch_missing
from scopeatlas.dictionaries.releases import describe_sae, open_dictionary
from scopeatlas.dictionaries.watching import WatchRule
from scopeatlas.errors import DictionaryError
from scopeatlas.storage.store import Store
from tests.conftest import sae_tensors, write_sae
from tests.hub_server import HubServer

REPO = "google/gemma-scope-2-270m-pt"
ONE, TWO = (f"resid_post/layer_{layer}_width_16k_l0_medium" for layer in (5, 12))
RULES = [WatchRule("google", "gemma-scope-2-*", paths=("resid_post/*",))]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def ours(subject):
    return replace(subject, serves=("google/gemma-3-270m",))


@pytest.fixture
def release(tmp_path, residual) -> Path:
    """A folder of releases, with one SAE of the subject model and one of another."""
    root = tmp_path / "releases"
    write_sae(root / "gemma-scope-2-270m-pt" / ONE, sae_tensors(residual), **at_layer(5))
    write_sae(root / "gemma-scope-2-1b-pt" / TWO, sae_tensors(residual, seed=1))
    return root


def at_layer(layer: int) -> dict[str, str]:
    return {side: f"model.layers.{layer}.output" for side in ("hf_hook_point_in", "hf_hook_point_out")}


def files_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def states(store: Store) -> dict[str, str]:
    return {row["path"]: row["state"] for row in read_catalog(store.root).iter_rows(named=True)}


def test_an_sae_in_a_folder_settles_gets_ready_and_is_registered_once(store, release, ours):
    assert str(discovery.look(store, [release], [], subject=ours)) == "1 other_model, 1 settling"
    assert discovery.register_ready(store, [release], limit=9) == ([], {})
    discovery.look(store, [release], [], subject=ours)
    (entry,), failed = discovery.register_ready(store, [release], limit=9)
    assert store.registered() == [entry.key] and not failed
    assert states(store) == {ONE: "registered", TWO: "other_model"}
    assert str(discovery.look(store, [release], [], subject=ours)) == "1 other_model"
    assert discovery.register_ready(store, [release], limit=9) == ([], {})


def test_an_sae_that_changes_between_looks_settles_again(store, release, ours):
    discovery.look(store, [release], [], subject=ours)
    config = release / "gemma-scope-2-270m-pt" / ONE / "config.json"
    config.write_text(config.read_text() + "\n")
    discovery.look(store, [release], [], subject=ours)
    assert states(store)[ONE] == "settling"


def test_one_on_the_hub_is_registered_by_its_listing_and_fetched_when_it_is_needed(store, hub, release, ours, tmp_path):
    folder = release / "gemma-scope-2-270m-pt"
    hub.commit(REPO, files_of(folder))
    assert discovery.look(store, [], RULES, subject=ours).states == {"settling": 1}
    assert discovery.look(store, [], RULES, subject=ours).states == {"ready": 1}
    (entry,), _ = discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache")
    weights = f"{ONE}/params.safetensors"
    assert not hub.bytes_sent[weights] and not (Path(entry.root) / weights).exists()
    assert entry.key == describe_sae(folder / ONE, release="gemma-scope-2-270m-pt", path=ONE).key
    with pytest.raises(DictionaryError, match="params.safetensors is gone"):
        open_dictionary(entry)
    assert fetch_missing([entry], cache=tmp_path / "cache") == {}
    assert open_dictionary(entry).width == 96
    sent = hub.bytes_sent[weights]
    assert fetch_missing([entry], cache=tmp_path / "cache") == {} and hub.bytes_sent[weights] == sent


def test_ready_saes_wait_in_the_catalog_for_their_turn_through_looks_that_find_nothing_new(
    store, hub, release, ours, residual, tmp_path
):
    for layer in (5, 9, 12):
        write_sae(tmp_path / f"more/resid_post/layer_{layer}_width_16k_l0_medium", sae_tensors(residual, seed=layer))
    hub.commit(REPO, files_of(tmp_path / "more"))
    for _ in range(3):
        discovery.look(store, [], RULES, subject=ours)
    taken = [discovery.register_ready(store, [], limit=2, cache=tmp_path / "cache")[0] for _ in range(3)]
    assert [len(entries) for entries in taken] == [2, 1, 0]


def test_one_past_the_quota_is_deferred_with_the_numbers_and_taken_when_there_is_room(store, hub, release, ours, tmp_path):
    hub.commit(REPO, files_of(release / "gemma-scope-2-270m-pt"))
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    assert discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache", quota_bytes=1000) == ([], {})
    row = read_catalog(store.root).row(0, named=True)
    assert row["state"] == "deferred_by_quota" and "of the 1000 that the quota allows" in row["reason"]
    assert len(discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache", quota_bytes=10**9)[0]) == 1


def test_a_download_that_cannot_be_had_fails_its_sae_alone(store, hub, release, ours, residual, tmp_path):
    write_sae(tmp_path / "more" / TWO, sae_tensors(residual, seed=3))
    write_sae(tmp_path / "more" / ONE, sae_tensors(residual, seed=4))
    hub.commit(REPO, files_of(tmp_path / "more"))
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    entries, _ = discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache")
    hub.lose(f"{TWO}/params.safetensors")
    failed = fetch_missing(entries, cache=tmp_path / "cache")
    lost = next(entry for entry in entries if entry.path == TWO)
    assert failed.keys() == {lost.key} and "lists a file that cannot be had" in failed[lost.key]


def test_a_release_that_is_gone_is_retired_and_stays_in_the_catalog(store, hub, release, ours, tmp_path):
    hub.commit(REPO, files_of(release / "gemma-scope-2-270m-pt"))
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache")
    hub.remove(REPO)
    discovery.look(store, [], RULES, subject=ours)
    discovery.refresh_states(store)
    assert states(store) == {ONE: "retired"} and len(store.registered()) == 1


def test_states_follow_what_was_done_with_the_sae(store, release, ours):
    for _ in range(2):
        discovery.look(store, [release], [], subject=ours)
    (entry,), _ = discovery.register_ready(store, [release], limit=9)
    store.record_error(entry.key, "fidelity", "FVU 2.00 is no better than the mean")
    assert discovery.refresh_states(store) == 1 and discovery.refresh_states(store) == 0
    row = next(row for row in read_catalog(store.root).iter_rows(named=True) if row["path"] == ONE)
    assert (row["state"], row["reason"]) == ("failed", "fidelity: FVU 2.00 is no better than the mean")


def test_an_sae_registered_by_hand_is_in_the_catalog_after_a_refresh(store, release):
    entry = describe_sae(release / "gemma-scope-2-270m-pt" / ONE, release="gemma-scope-2-270m-pt", path=ONE)
    store.register(entry.key, entry.as_json())
    discovery.refresh_states(store)
    row = read_catalog(store.root).row(0, named=True)
    assert (row["sae"], row["state"], row["kind"], row["width"]) == (entry.key, "registered", "sae", 16384)


def test_an_unreachable_hub_is_said_and_folders_are_looked_at_all_the_same(store, release, ours, monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
    found = discovery.look(store, [release], RULES, subject=ours)
    assert found.states["settling"] == 1 and "cannot be reached" in next(iter(found.errors.values()))


def test_a_look_that_dies_before_its_state_is_written_loses_nothing(store, hub, release, ours, monkeypatch):
    hub.commit(REPO, files_of(release / "gemma-scope-2-270m-pt"))
    discovery.look(store, [], RULES, subject=ours)
    with monkeypatch.context() as patch:
        patch.setattr(discovery, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            discovery.look(store, [], RULES, subject=ours)
    assert discovery.look(store, [], RULES, subject=ours).states == {"ready": 1}


def push(hub: HubServer, folder: Path, repo: str = REPO) -> None:
    hub.commit(repo, files_of(folder))


def test_a_newer_version_of_a_registered_sae_waits_its_turn_and_the_older_one_stays(
    store, hub, release, ours, residual, tmp_path
):
    folder = release / "gemma-scope-2-270m-pt"
    push(hub, folder)
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    (older,), _ = discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache")
    write_sae(folder / ONE, sae_tensors(residual, seed=9), **at_layer(5))
    push(hub, folder)
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
        discovery.refresh_states(store)
    assert states(store) == {ONE: "ready"}
    (newer,), _ = discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache")
    discovery.refresh_states(store)
    assert store.registered() == sorted([older.key, newer.key]) and newer.key != older.key


def test_two_versions_that_the_catalog_has_never_seen_do_not_stop_it(store, release, residual):
    folder = release / "gemma-scope-2-270m-pt" / ONE
    for seed in (0, 1):
        write_sae(folder, sae_tensors(residual, seed=seed), **at_layer(5))
        entry = describe_sae(folder, release="gemma-scope-2-270m-pt", path=ONE)
        store.register(entry.key, entry.as_json())
    assert discovery.refresh_states(store) == 1 and states(store) == {ONE: "registered"}


def test_a_repo_that_cannot_be_read_does_not_stand_in_the_way_of_the_next(store, hub, release, ours, tmp_path):
    push(hub, release / "gemma-scope-2-270m-pt", "google/gemma-scope-2-270m-aaa")
    push(hub, release / "gemma-scope-2-270m-pt")
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    hub.gated.add("google/gemma-scope-2-270m-aaa")
    entries, failed = discovery.register_ready(store, [], limit=1, cache=tmp_path / "cache")
    assert [entry.repo for entry in entries] == [REPO] and failed.keys() == {"google/gemma-scope-2-270m-aaa"}


def test_what_is_registered_and_not_yet_fetched_counts_against_the_quota(store, hub, residual, ours, tmp_path):
    for layer in (5, 9, 12):
        path = f"resid_post/layer_{layer}_width_16k_l0_medium"
        write_sae(tmp_path / "more" / path, sae_tensors(residual, seed=layer), **at_layer(layer))
    push(hub, tmp_path / "more")
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    size = read_catalog(store.root)["bytes"].max()
    limits = {"limit": 9, "cache": tmp_path / "cache", "quota_bytes": int(1.9 * size)}
    assert [len(discovery.register_ready(store, [], **limits)[0]) for _ in range(2)] == [1, 0]
    assert sorted(states(store).values()) == ["deferred_by_quota", "deferred_by_quota", "registered"]


def test_a_scenario_of_another_model_on_the_same_store_takes_nothing_away(store, hub, release, ours, subject, tmp_path):
    push(hub, release / "gemma-scope-2-270m-pt")
    other = replace(subject, serves=("google/gemma-3-1b-pt",))
    for scenario in (other, ours, other, ours):
        discovery.look(store, [], RULES, subject=scenario)
    (entry,), _ = discovery.register_ready(store, [], limit=9, cache=tmp_path / "cache")
    assert discovery.registered_for(store, ours) == [entry.key] and discovery.registered_for(store, other) == []


def test_an_atlas_that_was_lost_is_filled_again(store, hub, release, ours):
    push(hub, release / "gemma-scope-2-270m-pt")
    for _ in range(3):
        discovery.look(store, [], RULES, subject=ours)
    shutil.rmtree(store.root / "atlas")
    for _ in range(2):
        discovery.look(store, [], RULES, subject=ours)
    assert states(store) == {ONE: "ready"}


def test_of_two_repos_with_one_name_the_first_keeps_it_and_the_other_is_named(store, hub, release, ours):
    rules = [*RULES, WatchRule("alice", "gemma-scope-2-*")]
    push(hub, release / "gemma-scope-2-270m-pt")
    discovery.look(store, [], rules, subject=ours)
    push(hub, release / "gemma-scope-2-270m-pt", "alice/gemma-scope-2-270m-pt")
    found = discovery.look(store, [], rules, subject=ours)
    assert "has the name and paths of google/gemma-scope-2-270m-pt" in found.errors["alice/gemma-scope-2-270m-pt"]
    assert read_catalog(store.root)["repo"].to_list() == [REPO]


def test_a_folder_that_is_gone_does_not_keep_the_hub_from_being_looked_at(store, hub, release, ours, tmp_path):
    push(hub, release / "gemma-scope-2-270m-pt")
    found = discovery.look(store, [tmp_path / "unmounted"], RULES, subject=ours)
    assert found.states == {"settling": 1} and "is not a folder" in found.errors[str(tmp_path / "unmounted")]


def test_an_sae_that_left_its_folder_while_it_waited_leaves_the_queue(store, release, ours):
    for _ in range(2):
        discovery.look(store, [release], [], subject=ours)
    shutil.rmtree(release / "gemma-scope-2-270m-pt")
    assert discovery.register_ready(store, [release], limit=9) == ([], {})
    assert states(store)[ONE] == "retired"
