"""The stand-in for the Hub answers the real huggingface_hub as the Hub does."""

import hashlib

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_server import HubServer

REPO = "maker/release"


@pytest.fixture
def hub():
    with HubServer(page_size=3) as server:
        yield server


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url)


def test_repos_are_listed_by_author_and_search_with_their_newest_commit(hub, api):
    for repo in ("maker/alpha", "maker/beta", "maker/gamma", "maker/alphabet", "other/alpha"):
        sha = hub.commit(repo, {"README.md": repo.encode()})
    found = {info.id: info.sha for info in api.list_models(author="maker", search="alpha", expand=["sha"])}
    assert found.keys() == {"maker/alpha", "maker/alphabet"}
    assert len(list(api.list_models(author="maker"))) == 4  # two pages
    assert next(iter(api.list_models(author="other", expand=["sha"]))).sha == sha


def test_a_listing_gives_the_hashes_that_the_hub_gives_in_both_endpoints(hub, api, rng):
    weights, config = rng.bytes(500), b'{"width": 16}'
    sha = hub.commit(REPO, {f"layer_{i}/params.safetensors": weights for i in range(5)} | {"layer_0/config.json": config})
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, revision=sha, recursive=True)}
    assert len(tree) == 6
    assert tree["layer_4/params.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert tree["layer_0/config.json"].blob_id == hashlib.sha1(b"blob 13\0" + config).hexdigest()
    siblings = {s.rfilename: s for s in api.model_info(REPO, revision=sha, files_metadata=True).siblings}
    assert {path: (s.size, s.blob_id, s.lfs and s.lfs.sha256) for path, s in siblings.items()} == {
        path: (entry.size, entry.blob_id, entry.lfs and entry.lfs.sha256) for path, entry in tree.items()
    }


def test_a_commit_replaces_deletes_and_keeps_earlier_commits(hub, api, tmp_path):
    first = hub.commit(REPO, {"a.bin": b"one", "b.bin": b"two"})
    second = hub.commit(REPO, {"a.bin": b"three", "b.bin": None})
    assert first != second == api.model_info(REPO).sha
    newest = snapshot_download(REPO, cache_dir=tmp_path, endpoint=hub.url)
    assert [entry.path for entry in api.list_repo_tree(REPO)] == ["a.bin"]
    assert (tmp_path / newest / "a.bin").read_bytes() == b"three"
    assert open(hf_hub_download(REPO, "a.bin", revision=first, cache_dir=tmp_path, endpoint=hub.url), "rb").read() == b"one"


def test_a_lost_connection_is_resumed_where_it_broke_off(hub, tmp_path, rng, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what a lost connection costs at most
    content = rng.bytes(100_000)
    hub.commit(REPO, {"params.safetensors": content})
    hub.truncate("params.safetensors")
    path = hf_hub_download(REPO, "params.safetensors", cache_dir=tmp_path, endpoint=hub.url)
    assert open(path, "rb").read() == content
    assert hub.requests[f"GET /{REPO}/resolve/main/params.safetensors"] == 2
    assert hub.bytes_sent[f"{REPO}/params.safetensors"] == len(content)


def test_what_is_not_there_is_told_apart_as_the_hub_tells_it(hub, api, tmp_path):
    hub.commit(REPO, {"a.bin": b"one"})
    hub.lose("a.bin")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "a.bin", cache_dir=tmp_path, endpoint=hub.url)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("maker/other")
    hub.gated.add(REPO)
    with pytest.raises(GatedRepoError):
        hf_hub_download(REPO, "a.bin", cache_dir=tmp_path, endpoint=hub.url)


def test_a_folder_is_served_and_what_is_copied_into_it_becomes_a_commit(hub, api, tmp_path):
    file = tmp_path / "release" / "resid_post" / "params.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    hub.serve_folder(tmp_path, org="local")
    (before,) = api.list_models(author="local", expand=["sha"])
    (file.parent / "config.json").write_text("{}", encoding="utf-8")
    (after,) = api.list_models(author="local", expand=["sha"])
    (again,) = api.list_models(author="local", expand=["sha"])
    assert before.id == "local/release"
    assert before.sha != after.sha == again.sha
    assert len(list(api.list_repo_tree("local/release", recursive=True))) == 2
