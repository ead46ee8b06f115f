import hashlib
import math
import os

import pytest

from scopeatlas.errors import StoreError
from scopeatlas.storage.files import atomic_path, content_hash, file_sha256, read_json, stable_id, unit_hash, write_json


def test_a_file_appears_whole_and_nothing_else_does(tmp_path):
    with atomic_path(tmp_path / "deep" / "a.txt") as path:
        path.write_text("new")
        assert not (tmp_path / "deep" / "a.txt").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_failure_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write .*file/x.json: .*; make the folder writable or set another store"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(StoreError, match="cannot write .*a.bin: No space left on device; free space"):
        with atomic_path(tmp_path / "a.bin"):
            raise OSError(28, os.strerror(28))


def test_json_reads_back_and_is_written_the_same_whatever_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None], "a": "ü"})
    write_json(tmp_path / "b.json", {"a": "ü", "b": [1, None]})
    assert read_json(tmp_path / "a.json") == {"a": "ü", "b": [1, None]}
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StoreError, match="cannot read .*a.json"):
        read_json(tmp_path / "a.json")


def test_a_file_is_hashed_whole_however_long(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_content_hash_follows_the_data_and_not_the_order_of_keys():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    hashes = {content_hash(*parts) for parts in (("a", "b"), ("ab",), (["a", "b"],), ("b", "a"), ("a", "b", None))}
    assert len(hashes) == 5


def test_unit_hashes_are_uniform_and_independent_between_salts():
    ours, theirs = ([unit_hash(salt, str(i)) for i in range(5000)] for salt in ("a", "b"))
    assert 0 <= min(ours) and max(ours) < 1 and abs(sum(ours) / 5000 - 0.5) < 0.02
    covariance = sum((x - 0.5) * (y - 0.5) for x, y in zip(ours, theirs, strict=True)) / 5000
    assert abs(covariance * 12) < 4 / math.sqrt(5000)


def test_stable_ids_fit_a_signed_column_and_differ():
    ids = {stable_id("context", str(i)) for i in range(5000)}
    assert len(ids) == 5000 and 0 <= min(ids) and max(ids) < 2**63
