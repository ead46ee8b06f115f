"""How well two sets of documents are told apart by one thing or another, on documents that were not learnt from.

What belongs here: the folds, the classifiers, their AUROC and the comparison of two. What does not: what they are given
(`contrast.py`), or whether a single column differs (`permutation.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.sparse import csr_array, diags_array
from scipy.stats import rankdata

from scopeatlas.hypotheses.metrics import auroc, interval, unit_weights
from scopeatlas.study.permutation import Design, statistic

FOLDS = 5
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""sklearn's C, of centred rows of unit mean square, among which an inner cross-validation chooses."""
CONSTANT = 1e-6
"""A column whose standard deviation is no larger a part of its mean is left out: it may be rounding alone."""


@dataclass(frozen=True)
class Part:
    """Rows to learn from. design: of those rows, in order. fold: int64 [rows], for an inner cross-validation."""

    rows: np.ndarray
    design: Design
    fold: np.ndarray


Classifier = Callable[[csr_array, Part, np.ndarray], np.ndarray]
"""(columns [documents, F], what to learn from, rows to judge) -> the higher, the likelier in a: float64 [rows]."""


def folds(design: Design, *, seed: int = 0) -> np.ndarray | None:
    """The fold of each document, int64 [documents]: each set is dealt evenly, pairs stay together. None for sets of fewer than
    FOLDS documents."""
    if min(design.a, design.b) < FOLDS:
        return None
    generator = np.random.default_rng(seed)
    of_a, of_b = (generator.permutation(np.arange(n) % FOLDS) for n in (design.a, design.b))
    return np.concatenate([of_a, of_a if design.pairs else of_b])


def held_out(columns: csr_array, design: Design, fold: np.ndarray, classifier: Classifier) -> np.ndarray:
    """Each document's score by a classifier that has not seen its fold: its rank among those of the fold, in (0, 1), 0.5 on
    average and where all are equal, so that folds of another size or mix of sets do not tell the sets apart by themselves.

    Ranks, because what two classifiers give is not on one scale: scores pooled as they are put an AUROC below what either has.
    """
    scores = np.empty(design.documents)
    for number in range(FOLDS):
        judged, kept = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        in_a = int(design.in_a[kept].sum())
        part = Part(kept, Design(in_a, len(kept) - in_a, design.pairs), fold[kept])
        scores[judged] = (rankdata(classifier(columns, part, judged)) - 0.5) / len(judged)
    return scores


def by_all(columns: csr_array, part: Part, judged: np.ndarray) -> np.ndarray:
    """L2-regularised logistic regression on all columns, each divided by its standard deviation in the rows learnt from."""
    learnt = columns[part.rows]
    mean = learnt.mean(axis=0)
    spread = np.sqrt(np.maximum((learnt**2).mean(axis=0) - mean**2, 0))
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > CONSTANT * np.abs(mean))
    return _logistic(csr_array(columns @ diags_array(scale)), part, judged)


def by_words(counts: csr_array, part: Part, judged: np.ndarray) -> np.ndarray:
    """L2-regularised logistic regression on TF-IDF of word counts, idf from the rows learnt from (sublinear, rows of norm 1)."""
    from sklearn.feature_extraction.text import TfidfTransformer

    weighted = TfidfTransformer(sublinear_tf=True).fit(counts[part.rows]).transform(counts)
    return _logistic(csr_array(weighted), part, judged)


def by_best(columns: csr_array, part: Part, judged: np.ndarray) -> np.ndarray:
    """The one column that differs most (by |z|) in the rows learnt from, in the direction in which it differs there."""
    z = statistic(csr_array(columns[part.rows]), part.design)
    best = int(np.argmax(np.abs(z)))
    return np.sign(z[best]) * columns[judged][:, [best]].toarray()[:, 0]


def judged_by(scores: dict[str, np.ndarray], design: Design, *, seed: int = 0) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """AUROC of each classifier's held-out scores, with its 95 % interval over documents (or pairs) resampled, the classifiers
    not learnt again: frame (by, auroc, low, high); and the draws [1 + B] of each, all of the same documents."""
    unit = np.arange(design.documents) % design.a if design.pairs else np.arange(design.documents)
    weights = unit_weights(unit, seed=seed)
    drawn = {name: auroc(score, design.in_a, weights) for name, score in scores.items()}
    rows = [(name, float(of[0]), *interval(of[None, 1:])[0].tolist()) for name, of in drawn.items()]
    return pl.DataFrame(rows, schema={"by": pl.String} | dict.fromkeys(("auroc", "low", "high"), pl.Float64), orient="row"), drawn


def compared(drawn: dict[str, np.ndarray], own: tuple[str, ...]) -> pl.DataFrame:
    """What each of `own` gains in AUROC over each of the others, on the same documents in each draw: frame (by, against,
    gain, low, high, beats). It beats the other only if the whole interval is above 0."""
    others = [name for name in drawn if name not in own]
    rows = []
    for name in own:
        for other in others:
            gain = drawn[name] - drawn[other]
            low, high = interval(gain[None, 1:])[0].tolist()
            rows.append((name, other, float(gain[0]), low, high, low > 0))
    schema = {"by": pl.String, "against": pl.String} | dict.fromkeys(("gain", "low", "high"), pl.Float64) | {"beats": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _logistic(columns: csr_array, part: Part, judged: np.ndarray) -> np.ndarray:
    """Logistic regression in the coordinates of the rows learnt from (kernel trick: an L2 penalty knows no other), less their
    mean, its strength the one of best mean AUROC when each of their folds is left out in turn."""
    from sklearn.linear_model import LogisticRegression

    learnt, in_a = columns[part.rows], part.design.in_a
    center = learnt.mean(axis=0)
    shift = learnt @ center - center @ center / 2  # in the kernel, so that the columns stay sparse
    gram = (learnt @ learnt.T).toarray() - shift[:, None] - shift
    size = max(float(np.trace(gram)) / len(gram), 1e-12)
    values, vectors = np.linalg.eigh(gram / size)
    real = values > 1e-9
    if not real.any():
        return np.zeros(len(judged))
    root = np.sqrt(values[real])
    judged_shift = columns[judged] @ center - center @ center / 2
    seen = (columns[judged] @ learnt.T).toarray() - judged_shift[:, None] - shift
    within, across = vectors[:, real] * root, seen / size @ vectors[:, real] / root

    def fitted(strength: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=5000).fit(within[rows], in_a[rows])

    def left_out(strength: float) -> float:
        out = [part.fold == number for number in np.unique(part.fold)]
        scores = [(fitted(strength, ~rows).decision_function(within[rows]), in_a[rows]) for rows in out]
        return float(np.mean([auroc(score, positive, np.ones((len(score), 1)))[0] for score, positive in scores]))

    strongest = max(STRENGTHS, key=left_out)
    return fitted(strongest, np.ones(len(in_a), dtype=bool)).decision_function(across)
