"""Asking the atlas: by meaning, by key, by SAE.

What belongs here: the reader's side, `open_reader` and what it gives back. What does not: writing (`publish.py`), schemas
(`tables.py`), or rendering hits for people (the command line's business).
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

import polars as pl
import pyarrow as pa

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.publish import EXACT_ROWS
from scopeatlas.atlas.tables import (
    FEATURE_ROW,
    FEATURES,
    KEY,
    PUBLICATIONS,
    VECTOR,
    has_table,
    newest_publications,
    open_table,
    same_layout,
    stamp_of,
)
from scopeatlas.errors import AtlasError, UnknownSaeError
from scopeatlas.storage.uris import Location, location

if TYPE_CHECKING:
    from lancedb.expr import Expr
    from lancedb.table import Table

WEAK_SIMILARITY = 0.5
"""Below this cosine the best hit of a search is chance more often than an answer (MiniLM; `bench/cutoff.py`)."""
_COLUMNS = list(FEATURE_ROW)
_OVERVIEW_COLUMNS = ["release", "sae", "model", "kind", "layer", "label", "f1"]
_LISTED_COLUMNS = ["key", "kind", "site", "site_out", "feature", "status", "method", "label", "f1", "density"]
_PROBES, _REFINE = 60, 3  # recall .987-1.000 with filters (reference/lancedb.md, 2.3 and 2.4)
_NAMES_SHOWN = 20
_FLAT_ID = re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class FeatureHit:
    """One feature as the atlas knows it: FEATURE_ROW's columns, and how close it came to the query (None if looked up)."""

    key: str
    release: str
    sae: str
    model: str
    corpus: str
    kind: str
    site: str
    site_out: str
    layer: int
    index: int
    feature: int
    status: str
    method: str
    label_id: str
    label: str
    reads: str
    writes: str
    trigger_tokens: tuple[str, ...]
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    decoder_norms: tuple[float, ...]
    density: float
    max_activation: float
    scorer: str
    unit: str
    f1: float | None
    f1_low: float | None
    f1_high: float | None
    precision: float | None
    recall: float | None
    balanced_accuracy: float | None
    balanced_accuracy_low: float | None
    balanced_accuracy_high: float | None
    auprc: float | None
    lift: float | None
    lift_low: float | None
    lift_high: float | None
    q_value: float | None
    shuffled_f1: float | None
    shuffled_balanced_accuracy: float | None
    report_documents: int
    snippets: tuple[str, ...]
    search_text: str
    similarity: float | None = None


@dataclass(frozen=True)
class SearchResults:
    """The hits of one search, best first."""

    query: str
    hits: tuple[FeatureHit, ...] = ()

    def __iter__(self) -> Iterator[FeatureHit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> FeatureHit:
        return self.hits[index]

    @property
    def best_similarity(self) -> float:
        """The cosine of the best hit; 0 when there is none."""
        return max((hit.similarity or 0.0 for hit in self.hits), default=0.0)

    @property
    def is_weak(self) -> bool:
        """Whether even the best hit is further off than WEAK_SIMILARITY: the atlas seems to hold nothing of the kind."""
        return self.best_similarity < WEAK_SIMILARITY

    def to_polars(self) -> pl.DataFrame:
        """One row per hit: FEATURE_ROW's columns and `similarity`."""
        schema = {**FEATURE_ROW, "similarity": pl.Float64()}
        rows = [{name: list(v) if isinstance(v, tuple) else v for name, v in asdict(hit).items()} for hit in self.hits]
        return pl.DataFrame(rows, schema=schema)


class AtlasReader:
    """The rows of a published atlas, open for reading; sees what other processes publish at once. Made by `open_reader`."""

    def __init__(self, root: Location, features: "Table", embedder: Embedder | None):
        self.root = root
        self._features = features
        self._stamp = stamp_of(features.schema)
        self._overview: tuple[int, pl.DataFrame] | None = None
        self._embedder_checked = False
        self.embedder = embedder or Embedder(self._stamp.name, self._stamp.revision)

    @classmethod
    def at(cls, path: str | Location, *, embedder: Embedder | None = None) -> Self:
        """Open the atlas under the store root `path`, a folder or a URI; the embedder is the one that made it, loaded at the
        first search.

        embedder: only needed if the recorded one is no longer found under its name.
        Raises AtlasError if there is no atlas, it is of another version, or `embedder` is another model.
        """
        root = location(path) if isinstance(path, str) else path
        features = open_table(root, FEATURES)
        if not same_layout(features.schema):
            raise AtlasError(
                f"{root} holds the atlas of another version of Scope Atlas; publish its SAEs again into another store"
            )
        atlas = cls(root, features, embedder)
        if embedder is not None:
            atlas._checked_embedder()
        return atlas

    def search(
        self,
        query: str,
        *,
        k: int = 10,
        sae: str | None = None,
        release: str | None = None,
        status: str | None = None,
        method: str | None = None,
        min_score: float | None = None,
        layer: int | None = None,
    ) -> SearchResults:
        """The k features whose description means most nearly what `query` says, by cosine of dense vectors.

        sae: a key, or the beginning or any part of some; `min_score`: a lower bound on f1, which leaves out unscored
        features. Features refused for want of evidence (dead, rare, too few documents) have no text and are never hits. Exact up to 50,000 candidates. Look at `is_weak` before trusting the first hit.
        Raises AtlasError on an empty query or a k below 1, UnknownSaeError if `sae` matches none.
        """
        if not query.strip() or k < 1:
            raise AtlasError(f"cannot search for {query!r} with k={k}: give some words and a k of 1 or more")
        equal: dict[str, str | int | None] = {"release": release, "status": status, "method": method, "layer": layer}
        condition = _condition(equal, saes=None if sae is None else self._resolve(sae), min_score=min_score, described=True)
        vector = self._checked_embedder().embed([query])[0]
        asked = self._features.search(vector, vector_column_name=VECTOR)
        asked = asked.distance_type("cosine")  # type: ignore[attr-defined]  # lancedb annotates the base of its builders
        asked = asked.select([*_COLUMNS, "_distance"]).limit(k)
        if condition is not None:
            asked = asked.where(condition)
        exact = self._candidates(condition) <= EXACT_ROWS
        asked = asked.bypass_vector_index() if exact else asked.nprobes(_PROBES).refine_factor(_REFINE)
        hits = [_hit(row, similarity=1.0 - row.pop("_distance")) for row in asked.to_arrow().to_pylist()]
        return SearchResults(query, tuple(sorted(hits, key=lambda hit: (-(hit.similarity or 0.0), hit.sae, hit.feature))))

    def feature(self, sae: str, feature: int | str) -> FeatureHit:
        """One feature by SAE (a key, or enough of one to name a single SAE) and its flat id, or `7.123`: layer 7's 123.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do or it has no such feature.
        """
        from lancedb.expr import col, lit

        key, text = self._one(sae), str(feature)
        is_it = (col("feature") == lit(int(text))) if _FLAT_ID.fullmatch(text) else (col(KEY) == lit(f"{key}/{text}"))
        found = self._features.search().where((col("sae") == lit(key)) & is_it).select(_COLUMNS).limit(1).to_arrow()
        if not found.num_rows:
            raise AtlasError(f"{key} has no feature {feature} in the atlas at {self.root}")
        return _hit(found.to_pylist()[0])

    def features(self, sae: str, *, status: str | None = None) -> tuple[str, pl.DataFrame]:
        """The key `sae` stands for, and its features in order, of one status or all: key, kind, site, site_out, feature,
        status, method, label, f1, density.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do.
        """
        key = self._one(sae)
        condition = _condition({"sae": key, "status": status}, saes=None, min_score=None)
        assert condition is not None
        found = pl.from_arrow(self._features.search().where(condition).select(_LISTED_COLUMNS).to_arrow())
        assert isinstance(found, pl.DataFrame)  # a table gives a frame; only an array would give a series
        return key, found.sort("feature")

    def rows(self, sae: str) -> tuple[str, pl.DataFrame]:
        """The key `sae` stands for, and every row of it (FEATURE_ROW), in order of `feature`.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do.
        """
        key = self._one(sae)
        condition = _condition({"sae": key}, saes=None, min_score=None)
        assert condition is not None
        found = pl.from_arrow(self._features.search().where(condition).select(_COLUMNS).to_arrow())
        assert isinstance(found, pl.DataFrame)  # a table gives a frame; only an array would give a series
        return key, found.sort("feature")

    def published(self, sae: str) -> tuple[str, str]:
        """The key `sae` stands for, and the corpus that its published rows are of.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do.
        """
        from lancedb.expr import col, lit

        key = self._one(sae)
        row = self._features.search().where(col("sae") == lit(key)).select(["corpus"]).limit(1).to_arrow()
        return key, row["corpus"][0].as_py()

    def saes(self) -> pl.DataFrame:
        """One row per SAE: release, sae, model, kind, layer (the first that it reads), last_layer, features, labelled,
        mean_f1, published_at (UTC; null if unknown)."""
        newest = pl.DataFrame(schema={"sae": pl.String, "published_at": pl.Datetime("us", "UTC")})
        if has_table(self.root, PUBLICATIONS):
            newest = newest_publications(open_table(self.root, PUBLICATIONS)).select("sae", "published_at")
        return self._summary().join(newest, on="sae", how="left", maintain_order="left")

    def _summary(self) -> pl.DataFrame:
        """What the feature rows say of each SAE, read again only when the table has a new version."""
        version = self._features.version
        if self._overview is None or self._overview[0] != version:
            self._overview = (version, _summarise(self._features.search().select(_OVERVIEW_COLUMNS).to_arrow()))
        return self._overview[1]

    def _resolve(self, sae: str) -> list[str]:
        """The keys `sae` stands for: itself, else those it begins, else those it is part of."""
        known = self._summary()["sae"].to_list()
        folded = sae.strip().casefold()
        exact = [key for key in known if key == sae]
        begun = [key for key in known if folded and key.casefold().startswith(folded)]
        matches = exact or begun or [key for key in known if folded and folded in key.casefold()]
        if not matches:
            raise UnknownSaeError(f"no SAE in the atlas matches {sae!r}; it holds {_listed(known) or 'none yet'}")
        return matches

    def _one(self, sae: str) -> str:
        """The one key `sae` stands for. Raises AtlasError if there are several."""
        keys = self._resolve(sae)
        if len(keys) > 1:
            raise AtlasError(f"{sae!r} matches {len(keys)} SAEs ({_listed(keys)}); give a whole key")
        return keys[0]

    def _candidates(self, condition: "Expr | None") -> int:
        total = self._features.count_rows()
        return total if condition is None or total <= EXACT_ROWS else self._features.count_rows(condition.to_sql())

    def _checked_embedder(self) -> Embedder:
        """The embedder, once known to be the one that made the vectors. Raises AtlasError if it is not."""
        if not self._embedder_checked:
            if self.embedder.identity != self._stamp.identity:
                made = f"{self._stamp.name} ({self._stamp.identity[:8]})"
                raise AtlasError(f"the atlas at {self.root} was embedded by {made}, not {self.embedder.name}; use that one")
            self._embedder_checked = True
        return self.embedder


def open_reader(path: str | Location, *, embedder: Embedder | None = None) -> AtlasReader:
    """The rows of the atlas under the store root `path`; see `AtlasReader.at`."""
    return AtlasReader.at(path, embedder=embedder)


def _condition(
    equal: "dict[str, str | int | None]", *, saes: list[str] | None, min_score: float | None, described: bool = False
) -> "Expr | None":
    """The filter as an expression tree: values are literals in it and can never become SQL."""
    from lancedb.expr import col, lit

    parts = [col(name) == lit(value) for name, value in equal.items() if value is not None]
    if described:
        parts.append(col("search_text") != lit(""))
    if saes is not None:
        parts.append(col("sae").isin(saes))
    if min_score is not None:
        parts.append(col("f1") >= lit(float(min_score)))
    condition = None
    for part in parts:
        condition = part if condition is None else condition & part
    return condition


_LISTS = tuple(name for name, dtype in FEATURE_ROW.items() if isinstance(dtype, pl.List))


def _hit(row: dict[str, object], *, similarity: float | None = None) -> FeatureHit:
    values = {name: tuple(value) if name in _LISTS and isinstance(value, list) else value for name, value in row.items()}
    return FeatureHit(**values, similarity=similarity)  # type: ignore[arg-type]  # the table's schema is FEATURE_ROW


def _summarise(rows: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)  # a table gives a frame; only an array would give a series
    return (
        frame.group_by("sae")
        .agg(
            pl.col("release", "model", "kind").first(),
            pl.col("layer").min(),
            pl.col("layer").max().alias("last_layer"),
            pl.len().cast(pl.Int64).alias("features"),
            (pl.col("label") != "").sum().cast(pl.Int64).alias("labelled"),
            pl.col("f1").mean().alias("mean_f1"),
        )
        .select("release", "sae", "model", "kind", "layer", "last_layer", "features", "labelled", "mean_f1")
        .sort("release", "layer", "sae")
    )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMES_SHOWN} more" if len(keys) > _NAMES_SHOWN else ""
    return ", ".join(keys[:_NAMES_SHOWN]) + more
