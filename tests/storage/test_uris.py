"""Places in an object store: the same files, records and layout as in a folder, on a real S3-compatible server."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from scopeatlas.errors import ConfigError, NotReadyError, StoreError, UnknownSaeError
from scopeatlas.storage.files import atomic_path, create_once, file_sha256, locked, read_json, read_json_if_there, write_json
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.segments import append_segment, read_segments
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import folders_in, local_state, location, reaching, read_all, readable, sizes_under
from tests.s3_server import point_at

KEY, OTHER = ShardKey("03", "a" * 64), ShardKey("04", "b" * 64)


@pytest.fixture
def root(s3, request, tmp_path, monkeypatch) -> UPath:
    """An empty place in the bucket."""
    monkeypatch.setenv("SCOPE_ATLAS_STATE", str(tmp_path / "state"))
    place = location(f"{s3}/{request.node.name.replace('[', '-').rstrip(']')}")
    assert isinstance(place, UPath)
    return place


# Places ---------------------------------------------------------------------------------------------------------------


def test_text_without_a_scheme_is_a_folder():
    assert location("a/b") == Path("a/b") and location("file:///a") == Path("/a") and location("~") == Path.home()


def test_a_uri_is_a_place_below_which_slashes_lead(root):
    assert str(root / "a" / "b.json").endswith(f"{root.name}/a/b.json") and str(location(f"{root}/")) == str(root)


@pytest.mark.parametrize("text", ["memory://x", "http://host/x", "s3://", "ftp://host/x"])
def test_a_place_that_other_machines_cannot_share_is_refused(text):
    with pytest.raises(ConfigError, match="give a folder, or a URI as s3://BUCKET/PREFIX"):
        location(text)


def test_a_uri_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="must not carry credentials") as raised:
        location("s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("text", ["s3://bucket/run*", "s3://bucket/what?", "s3://bucket/[a]/b"])
def test_a_uri_that_drivers_would_take_for_a_pattern_is_refused(text):
    with pytest.raises(ConfigError, match="must not contain .*; rename s3://bucket/"):
        location(text)


def test_a_driver_that_is_not_installed_is_named(tmp_path):
    code = "import sys; sys.modules['s3fs'] = None\nfrom scopeatlas.storage.uris import location\nlocation('s3://b/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 'needs a driver that is not installed: pip install "scope-atlas[s3]"' in done.stderr


def test_no_credential_is_in_what_a_place_shows_or_in_what_another_process_is_sent(root):
    import pickle

    assert b"not-to-be-seen" not in pickle.dumps(root) and "not-to-be-seen" not in repr(root)
    write_json(root / "a.json", {"a": 1})
    assert read_json(pickle.loads(pickle.dumps(root)) / "a.json") == {"a": 1}


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_and_nothing_else_does(root):
    with atomic_path(root / "deep" / "a.txt") as path:
        path.write_text("new")
        assert not (root / "deep" / "a.txt").exists()
    assert sizes_under(root, nested=True) == {"deep/a.txt": 3} and not path.exists()


def test_a_failure_while_writing_leaves_the_old_file(root):
    (root / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(root / "a.txt") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert (root / "a.txt").read_text() == "old"


def test_a_full_disk_here_is_not_taken_for_a_full_store(root):
    with pytest.raises(StoreError, match="cannot write /.*a.bin, from where s3://.* is put: No space left.*TMPDIR"):
        with atomic_path(root / "a.bin"):
            raise OSError(28, os.strerror(28))


def test_of_two_who_create_a_file_one_does(root):
    assert create_once(root / "a", b"first") and not create_once(root / "a", b"second")
    assert (root / "a").read_bytes() == b"first"


def test_what_is_not_there_is_told_from_what_is_damaged(root):
    assert read_json_if_there(root / "none.json") is None
    (root / "bad.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="cannot read s3://.*bad.json"):
        read_json_if_there(root / "bad.json")
    with pytest.raises(StoreError, match="cannot read s3://.*none.json"):
        read_json(root / "none.json")


def test_many_files_are_read_in_the_order_asked_for(root):
    for number in range(5):
        (root / f"{number}").write_bytes(bytes([number]))
    paths = [root / name for name in ("3", "none", "0", "4")]
    assert read_all(paths) == [b"\x03", None, b"\x00", b"\x04"]


@pytest.mark.parametrize("rows", [10, 400_000])
def test_pyarrow_polars_and_numpy_read_what_was_written_be_it_fetched_whole_or_by_ranges(root, rng, rows):
    values = rng.integers(0, 2**62, rows)
    with atomic_path(root / "a.parquet") as path:
        pq.write_table(pa.table({"v": values}), path)
    with atomic_path(root / "a.npz") as path, path.open("wb") as stream:
        np.savez(stream, v=values)
    assert np.array_equal(pq.read_table(readable(root / "a.parquet"))["v"].to_numpy(), values)
    assert np.array_equal(pl.read_parquet(readable(root / "a.parquet"))["v"].to_numpy(), values)
    with np.load(readable(root / "a.npz")) as arrays:
        assert np.array_equal(arrays["v"], values)
    assert file_sha256(root / "a.npz") != file_sha256(root / "a.parquet")


def test_a_part_of_a_large_file_is_read_without_fetching_the_rest(root, rng, monkeypatch):
    from s3fs.core import S3File

    fetched = []
    plain = S3File._fetch_range

    def counted(self, start, end):
        fetched.append(end - start)
        return plain(self, start, end)

    with atomic_path(root / "a.parquet") as path:
        pq.write_table(pa.table({"v": rng.integers(0, 2**62, 400_000)}), path, row_group_size=20_000)
    monkeypatch.setattr(S3File, "_fetch_range", counted)
    group = pq.ParquetFile(readable(root / "a.parquet")).read_row_group(7)
    assert group.num_rows == 20_000
    assert 0 < sum(fetched) < (root / "a.parquet").stat().st_size / 5


def test_what_another_process_writes_is_seen_at_once(root):
    assert folders_in(root) == [] and sizes_under(root) == {}
    code = f"from scopeatlas.storage.uris import location; (location('{root}') / 'x' / 'y').write_bytes(b'12')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert folders_in(root) == ["x"] and sizes_under(root / "x") == {"y": 2}


# Locks and logs -------------------------------------------------------------------------------------------------------


def test_a_lock_keeps_other_processes_of_this_machine_out(root):
    with locked(root / "a.lock") as held:
        code = f"""
from scopeatlas.storage.files import locked
from scopeatlas.storage.uris import location
with locked(location('{root}') / 'a.lock', wait=False) as held: print(held)
"""
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert held and other.stdout == "False\n"
    assert sizes_under(root, nested=True) == {}


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_two_servers_with_a_bucket_of_one_name_share_no_state(root, monkeypatch, variable):
    here = local_state(root)
    monkeypatch.setenv(variable, "http://elsewhere")
    assert local_state(root) != here


def test_segments_come_back_in_the_order_of_writing(root):
    assert read_segments(root / "log") == []
    for number in range(12):
        append_segment(root / "log", b"%d" % number)
    assert read_segments(root / "log") == [b"%d" % number for number in range(12)]


def test_writers_at_the_same_time_lose_no_segment(root):
    code = f"""
import sys
from scopeatlas.storage.segments import append_segment
from scopeatlas.storage.uris import location
for number in range(6): append_segment(location('{root}') / 'log', f'{{sys.argv[1]}}{{number}}'.encode())
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = [segment.decode() for segment in read_segments(root / "log")]
    assert [s for s in found if s[0] == "a"] == [f"a{n}" for n in range(6)] and len(found) == 12
    assert [s for s in found if s[0] == "b"] == [f"b{n}" for n in range(6)]


# Records --------------------------------------------------------------------------------------------------------------


def finish(stage: StageFolder, key: ShardKey, content: bytes = b"data"):
    path = stage.data_path(key, ".bin")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return stage.commit(key, [path], {"tokens": 5})


def test_a_shard_is_done_once_its_record_stands_and_its_data_is_whole(root):
    stage = StageFolder(root)
    assert stage.pending([KEY, OTHER]) == [KEY, OTHER] and not stage.is_done(KEY)
    record = finish(stage, KEY)
    path = stage.data_path(KEY, ".bin")
    assert record.files == {path.name: {"bytes": 4, "sha256": file_sha256(path)}}
    assert stage.is_done(KEY) and stage.pending([KEY, OTHER]) == [OTHER] and list(stage.records()) == [record]
    with pytest.raises(NotReadyError, match="shard 04"):
        stage.manifest([KEY, OTHER])
    path.write_bytes(b"dat")
    assert stage.pending([KEY]) == [KEY] and list(stage.records()) == []


def test_a_record_that_exists_wins(root):
    stage = StageFolder(root)
    first = finish(stage, KEY)
    assert stage.commit(KEY, [], {"tokens": 6}) == first


def test_pruning_frees_the_data_and_remembers_that_it_was_made(root):
    stage = StageFolder(root)
    assert stage.prune(finish(stage, KEY, b"12345")) == 5
    assert stage.is_pruned(KEY) and stage.is_done(KEY, or_pruned=True) and not stage.is_done(KEY)
    assert stage.discard(finish(stage, KEY, b"12345")) == 5
    assert sizes_under(root) == {}


# The layout -----------------------------------------------------------------------------------------------------------


def test_a_store_knows_its_saes_their_errors_and_its_size(root):
    store = Store(root)
    store.require_writable()
    assert store.register("a", {"folder": "x"}) and not store.register("a", {"folder": "x"})
    store.record_error("a", "examples", "worse")
    finish(store.stage("a", "corpus", "activations"), KEY, b"12345")
    assert store.registered() == ["a"] and store.entry("a") == {"folder": "x"} and store.errors("a") == {"examples": "worse"}
    assert store.corpora_of("a") == ["corpus"] and store.corpora_of("b") == []
    sizes = sizes_under(root / "saes" / "a", nested=True)
    assert store.bytes_used("saes") == sum(sizes.values()) > sizes["corpus/activations/03-aaaaaaaaaaaaaaaa.bin"] == 5
    with pytest.raises(UnknownSaeError, match="no SAE 'x' in s3://.*; known: a"):
        store.entry("x")


def test_a_bucket_that_is_missing_is_named(s3):
    with pytest.raises(StoreError, match="s3://no-such-bucket/x: The specified bucket does not exist; .*store.root"):
        Store(location("s3://no-such-bucket/x")).require_writable()


USES = {
    "write": lambda store: store.require_writable(),
    "put": lambda store: write_json(store.root / "a.json", {}),
    "list": lambda store: store.registered(),
    "read": lambda store: StageFolder(store.root).is_done(KEY),
}


@pytest.mark.parametrize("use", USES)
def test_a_server_that_cannot_be_reached_is_named(monkeypatch, s3, use):
    before = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    point_at(monkeypatch, "http://127.0.0.1:9")
    try:
        with pytest.raises(StoreError, match=r"s3://.*127.0.0.1:9.*check the network, the bucket's name and the endpoint"):
            USES[use](Store(location(f"{s3}/x")))
    finally:
        point_at(monkeypatch, before)


def test_one_who_may_not_is_told_to_look_at_the_credentials(root):
    with pytest.raises(StoreError, match=r"s3://.*Access Denied; check the credentials in the environment"), reaching(root):
        raise PermissionError("Access Denied")


def test_an_error_of_azures_driver_names_the_place(root, monkeypatch):
    """The driver is not among what the tests install: this is the name of its errors."""
    driver = ModuleType("azure.core.exceptions")
    driver.AzureError = type("AzureError", (Exception,), {})  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, driver.__name__, driver)
    with pytest.raises(StoreError, match="cannot use s3://.*: no such account; check the network"), reaching(root):
        raise driver.AzureError("no such account")
