"""Fetching SAEs from a server that speaks the Hub's endpoints: exactly their files, verified, within a quota."""

import hashlib
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scopeatlas.dictionaries.downloads import CachedRelease, cached_releases, fetch, fetch_from_hub, shortfall
from scopeatlas.dictionaries.hub import list_saes
from scopeatlas.errors import DictionaryError
from tests.hub_server import HubServer, sae_files

REPO = "google/gemma-scope-2-270m-pt"
SAE, OTHER = "resid_post/layer_12_width_16k_l0_medium", "attn_out_all/layer_3_width_262k_l0_small"
WEIGHTS, CONFIG = f"{SAE}/params.safetensors", f"{SAE}/config.json"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long the library wanted to wait between its retries; it is not made to."""
    waited: list[float] = []
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=waited.append, time=time.time))
    return waited


@pytest.fixture
def offline(monkeypatch):
    """Call it to be offline from then on."""
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def listed(hub: HubServer, path: str = SAE):
    return next(sae for sae in list_saes(REPO, hub.heads()[REPO].sha) if sae.path == path)


def test_an_saes_own_files_are_fetched_at_its_commit_and_nothing_else(hub, cache, rng):
    files = sae_files(rng, SAE, OTHER)
    hub.commit(REPO, files)
    sae = listed(hub)
    hub.commit(REPO, {WEIGHTS: rng.bytes(4000)})
    root = fetch(sae, cache=cache)
    assert {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()} == {
        name: files[name] for name in (WEIGHTS, CONFIG)
    }
    assert hub.bytes_sent.keys() == {f"{REPO}/{WEIGHTS}", f"{REPO}/{CONFIG}"}


def test_what_is_in_the_cache_is_not_fetched_again_not_even_at_another_commit(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE))
    fetch(listed(hub), cache=cache)
    hub.commit(REPO, {"README.md": b"new words"})
    hub.bytes_sent.clear()
    root = fetch(listed(hub), cache=cache, quota_bytes=0)
    assert root.name == hub.heads()[REPO].sha
    assert (root / WEIGHTS).exists() and not hub.bytes_sent


def test_a_truncated_download_is_resumed(hub, cache, rng, waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    files = sae_files(rng, SAE)
    hub.commit(REPO, files)
    hub.truncate(WEIGHTS, times=3)
    root = fetch(listed(hub), cache=cache)
    assert (root / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.bytes_sent[f"{REPO}/{WEIGHTS}"] <= 4000 + 3 * 100


def test_wrong_bytes_are_deleted_and_fetched_once_more(hub, cache, rng):
    files = sae_files(rng, SAE)
    hub.commit(REPO, files)
    hub.corrupt(WEIGHTS)
    hub.corrupt(CONFIG)
    told: list[str] = []
    root = fetch(listed(hub), cache=cache, log=told.append)
    assert (root / WEIGHTS).read_bytes() == files[WEIGHTS] and (root / CONFIG).read_bytes() == files[CONFIG]
    assert [line.split(" ")[0] for line in told] == [f"{REPO}/{WEIGHTS}", f"{REPO}/{CONFIG}"]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_bytes_that_stay_wrong_are_an_error_and_never_stay_in_the_cache(hub, cache, rng, name):
    hub.commit(REPO, sae_files(rng, SAE))
    hub.corrupt(name, times=2)
    with pytest.raises(DictionaryError, match=f"{name}.*does not arrive as"):
        fetch(listed(hub), cache=cache)
    assert not [path for path in cache.rglob("*") if path.name == Path(name).name]
    fetch(listed(hub), cache=cache)


def test_a_file_damaged_in_the_cache_is_fetched_again(hub, cache, rng):
    files = sae_files(rng, SAE)
    hub.commit(REPO, files)
    root = fetch(listed(hub), cache=cache)
    (root / WEIGHTS).resolve().write_bytes(b"half")
    assert (fetch(listed(hub), cache=cache) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_listed_file_that_is_not_there_is_named(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE))
    hub.lose(WEIGHTS)
    with pytest.raises(DictionaryError, match=f"{WEIGHTS}.*cannot be had"):
        fetch(listed(hub), cache=cache)


def test_an_sae_that_is_not_whole_is_refused_before_anything_is_fetched(hub, cache, rng):
    hub.commit(REPO, {f"clt/width_262k_l0_big/params_layer_{i}.safetensors": rng.bytes(10) for i in (0, 2)})
    with pytest.raises(DictionaryError, match="params_layer_1"):
        fetch(listed(hub, "clt/width_262k_l0_big"), cache=cache)
    assert not hub.bytes_sent


def test_a_gated_repo_says_what_to_do(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE))
    hub.gated.add(REPO)
    with pytest.raises(DictionaryError, match="gated; accept its terms at http.*hf auth login"):
        fetch(listed(hub), cache=cache)


def test_a_rate_limit_is_waited_for(hub, cache, rng, waits):
    hub.commit(REPO, sae_files(rng, SAE))
    sae = listed(hub)
    hub.fail(429, times=3, retry_after=7, ending=WEIGHTS)
    fetch(sae, cache=cache)
    assert waits == [8, 8]  # the first answer only makes the library look into the cache


def test_a_rate_limit_that_asks_for_too_long_is_an_error_with_the_number(hub, cache, rng, waits):
    hub.commit(REPO, sae_files(rng, SAE))
    sae = listed(hub)
    hub.fail(429, times=10, retry_after=90, ending=WEIGHTS)
    with pytest.raises(DictionaryError, match="asks to wait 90 s"):
        fetch(sae, cache=cache, max_wait_s=200)
    assert sum(waits) <= 200


def test_an_unreachable_hub_is_an_error_that_names_the_setting(hub, cache, rng, waits):
    hub.commit(REPO, sae_files(rng, SAE))
    sae = listed(hub)
    hub.close()
    with pytest.raises(DictionaryError, match="cannot be reached.*HF_ENDPOINT"):
        fetch(sae, cache=cache)


def test_a_fetch_past_the_quota_is_refused_with_the_numbers_before_it_starts(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE, OTHER))
    fetch(listed(hub), cache=cache)
    held = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink())
    other = listed(hub, OTHER)
    hub.bytes_sent.clear()
    with pytest.raises(DictionaryError, match=f"needs {other.bytes} bytes.*holds {held} of the {held + other.bytes - 1} that"):
        fetch(other, cache=cache, quota_bytes=held + other.bytes - 1)
    assert not hub.bytes_sent
    fetch(other, cache=cache, quota_bytes=held + other.bytes)


def test_a_fetch_that_the_disk_has_no_room_for_is_refused(hub, cache, rng, monkeypatch):
    hub.commit(REPO, sae_files(rng, SAE))
    sae = listed(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sae.bytes - 1))
    assert f"has {sae.bytes - 1} free" in (shortfall([sae], cache=cache) or "")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=sae.bytes))
    assert shortfall([sae], cache=cache) is None


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE))
    cache.write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(DictionaryError, match=f"{cache}.*set another cache"):
        fetch(listed(hub), cache=cache)


def test_a_fetched_sae_is_fetched_offline_as_well_and_another_is_not(hub, cache, rng, offline):
    hub.commit(REPO, sae_files(rng, SAE, OTHER))
    root, known, unknown = fetch(listed(hub), cache=cache), listed(hub), listed(hub, OTHER)
    offline()
    assert fetch(known, cache=cache) == root
    with pytest.raises(DictionaryError, match="HF_HUB_OFFLINE"):
        fetch(unknown, cache=cache)


def test_the_cache_tells_which_releases_it_holds(hub, cache, rng):
    assert cached_releases(cache) == []
    hub.commit(REPO, sae_files(rng, SAE))
    first = fetch(listed(hub), cache=cache)
    hub.commit(REPO, sae_files(rng, SAE))
    second = fetch(listed(hub), cache=cache)
    (cache / "models--google--empty" / "snapshots" / "0000").mkdir(parents=True)
    assert cached_releases(cache) == [CachedRelease(REPO, first.name, first), CachedRelease(REPO, second.name, second)]


def test_the_saes_that_patterns_name_are_fetched_and_described(hub, cache, rng):
    files = sae_files(rng, SAE, OTHER)
    sha = hub.commit(REPO, files)
    (entry,) = fetch_from_hub(REPO, ["resid_post/*"], cache=cache)
    assert (entry.release, entry.path, entry.revision) == ("gemma-scope-2-270m-pt", SAE, sha)
    assert entry.hashes["params.safetensors"] == hashlib.sha256(files[WEIGHTS]).hexdigest()
    assert {e.path for e in fetch_from_hub(REPO, ["resid_post/", SAE, "attn*"], cache=cache)} == {SAE, OTHER}


def test_a_revision_is_fetched_as_it_was_and_found_offline(hub, cache, rng, offline):
    first = hub.commit(REPO, sae_files(rng, SAE))
    hub.commit(REPO, sae_files(rng, SAE))
    online = [fetch_from_hub(REPO, [SAE], revision=revision, cache=cache) for revision in ("main", first)]
    assert online[0] != online[1]
    offline()
    assert [fetch_from_hub(REPO, [SAE], revision=revision, cache=cache) for revision in ("main", first)] == online
    with pytest.raises(DictionaryError, match="HF_HUB_OFFLINE"):
        fetch_from_hub(REPO, [SAE], revision="v2", cache=cache)


def test_patterns_that_match_nothing_and_repos_that_do_not_exist_are_errors(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE))
    with pytest.raises(DictionaryError, match="no whole SAE whose path matches mlp_out/"):
        fetch_from_hub(REPO, ["mlp_out/*"], cache=cache)
    with pytest.raises(DictionaryError, match="google/other.*does not exist or is private"):
        fetch_from_hub("google/other", ["*"], cache=cache)


def test_all_that_patterns_name_must_fit_the_quota_together(hub, cache, rng):
    hub.commit(REPO, sae_files(rng, SAE, OTHER))
    with pytest.raises(DictionaryError, match="2 SAEs .*quota"):
        fetch_from_hub(REPO, ["*"], cache=cache, quota_bytes=6000)
    assert not hub.bytes_sent
