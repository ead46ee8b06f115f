from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.samples import draw_windows
from scopeatlas.scoring.retrieval import retrieve
from scopeatlas.scoring.table import score_table
from tests.planted import firings_of


@pytest.fixture(scope="module")
def firings(units):
    draw = np.random.default_rng(0)
    return firings_of([draw.choice(np.flatnonzero(units.counted), 200, replace=False) for _ in range(30)], 30)


@pytest.fixture(scope="module")
def windows(units, firings):
    return draw_windows(units, firings, range(30), split="report", neighbours=None)


LABELS = [Label(f, "llm", "ok", f"label {f}", f"Texts about {f}.") for f in range(30)]
TRIGGERS = [f"{f}, {f + 1}" for f in range(30)]


def rows_of(labels, windows, embed, triggers=TRIGGERS):
    rows = retrieve(labels, windows, triggers, embed, min_documents=3, seed=0)
    return {(row["feature"], row["arm"]): row for row in score_table(rows).iter_rows(named=True)}


def random_embedder(rng):
    """A vector of its own for each text, of length 1."""
    known: dict[str, np.ndarray] = {}

    def embed(texts):
        made = rng.normal(size=(len(texts), 16))
        for text, vector in zip(texts, made / np.linalg.norm(made, axis=1, keepdims=True), strict=True):
            known.setdefault(text, vector.astype(np.float32))
        return np.array([known[text] for text in texts])

    embed.known = known
    return embed


def test_the_score_is_how_well_the_cosine_ranks_a_features_windows(windows, rng):
    embed = random_embedder(rng)
    rows = rows_of(LABELS, windows, embed)
    for label in LABELS:
        mine = windows.of(label.feature)
        truth = (mine["kind"] == "positive").to_numpy()
        shown = np.array([embed.known["".join(texts)] for texts in mine["texts"].to_list()])
        for arm, text in (("own", label.reads), ("trigger_tokens", TRIGGERS[label.feature])):
            cosine, row = shown @ embed.known[text], rows[label.feature, arm]
            kept = (mine["kind"] != "trigger").to_numpy() | (arm == "own")
            assert row["auroc"] == pytest.approx(roc_auc_score(truth[kept], cosine[kept]), abs=1e-6)
            assert row["auprc"] == pytest.approx(average_precision_score(truth[kept], cosine[kept]), abs=1e-6)
        assert (rows[label.feature, "own"]["unit"], rows[label.feature, "own"]["status"]) == ("window", "scored")


def test_trigger_tokens_are_compared_without_the_windows_that_were_drawn_for_one(windows, rng):
    embed = random_embedder(rng)
    rows = rows_of(LABELS, windows, embed)
    for label in LABELS:
        mine = windows.of(label.feature).filter(windows.of(label.feature)["kind"] != "trigger")
        shown = np.array([embed.known["".join(texts)] for texts in mine["texts"].to_list()])
        expected = roc_auc_score((mine["kind"] == "positive").to_numpy(), shown @ embed.known[label.reads])
        row = rows[label.feature, "trigger_tokens"]
        assert row["against"] == pytest.approx(expected, abs=1e-6) and row["negatives_trigger"] == 0
        assert rows[label.feature, "own"]["negatives_trigger"] > 0


def test_a_label_that_no_other_can_stand_in_for_has_no_shuffled_arm(windows, rng):
    rows = rows_of(LABELS[:1], windows, random_embedder(rng))
    assert rows[0, "shuffled"]["status"] == "not_applicable" and rows[0, "shuffled"]["auroc"] is None
    assert rows[0, "own"]["status"] == "scored" and rows[0, "own"]["lift"] is None


def test_it_states_no_accuracy(windows, rng):
    rows = rows_of(LABELS, windows, random_embedder(rng))
    assert all(row[name] is None for row in rows.values() for name in ("f1", "balanced_accuracy", "precision", "recall"))


def test_labels_that_mean_nothing_centre_on_chance_and_so_do_shuffled_ones(windows, rng):
    rows = rows_of(LABELS, windows, random_embedder(rng))
    for arm in ("own", "shuffled", "trigger_tokens"):
        assert np.mean([rows[f, arm]["auroc"] for f in range(30)]) == pytest.approx(0.5, abs=0.08)  # five standard errors
    assert sum(rows[f, "own"]["p_value"] <= 0.01 for f in range(30)) <= 6  # more: once in a million runs


def test_the_shuffled_arm_is_the_text_of_another_feature(windows, rng):
    embed = random_embedder(rng)
    rows = rows_of(LABELS, windows, embed)
    for label in LABELS[:5]:
        mine = windows.of(label.feature)
        truth = (mine["kind"] == "positive").to_numpy()
        shown = np.array([embed.known["".join(texts)] for texts in mine["texts"].to_list()])
        others = [roc_auc_score(truth, shown @ embed.known[other.reads]) for other in LABELS if other is not label]
        assert min(abs(np.array(others) - rows[label.feature, "shuffled"]["auroc"])) < 1e-6


def test_windows_of_another_split_are_refused(units, firings, rng):
    for wrong in ("explain", "select"):
        drawn = draw_windows(units, firings, range(3), split=wrong, neighbours=None)
        for given in (drawn, replace(drawn, split="report")):
            with pytest.raises(LeakError):
                rows_of(LABELS[:3], given, random_embedder(rng))


def test_each_text_is_embedded_once(windows, rng):
    asked: list[str] = []
    inner = random_embedder(rng)
    rows_of(LABELS, windows, lambda texts: asked.extend(texts) or inner(texts))
    assert len(asked) == len(set(asked))


@pytest.mark.slow
def test_with_the_real_embedder_a_topic_is_nearer_to_its_windows(units):
    words = ("war", "music", "city")
    keys, texts = units.column("word")
    firings = firings_of([np.flatnonzero(units.counted & (keys == texts.index(word))) for word in words], 3)
    windows = draw_windows(units, firings, range(3), split="report", neighbours=None)
    labels = [Label(f, "llm", "ok", word, f"texts about {word}") for f, word in enumerate(words)]
    rows = rows_of(labels, windows, Embedder().embed, list(words))
    scored = [row for (_, arm), row in rows.items() if arm == "own" and row["status"] == "scored"]
    assert scored and np.mean([row["auroc"] for row in scored]) > 0.7
