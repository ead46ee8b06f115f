import tempfile

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from scopeatlas.activations import shards
from scopeatlas.activations.shards import ShardWriter, read_shard, read_tiles, round_values, write_shard
from scopeatlas.errors import StoreError


@pytest.fixture
def nonzeros(rng):
    """Random non-zeros in no order: feature [n], token [n], value float32 [n]."""
    n, width, tokens = 5000, 300, 2000
    cells = rng.choice(width * tokens, size=n, replace=False)
    return cells // tokens, cells % tokens, rng.uniform(0.01, 6e4, n).astype(np.float32)


def test_a_shard_reads_back_sorted_by_feature_and_token(tmp_path, nonzeros):
    feature, token, value = nonzeros
    rounded = round_values(value, 4.0)
    write_shard(tmp_path / "a.parquet", feature, token, rounded, scale=4.0)
    back = read_shard(tmp_path / "a.parquet")
    expected = sorted(zip(feature.tolist(), token.tolist(), (rounded.astype(np.float32) * 4).tolist(), strict=True))
    assert list(zip(back.feature.tolist(), back.token.tolist(), back.value.tolist(), strict=True)) == expected


def test_the_bytes_of_a_shard_do_not_depend_on_the_order_of_its_input(tmp_path, nonzeros, rng):
    feature, token, value = nonzeros
    shuffled = rng.permutation(len(feature))
    write_shard(tmp_path / "a.parquet", feature, token, round_values(value, 1.0), scale=1.0)
    write_shard(tmp_path / "b.parquet", feature[shuffled], token[shuffled], round_values(value[shuffled], 1.0), scale=1.0)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_range_of_features_is_read_without_the_rest(tmp_path, nonzeros, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP", 256)
    feature, token, value = nonzeros
    write_shard(tmp_path / "a.parquet", feature, token, round_values(value, 1.0), scale=1.0)
    whole, part = read_shard(tmp_path / "a.parquet"), read_shard(tmp_path / "a.parquet", features=range(40, 55))
    wanted = (whole.feature >= 40) & (whole.feature < 55)
    assert wanted.any() and (part.feature == whole.feature[wanted]).all()
    assert (part.token == whole.token[wanted]).all() and (part.value == whole.value[wanted]).all()
    groups = pq.ParquetFile(tmp_path / "a.parquet").metadata
    bounds = [groups.row_group(i).column(0).statistics for i in range(groups.num_row_groups)]
    assert sum(b.min < 55 and b.max >= 40 for b in bounds) < len(bounds) / 2


def test_every_feature_read_alone_is_its_part_of_the_whole(tmp_path, nonzeros, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP", 7)  # so that many features lie in two row groups or three
    feature, token, value = nonzeros
    write_shard(tmp_path / "a.parquet", feature, token, round_values(value, 1.0), scale=1.0)
    for wanted in range(290, 302):
        part = read_shard(tmp_path / "a.parquet", features=range(wanted, wanted + 1))
        mine = np.flatnonzero(feature == wanted)
        mine = mine[np.argsort(token[mine])]
        assert part.feature.tolist() == [wanted] * len(mine) and part.token.tolist() == token[mine].tolist()
        assert part.value.tolist() == value[mine].astype(np.float16).astype(np.float32).tolist()


def test_anything_that_reads_parquet_gets_tokens_as_running_sums_of_gaps(tmp_path, nonzeros, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP", 256)
    feature, token, value = nonzeros
    write_shard(tmp_path / "a.parquet", feature, token, round_values(value, 1.0), scale=1.0)
    found = pl.read_parquet(tmp_path / "a.parquet").with_columns(token=pl.col("gap").cum_sum().over("feature"))
    whole = read_shard(tmp_path / "a.parquet")
    for column in ("feature", "token", "value"):
        assert found[column].cast(pl.Float32).to_list() == getattr(whole, column).tolist()


def test_a_shard_without_non_zeros_reads_back_empty(tmp_path):
    write_shard(tmp_path / "a.parquet", np.zeros(0, np.uint32), np.zeros(0, np.uint32), np.zeros(0, np.float16), scale=2.0)
    assert len(read_shard(tmp_path / "a.parquet")) == 0


def test_values_are_rounded_once_and_to_eleven_bits(rng):
    values = rng.uniform(1e-3, 1e3, 1000).astype(np.float32)
    scale = 2.0**-2
    stored = round_values(values, scale).astype(np.float64) * scale
    assert np.abs(stored / values.astype(np.float64) - 1).max() <= 2**-11
    assert (round_values(stored.astype(np.float32), scale).astype(np.float64) * scale == stored).all()


def test_a_value_that_does_not_fit_is_an_error_and_not_an_infinity():
    with pytest.raises(StoreError, match="1e\\+06 does not fit 16 bits"):
        round_values(np.array([1.0, 1e6], dtype=np.float32), 1.0)


@pytest.mark.parametrize(("spill_bytes", "merge_words"), [(8 * 617, 40), (8 * 617, 1 << 20), (8 * 161, 200), (1 << 20, 40)])
def test_batches_in_any_order_spilled_or_not_give_the_bytes_of_one_write(
    tmp_path, nonzeros, rng, monkeypatch, spill_bytes, merge_words
):
    monkeypatch.setattr(shards, "ROW_GROUP", 256)
    monkeypatch.setattr(shards, "_MERGE_WORDS", merge_words)
    feature, token, value = nonzeros
    rounded = round_values(value, 1.0)
    write_shard(tmp_path / "whole.parquet", feature, token, rounded, scale=1.0)
    cuts = np.sort(rng.integers(0, len(feature), 9))
    batches = np.split(rng.permutation(len(feature)), cuts)
    with ShardWriter(scale=1.0, spill_bytes=spill_bytes) as writer:
        for batch in batches:
            writer.add(feature[batch], token[batch], rounded[batch])
        assert writer.write(tmp_path / "batches.parquet") == len(feature)
    assert (tmp_path / "batches.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_no_run_is_left_on_disk_by_a_writer_that_finished_or_failed(tmp_path, nonzeros, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    feature, token, value = nonzeros
    writer = ShardWriter(scale=1.0, spill_bytes=800)
    writer.add(feature, token, round_values(value, 1.0))
    assert list((tmp_path / "runs").rglob("*.run"))
    writer.write(tmp_path / "a.parquet")
    assert not list((tmp_path / "runs").iterdir())
    with pytest.raises(ZeroDivisionError), ShardWriter(scale=1.0, spill_bytes=800) as failing:
        failing.add(feature, token, round_values(value, 1.0))
        raise ZeroDivisionError
    assert not list((tmp_path / "runs").iterdir())


def test_the_largest_indices_and_the_smallest_and_largest_values_are_exact(tmp_path):
    feature = np.array([0, 2**25 - 1, 2**25 - 1], dtype=np.int64)
    token = np.array([2**24 - 1, 0, 2**24 - 1], dtype=np.int64)
    rounded = np.array([2.0**-24, 65504, 2.0**-24], dtype=np.float16)
    write_shard(tmp_path / "a.parquet", feature, token, rounded, scale=1.0)
    back = read_shard(tmp_path / "a.parquet")
    assert back.feature.tolist() == feature.tolist() and back.token.tolist() == token.tolist()
    assert back.value.tolist() == rounded.astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("feature", "token", "rounded", "said"),
    [
        (2**25, 0, 1.0, "feature 33,554,432 does not fit"),
        (0, 2**24, 1.0, "token 16,777,216 does not fit"),
        (0, -1, 1.0, "token -1 does not fit"),
        (0, 0, 0.0, "only positive"),
        (0, 0, -1.0, "only positive"),
        (0, 0, np.inf, "only positive"),
        (0, 0, np.nan, "only positive"),
    ],
)
def test_what_has_no_place_in_a_shard_is_an_error(feature, token, rounded, said):
    with ShardWriter(scale=1.0) as writer, pytest.raises(StoreError, match=said):
        writer.add(np.array([feature]), np.array([token]), np.array([rounded], dtype=np.float16))


@pytest.mark.parametrize("row_group", [64, 100_000])
def test_tiles_are_whole_features_in_order_and_no_larger_than_asked(tmp_path, nonzeros, monkeypatch, row_group):
    monkeypatch.setattr(shards, "ROW_GROUP", row_group)
    feature, token, value = nonzeros
    large = silent_tokens(feature, token)
    feature = np.concatenate([feature, np.full(len(large), 17)])
    token, value = np.concatenate([token, large]), np.concatenate([value, np.ones(len(large), np.float32)])
    write_shard(tmp_path / "a.parquet", feature, token, round_values(value, 2.0), scale=2.0)
    whole, tiles = read_shard(tmp_path / "a.parquet"), list(read_tiles(tmp_path / "a.parquet", nonzeros=150))
    for column in ("feature", "token", "value"):
        assert np.array_equal(np.concatenate([getattr(tile, column) for tile in tiles]), getattr(whole, column))
    firings = np.bincount(whole.feature)
    assert all(len(tile) <= 150 or np.unique(tile.feature).tolist() == [17] for tile in tiles)
    for tile, following in zip(tiles, tiles[1:], strict=False):
        assert tile.feature[-1] < following.feature[0]
        assert len(tile) + firings[following.feature[0]] > 150


def silent_tokens(feature: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Tokens below 2,000 at which feature 17 does not fire yet."""
    return np.setdiff1d(np.arange(2000), token[feature == 17])


def test_a_shard_without_non_zeros_has_no_tiles(tmp_path):
    ShardWriter(scale=1.0).write(tmp_path / "a.parquet")
    assert list(read_tiles(tmp_path / "a.parquet")) == [] and len(read_shard(tmp_path / "a.parquet", features=range(9))) == 0


@pytest.mark.parametrize("row_group", [2, 100])
def test_a_feature_that_fires_twice_on_one_token_is_an_error_and_no_file(tmp_path, monkeypatch, row_group):
    monkeypatch.setattr(shards, "ROW_GROUP", row_group)
    feature, token = np.array([1, 1, 2, 2, 3]), np.array([5, 6, 5, 5, 5])
    with pytest.raises(StoreError, match="feature 2 has two activations"):
        write_shard(tmp_path / "a.parquet", feature, token, np.arange(1, 6).astype(np.float16), scale=1.0)
    assert not list(tmp_path.iterdir())
