"""Metrics of a claim against firings, and their intervals from a bootstrap over documents.

What belongs here: arithmetic on counts and on scores of units. What does not: where either comes from.

Documents are what is resampled, because the tokens or windows of one document are not independent of each other. A claim
that says yes or no is kept as counts per (feature, document); one that gives each unit a number, as units.
"""

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 1000
CLAIM_METRICS = ("precision", "recall", "f1", "balanced_accuracy", "auprc")


@dataclass(frozen=True)
class DocumentCounts:
    """Per feature and document, float64 [F, D]: true positives, units the claim matches, units that fire; and the
    units there are, [F, D] or [1, D]."""

    true_positive: np.ndarray
    claimed: np.ndarray
    fired: np.ndarray
    units: np.ndarray

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.true_positive, self.claimed, self.fired, self.units

    def constant(self) -> "DocumentCounts":
        """The same units under the claim that every one fires."""
        return DocumentCounts(self.fired, np.broadcast_to(self.units, self.fired.shape), self.fired, self.units)


@dataclass(frozen=True)
class Metrics:
    """Arrays of one shape. A metric without a denominator is 0: a claim that matches nothing has precision 0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    balanced_accuracy: np.ndarray
    auprc: np.ndarray


@dataclass(frozen=True)
class Lift:
    """What a claim gains over a control on the same units, arrays [F]: the difference, its 95 % interval, and the
    p-value of no gain."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray


def metrics(true_positive: np.ndarray, claimed: np.ndarray, fired: np.ndarray, units: np.ndarray) -> Metrics:
    """Precision, recall, F1, balanced accuracy (the mean of recall and true negative rate) and AUPRC from counts.

    AUPRC is average precision, sum (R_n - R_{n-1}) P_n. A claim of yes or no has two thresholds: the units claimed, and
    all units, where precision is the base rate; so it is recall * precision + (1 - recall) * base rate.
    """
    true_negative = units - claimed - fired + true_positive
    recall = _ratio(true_positive, fired)
    specificity = _ratio(true_negative, units - fired)
    precision = _ratio(true_positive, claimed)
    return Metrics(
        precision=precision,
        recall=recall,
        f1=_ratio(2 * true_positive, claimed + fired),
        balanced_accuracy=(recall + specificity) / 2,
        auprc=recall * precision + (1 - recall) * _ratio(fired, units),
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
    return metrics(*(part.sum(axis=1) for part in counts.parts))


def bootstrap_intervals(counts: DocumentCounts, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """95 % percentile intervals, [F, 2] for each of CLAIM_METRICS, documents resampled with replacement; NaN for a feature
    that never fires."""
    drawn = _drawn_metrics(counts, draws, seed)
    return {name: interval(getattr(drawn, name)) for name in CLAIM_METRICS}


def paired_lift(
    own: DocumentCounts,
    control: DocumentCounts,
    *,
    metric: str = "balanced_accuracy",
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> Lift:
    """What the own claim gains over a control in a metric, both on the same resampled documents in each draw."""
    gained = getattr(_drawn_metrics(own, draws, seed), metric) - getattr(_drawn_metrics(control, draws, seed), metric)
    value = getattr(point_metrics(own), metric) - getattr(point_metrics(control), metric)
    return lift_of(value, gained, documents=(own.fired > 0).sum(axis=1))


def lift_of(value: np.ndarray, gained: np.ndarray, *, documents: np.ndarray) -> Lift:
    """A lift from its value [F] and its bootstrap draws [F, B].

    The p-value is the share of draws without a gain, (1 + #{gain <= 0}) / (1 + B), but no less than 2^-documents: each of
    `documents` [F] with a firing is one independent trial, and n trials cannot say more than n heads in a row.
    """
    bounds = interval(gained)
    defined = (~np.isnan(gained)).sum(axis=1)
    p_value = (1 + (gained <= 0).sum(axis=1)) / (1 + defined)
    return Lift(value, bounds[:, 0], bounds[:, 1], np.maximum(p_value, 0.5 ** np.asarray(documents, dtype=np.float64)))


def interval(drawn: np.ndarray) -> np.ndarray:
    """The 95 % percentile interval of bootstrap draws [F, B]: [F, 2]. Draws in which the metric is undefined are NaN and
    left out; all of them undefined is NaN."""
    bounds = np.full((len(drawn), 2), np.nan)
    defined = ~np.isnan(drawn).all(axis=1)
    if defined.any():
        bounds[defined] = np.nanpercentile(drawn[defined], [2.5, 97.5], axis=1).T
    return bounds


def unit_weights(document: np.ndarray, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> np.ndarray:
    """How often each unit counts in each draw when documents are resampled: float64 [n, 1 + B], the first column being
    the sample itself. document: int [n], the document of each unit."""
    names, place = np.unique(document, return_inverse=True)
    weights = _document_weights(len(names), draws, seed)
    return np.concatenate([np.ones((len(document), 1)), weights[place]], axis=1)


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of (positive, negative) pairs that a score puts in order, ties counting half: float64 [B], NaN where a
    draw has no pair. score: float [n]; positive: bool [n]; weights: float64 [n, B]."""
    positives, negatives = _by_score(score, positive, weights)
    below = np.cumsum(negatives, axis=0) - negatives
    pairs = positives.sum(axis=0) * negatives.sum(axis=0)
    ordered = (positives * (below + negatives / 2)).sum(axis=0)
    return np.divide(ordered, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def auprc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision, sum (R_n - R_{n-1}) P_n over the distinct scores from the highest down: float64 [B], NaN where
    a draw has no positive. Arguments as for `auroc`."""
    positives, negatives = (part[::-1] for part in _by_score(score, positive, weights))
    found = np.cumsum(positives, axis=0)
    precision = _ratio(found, found + np.cumsum(negatives, axis=0))
    total = positives.sum(axis=0)
    return np.divide((positives * precision).sum(axis=0), total, out=np.full(total.shape, np.nan), where=total > 0)


def correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation of x and y [n] under each column of weights [n, B]: float64 [B], NaN where either is constant."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    total = weights.sum(axis=0)
    centred_x, centred_y = x[:, None] - x @ weights / total, y[:, None] - y @ weights / total
    together, of_x, of_y = (
        (weights * part).sum(axis=0) for part in (centred_x * centred_y, centred_x * centred_x, centred_y * centred_y)
    )
    spread = np.sqrt(of_x * of_y)
    floor = 1e-12 * total * (np.abs(x).max(initial=0) * np.abs(y).max(initial=0))  # what rounding leaves of a constant
    return np.divide(together, spread, out=np.full(spread.shape, np.nan), where=spread > floor)


def cohens_kappa(one: np.ndarray, other: np.ndarray) -> float:
    """Agreement of two judges' yes and no (bool [n]) beyond chance (Cohen 1960); 1 where both always say the same one."""
    agreed = float((one == other).mean())
    by_chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    return 1.0 if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


def _drawn_metrics(counts: DocumentCounts, draws: int, seed: int) -> Metrics:
    """Metrics in each draw, arrays [F, B]; NaN in draws without a firing, which say nothing about recall."""
    weights = _document_weights(counts.true_positive.shape[1], draws, seed)
    drawn = metrics(*(part @ weights for part in counts.parts))
    fires = counts.fired @ weights > 0
    return Metrics(**{name: np.where(fires, getattr(drawn, name), np.nan) for name in CLAIM_METRICS})


def _document_weights(documents: int, draws: int, seed: int) -> np.ndarray:
    """How often each document is drawn: float64 [D, B]."""
    shares = np.full(documents, 1 / max(documents, 1))
    return np.random.default_rng(seed).multinomial(documents, shares, size=draws).T.astype(np.float64)


def _by_score(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight of positives and of negatives at each distinct score, lowest first: two float64 [levels, B]."""
    levels, level = np.unique(score, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))
    sums = [np.add.reduceat(weights[order] * is_one[order, None], starts, axis=0) for is_one in (positive, ~positive)]
    return sums[0], sums[1]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    return np.divide(numerator, denominator, out=np.zeros(shape), where=np.broadcast_to(denominator, shape) > 0)
