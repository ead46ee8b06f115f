"""Putting one SAE's features into the atlas, whole or not at all.

What belongs here: generations on disk, the one upsert per SAE, its ledger and upkeep. What does not: what a feature's row
says (`tables.py`), the indexes (`indexes.py`), or making vectors (`embedding.py`).

The order is what makes a kill harmless: the generation's parquet, its record, one merge that replaces exactly this
SAE's rows, indexes, the ledger. Every row carries its generation, so the table itself says what is live in it, and a
run that died between merge and ledger is recognised rather than repeated or mistaken for the one before.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.indexes import build_indexes
from scopeatlas.atlas.tables import (
    FEATURES,
    GENERATION,
    KEY,
    PUBLICATION_ROW,
    PUBLICATIONS,
    VECTORS,
    checked_rows,
    connect,
    database_folder,
    features_batch,
    first_line,
    has_table,
    newest_publications,
    open_table,
    persistently,
    same_layout,
    sql,
    stamp_of,
)
from scopeatlas.errors import AtlasError, NotReadyError
from scopeatlas.storage.files import atomic_path, content_hash, locked
from scopeatlas.storage.records import IDENTITY_LENGTH, ShardKey, StageFolder
from scopeatlas.storage.uris import Location, readable

if TYPE_CHECKING:
    from lancedb.table import Table

_PUBLISH_VERSION = 2  # bump when the same rows would give other bytes
_SMALL_FRAGMENTS = 20
_UNINDEXED_ROWS = 100_000
_DAY_S = 86_400


@dataclass(frozen=True)
class Publication:
    """What one publication did. `reused`: this very generation was live already, and nothing was written."""

    sae: str
    generation: str
    rows: int
    table_version: int
    path: Location
    reused: bool


def publish(
    rows: pl.DataFrame, vectors: Mapping[str, np.ndarray], *, root: Location, folder: Location, embedder: Embedder
) -> Publication:
    """Make `rows` (one SAE, FEATURE_ROW) with their VECTORS, [rows, dim] each, the atlas's rows of that SAE.

    root: the store. folder: where this SAE's generations lie. The generation is the hash of the rows and the embedder;
    the same rows again write nothing. Killed at any point, the next call finishes the work.
    Raises AtlasError on rows that do not fit, or if the atlas holds vectors of another embedder.
    """
    return republish(write_generation(rows, vectors, root=root, folder=folder, embedder=embedder), root=root, folder=folder)


def write_generation(
    rows: pl.DataFrame, vectors: Mapping[str, np.ndarray], *, root: Location, folder: Location, embedder: Embedder
) -> str:
    """The first half of `publish`: the generation's file and its record, if they are not there; returns its name."""
    shapes = {name: vectors[name].shape for name in VECTORS}
    dim = next(iter(shapes.values()))[-1]
    if set(shapes.values()) != {(len(rows), dim)} or not all(np.isfinite(vectors[name]).all() for name in VECTORS):
        raise AtlasError(f"vectors of shape {shapes} for {len(rows)} features; one finite vector per row and text is needed")
    rows = checked_rows(rows)
    order = rows["feature"].arg_sort().to_numpy()
    rows = rows[order]
    stamp = embedder.stamp
    identity = content_hash(_PUBLISH_VERSION, stamp.identity, int(dim), rows.write_ndjson())
    stage, key = StageFolder(folder), ShardKey(FEATURES, identity)
    with atlas_lock(root, rows["sae"][0]):
        if not stage.is_done(key):
            ordered = {name: vectors[name][order] for name in VECTORS}
            batch = features_batch(rows, ordered, generation=identity[:IDENTITY_LENGTH], stamp=stamp)
            _write_generation(stage, key, batch)
    return identity[:IDENTITY_LENGTH]


def republish(generation: str, *, root: Location, folder: Location) -> Publication:
    """Make a generation of an SAE that is on disk the live one; touches no other SAE and needs no embedder.

    Raises NotReadyError if `folder` holds no such generation.
    """
    stage = StageFolder(folder)
    records = [r for r in stage.records() if generation and r.key.name == FEATURES and r.key.identity.startswith(generation)]
    if len(records) != 1 or not stage.is_done(records[0].key):
        raise NotReadyError(f"{folder} holds no intact generation {generation!r}; publish the SAE again")
    with atlas_lock(root, records[0].facts["sae"]):
        return _bring_live(stage.data_path(records[0].key, ".parquet"), root=root)


def generation_path(folder: Location, generation: str) -> Location:
    """Where a generation's rows lie in a publication's folder, if they were not pruned."""
    return StageFolder(folder).data_path(ShardKey(FEATURES, generation), ".parquet")


def maintain(root: Location) -> bool:
    """Compact the tables, fold new rows into the indexes, prune versions past a week and files of killed processes.

    Returns False, having done nothing, if another process is at it.
    """
    with atlas_lock(root, "upkeep", wait=False) as held:
        if held:
            for name in (FEATURES, PUBLICATIONS):
                if has_table(root, name):
                    persistently(open_table(root, name).optimize)
            sweep_unfinished(database_folder(root))
            sweep_unfinished(root / "embeddings")
        return held


def sweep_unfinished(folder: Location) -> int:
    """Delete `.tmp*` files older than a day, which killed writers leave and nobody reads; returns how many.

    In an object store a writer that is killed leaves nothing.
    """
    if not isinstance(folder, Path):
        return 0
    old = [p for p in folder.rglob(".tmp*") if p.is_file() and time.time() - p.stat().st_mtime > _DAY_S]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _write_generation(stage: StageFolder, key: ShardKey, batch: pa.Table) -> None:
    sweep_unfinished(stage.root)
    path = stage.data_path(key, ".parquet")
    with atomic_path(path) as temporary:
        # Otherwise lists come back with other field names than the table's, and are of another type to Lance.
        pq.write_table(batch, temporary, compression="zstd", use_compliant_nested_type=False)
    stage.commit(key, [path], {"sae": batch["sae"][0].as_py(), "rows": batch.num_rows, "embedder": stamp_of(batch.schema).name})


def _bring_live(path: Location, *, root: Location) -> Publication:
    """From a committed generation to a verified, indexed table and a line in the ledger; each step only if needed."""
    batch = pq.read_table(readable(path))
    sae, generation = batch["sae"][0].as_py(), batch[GENERATION][0].as_py()
    if not same_layout(batch.schema):
        raise AtlasError(f"generation {generation} of {sae} was made by another version of Scope Atlas; publish the SAE again")
    try:
        features, ledger = _tables(root, batch.schema)
        live = _is_live(features, batch)
        newest = newest_publications(ledger).filter(sae=sae)[GENERATION].to_list()
        reused = live and newest == [generation]
        if not live:
            _replace_rows(features, batch)
        if not reused:
            with atlas_lock(root, "upkeep"):
                persistently(lambda: build_indexes(features))
            _append(ledger, batch, features.version)
            _maintain_if_due(root, features)
        return Publication(sae, generation, batch.num_rows, features.version, path, reused)
    except (OSError, RuntimeError, ValueError) as error:
        raise AtlasError(f"cannot publish {sae} to {database_folder(root)}: {first_line(error)}") from error


def _tables(root: Location, schema: pa.Schema) -> "tuple[Table, Table]":
    """Both tables, created if need be. Raises AtlasError if the atlas was made by another embedder or layout."""
    with atlas_lock(root, "tables"):
        for name, wanted in ((FEATURES, schema), (PUBLICATIONS, PUBLICATION_ROW)):
            if not has_table(root, name):
                connect(root).create_table(name, schema=wanted, exist_ok=True)  # another machine may be quicker
    features = open_table(root, FEATURES)
    if not same_layout(features.schema):
        raise AtlasError(f"{database_folder(root)} was made by another version of Scope Atlas; move it away and publish again")
    there, here = stamp_of(features.schema), stamp_of(schema)
    if there.identity != here.identity:
        held = f"the atlas at {root} holds vectors of {there.name} ({there.identity[:8]})"
        raise AtlasError(f"{held}, not of {here.name} ({here.identity[:8]}); use that embedder or another store")
    return features, open_table(root, PUBLICATIONS)


def _of_sae(sae: str, generation: str | None = None) -> str:
    from lancedb.expr import col, lit

    condition = col("sae") == lit(sae)
    return sql(condition if generation is None else condition & (col(GENERATION) == lit(generation)))


def _is_live(features: "Table", batch: pa.Table) -> bool:
    """Whether the table holds exactly this generation of the SAE: rows come from one merge, so counts decide."""
    sae, generation = batch["sae"][0].as_py(), batch[GENERATION][0].as_py()
    counts = {features.count_rows(_of_sae(sae)), features.count_rows(_of_sae(sae, generation))}
    return counts == {batch.num_rows}


def _replace_rows(features: "Table", batch: pa.Table) -> None:
    """Replace the SAE's rows in one commit and look at the result. Raises AtlasError if it is not what was asked."""
    sae = batch["sae"][0].as_py()
    _merge(features, batch)
    if not _verified(features, batch):
        features.delete(_of_sae(sae))  # only keys doubled by a foreign writer come here: a merge would update both copies
        _merge(features, batch)
    if not _verified(features, batch):
        found = features.count_rows(_of_sae(sae))
        raise AtlasError(f"the atlas holds {found} rows of {sae}, not {batch.num_rows}; is another program writing to it?")


def _merge(features: "Table", batch: pa.Table) -> None:
    merge = features.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all()
    # use_index(False): through an index on the key, concurrent writers double rows without an error (reference/lancedb.md 1.1)
    merge.when_not_matched_by_source_delete(_of_sae(batch["sae"][0].as_py())).use_index(False).execute(
        batch,
        on_bad_vectors="null",  # as they are: the vector of an empty text is null
    )


def _verified(features: "Table", batch: pa.Table) -> bool:
    keys = features.search().where(_of_sae(batch["sae"][0].as_py())).select([KEY]).to_arrow()[KEY]
    return len(keys) == batch.num_rows == len(keys.unique()) and _is_live(features, batch)


def _append(ledger: "Table", batch: pa.Table, version: int) -> None:
    line = {
        "sae": batch["sae"][0].as_py(),
        "generation": batch[GENERATION][0].as_py(),
        "corpus": ", ".join(sorted(batch["corpus"].unique().to_pylist())),
        "rows": batch.num_rows,
        "published_at": datetime.now(UTC),
        "table_version": version,
        "embedder": stamp_of(batch.schema).identity,
    }
    ledger.add(pa.Table.from_pylist([line], schema=PUBLICATION_ROW))


def _maintain_if_due(root: Location, features: "Table") -> None:
    unindexed = max((index.num_unindexed_rows or 0 for index in features.list_indices()), default=0)
    fragments = features.stats()["fragment_stats"]  # type: ignore[index]  # annotated as an object, but a dict
    if fragments["num_small_fragments"] > _SMALL_FRAGMENTS or unindexed > _UNINDEXED_ROWS:
        maintain(root)


def atlas_lock(root: Location, what: str, *, wait: bool = True) -> AbstractContextManager[bool]:
    """The lock of one thing in the atlas, against every other process on this machine."""
    return locked(database_folder(root) / ".locks" / f"{content_hash(what)[:16]}.lock", wait=wait)
