"""What an explainer and a judge are shown by the labels stage, and which documents its labels are of."""

import json
from collections import Counter

import polars as pl
import pytest

from scopeatlas.corpus.leakage import find_leaks
from scopeatlas.labels.stage import LabelSettings, documents_read
from tests.explainer_brain import ExplainerBrain, evidence_of, explanation
from tests.labels.staging import config
from tests.planted import EXACT, RANDOM, elsewhere, mined_again, silent_in


@pytest.mark.parametrize(("changed", "split"), [(elsewhere, "select"), (elsewhere, "report"), (silent_in, "report")])
def test_what_an_explainer_is_shown_does_not_depend_on_held_out_documents(
    medium, mined, subject, serve, tmp_path, label, changed, split
):
    sent = []
    for name, firings in {"as they are": mined.firings, "changed": changed(mined.units, mined.firings, split)}.items():
        server = serve()
        copy = mined_again(medium, subject, mined.units, firings, tmp_path / name)
        settings = LabelSettings(explainer=config(server), method="contrastive")
        label(copy, settings, only=[EXACT, RANDOM])
        sent.append(sorted(json.dumps(body["messages"]) for body in server.requests))
    assert sent[0] == sent[1] and len(sent[0]) == 2


def test_every_document_that_labels_name_is_of_the_split_it_was_read_as(planted, judging, label):
    read = documents_read(label(planted, judging).table)
    assert Counter(split for _, split in read).keys() == {"explain", "select"}
    assert not find_leaks(planted.corpus, read).found


def test_a_document_read_as_of_another_split_is_a_leak(planted, judging, label):
    read = documents_read(label(planted, judging).table)
    assert find_leaks(planted.corpus, [(document, "report") for document, _ in read[:1]]).found


def test_each_request_is_about_one_feature_and_marks_what_fires(planted, server, asking, label):
    label(planted, asking, only=[EXACT])
    (body,) = server.requests
    examples = evidence_of(body)["ACTIVATING EXAMPLES"]
    assert len(examples) == 20 and all("<<the>>" in example["text"] for example in examples)


def test_the_documents_that_edits_are_of_are_read_as_select(planted, label):
    found = label(planted)
    tried = pl.DataFrame({"document_id": ["", "doc-b", "doc-a", "doc-b"]})
    assert documents_read(found.table, tried) == [("doc-a", "select"), ("doc-b", "select")]


@pytest.mark.parametrize("split", ["report", "explain"])
def test_the_judge_is_shown_select_documents_alone(medium, mined, subject, serve, tmp_path, label, split):
    sent = []
    for name, firings in {"as they are": mined.firings, "changed": elsewhere(mined.units, mined.firings, split)}.items():
        server = serve(brain=ExplainerBrain(explains=lambda evidence: explanation("of")))
        copy = mined_again(medium, subject, mined.units, firings, tmp_path / name)
        settings = LabelSettings(explainer=config(server), judge=config(server), method="max_activating")
        label(copy, settings, only=[EXACT])
        texts = [evidence_of(body)["TEXTS"] for body in server.requests if "DESCRIPTION" in evidence_of(body)]
        sent.append({text for round in texts for _, text in round})
    assert len(sent[0]) > 10
    assert (sent[0] == sent[1]) == (split == "report")  # what is a trigger, and who the neighbours are, is known from explain
