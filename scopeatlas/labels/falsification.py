"""Falsification: what labels predict, run through the subject model and the SAE, and the labels whose predictions fail.

What belongs here: running predicted sentences and edited text, and the verdict. What does not: making the edits
(`edits.py`), or how well a label describes text as it comes (`scoring/`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import polars as pl
from scipy import stats

from scopeatlas.activations.probe import Probe
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import Windows, require
from scopeatlas.labels.edits import Edit, Passage, edit_requests, read_edits, rule_edits

__all__ = ["Edit", "Falsification", "Passage", "edit_requests", "falsify", "read_edits"]

MIN_TEXTS = 3
"""With fewer texts on which the feature should fire, a label counts as untested; with fewer on which it should be silent,
they are no measure of how often it fires anyway: of 2 and 2, no outcome is significant."""
MIN_FIRED = 0.5
MIN_MARGIN = 0.25
"""By how much the share of positives that fire has to exceed that of negatives; of too few, chance stands in for it."""
LEVEL = 0.05
"""Of each test: how often chance alone may make a right label fail, or a wrong one hold."""
MIN_CHANCE_TEXTS = 10
"""With fewer positives of other features, chance is unknown."""
TEXTS_AT_A_TIME = 512

Verdict = Literal["held", "failed", "untested"]

TESTS = {
    "label_id": pl.String,
    "feature": pl.UInt32,
    "origin": pl.String,
    "text": pl.String,
    "place": pl.Int32,
    "expected": pl.Boolean,
    "fired": pl.Boolean,
    "peak": pl.Float32,
    "document_id": pl.String,
    "passed": pl.Boolean,
}
VERDICTS = {
    "label_id": pl.String,
    "feature": pl.UInt32,
    "verdict": pl.String,
    "positives": pl.Int32,
    "positives_fired": pl.Int32,
    "negatives": pl.Int32,
    "negatives_fired": pl.Int32,
    "chance": pl.Float32,
}


@dataclass(frozen=True)
class Falsification:
    """What became of each prediction, and of each label.

    table: TESTS, one row per text: origin is "predicted" (the label's own sentence) or "edit" (of a select document);
    place: the character from which on it mattered whether the feature fired; peak: its highest activation there, 0 if
    silent. verdicts: VERDICTS, one row per ok label; chance: the share of other features' positives on which this feature
    fires, null if there are too few. demoted: the ids of labels that failed.
    """

    table: pl.DataFrame
    verdicts: pl.DataFrame

    @property
    def demoted(self) -> frozenset[str]:
        return frozenset(self.verdicts.filter(pl.col("verdict") == "failed")["label_id"])


@dataclass(frozen=True)
class _Case:
    """One text put to the test for label number `label`."""

    label: int
    origin: Literal["predicted", "edit"]
    edit: Edit


def falsify(
    labels: Sequence[Label],
    select: Windows[Literal["select"]],
    probe: Probe,
    *,
    edits: Mapping[str, Sequence[Edit]],
) -> Falsification:
    """Put what the ok ones of `labels` predict to the test.

    A label predicts by its sentences, by the edits that its rule makes of select windows, and by those of `edits` (label id
    -> what `read_edits` gave). An edit that should silence the feature counts only if the text it was made from fires, read
    by itself, and one that should make it fire only if that is silent.

    A label fails if its texts rule out, at LEVEL each, that MIN_FIRED of its positives fire (one-sided bound of Clopper and
    Pearson, 1934), or that they fire more often, by MIN_MARGIN, than its negatives (the exact unconditional test of Chan,
    1998). It holds if MIN_FIRED of the positives did fire, and significantly more often than negatives did (Fisher's exact
    test). All else is untested, as are fewer than MIN_TEXTS positives: too few texts to tell. By the bound a label fails if
    none of six positives fires, or one of ten.

    Where there are fewer than MIN_TEXTS negatives, chance takes their place: how often the feature fires on the positives of
    other features, of labels tested in the same way (by a rule or in words). It is no bar where there are negatives, since a
    feature of a common word fires in most sentences.

    Raises LeakError for windows of another split. Cost: one pass over all texts, however many labels share it.
    """
    require(select, "select")
    tested = [label for label in labels if label.status == "ok"]
    cases = list(_cases(tested, select, edits))
    passages = {p: i for i, p in enumerate(dict.fromkeys(p for c in cases for p in (c.edit.edited, c.edit.original) if p))}
    peaks = _peaks(list(passages), probe, sorted({label.feature for label in tested}))
    owner = [tested[case.label].feature for case in cases]
    edited, original = (
        _peaks_of([passages[p] if p else -1 for p in column], owner, peaks)
        for column in ([c.edit.edited for c in cases], [c.edit.original for c in cases])
    )
    counts = [c.edit.original is None or bool(was > 0) != c.edit.expected for c, was in zip(cases, original, strict=True)]
    rows = [_row(tested[c.label], c, float(p)) for c, p, kept in zip(cases, edited, counts, strict=True) if kept]
    table = pl.DataFrame(rows, schema=TESTS, orient="row")
    positives = [(tested[c.label], passages[c.edit.edited]) for c in cases if c.edit.expected]
    return Falsification(table, _verdicts(tested, table, _chances(tested, positives, peaks)))


def _cases(labels: Sequence[Label], select: Windows, edits: Mapping[str, Sequence[Edit]]) -> Iterator[_Case]:
    own = dict(select.table.partition_by("feature", as_dict=True).items())
    # Whatever the order of features, the first rows of this are windows of many of them.
    mixed = select.table.select("feature", "document_id", "texts").sort(pl.int_range(pl.len()).over("feature"), "feature")
    for number, label in enumerate(labels):
        sentences = [(text, True) for text in label.predicted_positive] + [(text, False) for text in label.predicted_negative]
        for text, expected in sentences:
            yield _Case(number, "predicted", Edit(Passage(text), expected, ""))
        if label.rule and (label.feature,) in own:
            rule = Rule.from_json(label.rule)
            for edit in rule_edits(rule, own[label.feature,], mixed):
                yield _Case(number, "edit", edit)
        for edit in edits.get(label.label_id, ()):
            yield _Case(number, "edit", edit)


def _peaks(passages: Sequence[Passage], probe: Probe, features: Sequence[int]) -> pl.DataFrame:
    """The highest activation of each feature where it matters in each passage, if it fires: passage, feature, peak."""
    by_text: dict[str, list[int]] = {}
    for number, passage in enumerate(passages):
        by_text.setdefault(passage.text, []).append(number)
    parts = [pl.DataFrame(schema={"passage": pl.Int64, "feature": pl.UInt32, "peak": pl.Float32})]
    every = list(by_text)
    for start in range(0, len(every), TEXTS_AT_A_TIME):
        texts = every[start : start + TEXTS_AT_A_TIME]
        for text, found in zip(texts, probe.activations(texts, features=features), strict=True):
            # Counted from the end, because some tokenizers put a space in front.
            after = np.cumsum([len(token) for token in reversed(found.tokens)])[::-1] - [len(token) for token in found.tokens]
            for number in by_text[text]:
                matters = (after < len(text) - passages[number].place)[found.position] if found.tokens else slice(0)
                columns = {"feature": found.feature[matters], "peak": found.value[matters]}
                parts.append(pl.DataFrame(columns).select(pl.lit(number, dtype=pl.Int64).alias("passage"), "feature", "peak"))
    return pl.concat(parts).group_by("passage", "feature").agg(pl.col("peak").max())


def _peaks_of(passages: Sequence[int], features: Sequence[int], peaks: pl.DataFrame) -> np.ndarray:
    """The peak of `features[i]` in `passages[i]` (-1: none), 0 if it is silent: float32 [n]."""
    asked = pl.DataFrame({"passage": passages, "feature": features}, schema={"passage": pl.Int64, "feature": pl.UInt32})
    return asked.join(peaks, on=["passage", "feature"], how="left", maintain_order="left")["peak"].fill_null(0.0).to_numpy()


def _chances(labels: Sequence[Label], positives: Iterable[tuple[Label, int]], peaks: pl.DataFrame) -> dict[str, float | None]:
    """Label id -> the share of other features' positives on which its feature fires, of labels tested in the same way."""
    rows = [(bool(label.rule), label.feature, passage) for label, passage in positives]
    schema = {"by_rule": pl.Boolean, "owner": pl.UInt32, "passage": pl.Int64}
    texts = pl.DataFrame(rows, schema=schema, orient="row")
    total = dict(texts.group_by("by_rule").len().iter_rows())
    own = {(by_rule, owner): n for by_rule, owner, n in texts.group_by("by_rule", "owner").len().iter_rows()}
    strange = texts.join(peaks, on="passage").filter(pl.col("feature") != pl.col("owner"))
    fired = {(by_rule, feature): n for by_rule, feature, n in strange.group_by("by_rule", "feature").len().iter_rows()}
    chances: dict[str, float | None] = {}
    for label in labels:
        key = bool(label.rule), label.feature
        others = total.get(key[0], 0) - own.get(key, 0)
        chances[label.label_id] = fired.get(key, 0) / others if others >= MIN_CHANCE_TEXTS else None
    return chances


def _row(label: Label, case: _Case, peak: float) -> tuple[object, ...]:
    edit, fired = case.edit, peak > 0
    where = edit.edited.text, edit.edited.place
    return (
        label.label_id,
        label.feature,
        case.origin,
        *where,
        edit.expected,
        fired,
        peak,
        edit.document_id,
        fired == edit.expected,
    )


def _verdicts(labels: Sequence[Label], table: pl.DataFrame, chances: Mapping[str, float | None]) -> pl.DataFrame:
    counted = table.group_by("label_id", "expected").agg(n=pl.len(), fired=pl.col("fired").sum())
    counts = {(label_id, expected): (n, fired) for label_id, expected, n, fired in counted.iter_rows()}
    rows = []
    for label in labels:
        positive, negative = (counts.get((label.label_id, expected), (0, 0)) for expected in (True, False))
        chance = chances[label.label_id]
        rows.append((label.label_id, label.feature, _verdict(*positive, *negative, chance), *positive, *negative, chance))
    return pl.DataFrame(rows, schema=VERDICTS, orient="row")


def _verdict(positives: int, positives_fired: int, negatives: int, negatives_fired: int, chance: float | None) -> Verdict:
    if positives < MIN_TEXTS:
        return "untested"
    most = _upper_bound(positives_fired, positives)
    if negatives >= MIN_TEXTS:
        failed = _p_of_less(positives_fired, positives, negatives_fired, negatives) <= LEVEL
        table = [[positives_fired, positives - positives_fired], [negatives_fired, negatives - negatives_fired]]
        p_more = float(stats.fisher_exact(table, alternative="greater")[1])  # pyright: ignore[reportArgumentType]
    else:
        failed = chance is not None and most < min(chance + MIN_MARGIN, 1.0)
        p_more = 1.0 if chance is None else float(stats.binom.sf(positives_fired - 1, positives, chance))
    if failed or most < MIN_FIRED:
        return "failed"
    return "held" if positives_fired >= MIN_FIRED * positives and p_more <= LEVEL + _ROUNDING else "untested"


_ROUNDING = 1e-9
"""Of three texts each, the best outcome is significant at LEVEL exactly."""


def _upper_bound(fired: int, texts: int) -> float:
    """The one-sided bound of Clopper and Pearson (1934): the highest share of which so few are likely at LEVEL."""
    return 1.0 if fired == texts else float(stats.beta.ppf(1 - LEVEL, fired + 1, texts - fired))


@cache
def _p_of_less(positives_fired: int, positives: int, negatives_fired: int, negatives: int) -> float:
    """How likely at most a difference between the two shares is no higher than the one found, where the true one is
    MIN_MARGIN: the highest probability over the share of negatives that fire (Chan, Statistics in Medicine, 1998)."""
    share = np.linspace(0, 1 - MIN_MARGIN, 151)
    of_negatives = stats.binom.pmf(np.arange(negatives + 1)[:, None], negatives, share)
    of_positives = stats.binom.pmf(np.arange(positives + 1)[:, None], positives, share + MIN_MARGIN)
    # Differences times both counts are integers, so that equal ones are equal.
    difference = np.arange(positives + 1)[:, None] * negatives - np.arange(negatives + 1) * positives
    lower = (difference <= positives_fired * negatives - negatives_fired * positives).astype(np.float64)
    return float(np.einsum("ps,pn,ns->s", of_positives, lower, of_negatives).max())
