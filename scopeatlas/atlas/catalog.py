"""The catalog: one row for every SAE that was ever seen, on the Hub or in a folder, and what became of it.

What belongs here: the table `catalog`, writing rows and asking for them. What does not: finding SAEs
(`dictionaries/watching.py`), or their features (`tables.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from scopeatlas.atlas.embedding import first_line
from scopeatlas.atlas.publish import atlas_lock
from scopeatlas.atlas.tables import KEY, PRIMARY_KEY, connect, database_folder, has_table, open_table, persistently
from scopeatlas.dictionaries import formats
from scopeatlas.dictionaries.hub import SeenSae, files_identity
from scopeatlas.dictionaries.layout import SaeFacts, parse_width
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import AtlasError
from scopeatlas.storage.uris import Location

if TYPE_CHECKING:
    from lancedb.table import Table

CATALOG = "catalog"
STATES = (
    "seen",  # exists, and no watch rule wants it
    "other_model",
    "too_large",
    "incomplete",
    "settling",
    "ready",  # whole, wanted, not fetched
    "deferred_by_quota",
    "registered",
    "published",
    "failed",
    "retired",  # gone from where it was found; its features stay
)
_SETTLED_STATES = ("registered", "published", "failed")
_SMALL_FRAGMENTS = 20

CATALOG_SCHEMA = pa.schema(
    [
        pa.field(KEY, pa.string(), nullable=False, metadata=PRIMARY_KEY),  # "{release}/{path}"
        ("release", pa.string()),
        ("repo", pa.string()),
        ("revision", pa.string()),
        ("sae", pa.string()),
        ("files", pa.string()),
        ("path", pa.string()),
        ("kind", pa.string()),
        ("site", pa.string()),
        ("layers", pa.list_(pa.int32())),
        ("width", pa.int64()),
        ("target_l0", pa.float64()),
        ("bytes", pa.int64()),
        ("model", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("updated_at", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class CatalogRow:
    """One SAE. sae: its key once it is registered, else "". repo, revision: "" for local releases. state: of STATES.

    files: what its files are, by their hashes on the Hub; "" for local releases. width (features in all) and target_l0
    (the release's own figure): None where names do not tell.
    """

    release: str
    path: str
    state: str
    repo: str = ""
    revision: str = ""
    sae: str = ""
    files: str = ""
    kind: str = ""
    site: str = ""
    layers: tuple[int, ...] = ()
    width: int | None = None
    target_l0: float | None = None
    bytes: int = 0
    model: str = ""
    reason: str = ""

    @property
    def key(self) -> str:
        return f"{self.release}/{self.path}"

    @classmethod
    def of_seen(cls, sae: SeenSae) -> "CatalogRow":
        """What a poll of the Hub knows."""
        row = _with_facts(cls(sae.release, sae.path, sae.state), sae.facts)
        return replace(row, repo=sae.repo, revision=sae.sha, files=sae.identity, bytes=sae.bytes, reason=sae.reason)

    @classmethod
    def of_entry(cls, entry: SaeEntry, *, state: str = "registered", repo: str = "") -> "CatalogRow":
        """What is known of an SAE on disk."""
        row = _with_facts(cls(entry.release, entry.path, state), formats.facts(entry.files, entry.release))
        blobs = {name: (Path(entry.root) / name).resolve() for name in entry.files.all}
        digests = {name: (blob.stat().st_size if blob.exists() else 0, blob.name) for name, blob in blobs.items()}
        # In the Hugging Face cache a file's name is the hash that the Hub lists.
        files = files_identity(digests) if all(blob.parent.name == "blobs" for blob in blobs.values()) else ""
        size = sum(size for size, _ in digests.values())
        return replace(row, repo=repo, revision=entry.revision, sae=entry.key, files=files, bytes=size)


def _with_facts(row: CatalogRow, facts: SaeFacts) -> CatalogRow:
    told = {"kind": facts.kind, "site": facts.site, "layers": facts.layers, "width": facts.width}
    return replace(row, **told, target_l0=facts.l0, model=facts.model)


def record(root: Location, rows: Iterable[CatalogRow]) -> int:
    """Make these the catalog's rows of their SAEs; returns how many were new or differed. The others write nothing.

    A row without a key, as polls give it, does not take back that the same files are registered, published or failed.
    Safe against other processes that write at the same time. Raises AtlasError on a state that is none, an SAE that
    comes twice, or a table that cannot be written.
    """
    rows = list(rows)
    wrong = next((row for row in rows if row.state not in STATES), None)
    if wrong is not None:
        raise AtlasError(f"{wrong.key}: no catalog state {wrong.state!r}; use one of {', '.join(STATES)}")
    if len({row.key for row in rows}) < len(rows):
        raise AtlasError("an SAE comes twice in the rows for the catalog; give each once")
    with atlas_lock(root, CATALOG):
        known = _known(root)
        return _upsert(root, [_keeping_progress(known.get(row.key), row) for row in rows])


def _keeping_progress(known: CatalogRow | None, row: CatalogRow) -> CatalogRow:
    if known is None or row.sae or known.files != row.files or not row.files or known.state not in _SETTLED_STATES:
        return row
    return replace(row, state=known.state, reason=known.reason, sae=known.sae)


@dataclass(frozen=True)
class Change:
    """What becomes of a row: its state, why, and its key if it got one (by default the one that it has stays)."""

    state: str
    reason: str = ""
    sae: str | None = None


def mark(root: Location, changes: Mapping[tuple[str, str], Change]) -> int:
    """Change the state of rows that exist, each named by (release, path), in one write; returns how many differed."""
    wrong = next((change.state for change in changes.values() if change.state not in STATES), None)
    if wrong is not None:
        raise AtlasError(f"no catalog state {wrong!r}; use one of {', '.join(STATES)}")
    with atlas_lock(root, CATALOG):
        known = _known(root)
        rows = [
            replace(row, state=change.state, reason=change.reason, sae=row.sae if change.sae is None else change.sae)
            for (release, path), change in changes.items()
            if (row := known.get(f"{release}/{path}")) is not None
        ]
        return _upsert(root, rows)


def retire(root: Location, repo: str, *, paths: Sequence[str] | None = None) -> int:
    """Mark the SAEs of a repo (or those at `paths` in it) as gone from the Hub; the rows and all features stay."""
    with atlas_lock(root, CATALOG):
        rows = [row for row in _known(root).values() if row.repo == repo and (paths is None or row.path in paths)]
        return _upsert(root, [replace(row, state="retired", reason="no longer on the Hub") for row in rows])


def read_catalog(
    root: Location,
    *,
    model: str | None = None,
    site: str | None = None,
    width: str | int | None = None,
    kind: str | None = None,
    state: str | None = None,
    release: str | None = None,
) -> pl.DataFrame:
    """The rows that match every filter given, by release and path; empty if nothing was ever recorded.

    model: gemma-3-1b finds google/gemma-3-1b-pt and -it, and not gemma-3-12b. width: 16k or 16384. The other filters are
    globs. Letter case does not matter. Raises AtlasError on a width that is none.
    """
    frame = _frame(root).drop(KEY).sort("release", "path")
    if width is not None:
        features = parse_width(str(width))
        if features is None:
            raise AtlasError(f"{width!r} is no width; write 16k, 1m or 16384")
        frame = frame.filter(pl.col("width") == features)
    for column, glob in (("site", site), ("kind", kind), ("state", state), ("release", release)):
        if glob is not None:
            wanted = [value for value in frame[column].unique() if fnmatchcase(value.lower(), glob.lower())]
            frame = frame.filter(pl.col(column).is_in(wanted))
    if model is not None:
        frame = frame.filter(pl.col("model").is_in([name for name in frame["model"].unique() if _is_model(name, model)]))
    return frame


def _is_model(name: str, asked: str) -> bool:
    """Whether `asked` is the model's name, its beginning up to a dash, or a glob of it; with or without organisation."""
    name, asked = name.lower(), asked.lower()
    return any(n == asked or n.startswith(f"{asked}-") or fnmatchcase(n, asked) for n in (name, name.rsplit("/", 1)[-1]))


def _frame(root: Location) -> pl.DataFrame:
    arrow = open_table(root, CATALOG).to_arrow() if has_table(root, CATALOG) else CATALOG_SCHEMA.empty_table()
    frame = pl.from_arrow(arrow)
    assert isinstance(frame, pl.DataFrame)  # a table gives a frame; only an array would give a series
    return frame


def _known(root: Location) -> dict[str, CatalogRow]:
    rows = _frame(root).drop("updated_at").to_dicts()
    return {row.pop(KEY): replace(CatalogRow(**row), layers=tuple(row["layers"])) for row in rows}


def _upsert(root: Location, rows: list[CatalogRow]) -> int:
    """Write those of `rows` that the table does not hold as they are. Call with the lock held."""
    known = _known(root)
    changed = [row for row in rows if known.get(row.key) != row]
    if not changed:
        return 0
    now = datetime.now(UTC)
    batch = pa.Table.from_pylist([{KEY: row.key, **asdict(row), "updated_at": now} for row in changed], schema=CATALOG_SCHEMA)
    try:
        if not has_table(root, CATALOG):
            connect(root).create_table(CATALOG, schema=CATALOG_SCHEMA, exist_ok=True)
        table = open_table(root, CATALOG)
        # use_index(False): through an index on the key, concurrent writers double rows without an error
        table.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all().use_index(False).execute(batch)
        _compact_if_due(table)
    except (OSError, RuntimeError, ValueError) as error:
        raise AtlasError(f"cannot write the catalog in {database_folder(root)}: {first_line(error)}") from error
    return len(changed)


def _compact_if_due(table: "Table") -> None:
    fragments = table.stats()["fragment_stats"]  # type: ignore[index]  # annotated as an object, but a dict
    if fragments["num_small_fragments"] > _SMALL_FRAGMENTS:
        persistently(table.optimize)
