"""Contrast: which features differ between two sets of texts, and whether words or a linear probe tell them apart as well.

What belongs here: reading the texts, the order of the tests, and the answer. What does not: the test itself
(`permutation.py`), words (`keywords.py`), the classifiers (`probes.py`).

The unit is the document. What is compared is its mean activation per token: linear in what fires, so that it splits exactly
into what the words predict and what is left (`keywords.at_matched_vocabulary`), and not larger for a longer text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy.sparse import coo_array, csr_array

from scopeatlas.activations.probe import Text, TextActivations
from scopeatlas.activations.reading import SiteBatch
from scopeatlas.errors import ConfigError
from scopeatlas.study.keywords import at_matched_vocabulary, per_token, word_counts
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.permutation import PERMUTATIONS, Design, effects, max_t, worth_testing
from scopeatlas.study.probes import by_all, by_best, by_words, compared, folds, held_out, judged_by
from scopeatlas.study.texts import as_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA = 0.05
SHOWN = 20
FEATURES, BEST, WORDS, PROBE, LENGTH = "all features", "best feature", "words", "linear probe", "length"


@dataclass(frozen=True)
class Documents:
    """Texts as an SAE reads them, the documents of a contrast.

    readings: what fires in each. tokens: int64 [documents], those that count. values: float64 [documents, width], each
    feature's mean activation per token. site: float64 [documents, d], the mean over tokens of what the SAE reads.
    """

    texts: list[Text]
    readings: list[TextActivations]
    tokens: np.ndarray
    values: csr_array
    site: np.ndarray


@dataclass(frozen=True)
class Contrast:
    """What differs between two sets of documents, a and b.

    features: a row for each tested feature, the surest first, with the columns feature, key, label, status, trigger_tokens, f1; effect, low,
    high, mean_a, mean_b (mean activation per token), docs_a, docs_b (`permutation.effects`); z, p, p_adjusted
    (`permutation.max_t`); and, of those that differ at `alpha`, matched_effect, the part of `effect` that is left at equal
    words, and matched_p, its own p-value, corrected over them. words: the same of each word's share of the words.
    baselines: AUROC on held-out documents (by, auroc, low, high), of all features, the best one, and what stands beside
    them. gains: features against those (by, against, gain, low, high, beats). Both are empty for sets of fewer than five.
    fired: features that fire in any document. least_p: the smallest p-value that so many documents and permutations allow.
    """

    sae: str
    design: Design
    tokens: tuple[int, int]
    alpha: float
    permutations: int
    least_p: float
    fired: int
    features: pl.DataFrame
    words: pl.DataFrame
    baselines: pl.DataFrame
    gains: pl.DataFrame

    @property
    def significant(self) -> pl.DataFrame:
        """The features that differ, the chance of any false one among them being at most `alpha`."""
        return self.features.filter(pl.col("p_adjusted") <= self.alpha)

    @property
    def verdict(self) -> tuple[str, ...]:
        """What the numbers say, in sentences."""
        return (*_said_of_features(self), *_said_of_baselines(self))

    def to_polars(self) -> pl.DataFrame:
        """`features`."""
        return self.features

    def as_dict(self) -> dict[str, object]:
        """Everything as values that JSON has."""
        facts = {"sae": self.sae, "documents": [self.design.a, self.design.b], "tokens": list(self.tokens)}
        facts |= {"pairs": self.design.pairs, "alpha": self.alpha, "permutations": self.permutations, "least_p": self.least_p}
        facts |= {"fired": self.fired, "tested": self.features.height, "significant": self.significant.height}
        tables = {name: getattr(self, name).to_dicts() for name in ("baselines", "gains", "features", "words")}
        return facts | {"verdict": list(self.verdict)} | tables

    def plot(self, *, top: int = SHOWN) -> "Figure":
        """A forest plot: the surest features' effects with their intervals, what is left at equal words, the surest words, and
        how well each thing tells the sets apart."""
        from scopeatlas.plots.forest import forest

        return forest(self, top=top)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.contrast import contrast_html

        return contrast_html(self)


def contrast(
    opened: OpenSae,
    a: Sequence[Text],
    b: Sequence[Text],
    *,
    pairs: bool = False,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    alpha: float = ALPHA,
) -> Contrast:
    """Which features differ between the texts or conversations of `a` and those of `b`, and do they beat the baselines?

    Each text counts once, however long. p-values permute texts between the sets, or with `pairs` (a[i] belongs to b[i]) within
    the pairs, and are corrected over all features tested. They hold if nothing but the set tells the texts apart: texts
    by one author, or cut from one document, are not independent. Repeated words are not meaning: see matched_effect.
    permutations: how many at most; fewer if there are no more. alpha: the chance of any false report, in (0, 1).

    Raises ConfigError for fewer than two texts in a set, a text without tokens, or pairs of sets that differ in length.
    """
    if not 0 < alpha < 1 or permutations < 1 or seed < 0:
        raise ConfigError(
            f"a contrast takes an alpha between 0 and 1, at least one permutation and a seed of 0 or more, "
            f"not {alpha}, {permutations} and {seed}"
        )
    first, second = as_texts(a), as_texts(b)
    design = Design(len(first), len(second), pairs)
    documents = read_documents(opened, [*first, *second])
    return contrast_documents(opened, documents, design, permutations=permutations, seed=seed, alpha=alpha)


def read_documents(opened: OpenSae, texts: Sequence[Text]) -> Documents:
    """The texts through the subject model and the SAE, once. Raises ConfigError for a text without a token that counts."""
    sites = opened.dictionary.sites_in
    site = np.zeros((len(texts), opened.dictionary.d_in * len(sites)))

    def pool(batch: SiteBatch, text: np.ndarray) -> None:
        np.add.at(site, text, np.concatenate([batch.acts[one].double().cpu().numpy() for one in sites], axis=1))

    readings = opened.probe.activations(texts, seen=pool)
    tokens = np.array([sum(role != "template" for role in reading.roles) for reading in readings], dtype=np.int64)
    if not tokens.all():
        raise ConfigError(
            f"text {int(np.argmin(tokens)) + 1} of {len(texts)} (those of b after those of a) has no tokens; leave it out"
        )
    document = np.repeat(np.arange(len(texts)), [len(reading.feature) for reading in readings])
    feature = np.concatenate([reading.feature for reading in readings]).astype(np.int64)
    value = np.concatenate([reading.value for reading in readings]).astype(np.float64) / tokens[document]
    values = csr_array(coo_array((value, (document, feature)), shape=(len(texts), opened.dictionary.width)))
    return Documents(list(texts), readings, tokens, values, site / tokens[:, None])


def contrast_documents(
    opened: OpenSae, documents: Documents, design: Design, *, permutations: int, seed: int, alpha: float
) -> Contrast:
    """`contrast` of documents that were read before: the first design.a of them against the others."""
    chosen = worth_testing(documents.values, design, alpha)
    values = csr_array(documents.values[:, chosen])
    rows = opened.rows.select("feature", "key", "label", "status", "trigger_tokens", "f1")[chosen]
    found = _differences(values, rows, design, permutations, seed)
    different = found.filter(pl.col("p_adjusted") <= alpha)
    matched = _matched(documents, design, different, permutations, seed)
    features = found.join(matched, on="feature", how="left", maintain_order="left")
    named, counts = word_counts(documents.texts)
    common = worth_testing(counts, design, alpha)
    words = pl.DataFrame({"word": [named[number] for number in common]}, schema={"word": pl.String})
    baselines, gains = _baselines(documents, values, counts, design, seed)
    arrangements = min(permutations, design.others)
    return Contrast(
        sae=opened.key,
        design=design,
        tokens=(int(documents.tokens[: design.a].sum()), int(documents.tokens[design.a :].sum())),
        alpha=alpha,
        permutations=arrangements,
        least_p=max(design.smallest_p(design.units), 1 / (1 + arrangements)),
        fired=len(np.unique(documents.values.indices)),
        features=features,
        words=_differences(csr_array(per_token(counts)[:, common]), words, design, permutations, seed),
        baselines=baselines,
        gains=gains,
    )


def _differences(values: csr_array, names: pl.DataFrame, design: Design, permutations: int, seed: int) -> pl.DataFrame:
    """Every column of `values` [documents, F] with its name, effect and p-values, the surest first."""
    parts = [names, effects(values, design, seed=seed), max_t(values, design, permutations=permutations, seed=seed)]
    found = pl.concat(parts, how="horizontal")
    return found.sort(pl.col("p_adjusted"), -pl.col("z").abs(), maintain_order=True)


def _matched(documents: Documents, design: Design, different: pl.DataFrame, permutations: int, seed: int) -> pl.DataFrame:
    """Of the features that differ, what is left at equal words: feature, matched_effect (in the units of `effect`), matched_p."""
    left = at_matched_vocabulary(documents.readings, design, different["feature"].to_numpy().astype(np.int64))
    test = max_t(left, design, permutations=permutations, seed=seed)
    difference = left[: design.a].mean(axis=0) - left[design.a :].mean(axis=0)
    # effect is the whole difference over its standard deviation, so this is the rest over the same one
    per_unit = (different["effect"] / (different["mean_a"] - different["mean_b"])).to_numpy()
    columns = {"matched_effect": difference * per_unit, "matched_p": test["p_adjusted"].to_numpy()}
    return different.select("feature").with_columns(**{name: pl.Series(column) for name, column in columns.items()})


def _baselines(
    documents: Documents, values: csr_array, counts: csr_array, design: Design, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """How well features, and what stands beside them, tell the sets apart: `judged_by` and `compared`."""
    fold = folds(design, seed=seed)
    tried = {
        FEATURES: (values, by_all),
        BEST: (values, by_best),
        WORDS: (counts, by_words),
        PROBE: (csr_array(documents.site), by_all),
        LENGTH: (csr_array(documents.tokens[:, None].astype(np.float64)), by_best),
    }
    usable = {} if fold is None or not values.nnz else tried
    scores = {name: held_out(columns, design, fold, how) for name, (columns, how) in usable.items() if fold is not None}
    baselines, drawn = judged_by(scores, design, seed=seed)
    return baselines, compared(drawn, (FEATURES, BEST) if scores else ())


def _said_of_features(found: Contrast) -> list[str]:
    design, different = found.design, found.significant
    unit = "pairs" if design.pairs else "documents"
    many = f"{design.a} {unit}" if design.pairs else f"{design.a} against {design.b} {unit}"
    tested_of = f"{found.features.height:,} tested of {found.fired:,} that fire"
    said = [
        f"Features that differ: {different.height:,} ({tested_of}; {many}, {found.permutations:,} arrangements; the chance of any "
        f"false one is at most {found.alpha * 100:g} %)."
    ]
    if found.least_p > found.alpha:
        least = f"the smallest p-value that {many} with {found.permutations:,} arrangements allow is {found.least_p:.2g}"
        said.append(f"Nothing could have been reported: {least}; give more texts or permutations.")
    if different.height:
        left = different.filter(pl.col("matched_p") <= found.alpha).height
        said.append(
            f"Of them still differ at equal words: {left:,}; the others may do no more than read words that one set has more of."
        )
    words = found.words.filter(pl.col("p_adjusted") <= found.alpha).height
    said.append(f"Words that differ: {words:,} ({found.words.height:,} tested).")
    return said


def _said_of_baselines(found: Contrast) -> list[str]:
    """A sentence for all features and one for the best: what they beat and what they do not."""
    if found.baselines.is_empty():
        return ["No baseline was tried: that takes at least five documents in each set and one feature tested."]
    auroc = dict(zip(found.baselines["by"], found.baselines["auroc"], strict=True))
    said = []
    for name, do in ((FEATURES, "do"), (BEST, "does")):
        rows = found.gains.filter(pl.col("by") == name).to_dicts()
        better, not_better = ([_gain(row, auroc) for row in rows if row["beats"] is beats] for beats in (True, False))
        parts = [f"beat{'' if do == 'do' else 's'} {', '.join(better)}"] if better else []
        parts += [f"{do} not beat {', '.join(not_better)}"] if not_better else []
        said.append(f"{name.capitalize()} (held-out AUROC {auroc[name]:.2f}) {'; '.join(parts)}.")
    return said


def _gain(row: dict[str, object], auroc: dict[str, float]) -> str:
    against = str(row["against"])
    return f"{_NAMED[against]} ({auroc[against]:.2f}; gain {row['gain']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}])"


_NAMED = {WORDS: "the words", PROBE: "the linear probe", LENGTH: "the length of the texts"}
