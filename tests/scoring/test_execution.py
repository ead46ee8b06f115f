import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.rules import PAIR, Rule
from scopeatlas.hypotheses.samples import trigger_tokens
from scopeatlas.hypotheses.units import Firings
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.scoring.execution import execute_rules
from scopeatlas.scoring.random_directions import random_direction_rows
from scopeatlas.scoring.table import SCORE_SCHEMA, score_table
from tests.planted import firings_of, matching

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


def label_of(feature: int, rule: Rule, **more) -> Label:
    return Label(feature, "rule", "ok", rule.short(), rule.sentence(), rule=rule.to_json(), version="rule:test", **more)


LABELS = [label_of(feature, rule) for feature, rule in enumerate(RULES)]


def execute(units, firings: Firings, labels=None, *, neighbours=None, min_documents=3, seed=0) -> dict[tuple[str, str], dict]:
    """The rows, by label and arm."""
    found = execute_rules(
        units, firings, LABELS if labels is None else labels, neighbours=neighbours, min_documents=min_documents, seed=seed
    )
    table = score_table(found)
    assert len(table) == table.select("label_id", "arm").n_unique()
    return {(row["label_id"], row["arm"]): row for row in table.iter_rows(named=True)}


def recounted(units, contexts, firings: Firings, feature: int, rule: Rule) -> tuple[list[bool], list[bool], list[int]]:
    """Whether each unit of the report documents fires and is claimed, and its first position: one at a time."""
    fires_at = set(firings.position[firings.feature == feature].tolist())
    fired, claimed, places = [], [], []
    for number, at, texts in contexts:
        fires = [number * units.length + int(offset) in fires_at for offset in at]
        matches = rule.matches(texts)
        fired += [any(fires)] if rule.unit == "context" else fires
        claimed += [any(matches)] if rule.unit == "context" else matches
        places += [number * units.length + int(offset) for offset in (at[:1] if rule.unit == "context" else at)]
    return fired, claimed, places


def test_scores_agree_with_a_recount_token_by_token(units, contexts, random_firings):
    firings = random_firings(len(RULES))
    found = execute(units, firings)
    for label, rule in zip(LABELS, RULES, strict=True):
        fired, claimed, _ = recounted(units, contexts, firings, label.feature, rule)
        pairs = list(zip(fired, claimed, strict=True))
        hits, quiet = sum(f and c for f, c in pairs), sum(not f and not c for f, c in pairs)
        row, silent, recall = found[label.label_id, "own"], len(fired) - sum(fired), hits / sum(fired)
        assert (row["unit"], row["positives"], row["negatives_random"]) == (rule.unit, sum(fired), silent)
        expected = {
            "precision": hits / sum(claimed) if sum(claimed) else 0,
            "recall": recall,
            "f1": 2 * hits / (sum(fired) + sum(claimed)),
            "balanced_accuracy": (recall + (quiet / silent if silent else 0)) / 2,
            "auprc": average_precision_score(fired, claimed),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert row["specificity_random"] == (pytest.approx(quiet / silent, abs=1e-6) if silent else None)


def test_the_three_kinds_of_negatives_are_told_apart(units, contexts, random_firings, rng):
    """Against a count by hand of the silent units that hold a trigger token, and of those where the neighbour fires."""
    firings = random_firings(len(RULES), least=20, most=200)
    nearest = np.array([[(f + 1) % len(RULES)] for f in range(len(RULES))], dtype=np.int32)
    nearest[3] = -1
    other = np.where(nearest == -1, 5, -1).astype(np.int32)
    found = execute(units, firings, neighbours=Neighbours(nearest, other))
    keys, texts = units.column("token")
    for label, rule in zip(LABELS, RULES, strict=True):
        triggers = {texts[k] for k in trigger_tokens(units, firings, [label.feature])["key"]}
        neighbour = int(nearest[label.feature, 0]) if nearest[label.feature, 0] >= 0 else 5
        at_neighbour = set(firings.position[firings.feature == neighbour].tolist())
        fired, claimed, places = recounted(units, contexts, firings, label.feature, rule)
        by_place = dict(zip(places, zip(fired, claimed, strict=True), strict=True))
        beside, where = [], []
        for number, at, spelled in contexts:
            inside = [number * units.length + int(offset) for offset in at]
            if rule.unit == "context":
                words = {t.strip().casefold() for t in triggers}
                where += [by_place[inside[0]]] if words & {t.strip().casefold() for t in spelled} - {""} else []
                beside += [by_place[inside[0]]] if at_neighbour & set(inside) else []
            else:
                where += [by_place[p] for p, text in zip(inside, spelled, strict=True) if text in triggers]
                beside += [by_place[p] for p in inside if p in at_neighbour]
        for name, pairs in (("trigger", where), ("neighbour", beside)):
            negatives = [c for f, c in pairs if not f]
            row = found[label.label_id, "own"]
            assert row[f"negatives_{name}"] == len(negatives)
            assert row[f"specificity_{name}"] == (pytest.approx(negatives.count(False) / len(negatives)) if negatives else None)


def test_recall_by_decile_is_the_share_of_each_tenth_of_the_firings_that_is_claimed(units, random_firings, rng):
    firings = random_firings(2, least=500, most=1000)
    firings = Firings(firings.feature, firings.position, 2, value=rng.random(len(firings.feature)).astype(np.float32) + 0.1)
    labels = [label_of(0, Rule("suffix", ("e", "s", "ed"))), label_of(1, Rule("topic", ("also", "war")))]
    found = execute(units, firings, labels)
    report = firings.within(units, "report")
    mine = report.feature == 0
    hits = np.isin(report.position[mine], matching_tokens(units, ("e", "s", "ed")))
    expected = share_by_decile(report.value[mine], hits)
    assert found[labels[0].label_id, "own"]["recall_by_decile"] == pytest.approx(expected, abs=1e-6)
    context = report.position[~mine] // units.length
    peaks = np.array([report.value[~mine][context == c].max() for c in np.unique(context)])
    held, words = units.context_words
    has_word = np.asarray(held[:, [words.index("also"), words.index("war")]].sum(axis=1)).ravel()[np.unique(context)] > 0
    expected = share_by_decile(peaks, has_word)
    assert found[labels[1].label_id, "own"]["recall_by_decile"] == pytest.approx(expected, abs=1e-6)


def share_by_decile(values: np.ndarray, hits: np.ndarray) -> list[float]:
    """The mean of `hits` in each tenth of the values. Numpy's k-th decile lies at rank k (n - 1) / 10, which may be a value's
    own, so ranks are compared, and values not."""
    rank = (values[:, None] >= values).sum(axis=1) - 1
    tenth = np.minimum(10 * rank // (len(values) - 1), 9)
    return [float(hits[tenth == k].mean()) for k in range(10)]


def matching_tokens(units, endings) -> list[int]:
    keys, texts = units.column("word")
    wanted = [i for i, w in enumerate(texts) if w.isalpha() and any(w.endswith(e) and len(w) > len(e) for e in endings)]
    return np.flatnonzero(np.isin(keys, wanted)).tolist()


def test_every_label_has_its_controls_beside_it(units, random_firings):
    found = execute(units, random_firings(len(RULES)))
    arms = {"own", "shuffled", "constant", "trigger_tokens"}
    assert set(found) == {(label.label_id, arm) for label in LABELS for arm in arms}
    assert all(set(row) == set(SCORE_SCHEMA) for row in found.values())


def test_the_constant_arm_says_that_everything_fires(units, random_firings):
    found = execute(units, random_firings(len(RULES)))
    for label in LABELS:
        row = found[label.label_id, "constant"]
        rate = row["positives"] / (row["positives"] + row["negatives_random"])
        assert row["precision"] == pytest.approx(rate) and row["recall"] == 1 and row["auprc"] == pytest.approx(rate)
        assert row["balanced_accuracy"] == pytest.approx(0.5) or row["negatives_random"] == 0
        assert row["recall_by_decile"] == [1.0] * 10 and row["specificity_trigger"] == 0


def test_the_trigger_token_arm_is_the_bare_list_of_the_tokens_it_fires_on_in_explain_documents(medium, subject, units):
    of, the = (matching(medium, subject, Rule("token", (token,))) for token in (" of", " the"))
    explain = units.in_split("explain")
    firings = firings_of([np.r_[of, the[~explain[the]]]], 1)  # " the" in select and report documents alone
    found = execute(units, firings, [label_of(0, Rule("suffix", ("ing",)))])
    (row,) = [row for (_, arm), row in found.items() if arm == "trigger_tokens"]
    report = units.in_split("report")
    assert row["precision"] == 1 and row["recall"] == pytest.approx(report[of].sum() / (report[of].sum() + report[the].sum()))


def test_the_shuffled_arm_is_another_features_rule_of_the_same_unit(units, random_firings):
    firings = random_firings(len(RULES))
    found = execute(units, firings)
    for label, rule in zip(LABELS, RULES, strict=True):
        row = found[label.label_id, "shuffled"]
        others = [label_of(label.feature, r) for r in RULES if r != rule and r.unit == rule.unit]
        theirs = execute(units, firings, others)
        assert row["f1"] in [theirs[o.label_id, "own"]["f1"] for o in others] and row["unit"] == rule.unit


def test_a_rule_that_no_other_can_stand_in_for_has_no_shuffled_arm(units, random_firings):
    """Three features of one and the same rule: none is tested against itself."""
    labels = [label_of(feature, RULES[0]) for feature in range(3)]
    found = execute(units, random_firings(3), labels)
    for label in labels:
        shuffled, own = found[label.label_id, "shuffled"], found[label.label_id, "own"]
        assert (shuffled["status"], shuffled["f1"], shuffled["balanced_accuracy"]) == ("not_applicable", None, None)
        assert own["status"] == "scored" and own["f1"] is not None
        assert all(own[name] is None for name in ("lift", "lift_low", "lift_high", "p_value"))


def test_lift_is_own_less_shuffled_and_stands_in_the_own_arm_alone(units, random_firings):
    found = execute(units, random_firings(len(RULES)))
    for label in LABELS:
        own, shuffled = found[label.label_id, "own"], found[label.label_id, "shuffled"]
        assert own["lift"] == pytest.approx(own["balanced_accuracy"] - shuffled["balanced_accuracy"], abs=1e-6)
        assert own["lift_low"] <= own["lift"] + 1e-6 and own["lift"] <= own["lift_high"] + 1e-6 and 0 < own["p_value"] <= 1
        for arm in ("shuffled", "constant", "trigger_tokens"):
            assert all(found[label.label_id, arm][name] is None for name in ("lift", "lift_low", "lift_high", "p_value"))


def test_shuffled_labels_centre_on_chance(units, random_firings):
    """Whatever fires and whatever is claimed: rules of other features are as often above chance as below it."""
    rules = [Rule("word", (word,)) for word in units.column("word")[1][40:440:5]]
    labels = [label_of(feature, rule) for feature, rule in enumerate(rules)]
    found = execute(units, random_firings(len(rules)), labels)
    shuffled = np.array([found[label.label_id, "shuffled"]["balanced_accuracy"] for label in labels])
    assert 0.49 <= shuffled.mean() <= 0.51
    p = np.array([found[label.label_id, "own"]["p_value"] for label in labels])
    assert (p <= 0.01).mean() <= 0.1  # no rule here has anything to do with its feature


def test_intervals_contain_the_point_estimate_and_other_seeds_draw_others(units, random_firings):
    firings = random_firings(len(RULES))
    one, two = (execute(units, firings, seed=seed) for seed in (0, 1))
    for label in LABELS:
        a, b = one[label.label_id, "own"], two[label.label_id, "own"]
        if a["recall"] * a["positives"] >= 10:
            for name in ("precision", "recall", "f1", "balanced_accuracy", "auprc"):
                assert a[f"{name}_low"] <= a[name] <= a[f"{name}_high"] and a[name] == b[name]
    assert any(one[key]["f1_low"] != two[key]["f1_low"] for key in one if key[1] == "own")


def test_the_documents_a_feature_fires_in_are_counted_and_too_few_are_refused(units, random_firings):
    firings = random_firings(len(RULES), least=20, most=60)
    report = firings.within(units, "report")
    documents = [len(set(units.document[report.position[report.feature == f]])) for f in range(len(RULES))]
    found = execute(units, firings, min_documents=sorted(documents)[4])
    for label, expected in zip(LABELS, documents, strict=True):
        row = found[label.label_id, "own"]
        assert row["documents"] == expected
        is_scored = expected >= sorted(documents)[4]
        assert (row["status"] == "scored") == is_scored and (row["f1"] is not None) == is_scored
        assert is_scored or all(row[name] is None for name in ("lift", "p_value", "recall_by_decile", "specificity_random"))


def test_several_labels_of_one_feature_are_each_tested(units, random_firings):
    firings = random_firings(1)
    both = [label_of(0, RULES[0]), label_of(0, RULES[7]), label_of(0, RULES[6])]
    together = execute(units, firings, both)
    for label in both:
        alone = execute(units, firings, [label])[label.label_id, "own"]
        row = together[label.label_id, "own"]
        assert (row["f1"], row["unit"], row["positives"]) == (alone["f1"], alone["unit"], alone["positives"])


def test_only_report_firings_are_scored(units, random_firings):
    firings = random_firings(len(RULES))
    kept = firings.within(units, "report")
    explain = firings.within(units, "explain")  # trigger tokens are of explain
    parts = [np.r_[getattr(kept, name), getattr(explain, name)] for name in ("feature", "position", "value")]
    without_select = Firings(parts[0], parts[1], firings.width, value=parts[2])
    assert execute(units, without_select) == execute(units, firings)


def test_tiles_change_no_score(units, random_firings, monkeypatch):
    firings = random_firings(len(RULES))
    whole = execute(units, firings)
    monkeypatch.setattr("scopeatlas.scoring.execution.TILE_LABELS", 4)
    assert execute(units, firings) == whole


def test_labels_without_a_rule_are_not_executed(units, random_firings):
    assert execute(units, random_firings(2), [Label(0, "llm", "ok", "ships", "Words for ships.")]) == {}


def test_random_directions_are_labelled_and_tested_like_features(medium, subject, units, rng):
    """One direction that happens to be a word, others that mean nothing: only the first gets a rule."""
    counted = np.flatnonzero(units.counted)
    word = matching(medium, subject, Rule("token", (" the",)))
    nulls = firings_of([word, *(rng.choice(counted, 200, replace=False) for _ in range(5))], 6)
    matched = np.array([70, 11, 12, 13, 14, 15], dtype=np.uint32)
    rows = random_direction_rows(units, nulls, matched, rules=RuleSettings(), min_documents=3, seed=0)
    assert [(row["feature"], row["arm"]) for row in rows] == [(int(f), "random_direction") for f in matched]
    assert [row["status"] for row in rows] == ["scored"] + ["not_applicable"] * 5
    assert rows[0]["f1"] == 1 and "lift" not in rows[0] and len({row["label_id"] for row in rows}) == 6
    assert all(str(row["note"]).startswith("no rule: ") for row in rows[1:])


def test_a_direction_that_fires_in_too_few_documents_is_refused_as_a_feature_would_be(medium, subject, units):
    word = matching(medium, subject, Rule("token", (" the",)))
    once = word[units.document[word] == units.document[word[0]]]
    (row,) = random_direction_rows(units, firings_of([once], 1), np.array([3]), rules=RuleSettings(), min_documents=3, seed=0)
    assert row["status"] == "not_applicable"
