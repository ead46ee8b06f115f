"""From several rankings of features to one, and when the best is not good enough.

What belongs here: ranks with ties, reciprocal-rank fusion, cut-offs. What does not: asking the table (`search.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RRF_K = 60
"""The constant of reciprocal-rank fusion (Cormack, Clarke & Büttcher, 2009): how little the first few ranks differ."""
WITH_WORD = "label_with_word"
CUTOFFS = {"label": 0.6, WITH_WORD: 0.5, "examples": 0.4, "words": 0.6, "text": 0.01}
"""A feature is found if one of these is at least so much (`bench/cutoff.py`): its cosine (MiniLM) with the query by label, by
label where it also holds a word of the query, or by examples; or the share of the query's words that it holds. Of a search by
text alone any word will do."""


@dataclass(frozen=True)
class Place:
    """Where a feature stands in one ranking. rank: from 1, the same for equals. value: what it is ranked by."""

    rank: int
    value: float


def ranked(values: Iterable[tuple[str, float, float]]) -> dict[str, Place]:
    """Keys with a value and what decides between equal values, highest first; keys of equals in alphabetical order."""
    places: dict[str, Place] = {}
    rank, last = 0, None
    for number, (key, value, second) in enumerate(sorted(values, key=lambda v: (-v[1], -v[2], v[0])), start=1):
        rank, last = (rank if (value, second) == last else number), (value, second)
        places[key] = Place(rank, value)
    return places


def fused(rankings: Mapping[str, Mapping[str, Place]]) -> list[tuple[str, float]]:
    """Every key of any ranking with the sum of 1 / (RRF_K + its rank) over those it is in, highest first, then by key."""
    scores: dict[str, float] = {}
    for places in rankings.values():
        for key, place in places.items():
            scores[key] = scores.get(key, 0.0) + 1 / (RRF_K + place.rank)
    return sorted(scores.items(), key=lambda scored: (-scored[1], scored[0]))
