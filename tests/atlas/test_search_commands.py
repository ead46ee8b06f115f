"""Searches from a shell: further pages, vectors in files, and what is no search."""

import io
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from scopeatlas.api import Atlas
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.hits import FeatureHit
from scopeatlas.atlas.publish import publish
from scopeatlas.cli import cli
from scopeatlas.evidence import read_evidence
from scopeatlas.rendering.features import print_feature, print_hits
from scopeatlas.storage.store import Store
from tests.atlas.conftest import RES, feature_rows
from tests.study.test_similar import D, made


@pytest.fixture
def run(published):
    def _run(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(cli, ["--store", str(published), *arguments], input=stdin, catch_exceptions=False)

    return _run


def test_a_further_page_takes_the_version_that_the_first_one_said(run, published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    first = json.loads(run("--store", str(root), "search", "puppies", "-k", "1", "--json").stdout)
    rows = feature_rows("late-sae-cccc3333", ["puppies"])
    publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    again = ("--store", str(root), "search", "puppies", "-k", "1", "--json")
    assert json.loads(run(*again).stdout)["hits"][0]["sae"] == "late-sae-cccc3333"
    pinned = json.loads(run(*again, "--version", str(first["version"])).stdout)
    assert pinned["hits"] == first["hits"] and pinned["version"] == first["version"]


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--layer", "100000"), ("--where", "f1 > 0.2 -- good"), ("--where", "1=1;x"), ("--where", "1=1) OR (1=1")),
        ("--version", "9999"),
    ],
)
def test_what_cannot_be_asked_ends_in_one_line(run, arguments):
    result = run("search", "dogs", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_bytes_that_are_no_text_end_in_one_line(run):
    result = run("search", "\udcff")
    assert result.exit_code == 2 and "is no text" in result.stderr


def test_only_what_is_found_is_printed(atlas_of, console):
    results = atlas_of.search("birds EARTHQUAKE", k=30)
    print_hits(console, results)
    printed = console.file.getvalue()
    assert 0 < len(results) < len(results.nearest) == 30
    assert [hit.key for hit in results.nearest if f" {hit.key}\n" in printed] == [hit.key for hit in results.hits]
    assert f"{len(results)} of {results.found} features" in results._repr_html_()


def test_what_the_names_in_a_row_hold_is_no_escape_sequence(atlas_of, console, published):
    row = feature_rows(RES).row(0, named=True) | {"model": "toy\x1b[31m", "corpus": "c\x1b[2J", "site": "a\x1b]0;x"}
    hit = FeatureHit.of(row)
    print_feature(console, hit, read_evidence(Store(published), atlas_of.feature(RES, 0)), examples=1)
    assert "\x1b" not in console.file.getvalue() and "toy [31m" in console.file.getvalue()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200, color_system=None)


@pytest.fixture
def atlas_of(published, embedder: Embedder) -> Atlas:
    return Atlas.at(published, embedder=embedder)


@pytest.fixture
def opened(rng, monkeypatch):
    one = made(rng)
    monkeypatch.setattr(Atlas, "open", lambda _self, _sae: one)
    return one


@pytest.mark.parametrize("way", ["npy", "json", "-"])
def test_a_vector_in_a_file_finds_the_decoder_rows_that_point_its_way(run, rng, opened, tmp_path, way):
    vector = rng.normal(size=D)
    decoder = np.stack([opened.dictionary.layers[0].rows(n).float().numpy()[0] for n in range(30)]).astype(np.float64)
    cosines = decoder @ vector / np.linalg.norm(decoder, axis=1)
    file = tmp_path / f"vector.{way}"
    np.save(file, vector) if way == "npy" else file.write_text(json.dumps(vector.tolist()))
    given = ("-", file.read_text()) if way == "-" else (str(file), None)
    found = json.loads(run("search-vector", "toy", given[0], "-k", "4", "--offset", "1", "--json", stdin=given[1]).stdout)
    assert [hit["feature"] for hit in found["hits"]] == np.argsort(-cosines)[1:5].tolist() and found["by"] == "decoder"


@pytest.mark.parametrize("content", ["", "{}", "[1, [2]]", '["a"]', "words"])
def test_a_file_without_a_vector_ends_in_one_line(run, opened, tmp_path, content):
    for name in ("vector.json", "vector.npy"):
        (tmp_path / name).write_text(content)
        result = run("search-vector", "toy", str(tmp_path / name))
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: no vector in {tmp_path / name}: ") and "[0.5, -1]" in result.stderr
    assert "no vector in" in run("search-vector", "toy", str(tmp_path / "nowhere.json")).stderr
