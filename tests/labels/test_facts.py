"""Facts that are counted about features, against a plain count over the corpus."""

from collections import Counter

import numpy as np
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.units import Firings
from scopeatlas.labels.facts import computed_facts
from tests.planted import DEAD, elsewhere


@pytest.fixture
def fires(mined, rng) -> Firings:
    """Five features that fire anywhere, at random."""
    positions = np.sort(rng.choice(np.flatnonzero(mined.units.counted), 4000, replace=False))
    feature = rng.integers(0, 5, 4000).astype(np.uint32)
    return Firings(feature, positions, 6, value=rng.random(4000).astype(np.float32) + 0.1)


def plainly(units, positions) -> tuple[Counter, Counter, Counter]:
    """Token texts, places in the text (1 is the first token) and line starts of some positions, one by one."""
    tokens, places, line_starts = Counter(), Counter(), Counter()
    for position in positions:
        context, at = divmod(int(position), units.length)
        texts = units.text_of(context, 0, units.length)
        counted = units.counted[context * units.length : (context + 1) * units.length]
        tokens[texts[at]] += 1
        places[int(counted[: at + 1].sum())] += 1
        line_starts[at > 0 and texts[at - 1].endswith("\n")] += 1
    return tokens, places, line_starts


def test_facts_are_what_a_plain_count_gives(mined, fires):
    units = mined.units
    everywhere = [p for p in np.flatnonzero(units.counted) if SPLITS[units.split[p]] == "explain"]
    all_tokens, all_places, all_starts = plainly(units, everywhere)
    found = computed_facts(units, fires, range(6))
    assert set(found) == set(range(5))
    for feature in range(5):
        mine = [p for p in fires.position[fires.feature == feature] if SPLITS[units.split[p]] == "explain"]
        tokens, places, starts = plainly(units, mine)
        rate, top, positions, line_start, _ = found[feature]
        assert rate["firing_rate"] == pytest.approx(len(mine) / len(everywhere), rel=0.01)
        assert [fact["share"] for fact in top["top_tokens"]] == pytest.approx(
            sorted((n / len(mine) for n in tokens.values()), reverse=True)[:8], rel=0.01
        )
        for fact in top["top_tokens"]:
            share = tokens[fact["token"]] / len(mine)
            lift = share / (all_tokens[fact["token"]] / len(everywhere))
            assert (fact["share"], fact["lift"]) == (pytest.approx(share, rel=0.01), pytest.approx(lift, rel=0.01))
        for name, low, high in (("1", 1, 1), ("2-4", 2, 4), ("5-16", 5, 16), ("17-64", 17, 64), ("65 or later", 65, 10**9)):
            share = sum(n for place, n in places.items() if low <= place <= high) / len(mine)
            base = sum(n for place, n in all_places.items() if low <= place <= high) / len(everywhere)
            assert positions["positions"][name] == pytest.approx(share, rel=0.01)
            assert positions["of_all_tokens"][name] == pytest.approx(base, rel=0.01)
        assert line_start["line_start"] == pytest.approx(starts[True] / len(mine), rel=0.01)
        assert line_start["of_all_tokens"] == pytest.approx(all_starts[True] / len(everywhere), rel=0.01)


@pytest.mark.parametrize("split", ["select", "report"])
def test_facts_do_not_depend_on_held_out_documents(mined, split):
    changed = elsewhere(mined.units, mined.firings, split)
    assert computed_facts(mined.units, changed, range(DEAD)) == computed_facts(mined.units, mined.firings, range(DEAD))


def test_facts_say_in_which_writing_a_feature_fires(mined):
    texts = mined.units.column("token")[1]
    keys = mined.units.column("token")[0]
    explain = mined.units.in_split("explain")
    digits = np.flatnonzero(explain & np.isin(keys, [i for i, text in enumerate(texts) if text.strip().isdigit()]))
    commas = np.flatnonzero(explain & np.isin(keys, [i for i, text in enumerate(texts) if text == ","]))
    positions = np.r_[digits, commas]
    feature = np.r_[np.zeros(len(digits)), np.ones(len(commas))].astype(np.uint32)
    found = computed_facts(mined.units, Firings(feature, positions, 2, value=np.ones(len(positions), np.float32)), [0, 1])
    assert [facts[-1] for facts in (found[0], found[1])] == [{"writing": {"digits": 1.0}}, {"writing": {"marks": 1.0}}]
