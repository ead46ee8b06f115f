"""The activation shard: one SAE's non-zero activations on one shard of contexts, sorted by feature.

What belongs here: the file format. What does not: how activations are computed (`cache.py`).

Parquet, three columns: feature (uint32, run-length), token (uint32, delta-packed; the position context row * context
length + offset), value (float16, byte-stream-split; times `value_scale` of the footer). Rows are sorted by (feature,
token), so one feature is read from its row groups alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.errors import StoreError
from scopeatlas.storage.files import atomic_path

ROW_GROUP = 1 << 17
_SCALE_KEY = b"scopeatlas.value_scale"


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


def write_shard(path: Path, feature: np.ndarray, token: np.ndarray, rounded: np.ndarray, *, scale: float) -> None:
    """Sort and write one shard, atomically. feature, token: integers [n]; rounded: float16 [n]."""
    order = np.argsort((feature.astype(np.uint64) << np.uint64(32)) | token.astype(np.uint64), kind="stable")
    table = pa.table(
        {
            "feature": pa.array(feature[order].astype(np.uint32)),
            "token": pa.array(token[order].astype(np.uint32)),
            "value": pa.array(rounded[order]),
        }
    ).replace_schema_metadata({_SCALE_KEY: repr(scale).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=ROW_GROUP,
            compression="zstd",
            use_dictionary=["feature"],  # pyright: ignore[reportArgumentType]
            column_encoding={"token": "DELTA_BINARY_PACKED", "value": "BYTE_STREAM_SPLIT"},
        )


def read_shard(path: Path, *, features: range | None = None) -> ActivationShard:
    """Read a shard, or a range of features of it without reading the rest."""
    filters = None if features is None else [("feature", ">=", features.start), ("feature", "<", features.stop)]
    table = pq.read_table(path, filters=filters)
    scale = np.float32(float((table.schema.metadata or {})[_SCALE_KEY]))
    return ActivationShard(
        table["feature"].to_numpy(),
        table["token"].to_numpy(),
        table["value"].to_numpy().astype(np.float32) * scale,
    )
