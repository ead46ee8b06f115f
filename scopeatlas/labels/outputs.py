"""What a feature does to the output: the tokens its direction promotes and suppresses, and those that steering raises.

What belongs here: these as text, for a rule label's claim on what is written and for an explainer to read, and remembering
what was measured. What does not: measuring (`mining/promoted.py`, `mining/steering.py`) or testing a claim (`scoring/`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import SubjectModelError
from scopeatlas.labels import versions
from scopeatlas.mining.examples import FeatureExamples
from scopeatlas.mining.steering import raised_tokens, token_changes
from scopeatlas.runner.local import Log
from scopeatlas.storage.uris import Location
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

WRITES_MIN_STRENGTH = 6.0
"""Promoted tokens are a claim only if the strongest stands this many standard deviations out of the vocabulary: over
262,144 tokens chance alone reaches about 4.6."""
WRITES_TOKENS = 5
STEERED_PROMPTS, STEERED_LENGTH = 4, 12
STEERING_VERSION = 1
"""Of what is remembered: raised when the prompts or the measure change."""


@dataclass(frozen=True)
class Outputs:
    """The tokens, as text, that a feature's direction promotes and suppresses, and those that steering with it raises."""

    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()
    raised: tuple[str, ...] = ()


def writes_claims(features: pl.DataFrame, subject: SubjectModel) -> dict[int, str]:
    """What features claim to write: their strongest promoted tokens, where those stand out of the vocabulary.

    Each is written as a JSON string, since a token may be a quotation mark or the end of a line.
    """
    strong = features.filter(pl.col("promoted_strength").list.first() >= WRITES_MIN_STRENGTH)
    claims = {}
    for row in strong.select("feature", "promoted").iter_rows(named=True):
        texts = token_texts(subject.tokenizer, row["promoted"][:WRITES_TOKENS])
        claims[row["feature"]] = "raises " + ", ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return claims


def read_outputs(
    examples: FeatureExamples, subject: SubjectModel, features: Sequence[int], raised: dict[int, tuple[str, ...]]
) -> dict[int, Outputs]:
    """What is known of the outputs of `features`. raised: see `steered`."""
    rows = examples.features.filter(pl.col("feature").is_in(list(features))).select("feature", "promoted", "suppressed")
    return {
        feature: Outputs(_texts(subject, promoted), _texts(subject, suppressed), raised.get(feature, ()))
        for feature, promoted, suppressed in rows.iter_rows()
    }


def steered(
    path: Location,
    source: str,
    features: Sequence[int],
    *,
    corpus: Corpus,
    subject: SubjectModel,
    dictionary: Callable[[], SparseDictionary],
    log: Log,
) -> dict[int, tuple[str, ...]]:
    """The tokens that steering with each feature raises on the beginnings of a few explain contexts, the most first.

    Measured once and remembered in the file at `path`, for `source`, the identity of all that determines them. None, with
    a line in the log, where the SAE's site cannot be edited.
    """
    here = [STEERING_VERSION, source]
    known: dict[int, tuple[str, ...]] = {
        line["feature"]: tuple(line["raised"]) for line in versions.read(path) if line["source"] == here
    }
    missing = [feature for feature in features if feature not in known]
    if not missing:
        return known
    log(f"feature labels: what steering with {len(missing):,} features raises")
    try:
        for change in token_changes(dictionary(), subject, _prompts(corpus), missing):
            ids = [token for token, effect in raised_tokens(change, subject) if effect > 0]
            known[change.feature] = _texts(subject, ids)
    except SubjectModelError as error:
        log(f"feature labels: no steering: {error}")
        return {}
    versions.append(path, [{"source": here, "feature": f, "raised": list(known[f])} for f in missing])
    return known


def _texts(subject: SubjectModel, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(token_texts(subject.tokenizer, ids))


def _prompts(corpus: Corpus) -> np.ndarray:
    """The beginnings of the first explain contexts: int [STEERED_PROMPTS, STEERED_LENGTH]."""
    rows: list[np.ndarray] = []
    for shard in corpus.shards:
        contexts = corpus.contexts(shard)
        rows += [*contexts.tokens[contexts.splits == SPLITS.index("explain")]]
    return np.stack(rows[:STEERED_PROMPTS])[:, :STEERED_LENGTH]
