import numpy as np
import pyarrow.parquet as pq
import pytest

from scopeatlas.activations import shards
from scopeatlas.activations.shards import read_shard, round_values, write_shard
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
