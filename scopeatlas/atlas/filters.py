"""Which features a search may find: filters by what their rows say, as one SQL condition.

What belongs here: from arguments to a condition. What does not: ranking what passes it (`search.py`).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scopeatlas.atlas.tables import sql
from scopeatlas.errors import AtlasError

if TYPE_CHECKING:
    from lancedb.expr import Expr


_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`""")
"""Of LanceDB's SQL: a doubled quote is two strings side by side to this, and a backslash is a letter like any other."""
_STRANGE = re.compile(r"""--|/\*|[;$'"`]""")
"""What a condition has no use for outside of quotes: comments, further statements, dollar quotes, a quote without its end."""


@dataclass(frozen=True)
class Filters:
    """What a feature's row must say; None: anything. `AtlasReader.search` says what each means."""

    release: str | None = None
    layer: int | None = None
    kind: str | None = None
    site: str | None = None
    status: str | None = None
    method: str | None = None
    min_score: float | None = None
    min_score_low: float | None = None
    density: tuple[float | None, float | None] | None = None
    where: str | None = None

    def condition(self, saes: list[str] | None) -> str | None:
        """The filter as SQL, None if everything passes. saes: whole keys, any of which will do.

        Values become SQL through lancedb's expressions alone, as literals; only `where` is SQL that somebody wrote, and it
        cannot leave its parentheses. Raises AtlasError if it would, or if a value is no text.
        """
        from lancedb.expr import col, lit

        for value in vars(self).values():
            if isinstance(value, str):
                checked_text(value)
        low, high = self.density or (None, None)
        equal = {"release": self.release, "layer": self.layer, "kind": self.kind, "status": self.status, "method": self.method}
        parts: list[Expr] = [col(name) == lit(value) for name, value in equal.items() if value is not None]
        parts += [
            col(name) >= lit(float(v)) for name, v in (("f1", self.min_score), ("f1_low", self.min_score_low)) if v is not None
        ]
        parts += [col("density") >= lit(float(low))] if low is not None else []
        parts += [col("density") <= lit(float(high))] if high is not None else []
        parts += [col("site").lower().contains(lit(self.site.lower()))] if self.site is not None else []
        parts += [col("sae").isin(saes)] if saes is not None else []
        written = [f"({_enclosed(self.where)})"] if self.where is not None else []
        return " AND ".join([*(sql(part) for part in parts), *written]) or None


def checked_text(value: str) -> str:
    """The value, if it can be written as UTF-8: a shell hands on bytes that are no text. Raises AtlasError otherwise."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise AtlasError(f"{value!r} is no text: it holds what no UTF-8 stands for") from error
    return value


def _enclosed(where: str) -> str:
    """A condition that stays one between parentheses: outside of quotes it closes no more than it has opened."""
    bare, depth = _QUOTED.sub(" ", where), 0
    strange = _STRANGE.search(bare)
    for sign in bare:
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            break
    if strange or depth:
        reason = f"it has {strange[0]} outside of quotes" if strange else "its parentheses do not match"
        raise AtlasError(f"no condition on features: {where!r}: {reason}")
    return where
