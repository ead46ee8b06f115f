"""What a search gives back: features, why each was found, and whether anything was.

What belongs here: `FeatureHit`, `SearchResults`. What does not: searching (`search.py`), or printing (`rendering/`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from scopeatlas.atlas.ranking import Place
from scopeatlas.atlas.tables import FEATURE_ROW

_LISTS = tuple(name for name, dtype in FEATURE_ROW.items() if isinstance(dtype, pl.List))


@dataclass(frozen=True)
class Why:
    """Why a feature is a hit.

    places: where it stands in each ranking that has it. Of a search: label, examples (cosine), text (BM25), token (share of
    its strongest peaks), promoted (1 / place among the promoted tokens). Of `similar` and `by_vector`: label, examples,
    decoder (cosine), coactivation (Jaccard index).
    words: which of the query's words stand where: label, trigger_tokens, promoted.
    """

    places: Mapping[str, Place]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureHit:
    """One feature as the atlas knows it: FEATURE_ROW's columns; of a search also its score and why it was found.

    score: the sum of 1 / (60 + rank) over the rankings that have it; only its order means anything.
    """

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
    trigger_shares: tuple[float, ...]
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
    example_text: str
    score: float | None = None
    why: Why | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any], *, score: float | None = None, why: Why | None = None) -> "FeatureHit":
        """A row of the atlas, FEATURE_ROW's columns by name, as a hit."""
        values = {name: tuple(row[name]) if name in _LISTS else row[name] for name in FEATURE_ROW}
        return cls(**values, score=score, why=why)  # pyright: ignore[reportArgumentType]  # the table's schema is FEATURE_ROW


@dataclass(frozen=True)
class SearchResults:
    """One page of what a search found, best first; iterating gives the hits.

    query: what was asked for. by: how. hits: the features found. best: the best value of the whole search in each ranking, and
    of label_with_word among the features that hold a word of the query; of words, in a search by text alone of text, the
    largest share of the query's words that one feature holds. cutoffs: a feature is found if one of its values reaches its
    own (`ranking.CUTOFFS`); where there is none, everything ranked is found. version: of the atlas, for further pages of the
    same search; None where every page looks at an SAE's rows as they were when it was opened. offset: how many hits were
    passed over. found: how many there are on all pages, None if they were not counted. nearest: the same page of everything
    ranked, found or not; empty where that is not looked at.
    """

    query: str
    by: str
    hits: tuple[FeatureHit, ...]
    best: Mapping[str, float]
    cutoffs: Mapping[str, float]
    version: int | None = None
    offset: int = 0
    found: int | None = None
    nearest: tuple[FeatureHit, ...] = ()

    @property
    def is_weak(self) -> bool:
        """Whether no feature on any page reaches a cut-off; where there is none, whether nothing was ranked."""
        return not any(value >= self.cutoffs.get(name, value) for name, value in self.best.items())

    def __iter__(self) -> Iterator[FeatureHit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> FeatureHit:
        return self.hits[index]

    def to_polars(self) -> pl.DataFrame:
        """One row per hit: FEATURE_ROW's columns and `score`."""
        rows = [{name: list(v) if isinstance(v := getattr(hit, name), tuple) else v for name in FEATURE_ROW} for hit in self]
        return pl.DataFrame(
            [row | {"score": hit.score} for row, hit in zip(rows, self, strict=True)],
            schema={**FEATURE_ROW, "score": pl.Float64()},
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it; `nearest` only where the search is weak."""
        facts = {name: getattr(self, name) for name in ("query", "by", "version", "offset", "found", "is_weak")}
        facts |= {"best": dict(self.best), "cutoffs": dict(self.cutoffs)}
        facts["hits"] = [asdict(hit) for hit in self.hits]
        return facts | ({"nearest": [asdict(hit) for hit in self.nearest]} if self.is_weak else {})

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.features import hits_html

        return hits_html(self)
