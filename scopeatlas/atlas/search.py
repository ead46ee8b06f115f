"""Asking the atlas: by meaning, by words, by token, by key, by SAE.

What belongs here: the reader's side, `open_reader`, and which rankings a search is made of. What does not: the rankings
(`asking.py`), their fusion (`ranking.py`), what comes of it (`hits.py`), writing (`publish.py`), or printing hits.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self, get_args

import polars as pl
import pyarrow as pa

from scopeatlas.atlas.asking import DENSE, Asked
from scopeatlas.atlas.embedding import Embedder, first_line
from scopeatlas.atlas.filters import Filters, checked_text
from scopeatlas.atlas.hits import FeatureHit, SearchResults, Why
from scopeatlas.atlas.ranking import CUTOFFS, WITH_WORD, Place, fused
from scopeatlas.atlas.tables import (
    FEATURE_ROW,
    FEATURES,
    KEY,
    PUBLICATIONS,
    has_table,
    newest_publications,
    open_table,
    same_layout,
    stamp_of,
)
from scopeatlas.atlas.terms import coverage, matches, query_terms
from scopeatlas.errors import AtlasError, UnknownSaeError
from scopeatlas.storage.uris import Location, location

if TYPE_CHECKING:
    from lancedb.table import Table

SearchBy = Literal["hybrid", "dense", "label", "examples", "text", "token", "promoted"]
"""Ways of searching: one ranking, or several fused (`hybrid`: label, examples and text; `dense`: label and examples)."""
_RANKINGS: dict[str, tuple[str, ...]] = {"hybrid": ("label", "examples", "text"), "dense": ("label", "examples")}
_BY_WORDS = {"label", "text"}
"""Rankings in which it matters what a feature holds of the query's words, and where they may stand."""
_WORDED = (KEY, "label", "trigger_tokens", "promoted")
_COLUMNS = list(FEATURE_ROW)
_OVERVIEW_COLUMNS = ["release", "sae", "model", "kind", "layer", "label", "f1"]
_LISTED_COLUMNS = ["key", "kind", "site", "site_out", "feature", "status", "method", "label", "f1", "density"]
_NAMES_SHOWN = 20
_FLAT_ID = re.compile(r"\d{1,9}")


class AtlasReader:
    """The rows of a published atlas, open for reading; sees what other processes publish at once. Made by `open_reader`."""

    def __init__(self, root: Location, features: "Table", embedder: Embedder | None):
        self.root = root
        self._features = features
        self._stamp = stamp_of(features.schema)
        self._overview: tuple[int, pl.DataFrame] | None = None
        self._pinned: tuple[int, Table] | None = None
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
        by: SearchBy = "hybrid",
        k: int = 10,
        offset: int = 0,
        version: int | None = None,
        sae: str | None = None,
        release: str | None = None,
        layer: int | None = None,
        kind: str | None = None,
        site: str | None = None,
        status: str | None = None,
        method: str | None = None,
        min_score: float | None = None,
        min_score_low: float | None = None,
        density: tuple[float | None, float | None] | None = None,
        where: str | None = None,
    ) -> SearchResults:
        """The features that `query` is about, best first; only those that come close to it, and `is_weak` if none does.

        by: `label` and `examples` compare meanings, with what the feature is said to be and with text that it fires on;
        `text` looks for words in labels, trigger tokens and promoted tokens; `dense` fuses the first two and `hybrid` all
        three by reciprocal ranks. `token` finds the features that fire on just this token, `promoted` those that promote
        it; case and surrounding space do not matter. Each hit says why it is one (`hit.why`), and reaches a cut-off itself
        (`ranking.CUTOFFS`); `nearest` is the same page of all that is ranked, whether it does or not.
        k, offset: so many hits after so many, `results.found` in all; a further page of the same search takes
        `version=results.version`, and one past the last hit is empty.
        sae: a key, or the beginning or any part of some. layer, site: what the feature reads, site being any part of a
        name such as model.layers.12.mlp.input, whatever its case. min_score, min_score_low: least F1, and least lower end of its 95 %
        interval, which leave out unscored features. density: least and greatest share of tokens, None for no limit.
        where: any further condition on the columns of FEATURE_ROW as SQL, such as "label LIKE '%war%' AND lift > 0.2".

        Features refused for want of evidence (dead, rare, too few documents) are hits of `promoted` alone. Exact in an atlas
        of up to 50,000 features. Of each ranking the first 200 are looked at, of `token` and `promoted` all. Raises
        AtlasError on an empty query, a k below 1, a filter that LanceDB cannot apply or a `where` that is not one condition,
        or a version that is gone, UnknownSaeError if `sae` matches none.
        """
        is_empty = not (query if by in {"token", "promoted"} else query.strip())  # a token may be a line break
        if is_empty or k < 1 or offset < 0:
            raise AtlasError(f"cannot search for {query!r} with k={k}, offset={offset}: give some words and a k of 1 or more")
        if by not in get_args(SearchBy):
            raise AtlasError(f"cannot search by {by!r}; there are {', '.join(get_args(SearchBy))}")
        checked_text(query)
        filters = Filters(release, layer, kind, site, status, method, min_score, min_score_low, density, where)
        asked = self._asked(filters, sae=sae, version=version)
        terms = query_terms(query)
        names = _RANKINGS.get(by, (by,))
        vector = self._checked_embedder().embed([query])[0] if DENSE.keys() & set(names) else None
        rankings: dict[str, Mapping[str, Place]] = {}
        for name in names:
            if name in DENSE:
                assert vector is not None
                rankings[name] = asked.by_vector(DENSE[name], vector)
            elif name == "text":
                rankings[name] = asked.by_terms([*terms])
            else:
                rankings[name] = asked.by_trigger(query) if name == "token" else asked.by_promoted(query)
        return _results(query, by, asked, rankings, terms=terms, k=k, offset=offset)

    def like(self, sae: str, feature: int | str, *, k: int = 10, offset: int = 0, within: str | None = None) -> SearchResults:
        """The features that mean most nearly what this one does, by its label and by its examples; see `feature`, `search`.

        within: only SAEs of this key, or whose keys begin with it or contain it.
        """
        own = self.feature(sae, feature)
        asked = self._asked(Filters(), sae=within, version=None)
        vectors = asked.vectors(own.key)
        rankings = {name: asked.by_vector(DENSE[name], vector, but=own.key) for name, vector in vectors.items()}
        return _results(own.key, "meaning", asked, rankings, terms={}, k=k, offset=offset)

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
        return FeatureHit.of(found.to_pylist()[0])

    def features(self, sae: str, *, status: str | None = None) -> tuple[str, pl.DataFrame]:
        """The key `sae` stands for, and its features in order, of one status or all: key, kind, site, site_out, feature,
        status, method, label, f1, density.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do.
        """
        key = self._one(sae)
        found = Asked(self._features, Filters(status=status).condition([key])).all_rows(_LISTED_COLUMNS)
        return key, found.sort("feature")

    def rows(self, sae: str) -> tuple[str, pl.DataFrame]:
        """The key `sae` stands for, and every row of it (FEATURE_ROW), in order of `feature`.

        Raises UnknownSaeError if no SAE matches, AtlasError if several do.
        """
        key = self._one(sae)
        found = Asked(self._features, Filters().condition([key])).all_rows(_COLUMNS)
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

    def _asked(self, filters: Filters, *, sae: str | None, version: int | None) -> Asked:
        """The rows that pass, in one state of the table: all of one answer is of the same, whoever writes meanwhile."""
        asked = Asked(self._at(version), filters.condition(None if sae is None else self._resolve(sae)))
        if filters.where is not None:  # at once, so that the error says that it is about a condition
            try:
                asked.all_rows([KEY], limit=1)
            except AtlasError as error:
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                raise AtlasError(f"no condition on features: {filters.where!r}: {first_line(cause)}") from error
        return asked

    def _at(self, version: int | None) -> "Table":
        """The table at a version, the newest by default. Raises AtlasError if that version is gone."""
        wanted = self._features.version if version is None else version
        if self._pinned is None or self._pinned[0] != wanted:
            table = open_table(self.root, FEATURES)
            try:
                table.checkout(wanted)
            except (OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:  # LanceDB's, or of no version at all
                raise AtlasError(f"version {version} of the atlas at {self.root} is gone; search again without it") from error
            self._pinned = (wanted, table)
        return self._pinned[1]

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


def _results(
    query: str,
    by: str,
    asked: Asked,
    rankings: Mapping[str, Mapping[str, Place]],
    *,
    terms: Mapping[str, str],
    k: int,
    offset: int,
) -> SearchResults:
    """One page of the features in the rankings' fusion that reach a cut-off, and what the whole of them came to."""
    scores = dict(fused(rankings))
    described = asked.rows([*scores], _WORDED) if terms and _BY_WORDS & rankings.keys() else {}
    values = _values(rankings, terms, {key: matches(terms, row) for key, row in described.items()})
    cutoffs = {name: CUTOFFS[name] for name in values if name in CUTOFFS and by in get_args(SearchBy)}
    found = {key for name, of in values.items() for key, value in of.items() if value >= cutoffs.get(name, value)}
    pages = [[key for key in scores if key in found][offset : offset + k], [*scores][offset : offset + k]]
    rows = asked.rows([*dict.fromkeys([*pages[0], *pages[1]])])

    def hit(key: str) -> FeatureHit:
        places = {name: ranking[key] for name, ranking in rankings.items() if key in ranking}
        return FeatureHit.of(rows[key], score=scores[key], why=Why(places, matches(terms, rows[key])))

    hits, nearest = (tuple(hit(key) for key in page) for page in pages)
    best = {name: max(of.values(), default=0.0) for name, of in values.items()}
    return SearchResults(query, by, hits, best, cutoffs, asked.table.version, offset, len(found), nearest)


def _values(
    rankings: Mapping[str, Mapping[str, Place]], terms: Mapping[str, str], held: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> dict[str, dict[str, float]]:
    """What CUTOFFS are about, by name and key: but for text, since BM25 has no scale of its own, what rankings are by.

    held: by key, which of the query's words stand where.
    """
    values = {name: {key: place.value for key, place in ranking.items()} for name, ranking in rankings.items() if ranking}
    if "label" in values and held:
        with_word = {key: value for key, value in values["label"].items() if held[key]}
        values |= {WITH_WORD: with_word} if with_word else {}
    if "text" in rankings:
        values.pop("text", None)
        values["words" if len(rankings) > 1 else "text"] = {key: coverage(terms, words) for key, words in held.items()}
    return values


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
