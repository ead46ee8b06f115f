"""Words: what two sets of texts differ in before any feature is looked at, and how much of a feature they account for.

What belongs here: the bag of words that is a contrast's baseline, and features at matched vocabulary. What does not: the
test (`permutation.py`) and the classifiers (`probes.py`).
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array

from scopeatlas.activations.probe import Text, TextActivations
from scopeatlas.study.permutation import Design

WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or a punctuation mark: a question mark is a keyword like any other. Case is kept, because a subject model sees it too:
a bag of words without it would be beaten by features that read nothing but a capital letter."""


def word_counts(texts: Sequence[Text]) -> tuple[list[str], csr_array]:
    """The words of the texts in order of spelling, and how often each text has each: float64 [texts, words]. Of a conversation,
    the words of its turns."""
    found = [WORD.findall(_said(text)) for text in texts]
    words = sorted({word for of_text in found for word in of_text})
    place = {word: number for number, word in enumerate(words)}
    text = np.repeat(np.arange(len(texts)), [len(of_text) for of_text in found])
    word = np.array([place[word] for of_text in found for word in of_text], dtype=np.int64)
    return words, csr_array(coo_array((np.ones(len(word)), (text, word)), shape=(len(texts), len(words))))


def per_token(counts: csr_array) -> csr_array:
    """Rows divided by their sums: a long text has no more of a word than a short one that repeats it as often."""
    totals = counts.sum(axis=1)
    return csr_array(diags_array(np.divide(1, totals, out=np.zeros(len(totals)), where=totals > 0)) @ counts)


def at_matched_vocabulary(readings: Sequence[TextActivations], design: Design, features: np.ndarray) -> csr_array:
    """Of each document and feature, the mean activation per token that is left when its tokens are accounted for: [documents, F].

    From each activation is taken what the feature has on average on that token (the same text) in both sets together, every
    document weighing the same; a token that only one set has says nothing of a difference at equal words and leaves 0. The
    difference of what is left, between the means of a and b, is the Mantel-Haenszel estimate over tokens as strata up to its
    scale: the sum over shared tokens v of w_v * (mean of a at v - mean of b at v), w_v = n_a n_b / (n_a + n_b) (Mantel and
    Haenszel 1959; Cochran 1954). So the difference of means is what the words predict plus this, exactly, and a feature that
    only reads a word which a has more often has nothing left. A permutation test of it is approximate, because the documents'
    words stay where they are: conservative for sets of one size, and liberal where the far smaller set has more of the word.

    readings: of each document, with a token of another role than `template` in it. features: int64 [F].
    """
    spelled = [token for reading in readings for token in reading.tokens]
    vocabulary, word = np.unique(np.array(spelled, dtype=object), return_inverse=True)
    lengths = [len(reading.tokens) for reading in readings]
    document = np.repeat(np.arange(len(readings)), lengths)
    counts = np.array([role != "template" for reading in readings for role in reading.roles])
    weight = counts / np.bincount(document, weights=counts, minlength=len(readings))[document]
    shape = (len(readings), len(vocabulary))
    share = csr_array(coo_array((weight, (document, word)), shape=shape))
    shared = (share[: design.a].sum(axis=0) > 0) & (share[design.a :].sum(axis=0) > 0)

    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    token, column, value = _firings(readings, starts, features)
    kept = shared[word[token]]
    token, column, value = token[kept], column[kept], value[kept] * weight[token[kept]]
    seen = csr_array(coo_array((value, (document[token], column)), shape=(len(readings), len(features))))
    at_word = csr_array(coo_array((value, (word[token], column)), shape=(len(vocabulary), len(features))))
    totals = share.sum(axis=0)
    expected = share @ (diags_array(np.divide(1, totals, out=np.zeros(len(totals)), where=totals > 0)) @ at_word)
    left = (seen - expected).toarray()
    left[np.abs(left) <= 1e-9 * abs(seen).max(axis=0).toarray()] = 0  # what rounding leaves of nothing
    return csr_array(left)


def _firings(
    readings: Sequence[TextActivations], starts: np.ndarray, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token (counted over all readings), place in `features` and value of everything of those features that fires."""
    feature = np.concatenate([reading.feature for reading in readings]).astype(np.int64)
    token = np.concatenate([start + reading.position for start, reading in zip(starts, readings, strict=True)]).astype(np.int64)
    value = np.concatenate([reading.value for reading in readings]).astype(np.float64)
    kept = np.isin(feature, features)
    order = np.argsort(features, kind="stable")
    return token[kept], order[np.searchsorted(features, feature[kept], sorter=order)], value[kept]


def _said(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)
