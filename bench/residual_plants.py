"""Planted in a real residual stream: an SAE whose features are linear probes for known concepts, through the whole chain.

    .venv/bin/python -m bench.residual_plants    # about two minutes

What belongs here: fitting the probes, writing them as a release, and holding what the chain says of them against what
they are. What does not: marking and agreement (`plants.py`), planting without a model (`planted.py`).

Gemma 3 270M reads 25,000 tokens of the Wikipedia sample. Logistic probes of its residual stream after layer 12 are fitted
on explain documents, and fire above the value of best F1 on select documents; report documents have no say. Each is one
feature (encoder column and decoder row its direction), beside random directions that fire as often. The fidelity gate, which
an SAE that reconstructs nothing could not pass, is not part of the chain.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from bench.planted import MODEL, NUMBERS, digits, ends_in
from bench.plants import Agreement, Concept, agreement, among, claimed, marked, word
from scopeatlas.activations.cache import cache_activations
from scopeatlas.corpus.build import Corpus, CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Units, read_firings
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.scoring.table import published
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import Site
from tests.conftest import entry_of, write_sae

SITE = Site(12, "", "output")
SETTINGS = CorpusSettings("residual-plants", Source("wikipedia-sample"), Sampling(shard_bits=2), ContextRules(128, 2))
RANDOM_DIRECTIONS, CHANCE = 12, "a random direction"
WEIGHT_DECAY = 1e-3
FIT_STEPS = 60
MIN_NAMED, MAX_CHANCE = 8, 1
NAMED_PRECISION, NAMED_RECALL = 0.8, 0.5
"""A rule names a concept if what it matches on report documents is the concept and half of the concept is matched."""
MONTHS = "january february march april may june july august september october november december".split()
TO_BE = "is was are were be been being".split()


def capitalised(texts: Sequence[str]) -> list[bool]:
    return [text.strip()[:1].isupper() for text in texts]


def after(preceding: str) -> Concept:
    return lambda texts: [word(text) == preceding for text in ["", *texts[:-1]]]


def in_parentheses(texts: Sequence[str]) -> list[bool]:
    """Between an opening and its closing token, neither included; what a context opens is closed by its end at the latest."""
    out, depth = [], 0
    for text in texts:
        depth = max(0, depth - text.count(")"))
        out.append(depth > 0)
        depth += text.count("(")
    return out


def plurals(texts: Sequence[str]) -> list[bool]:
    """Words of four letters or more that end in -s but not in -ss, as far as that tells plurals."""
    words = [word(text) for text in texts]
    return [w.isalpha() and len(w) >= 4 and w.endswith("s") and not w.endswith("ss") for w in words]


def year_digits(texts: Sequence[str]) -> list[bool]:
    """The digits of numbers from 1000 to 2999 (Gemma's tokenizer gives each digit a token of its own)."""
    bare = [text.strip() if text.strip().isdigit() and len(text.strip()) == 1 else " " for text in texts]
    out, start = [False] * len(bare), 0
    for place in range(len(bare) + 1):
        if place == len(bare) or bare[place] == " ":
            if place - start == 4 and bare[start] in "12":
                out[start:place] = [True] * 4
            start = place + 1
    return out


CONCEPTS: Mapping[str, Concept] = {
    "digits": digits,
    "digits of a year": year_digits,
    "capitalised": capitalised,
    'after "of"': after("of"),
    "in parentheses": in_parentheses,
    '"the"': among({"the"}),
    "comma": among({","}),
    "after a comma": after(","),
    "plurals in -s": plurals,
    "words in -ing": ends_in("ing"),
    'forms of "to be"': among(TO_BE),
    "months": among(MONTHS),
    "number words": among(NUMBERS),
}


@dataclass(frozen=True)
class Readers:
    """Linear readers of the residual stream that fire where x @ weight + bias exceeds 1: weight [d, n], bias [n]."""

    weight: torch.Tensor
    bias: torch.Tensor


def residuals(units: Units, corpus: Corpus, subject: SubjectModel) -> torch.Tensor:
    """The residual stream at SITE, as `Units` numbers positions: float32 [N, d]; NaN in report documents, which are not read."""
    tokens = torch.from_numpy(np.concatenate([corpus.contexts(shard).tokens for shard in corpus.shards])).long()
    out = torch.full((*tokens.shape, subject.d_model), torch.nan)
    read = np.flatnonzero(units.context_split != SPLITS.index("report"))
    for rows in batches(read, 16):
        out[read[rows]] = capture(subject.model, tokens[read[rows]], [SITE])[SITE].float()
    return out.flatten(0, 1)


def logistic(x_td: torch.Tensor, meant_tn: torch.Tensor) -> torch.Tensor:
    """Weights [d + 1, n] (the last row the bias) of n logistic regressions with weight decay, by LBFGS."""
    weights = torch.zeros(x_td.shape[1] + 1, meant_tn.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=FIT_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        scores = torch.addmm(weights[-1], x_td, weights[:-1])
        value = torch.nn.functional.binary_cross_entropy_with_logits(scores, meant_tn, reduction="none").mean(0).sum()
        value = value + WEIGHT_DECAY * weights[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weights.detach()


def best_cut(scores: np.ndarray, meant: np.ndarray) -> float:
    """The value above which calling a token meant has the highest F1. scores, meant: [tokens]."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(meant[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + meant.sum())
    best = int(np.argmax(f1))
    return float(scores[order[best : best + 2]].mean())


def fit_readers(units: Units, x_nd: torch.Tensor, meant: np.ndarray, *, seed: int) -> Readers:
    """A probe for each concept, then RANDOM_DIRECTIONS random ones that fire as often on select documents.

    Directions are scaled so that what they read has a standard deviation of 1.
    """
    explain, select = (np.flatnonzero(units.in_split(split)) for split in ("explain", "select"))
    norms = x_nd[explain].norm(dim=1)
    fitted = explain[(norms < 3 * norms.median()).numpy()]  # a few tokens' residuals are 13 times as long as the others'
    mean, scale = x_nd[fitted].mean(0), x_nd[fitted].std(0)
    targets = torch.from_numpy(meant[:, fitted].T).float()
    probes = logistic((x_nd[fitted] - mean) / scale, targets)[:-1] / scale[:, None]
    generator = torch.Generator().manual_seed(seed)
    chance = torch.randn(len(mean), RANDOM_DIRECTIONS, generator=generator) / scale[:, None]
    weight = torch.cat([probes, chance], dim=1)
    weight = weight / ((x_nd[fitted] - mean) @ weight).std(0)
    scores = ((x_nd[select] - mean) @ weight).numpy()
    cuts = [best_cut(scores[:, n], holds[select]) for n, holds in enumerate(meant)]
    densities = [float((scores[:, n] > cut).mean()) for n, cut in enumerate(cuts)]
    cuts += [float(np.quantile(scores[:, len(meant) + n], 1 - densities[n % len(meant)])) for n in range(RANDOM_DIRECTIONS)]
    return Readers(weight, 1 - torch.tensor(cuts) - mean @ weight)


def write_release(folder: Path, readers: Readers) -> SaeEntry:
    """The readers as an SAE in Gemma Scope 2's layout."""
    tensors = {
        "w_enc": readers.weight.contiguous(),
        "b_enc": readers.bias,
        "threshold": torch.ones_like(readers.bias),
        "w_dec": torch.nn.functional.normalize(readers.weight.T, dim=1).contiguous(),
        "b_dec": torch.zeros(len(readers.weight)),
    }
    hooks = {"hf_hook_point_in": str(SITE), "hf_hook_point_out": str(SITE)}
    return entry_of(write_sae(folder, tensors, l0=1, **hooks))


@dataclass(frozen=True)
class Found:
    """What the chain says of one feature. probe: its firings against the concept on report documents, the ceiling of what a
    label of it can say. rule: None if refused with `status`. against: the rule and the concept. scores: its published row."""

    name: str
    status: str
    probe: Agreement
    rule: Rule | None
    against: Agreement
    scores: Mapping[str, object]

    @property
    def names_it(self) -> bool:
        return self.against.precision >= NAMED_PRECISION and self.against.recall >= NAMED_RECALL


def through_the_chain(folder: Path, subject: SubjectModel, *, seed: int) -> list[Found]:
    """Corpus, probes, release, activations, examples, labels and scores; what came of each feature, random ones last."""
    store = Store(folder / "store")
    corpus = build_corpus(store, SETTINGS, subject)[0]
    units = Units(corpus, subject)
    meant = marked(units, list(CONCEPTS.values()))
    entry = write_release(folder / "release", fit_readers(units, residuals(units, corpus, subject), meant, seed=seed))
    cached = cache_activations(store, corpus, [entry], subject)
    assert not cached.failed, cached.failed
    mine_examples(store, corpus, entry, subject)
    labels = label_features(store, corpus, entry, subject, settings=LabelSettings())[0]
    scores = score_labels(store, corpus, entry, subject, labels=LabelSettings(), settings=ScoreSettings())[0]
    firings = read_firings(store, corpus, entry, subject, units, width=len(CONCEPTS) + RANDOM_DIRECTIONS)
    shown = {row["feature"]: row for row in published(scores.table, labels.table).iter_rows(named=True)}
    ruled = labels.table.filter(pl.col("method") == "rule").sort("feature")
    rules = {row["feature"]: Rule.from_json(row["rule"]) for row in ruled.iter_rows(named=True) if row["status"] == "ok"}
    claims = claimed(units, {feature: rule for feature, rule in rules.items() if feature < len(meant)})
    fires = np.zeros_like(meant)
    planted = firings.feature < len(meant)
    fires[firings.feature[planted], firings.position[planted]] = True
    inside, none = units.in_split("report"), Agreement(0, 0)
    against = {feature: agreement(claim, meant[feature] & inside) for feature, claim in claims.items()}
    probes = [agreement(*pair) for pair in zip(fires & inside, meant & inside, strict=True)]
    names, probes = [*CONCEPTS, *[CHANCE] * RANDOM_DIRECTIONS], [*probes, *[none] * RANDOM_DIRECTIONS]
    return [
        Found(names[f], status, probes[f], rules.get(f), against.get(f, none), shown.get(f, {}))
        for f, status in ruled.select("feature", "status").iter_rows()
    ]


def report(found: Sequence[Found]) -> bool:
    """The table, and what it comes to; whether the bars are met."""
    print("| planted | probe F1 | label | names it | rule F1 against the concept | held-out F1 | balanced accuracy | shuffled |")
    print("|---|---|---|---|---|---|---|---|")
    for f in found:
        ceiling = f"{f.probe.f1:.2f}" if f.name in CONCEPTS else ""
        if f.rule is None:
            print(f"| {f.name} | {ceiling} | refused: {f.status} | | | | | |")
            continue
        s = f.scores
        accuracy = f"{s['balanced_accuracy']:.3f} [{s['balanced_accuracy_low']:.3f}, {s['balanced_accuracy_high']:.3f}]"
        f1 = f"{s['f1']:.2f} [{s['f1_low']:.2f}, {s['f1_high']:.2f}]"
        named = ("yes" if f.names_it else "no", f"{f.against.f1:.2f}") if f.name in CONCEPTS else ("", "")
        print(
            f"| {f.name} | {ceiling} | {f.rule.kind}: {f.rule.short()} | {named[0]} | {named[1]} | {f1} | {accuracy} "
            f"| {s['shuffled_balanced_accuracy']:.3f} |"
        )
    concepts = [f for f in found if f.name in CONCEPTS]
    chance = [f for f in found if f.name not in CONCEPTS]
    refused = sum(f.rule is None for f in concepts)
    named_all, labelled = sum(f.names_it for f in concepts), sum(f.rule is not None for f in chance)
    print(f"\n{named_all} of {len(concepts)} planted concepts named, {refused} refused; the bar is {MIN_NAMED} named.")
    print(f"{labelled} of {len(chance)} random directions labelled; the bar is at most {MAX_CHANCE}.")
    return named_all >= MIN_NAMED and labelled <= MAX_CHANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the random directions")
    arguments = parser.parse_args()
    subject = SubjectModel(MODEL, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        return 0 if report(through_the_chain(Path(folder), subject, seed=arguments.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
