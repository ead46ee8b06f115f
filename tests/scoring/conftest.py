"""Units of real text, and features that fire at random places in it."""

import numpy as np
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.units import Firings, Units
from tests.planted import firings_of, texts_of


@pytest.fixture(scope="session")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="session")
def contexts(medium_corpus, subject, units) -> list[tuple[int, np.ndarray, list[str]]]:
    """The contexts of report documents: number, positions in the context, texts."""
    is_report = units.context_split == SPLITS.index("report")
    numbered = enumerate(texts_of(medium_corpus, subject))
    return [(number, at, texts) for number, (at, texts) in numbered if is_report[number]]


@pytest.fixture
def random_firings(units, rng):
    """Features that fire at random, each in its own density: a function of how many."""

    def random_firings(count: int, *, least: int = 100, most: int = 3000) -> Firings:
        counted = np.flatnonzero(units.counted)
        return firings_of([rng.choice(counted, int(n), replace=False) for n in rng.integers(least, most, count)], count)

    return random_firings
