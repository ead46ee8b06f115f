"""Parquet tables and the Hugging Face dataset folder: nothing is lost on the way out and back in."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
import yaml

from scopeatlas.atlas.search import open_reader
from scopeatlas.errors import ExchangeError
from scopeatlas.evidence import read_evidence
from scopeatlas.exchange.columns import MEANINGS, TABLES
from scopeatlas.exchange.hub_dataset import export_dataset, import_dataset, read_dataset
from scopeatlas.exchange.tables import check_manifest, export_parquet, read_published, write_manifest
from scopeatlas.mining.examples import read_examples
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable


@pytest.fixture(scope="module", params=[0, 1], ids=["sae", "crosscoder"])
def number(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(built, number, tmp_path_factory) -> Path:
    return export_dataset(
        built.atlas, built.entries[number].key, tmp_path_factory.mktemp("dataset") / "out", licence="cc-by-4.0", title="Toys"
    )


@pytest.fixture(scope="module")
def published(built, number):
    return read_published(built.atlas, built.entries[number].key)


@pytest.fixture(scope="module")
def elsewhere(folder, embedder, tmp_path_factory) -> Store:
    """Another store, into which the dataset was brought."""
    store = Store(tmp_path_factory.mktemp("elsewhere") / "store")
    import_dataset(store, folder, embedder=embedder)
    return store


def test_every_table_is_read_back_row_for_row(folder, published):
    tables = read_dataset(folder).tables
    assert tables.keys() == TABLES.keys()
    assert tables["features"].equals(published.rows) and tables["features"].schema == published.rows.schema
    assert tables["labels"].equals(published.labels) and tables["scores"].equals(published.scores)
    assert tables["examples"].equals(read_examples(published.examples.examples))
    assert tables["statistics"].equals(published.examples.features)
    assert tables["histogram"].equals(pl.read_parquet(readable(published.examples.histogram)))
    assert tables["coactivation"].equals(pl.read_parquet(readable(published.examples.partners)))
    assert tables["falsification"].equals(published.side_table("labels", ".falsification.parquet"))
    assert tables["outcomes"].equals(published.side_table("scores", ".outcomes.parquet"))


def test_parquet_alone_holds_the_same_tables(built, folder, number, tmp_path):
    out = export_parquet(built.atlas, built.entries[number].key, tmp_path / "out")
    dataset = read_dataset(folder)
    assert {
        name: pl.read_parquet(out / f"{name}.parquet").equals(table) for name, table in dataset.tables.items()
    } == dict.fromkeys(TABLES, True)
    assert json.loads((out / "provenance.json").read_text("utf-8")) == dataset.provenance
    assert {f"{name}.parquet" for name in TABLES} | {"provenance.json", "SCHEMA.md"} == set(check_manifest(out))


def test_every_column_has_its_meaning_in_the_schema(folder):
    card = (folder / "README.md").read_text("utf-8")
    for name, table in read_dataset(folder).tables.items():
        assert f"### {name}.parquet" in card
        for column in table.columns:
            assert MEANINGS.get(column) and re.search(rf"^\| {column} \| [^|]+ \| [^| ]+", card, re.MULTILINE), column


def test_datasets_opens_every_table_offline(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    filled = {name: table for name, table in read_dataset(folder).tables.items() if len(table)}
    assert len(filled) > 5
    for name, table in filled.items():
        opened = datasets.load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path))
        assert (len(opened), opened.column_names) == (len(table), table.columns)
    features = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert features["key"][:] == read_dataset(folder).tables["features"]["key"].to_list()


def test_the_card_says_what_how_scored_how_many_and_under_which_licence(folder, published):
    front, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)[1:]
    head = yaml.safe_load(front)
    assert (head["license"], head["pretty_name"]) == ("cc-by-4.0", "Toys")
    assert [config["config_name"] for config in head["configs"] if config["default"]] == ["features"]
    assert f"the {len(published.rows):,} features of `{published.key}`" in body and published.corpus in body
    for status, count in published.rows["status"].value_counts().iter_rows():
        assert f"| {status} | {count:,} |" in body
    assert "## How labels were scored" in body and "## Limits" in body


def test_a_dataset_brought_into_another_store_is_the_same_atlas(elsewhere, published, embedder, built, number):
    atlas = open_reader(elsewhere.root, embedder=embedder)
    there = read_published(atlas, published.key)
    assert there.rows.equals(published.rows)
    assert there.labels.equals(published.labels) and there.scores.equals(published.scores)
    assert read_examples(there.examples.examples).equals(read_examples(published.examples.examples))
    for feature in (0, len(published.rows) - 1):
        name = published.rows["key"][feature].rpartition("/")[2]
        here, away = built.atlas.feature(published.key, name), atlas.feature(published.key, name)
        assert away == here
        mine, theirs = read_evidence(built.store, here), read_evidence(elsewhere, away)
        assert theirs.windows == mine.windows and theirs.scores.equals(mine.scores) and theirs.partners.equals(mine.partners)
        assert theirs.labels.equals(mine.labels) and theirs.outcomes.equals(mine.outcomes)


def test_what_is_exported_again_from_there_is_the_same(elsewhere, folder, published, embedder, tmp_path):
    again = export_dataset(open_reader(elsewhere.root, embedder=embedder), published.key, tmp_path / "again", licence="cc-by-4.0")
    one, two = read_dataset(folder), read_dataset(again)
    assert all(two.tables[name].equals(one.tables[name]) for name in TABLES)
    stages = {name: record["key"] for name, record in one.provenance["stages"].items()}
    assert {name: record["key"] for name, record in two.provenance["stages"].items()} == stages
    assert two.provenance["sae"] == one.provenance["sae"] and two.provenance["subject"] == one.provenance["subject"]


def test_bringing_it_in_again_changes_nothing(elsewhere, folder):
    again = import_dataset(elsewhere, folder)
    assert again.reused


def test_the_store_that_it_came_from_keeps_what_it_knows(fresh, folder, number, embedder):
    before = fresh.store.entry(fresh.entries[number].key)
    assert import_dataset(fresh.store, folder, embedder=embedder).reused
    assert fresh.store.entry(fresh.entries[number].key) == before and before["root"]


@pytest.mark.parametrize("damage", ["changed", "missing", "unfinished", "newer"])
def test_a_folder_that_is_not_what_was_written_is_refused(built, tmp_path, damage):
    folder = export_dataset(built.atlas, built.entry.key, tmp_path / "out")
    table, manifest = folder / "data" / "labels.parquet", folder / "manifest.json"
    if damage == "changed":
        table.write_bytes(table.read_bytes()[:-1] + b"x")
    elif damage == "missing":
        table.unlink()
    elif damage == "unfinished":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text("utf-8").replace('"format": 1', '"format": 2'), encoding="utf-8")
    said = {"changed": "is not what", "missing": "is missing", "unfinished": "did not finish", "newer": "or a later one"}
    with pytest.raises(ExchangeError, match=said[damage]):
        read_dataset(folder)


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/x", "other.sae", ""])
def test_a_folder_cannot_name_places_outside_its_own_rows(built, tmp_path, embedder, name):
    folder = export_dataset(built.atlas, built.entry.key, tmp_path / "out")
    path = folder / "provenance.json"
    body = json.loads(path.read_text("utf-8"))
    body["sae"]["key"] = name
    path.write_text(json.dumps(body), encoding="utf-8")
    write_manifest(folder, {}, files=[p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"])
    with pytest.raises(ExchangeError, match="is not of the rows beside it"):
        import_dataset(Store(tmp_path / "store"), folder, embedder=embedder)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("export", [export_parquet, export_dataset])
def test_a_folder_that_holds_files_is_left_alone(built, tmp_path, export):
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ExchangeError, match="holds files already; delete it or name another folder"):
        export(built.atlas, built.entry.key, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
