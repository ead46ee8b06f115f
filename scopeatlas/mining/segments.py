"""Arithmetic on segments: runs of equal keys in sorted columns.

What belongs here: marking, ranking and thinning rows by segment, with no loop over segments. What does not: what the
segments are of (`sketches.py`, `choosing.py`, `coactivation.py`).
"""

import numpy as np
import polars as pl


def begins(*columns: np.ndarray) -> np.ndarray:
    """Where a segment begins, bool [n]: rows that differ from the row before in one of `columns`, each [n]."""
    begin = np.ones(len(columns[0]), dtype=bool)
    begin[1:] = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        begin[1:] |= column[1:] != column[:-1]
    return begin


def numbers(begin: np.ndarray) -> np.ndarray:
    """The number of each row's segment, counted from 0: int64 [n]."""
    return np.cumsum(begin) - 1


def sizes(begin: np.ndarray) -> np.ndarray:
    """How many rows each segment has: int64 [segments]."""
    return np.diff(np.flatnonzero(np.r_[begin, True]))


def ranks(begin: np.ndarray) -> np.ndarray:
    """The place of each row in its segment, counted from 0: int64 [n]."""
    starts = np.flatnonzero(begin)
    return np.arange(len(begin)) - np.repeat(starts, sizes(begin))


def ranks_among(kept: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """For each row how many rows before it in its segment are `kept`: int64 [n]."""
    before = np.cumsum(kept) - kept
    return before - np.repeat(before[begin], sizes(begin))


def by_draw(segment: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The order of rows by (segment, draw), int64 [n]. segment: integers [n] from 0. draw: uint64 [n].

    One integer holds the segment and as much of the draw as fits, which is sorted four times as fast as the two; should two
    draws of a segment agree in that much, the two are sorted after all.
    """
    bits = np.uint64(max(int(segment.max(initial=0)).bit_length(), 1))
    packed = (segment.astype(np.uint64) << (np.uint64(64) - bits)) | (draw >> bits)
    order = np.argsort(packed)
    if not begins(packed[order]).all():
        return np.lexsort((draw, segment))
    return order


def lowest_draws(begin: np.ndarray, draw: np.ndarray, count: int) -> np.ndarray:
    """Whether a row is among the `count` of its segment with the lowest draws: bool [n]. Draws differ within a segment."""
    kept = np.repeat(sizes(begin) <= count, sizes(begin))
    crowded = np.flatnonzero(~kept)
    if len(crowded):
        inside = begin[crowded]
        order = by_draw(numbers(inside), draw[crowded])
        kept[crowded[order[ranks(inside) < count]]] = True
    return kept


def first_of_each(segment: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Whether no row before has the same segment and item: bool [n]. Integers [n] both, in any order."""
    table = pl.DataFrame({"segment": segment, "item": item})
    return table.select(pl.struct("segment", "item").is_first_distinct()).to_series().to_numpy()
