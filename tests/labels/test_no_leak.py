"""Proposals read explain documents, the choice among them select documents, and scores report documents; nothing else."""

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.labels import labels_of as labels_in
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import require
from scopeatlas.labels import rule_labeller
from scopeatlas.labels.rule_labeller import RuleSettings, propose_rules
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import examples_key, open_examples, read_examples
from scopeatlas.runner.local import silent
from scopeatlas.scoring.run import ScoreRun
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.scoring.writes import PROMPT_TOKENS, report_prompts
from tests.conftest import WIDTH
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
        for name, place in (("_score_token_candidates", 2), ("_score_compositions", 2), ("_topic_lift", 2)):
            real = getattr(rule_labeller, name)

            def spy(*arguments, real=real, place=place):
                seen.append(arguments[place])
                return real(*arguments)

            with monkeypatch.context() as patched:
                patched.setattr(rule_labeller, name, spy)
                propose_rules(mined.units, firings, {}, RuleSettings())
        listed = {pl.DataFrame: lambda table: table.rows(), np.ndarray: lambda array: array.tolist(), list: list}
        return [listed[type(found)](found) for found in seen]

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
    """But for the controls that explain documents define: which tokens trigger a feature, and which feature is nearest."""
    labels_of(planted, subject)
    before = scores_of(planted, subject)
    stage = planted.store.stage(planted.entry.key, planted.corpus.id, "scores")
    stage.discard(next(stage.records()))
    plant(medium, subject, mined.units, elsewhere(mined.units, mined.firings, split), planted.store.root)
    after = scores_of(planted, subject)
    if split == "explain":
        defined = [name for name in before.columns if "trigger" in name or "neighbour" in name]
        before, after = (table.filter(pl.col("arm") != "trigger_tokens").drop(defined) for table in (before, after))
    assert after.equals(before)


def test_firings_in_report_documents_do_change_scores(medium, mined, planted, subject):
    labels_of(planted, subject)
    plant(medium, subject, mined.units, elsewhere(mined.units, mined.firings, "report"), planted.store.root)
    scores = scores_of(planted, subject)
    exact = scores.row(by_predicate=(pl.col("feature") == EXACT) & (pl.col("arm") == "own"), named=True)
    assert exact["f1"] < 0.2


def test_what_labels_are_tested_on_is_of_report_documents_alone(medium, planted, subject):
    labels = labels_in(labels_of(planted, subject).filter(pl.col("status") == "ok"))
    run = ScoreRun(
        planted.store, planted.corpus, planted.entry, subject, labels, settings=ScoreSettings(), width=WIDTH, log=silent
    )
    windows = run.windows(labels)
    require(windows, "report")
    splits = dict(medium.corpus.documents.select("document_id", "split").iter_rows())
    assert {splits[document] for document in windows.table["document_id"]} == {"report"}
    starts = {
        tuple(contexts.tokens[i, :PROMPT_TOKENS]): contexts.document_ids[i]
        for contexts in map(medium.corpus.contexts, medium.corpus.shards)
        for i in range(len(contexts))
    }
    assert {splits[starts[tuple(prompt)]] for prompt in report_prompts(medium.corpus)[0]} == {"report"}
