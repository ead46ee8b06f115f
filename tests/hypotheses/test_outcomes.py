import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.outcomes import OUTCOME_SCHEMA, OUTCOMES, outcomes
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units
from tests.planted import firings_of, topic_of

EVERY = 10**6


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture
def rules(units) -> dict[int, Rule]:
    common = Rule("or", parts=(Rule("word", ("the",)), Rule("suffix", ("ing",))))
    return {0: Rule("word", ("the", "of")), 2: common, 3: Rule("topic", (topic_of(units), "river"))}


@pytest.fixture
def firings(units, rng) -> Firings:
    """Four features at random places, often on words that the rules name."""
    keys, words = units.column("word")
    named = np.flatnonzero(np.isin(keys, [words.index("the"), words.index("of")]))
    counted = np.flatnonzero(units.counted)
    return firings_of([np.union1d(rng.choice(named, 80, replace=False), rng.choice(counted, 120)) for _ in range(4)], 4)


def expected(units: Units, firings: Firings, rules: dict[int, Rule], split: str) -> set[tuple[int, str, int, int, float]]:
    """Every place with its outcome, by running each rule on each context."""
    value = dict(zip(zip(firings.feature.tolist(), firings.position.tolist(), strict=True), firings.value, strict=True))
    found = set()
    for context in np.flatnonzero(units.context_split == SPLITS.index(split)).tolist():
        texts = units.text_of(context, 1, units.length)
        for feature, rule in rules.items():
            claimed = rule.matches(texts)
            at = [(feature, context * units.length + i + 1) for i in range(len(texts))]
            fires = {i: value[place] for i, place in enumerate(at) if place in value}
            places = [i for i, text in enumerate(texts) if text]
            if rule.unit == "context":
                holding = [i for i in places if texts[i].strip().casefold() in rule.keys]
                peak = max(fires, key=lambda i, f=fires: (f[i], -i), default=None)
                places = [peak] if peak is not None else holding[:1]
            for i in places:
                if i in fires or claimed[i]:
                    outcome = ("hit" if claimed[i] else "miss") if i in fires else "false_alarm"
                    found.add((feature, outcome, context, i + 1, float(fires.get(i, 0))))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_every_place_is_a_hit_a_miss_or_a_false_alarm_as_running_the_rule_there_says(units, firings, rules, split):
    found = outcomes(units, firings, rules, split=split, per_kind=EVERY)
    assert dict(found.schema) == OUTCOME_SCHEMA and len(found) == len(set(found.rows()))
    assert set(found.rows()) == expected(units, firings, rules, split)


def test_a_few_of_each_are_shown_from_as_many_documents_as_there_are(units, firings, rules):
    every = outcomes(units, firings, rules, split="explain", per_kind=EVERY)
    few = outcomes(units, firings, rules, split="explain", per_kind=5)
    for key, group in every.group_by("feature", "outcome"):
        shown = few.filter((pl.col("feature") == key[0]) & (pl.col("outcome") == key[1]))
        documents, there = (len(set(units.context_document[t["context"].to_numpy()])) for t in (shown, group))
        assert len(shown) == min(5, len(group)) and documents == min(5, there) and set(shown.rows()) <= set(group.rows())


def test_hits_come_before_misses_and_false_alarms(units, firings, rules):
    few = outcomes(units, firings, rules, split="explain")
    assert few["feature"].is_sorted() and set(few["feature"]) == set(rules)
    for (feature,), mine in few.group_by("feature"):
        order = [OUTCOMES.index(outcome) for outcome in mine["outcome"]]
        assert order == sorted(order) and (rules[feature].unit == "context" or set(order) == {0, 1, 2})


def test_the_order_of_firings_does_not_change_what_is_shown(units, firings, rules, rng):
    order = rng.permutation(len(firings.feature))
    other = Firings(firings.feature[order], firings.position[order], firings.width, value=firings.value[order])
    assert outcomes(units, other, rules, split="select").equals(outcomes(units, firings, rules, split="select"))


def test_no_rules_have_no_outcomes(units, firings):
    assert dict(outcomes(units, firings, {}, split="report").schema) == OUTCOME_SCHEMA
