"""Features whose meaning is known are recovered, and those that mean nothing are refused: a smaller run of bench/planted.py."""

import numpy as np
import pytest

from bench.planted import IN_FAMILY_BAR, SHUFFLED_BAR, Found, build_text, judge, members_found, planted, recover, totals
from bench.plants import Agreement, agreement
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Units

PLANTS = {plant.name: plant for plant in planted([f"token {number}" for number in range(200)], np.random.default_rng(0))}
TRUE = Agreement(precision=0.9, recall=0.9)


@pytest.fixture(scope="module")
def units(subject, tmp_path_factory) -> Units:
    """The Wikipedia sample and a quarter of the standard library, at most ten contexts of each document."""
    return Units(build_text(tmp_path_factory.mktemp("text"), subject, every=4, per_document=10), subject)


@pytest.fixture(scope="module")
def found(units) -> list[Found]:
    return recover(units, seed=0)


@pytest.mark.slow
def test_what_the_labeller_can_say_is_recovered_with_the_right_kind_of_rule(found):
    wrong = {f.plant.name: (f.verdict, f.rule) for f in found if f.plant.family == "in the family" and f.verdict != "right"}
    assert totals(found).in_family == 13 and totals(found).right >= IN_FAMILY_BAR, wrong


@pytest.mark.slow
def test_dense_and_incoherent_features_are_refused(found):
    assert {f.plant.name: f.status for f in found if f.plant.family == "to be refused"} == {
        "dense": "dense",
        "random tokens": "incoherent",
        "random places": "incoherent",
    }


@pytest.mark.slow
def test_what_the_labeller_cannot_say_is_refused_or_told_in_part(found):
    outside = {f.plant.name: (f.verdict, f.rule) for f in found if f.plant.family == "outside the family"}
    assert len(outside) == 4 and {verdict for verdict, _ in outside.values()} <= {"refused", "partial"}, outside


@pytest.mark.slow
def test_labels_score_well_on_report_documents_and_shuffled_ones_at_chance(found):
    own = [f.scores["balanced_accuracy"] for f in found if f.verdict == "right"]
    assert min(own) > 0.6 and np.mean(own) > 0.85
    assert SHUFFLED_BAR[0] <= totals(found).shuffled <= SHUFFLED_BAR[1]


@pytest.mark.slow
def test_a_held_out_score_sees_the_misses_and_spurious_firings_that_were_planted(found):
    digits = next(f for f in found if f.plant.name == "digits")
    assert digits.against.precision > 0.99  # of what was meant
    assert digits.scores["precision"] == pytest.approx(0.9, abs=0.02)  # a tenth of which was made to miss


WHICH = Rule("word", ("which",))


@pytest.mark.parametrize(
    ("name", "rule", "against", "members", "verdict"),
    [
        ("a word", WHICH, TRUE, 1, "right"),
        ("a word", Rule("prefix", ("whic",)), TRUE, 1, "wrong"),  # the right tokens by another kind of rule
        ("a word", Rule("and", parts=(WHICH, Rule("prefix", ("whic",)))), TRUE, 1, "wrong"),
        ("a word", WHICH, Agreement(0.7, 1), 1, "wrong"),
        ("a word", WHICH, Agreement(1, 0.5), 1, "wrong"),
        ("two meanings", Rule("word", ("language", "languages")), TRUE, 0.5, "wrong"),
        ("two meanings", Rule("word", ("language", "languages", "thread")), TRUE, 0.75, "right"),
        ("dense", WHICH, TRUE, 1, "wrong"),
        ("dense", None, Agreement(0, 0), 1, "refused"),
        ("questions", Rule("word", ("what",)), Agreement(0.9, 0.01), 1, "partial"),
        ("questions", Rule("word", ("what",)), Agreement(0.5, 0.9), 1, "misleading"),
    ],
)
def test_what_counts_as_finding_a_plant(name, rule, against, members, verdict):
    assert judge(PLANTS[name], rule, against, members) == verdict


@pytest.mark.slow
def test_a_member_is_found_where_half_of_its_places_are_claimed(units):
    keys, words = units.column("word")
    one = keys == words.index("one")
    two = np.flatnonzero((keys == words.index("two")) & units.in_split("report"))
    half = np.isin(np.arange(len(keys)), two[: (len(two) + 1) // 2])
    fewer = np.isin(np.arange(len(keys)), two[: (len(two) - 1) // 2])
    assert members_found(units, ["one", "two"], one | half) == 1
    assert members_found(units, ["one", "two"], one | fewer) == 0.5
    assert members_found(units, ["one", "a word that no text holds"], one) == 1


def test_agreement_is_precision_and_recall_of_masks(rng):
    claimed, meant = rng.random((2, 500)) < 0.3
    pairs = list(zip(claimed, meant, strict=True))
    both = pairs.count((True, True))
    found = agreement(claimed, meant)
    assert found.precision == pytest.approx(both / sum(claimed)) and found.recall == pytest.approx(both / sum(meant))
    assert agreement(claimed & False, meant) == Agreement(0, 0)
