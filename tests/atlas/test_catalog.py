"""The catalog of what was seen: rows written once, by any number of writers, and found by tolerant filters."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import polars as pl
import pytest

from scopeatlas.atlas.catalog import CATALOG, STATES, CatalogRow, Change, mark, read_catalog, record, retire
from scopeatlas.atlas.tables import open_table
from scopeatlas.dictionaries.downloads import fetch_from_hub
from scopeatlas.dictionaries.hub import SeenSae, list_saes
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles
from scopeatlas.dictionaries.releases import describe_sae
from scopeatlas.errors import AtlasError
from tests.hub_server import HubServer, sae_files

RELEASE = "gemma-scope-2-1b-pt"
ROW = CatalogRow(
    RELEASE,
    "resid_post/layer_13_width_16k_l0_medium",
    "ready",
    repo=f"google/{RELEASE}",
    revision="a" * 40,
    kind="sae",
    site="resid_post",
    layers=(13,),
    width=16384,
    target_l0=60.0,
    bytes=151_000_000,
    model="google/gemma-3-1b-pt",
)
CLT = replace(ROW, path="clt/width_262k_l0_big", kind="clt", site="clt", layers=tuple(range(26)), width=262144, state="too_large")
SMALL = replace(ROW, release="gemma-scope-2-270m-it", repo="google/gemma-scope-2-270m-it", model="google/gemma-3-270m-it")
LARGE = replace(ROW, release="gemma-scope-2-12b-pt", repo="google/gemma-scope-2-12b-pt", model="google/gemma-3-12b-pt")
UNKNOWN = CatalogRow("toy", "one", "registered", sae="toy.one.0123abcd")
EVERYTHING = [ROW, CLT, SMALL, LARGE, UNKNOWN]


def version(root) -> int:
    return open_table(root, CATALOG).version


def states(root) -> dict[str, str]:
    frame = read_catalog(root)
    return dict(zip(frame["release"] + "/" + frame["path"], frame["state"], strict=True))


def test_a_catalog_that_was_never_written_is_empty_and_has_its_columns(tmp_path):
    frame = read_catalog(tmp_path, model="gemma-3-1b", site="resid_post", width="16k", kind="sae", state="ready")
    assert frame.is_empty() and {"release", "path", "layers", "width", "state"} <= set(frame.columns)
    assert not list(tmp_path.iterdir())


def test_a_row_comes_back_as_it_was_recorded_with_the_time(tmp_path):
    before = datetime.now(UTC)
    assert record(tmp_path, [ROW, UNKNOWN]) == 2
    found, unknown = read_catalog(tmp_path).to_dicts()
    assert before <= found.pop("updated_at") <= datetime.now(UTC)
    assert CatalogRow(**found | {"layers": tuple(found["layers"])}) == ROW
    assert (unknown["width"], unknown["target_l0"], unknown["layers"]) == (None, None, [])


def test_rows_that_are_as_they_were_write_nothing(tmp_path):
    record(tmp_path, EVERYTHING)
    before, then = version(tmp_path), read_catalog(tmp_path)
    assert record(tmp_path, EVERYTHING) == 0
    assert version(tmp_path) == before
    assert record(tmp_path, [*EVERYTHING[1:], replace(ROW, state="registered", sae="key")]) == 1
    changed = read_catalog(tmp_path).join(then, on=["release", "path", "updated_at"], how="anti")
    assert changed["sae"].to_list() == ["key"]


def test_an_sae_has_one_row_whatever_happens_to_it(tmp_path, rng):
    for state in rng.permutation(STATES):
        record(tmp_path, [replace(ROW, state=str(state), revision=rng.bytes(20).hex())])
        assert read_catalog(tmp_path)["state"].to_list() == [state]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"model": "gemma-3-1b"}, [CLT, ROW]),
        ({"model": "google/gemma-3-1b"}, [CLT, ROW]),
        ({"model": "Gemma-3-1b-PT"}, [CLT, ROW]),
        ({"model": "*-it"}, [SMALL]),
        ({"model": "gemma-3"}, [LARGE, CLT, ROW, SMALL]),
        ({"model": "gemma-3-1"}, []),
        ({"width": "16k"}, [LARGE, ROW, SMALL]),
        ({"width": 262144}, [CLT]),
        ({"model": "gemma-3-1b", "site": "resid_post", "width": "16k"}, [ROW]),
        ({"site": "resid*", "release": "*2-1*"}, [LARGE, ROW]),
        ({"kind": "clt"}, [CLT]),
        ({"state": "registered"}, [UNKNOWN]),
        ({"state": "failed"}, []),
    ],
)
def test_filters_find(tmp_path, filters, expected):
    record(tmp_path, EVERYTHING)
    frame = read_catalog(tmp_path, **filters)
    assert list(zip(frame["release"], frame["path"], strict=True)) == [(row.release, row.path) for row in expected]


def test_a_width_that_is_none_is_refused(tmp_path):
    with pytest.raises(AtlasError, match="'wide' is no width; write 16k"):
        read_catalog(tmp_path, width="wide")


def test_states_are_marked_on_rows_that_exist_and_the_key_stays(tmp_path):
    record(tmp_path, [ROW, SMALL])
    assert mark(tmp_path, {(ROW.release, ROW.path): Change("registered", sae="key")}) == 1
    assert (
        mark(tmp_path, dict.fromkeys([(ROW.release, ROW.path), ("nobody", "knows")], Change("failed", "labels: no documents")))
        == 1
    )
    marked = read_catalog(tmp_path, state="failed").row(0, named=True)
    assert (marked["sae"], marked["reason"], marked["bytes"]) == ("key", "labels: no documents", ROW.bytes)
    assert states(tmp_path)[SMALL.key] == "ready"


def test_a_repo_gone_from_the_hub_is_retired_and_its_rows_stay(tmp_path):
    record(tmp_path, EVERYTHING)
    assert retire(tmp_path, SMALL.repo) == 1
    assert retire(tmp_path, ROW.repo, paths=[CLT.path]) == 1
    assert {key for key, state in states(tmp_path).items() if state == "retired"} == {SMALL.key, CLT.key}
    assert len(read_catalog(tmp_path)) == len(EVERYTHING)


def test_states_and_rows_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(AtlasError, match="no catalog state 'lost'"):
        record(tmp_path, [replace(ROW, state="lost")])
    with pytest.raises(AtlasError, match="no catalog state 'lost'"):
        mark(tmp_path, {(ROW.release, ROW.path): Change("lost")})
    with pytest.raises(AtlasError, match="twice"):
        record(tmp_path, [ROW, replace(ROW, state="failed")])


def test_a_row_says_what_a_poll_saw():
    files = SaeFiles("gemma_scope_2", ROW.path, (f"{ROW.path}/params.safetensors",))
    facts = SaeFacts("sae", "resid_post", (13,), 16384, 60.0, ROW.model)
    seen = SeenSae(ROW.repo, ROW.revision, files, facts, {files.weights[0]: (ROW.bytes, "0" * 64)}, "settling", "wait")
    assert CatalogRow.of_seen(seen) == replace(ROW, state="settling", reason="wait", files=seen.identity)


def test_a_row_says_what_is_on_disk(tmp_path, rng):
    folder = tmp_path / ROW.path
    folder.mkdir(parents=True)
    (folder / "params.safetensors").write_bytes(rng.bytes(300))
    (folder / "config.json").write_text("{}", encoding="utf-8")
    entry = describe_sae(folder, release=RELEASE, path=ROW.path)
    row = CatalogRow.of_entry(entry)
    assert (row.sae, row.bytes, row.state, row.width, row.site) == (entry.key, 302, "registered", 16384, "resid_post")


def test_a_poll_does_not_take_back_what_became_of_the_same_files(tmp_path):
    record(tmp_path, [replace(ROW, files="0a1b", state="published", sae="key")])
    assert record(tmp_path, [replace(ROW, files="0a1b", state="seen", reason="no watch rule wants its path")]) == 0
    record(tmp_path, [replace(ROW, files="2c3d", state="settling")])
    assert read_catalog(tmp_path).select("state", "sae").row(0) == ("settling", "")


def test_an_sae_in_the_hugging_face_cache_has_the_same_files_as_on_the_hub(tmp_path, rng, monkeypatch):
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        sha = hub.commit(ROW.repo, sae_files(rng, ROW.path))
        (seen,) = list_saes(ROW.repo, sha)
        (entry,) = fetch_from_hub(ROW.repo, [ROW.path], cache=tmp_path)
    polled, registered = CatalogRow.of_seen(seen), CatalogRow.of_entry(entry, repo=ROW.repo)
    assert registered == replace(polled, state="registered", sae=entry.key)


WRITER = """
import sys
from pathlib import Path
from scopeatlas.atlas.catalog import CatalogRow, record
root, writer = Path(sys.argv[1]), int(sys.argv[2])
for turn in range(8):
    shared = [CatalogRow("shared", f"{i}", "seen", bytes=writer * 100 + turn) for i in range(20)]
    record(root, [*shared, *(CatalogRow(f"own-{writer}", f"{turn}-{i}", "seen") for i in range(5))])
"""


def test_writers_at_the_same_time_neither_double_nor_lose_a_row(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)]) for i in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    frame = read_catalog(tmp_path)
    assert len(frame) == 20 + 3 * 8 * 5
    assert not frame.select("release", "path").is_duplicated().any()
    assert frame.filter(pl.col("release") == "shared")["bytes"].n_unique() == 1  # one writer's last turn, whole


def test_a_catalog_written_often_stays_small(tmp_path):
    for turn in range(30):
        record(tmp_path, [replace(ROW, path=f"resid_post/{turn}")])
    fragments = open_table(tmp_path, CATALOG).stats()["fragment_stats"]
    assert fragments["num_fragments"] <= 21
    assert len(read_catalog(tmp_path)) == 30
