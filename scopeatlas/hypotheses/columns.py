"""Key columns: for every position of a corpus, what each kind of rule looks at there.

What belongs here: keys of positions, and positions of keys. What does not: what the positions are (`units.py`) or what a
rule claims of them (`rules.py`).
"""

import numpy as np

from scopeatlas.hypotheses.rules import AFFIX_LENGTHS, PAIR, REACH, Rule, RuleKind
from scopeatlas.hypotheses.surface import ZONES, scanner_of, shape_of, spelling_of, word_of

COLUMNS = (
    "token", "word", *(f"{kind}:{n}" for kind in ("prefix", "suffix") for n in AFFIX_LENGTHS), "shape", "bigram",
    "previous", "next", "skip", "previous_shape", "next_shape", "near", *(f"format:{zone}" for zone in ZONES), "position",
)  # fmt: skip
"""Where keys are looked up: one column per kind of token rule, or per length of affix and per format."""
_SHIFTS = {"previous": 1, "next": -1, "skip": 2, "previous_shape": 1, "next_shape": -1}
"""Columns that hold another token's key: how many tokens before it."""


def column_of(rule: Rule, key: str) -> str:
    """The key column in which a simple rule's key is looked up."""
    match rule.kind:
        case "prefix" | "suffix":
            return f"{rule.kind}:{len(key)}"
        case "format":
            return f"format:{key}"
        case _:
            return rule.kind


def kind_of(column: str) -> RuleKind:
    """The kind of rule whose keys a column holds."""
    return column.partition(":")[0]  # type: ignore[return-value]


class KeyColumns:
    """The keys of all positions of `contexts` rows of `length` tokens, flattened to N = contexts x length.

    texts: the distinct texts of tokens. Key columns: int32 [N], index into that column's texts, -1 where there is no
    key. The column "near" has the words of the tokens themselves; `keys_at` gives those that are near.
    """

    def __init__(self, flat: np.ndarray, texts: list[str], *, contexts: int, length: int):
        """flat: int32 [N], the index of each token's text, -1 for a token that does not count."""
        self.texts, self.contexts, self.length = texts, contexts, length
        self._flat = flat
        self._columns: dict[str, tuple[np.ndarray, list[str]]] = {}
        self._lookups: dict[str, dict[str, int]] = {}
        self._sorted: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def column(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A key column and the text of each key in it."""
        if name not in self._columns:
            self._columns[name] = self._make_column(name)
        return self._columns[name]

    def key_of(self, name: str, text: str) -> int:
        """The index of a key's text in a column, or -2 if it never occurs in this corpus."""
        return self._lookup(name).get(text, -2)

    def keys_at(self, name: str, positions: np.ndarray) -> np.ndarray:
        """A column's keys at positions [n]: int32 [n, 1], or [n, REACH] for "near", no word twice in a row; -1 is none."""
        keys = self.column(name)[0]
        if name != "near":
            return keys[positions][:, None]
        near = np.full((len(positions), REACH), -1, dtype=np.int32)
        for back in range(1, REACH + 1):  # one at a time: int32 is all that is held of every position
            near[:, back - 1] = np.where(positions % self.length >= back, keys[positions - back], -1)
        for i in range(1, REACH):
            near[(near[:, :i] == near[:, i : i + 1]).any(axis=1), i] = -1
        near[self._flat[positions] < 0] = -1
        return near

    def positions_with(self, name: str, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a column holds each of some keys [n]: the index into `keys` and the position, int64 [m]. For "near" one
        position may come several times."""
        order, starts = self._postings(name)
        known = np.maximum(keys, 0)
        counts = np.where(keys >= 0, starts[known + 1] - starts[known], 0)
        which = np.repeat(np.arange(len(keys)), counts)
        at = order[np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + starts[known][which]]
        if name != "near":
            return which, at
        after = at[:, None] + np.arange(1, REACH + 1)
        kept = (after // self.length == (at // self.length)[:, None]) & (self._flat[np.minimum(after, len(self._flat) - 1)] >= 0)
        return np.broadcast_to(which[:, None], after.shape)[kept], after[kept]

    def _lookup(self, name: str) -> dict[str, int]:
        if name not in self._lookups:
            self._lookups[name] = {text: i for i, text in enumerate(self.column(name)[1])}
        return self._lookups[name]

    def _make_column(self, name: str) -> tuple[np.ndarray, list[str]]:
        kind, _, detail = name.partition(":")
        if kind == "token":
            return self._flat, self.texts
        if kind in _SHIFTS:
            own, texts = self.column("shape" if kind.endswith("_shape") else "token")
            return self._shifted(own, _SHIFTS[kind]), texts
        if kind == "near":
            return self.column("word")
        if kind == "bigram":
            return self._bigrams()
        if kind == "format":
            return self._zone(detail), [detail]
        if kind == "position":
            places = np.tile(np.arange(-1, self.length - 1, dtype=np.int32), self.contexts)  # BOS comes before the first
            return np.where(self._flat >= 0, places, -1), [str(i + 1) for i in range(self.length - 1)]
        keys = [_vocabulary_key(kind, int(detail or 0), text) for text in self.texts]
        texts = sorted({key for key in keys if key})
        index = {text: i for i, text in enumerate(texts)}
        by_token = np.array([index.get(key, -1) for key in keys] + [-1], dtype=np.int32)
        return by_token[self._flat], texts

    def _shifted(self, keys: np.ndarray, by: int) -> np.ndarray:
        """Another token's keys: those `by` tokens before, or after where it is negative."""
        shifted = np.full((self.contexts, self.length), -1, dtype=np.int32)
        rows = keys.reshape(shifted.shape)
        if by > 0:
            shifted[:, by:] = rows[:, :-by]
        else:
            shifted[:, :by] = rows[:, -by:]
        return np.where(self._flat >= 0, shifted.ravel(), -1)

    def _zone(self, zone: str) -> np.ndarray:
        """0 where the text before puts a token in a zone: the scanner of all contexts in step, by a table of what each
        text does to each state."""
        scanner = scanner_of(zone)
        number = {state: i for i, state in enumerate(scanner.states)}
        table = np.array([[number[scanner.after(state, text)] for state in scanner.states] for text in (*self.texts, "")])
        rows = self._flat.reshape(self.contexts, self.length)
        states = np.zeros((self.contexts, self.length + 1), dtype=np.int8)
        for at in range(self.length):
            states[:, at + 1] = table[rows[:, at], states[:, at]]
        inside = np.isin(states[:, :-1], [number[state] for state in scanner.zones[zone]]).ravel()
        return np.where(inside & (self._flat >= 0), 0, -1).astype(np.int32)

    def _postings(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The positions of a column in order of their keys, and where each key's begin in it."""
        if name not in self._sorted:
            keys, texts = self.column(name)
            order = np.argsort(keys, kind="stable")
            self._sorted[name] = order, np.searchsorted(keys[order], np.arange(len(texts) + 1))
        return self._sorted[name]

    def _bigrams(self) -> tuple[np.ndarray, list[str]]:
        own, words = self.column("spelling")
        before = self._shifted(own, 1).astype(np.int64)
        packed = np.where((before >= 0) & (own >= 0), before * len(words) + own, -1)
        pairs, inverse = np.unique(packed, return_inverse=True)
        has_none = int(len(pairs) > 0 and pairs[0] == -1)
        texts = [f"{words[pair // len(words)]}{PAIR}{words[pair % len(words)]}" for pair in pairs[has_none:]]
        return inverse.ravel().astype(np.int32) - has_none, texts


def _vocabulary_key(kind: str, size: int, token: str) -> str:
    word = word_of(token)
    if kind == "word":
        return word
    if kind == "spelling":
        return spelling_of(token)
    if kind == "shape":
        return shape_of(token) if token else ""
    if len(word) <= size or not word.isalpha():
        return ""
    return word[:size] if kind == "prefix" else word[-size:]
