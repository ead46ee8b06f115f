import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scopeatlas.dictionaries.releases import describe_sae, fetch_from_hub, find_saes, load_folder, open_dictionary
from scopeatlas.errors import DictionaryError
from tests.conftest import REPOSITORY, entry_of, sae_tensors, write_sae

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tensors():
    return sae_tensors(torch.randn(300, 32), width=20, l0=3)


@pytest.fixture
def root(tmp_path, tensors):
    """Two releases of three SAEs."""
    for number, path in enumerate(("alpha/resid_post/layer_1", "alpha/mlp_out/layer_2", "Beta Release/resid_post/layer_1")):
        write_sae(tmp_path / path, tensors, l0=number)
    return tmp_path


def test_every_sae_of_every_release_is_found(root):
    found = [(entry.release, entry.path) for entry in find_saes(root)]
    assert sorted(found) == [
        ("Beta Release", "resid_post/layer_1"),
        ("alpha", "mlp_out/layer_2"),
        ("alpha", "resid_post/layer_1"),
    ]


def test_a_folder_may_be_named_as_one_release(root):
    assert [(e.release, e.path) for e in find_saes(root / "alpha", release="mine")] == [
        ("mine", "mlp_out/layer_2"),
        ("mine", "resid_post/layer_1"),
    ]


def test_a_half_copied_sae_is_left_out_until_it_is_whole(root):
    weights = root / "alpha/mlp_out/layer_2/params.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    assert len(find_saes(root)) == 2
    weights.write_bytes(data)
    assert len(find_saes(root)) == 3


def test_a_root_that_is_no_folder_is_an_error(tmp_path):
    with pytest.raises(DictionaryError, match="nowhere is not a folder; set saes.folders"):
        find_saes(tmp_path / "nowhere")


def test_keys_are_slugs_that_end_in_a_hash(root):
    for entry in find_saes(root):
        assert re.fullmatch(r"[a-z0-9._-]+\.[0-9a-f]{8}", entry.key)
    assert find_saes(root)[0].key.startswith("beta-release.resid_post.layer_1.")


def test_a_key_follows_the_files_of_its_own_sae_and_nothing_else(root, tensors):
    before = {e.path: e.key for e in find_saes(root / "alpha", release="alpha")}
    (root / "alpha" / "README.md").write_text("a new commit")
    folder = root / "alpha/resid_post/layer_1"
    assert describe_sae(folder, release="alpha", path="resid_post/layer_1", revision="abc").key == before["resid_post/layer_1"]
    tensors["b_dec"] += 1
    write_sae(folder, tensors)
    after = {e.path: e.key for e in find_saes(root / "alpha", release="alpha")}
    assert after["mlp_out/layer_2"] == before["mlp_out/layer_2"] and after["resid_post/layer_1"] != before["resid_post/layer_1"]


def test_a_registered_sae_opens(root, tensors):
    assert torch.equal(open_dictionary(find_saes(root)[0]).w_enc, tensors["w_enc"])


def test_a_file_that_is_gone_is_named(root):
    entry = find_saes(root)[0]
    Path(entry.folder, "config.json").unlink()
    with pytest.raises(DictionaryError, match="config.json is gone; restore it"):
        open_dictionary(entry)


def test_a_file_that_was_damaged_since_is_named_as_damaged(root):
    entry = find_saes(root)[0]
    weights = Path(entry.folder, "params.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(DictionaryError, match="truncated"):
        open_dictionary(entry)


def test_sound_files_that_are_other_files_need_another_key(root, tensors):
    entry = find_saes(root)[0]
    write_sae(Path(entry.folder), tensors, l0=99)
    with pytest.raises(DictionaryError, match=f"not the file that {re.escape(entry.key)} was registered with"):
        open_dictionary(entry)


def test_a_folder_without_known_weights_is_an_error(tmp_path):
    with pytest.raises(DictionaryError, match="holds no known weight file"):
        load_folder(tmp_path)


def test_an_entry_survives_json(root):
    entry = find_saes(root)[0]
    assert replace(entry) == type(entry)(**entry.as_json())


def hub_cache(cache: Path, repo: str, folders: dict[str, Path]) -> None:
    """A Hugging Face cache as a download leaves it: blobs by hash, a snapshot of links to them, a ref to the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for path, folder in folders.items():
        snapshot = home / "snapshots" / COMMIT / path
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = home / "blobs" / f"{abs(hash((path, file.name))):x}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture
def offline(tmp_path, tensors, monkeypatch):
    """The Hub out of reach, and a cache of one repo of three SAEs."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folders = {}
    for number, path in enumerate(("resid_post/layer_1", "resid_post/layer_2", "mlp_out/layer_1")):
        folders[path] = write_sae(tmp_path / "upstream" / path, tensors, l0=number)
    hub_cache(tmp_path / "hub", "google/gemma-scope-2-toy", folders)
    return tmp_path


def test_a_cached_hub_repo_serves_offline(offline, tensors):
    entries = fetch_from_hub("google/gemma-scope-2-toy", ["resid_post/*"])
    assert [(e.release, e.path, e.revision) for e in entries] == [
        ("gemma-scope-2-toy", "resid_post/layer_1", COMMIT),
        ("gemma-scope-2-toy", "resid_post/layer_2", COMMIT),
    ]
    assert torch.equal(open_dictionary(entries[0]).w_dec, tensors["w_dec"])


def test_a_hub_sae_has_the_key_of_the_same_files_in_a_local_folder(offline):
    fetched = fetch_from_hub("google/gemma-scope-2-toy", ["mlp_out/layer_1"])[0]
    local = describe_sae(offline / "upstream/mlp_out/layer_1", release="gemma-scope-2-toy", path="mlp_out/layer_1")
    assert fetched.key == local.key


def test_patterns_that_match_nothing_are_named(offline):
    with pytest.raises(DictionaryError, match="has no SAE folder that matches attn_out/\\*; check saes.hub patterns"):
        fetch_from_hub("google/gemma-scope-2-toy", ["attn_out/*"])


def test_a_repo_that_is_not_cached_is_an_error_in_one_line(offline):
    with pytest.raises(DictionaryError, match="cannot fetch google/unheard-of@main: .*check saes.hub and the network") as caught:
        fetch_from_hub("google/unheard-of", ["*"])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_environment_variable_alone_makes_a_fetch_offline(offline):
    script = "from scopeatlas.dictionaries.releases import fetch_from_hub as f; print(f('google/gemma-scope-2-toy', ['mlp_out/*'])[0].key)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(offline / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("gemma-scope-2-toy.mlp_out.layer_1.")


def test_entries_of_the_same_files_are_equal(root):
    folder = root / "alpha" / "mlp_out" / "layer_2"
    assert entry_of(folder) == entry_of(folder)
