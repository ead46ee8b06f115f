"""Proposals read explain documents, the choice among them select documents, and scores report documents; nothing else."""

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.labels import rule_labeller
from scopeatlas.labels.rule_labeller import RuleSettings, propose_rules
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import examples_key, open_examples, read_examples
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from tests.planted import EXACT, Planted, elsewhere, firings_of, matching, mined_again, plant, silent_in

SETTINGS = LabelSettings()


def labels_of(planted: Planted, subject) -> pl.DataFrame:
    return label_features(planted.store, planted.corpus, planted.entry, subject, settings=SETTINGS)[0].table


def scores_of(planted: Planted, subject) -> pl.DataFrame:
    settings = ScoreSettings()
    return score_labels(planted.store, planted.corpus, planted.entry, subject, labels=SETTINGS, settings=settings)[0].table


@pytest.fixture
def by_split(medium, mined, subject):
    """Firings of one feature: in each split, where the token given for it is."""

    def by_split(**tokens: str):
        found = [np.empty(0, dtype=np.int64)]
        for split, token in tokens.items():
            at = matching(medium, subject, Rule("token", (token,)))
            found.append(at[mined.units.in_split(split)[at]])
        return firings_of([np.concatenate(found)], 1)

    return by_split


@pytest.fixture
def proposed(mined, monkeypatch):
    """The candidates that are proposed for some firings, whichever of them is chosen."""

    def proposed(firings) -> list:
        seen = []
        for name, place in (("_score_token_candidates", 2), ("_topic_lift", 2)):
            real = getattr(rule_labeller, name)

            def spy(*arguments, real=real, place=place):
                seen.append(arguments[place])
                return real(*arguments)

            with monkeypatch.context() as patched:
                patched.setattr(rule_labeller, name, spy)
                propose_rules(mined.units, firings, {}, RuleSettings())
        return [found.rows() if isinstance(found, pl.DataFrame) else found.tolist() for found in seen]

    return proposed


def test_no_document_is_in_two_splits(medium, mined):
    documents = medium.corpus.documents
    assert documents["document_id"].is_unique().all() and documents["text"].is_unique().all()
    pairs = set(zip(mined.units.document.tolist(), mined.units.split.tolist(), strict=True))
    assert len(pairs) == len({document for document, _ in pairs})


def test_no_example_is_of_a_document_of_another_split(medium, mined, subject):
    key = examples_key(mined.corpus, mined.entry, subject)
    windows = read_examples(open_examples(mined.store, mined.corpus.id, mined.entry.key, key).examples)
    splits = medium.corpus.documents.select("document_id", truth="split")
    assert windows.join(splits, on="document_id").filter(pl.col("split") != pl.col("truth")).is_empty()
    assert set(windows["split"]) == set(SPLITS)


@pytest.mark.parametrize("changed", [elsewhere, silent_in])
def test_firings_in_report_documents_change_no_label(medium, mined, planted, subject, tmp_path, changed):
    firings = changed(mined.units, mined.firings, "report")
    other = mined_again(medium, subject, mined.units, firings, tmp_path / "changed")
    assert labels_of(other, subject).equals(labels_of(planted, subject))


@pytest.mark.parametrize("split", ["explain", "select"])
def test_firings_in_the_other_documents_do_change_labels(medium, mined, planted, subject, tmp_path, split):
    firings = elsewhere(mined.units, mined.firings, split)
    other = mined_again(medium, subject, mined.units, firings, tmp_path / "changed")
    assert not labels_of(other, subject).equals(labels_of(planted, subject))


@pytest.mark.parametrize("split", ["select", "report"])
@pytest.mark.parametrize("changed", [elsewhere, silent_in])
def test_firings_in_held_out_documents_change_no_proposal(mined, proposed, split, changed):
    assert proposed(changed(mined.units, mined.firings, split)) == proposed(mined.firings)


def test_firings_in_explain_documents_do_change_proposals(mined, proposed):
    assert proposed(elsewhere(mined.units, mined.firings, "explain")) != proposed(mined.firings)


def test_what_fires_in_held_out_documents_alone_is_never_proposed(mined, by_split):
    (label,) = propose_rules(mined.units, by_split(explain=" of", select=" the", report=" the"), {}, RuleSettings(min_lift=-9))
    assert " the" not in Rule.from_json(label.rule).keys


def test_of_two_proposals_the_one_that_holds_on_select_documents_is_chosen(mined, by_split):
    both = by_split(explain=" the").position, by_split(explain=" of").position
    for token in (" the", " of"):
        held_out = by_split(select=token, report=" in").position
        (label,) = propose_rules(mined.units, firings_of([np.concatenate([*both, held_out])], 1), {}, RuleSettings())
        assert Rule.from_json(label.rule) == Rule("token", (token,))


@pytest.mark.parametrize("split", ["explain", "select"])
def test_firings_outside_report_documents_change_no_score(medium, mined, planted, subject, split):
    labels_of(planted, subject)
    before = scores_of(planted, subject)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "scores")
    stage.discard(next(stage.records()))
    plant(medium, subject, mined.units, elsewhere(mined.units, mined.firings, split), planted.store.root)
    assert scores_of(planted, subject).equals(before)


def test_firings_in_report_documents_do_change_scores(medium, mined, planted, subject):
    labels_of(planted, subject)
    plant(medium, subject, mined.units, elsewhere(mined.units, mined.firings, "report"), planted.store.root)
    exact = scores_of(planted, subject).row(by_predicate=pl.col("feature") == EXACT, named=True)
    assert exact["f1"] < 0.2
