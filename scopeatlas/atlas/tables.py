"""What the atlas's tables hold, and opening them.

What belongs here: the schemas, checking rows against them, connecting to LanceDB. What does not: the order in which rows
are written (`publish.py`), or how they are asked for (`search.py`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa

from scopeatlas.atlas.embedding import EmbedderStamp, first_line
from scopeatlas.atlas.terms import terms_of
from scopeatlas.dictionaries.sparse import MULTI_LAYER
from scopeatlas.errors import AtlasError
from scopeatlas.storage.uris import Location, endpoint, sizes_under

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.expr import Expr
    from lancedb.table import Table

FEATURES = "features"
PUBLICATIONS = "publications"
KEY, GENERATION, TERMS = "key", "generation", "terms"
VECTORS = {"vector": "search_text", "example_vector": "example_text"}
"""The columns that hold vectors, and the column of the text that each is of."""
_COMMITS = 20

SCORES = (
    *("f1", "f1_low", "f1_high", "precision", "recall"),
    *("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", "auprc"),
    *("lift", "lift_low", "lift_high", "q_value", "shuffled_f1", "shuffled_balanced_accuracy"),
)
"""The test of the label shown, null where there is none; `scoring.table` says what each is."""

FEATURE_ROW = pl.Schema(
    {
        "key": pl.String,  # "{sae}/{name}", the one primary key; the name is `feature_name`'s
        "release": pl.String,
        "sae": pl.String,
        "model": pl.String,
        "corpus": pl.String,
        "kind": pl.String,
        "site": pl.String,  # what the feature reads: of a multi-layer kind its own layer's
        "site_out": pl.String,  # what it writes; several as model.layers.{5,9}.output
        "layer": pl.Int16,  # model layer of `site`
        "index": pl.Int32,  # within the encoder of that layer
        "feature": pl.Int32,  # the flat id, over all layers
        "status": pl.String,
        "method": pl.String,  # "" where no label was given
        "label_id": pl.String,  # "" where no label was given
        "label": pl.String,  # "" where it was refused
        "reads": pl.String,
        "writes": pl.String,
        "trigger_tokens": pl.List(pl.String),  # at its strongest peaks, the most frequent first
        "trigger_shares": pl.List(pl.Float32),  # of those peaks, that each trigger token has
        "promoted": pl.List(pl.String),
        "suppressed": pl.List(pl.String),
        "decoder_norms": pl.List(pl.Float32),  # of what it writes at each output site
        "density": pl.Float32,  # share of tokens
        "max_activation": pl.Float32,
        "scorer": pl.String,  # what tested the label, "" where nothing did
        "unit": pl.String,
        **dict.fromkeys(SCORES, pl.Float32),
        "report_documents": pl.Int32,
        "snippets": pl.List(pl.String),  # top windows, «» around the tokens that fire
        "search_text": pl.String,  # the label and the words that describe it; "" where evidence is wanting
        "example_text": pl.String,  # the snippets, unmarked; "" where evidence is wanting
    }
)
NULLABLE = frozenset(SCORES)

PUBLICATION_ROW = pa.schema(
    [
        ("sae", pa.string()),
        ("generation", pa.string()),
        ("corpus", pa.string()),
        ("rows", pa.int64()),
        ("published_at", pa.timestamp("us", tz="UTC")),
        ("table_version", pa.int64()),
        ("embedder", pa.string()),
    ]
)

_ARROW: dict[pl.DataType, pa.DataType] = {
    pl.String(): pa.string(),
    pl.Int16(): pa.int16(),
    pl.Int32(): pa.int32(),
    pl.Float32(): pa.float32(),
    pl.List(pl.String): pa.list_(pa.string()),
    pl.List(pl.Float32): pa.list_(pa.float32()),
}
_STAMP = b"scopeatlas.embedder"
# Lance reads the primary key off the field, so the table is never without one, not even between two commits.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


def feature_name() -> pl.Expr:
    """A feature's name inside its SAE, of the columns kind, layer, index, feature: `123`, or of a multi-layer kind
    `7.123`, its encoder's model layer and its index there."""
    by_layer = pl.format("{}.{}", "layer", "index")
    return pl.when(pl.col("kind").is_in(MULTI_LAYER)).then(by_layer).otherwise(pl.col("feature").cast(pl.String))


def features_schema(dim: int, stamp: EmbedderStamp) -> pa.Schema:
    """FEATURE_ROW as Arrow, plus `generation` (which publication the row came from), `terms` (what full-text search looks
    in, see `terms.py`) and VECTORS, float16 [dim] each."""
    fields = [pa.field(name, _ARROW[dtype]) for name, dtype in FEATURE_ROW.items()]
    fields[0] = pa.field(KEY, pa.string(), nullable=False, metadata=PRIMARY_KEY)
    fields += [pa.field(GENERATION, pa.string()), pa.field(TERMS, pa.string())]
    fields += [pa.field(name, pa.list_(pa.float16(), dim)) for name in VECTORS]
    return pa.schema(fields, metadata={_STAMP: json.dumps(asdict(stamp), sort_keys=True)})


def stamp_of(schema: pa.Schema) -> EmbedderStamp:
    """The embedder that made a table's vectors. Raises AtlasError if the schema does not say."""
    try:
        return EmbedderStamp(**json.loads((schema.metadata or {})[_STAMP]))
    except (KeyError, TypeError, ValueError) as error:
        raise AtlasError("the atlas does not say which embedder made its vectors; delete its folder and publish again") from error


def checked_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` in FEATURE_ROW's columns and types. Raises AtlasError on rows that are not one SAE's features."""
    missing = [name for name in FEATURE_ROW if name not in rows.columns]
    if missing or rows.is_empty():
        raise AtlasError(f"nothing to publish: {'no rows' if rows.is_empty() else f'no column {missing[0]}'} in the feature rows")
    try:
        rows = rows.select(pl.col(name).cast(dtype) for name, dtype in FEATURE_ROW.items())
    except pl.exceptions.PolarsError as error:
        raise AtlasError(f"feature rows of the wrong type: {first_line(error)}") from error
    if rows["sae"].n_unique() != 1:
        raise AtlasError(f"one SAE is published at a time, these rows are of {sorted(rows['sae'].unique())}")
    empty = [name for name in FEATURE_ROW if name not in NULLABLE and rows[name].null_count()]
    if empty:
        raise AtlasError(f"feature rows of {rows['sae'][0]} have no {empty[0]} for {rows[empty[0]].null_count()} features")
    expected = rows.select("key", expected=pl.format("{}/{}", "sae", feature_name()))
    wrong = expected.filter(pl.col("key") != pl.col("expected"))
    if not wrong.is_empty():
        raise AtlasError(f"feature key {wrong['key'][0]!r} should be {wrong['expected'][0]}")
    repeated = rows.filter(pl.col("key").is_duplicated())
    if not repeated.is_empty():
        raise AtlasError(f"feature {repeated['key'][0]} comes twice in the rows to publish")
    return rows


def features_batch(rows: pl.DataFrame, vectors: Mapping[str, np.ndarray], *, generation: str, stamp: EmbedderStamp) -> pa.Table:
    """The checked rows and their VECTORS, [rows, dim] each, as the one Arrow table that is merged. The vector of an empty
    text is null, so no search comes upon it."""
    schema = features_schema(next(iter(vectors.values())).shape[1], stamp)
    oldest = pl.CompatLevel.oldest()  # without string views, which Lance does not read
    columns = [rows[name].to_arrow(compat_level=oldest).cast(_ARROW[dtype]) for name, dtype in FEATURE_ROW.items()]
    found_by = rows.select("label", "trigger_tokens", "promoted", has_evidence=pl.col("example_text") != "")
    columns += [pa.array([generation] * len(rows)), pa.array([terms_of(*row) for row in found_by.iter_rows()], pa.string())]
    for name, text in VECTORS.items():
        flat = pa.array(np.ascontiguousarray(vectors[name], dtype=np.float16).ravel())
        is_empty = (rows[text] == "").to_arrow()
        columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors[name].shape[1], mask=is_empty))
    return pa.table(columns, schema=schema)


def database_folder(root: Location) -> Location:
    """Where LanceDB keeps its tables under a store's root."""
    return root / "atlas"


def connect(root: Location) -> "DBConnection":
    """A connection whose handles see every commit of every process at once (by default they would see none).

    Of an object store LanceDB reads the same environment as the store does, but for leave to speak plain HTTP.
    """
    import lancedb

    folder = database_folder(root)
    options = None if isinstance(folder, Path) else {"allow_http": str(endpoint().startswith("http://")).lower()}
    return lancedb.connect(str(folder), storage_options=options, read_consistency_interval=timedelta(0))


def has_table(root: Location, name: str) -> bool:
    """Whether the table has at least one committed version; a creation that was killed leaves a folder without."""
    return any(file.endswith(".manifest") for file in sizes_under(database_folder(root) / f"{name}.lance" / "_versions"))


def open_table(root: Location, name: str) -> "Table":
    """Open a table that must exist. Raises AtlasError in one line if it does not or cannot be read."""
    if not has_table(root, name):
        raise AtlasError(f"no atlas at {root}: publish an SAE there first, or give the store's root folder")
    try:
        return connect(root).open_table(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise AtlasError(f"cannot read the atlas at {root}: {first_line(error)}") from error


def sql(condition: "Expr") -> str:
    """A condition as SQL, in which every value is a literal. Raises AtlasError on a backslash before a quote or at an end:
    lancedb 0.40 does not double that quote, so what follows would be taken for SQL."""
    text = condition.to_sql()
    if "\\'" in text:
        raise AtlasError(f"no value may hold a backslash before a quote or at its end: {text}")
    return text


def persistently(commit: Callable[[], object]) -> None:
    """Run `commit` until no commit of another machine comes before its own; on this machine a lock keeps others away.

    LanceDB does so for merges by itself, and not for indexes and compaction. Raises what `commit` raises at last.
    """
    for _ in range(_COMMITS - 1):
        try:
            commit()
            return
        except RuntimeError as error:
            if "Retryable commit conflict" not in str(error):
                raise
    commit()


def same_layout(schema: pa.Schema) -> bool:
    """Whether a table's columns are FEATURE_ROW's, so that this version of Scope Atlas can read and write it."""
    expected = features_schema(1, EmbedderStamp("", None, ""))

    def pairs(of: pa.Schema) -> set[tuple[str, pa.DataType | None]]:
        return {(field.name, None if field.name in VECTORS else field.type) for field in of}  # whatever their dimension

    return pairs(schema) == pairs(expected)


def newest_publications(ledger: "Table") -> pl.DataFrame:
    """The last line of the ledger for each SAE."""
    lines = pl.from_arrow(ledger.to_arrow())
    assert isinstance(lines, pl.DataFrame)  # a table gives a frame; only an array would give a series
    return lines.sort("table_version", "published_at").group_by("sae", maintain_order=True).last()
