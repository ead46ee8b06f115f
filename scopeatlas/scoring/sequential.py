"""When to stop asking a judge, and what many tests at once may claim: confidence sequences and false discovery.

What belongs here: arithmetic on verdicts and p-values. What does not: who is asked what (`judged.py`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

ALPHA = 0.05
CHANCE = 0.5
USEFUL = 0.6
GRID = 100
MOST_OF_THE_CAPITAL = 0.75
"""No bet risks more than this share of the capital."""

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
    true negative rate are means over documents.
    """
    hits, rejections = _by_document(document, fires, np.where(fires, verdict, 1 - verdict))
    low, high = accuracy_bounds(hits, rejections, alpha=alpha)
    if low > CHANCE:
        reason: Reason = "above_chance"
    elif high < useful:
        reason = "not_useful"
    else:
        reason = "used_up" if used_up else "undecided"
    counts = ((~np.isnan(values)).sum() for values in (hits, rejections))
    return Decision(reason != "undecided", reason, low, high, *map(int, counts))


def accuracy_bounds(hits: np.ndarray, rejections: np.ndarray, *, alpha: float = ALPHA) -> tuple[float, float]:
    """Bounds on balanced accuracy after some documents, within which it lies with probability 1 - alpha after all of them
    at once, so that one may look after every document and stop at will.

    hits, rejections: the share of a document's windows judged rightly, of those that fire and of those that do not: float64
    [D] in [0, 1], NaN where it has none, in the order of asking. The hedged capital process with predictable plug-in bets of
    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024), theorem 3 and
    equations 24 to 26, on each pair (recall, true negative rate) of a grid: one gambler bets that both are higher, one that
    both are lower, and a pair is out once either has won. A document's two bets add up instead of multiplying, which is fair
    however its hits and rejections depend on each other. The bounds are moved outwards by one step of the grid.
    """
    means = np.linspace(0, 1, GRID + 1)
    pair = (means[:, None], means[None])
    higher, lower = np.ones((2, GRID + 1, GRID + 1))
    kept = np.ones_like(higher, dtype=bool)
    values, stakes = np.stack([hits, rejections]), _stakes(hits, rejections, alpha)
    with np.errstate(divide="ignore", over="ignore"):  # no limit on a bet that a mean is more than 0; a fortune is infinite
        for number in range(len(hits)):
            there = np.flatnonzero(~np.isnan(values[:, number]))
            up, down = np.ones_like(higher), np.ones_like(lower)
            for of in there:
                most, stake = MOST_OF_THE_CAPITAL / len(there), stakes[of, number]
                up += np.minimum(stake, most / pair[of]) * (values[of, number] - pair[of])
                down -= np.minimum(stake, most / (1 - pair[of])) * (values[of, number] - pair[of])
            higher, lower = higher * up, lower * down
            left = kept & (np.maximum(higher, lower) / 2 < 1 / alpha)
            if not left.any():  # more is known than the grid can say
                break
            kept = left
    accuracy = ((pair[0] + pair[1]) / 2)[kept]
    return max(float(accuracy.min()) - 1 / GRID, 0.0), min(float(accuracy.max()) + 1 / GRID, 1.0)


def _stakes(hits: np.ndarray, rejections: np.ndarray, alpha: float) -> np.ndarray:
    """What to bet on each value, from those before it: float64 [2, D], 0 where there is none."""
    there = ~np.isnan(np.stack([hits, rejections]))
    count = np.cumsum(there.sum(axis=0))
    stakes = np.zeros(there.shape)
    for of, values in enumerate((hits, rejections)):
        seen = values[there[of]]
        number = np.arange(2, len(seen) + 2)
        mean = (0.5 + np.cumsum(seen)) / number
        variance = (0.25 + np.cumsum((seen - mean) ** 2)) / number
        before, bets = np.r_[0.25, variance[:-1]][: len(seen)], count[there[of]]
        stakes[of, there[of]] = np.sqrt(2 * np.log(2 / alpha) / (before * bets * np.log(bets + 1)))
    return stakes


def _by_document(document: np.ndarray, fires: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of `right` over each document's windows that fire and over those that do not: two float64 [D], NaN where
    there are none, documents in the order in which they first come."""
    _, first, index = np.unique(document, return_index=True, return_inverse=True)
    order = np.argsort(first)
    means = []
    for of in (fires, ~fires):
        counts = np.bincount(index[of], minlength=len(first)).astype(np.float64)
        sums = np.bincount(index[of], weights=right[of], minlength=len(first))
        means.append(np.divide(sums, counts, out=np.full(len(first), np.nan), where=counts > 0)[order])
    return means[0], means[1]


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
