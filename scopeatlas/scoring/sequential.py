"""When to stop asking a judge, and what many tests at once may claim: confidence sequences and false discovery.

What belongs here: arithmetic on verdicts and p-values. What does not: who is asked what (`judged.py`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

ALPHA = 0.05
CHANCE = 0.5
USEFUL = 0.6
GRID = 1000
MOST_OF_THE_CAPITAL = 0.75
"""No bet risks more than this share of the capital; c = 3/4 in section 4.2 of the paper."""

Reason = Literal["above_chance", "not_useful", "used_up", "undecided"]


@dataclass(frozen=True)
class Decision:
    """Whether to stop, why, and bounds on balanced accuracy that hold whenever one stops.

    documents_positive, documents_negative: how many the bounds rest on.
    """

    stop: bool
    reason: Reason
    low: float
    high: float
    documents_positive: int
    documents_negative: int


def decide(
    document: np.ndarray,
    fires: np.ndarray,
    verdict: np.ndarray,
    *,
    used_up: bool,
    alpha: float = ALPHA,
    useful: float = USEFUL,
) -> Decision:
    """Stop once balanced accuracy is above chance, or cannot reach `useful`, or the windows are used up.

    document: of each window, integers [n]; fires: the truth, bool [n]; verdict: float [n] in [0, 1], how surely it was said
    to fire. All in the order of asking; the windows of one document must have been asked about together. Recall and the
    true negative rate are means over documents, each bounded by a sequence at alpha / 2: valid however the two depend.
    """
    hits, rejections = (_by_document(document[of], right[of]) for of, right in ((fires, verdict), (~fires, 1 - verdict)))
    bounds = [confidence_sequence(values, alpha=alpha / 2)[-1] for values in (hits, rejections)]
    low, high = (float(bound) for bound in np.mean(bounds, axis=0))
    if low > CHANCE:
        reason: Reason = "above_chance"
    elif high < useful:
        reason = "not_useful"
    else:
        reason = "used_up" if used_up else "undecided"
    return Decision(reason != "undecided", reason, low, high, len(hits), len(rejections))


def confidence_sequence(values: np.ndarray, *, alpha: float = ALPHA) -> np.ndarray:
    """Bounds on the mean of values in [0, 1] after 0, 1, .., n of them: float64 [n + 1, 2], each within the last.

    With probability 1 - alpha the mean lies within all of them, so that one may look after every value and stop at will.
    The hedged capital process with predictable plug-in bets, Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting", JRSS B 86 (2024), theorem 3 and equations 24 to 26, for values of equal conditional mean. On a
    grid of means; the bounds are moved outwards by one step of it.
    """
    values = np.asarray(values, dtype=np.float64)
    means = np.linspace(0, 1, GRID + 1)
    bets = _bets(values, alpha)
    above, below = np.zeros_like(means), np.zeros_like(means)  # log capital of betting that the mean is higher, lower
    kept = np.ones(len(means), dtype=bool)
    bounds = [(0.0, 1.0)]
    with np.errstate(divide="ignore"):
        most_above, most_below = MOST_OF_THE_CAPITAL / means, MOST_OF_THE_CAPITAL / (1 - means)
    for value, bet in zip(values, bets, strict=True):
        above += np.log1p(np.minimum(bet, most_above) * (value - means))
        below += np.log1p(-np.minimum(bet, most_below) * (value - means))
        kept &= np.maximum(above, below) + np.log(0.5) < np.log(1 / alpha)
        left = np.flatnonzero(kept)
        low, high = bounds[-1]
        if len(left):  # none: the interval is narrower than a step
            low, high = max(low, means[max(left[0] - 1, 0)]), min(high, means[min(left[-1] + 1, GRID)])
        bounds.append((float(low), float(high)))
    return np.array(bounds)


def _bets(values: np.ndarray, alpha: float) -> np.ndarray:
    """What to stake on each value, from those before it: float64 [n]."""
    count = np.arange(1, len(values) + 1)
    mean = (0.5 + np.cumsum(values)) / (count + 1)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (count + 1)
    before = np.r_[0.25, variance[:-1]][: len(values)]
    return np.sqrt(2 * np.log(2 / alpha) / (before * count * np.log(count + 1)))


def _by_document(document: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The mean of each document, in the order in which documents first come: float64 [D]."""
    _, first, index = np.unique(document, return_index=True, return_inverse=True)
    sums, counts = np.bincount(index, weights=right), np.bincount(index)
    return (sums / np.maximum(counts, 1))[np.argsort(first)]


def q_values(p: np.ndarray) -> np.ndarray:
    """The false discovery rate at which each of the tests p [n] would count: float64 [n], NaN where p is.

    Benjamini and Hochberg, JRSS B 57 (1995): the smallest n p(j) / j over all p(j) that are not smaller.
    """
    p = np.asarray(p, dtype=np.float64)
    out = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    raised = p[order] * len(order) / np.arange(1, len(order) + 1)
    out[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1)
    return out
