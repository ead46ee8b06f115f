import numpy as np
import polars as pl
import pytest

from scopeatlas.mining import sketch_files
from scopeatlas.mining.sketch_files import SketchFiles, read_context_table, read_counts, read_sketch, write_sketch
from scopeatlas.mining.sketches import Sketch, context_table
from tests.mining.test_sketches import LENGTH, WIDTH, random_firings, sketch_of


@pytest.fixture
def files(tmp_path) -> SketchFiles:
    return SketchFiles(*(tmp_path / f"{name}.parquet" for name in ("cells", "histogram", "entries", "contexts")))


def write(files: SketchFiles, rng: np.random.Generator, *, silent: bool = False) -> tuple[Sketch, pl.DataFrame]:
    values, contexts = random_firings(rng)
    sketch = sketch_of(values * (not silent), contexts, np.arange(len(contexts)), 7)
    table = context_table(contexts, np.full(len(contexts), LENGTH)).with_columns(pairs=rng.integers(0, 99, len(contexts)))
    write_sketch(files, sketch, table)
    return sketch, table


def assert_equal(a: Sketch, b: Sketch) -> None:
    assert a.features == b.features and (a.seen == b.seen).all()
    assert a.entries.equals(b.entries) and a.entries.schema == b.entries.schema
    assert a.histogram.equals(b.histogram) and a.histogram.schema == b.histogram.schema
    for name, counts in b.counts.items():
        assert (a.counts[name] == counts).all() and a.counts[name].dtype == counts.dtype


def test_a_sketch_reads_back_as_it_was_written(rng, files):
    sketch, table = write(files, rng)
    assert_equal(read_sketch(files, range(WIDTH), shard=7), sketch)
    assert read_context_table(files).equals(table)


@pytest.mark.parametrize("row_group", [5, 1 << 16])
def test_a_range_of_features_is_read_without_the_rest(rng, files, monkeypatch, row_group):
    monkeypatch.setattr(sketch_files, "ROW_GROUP", row_group)
    sketch, _ = write(files, rng)
    for start in range(WIDTH):
        for stop in range(start + 1, WIDTH + 1):
            inside = pl.col("feature").is_between(start, stop - 1)
            counts = {name: array[:, start:stop] for name, array in sketch.counts.items()}
            part = Sketch(range(start, stop), counts, sketch.seen, sketch.histogram.filter(inside), sketch.entries.filter(inside))
            assert_equal(read_sketch(files, range(start, stop), shard=7), part)


def test_a_shard_where_nothing_fires_reads_back_too(rng, files):
    sketch, _ = write(files, rng, silent=True)
    assert_equal(read_sketch(files, range(WIDTH), shard=7), sketch)
    assert not any(array.any() for array in read_counts(files, range(2, 4)).values())
