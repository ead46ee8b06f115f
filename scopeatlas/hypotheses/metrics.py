"""Metrics of a claim against firings, and their intervals from a bootstrap over documents.

What belongs here: arithmetic on counts. What does not: where the counts come from.

Counts are kept per (feature, document), because documents are what is resampled: tokens of one document are not
independent of each other.
"""

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 400


@dataclass(frozen=True)
class DocumentCounts:
    """Per feature and document, float64 [F, D]: true positives, units the claim matches, units that fire; and the
    units there are, [F, D] or [1, D]."""

    true_positive: np.ndarray
    claimed: np.ndarray
    fired: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class Metrics:
    """Arrays of one shape. A metric without a denominator is 0: a claim that matches nothing has precision 0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    balanced_accuracy: np.ndarray


def metrics(true_positive: np.ndarray, claimed: np.ndarray, fired: np.ndarray, units: np.ndarray) -> Metrics:
    """Precision, recall, F1 and balanced accuracy (the mean of recall and true negative rate) from counts."""
    true_negative = units - claimed - fired + true_positive
    recall = _ratio(true_positive, fired)
    specificity = _ratio(true_negative, units - fired)
    return Metrics(
        precision=_ratio(true_positive, claimed),
        recall=recall,
        f1=_ratio(2 * true_positive, claimed + fired),
        balanced_accuracy=(recall + specificity) / 2,
    )


def constant_f1(fired: np.ndarray, units: np.ndarray) -> np.ndarray:
    """F1 of the claim that everything fires: the floor that a claim has to beat where firing is common."""
    return _ratio(2 * fired, units + fired)


def lift(f1: np.ndarray, fired: np.ndarray, units: np.ndarray) -> np.ndarray:
    """F1 above the constant claim's, as a share of what could be gained above it: 1 is perfect, 0 the constant."""
    floor = constant_f1(fired, units)
    return _ratio(f1 - floor, 1 - floor)


def point_metrics(counts: DocumentCounts) -> Metrics:
    """Metrics over all documents, arrays [F]."""
    return metrics(*(part.sum(axis=1) for part in (counts.true_positive, counts.claimed, counts.fired, counts.units)))


def bootstrap_intervals(counts: DocumentCounts, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """95 % percentile intervals, [F, 2] for each metric, documents resampled with replacement."""
    generator = np.random.default_rng(seed)
    documents = counts.true_positive.shape[1]
    weights = generator.multinomial(documents, np.full(documents, 1 / documents), size=draws).T.astype(np.float64)
    drawn = metrics(*(part @ weights for part in (counts.true_positive, counts.claimed, counts.fired, counts.units)))
    return {
        name: np.percentile(getattr(drawn, name), [2.5, 97.5], axis=1).T
        for name in ("precision", "recall", "f1", "balanced_accuracy")
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    return np.divide(numerator, denominator, out=np.zeros(shape), where=np.broadcast_to(denominator, shape) > 0)
