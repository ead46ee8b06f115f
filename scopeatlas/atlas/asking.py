"""Asking one state of the features table: each way of ranking the rows that pass a filter.

What belongs here: the queries that LanceDB is given, exact or through an index. What does not: which of them a search
makes, and what it makes of them (`search.py`, `ranking.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from scopeatlas.atlas import indexes
from scopeatlas.atlas.embedding import first_line
from scopeatlas.atlas.ranking import Place, ranked
from scopeatlas.atlas.tables import FEATURE_ROW, KEY, TERMS, VECTORS
from scopeatlas.atlas.terms import PROMOTED, TRIGGER, token_term
from scopeatlas.errors import AtlasError

if TYPE_CHECKING:
    from lancedb.table import Table

DEPTH = 200
"""Of each ranking so many features are looked at, whatever the page: so pages of one search never overlap."""
_WIDER = 8
"""Where the last of them have equals beyond it, so many times as many are asked for."""
DENSE: dict[str, str] = dict(zip(("label", "examples"), VECTORS, strict=True))
"""Rankings by meaning, and the vectors that each compares with."""


@dataclass(frozen=True)
class Asked:
    """The table at one version, and which of its rows may be found: SQL, None for all."""

    table: "Table"
    condition: str | None = None

    @cached_property
    def rows_in_all(self) -> int:
        """Of the table, whether or not they pass."""
        return self.table.count_rows()

    def vectors(self, key: str) -> dict[str, np.ndarray]:
        """A feature's own vectors, float32 [dim], by ranking; none where its text is empty."""
        from lancedb.expr import col, lit

        row = self.table.search().where(col(KEY) == lit(key)).select([*VECTORS]).to_arrow().to_pylist()[0]
        return {name: np.asarray(row[column], dtype=np.float32) for name, column in DENSE.items() if row[column] is not None}

    def by_vector(self, column: str, vector: np.ndarray, *, but: str = "") -> dict[str, Place]:
        """The nearest by cosine to a vector [dim], of those that have one in the column. but: a key to leave out."""
        asked = self.table.search(vector.astype(np.float32), vector_column_name=column).distance_type("cosine")  # type: ignore[attr-defined]  # lancedb annotates the base of its builders
        if self.rows_in_all <= indexes.EXACT_ROWS:
            asked = asked.bypass_vector_index()
        else:
            partitions = indexes.probes(self.rows_in_all, is_filtered=self.condition is not None)
            asked = asked.nprobes(partitions).refine_factor(indexes.REFINE)
        return self._best(asked, lambda row: 1.0 - row["_distance"], "_distance", but=but)

    def by_terms(self, terms: Sequence[str]) -> dict[str, Place]:
        """Those that any of the terms stands in, by BM25."""
        return self._best(self._matching(" ".join(terms)), lambda row: row["_score"], "_score")

    def by_trigger(self, token: str) -> dict[str, Place]:
        """Those that a token triggers, by its share of their strongest peaks, then by F1."""
        term = token_term(TRIGGER, token)
        found = self._match(term, [KEY, "trigger_tokens", "trigger_shares", "f1", "_score"])

        def share(row: dict[str, Any]) -> float:
            shares = zip(row["trigger_tokens"], row["trigger_shares"], strict=True)
            return round(sum(value for trigger, value in shares if token_term(TRIGGER, trigger) == term), 6)

        return ranked((row[KEY], share(row), row["f1"] or 0.0) for row in found.to_pylist())

    def by_promoted(self, token: str) -> dict[str, Place]:
        """Those that promote a token, by its place among the tokens that they promote, then by F1."""
        term = token_term(PROMOTED, token)
        found = self._match(term, [KEY, "promoted", "f1", "_score"])
        places = ([token_term(PROMOTED, promoted) for promoted in row["promoted"]].index(term) + 1 for row in found.to_pylist())
        return ranked((row[KEY], 1 / place, row["f1"] or 0.0) for row, place in zip(found.to_pylist(), places, strict=True))

    def all_rows(self, columns: list[str], *, limit: int | None = None) -> pl.DataFrame:
        """Some columns of every row that passes the filter, or of so many, in no order."""
        found = pl.from_arrow(self._found(self.table.search(), columns, limit))
        assert isinstance(found, pl.DataFrame)  # a table gives a frame; only an array would give a series
        return found

    def rows(self, keys: Sequence[str], columns: Sequence[str] = tuple(FEATURE_ROW)) -> dict[str, dict[str, Any]]:
        """The rows of these keys, whole or of some columns that hold the key, by key."""
        from lancedb.expr import col

        if not keys:
            return {}
        found = self.table.search().where(col(KEY).isin(list(keys))).select([*columns]).to_arrow()
        return {row[KEY]: row for row in found.to_pylist()}

    def _best(self, asked: Any, value: Callable[[dict[str, Any]], float], column: str, *, but: str = "") -> dict[str, Place]:
        """The DEPTH best by a value of a column. Of equals LanceDB gives any so many, now these and now those, so that all of
        the last ones' equals are asked for before the first by key are taken."""
        limit = DEPTH + 2  # of which one may be `but`, and one has to be worse than those that are taken
        while True:
            rows = self._found(asked, [KEY, column], limit).to_pylist()
            places = ranked((row[KEY], value(row), 0.0) for row in rows if row[KEY] != but)
            taken = list(places.items())[:DEPTH]
            if len(rows) < limit or taken[-1][1].rank < next(reversed(places.values())).rank:
                return dict(taken)
            limit *= _WIDER

    def _match(self, terms: str, columns: list[str]) -> pa.Table:
        return self._found(self._matching(terms), columns, max(1, self.rows_in_all))

    def _matching(self, terms: str) -> Any:
        from lancedb.query import MatchQuery

        query = MatchQuery(terms, TERMS)  # pyright: ignore[reportCallIssue]  # pydantic fields that do have defaults
        return self.table.search(query, query_type="fts")

    def _found(self, asked: Any, columns: list[str], limit: int | None) -> pa.Table:
        """Raises AtlasError if the condition cannot be applied."""
        asked = (asked if limit is None else asked.limit(limit)).select(columns)
        if self.condition is None:
            return asked.to_arrow()
        try:
            return asked.where(self.condition).to_arrow()
        except Exception as error:  # LanceDB's planner panics over literals that it does not know, in an exception of its own
            raise AtlasError(f"cannot look for features where {self.condition}: {first_line(error)}") from error
