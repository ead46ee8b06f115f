"""Two SAEs with the same planted features at different places, both labelled, scored and published for real."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from scopeatlas.api import Atlas, open_atlas
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.stage import index_features
from scopeatlas.cli import cli
from scopeatlas.errors import AtlasError, LeakError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.units import Firings
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.study import transfer as transfers
from scopeatlas.study.compare import compare
from scopeatlas.study.diff import Diff, diff
from scopeatlas.study.matching import match
from scopeatlas.study.shared_tokens import share_tokens
from scopeatlas.study.transfer import TRANSFER_SCHEMA, shown_labels, transfer
from tests.conftest import WIDTH, Stored
from tests.planted import DEAD, EXACT, RANDOM, SUFFIX, WORDS, Planted, mined_again, plant, planted_chain
from tests.study.opened import copied, dense_correlations, opened, write_labels

BY = 20
"""How much further on a feature of the first SAE lies in the second."""


@pytest.fixture(scope="module")
def two(medium, two_saes, subject, tmp_path_factory) -> Planted:
    """The store of both; entries are both SAEs, firings those of the first."""
    root = tmp_path_factory.mktemp("two") / "store"
    first = planted_chain(replace(medium, entries=two_saes[:1]), subject, root)
    moved = replace(first.firings, feature=first.firings.feature + np.uint32(BY))
    second = replace(medium, entries=two_saes[1:])
    mined_again(second, subject, first.units, moved, root)
    labels, scores = LabelSettings(), ScoreSettings()
    for entry in two_saes:
        first.store.register(entry.key, entry.as_json())
        there = first.store, first.corpus, entry, subject
        label_features(*there, settings=labels)
        score_labels(*there, labels=labels, settings=scores)
        index_features(*there, embedder=Embedder(), labels=labels, scores=scores)
    return replace(first, entries=two_saes)


@pytest.fixture(scope="module")
def atlas(two, subject) -> Atlas:
    return open_atlas(two.store.root, subject=subject)


@pytest.fixture(scope="module")
def found(atlas, two) -> Diff:
    return atlas.diff(two.entries[0].key, two.entries[1].key, transfer_labels=True)


@pytest.fixture(scope="module")
def pair(atlas, two):
    return tuple(atlas.open(entry.key) for entry in two.entries)


def test_a_transferred_rule_has_its_own_score_on_the_match_equal_to_that_of_a_perfect_copy(found):
    table = found.transferred
    assert table.schema == TRANSFER_SCHEMA
    assert table.filter(pl.col("feature_b") != pl.col("feature_a") + BY).is_empty()
    assert {EXACT, WORDS, SUFFIX} <= set(table["feature_a"].to_list())
    scored = table.filter(outcome="scored")
    assert scored["f1"].to_list() == pytest.approx(scored["f1_on_a"].to_list(), abs=1e-6)
    exact = table.row(by_predicate=pl.col("feature_a") == EXACT, named=True)
    assert exact["f1"] == 1.0 and exact["shuffled_f1"] < 0.1 and exact["f1_low"] <= 1.0 <= exact["f1_high"]
    assert exact["label"] == exact["label_b"] != ""


def test_a_label_that_does_not_fit_its_match_says_so(two, subject, pair):
    matching = match(*pair)
    wrong = {EXACT: WORDS + BY, WORDS: EXACT + BY}
    crossed = matching.features.with_columns(
        nearest=pl.when(pl.col("side") == "a").then(pl.col("feature").replace(wrong) + 0).otherwise("nearest")
    )
    crossed = crossed.with_columns(
        nearest=pl.when((pl.col("side") == "a") & ~pl.col("feature").is_in(list(wrong)))
        .then(pl.col("feature") + BY)
        .otherwise("nearest")
    )
    table = transfer(*pair, replace(matching, features=crossed))
    scores = {row["feature_a"]: (row["f1"], row["f1_on_a"]) for row in table.iter_rows(named=True)}
    for feature in wrong:
        assert scores[feature][0] < 0.1 < 0.8 < scores[feature][1]


def test_labels_are_tested_on_documents_that_matches_were_not_chosen_on(pair, found, two):
    tested = set(share_tokens(*pair, splits=transfers.TESTED_ON).documents)
    assert tested and not tested & found.matching.documents
    some = replace(found.matching, documents=found.matching.documents | {min(tested)})
    with pytest.raises(LeakError, match="would test their labels"):
        transfer(*pair, some)


def test_what_fires_outside_report_documents_does_not_change_a_transferred_score(two, subject, pair, found, tmp_path):
    inside = two.units.in_split("report")[two.firings.position]
    only = Firings(
        two.firings.feature[inside] + np.uint32(BY), two.firings.position[inside], WIDTH, value=two.firings.value[inside]
    )
    root = tmp_path / "store"
    other = copied(two, root)
    plant(replace(other, entries=two.entries[1:]), subject, two.units, only, root)
    changed = [replace(sae, store=other.store) for sae in pair]
    assert transfer(*changed, found.matching).equals(found.transferred)


def test_a_label_of_text_alone_is_not_tested_and_one_on_too_few_documents_neither(two, subject, pair, found, tmp_path):
    text = Label(RANDOM, "llm", "ok", label="nothing in particular", reads="nothing in particular")
    ruled = next(label for label in shown_labels(pair[0]) if label.feature == EXACT)
    stored = copied(two, tmp_path / "store")
    write_labels(stored, two.entries[0], [text, ruled])
    first = opened(stored, two.entries[0], subject, {RANDOM: text, EXACT: ruled})
    matched = found.features.select(found.matching.features.columns).with_columns(
        status=pl.when(pl.col("feature").is_in([RANDOM, EXACT]) & (pl.col("side") == "a"))
        .then(pl.lit("kept"))
        .otherwise(pl.lit("silent")),
        nearest=pl.when(pl.col("feature") == EXACT).then(pl.lit(NO_REPORT_PLACE)).otherwise(pl.col("feature") + BY),
    )
    table = transfer(first, replace(pair[1], store=stored.store), replace(found.matching, features=matched))
    outcomes = {row["feature_a"]: (row["outcome"], row["f1"]) for row in table.iter_rows(named=True)}
    assert outcomes == {RANDOM: ("not_tested", None), EXACT: ("too_few_documents", None)}


NO_REPORT_PLACE = 9 + BY
"""Of the planted feature that fires in no report document, in the second SAE."""


def test_a_diff_names_everything(found, two):
    frame = found.to_polars()
    assert frame.height == 2 * WIDTH and found.counts["a"].sum() == WIDTH
    row = frame.row(by_predicate=(pl.col("side") == "b") & (pl.col("feature") == EXACT + BY), named=True)
    assert row["key"] == f"{two.entries[1].key}/{EXACT + BY}" and row["status"] == "kept" and row["partners"] == [EXACT]
    assert row["partner_labels"] == [row["label"]] == [row["nearest_label"]]
    dead = frame.filter(side="a").row(DEAD, named=True)
    assert (dead["status"], dead["partner_labels"], dead["nearest_label"]) == ("silent", [], None)


def test_a_diff_is_json_a_picture_and_a_page(found):
    body = json.loads(json.dumps(found.as_dict()))
    assert len(body["features"]) == 2 * WIDTH and body["counts"] == found.counts.to_dicts()
    assert len(body["transferred"]) == found.transferred.height
    best, flow = found.plot().axes
    assert any("chance" in text.get_text() for text in best.texts)
    shown = " ".join(text.get_text() for text in flow.texts)
    assert all(f"{row['status']} {row['a']}" in shown for row in found.counts.iter_rows(named=True) if row["a"] > 0.03 * WIDTH)
    assert "<table>" in found._repr_html_() and "data:image/png" in found._repr_html_()


def test_without_transfer_no_label_is_tested(pair, monkeypatch):
    monkeypatch.setattr("scopeatlas.study.diff.transfer", lambda *_args, **_kwargs: pytest.fail("tested"))
    assert diff(*pair).transferred is None


def test_two_features_that_are_the_same_agree_in_everything_that_fires(atlas, two):
    seen = atlas.compare(two.entries[0].key, EXACT, two.entries[1].key, EXACT + BY)
    assert seen.correlation == pytest.approx(1.0, abs=0.2) and seen.jaccard == 1.0 and seen.tokens_a == seen.tokens_b == seen.both
    assert seen.label_cosine == pytest.approx(1.0, abs=1e-3) and seen.label_a == seen.label_b
    rules = {(row["rule_of"], row["on"]): row["f1"] for row in seen.rules.iter_rows(named=True)}
    assert rules == dict.fromkeys([("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")], 1.0)


def test_a_comparison_says_what_dense_rows_say(pair):
    a, b = (int(f) for f in (WORDS, SUFFIX + BY))
    shared = share_tokens(*pair, splits=("explain", "select"))
    seen = compare(pair[0], a, pair[1], b)
    assert seen.correlation == pytest.approx(dense_correlations(shared.a, shared.b)[a, b], abs=1e-9)
    fires = shared.a.fires.toarray()[a] > 0, shared.b.fires.toarray()[b] > 0
    assert (seen.tokens_a, seen.tokens_b, seen.both) == (fires[0].sum(), fires[1].sum(), (fires[0] & fires[1]).sum())
    row = pair[0].dictionary.steering_vector(a), pair[1].dictionary.steering_vector(b)
    assert seen.cosine == pytest.approx(float(row[0] @ row[1] / row[0].norm() / row[1].norm()), abs=1e-6)
    assert seen.label_cosine is None


def test_a_rule_scores_on_its_own_feature_as_it_is_published(pair, two):
    seen = compare(pair[0], WORDS, pair[1], EXACT + BY)
    own = seen.rules.row(by_predicate=(pl.col("rule_of") == "a") & (pl.col("on") == "a"), named=True)
    published = pair[0].rows.row(WORDS, named=True)
    assert (own["f1"], own["f1_low"], own["f1_high"]) == pytest.approx(
        [published[n] for n in ("f1", "f1_low", "f1_high")], abs=1e-6
    )
    crossed = seen.rules.row(by_predicate=(pl.col("rule_of") == "a") & (pl.col("on") == "b"), named=True)
    assert crossed["f1"] < 0.1


def test_a_feature_that_never_fires_correlates_with_nothing_and_has_no_rule(atlas, two):
    seen = atlas.compare(two.entries[0].key, DEAD, two.entries[1].key, DEAD + BY)
    assert seen.correlation is None and seen.rules.is_empty() and seen.jaccard == 0.0
    assert seen.to_polars().height == 1


def test_features_without_labels_are_compared_without_the_embedder(two, subject, monkeypatch):
    def refused(_atlas: Atlas) -> Embedder:
        raise AtlasError("another embedder")

    monkeypatch.setattr(Atlas, "_checked_embedder", refused)
    atlas, keys = open_atlas(two.store.root, subject=subject), [entry.key for entry in two.entries]
    assert atlas.compare(keys[0], DEAD, keys[1], DEAD + BY).label_cosine is None
    with pytest.raises(AtlasError, match="another embedder"):
        atlas.compare(keys[0], EXACT, keys[1], EXACT + BY)


def test_an_unknown_feature_is_named(atlas, two):
    with pytest.raises(AtlasError, match="no feature 5000"):
        atlas.compare(two.entries[0].key, 5000, two.entries[1].key, 0)


def run(two: Stored, subject, monkeypatch, *arguments: str):
    monkeypatch.setattr("scopeatlas.study.opening.SubjectModel.from_recipe", lambda *_args, **_kwargs: subject)
    return CliRunner().invoke(cli, ["--store", str(two.store.root), *arguments], catch_exceptions=False)


def test_the_diff_command_prints_counts_examples_and_transferred_labels(two, subject, monkeypatch, tmp_path):
    picture = tmp_path / "diff.png"
    keys = [entry.key for entry in two.entries]
    done = run(two, subject, monkeypatch, "diff", *keys, "--transfer", "--plot", str(picture))
    assert done.exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for text in (*keys, "kept", "silent", "none of the report split", "labels of a on their matches in b"):
        assert text in done.output


def test_the_diff_command_prints_json(two, subject, monkeypatch, found):
    done = run(two, subject, monkeypatch, "diff", *(entry.key for entry in two.entries), "--json")
    body = json.loads(done.stdout)
    assert body["counts"] == found.counts.to_dicts() and body["transferred"] is None


def test_the_compare_command_prints_both_labels_and_every_rule(two, subject, monkeypatch):
    names = two.entries[0].key, str(EXACT), two.entries[1].key, str(WORDS + BY)
    done = run(two, subject, monkeypatch, "compare", *names)
    assert done.exit_code == 0 and "decoder cosine" in done.output and done.output.count("1.00 [1.00, 1.00]") == 1
    body = json.loads(run(two, subject, monkeypatch, "compare", *names, "--json").stdout)
    assert body["a"] == f"{names[0]}/{EXACT}" and len(body["rules"]) == 4


def test_the_compare_command_refuses_what_is_no_feature(two, subject, monkeypatch):
    done = run(two, subject, monkeypatch, "compare", two.entries[0].key, "seven", two.entries[1].key, "1")
    assert done.exit_code == 2 and "neither a feature's number" in done.output
