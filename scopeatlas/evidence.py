"""What stands behind one feature of the atlas: the windows it fires in, its labels, and the whole test of the one shown.

What belongs here: reading both back from the store's stages. What does not: the row itself (`atlas/search.py`), or
showing any of it (`rendering/`).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import polars as pl

from scopeatlas.atlas.hits import FeatureHit
from scopeatlas.atlas.tables import SCORES
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.mining.examples import read_examples, vocabulary_path
from scopeatlas.mining.sketches import BINS_PER_OCTAVE
from scopeatlas.mining.windows import mark
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable
from scopeatlas.upkeep import record_in_use

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """What the store's newest stages say of one feature; whatever is not in the store is empty.

    windows: examples. labels: every label it was ever given (LABEL_SCHEMA). scores: every test of the label that the
    atlas shows, controls and all (SCORE_SCHEMA). outcomes: hits, misses and false alarms of that label on report
    documents (outcome, scorer, text). counter_examples: texts on which a prediction of one of its labels failed. partners:
    the features that fire on the same tokens, likest first (partner, both, pmi, jaccard). histogram: activations in bins of
    half an octave (split, low, tokens), where high is low times the square root of two.
    """

    windows: tuple[Window, ...]
    labels: pl.DataFrame
    scores: pl.DataFrame
    outcomes: pl.DataFrame
    counter_examples: pl.DataFrame
    partners: pl.DataFrame
    histogram: pl.DataFrame


@dataclass(frozen=True)
class FeaturePage:
    """One feature of the atlas with what stands behind it: what `scopeatlas show` prints and a notebook shows."""

    hit: FeatureHit
    evidence: FeatureEvidence

    def as_dict(self) -> dict[str, object]:
        tables = {name: table.to_dicts() for name, table in vars(self.evidence).items() if name != "windows"}
        return {"feature": asdict(self.hit), **tables, "examples": [asdict(window) for window in self.evidence.windows]}

    def plot(self) -> "Figure":
        """How strongly it fires how often, and its strongest held-out windows token by token."""
        from scopeatlas.plots.feature import draw

        return draw(self)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.feature_page import page

        return page(self)


def read_evidence(store: Store, hit: FeatureHit) -> FeatureEvidence:
    """The evidence behind a feature of the atlas."""

    def rows(stage: str, suffix: str, column: str, value: object) -> pl.DataFrame:
        record = record_in_use(store, hit.sae, hit.corpus, stage)
        path = record and store.stage(hit.sae, hit.corpus, stage).data_path(record.key, suffix)
        if path is None or not path.exists() or column not in pl.read_parquet_schema(readable(path)):
            return pl.DataFrame()
        return pl.scan_parquet(readable(path)).filter(pl.col(column) == value).collect()

    return FeatureEvidence(
        windows=_windows(store, hit),
        labels=rows("labels", ".parquet", "feature", hit.feature),
        scores=rows("scores", ".parquet", "label_id", hit.label_id),
        outcomes=rows("scores", ".outcomes.parquet", "label_id", hit.label_id),
        counter_examples=_failed(rows("labels", ".falsification.parquet", "feature", hit.feature)),
        partners=_likest(rows("examples", ".coactivation.parquet", "feature", hit.feature)),
        histogram=_edges(rows("examples", ".histogram.parquet", "feature", hit.feature)),
    )


def blinded(hit: FeatureHit, evidence: FeatureEvidence) -> tuple[FeatureHit, FeatureEvidence]:
    """The same with nothing that a person who is to label the feature must not see: explain windows, and what it promotes."""
    no_scores = {name: None for name in SCORES} | {"scorer": "", "unit": ""}
    unlabelled = {"method": "", "label": "", "label_id": "", "reads": "", "writes": "", "snippets": ()}
    unlabelled |= {"search_text": "", "example_text": ""}
    windows = tuple(window for window in evidence.windows if window.split == "explain")
    nothing = pl.DataFrame()
    blind = FeatureEvidence(windows, nothing, nothing, nothing, nothing, evidence.partners, _of_explain(evidence.histogram))
    return replace(hit, **no_scores, **unlabelled), blind


def _likest(partners: pl.DataFrame) -> pl.DataFrame:
    if partners.is_empty():
        return partners
    likest = partners.filter(pl.col("jaccard_rank").is_not_null()).sort("jaccard_rank")
    return likest.select("partner", "both", "pmi", "jaccard")


def _edges(histogram: pl.DataFrame) -> pl.DataFrame:
    if histogram.is_empty():
        return histogram
    names = dict(enumerate(SPLITS))
    low = (pl.col("bin") / BINS_PER_OCTAVE * math.log(2)).exp()
    split = pl.col("split").replace_strict(names, return_dtype=pl.String)
    return histogram.sort("split", "bin").select(split, low=low, tokens="tokens")


def _of_explain(histogram: pl.DataFrame) -> pl.DataFrame:
    return histogram if histogram.is_empty() else histogram.filter(split="explain")


def _failed(predictions: pl.DataFrame) -> pl.DataFrame:
    return predictions if predictions.is_empty() else predictions.filter(~pl.col("passed"))


def _windows(store: Store, hit: FeatureHit) -> tuple[Window, ...]:
    record = record_in_use(store, hit.sae, hit.corpus, "examples")
    if record is None:
        return ()
    path = store.stage(hit.sae, hit.corpus, "examples").data_path(record.key, ".windows.parquet")
    if not path.exists() or not vocabulary_path(path).exists():  # made before windows had a vocabulary beside them
        return ()
    table = read_examples(path, [hit.feature])
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
