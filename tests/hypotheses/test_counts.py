"""What refusals are decided by is counted on explain and select documents, and agrees with the examples stage."""

from copy import copy

import numpy as np
import pytest

from scopeatlas.hypotheses.counts import firing_counts
from scopeatlas.hypotheses.units import Firings
from scopeatlas.labels.rule_labeller import RuleSettings, refusals
from scopeatlas.mining.examples import examples_key, open_examples
from tests.planted import Planted, elsewhere, planted_chain, silent_in


@pytest.fixture(scope="module")
def mined(medium, subject, tmp_path_factory) -> Planted:
    return planted_chain(medium, subject, tmp_path_factory.mktemp("planted") / "store")


def test_counts_of_a_split_are_those_of_the_examples_stage(mined, subject):
    key = examples_key(mined.corpus, mined.entry, subject)
    table = open_examples(mined.store, mined.corpus.id, mined.entry.key, key).features
    found = firing_counts(mined.units, mined.firings)
    for name in (name for name in found.columns if name.startswith(("explain", "select"))):
        kept = table[name].to_numpy() <= 15 if name.endswith("documents") else np.ones(len(table), bool)  # there it saturates
        assert np.allclose(found[name].to_numpy()[kept], table[name].to_numpy()[kept]), name
    assert (found["tokens"] == table["explain_tokens"] + table["select_tokens"]).all()


def test_density_and_early_share_by_brute_force(mined):
    units, firings = mined.units, mined.firings
    read = units.in_split("explain") | units.in_split("select")
    found = firing_counts(units, firings)
    for feature in range(firings.width):
        at = firings.position[(firings.feature == feature) & read[firings.position]]
        assert found["tokens"][feature] == len(at)
        assert np.isclose(found["density"][feature], len(at) / read.sum())
        early = sum(1 <= place % units.length <= 3 for place in at.tolist())
        assert np.isclose(found["early_share"][feature], early / max(len(at), 1))


def test_early_in_a_conversation_is_behind_its_template(mined):
    """Contexts whose first tokens are a template's, another number of them in each."""
    chat = copy(mined.units)
    masked = 1 + np.arange(chat.contexts) % 7
    chat.counted = chat.counted & (np.tile(np.arange(chat.length), chat.contexts) >= np.repeat(masked, chat.length))
    at = np.flatnonzero(chat.in_split("explain"))
    firings = Firings(np.zeros(len(at), np.uint32), at, 1, value=np.ones(len(at), np.float32))
    early = np.mean([place % chat.length - masked[place // chat.length] < 3 for place in at.tolist()])
    assert np.isclose(firing_counts(chat, firings)["early_share"][0], early)


def test_what_fires_in_report_documents_changes_no_refusal(mined):
    before = refusals(firing_counts(mined.units, mined.firings), RuleSettings())
    for changed in (elsewhere, silent_in):
        firings = changed(mined.units, mined.firings, "report")
        assert refusals(firing_counts(mined.units, firings), RuleSettings()) == before
