from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.metrics import lift, point_metrics
from scopeatlas.hypotheses.rules import PAIR, Rule
from scopeatlas.hypotheses.units import Firings, Units, document_counts
from scopeatlas.labels import rule_labeller
from scopeatlas.labels.rule_labeller import PSEUDO_UNITS, RuleSettings, propose_rules, refusals
from tests.planted import firings_of, silent_in

SETTINGS = RuleSettings()
PLANTED = {
    "token": Rule("token", (" the",)),
    "set of words": Rule("word", ("was", "were", "is", "are")),
    "suffix": Rule("suffix", ("ing",)),
    "previous": Rule("previous", (" of",)),
    "next": Rule("next", (" of",)),
    "bigram": Rule("bigram", (f"in{PAIR}the",)),
    "shape": Rule("shape", ("digits",)),
    "a capital after": Rule("and", parts=(Rule("previous", (" of", " the")), Rule("shape", ("capitalised",)))),
    "polysemantic": Rule("or", parts=(Rule("suffix", ("ing",)), Rule("previous", (" the",)))),
    "exception": Rule("and_not", parts=(Rule("word", ("the",)), Rule("previous", (" of", " in")))),
    "position": Rule("position", ("1", "2", "3", "4", "5")),
    "topic": Rule("topic", ()),  # the keys are chosen from the corpus
}
RANDOM = len(PLANTED)


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="module")
def topic(units) -> str:
    """A content word that is in many contexts of every split."""
    held, words = units.topic_words
    per_split = [np.asarray(held[units.context_split == i].sum(axis=0)).ravel() for i in range(len(SPLITS))]
    return words[int(np.argmax(np.min(per_split, axis=0)))]


def planted_positions(units: Units, rule: Rule) -> np.ndarray:
    """Where a rule matches, by running it on the texts of each context."""
    keys = units.column("token")[0].reshape(units.contexts, units.length)
    found = []
    for number, row in enumerate(keys):
        at = np.flatnonzero(row >= 0)
        matches = np.array(rule.matches([units.texts[k] for k in row[at]]), dtype=bool)
        found.append(number * units.length + at[matches])
    return np.concatenate(found)


@pytest.fixture
def firings(units, topic, rng) -> Firings:
    """One feature per planted rule, nine tenths of its matches and a few stray firings, and one at random places."""
    counted = np.flatnonzero(units.counted)
    positions = []
    for name, rule in PLANTED.items():
        at = planted_positions(units, Rule("topic", (topic,)) if name == "topic" else rule)
        share = 0.1 if name == "topic" else 0.9  # a topic fires on some tokens of its contexts
        strays = 0 if name == "topic" else 3  # of five select contexts that hold the topic, three more would hide it
        positions.append(np.union1d(at[rng.random(len(at)) < share], rng.choice(counted, strays)))
    positions.append(np.sort(rng.choice(counted, 300, replace=False)))
    return firings_of(positions, len(positions))


def test_planted_features_are_recovered_with_the_right_kind_of_rule(units, firings, topic):
    labels = propose_rules(units, firings, {}, SETTINGS)
    found = {name: Rule.from_json(labels[i].rule) for i, name in enumerate(PLANTED)}
    assert found["token"].kind in {"token", "word"} and {k.strip() for k in found["token"].keys} == {"the"}
    assert found["set of words"].kind in {"word", "token"} and {k.strip() for k in found["set of words"].keys} == {
        "was",
        "were",
        "is",
        "are",
    }
    assert found["suffix"] == Rule("suffix", ("ing",))
    assert found["previous"] == Rule("previous", (" of",))
    assert found["next"] == Rule("next", (" of",))
    assert found["bigram"] == PLANTED["bigram"]
    assert found["shape"] == PLANTED["shape"]
    capital = {part.kind: set(part.keys) for part in found["a capital after"].parts or ()}
    assert capital["shape"] == {"capitalised"} and capital["previous"] >= {" of", " the"}  # or more, if strays follow it
    assert set(found["polysemantic"].parts or ()) == set(PLANTED["polysemantic"].parts)
    exception = found["exception"]
    assert exception.kind == "and_not" and exception.parts[0].keys in {("the",), (" the",)}
    assert {key.split(PAIR)[0].strip() for key in exception.parts[1].keys} >= {"of", "in"}
    assert set(found["position"].keys) == set(PLANTED["position"].keys)
    assert found["topic"].kind == "topic" and topic in found["topic"].keys
    assert all(label.status == "ok" and label.label and label.reads for label in labels[:RANDOM])


def test_a_feature_that_fires_at_random_is_incoherent(units, firings):
    label = propose_rules(units, firings, {}, SETTINGS)[RANDOM]
    assert label.status == "incoherent" and not label.rule and not label.label


def test_a_label_carries_the_lift_it_was_chosen_by(units, firings):
    select = firings.within(units, "select")
    for label in (label for label in propose_rules(units, firings, {}, SETTINGS) if label.rule):
        rules = {label.feature: Rule.from_json(label.rule)}
        counts = document_counts(units, select, rules, [label.feature], split="select")
        hits, claimed, fired, there = (part.sum(1) for part in (counts.true_positive, counts.claimed, counts.fired, counts.units))
        expected = lift(2 * hits / (claimed + fired + PSEUDO_UNITS), fired, there)
        assert label.select_score == pytest.approx(float(expected[0]), abs=1e-6)


def test_rules_hold_on_report_documents_and_shuffled_rules_do_not(units, firings):
    labels = propose_rules(units, firings, {}, SETTINGS)[:RANDOM]
    # The topic is left out: on a few contexts even a wrong topic may do well by chance.
    rules = {label.feature: Rule.from_json(label.rule) for label in labels if "topic" not in label.rule}
    report = firings.within(units, "report")
    features = sorted(rules)

    def scores(tested: dict[int, Rule]) -> np.ndarray:
        return point_metrics(document_counts(units, report, tested, features, split="report")).f1

    own = scores(rules)
    turned = scores({f: rules[features[(i + 2) % len(features)]] for i, f in enumerate(features)})
    assert own.min() > 0.5 and np.median(own) > 0.8 and np.median(turned) < 0.05


def test_shuffled_firings_get_no_rules(units, firings, rng):
    counted = np.flatnonzero(units.counted)
    at = np.concatenate([rng.choice(counted, n, replace=False) for n in np.bincount(firings.feature, minlength=firings.width)])
    labels = propose_rules(units, replace(firings, position=at), {}, SETTINGS)
    lifts = [label.select_score for label in labels if label.select_score is not None]
    assert not lifts, lifts


def test_report_documents_have_no_say_in_what_is_proposed(units, firings, rng):
    without = silent_in(units, firings, "report")
    assert propose_rules(units, without, {}, SETTINGS) == propose_rules(units, firings, {}, SETTINGS)


@pytest.mark.parametrize("split", ["select", "report"])
def test_held_out_documents_have_no_say_in_what_compositions_are_tried(units, firings, monkeypatch, split):
    tried = []
    real = rule_labeller._score_compositions
    monkeypatch.setattr(rule_labeller, "_score_compositions", lambda *given: (tried.append(given[2]), real(*given))[1])
    for seen in (firings, silent_in(units, firings, split), silent_in(units, firings, "explain")):
        propose_rules(units, seen, {}, SETTINGS)
    assert tried[0] == tried[1] != tried[2] and tried[0]


def test_the_order_of_firings_does_not_change_a_label(units, firings, rng):
    order = rng.permutation(len(firings.feature))
    shuffled = Firings(firings.feature[order], firings.position[order], firings.width, value=firings.value[order])
    assert propose_rules(units, shuffled, {}, SETTINGS) == propose_rules(units, firings, {}, SETTINGS)


def test_refused_features_keep_their_refusal_and_get_no_rule(units, firings):
    labels = propose_rules(units, firings, {0: "dense", 3: "dead"}, SETTINGS)
    assert [(label.feature, label.status) for label in labels[:4:3]] == [(0, "dense"), (3, "dead")]
    assert not labels[0].rule and labels[1].status == "ok"


def test_everything_refused_is_no_error(units, firings):
    labels = propose_rules(units, firings, dict.fromkeys(range(firings.width), "rare"), SETTINGS)
    assert {label.status for label in labels} == {"rare"} and len(labels) == firings.width


def test_features_that_fire_too_seldom_for_any_candidate_are_incoherent(units):
    once = firings_of(list(np.flatnonzero(units.in_split("explain"))[[5, 500, 1000], None]), 3)
    assert [label.status for label in propose_rules(units, once, {}, SETTINGS)] == ["incoherent"] * 3


def test_more_keys_cost_more(units, firings):
    dear = RuleSettings(cost_per_key=0.5)
    labels = propose_rules(units, firings, {}, dear)
    rules = [Rule.from_json(label.rule) for label in labels if label.rule]
    assert all(len(part.keys) == 1 for rule in rules for part in rule.parts or (rule,))


HEALTHY = {
    "tokens": 100,
    "explain_tokens": 80,
    "select_tokens": 20,
    "density": 0.01,
    "early_share": 0.1,
    "explain_contexts": 30,
    "explain_documents": 20,
    "select_documents": 5,
}


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        ({}, None),
        ({"tokens": 0, "explain_tokens": 0, "select_tokens": 0, "explain_contexts": 0}, "dead"),
        ({"explain_tokens": 0, "explain_contexts": 0}, "rare"),
        ({"density": 0.11}, "dense"),
        ({"density": 0.1}, None),
        ({"early_share": 0.81}, "positional"),
        ({"explain_contexts": 5}, "rare"),
        ({"explain_contexts": 6}, None),
        ({"explain_documents": 2}, "too_few_documents"),
        ({"select_documents": 0}, "too_few_documents"),
        ({"density": 0.5, "early_share": 0.9}, "dense"),
    ],
)
def test_features_are_refused_for_what_their_statistics_say(facts, status):
    table = pl.DataFrame([{"feature": 7} | HEALTHY | facts], schema_overrides={"feature": pl.UInt32})
    assert refusals(table, SETTINGS) == ({7: status} if status else {})
