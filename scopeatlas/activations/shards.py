"""The activation shard: one SAE's non-zero activations on one shard of contexts, sorted by feature.

What belongs here: the file format, and gathering in bounded memory what goes into a file. What does not: how activations
are computed (`cache.py`).

Parquet, one row per non-zero, sorted by (feature, token): `feature` (uint32, delta-packed), `gap` (uint32) and `value`
(float16, times `value_scale` of the footer; both byte-stream-split). The tokens of a feature are the running sum of its gaps:
the first is the position itself, context row * context length + offset. So what is alike lies together, and one feature is
read from its row groups alone; a feature that lies in two goes on in the second. `bench/shards.py` compares it to others.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.errors import StoreError
from scopeatlas.storage.files import atomic_path
from scopeatlas.storage.uris import Location, readable

ROW_GROUP = 1 << 17
TILE_NONZEROS = 1 << 20
SPILL_BYTES = 64 << 20
_SCALE_KEY = b"scopeatlas.value_scale"
_VALUE_BITS = 15  # a positive float16 has no sign bit, and its bits order as its values do
_TOKEN_BITS = 24
_FEATURE_BITS = 64 - _TOKEN_BITS - _VALUE_BITS
_INFINITE = 0x7C00
_MERGE_WORDS = 1 << 20


@dataclass(frozen=True)
class ActivationShard:
    """Non-zeros sorted by (feature, token): feature uint32 [n], token uint32 [n], value float32 [n]."""

    feature: np.ndarray
    token: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.feature)


def round_values(values: np.ndarray, scale: float) -> np.ndarray:
    """float32 activations to the float16 that is stored, in units of `scale`. Raises StoreError if one overflows."""
    with np.errstate(over="ignore"):
        rounded = (values / np.float32(scale)).astype(np.float16)
    if not np.isfinite(rounded).all():
        raise StoreError(
            f"an activation of {values.max():.3g} does not fit 16 bits at scale {scale}; is the site or the normalisation wrong?"
        )
    return rounded


class ShardWriter:
    """Gathers one dictionary's non-zeros on one shard, batch by batch, in bounded memory.

    Each is one 64-bit word, feature | token | value from the high bits to the low, so that sorting is sorting words. At most
    `spill_bytes` of them are held, and as much again while merging; beyond that they go to sorted runs in a temporary folder.
    The bytes written depend neither on the order they came in nor on whether they were spilled. Where TMPDIR is in memory, so is
    what is spilled.
    """

    def __init__(self, *, scale: float, spill_bytes: int = SPILL_BYTES):
        self.scale = scale
        self._words = np.empty(max(1, spill_bytes // 8), dtype=np.uint64)
        self._held = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs: list[Path] = []

    def add(self, feature: np.ndarray, token: np.ndarray, rounded: np.ndarray) -> None:
        """feature, token: integers [n]; rounded: float16 [n] in units of the scale, positive and finite; in any order.

        Raises StoreError for a non-zero that has no place in a shard.
        """
        start = 0
        while start < len(feature):
            if self._held == len(self._words):
                self._spill()
            stop = start + len(self._words) - self._held
            words = _packed(feature[start:stop], token[start:stop], rounded[start:stop])
            self._words[self._held : self._held + len(words)] = words
            self._held += len(words)
            start = stop

    def write(self, path: Location) -> int:
        """Sort and write the shard, atomically; returns how many non-zeros it holds. The writer is used up.

        Raises StoreError if a feature fires twice on one token.
        """
        nonzeros, schema = 0, _schema(self.scale)
        with atomic_path(path) as temporary, _parquet(temporary, schema) as writer:
            before = np.empty(0, dtype=np.uint64)
            for words in _in_groups(self._sorted()):
                writer.write_table(_table(words, before, schema))
                nonzeros, before = nonzeros + len(words), words[-1:]
        self.close()
        return nonzeros

    def close(self) -> None:
        """Drop what is held, its memory and the runs on disk."""
        self._runs, self._held, self._words = [], 0, np.empty_like(self._words)  # memory never touched costs nothing
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spill(self) -> None:
        """Move what is held to a sorted run on disk."""
        try:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="scopeatlas-runs-")
            path = Path(self._folder.name) / f"{len(self._runs)}.run"
            self._held_sorted().tofile(path)
        except OSError as error:
            raise StoreError(f"cannot write to {tempfile.gettempdir()}: {error}; free space or point TMPDIR elsewhere") from error
        self._runs.append(path)
        self._held = 0

    def _held_sorted(self) -> np.ndarray:
        held = self._words[: self._held]
        held.sort()
        return held

    def _sorted(self) -> Iterator[np.ndarray]:
        """All words in order, in pieces."""
        if not self._runs:
            return iter([self._held_sorted()])
        self._spill()
        return _merged(self._runs)


def _packed(feature: np.ndarray, token: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """One word for each non-zero, uint64 [n]. Raises StoreError where one does not fit."""
    bits = rounded.view(np.uint16)
    if len(bits) and int((bits - np.uint16(1)).max()) >= _INFINITE - 1:
        raise StoreError("only positive, finite values have a place in an activation shard; leave out what 16 bits round to 0")
    for name, column, limit in (("feature", feature, _FEATURE_BITS), ("token", token, _TOKEN_BITS)):
        if len(column) and (int(column.min()) < 0 or int(column.max()) >> limit):
            raise StoreError(
                f"{name} {int(column.max()):,} does not fit an activation shard, which holds {2**limit:,}; cut the corpus into more shards"
            )
    high = feature.astype(np.uint64) << np.uint64(_TOKEN_BITS) | token.astype(np.uint64)
    return high << np.uint64(_VALUE_BITS) | bits


def _merged(runs: Sequence[Path]) -> Iterator[np.ndarray]:
    """The words of sorted runs in order, in pieces; of each run, one block is in memory at a time."""
    block = max(1, _MERGE_WORDS // len(runs))
    blocks = [np.empty(0, dtype=np.uint64) for _ in runs]
    read = [0] * len(runs)
    while True:
        for i, run in enumerate(runs):
            if not len(blocks[i]):
                blocks[i] = np.fromfile(run, dtype=np.uint64, count=block, offset=8 * read[i])
                read[i] += len(blocks[i])
        ends = [words[-1] for words in blocks if len(words)]
        if not ends:
            return
        cuts = [np.searchsorted(words, min(ends), side="right") for words in blocks]  # what is unread is at least min(ends)
        piece = np.concatenate([words[:cut] for words, cut in zip(blocks, cuts, strict=True)])
        blocks = [words[cut:] for words, cut in zip(blocks, cuts, strict=True)]
        piece.sort()
        yield piece


def _in_groups(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same words in pieces of ROW_GROUP, but for the last."""
    rest = np.empty(0, dtype=np.uint64)
    for piece in pieces:
        rest = np.concatenate([rest, piece]) if len(rest) else piece
        whole = len(rest) - len(rest) % ROW_GROUP
        yield from (rest[start : start + ROW_GROUP] for start in range(0, whole, ROW_GROUP))
        rest = rest[whole:]
    if len(rest):
        yield rest


def _schema(scale: float) -> pa.Schema:
    columns = {"feature": pa.uint32(), "gap": pa.uint32(), "value": pa.float16()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pa.schema(fields, metadata={_SCALE_KEY: repr(scale).encode()})


def _parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """One page per column of a row group: a byte plane of ROW_GROUP is then a zstd block, with a table of its own."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        write_statistics=["feature"],  # pyright: ignore[reportArgumentType]
        column_encoding={"feature": "DELTA_BINARY_PACKED", "gap": "BYTE_STREAM_SPLIT", "value": "BYTE_STREAM_SPLIT"},
        data_page_size=8 * ROW_GROUP,
        max_rows_per_page=ROW_GROUP,
    )


def _table(words: np.ndarray, before: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Words in order as the columns that are stored. before: the word before them, if there is one.

    Raises StoreError if a feature fires twice on one token.
    """
    high = np.concatenate([before, words]) >> np.uint64(_VALUE_BITS)
    feature = (high >> np.uint64(_TOKEN_BITS)).astype(np.uint32)
    gap = (high & np.uint64((1 << _TOKEN_BITS) - 1)).astype(np.uint32)
    same = feature[1:] == feature[:-1]
    gap[1:] -= np.where(same, gap[:-1], 0)
    twice = np.flatnonzero(same & (gap[1:] == 0))
    if len(twice):
        raise StoreError(f"feature {feature[twice[0]]} has two activations at one token; what was gathered is not one pass")
    value = (words & np.uint64((1 << _VALUE_BITS) - 1)).astype(np.uint16).view(np.float16)
    return pa.table([feature[len(before) :], gap[len(before) :], value], schema=schema)


def write_shard(path: Location, feature: np.ndarray, token: np.ndarray, rounded: np.ndarray, *, scale: float) -> None:
    """Sort and write a shard of which everything is at hand, atomically. The columns are those of `ShardWriter.add`."""
    with ShardWriter(scale=scale) as writer:
        writer.add(feature, token, rounded)
        writer.write(path)


def read_shard(path: Location, *, features: range | None = None) -> ActivationShard:
    """Read a shard, or a range of features of it without reading the rest."""
    with pq.ParquetFile(readable(path)) as file:
        if features is None:
            return _shard(file.read())
        bounds = [file.metadata.row_group(group).column(0).statistics for group in range(file.num_row_groups)]
        groups = [group for group, bound in enumerate(bounds) if bound.min < features.stop and bound.max >= features.start]
        table = file.read_row_groups(groups)
    start, stop = np.searchsorted(table["feature"].to_numpy(), [features.start, features.stop])
    return _shard(table.slice(start, stop - start))


def read_tiles(path: Location, *, nonzeros: int = TILE_NONZEROS) -> Iterator[ActivationShard]:
    """A shard in tiles of consecutive whole features, each of at most so many non-zeros: a tile and a row group are held.

    A feature that alone has more is a tile of its own. Where tiles begin depends on the non-zeros only.
    """
    with pq.ParquetFile(readable(path)) as file:
        rest = file.schema_arrow.empty_table()
        for group in range(file.num_row_groups):
            rest = pa.concat_tables([rest, file.read_row_group(group)])
            while end := _tile_end(rest["feature"].to_numpy(), nonzeros):
                yield _shard(rest.slice(0, end))
                rest = rest.slice(end)
        if rest.num_rows:
            yield _shard(rest)


def _tile_end(feature: np.ndarray, nonzeros: int) -> int:
    """How long the first tile of a sorted feature column is; 0 if that depends on what follows."""
    if len(feature) <= nonzeros:
        return 0
    start, stop = (int(np.searchsorted(feature, feature[nonzeros], side=side)) for side in ("left", "right"))
    return start or stop % len(feature)


def _shard(table: pa.Table) -> ActivationShard:
    """Rows of whole features, decoded."""
    scale = np.float32(float((table.schema.metadata or {})[_SCALE_KEY]))
    feature, gap, value = (table[name].to_numpy() for name in ("feature", "gap", "value"))
    starts = np.flatnonzero(np.append(True, feature[1:] != feature[:-1])[: len(feature)])
    token = np.cumsum(gap, dtype=np.uint32)  # modulo 2**32, as is what is taken away
    token -= np.repeat(token[starts] - gap[starts], np.diff(np.append(starts, len(feature))))
    return ActivationShard(feature, token, value.astype(np.float32) * scale)
