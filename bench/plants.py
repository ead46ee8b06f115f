"""What planting needs, in tokens or in the residual stream: concepts marked on a corpus, rules held against them.

What belongs here: marking, firing and testing of features whose meaning is known. What does not: which features are
planted, and what counts as finding them (`planted.py`, `residual_plants.py`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import polars as pl

from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.hypotheses.labels import Label, label_table
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.scoring.execution import execute_rules
from scopeatlas.scoring.table import published, score_table

Concept = Callable[[Sequence[str]], Sequence[bool]]
"""Which tokens of a context (their texts, BOS left out) a feature means."""


@cache
def word(text: str) -> str:
    """A token's text without space and case."""
    return text.strip().casefold()


def among(words: Collection[str]) -> Concept:
    """Tokens that are one of some words."""
    return lambda texts: [word(text) in words for text in texts]


def contexts_of(units: Units) -> Iterator[tuple[np.ndarray, list[str], int]]:
    """Each context: the positions in it that count, their texts, and its split as an index into SPLITS."""
    keys, texts = units.column("token")
    for number, row in enumerate(keys.reshape(units.contexts, units.length)):
        at = np.flatnonzero(row >= 0)
        yield number * units.length + at, [texts[key] for key in row[at]], int(units.context_split[number])


def marked(units: Units, concepts: Sequence[Concept], *, split: Split | None = None) -> np.ndarray:
    """Where each concept holds, in all documents or in those of one split: bool [concepts, N]."""
    out = np.zeros((len(concepts), len(units.counted)), dtype=bool)
    for at, texts, index in contexts_of(units):
        if split is None or SPLITS[index] == split:
            for row, concept in zip(out, concepts, strict=True):
                row[at] = concept(texts)
    return out


@dataclass(frozen=True)
class Agreement:
    """Precision and recall of what is claimed against what is meant, on tokens; 0 where there is nothing to divide by."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-12)


def agreement(claimed: np.ndarray, meant: np.ndarray) -> Agreement:
    """Of two masks of the same shape."""
    both = float((claimed & meant).sum())
    return Agreement(both / max(int(claimed.sum()), 1), both / max(int(meant.sum()), 1))


def claimed(units: Units, rules: Mapping[int, Rule]) -> dict[int, np.ndarray]:
    """Where each feature's rule, run on the text of every report document, says that it fires: bool [N] each."""
    return dict(zip(rules, marked(units, [rule.matches for rule in rules.values()], split="report"), strict=True))


def firings_of(positions: Sequence[np.ndarray], draw: np.random.Generator) -> Firings:
    """Features 0, 1, ... firing at their positions, each with a log-normal strength."""
    feature = np.repeat(np.arange(len(positions), dtype=np.uint32), [len(p) for p in positions])
    value = draw.lognormal(mean=1.0, sigma=0.5, size=len(feature)).astype(np.float32)
    return Firings(feature, np.concatenate([np.sort(p) for p in positions]), len(positions), value=value)


def tested(units: Units, firings: Firings, labels: Sequence[Label], *, seed: int) -> pl.DataFrame:
    """The project's own test of rules on report documents: what is published of each label (`scoring.table.published`),
    shuffled_balanced_accuracy among it."""
    rows = execute_rules(units, firings, labels, neighbours=None, min_documents=1, seed=seed)
    return published(score_table(rows), label_table(list(labels)))
