"""Which of several labels of a feature is current."""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MethodType

import numpy as np
import polars as pl
import pytest

from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.columns import KeyColumns
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import draw_windows
from scopeatlas.hypotheses.units import Units
from scopeatlas.labels.choosing import Trial, _claims, choose, executed, select_windows, trial
from tests.planted import DEAD, EXACT, RARE, SUFFIX, TOPIC, WORDS

RULE = Label(0, "rule", "ok", "the", "the token", rule=Rule("token", (" the",)).to_json(), version="rule:1", select_score=0.9)
REFUSED = Label(0, "rule", "incoherent", version="rule:1")
TEXT = Label(0, "llm", "ok", "articles", "Articles.", version="llm:new")
EARLIER = Label(0, "llm", "ok", "small words", "Small words.", version="llm:old")
PERSON = Label(0, "human", "ok", "the article", "The article.", version="human:ann")


def current(*labels: Label, version: str = "llm:new", **accuracy: float) -> Label:
    """The one label that is current, where the named ones were tried: rule, text, earlier, person."""
    ids = {"rule": RULE, "text": TEXT, "earlier": EARLIER, "person": PERSON}
    trials: Mapping[str, Trial] = {ids[name].label_id: Trial(value, 20, "test") for name, value in accuracy.items()}
    chosen = [label for label in choose(labels, trials, version=version) if label.current]
    assert len(chosen) == 1
    return chosen[0]


def name_of(label: Label) -> str:
    return label.version


def test_without_a_judge_a_person_comes_before_a_rule_before_an_llm():
    assert name_of(current(RULE, TEXT, PERSON)) == "human:ann"
    assert name_of(current(RULE, TEXT)) == "rule:1"
    assert name_of(current(REFUSED, TEXT)) == "llm:new"


def test_without_a_judge_what_another_explainer_said_counts_only_where_the_present_one_said_nothing():
    declined = replace(TEXT, status="unclear", label="")
    assert current(REFUSED, declined, EARLIER).status == "incoherent"
    assert name_of(current(REFUSED, EARLIER)) == "llm:old"
    assert name_of(current(REFUSED, replace(TEXT, status="error", label=""), EARLIER)) == "llm:old"


def test_with_a_judge_the_best_trial_wins_whoever_it_is_of():
    assert name_of(current(RULE, TEXT, EARLIER, PERSON, rule=0.7, text=0.8, earlier=0.9, person=0.6)) == "llm:old"
    assert name_of(current(RULE, TEXT, EARLIER, PERSON, rule=0.95, text=0.8, earlier=0.9, person=0.6)) == "rule:1"


def test_a_tie_goes_to_the_person_then_to_the_rule_and_is_stated():
    winner = current(RULE, TEXT, PERSON, rule=0.8, text=0.8, person=0.8)
    assert name_of(winner) == "human:ann"
    assert json.loads(winner.provenance)["choice"]["tied_with"] == sorted([RULE.label_id, TEXT.label_id])
    assert name_of(current(RULE, TEXT, rule=0.8, text=0.8)) == "rule:1"
    assert "tied_with" not in json.loads(current(RULE, TEXT, rule=0.9, text=0.8).provenance)["choice"]


def test_a_text_at_chance_leaves_the_refusal_standing():
    assert current(REFUSED, TEXT, text=0.5).status == "incoherent"
    assert name_of(current(REFUSED, TEXT, text=0.55)) == "llm:new"


def test_a_text_that_the_judge_could_not_read_loses_to_one_that_it_could():
    assert name_of(current(RULE, TEXT, PERSON, rule=0.7, text=0.8)) == "llm:new"


def test_a_falsified_label_is_never_current_while_another_is_ok():
    assert name_of(current(replace(RULE, status="falsified"), TEXT)) == "llm:new"
    assert name_of(current(RULE, replace(PERSON, status="falsified"))) == "rule:1"
    assert current(replace(RULE, status="falsified"), replace(TEXT, status="falsified")).method == "rule"


def test_every_feature_has_one_current_label_and_none_is_lost():
    labels = [replace(label, feature=feature) for feature in (3, 1, 2) for label in (TEXT, REFUSED, EARLIER)]
    chosen = choose(labels, {}, version="llm:new")
    assert [label.feature for label in chosen if label.current] == [1, 2, 3]
    assert {label.label_id for label in chosen} == {label.label_id for label in labels}


def test_a_rule_keeps_its_own_score_and_a_text_gets_its_trials():
    trials = {RULE.label_id: Trial(0.7, 20, "execution", ("d1",)), TEXT.label_id: Trial(0.8, 20, "detection by m", ("d1",))}
    rule, text = choose([RULE, TEXT], trials)
    assert rule.select_score == 0.9 and text.select_score == pytest.approx(0.8)
    assert json.loads(rule.provenance)["choice"] == {
        "balanced_accuracy": 0.7,
        "windows": 20,
        "by": "execution",
        "documents": ["d1"],
    }


def test_a_trial_is_the_mean_of_both_rates(rng):
    kinds = rng.permutation(["positive"] * 7 + ["random"] * 5 + ["trigger"] * 8)
    claimed = rng.random(20)
    windows = pl.DataFrame({"kind": kinds, "document_id": ["d"] * 20})
    found = trial(windows, claimed.tolist(), "test")
    hits = [c >= 0.5 for k, c in zip(kinds, claimed, strict=True) if k == "positive"]
    rejections = [c < 0.5 for k, c in zip(kinds, claimed, strict=True) if k != "positive"]
    assert found is not None and found.balanced_accuracy == pytest.approx((np.mean(hits) + np.mean(rejections)) / 2)


@pytest.mark.parametrize("kinds", [["positive"] * 3, ["random"] * 3, []])
def test_windows_of_one_kind_alone_try_nothing(kinds):
    assert trial(pl.DataFrame({"kind": kinds, "document_id": kinds}), [1.0] * len(kinds), "test") is None


def test_rules_that_were_planted_do_well_on_select_windows_and_others_do_not(mined):
    features = [f for f in range(DEAD) if f != RARE]
    select = select_windows(mined.units, mined.firings, features, neighbours=None)
    rules = {EXACT: Rule("token", (" the",)), WORDS: Rule("word", ("was", "were", "is", "are")), SUFFIX: Rule("suffix", ("ing",))}
    right = [Label(f, "rule", "ok", rule=rule.to_json()) for f, rule in rules.items()]
    wrong = [Label(f, "rule", "ok", rule=rules[g].to_json()) for f, g in ((EXACT, SUFFIX), (WORDS, SUFFIX), (SUFFIX, EXACT))]
    good, bad = executed(mined.units, select, right), executed(mined.units, select, wrong)
    assert good[right[0].label_id].balanced_accuracy == 1
    pairs = zip(right, wrong, strict=True)  # of a feature; some negatives hold the very word, silent, so that none is perfect
    assert all(good[a.label_id].balanced_accuracy > bad[b.label_id].balanced_accuracy + 0.2 for a, b in pairs)


def test_a_position_rule_counts_a_templates_tokens_as_its_key_column_does(mined):
    """In contexts whose first three tokens behind BOS do not count, the first that does is the fourth."""
    units = mined.units
    flat = units.column("token")[0].reshape(units.contexts, units.length).copy()
    flat[:, :4] = -1
    chat = KeyColumns(flat.ravel(), units.texts, contexts=units.contexts, length=units.length)
    chat.counted = units.counted & (flat.ravel() >= 0)  # pyright: ignore[reportAttributeAccessIssue]
    chat.text_of = MethodType(Units.text_of, chat)  # pyright: ignore[reportAttributeAccessIssue]
    keys, texts = chat.column("position")
    for place in ("1", "4", "7"):
        rule = Rule("position", (place,))
        for context in (0, 5):
            column = keys[context * units.length : (context + 1) * units.length] == texts.index(place)
            read = [_claims(chat, rule, context, start, 1) for start in range(4, units.length)]  # pyright: ignore[reportArgumentType]
            assert read == column[4:].tolist() and any(read) == (place != "1")


def test_a_topic_rule_is_run_on_the_whole_context_of_a_window(mined):
    select = select_windows(mined.units, mined.firings, [TOPIC], neighbours=None)
    word = next(iter(Rule.from_json(Rule("topic", ("x",)).to_json()).keys))
    assert word == "x"
    windows = select.of(TOPIC).filter(pl.col("kind") == "positive")
    contexts = [mined.units.text_of(c, 0, mined.units.length) for c in windows["context"]]
    shared = set.intersection(*({t.strip().casefold() for t in texts} for texts in contexts))
    word = max((w for w in shared if w.isalpha() and len(w) >= 4), key=len)
    found = executed(mined.units, select, [Label(TOPIC, "rule", "ok", rule=Rule("topic", (word,)).to_json())])
    held = [any(t.strip().casefold() == word for t in texts) for texts in windows["texts"]]
    assert not all(held), "of some windows the word stands outside"
    assert next(iter(found.values())).balanced_accuracy >= 0.5


def test_rules_are_tried_on_no_other_split(mined):
    windows = draw_windows(mined.units, mined.firings, [EXACT], split="report", neighbours=None)
    with pytest.raises(LeakError):
        executed(mined.units, windows, [RULE])  # pyright: ignore[reportArgumentType]  # what a careless caller would do
