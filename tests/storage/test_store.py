from pathlib import Path

import pytest

from scopeatlas.errors import StoreError, UnknownSaeError
from scopeatlas.storage.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def test_a_key_is_new_once(store):
    assert store.register("a", {"folder": "x"}) and not store.register("a", {"folder": "x"})
    assert not store.register("a", {"folder": "moved"})
    assert store.entry("a") == {"folder": "moved"} and store.registered() == ["a"]


def test_an_unknown_key_lists_some_that_are_known(store):
    with pytest.raises(UnknownSaeError, match="no SAE 'x' in .*; known: none yet"):
        store.entry("x")
    for key in "dbca":
        store.register(key, {})
    with pytest.raises(UnknownSaeError, match="no SAE 'x' in .*; known: a, b, c, ..."):
        store.entry("x")


def test_errors_are_kept_per_stage_until_the_stage_succeeds(store):
    store.record_error("a", "examples", None)
    assert not store.root.exists()
    store.record_error("a", "activations", "bad")
    store.record_error("a", "examples", "worse")
    store.record_error("a", "activations", None)
    assert store.errors("a") == {"examples": "worse"} and store.errors("b") == {}


def test_stages_lie_under_their_sae_and_corpus(store):
    stage = store.stage("sae", "corpus", "activations")
    assert stage.root == store.root / "saes" / "sae" / "corpus" / "activations"
    stage.root.mkdir(parents=True)
    assert store.corpora_of("sae") == ["corpus"] and store.corpora_of("none") == []


def test_a_root_under_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match="cannot write to the store .*file/x: Not a directory; .*set store.root to another folder"
    ):
        Store(tmp_path / "file" / "x").require_writable()


def test_a_read_only_root_is_not_writable(store, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        store.require_writable()


def test_asking_whether_a_store_is_writable_leaves_nothing_in_it(store):
    store.require_writable()
    assert list(store.root.iterdir()) == []


def test_two_may_ask_at_once_whether_a_store_is_writable(store, monkeypatch):
    """In containers, both as process 1: the other asks between this one's two steps."""
    plain, asked = Path.write_bytes, []

    def write_and_let_another_ask(path, content):
        plain(path, content)
        if not asked:
            asked.append(path)
            store.require_writable()

    monkeypatch.setattr(Path, "write_bytes", write_and_let_another_ask)
    store.require_writable()
    assert asked and list(store.root.iterdir()) == []
