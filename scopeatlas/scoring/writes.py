"""Steering: whether a feature raises the tokens that its label says it writes, when it is added to the subject model.

What belongs here: the rows of scorer "steering", of the claim "writes". What does not: steering itself
(`mining/steering.py`), or the claim "reads", which every other scorer tests.

The effect is measured (TokenChange in Gur-Arieh et al., ACL 2025), whereas the claim of a rule label is what the unembedding
predicts, so that one is a test of the other.
"""

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import SubjectModelError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.mining.steering import TokenChange, auroc_of_tokens, random_direction_changes, token_changes
from scopeatlas.scoring.controls import NO_PARTNER, partners
from scopeatlas.scoring.measured import Measured, lift_cells, measure_mean
from scopeatlas.scoring.table import Arm, Cell
from scopeatlas.subject.loading import SubjectModel

PROMPTS = 24
PROMPT_TOKENS = 17
"""Of one prompt, BOS included."""
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)+"', re.DOTALL)


def steer_writes(
    dictionary: SparseDictionary,
    subject: SubjectModel,
    corpus: Corpus,
    labels: Sequence[Label],
    *,
    min_documents: int,
    seed: int,
) -> list[dict[str, Cell]]:
    """Rows of every label that claims to write something: its feature's own effect (arm own), the claim of another feature
    on that effect (shuffled), and its own claim on the effect of a random direction of the same norm (random_direction).

    Per prompt, a few tokens from the beginning of a report document, the score is the AUROC of the claimed tokens' change
    in log-probability within the vocabulary; intervals are over the prompts' documents.
    """
    claiming = [label for label in labels if label.writes]
    if not claiming:
        return []
    prompts, document = report_prompts(corpus)
    tokens = [claimed_tokens(label.writes, subject) for label in claiming]
    other = partners(claiming, [str(sorted(ids)) for ids in tokens], ["tokens" if ids else "" for ids in tokens], seed=seed)
    named = [i for i, ids in enumerate(tokens) if ids]
    if len(np.unique(document)) < min_documents:
        return [_row(label, "own") | {"status": "too_few_documents"} for label in claiming]
    rows = [_row(claiming[i], "own") | _skipped("the claim names no token") for i, ids in enumerate(tokens) if not ids]
    features = [claiming[i].feature for i in named]
    try:
        steered = token_changes(dictionary, subject, prompts, features)
        random = random_direction_changes(dictionary, subject, prompts, features, seed=seed)
        for i, own, drawn in zip(named, steered, random, strict=True):
            tested: dict[Arm, tuple[TokenChange, list[int]]] = {"own": (own, tokens[i]), "random_direction": (drawn, tokens[i])}
            if other[i] != i and tokens[other[i]]:
                tested["shuffled"] = own, tokens[other[i]]
            else:
                rows.append(_row(claiming[i], "shuffled") | NO_PARTNER)
            rows += _rows(claiming[i], tested, document, seed=seed)
    except SubjectModelError as error:
        done = {str(row["label_id"]) for row in rows}
        rows += [_row(label, "own") | _skipped(str(error)) for label in claiming if label.label_id not in done]
    return rows


def claimed_tokens(writes: str, subject: SubjectModel) -> list[int]:
    """The tokens that a claim names, each a JSON string; what is none, or no single token of the vocabulary, is left out."""
    texts = [text for found in _QUOTED.findall(writes) if (text := _unquoted(found)) is not None]
    spelled = [subject.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return list(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1))


def _unquoted(text: str) -> str | None:
    try:
        return json.loads(text, strict=False)  # a person may have written a line's end as it is
    except json.JSONDecodeError:
        return None


def report_prompts(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """The beginnings of contexts of report documents, int32 [n, PROMPT_TOKENS], and the document of each, int [n].

    Of the first context of each document, as many documents as there are up to PROMPTS.
    """
    rows, documents = [], []
    for shard in corpus.shards:
        contexts = corpus.contexts(shard)
        inside = np.flatnonzero((contexts.splits == SPLITS.index("report")) & (contexts.lengths() >= PROMPT_TOKENS))
        first = {contexts.document_ids[i]: i for i in inside[::-1]}
        rows += [contexts.tokens[i, :PROMPT_TOKENS] for i in sorted(first.values())]
        documents += [contexts.document_ids[i] for i in sorted(first.values())]
    order = np.argsort(documents)[:PROMPTS]
    return np.array(rows, dtype=np.int32).reshape(-1, PROMPT_TOKENS)[order], np.arange(len(order))


def _rows(
    label: Label, tested: Mapping[Arm, tuple[TokenChange, list[int]]], document: np.ndarray, *, seed: int
) -> list[dict[str, Cell]]:
    measured: dict[Arm, Measured] = {
        arm: measure_mean("auroc", auroc_of_tokens(change.effects, tokens), document, seed=seed)
        for arm, (change, tokens) in tested.items()
    }
    counted: dict[str, Cell] = {"status": "scored", "documents": len(document), "positives": len(tested["own"][1])}
    rows = [_row(label, arm) | counted | found.cells | {"note": _gained(*tested[arm])} for arm, found in measured.items()]
    if "shuffled" in measured:
        rows[0] |= lift_cells(measured["own"], measured["shuffled"], documents=len(document))
    return rows


def _gained(change: TokenChange, tokens: Sequence[int]) -> str:
    gained = float(change.effects[:, list(tokens)].mean())
    return f"the claimed tokens' log-probability changes by {gained:+.3f}"


def _row(label: Label, arm: Arm) -> dict[str, Cell]:
    return {
        "feature": label.feature,
        "label_id": label.label_id,
        "method": label.method,
        "claim": "writes",
        "scorer": "steering",
        "arm": arm,
        "unit": "prompt",
    }


def _skipped(why: str) -> dict[str, Cell]:
    return {"status": "not_applicable", "note": why}
