"""Sketches on disk: four tables, of which a range of features is read without the rest.

What belongs here: their columns, writing and reading. What does not: what a sketch is (`sketches.py`) or when one is
made (`examples.py`).

cells: feature, split and the counts of `Sketch`, where a feature fires. histogram: as in `Sketch`. entries: feature, row,
peak, position; what else is known of a context is in contexts, by row: context_id, document, split, tokens, pairs.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.mining.sketches import COUNTS, Sketch, entry_table, seen_in
from scopeatlas.storage.files import atomic_path
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.uris import Location, readable

ROW_GROUP = 1 << 16


@dataclass(frozen=True)
class SketchFiles:
    """Where the tables of one shard's sketch lie."""

    cells: Location
    histogram: Location
    entries: Location
    contexts: Location

    @classmethod
    def of(cls, stage: StageFolder, key: ShardKey) -> "SketchFiles":
        return cls(*(stage.data_path(key, f".{part}.parquet") for part in ("cells", "histogram", "entries", "contexts")))

    @property
    def all(self) -> tuple[Location, ...]:
        return self.cells, self.histogram, self.entries, self.contexts


def write_sketch(files: SketchFiles, sketch: Sketch, contexts: pl.DataFrame) -> None:
    """Write a shard's sketch and contexts (with their pairs), each file atomically."""
    feature, split = np.nonzero(sketch.counts["tokens"].T)
    cells = {"feature": feature.astype(np.uint32) + np.uint32(sketch.features.start), "split": split.astype(np.uint8)}
    _write(files.cells, pa.table(cells | {name: counts[split, feature] for name, counts in sketch.counts.items()}))
    _write(files.histogram, sketch.histogram.to_arrow())
    _write(files.entries, sketch.entries.select("feature", "row", "peak", "position").to_arrow())
    _write(files.contexts, contexts.to_arrow())


def read_sketch(files: SketchFiles, features: range, *, shard: int = 0) -> Sketch:
    """A range of features of the sketch of shard number `shard`, as it was written."""
    contexts = read_context_table(files)
    entries = _read(files.entries, features)
    columns = [entries[name].to_numpy() for name in ("feature", "row", "peak", "position")]
    return Sketch(
        features,
        read_counts(files, features),
        seen_in(contexts),
        _read(files.histogram, features),
        entry_table(*columns, contexts=contexts, shard=shard),
    )


def read_counts(files: SketchFiles, features: range) -> dict[str, np.ndarray]:
    """The counts of a range of features: see `Sketch`."""
    cells = _read(files.cells, features)
    place = cells["split"].to_numpy(), cells["feature"].to_numpy() - np.uint32(features.start)
    counts = {}
    for name, dtype in COUNTS.items():
        counts[name] = np.zeros((len(SPLITS), len(features)), dtype=dtype)
        counts[name][place] = cells[name].to_numpy()
    return counts


def read_context_table(files: SketchFiles) -> pl.DataFrame:
    """The shard's contexts by row: context_id, document, split, tokens, pairs."""
    return pl.read_parquet(readable(files.contexts))


def _write(path: Location, table: pa.Table) -> None:
    split_bytes = [name for name in ("peak", "sum", "sum2", "max") if name in table.column_names]
    dictionary = [name for name in table.column_names if name not in split_bytes]
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=ROW_GROUP,
            compression="zstd",
            use_dictionary=dictionary,  # pyright: ignore[reportArgumentType]
            use_byte_stream_split=split_bytes,  # pyright: ignore[reportArgumentType]
        )


def _read(path: Location, features: range) -> pl.DataFrame:
    """The rows of some features of a table that is sorted by feature, and of the row groups around them nothing else."""
    with pq.ParquetFile(readable(path)) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        bounds = [group.column(0).statistics if group.num_rows else None for group in groups]
        wanted = [i for i, b in enumerate(bounds) if b is not None and b.min < features.stop and b.max >= features.start]
        table = file.read_row_groups(wanted)
    start, stop = np.searchsorted(table["feature"].to_numpy(), [features.start, features.stop])
    return pl.DataFrame(pl.from_arrow(table.slice(start, stop - start)))
