import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.errors import NotReadyError
from scopeatlas.hypotheses.metrics import constant_f1, lift
from scopeatlas.hypotheses.rules import PAIR, Rule
from scopeatlas.hypotheses.units import Units
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.scoring.stage import METRICS, LabelScores, ScoreSettings, score_labels, score_rules, shuffled_partners
from tests.planted import EXACT, FEW_REPORT, NO_REPORT, SUFFIX, TOPIC, WORDS, Planted, firings_of, planted_chain, texts_of

SETTINGS = ScoreSettings()
RULES = (
    Rule("token", (" the", " of")),
    Rule("word", ("the", "was", "nowhere-in-the-corpus")),
    Rule("previous", (" of", ",")),
    Rule("next", (" of", ".")),
    Rule("bigram", (f" in{PAIR} the", f" of{PAIR} the")),
    Rule("prefix", ("re", "rec", "con")),
    Rule("suffix", ("ing", "ed", "ted")),
    Rule("topic", ("war", "music", "city")),
    Rule("topic", ("also",)),
)


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="module")
def contexts(medium_corpus, subject, units) -> list[tuple[int, np.ndarray, list[str]]]:
    """The contexts of report documents: number, positions in the context, texts."""
    is_report = units.context_split == SPLITS.index("report")
    numbered = enumerate(texts_of(medium_corpus, subject))
    return [(number, at, texts) for number, (at, texts) in numbered if is_report[number]]


@pytest.fixture(scope="module")
def labelled(medium, subject, tmp_path_factory) -> Planted:
    """Features whose firings are known, labelled by rules. Copy the store before changing it."""
    planted = planted_chain(medium, subject, tmp_path_factory.mktemp("scored") / "store")
    label_features(planted.store, planted.corpus, planted.entry, subject, settings=LabelSettings())
    return planted


def score(planted: Planted, subject, settings: ScoreSettings = SETTINGS) -> tuple[LabelScores, bool]:
    return score_labels(planted.store, planted.corpus, planted.entry, subject, labels=LabelSettings(), settings=settings)


@pytest.fixture(scope="module")
def scores(labelled, subject) -> dict[int, dict]:
    """The row of each scored or refused label, by feature."""
    return {row["feature"]: row for row in score(labelled, subject)[0].table.iter_rows(named=True)}


def random_firings(units: Units, rng: np.random.Generator, count: int):
    """Features that fire at random, each in its own density."""
    counted = np.flatnonzero(units.counted)
    positions = [rng.choice(counted, int(size), replace=False) for size in rng.integers(100, 3000, count)]
    return firings_of(positions, count)


def test_scores_agree_with_a_recount_token_by_token(units, contexts, rng):
    firings = random_firings(units, rng, len(RULES))
    table = score_rules(units, firings.within(units, "report"), dict(enumerate(RULES)), SETTINGS)
    for feature, rule in enumerate(RULES):
        fires_at = set(firings.position[firings.feature == feature].tolist())
        fired, claimed = [], []
        for number, at, texts in contexts:
            fires = [number * units.length + int(offset) in fires_at for offset in at]
            matches = rule.matches(texts)
            fired += [any(fires)] if rule.unit == "context" else fires
            claimed += [any(matches)] if rule.unit == "context" else matches
        hits = sum(f and c for f, c in zip(fired, claimed, strict=True))
        quiet = sum(not f and not c for f, c in zip(fired, claimed, strict=True))
        row = table.row(feature, named=True)
        assert (row["unit"], row["fired"], row["claimed"], row["true_positive"]) == (rule.unit, sum(fired), sum(claimed), hits)
        recall = hits / sum(fired)
        expected = {
            "precision": hits / sum(claimed) if sum(claimed) else 0,
            "recall": recall,
            "f1": 2 * hits / (sum(fired) + sum(claimed)),
            "balanced_accuracy": (recall + quiet / (len(fired) - sum(fired))) / 2 if sum(fired) < len(fired) else recall / 2,
            "constant_f1": float(constant_f1(np.array(sum(fired)), np.array(len(fired)))),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        gained = float(lift(np.array(expected["f1"]), np.array(sum(fired)), np.array(len(fired))))
        assert row["lift"] == pytest.approx(gained, abs=1e-5)


def test_the_documents_a_feature_fires_in_are_counted(units, rng):
    firings = random_firings(units, rng, len(RULES))
    report = firings.within(units, "report")
    table = score_rules(units, report, dict(enumerate(RULES)), SETTINGS)
    expected = [len(set(units.document[report.position[report.feature == f]])) for f in range(len(RULES))]
    assert table["documents"].to_list() == expected


def test_intervals_contain_the_point_estimate(units, rng):
    rules = {feature: RULES[feature % len(RULES)] for feature in range(40)}
    firings = random_firings(units, rng, 40)
    table = score_rules(units, firings.within(units, "report"), rules, SETTINGS).filter(pl.col("true_positive") >= 10)
    assert len(table) > 10
    for name in METRICS:
        assert table.filter(~pl.col(name).is_between(f"{name}_low", f"{name}_high")).is_empty()
        assert (table[f"{name}_low"] < table[f"{name}_high"]).mean() > 0.9


def test_other_seeds_draw_other_intervals_around_the_same_estimate(units, rng):
    report = random_firings(units, rng, len(RULES)).within(units, "report")
    one, two = (score_rules(units, report, dict(enumerate(RULES)), ScoreSettings(seed=seed)) for seed in (0, 1))
    assert one["f1"].equals(two["f1"]) and not one["f1_low"].equals(two["f1_low"])


def test_the_control_is_another_features_rule_and_never_the_same_one():
    rules = {feature: Rule("token", (" the",)) for feature in range(20)} | {77: Rule("token", (" of",))}
    for seed in range(20):
        partners = shuffled_partners(sorted(rules), rules, seed=seed)
        assert partners.keys() == rules.keys()
        assert all(partners[feature] != rules[feature] and partners[feature] in rules.values() for feature in rules)


def test_the_control_is_tested_on_the_units_of_the_rule():
    rules = {feature: Rule("token", (f" {feature}",)) for feature in range(10)}
    rules |= {feature: Rule("topic", (f"{feature}",)) for feature in (20, 21)}
    for seed in range(20):
        partners = shuffled_partners(sorted(rules), rules, seed=seed)
        assert all(partners[feature].unit == rules[feature].unit for feature in rules)


def test_a_rule_alone_of_its_unit_is_controlled_by_one_of_the_other():
    rules = {0: Rule("token", (" the",)), 1: Rule("topic", ("war",)), 2: Rule("token", (" of",))}
    assert shuffled_partners([0, 1, 2], rules, seed=0)[1].unit == "token"


def test_where_all_rules_are_the_same_the_control_is_that_rule():
    rules = {feature: Rule("token", (" the",)) for feature in range(3)}
    assert shuffled_partners(sorted(rules), rules, seed=0) == rules
    assert shuffled_partners([5], {5: rules[0]}, seed=0) == {5: rules[0]}


def test_the_control_is_scored_as_its_rule_would_be(units, rng):
    firings = random_firings(units, rng, len(RULES)).within(units, "report")
    rules = dict(enumerate(RULES))
    partners = shuffled_partners(sorted(rules), rules, seed=SETTINGS.seed)
    own, control = score_rules(units, firings, rules, SETTINGS), score_rules(units, firings, partners, SETTINGS)
    for name in ("", "_low", "_high"):
        assert own[f"shuffled_f1{name}"].to_list() == control[f"f1{name}"].to_list()


def test_feature_tiles_change_no_score(units, rng, monkeypatch):
    firings = random_firings(units, rng, len(RULES)).within(units, "report")
    whole = score_rules(units, firings, dict(enumerate(RULES)), SETTINGS)
    monkeypatch.setattr("scopeatlas.scoring.stage.TILE_FEATURES", 4)
    assert score_rules(units, firings, dict(enumerate(RULES)), SETTINGS).equals(whole)


def test_an_sae_without_a_rule_has_no_scores(units, rng):
    table = score_rules(units, random_firings(units, rng, 3).within(units, "report"), {}, SETTINGS)
    full = score_rules(units, random_firings(units, rng, 3).within(units, "report"), {0: RULES[0]}, SETTINGS)
    assert table.is_empty() and table.schema == full.schema


def test_a_feature_that_fires_exactly_on_its_token_scores_one(scores):
    exact = scores[EXACT]
    assert (exact["status"], exact["fired"], exact["claimed"]) == ("scored", exact["true_positive"], exact["true_positive"])
    for name in METRICS:
        assert [exact[f"{name}{part}"] for part in ("", "_low", "_high")] == [1, 1, 1]
    assert exact["lift"] == pytest.approx(1)
    assert exact["shuffled_f1"] < 0.05 and exact["shuffled_f1_high"] < 0.1


def test_features_that_mostly_follow_their_rule_score_high_and_their_controls_low(scores):
    assert all(scores[f]["f1"] > 0.8 and scores[f]["shuffled_f1"] < 0.2 for f in (WORDS, SUFFIX))


def test_a_topic_is_tested_on_contexts(scores, units):
    topic = scores[TOPIC]
    assert topic["unit"] == "context" and topic["claimed"] <= (units.context_split == SPLITS.index("report")).sum()
    assert {row["unit"] for feature, row in scores.items() if feature != TOPIC} == {"token"}


@pytest.mark.parametrize(("feature", "documents"), [(FEW_REPORT, 2), (NO_REPORT, 0)])
def test_a_feature_in_too_few_report_documents_is_refused(scores, feature, documents):
    row = scores[feature]
    assert (row["status"], row["documents"]) == ("too_few_documents", documents)
    measured = [name for name in row if name.startswith(METRICS) or name in {"lift", "constant_f1"} or "shuffled" in name]
    assert len(measured) == 17 and all(row[name] is None for name in measured)


def test_with_fewer_documents_asked_for_it_is_scored(labelled, subject, tmp_path):
    lenient = score(labelled.copy(tmp_path / "store"), subject, ScoreSettings(min_report_documents=2))[0]
    row = lenient.table.row(by_predicate=pl.col("feature") == FEW_REPORT, named=True)
    assert row["status"] == "scored" and row["recall"] == 1 and row["precision"] < 0.5


def test_only_rule_labels_are_scored(scores, labelled, subject):
    labels, _ = label_features(labelled.store, labelled.corpus, labelled.entry, subject, settings=LabelSettings())
    assert set(scores) == set(labels.table.filter(pl.col("rule") != "")["feature"])
    assert {row["method"] for row in scores.values()} == {"rule"}


def test_scores_are_reused_when_nothing_changed(labelled, subject, scores):
    again, reused = score(labelled, subject)
    assert reused and again.table.rows(named=True) == list(scores.values())


def test_new_settings_write_a_new_generation_and_keep_the_old(labelled, subject, scores, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    found, reused = score(copy, subject, ScoreSettings(seed=1))
    names = {record.key.identity for record in copy.store.stage(copy.entry.key, copy.corpus.id, "scores").records()}
    assert not reused and len(names) == 2 and found.key.identity in names and score(copy, subject)[1]


def test_scoring_changes_no_label(labelled, subject, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    stage = copy.store.stage(copy.entry.key, copy.corpus.id, "labels")
    before = {path.name: path.read_bytes() for path in stage.root.iterdir()}
    score(copy, subject, ScoreSettings(seed=2))
    assert {path.name: path.read_bytes() for path in stage.root.iterdir()} == before


def test_scores_are_not_ready_while_labels_are_missing(labelled, subject, tmp_path):
    copy = labelled.copy(tmp_path / "store")
    stage = copy.store.stage(copy.entry.key, copy.corpus.id, "labels")
    stage.discard(next(stage.records()))
    with pytest.raises(NotReadyError, match="has no labels to score with these settings"):
        score(copy, subject, ScoreSettings(seed=3))
