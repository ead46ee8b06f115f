import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.shards import ActivationShard, read_shard
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.errors import NotReadyError
from scopeatlas.mining import coactivation, examples
from scopeatlas.mining.choosing import PER_STRATUM, STRATA, TOP_EXAMPLES
from scopeatlas.mining.cutting import WINDOW, windows_of
from scopeatlas.mining.examples import mine_examples, open_examples, read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.storage.store import Store
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import WIDTH


@pytest.fixture(scope="module")
def mined(medium, subject):
    return mine_examples(medium.store, medium.corpus, medium.entry, subject)[0]


@pytest.fixture(scope="module")
def windows(mined) -> pl.DataFrame:
    return read_examples(mined.examples)


@pytest.fixture(scope="module")
def dense(medium, subject):
    """Everything that was cached, as plain arrays: values [contexts, length, WIDTH] and columns of contexts."""
    values, ids, documents, splits, tokens = [], [], [], [], []
    stage = medium.store.stage(medium.entry.key, medium.corpus.id, "activations")
    for shard, key in zip(medium.corpus.shards, activation_keys(medium.corpus, medium.entry, subject), strict=True):
        contexts, acts = medium.corpus.contexts(shard), read_shard(stage.data_path(key, ".parquet"))
        flat = np.zeros((contexts.tokens.size, WIDTH), dtype=np.float32)
        flat[acts.token, acts.feature] = acts.value
        values.append(flat.reshape(*contexts.tokens.shape, WIDTH))
        ids += contexts.ids.tolist()
        documents += contexts.document_ids
        splits += [SPLITS[s] for s in contexts.splits]
        tokens.append(contexts.tokens)
    return np.concatenate(values), np.array(ids), np.array(documents), np.array(splits), np.concatenate(tokens)


def test_windows_equal_slices_of_the_dense_activations(rng):
    dense = (rng.random((30, 400)) * (rng.random((30, 400)) < 0.1)).astype(np.float32)
    feature, token = np.nonzero(dense)
    wanted, start = rng.integers(0, 30, 200), rng.integers(0, 400 - 16, 200)
    acts = ActivationShard(feature.astype(np.uint32), token.astype(np.uint32), dense[feature, token])
    found = windows_of(acts, wanted, start, 16)
    assert (found == [dense[f, s : s + 16] for f, s in zip(wanted, start, strict=True)]).all()


def test_each_window_holds_the_tokens_and_activations_around_its_peak(windows, dense, subject):
    values, ids, documents, splits, tokens = dense
    row_of = {int(context): row for row, context in enumerate(ids)}
    for example in windows.sample(300).iter_rows(named=True):
        row = row_of[example["context_id"]]
        context = values[row, :, example["feature"]]
        assert (splits[row], documents[row]) == (example["split"], example["document_id"])
        assert example["peak"] == context.max() > 0
        start = int(context.argmax()) - example["peak_at"]
        assert 0 <= start <= len(context) - WINDOW
        assert example["activations"] == context[start : start + WINDOW].tolist()
        assert example["tokens"] == tokens[row, start : start + WINDOW].tolist()
        expected = token_texts(subject.tokenizer, [t for t in example["tokens"] if t >= 0])
        assert [text for text in example["texts"] if text] == [text for text in expected if text]


def test_top_examples_are_the_strongest_of_distinct_documents(windows, dense):
    values, _, documents, splits, _ = dense
    top = windows.filter(pl.col("kind") == "top")
    for (feature, split), mine in top.group_by(["feature", "split"]):
        peaks = values[splits == split][:, :, feature].max(1)
        best: dict[str, float] = {}
        for document, peak in zip(documents[splits == split], peaks, strict=True):
            best[document] = max(best.get(document, 0), float(peak))
        expected = sorted((peak for peak in best.values() if peak > 0), reverse=True)[:TOP_EXAMPLES]
        assert mine.sort("rank")["peak"].to_list() == expected
        assert mine["document_id"].n_unique() == len(mine)


def test_every_feature_that_fires_has_examples_in_every_split_where_it_fires(windows, mined, dense):
    values, _, _, splits, _ = dense
    found = set(windows.filter(pl.col("kind") == "top").select("feature", "split").unique().rows())
    assert found == {(int(f), s) for s in SPLITS for f in np.flatnonzero(values[splits == s].any((0, 1)))}


def test_strata_hold_weaker_contexts_and_repeat_no_top_example(windows):
    strata = windows.filter(pl.col("kind") == "stratum")
    assert strata.group_by("feature", "split", "stratum").len()["len"].max() <= PER_STRATUM
    assert set(strata["stratum"]) == set(range(STRATA))
    assert not windows.select("feature", "context_id").is_duplicated().any()
    means = strata.group_by("feature", "split", "stratum").agg(pl.col("peak").mean()).sort("feature", "split", "stratum")
    steps = means.with_columns(step=pl.col("peak").diff().over("feature", "split")).drop_nulls("step")
    assert (steps["step"] > 0).mean() > 0.95


def test_the_feature_table_counts_what_brute_force_counts(mined, dense, medium):
    values, _, documents, splits, _ = dense
    table = mined.features.sort("feature")
    fired = values > 0
    assert table["tokens"].to_list() == fired.sum((0, 1)).tolist()
    assert np.allclose(table["density"], fired.sum((0, 1)) / medium.corpus.facts["tokens"])
    assert np.allclose(table["max_activation"], values.max((0, 1)))
    assert np.allclose(table["mean_activation"], [v[v > 0].astype(np.float64).mean() for v in values.transpose(2, 0, 1)])
    assert np.allclose(table["std_activation"], [v[v > 0].astype(np.float64).std() for v in values.transpose(2, 0, 1)])
    assert np.allclose(table["early_share"], fired[:, 1:4].sum((0, 1)) / fired.sum((0, 1)))
    for split in SPLITS:
        assert table[f"{split}_contexts"].to_list() == fired[splits == split].any(1).sum(0).tolist()
        few = [
            len({d for d, f in zip(documents[splits == split], fired[splits == split].any(1)[:, i], strict=True) if f})
            for i in range(WIDTH)
        ]
        remembered = table[f"{split}_documents"].to_list()
        assert all(got == expected if expected < 16 else got >= 16 for got, expected in zip(remembered, few, strict=True))


def test_the_feature_table_says_where_a_feature_is_and_how_strongly_it_writes(mined):
    assert set(mined.features["layer"]) == {1} and mined.features["index"].to_list() == list(range(WIDTH))
    assert (
        np.allclose(mined.features["decoder_norms"].list.explode(), 1, atol=1e-5) and len(mined.features["decoder_norms"][0]) == 1
    )


def test_some_features_are_read_without_the_rest(mined, windows):
    assert read_examples(mined.examples, [3, 7]).equals(windows.filter(pl.col("feature").is_in([3, 7])))


def test_a_finished_stage_is_reused(medium, mined, subject):
    again, reused = mine_examples(medium.store, medium.corpus, medium.entry, subject)
    assert reused and again.features.equals(mined.features) and again.examples == mined.examples


@pytest.fixture
def copy(medium, tmp_path):
    shutil.copytree(medium.store.root, tmp_path / "store")
    shutil.rmtree(
        medium.store.__class__(tmp_path / "store").stage(medium.entry.key, medium.corpus.id, "examples").root, ignore_errors=True
    )
    return replace(medium, store=Store(tmp_path / "store"))


@pytest.mark.parametrize("windows_held", [1, 700])
def test_ranges_of_features_change_nothing(copy, subject, mined, windows, monkeypatch, windows_held):
    monkeypatch.setattr(examples, "RANGE_WINDOWS", windows_held)
    parts, _ = mine_examples(copy.store, copy.corpus, copy.entry, subject)
    assert read_examples(parts.examples).equals(windows) and parts.features.equals(mined.features)
    assert pl.read_parquet(parts.histogram).equals(pl.read_parquet(mined.histogram))


def test_partners_are_counted_on_the_tokens_of_explain_documents(mined, dense):
    values, _, _, splits, _ = dense
    fires = (values[splits == "explain"] > 0).reshape(-1, WIDTH)
    both = fires.T.astype(float) @ fires
    alone = np.diag(both)
    table = pl.read_parquet(mined.partners)
    a, b = table["feature"].to_numpy(), table["partner"].to_numpy()
    assert (table["both"] == both[a, b]).all() and np.allclose(table["jaccard"], both[a, b] / (alone[a] + alone[b] - both[a, b]))
    jaccard = both / np.maximum(alone[:, None] + alone - both, 1)
    np.fill_diagonal(jaccard, 0)
    for feature in range(WIDTH):
        best = np.lexsort((np.arange(WIDTH), -jaccard[feature]))[: coactivation.PARTNERS]
        mine = table.filter(pl.col("feature") == feature).drop_nulls("jaccard_rank").sort("jaccard_rank")
        assert mine["partner"].to_list() == [other for other in best if jaccard[feature, other] > 0]


@pytest.mark.slow
def test_features_that_never_fire_are_passed_over(copy, subject, residual, tmp_path, monkeypatch):
    from tests.conftest import entry_of, sae_tensors, write_sae

    monkeypatch.setattr(examples, "RANGE_WINDOWS", 500)
    tensors = sae_tensors(residual)
    tensors["threshold"][32:64] = 1e6
    tensors["threshold"][:8] = 1e6
    entry = entry_of(write_sae(tmp_path / "half", tensors))
    cache_activations(copy.store, copy.corpus, [entry], subject)
    mined, _ = mine_examples(copy.store, copy.corpus, entry, subject)
    assert set(read_examples(mined.examples)["feature"]) == {*range(8, 32), *range(64, 96)}
    assert mined.features.filter(pl.col("tokens") == 0)["feature"].to_list() == [*range(8), *range(32, 64)]


def test_two_runs_are_byte_identical(copy, medium, mined, subject):
    again, _ = mine_examples(copy.store, copy.corpus, copy.entry, subject)
    for path in mined.examples.parent.glob("*"):
        if not path.name.endswith(".commit.json"):
            assert (again.examples.parent / path.name).read_bytes() == path.read_bytes(), path.name


def test_examples_are_not_ready_while_a_shard_of_activations_is_missing(copy, subject, mined):
    stage = copy.store.stage(copy.entry.key, copy.corpus.id, "activations")
    stage.discard(stage.record(activation_keys(copy.corpus, copy.entry, subject)[1]))
    with pytest.raises(NotReadyError, match="activations shard .* is not done"):
        mine_examples(copy.store, copy.corpus, copy.entry, subject)
    with pytest.raises(NotReadyError):
        open_examples(copy.store, copy.corpus.id, copy.entry.key, mined.key)


def test_promoted_tokens_stand_beside_the_statistics(mined, medium):
    assert mined.features["promoted"].list.len().unique().to_list() == [10]
    assert open_dictionary(medium.entry).width == len(mined.features)


@pytest.mark.parametrize(
    ("activations", "line"),
    [
        ([0, 0, 5, 0], "the river «flows» north"),
        ([0, 5, 5, 0], "the «river flows» north"),
        ([0, 5, 1, 5], "the «river» flows «north»"),
        ([5, 0, 0, 0], "«the» river flows north"),
        ([0, 0, 0, 0], "the river flows north"),
    ],
)
def test_runs_of_firing_tokens_stand_between_marks(activations, line):
    assert mark(["the", " river", " flows", " north"], [*activations, 9.0]) == line
