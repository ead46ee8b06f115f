"""Differences between two sets of documents, column by column, with p-values that permute documents.

What belongs here: the design (two sets, or matched pairs), the statistic, its permutation test corrected over all columns,
and the bootstrap of the effect. What does not: what the columns are (features in `contrast.py`, words in `keywords.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, product
from math import comb

import numpy as np
import polars as pl
from scipy.sparse import csc_array, csr_array

from scopeatlas.errors import ConfigError

PERMUTATIONS = 10_000
DRAWS = 1000
TILE = 256
_TOLERANCE = 1e-4  # of a z: more than float32 leaves between arrangements that are the same, or each other's mirror image


@dataclass(frozen=True)
class Design:
    """Which documents are compared: the first `a` rows with the `b` rows after them; in matched pairs row i with row a + i.

    Raises ConfigError for a set of fewer than two documents, and for pairs of sets that differ in length.
    """

    a: int
    b: int
    pairs: bool = False

    def __post_init__(self) -> None:
        if min(self.a, self.b) < 2:
            raise ConfigError(
                f"a contrast needs two documents in each set at least, not {self.a} and {self.b}: give one text a line"
            )
        if self.pairs and self.a != self.b:
            raise ConfigError(f"matched pairs need two sets of one length, not {self.a} and {self.b} documents")

    @property
    def documents(self) -> int:
        return self.a + self.b

    @property
    def units(self) -> int:
        """What is permuted: documents between the sets, or the two members within each pair."""
        return self.a if self.pairs else self.documents

    @cached_property
    def in_a(self) -> np.ndarray:
        """bool [documents]."""
        return np.arange(self.documents) < self.a

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """float32 [..., units] such that weights @ `scaled` is z: rows as `arrangements` yields them."""
        return rows.astype(np.float32) * 2 - 1 if self.pairs else rows.astype(np.float32)

    def smallest_p(self, units: int) -> float:
        """No column that is other than zero in so many units (documents, or pairs that differ) has a smaller p-value: the share
        of arrangements as extreme as all of them in one set."""
        if self.pairs:
            return 2.0 ** (1 - units)
        total = comb(self.documents, self.a)
        ways = [
            comb(self.documents - units, max(size - units, 0)) / total if units <= size else 1 / total
            for size in (self.a, self.b)
        ]
        return 2 * min(ways) if self.a == self.b else min(ways)  # of two sets of one size, either may be the extreme one

    @property
    def others(self) -> int:
        """How many arrangements there are besides the observed one."""
        return (2**self.units if self.pairs else comb(self.documents, self.a)) - 1

    def fewest_units(self, alpha: float) -> int | None:
        """In how many units a column must be other than zero for its p-value to reach alpha, uncorrected (Tarone 1990); None
        if the design is too small for any."""
        return next((m for m in range(1, self.units + 1) if self.smallest_p(m) <= alpha), None)

    def arrangements(self, permutations: int, seed: int) -> np.ndarray:
        """Other arrangements than the observed one, bool [B, units]: which documents are in a, or which pairs are as they
        are. All there are, where that is no more than `permutations`; else so many random ones."""
        if self.others <= permutations:
            return np.array(list(islice(self._all(), 1, None)), dtype=bool)  # the first is the observed one
        generator = np.random.default_rng(seed)
        if self.pairs:
            return generator.random((permutations, self.units)) < 0.5
        return generator.permuted(np.tile(self.in_a, (permutations, 1)), axis=1)

    def _all(self) -> Iterator[np.ndarray]:
        if self.pairs:
            yield from (np.array(kept) for kept in product((True, False), repeat=self.units))
        else:
            yield from (np.isin(np.arange(self.documents), chosen) for chosen in combinations(range(self.documents), self.a))

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """What the statistic sums: float32 [units, F] of values float64 [documents, F].

        Sets: z = sum over a of (x - mean) / sqrt(variance * a * b / documents), which is the difference of means over its
        standard deviation under permutation, exactly; pairs: z = sum of (x_a - x_b) / sqrt(sum of (x_a - x_b)^2). Either
        denominator is of all documents together and the same under every arrangement, so that a column which fires in few
        of them cannot blow up: in k pairs, |z| <= sqrt(k). (A within-set variance can be 0, and needs a constant added that
        depends on the columns' scale, as in Tusher et al. 2001.) Constant columns are 0.
        """
        if self.pairs:
            moved = values[: self.a] - values[self.a :]
            spread = np.sqrt((moved**2).sum(axis=0))
        else:
            moved = values - values.mean(axis=0)
            spread = np.sqrt((moved**2).sum(axis=0) * self.a * self.b / (self.documents * (self.documents - 1)))
        floor = 1e-9 * np.abs(values).max(axis=0, initial=0)  # what rounding leaves of a constant
        return np.divide(moved, spread, out=np.zeros_like(moved), where=spread > floor).astype(np.float32)


def worth_testing(values: csr_array, design: Design, alpha: float) -> np.ndarray:
    """Columns worth a test, int64: other than zero in `fewest_units`. Which they are depends on no label, so leaving the rest
    out costs no validity; none of them could have been significant, and each would have made the correction stricter."""
    units = csr_array(values[: design.a] - values[design.a :]) if design.pairs else values.copy()
    units.eliminate_zeros()
    counts = np.bincount(units.indices, minlength=_width(values))
    return np.flatnonzero(counts >= (design.fewest_units(alpha) or 1))


def max_t(values: csr_array, design: Design, *, permutations: int = PERMUTATIONS, seed: int = 0) -> pl.DataFrame:
    """Test every column of `values` [documents, F], and correct over all: float64 columns z, p, p_adjusted, in column order.

    p: (1 + arrangements with |z| as large) / (1 + arrangements), two-sided. p_adjusted: step-down max-T (Westfall and Young
    1993, algorithm 2.8; Ge, Dudoit and Speed 2003, box 2): the share of arrangements in which any column that is no stronger
    reaches this |z|. It keeps the chance of any false report at alpha, whatever the columns' dependence, where documents are
    exchangeable. Memory: [permutations, units] and [permutations, TILE], never [permutations, F].
    """
    sides = design.weights(design.arrangements(permutations, seed))
    z = statistic(values, design)
    strength = np.abs(z)
    order = np.argsort(strength, kind="stable")
    reached, exceeded = np.zeros(len(z)), np.zeros(len(z))
    largest = np.zeros(len(sides), dtype=np.float32)
    for chosen, tile in _tiles(values, design, order):
        drawn = np.abs(tile.T @ sides.T)
        threshold = strength[chosen, None] - _TOLERANCE
        reached[chosen] = (drawn >= threshold).sum(axis=1)
        np.maximum(drawn[0], largest, out=drawn[0])
        np.maximum.accumulate(drawn, axis=0, out=drawn)
        exceeded[chosen] = (drawn >= threshold).sum(axis=1)
        largest = drawn[-1]
    p, adjusted = ((1 + counts) / (1 + len(sides)) for counts in (reached, exceeded))
    adjusted[order[::-1]] = np.maximum.accumulate(adjusted[order[::-1]])
    return pl.DataFrame({"z": z, "p": p, "p_adjusted": adjusted})


def statistic(values: csr_array, design: Design) -> np.ndarray:
    """z of every column of `values` [documents, F], positive where a has more: float64 [F]. See `Design.scaled`."""
    observed = design.weights(np.ones(design.units, dtype=bool) if design.pairs else design.in_a)
    parts = [observed @ tile for _, tile in _tiles(values, design, np.arange(_width(values)))]
    return np.concatenate([np.zeros(0), *parts])


def effects(values: csr_array, design: Design, *, seed: int = 0) -> pl.DataFrame:
    """How each column of `values` [documents, F] differs: float64 columns effect, low, high, mean_a, mean_b; docs_a, docs_b.

    effect: (mean of a - mean of b) / standard deviation over all documents; two sets of one size that are wholly apart, and
    each of one value, reach 2. low, high: its 95 % percentile interval over DRAWS bootstrap draws of documents within each
    set, or of pairs; not corrected for a column having been picked for its size. docs_a, docs_b: documents where it is not 0.
    """
    generator = np.random.default_rng(seed)
    of_a, of_b = (generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) for n in (design.a, design.b))
    drawn = np.concatenate([of_a, of_a if design.pairs else of_b], axis=1)
    drawn = np.concatenate([np.ones((1, design.documents)), drawn])  # the sample itself first
    by_column = csc_array(values, dtype=np.float64)
    parts: list[np.ndarray] = []
    for start in range(0, _width(by_column), TILE):
        dense = by_column[:, start : start + TILE].toarray()
        mean_a, mean_b, effect = _effect(dense, drawn, design)
        bounds = np.percentile(effect[1:], [2.5, 97.5], axis=0)
        fires = dense != 0
        counts = fires[: design.a].sum(axis=0), fires[design.a :].sum(axis=0)
        parts.append(np.stack([effect[0], *bounds, mean_a[0], mean_b[0], *counts]))
    found = np.concatenate(parts, axis=1) if parts else np.zeros((7, 0))
    names = ("effect", "low", "high", "mean_a", "mean_b", "docs_a", "docs_b")
    frame = pl.DataFrame(dict(zip(names, found, strict=True)))
    return frame.with_columns(pl.col("docs_a", "docs_b").cast(pl.Int32))


def _effect(dense: np.ndarray, drawn: np.ndarray, design: Design) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of a, mean of b and effect, each [draws, F], of documents that count as often as `drawn` [draws, documents] says."""
    mean_a = drawn[:, : design.a] @ dense[: design.a] / design.a
    mean_b = drawn[:, design.a :] @ dense[design.a :] / design.b
    mean = (mean_a * design.a + mean_b * design.b) / design.documents
    squares = drawn @ dense**2
    spread = np.sqrt(np.maximum(squares - design.documents * mean**2, 0) / (design.documents - 1))
    # A draw without spread has no difference either, but for what rounding leaves.
    floor = 1e-6 * np.sqrt(squares / design.documents)
    return mean_a, mean_b, np.divide(mean_a - mean_b, spread, out=np.zeros_like(spread), where=spread > floor)


def _tiles(values: csr_array, design: Design, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns in `order`, TILE at a time, and what the statistic sums of them, float32 [units, TILE]."""
    by_column = csc_array(values, dtype=np.float64)
    for start in range(0, len(order), TILE):
        chosen = order[start : start + TILE]
        yield chosen, design.scaled(by_column[:, chosen].toarray())


def _width(values: csr_array | csc_array) -> int:
    return values.shape[1]  # pyright: ignore[reportOptionalSubscript]  # scipy's own annotation
