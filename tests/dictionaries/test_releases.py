import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from scopeatlas.dictionaries.releases import (
    SaeEntry,
    describe_sae,
    find_saes,
    load_folder,
    open_dictionary,
    reopen_dictionary,
)
from scopeatlas.errors import DictionaryError
from scopeatlas.storage.files import file_sha256
from tests.conftest import entry_of, sae_tensors, write_sae

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
    assert torch.equal(open_dictionary(find_saes(root)[0]).layers[0].w_enc, tensors["w_enc"])


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
    assert entry == SaeEntry.from_json(json.loads(json.dumps(entry.as_json())))


@pytest.fixture
def cache(root) -> Path:
    """The Hugging Face cache as downloads leave it: blobs, snapshots of links to them; two commits of one repo."""
    home = root / "hub" / "models--google--gemma-scope-2-toy"
    (home / "blobs").mkdir(parents=True)
    for age, (commit, path) in enumerate((("b" * 40, "mlp_out/layer_2"), (COMMIT, "resid_post/layer_1"))):
        snapshot = home / "snapshots" / commit / path
        snapshot.mkdir(parents=True)
        for file in (root / "alpha" / path).iterdir():
            blob = home / "blobs" / file_sha256(file)
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        os.utime(home / "snapshots" / commit, (1e9 + age, 1e9 + age))
    return root / "hub"


def test_the_hugging_face_cache_is_a_folder_of_releases_at_their_newest_commit(cache):
    assert [(e.release, e.path, e.revision) for e in find_saes(cache)] == [("gemma-scope-2-toy", "resid_post/layer_1", COMMIT)]


def test_an_sae_in_the_hugging_face_cache_has_the_key_of_the_same_files_in_a_local_folder(cache, root, tensors):
    cached = find_saes(cache)[0]
    local = describe_sae(root / "alpha/resid_post/layer_1", release="gemma-scope-2-toy", path="resid_post/layer_1")
    assert cached.key == local.key
    assert torch.equal(open_dictionary(cached).layers[0].w_dec[:, 0], tensors["w_dec"])


def test_an_sae_registered_by_an_earlier_version_says_what_to_do(root):
    body = {"key": "a.b.12345678", "folder": "somewhere", "hashes": {}}
    with pytest.raises(DictionaryError, match="registered by an earlier version; register it again"):
        SaeEntry.from_json(body)


def test_a_dictionary_reopened_within_a_run_is_the_same(root):
    entry = find_saes(root)[0]
    one, two = open_dictionary(entry).layers[0], reopen_dictionary(entry).layers[0]
    assert all(torch.equal(tensor, two.tensors()[name]) for name, tensor in one.tensors().items())


def test_entries_of_the_same_files_are_equal(root):
    folder = root / "alpha" / "mlp_out" / "layer_2"
    assert entry_of(folder) == entry_of(folder)
