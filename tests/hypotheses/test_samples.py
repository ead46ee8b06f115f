import re
from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.samples import (
    KINDS,
    TRIGGER_TOKENS,
    WIDTH,
    WINDOW_SCHEMA,
    Windows,
    draw_windows,
    require,
    trigger_tokens,
)
from scopeatlas.hypotheses.units import Firings, Units

FEATURES = 24
NEVER, EVERYWHERE = FEATURES, FEATURES + 1
POSITIVES, RANDOM, TRIGGER, NEIGHBOUR = 20, 8, 6, 7


@pytest.fixture(scope="module")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    """Random numbers that are fresh on every run; the seed of a failure is in its captured output."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed of rng: {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def firings(units, rng) -> Firings:
    """Features that fire mostly on a token or two of their own, NEVER, and EVERYWHERE in each context. In random order."""
    keys, texts = units.column("token")
    counted = np.flatnonzero(units.counted)
    common = np.bincount(keys[counted], minlength=len(texts)).argsort()[::-1]
    picks = []
    for feature in range(FEATURES):
        liked = np.flatnonzero(np.isin(keys, common[2 * feature : 2 * feature + 2]))
        stray = rng.choice(counted, rng.integers(0, 120), replace=False)
        picks.append(np.union1d(liked[rng.random(len(liked)) < rng.uniform(0.2, 0.9)], stray))
    picks += [np.zeros(0, dtype=np.int64), counted[rng.random(len(counted)) < 0.5]]
    feature = np.repeat(np.arange(len(picks), dtype=np.uint32), [len(p) for p in picks])
    position = np.concatenate(picks)
    value = rng.lognormal(size=len(position)).round(1).astype(np.float32) + np.float32(0.1)  # rounded, so that peaks tie
    order = rng.permutation(len(position))
    return Firings(feature[order], position[order], len(picks), value=value[order])


@pytest.fixture(scope="module")
def neighbours(rng) -> Neighbours:
    def random_others() -> np.ndarray:
        table = [rng.choice(np.setdiff1d(np.arange(FEATURES), [f]), 3, replace=False) for f in range(FEATURES + 2)]
        return np.array(table, dtype=np.int32)

    cosine = random_others()
    cosine[5:8, 1:] = -1
    return Neighbours(cosine, random_others())


def drawn(units, firings, neighbours, *, features=None, split: Split = "report", seed: int = 0) -> Windows:
    counts = {"positives": POSITIVES, "random": RANDOM, "trigger": TRIGGER, "neighbour": NEIGHBOUR}
    wanted = list(range(firings.width)) if features is None else features
    return draw_windows(units, firings, wanted, split=split, neighbours=neighbours, seed=seed, **counts)


@pytest.fixture(scope="module", params=SPLITS)
def windows(units, firings, neighbours, request) -> Windows:
    return drawn(units, firings, neighbours, split=request.param)


@pytest.fixture(scope="module")
def dense(units, firings) -> np.ndarray:
    """What fires, the plain way: float32 [F, contexts, length]."""
    table = np.zeros((firings.width, units.contexts * units.length), dtype=np.float32)
    table[firings.feature, firings.position] = firings.value
    return table.reshape(firings.width, units.contexts, units.length)


def rows_of(windows: Windows, kind: str) -> list[dict]:
    rows = windows.table.filter(pl.col("kind") == kind).rows(named=True)
    assert rows, f"no {kind} windows were drawn"
    return rows


def members(units: Units, split: Split) -> np.ndarray:
    return np.flatnonzero(units.context_split == SPLITS.index(split))


def peaks(dense: np.ndarray, feature: int, contexts: np.ndarray) -> np.ndarray:
    highest = dense[feature, contexts].max(axis=1)
    return highest[highest > 0]


def test_a_window_says_what_stands_and_what_fires_in_it(windows, units, dense):
    keys, texts = units.column("token")
    keys = keys.reshape(units.contexts, units.length)
    assert windows.table.schema == WINDOW_SCHEMA
    for row in windows.table.rows(named=True):
        stop = row["start"] + len(row["texts"])
        assert row["texts"] == [texts[k] if k >= 0 else "" for k in keys[row["context"], row["start"] : stop]]
        assert row["activations"] == dense[row["feature"], row["context"], row["start"] : stop].tolist()
        assert 0 <= row["focus"] < len(row["texts"]) <= WIDTH


def test_no_window_begins_at_bos_or_ends_in_padding(windows, units):
    counted = units.counted.reshape(units.contexts, units.length)
    for row in windows.table.rows(named=True):
        first, last = counted[row["context"]].nonzero()[0][[0, -1]]
        assert first <= row["start"] and row["start"] + len(row["texts"]) <= last + 1
        assert len(row["texts"]) == min(WIDTH, last + 1 - first)


def test_every_window_is_of_a_document_of_its_split(windows, units, medium_corpus):
    of = dict(medium_corpus.corpus.documents.select("document_id", "split").rows())
    for row in windows.table.rows(named=True):
        assert of[row["document_id"]] == windows.split
        assert units.documents[row["document"]] == row["document_id"]
        assert units.context_document[row["context"]] == row["document"]


def test_a_positive_window_holds_the_peak_of_its_context_at_its_focus(windows, dense):
    for row in rows_of(windows, "positive"):
        highest = dense[row["feature"], row["context"]].max()
        assert highest > 0 and row["activations"][row["focus"]] == highest


def test_no_negative_window_fires(windows):
    for kind in KINDS[1:]:
        assert all(not any(row["activations"]) and row["decile"] == -1 for row in rows_of(windows, kind))


def test_random_contexts_are_those_in_which_the_feature_never_fires(windows, dense):
    assert all(not dense[row["feature"], row["context"]].any() for row in rows_of(windows, "random"))


def test_negatives_of_contexts_that_fire_share_nothing_with_a_positive_window(units, firings, neighbours):
    windows = draw_windows(
        units, firings, range(firings.width), split="explain", neighbours=neighbours, trigger=90, neighbour=90, width=6
    )
    taken: dict[tuple[int, int], list[range]] = {}
    for row in rows_of(windows, "positive"):
        taken.setdefault((row["feature"], row["context"]), []).append(range(row["start"], row["start"] + len(row["texts"])))
    beside = 0
    for row in (row for kind in ("trigger", "neighbour") for row in rows_of(windows, kind)):
        mine = set(range(row["start"], row["start"] + len(row["texts"])))
        near = taken.get((row["feature"], row["context"]), [])
        beside += len(near)
        assert not any(mine & set(other) for other in near)
    assert beside, "none stands in a context that has a positive window: nothing was tried"


def test_trigger_windows_are_of_contexts_that_are_silent_throughout_as_far_as_there_are_any(windows, units, firings, dense):
    keys = units.column("token")[0].reshape(units.contexts, units.length)
    triggers = trigger_tokens(units, firings, range(firings.width))
    contexts = members(units, windows.split)
    for feature in range(FEATURES):
        liked = triggers.filter(pl.col("feature") == feature)["key"].to_numpy()
        silent = ~dense[feature, contexts].any(axis=1) & np.isin(keys[contexts], liked).any(axis=1)
        mine = windows.of(feature).filter(pl.col("kind") == "trigger")["context"].to_numpy()
        used = sum(not dense[feature, context].any() for context in mine)
        assert used == min(TRIGGER, silent.sum()), feature


def test_a_trigger_window_holds_one_of_the_most_frequent_firing_tokens_of_explain(windows, units, firings):
    keys, texts = units.column("token")
    in_explain = units.in_split("explain")
    for row in rows_of(windows, "trigger"):
        mine = firings.position[(firings.feature == row["feature"]) & in_explain[firings.position]]
        counts = Counter(keys[mine].tolist())
        rarest = sorted(counts.values(), reverse=True)[:TRIGGER_TOKENS][-1]
        key = keys[row["context"] * units.length + row["start"] + row["focus"]]
        assert counts[key] >= rarest and row["texts"][row["focus"]] == texts[key]


def test_in_a_neighbour_window_a_nearest_feature_has_its_peak(windows, neighbours, dense):
    for row in rows_of(windows, "neighbour"):
        near = {*neighbours.cosine[row["feature"]], *neighbours.coactive[row["feature"]]} - {-1}
        other = dense[row["neighbour"], row["context"]]
        assert row["neighbour"] in near
        assert other[row["start"] + row["focus"]] == other.max() > 0
    assert (windows.table.filter(pl.col("kind") != "neighbour")["neighbour"] == -1).all()


def test_a_farther_neighbour_is_taken_where_the_nearest_leaves_no_window(units):
    """Feature 0's nearest fires nowhere without it, so that all windows are of the second nearest."""
    explain = members(units, "explain") * units.length + 20
    position = np.concatenate([explain[:40], explain[:40], explain[40:]])
    feature = np.repeat(np.array([0, 1, 2], dtype=np.uint32), [40, 40, len(explain) - 40])
    three = Firings(feature, position, 3, value=np.ones(len(position), dtype=np.float32))
    none = np.full((3, 2), -1, dtype=np.int32)
    near = Neighbours(np.array([[1, 2], [-1, -1], [-1, -1]], dtype=np.int32), none)
    windows = draw_windows(units, three, [0], split="explain", neighbours=near, neighbour=NEIGHBOUR)
    assert [row["neighbour"] for row in rows_of(windows, "neighbour")] == [2] * NEIGHBOUR


def test_deciles_are_numpys_quantiles_of_the_context_peaks_of_that_split(windows, units, dense):
    contexts = members(units, windows.split)
    for row in rows_of(windows, "positive"):
        mine = peaks(dense, row["feature"], contexts).astype(np.float64)
        rank = np.arange(1, 10) * (len(mine) - 1)  # in tenths, and whole: numpy's 0.7 * 10 is more than 7
        low, high = np.sort(mine)[rank // 10], np.sort(mine)[-(-rank // 10)]
        value = row["activations"][row["focus"]]
        assert (high <= value).sum() <= row["decile"] <= (low <= value).sum()
        if np.abs(np.quantile(mine, np.arange(1, 10) / 10) - value).min() > 1e-6:  # not on an edge, where it is rounding
            assert row["decile"] == np.searchsorted(np.quantile(mine, np.arange(1, 10) / 10), value, side="right")


def test_positives_come_from_as_many_documents_as_there_are(windows, units, dense):
    contexts = members(units, windows.split)
    for feature, mine in windows.table.filter(pl.col("kind") == "positive").group_by("feature"):
        fires = contexts[dense[feature[0], contexts].max(axis=1) > 0]
        assert mine["document"].n_unique() == min(POSITIVES, len(np.unique(units.context_document[fires])))
        assert len(mine) == min(POSITIVES, len(fires)) == mine["context"].n_unique()


def test_positives_are_of_all_deciles_alike(units, firings, neighbours):
    windows = draw_windows(units, firings, [EVERYWHERE], split="explain", neighbours=None, positives=30)
    counts = windows.table.filter(pl.col("kind") == "positive")["decile"].value_counts()
    assert len(counts) == 10 and counts["count"].max() - counts["count"].min() <= 2


def test_as_many_negatives_are_drawn_as_the_split_has(windows, units, firings, dense):
    contexts = members(units, windows.split)
    for feature in range(firings.width):
        counts = dict(windows.of(feature)["kind"].value_counts().rows())
        silent = (dense[feature, contexts].max(axis=1) == 0).sum()
        assert counts.get("random", 0) == min(RANDOM, silent), feature
    kinds = {feature: set(windows.of(feature)["kind"]) for feature in (NEVER, EVERYWHERE)}
    assert kinds[NEVER] == {"random", "neighbour"}
    assert "positive" in kinds[EVERYWHERE] and "random" not in kinds[EVERYWHERE]


def test_where_the_focus_lies_does_not_tell_positives_from_negatives(units, firings, neighbours):
    """Neither by its mean: in each kind it is drawn from the second half of the window."""
    table = draw_windows(units, firings, range(FEATURES), split="explain", neighbours=neighbours, random=50, trigger=50).table
    inner = table.filter(pl.col("start") > 1, pl.col("start") + pl.col("texts").list.len() < units.length)
    assert inner["focus"].min() == WIDTH // 2 and inner["focus"].max() == WIDTH - 1
    means = dict(inner.group_by("kind").agg(pl.col("focus").mean()).rows())
    assert set(means) == set(KINDS) and max(means.values()) - min(means.values()) < 3


def test_the_same_windows_are_drawn_again_whichever_other_features_are_asked_for(units, firings, neighbours):
    every = drawn(units, firings, neighbours)
    for feature in (0, 7, EVERYWHERE):
        assert drawn(units, firings, neighbours, features=[feature]).table.equals(every.of(feature))
    assert drawn(units, firings, neighbours, features=[7, 0]).table.equals(every.table.filter(pl.col("feature").is_in([0, 7])))


def test_another_seed_draws_other_windows(units, firings, neighbours):
    one, other = (drawn(units, firings, neighbours, seed=seed).table for seed in (0, 1))
    assert not one.equals(other)
    assert not one.filter(pl.col("kind") == "random")["context"].equals(other.filter(pl.col("kind") == "random")["context"])


def test_the_order_in_which_firings_are_listed_changes_nothing(units, firings, neighbours):
    order = np.argsort(firings.position, kind="stable")
    sorted_ = Firings(firings.feature[order], firings.position[order], firings.width, value=firings.value[order])
    assert drawn(units, sorted_, neighbours).table.equals(drawn(units, firings, neighbours).table)


def test_trigger_tokens_are_counted_in_explain_alone(units, firings):
    keys = units.column("token")[0]
    in_explain = units.in_split("explain")
    table = trigger_tokens(units, firings, [3, 4])
    for feature in (3, 4):
        mine = firings.position[(firings.feature == feature) & in_explain[firings.position]]
        expected = sorted(Counter(keys[mine].tolist()).items(), key=lambda item: (-item[1], item[0]))[:TRIGGER_TOKENS]
        assert table.filter(pl.col("feature") == feature).select("key", "hits").rows() == expected


def test_windows_are_refused_by_a_test_of_any_other_split(windows):
    require(windows, windows.split)
    for split in SPLITS:
        if split != windows.split:
            with pytest.raises(LeakError, match=f"the {windows.split} split"):
                require(windows, split)


def test_windows_that_only_claim_to_be_of_a_split_are_refused(units, firings, neighbours):
    explain, report = (drawn(units, firings, neighbours, split=split) for split in ("explain", "report"))
    leaked = replace(report, table=explain.table)
    with pytest.raises(LeakError, match="of the explain split"):
        require(leaked, "report")
    one_row = replace(report, table=pl.concat([report.table, explain.table.head(1)]))
    with pytest.raises(LeakError, match=explain.table["document_id"][0]):
        require(one_row, "report")
    with pytest.raises(LeakError, match="of no known split"):
        require(Windows("report", report.table), "report")


def test_kinds_of_which_none_are_wanted_are_not_drawn(units, firings, neighbours):
    none = {"positives": 0, "random": 0, "trigger": 0, "neighbour": 0}
    for kind, name in zip(KINDS, none, strict=True):
        table = draw_windows(units, firings, range(FEATURES), split="report", neighbours=neighbours, **(none | {name: 3})).table
        assert set(table["kind"]) == {kind} and table["feature"].value_counts()["count"].max() == 3


def test_no_feature_and_a_feature_without_firings_give_empty_tables(units, firings):
    assert draw_windows(units, firings, [], split="report", neighbours=None).table.schema == WINDOW_SCHEMA
    nothing = Firings(np.zeros(0, np.uint32), np.zeros(0, np.int64), 4, value=np.zeros(0, np.float32))
    table = draw_windows(units, nothing, [2], split="report", neighbours=None).table
    assert set(table["kind"]) == {"random"} and len(table) == 20


def test_no_document_of_one_split_nearly_repeats_one_of_another(medium_corpus):
    """Word 5-grams, compared exactly: what the corpus drops by an estimate must be gone from between the splits."""

    def grams(text: str) -> set[str]:
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    documents = [(split, grams(text)) for split, text in medium_corpus.corpus.documents.select("split", "text").rows()]
    worst = max(
        len(one & other) / len(one | other)
        for i, (split, one) in enumerate(documents)
        for of, other in documents[:i]
        if of != split
    )
    assert worst < 0.8
