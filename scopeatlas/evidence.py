"""What stands behind one feature of the atlas: the windows it fires in and the whole test of its label.

What belongs here: reading both back from the store's stages. What does not: the row itself (`atlas/search.py`), or
showing any of it (`rendering.py`).
"""

import math
from dataclasses import dataclass

import polars as pl

from scopeatlas.atlas.search import FeatureHit
from scopeatlas.mining.examples import read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.storage.store import Store
from scopeatlas.upkeep import newest_record


@dataclass(frozen=True)
class Window:
    """One example. kind: top or stratum. text: `tokens` as one line with «» around those that fire."""

    split: str
    kind: str
    stratum: int
    rank: int
    peak: float
    document: str
    text: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class FeatureEvidence:
    """windows: none where the examples stage is not in the store. score: the row of the scores stage that the atlas
    published (`scoring.stage.score_rules` names its columns), or None."""

    windows: tuple[Window, ...]
    score: dict[str, object] | None


def read_evidence(store: Store, hit: FeatureHit) -> FeatureEvidence:
    """The newest examples of a feature, and its score if that is the one its row in the atlas tells of."""
    return FeatureEvidence(_windows(store, hit), _score(store, hit))


def _windows(store: Store, hit: FeatureHit) -> tuple[Window, ...]:
    record = newest_record(store, hit.sae, hit.corpus, "examples")
    if record is None:
        return ()
    path = store.stage(hit.sae, hit.corpus, "examples").data_path(record.key, ".windows.parquet")
    if not path.exists():
        return ()
    table = read_examples(path, [hit.feature])
    if "texts" not in table.columns:  # made before windows carried their texts
        return ()
    return tuple(
        Window(
            split=row["split"],
            kind=row["kind"],
            stratum=row["stratum"],
            rank=row["rank"],
            peak=row["peak"],
            document=row["document_id"],
            text=mark(row["texts"], row["activations"]),
            tokens=tuple(row["texts"]),
            activations=tuple(row["activations"][: len(row["texts"])]),
        )
        for row in table.iter_rows(named=True)
    )


def _score(store: Store, hit: FeatureHit) -> dict[str, object] | None:
    record = newest_record(store, hit.sae, hit.corpus, "scores")
    if record is None or hit.f1 is None:
        return None
    path = store.stage(hit.sae, hit.corpus, "scores").data_path(record.key, ".parquet")
    if not path.exists():
        return None
    rows = pl.scan_parquet(path).filter(pl.col("feature") == hit.feature).collect().to_dicts()
    # A later run of the stage may have tested another label than the published one.
    same = [row for row in rows if row["f1"] is not None and math.isclose(row["f1"], hit.f1, abs_tol=1e-6)]
    return same[0] if same else None
