"""A small SAE of real activations, mined, labelled, scored and published: what questions are asked of."""

import pytest

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.stage import index_features
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from tests.planted import Planted, planted_chain


@pytest.fixture(scope="module")
def published(medium, subject, tmp_path_factory) -> Planted:
    """Copy the store before changing it."""
    planted = planted_chain(medium, subject, tmp_path_factory.mktemp("published") / "store")
    there = planted.store, planted.corpus, planted.entry, subject
    labels, scores = LabelSettings(), ScoreSettings()
    label_features(*there, settings=labels)
    score_labels(*there, labels=labels, settings=scores)
    index_features(*there, embedder=Embedder(), labels=labels, scores=scores)
    return planted
