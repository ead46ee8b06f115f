"""Do features write what their labels say? Steering and ablation of single features against equal norms elsewhere.

    .venv/bin/python -m bench.interventions --store store --out bench/results/interventions

Two groups of features, by a rule fixed before any effect was measured. *best read*: the 20 with a label, a claim on what they
write and the highest lower bound of F1. *any labelled*: 20 others of status ok, drawn with seed 0. The claimed tokens are those
that the atlas row promotes (`promoted`: decoder row through the unembedding; a label's "raises ..." names the same).

Steering (`mining/steering.py`): the decoder row, at the mean norm of the residual stream, is added at every token of the 24 prompts
that begin report documents. Beside it a random direction, and five other features of the sample, at the same norm.
Ablation: at the token of its highest activation in each of at most 8 report documents (their first 64 tokens), the feature is
taken away; the control takes away as much along another feature that is active at that very token.

Per feature: the mean change in log-probability of the claimed tokens as the next one, and how often they move further than another
token of the vocabulary (AUROC; 0.5 is chance), averaged over prompts or documents. Intervals: bootstrap over features. A feature is
*moved* if the 95 % interval of own less control (other features; the other active feature), over its prompts or documents, lies
above 0 (below 0 for ablation). A random direction as long as the stream lies far from anything that the model writes there and
shatters the prediction, so its change in log-probability says little, and its AUROC more.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from bench.machine import machine
from bench.standins import subject_model
from scopeatlas import open_atlas
from scopeatlas.activations.reading import read_batches
from scopeatlas.corpus.build import Corpus, open_corpus
from scopeatlas.corpus.contexts import Contexts, join_contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.hypotheses.metrics import interval, unit_weights
from scopeatlas.mining.steering import auroc_of_tokens, random_direction_changes, token_changes
from scopeatlas.scoring.writes import report_prompts
from scopeatlas.study.edits import Edit, Editor, decoder_rows, edits_of
from scopeatlas.study.intervene import intervene
from scopeatlas.study.opening import OpenSae
from scopeatlas.subject.capture import next_token_logits

GROUP, OTHERS, FIRINGS, WINDOW = 20, 5, 8, 64
EXAMPLES, EXAMPLE_TOKENS, EXAMPLE_STRENGTH = 3, 20, 0.5
EXAMPLE_PROMPT = "I have thought about it for a long time, and"

Values = Mapping[str, np.ndarray]
"""By name, a number for each prompt or document."""


def chosen(opened: OpenSae) -> dict[str, list[int]]:
    """The two groups. Features whose promoted tokens are no single tokens are passed over."""
    named = opened.rows.filter((pl.col("status") == "ok") & (pl.col("promoted").list.len() > 0))
    named = named.filter(pl.Series([len(claimed(opened, feature)) > 0 for feature in named["feature"]], dtype=pl.Boolean))
    claiming = named.filter(pl.col("writes") != "").sort("f1_low", "feature", descending=[True, False], nulls_last=True)
    best = claiming["feature"].head(GROUP).to_list()
    others = named.filter(~pl.col("feature").is_in(best))["feature"].to_list()
    drawn = np.random.default_rng(0).choice(others, GROUP, replace=False)
    return {"best read": best, "any labelled": [int(feature) for feature in drawn]}


def claimed(opened: OpenSae, feature: int) -> list[int]:
    """The ids of a feature's promoted tokens."""
    tokenizer = opened.subject.tokenizer
    spelled = [tokenizer.encode(text, add_special_tokens=False) for text in opened.rows["promoted"][feature]]
    return list(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1))


def steered(opened: OpenSae, corpus: Corpus, features: Sequence[int]) -> dict[int, Values]:
    """Per feature, by prompt: what its own direction, a random one and those of OTHERS other features do to its tokens."""
    prompts, _ = report_prompts(corpus)
    dictionary, tokens = opened.probe.dictionary, {feature: claimed(opened, feature) for feature in features}
    order = np.random.default_rng(1).permutation(features).tolist()
    judged = {f: [order[(i - step) % len(order)] for step in range(1, OTHERS + 1)] for i, f in enumerate(order)}
    found: dict[int, dict[str, list[np.ndarray]]] = {feature: {} for feature in features}

    def add(feature: int, arm: str, effects: np.ndarray) -> None:
        found[feature].setdefault(f"{arm} log p", []).append(effects[:, tokens[feature]].mean(axis=1))
        found[feature].setdefault(f"{arm} AUROC", []).append(auroc_of_tokens(effects, tokens[feature]))

    for change in token_changes(dictionary, opened.subject, prompts, features):
        add(change.feature, "own", change.effects)
        for other in judged[change.feature]:
            add(other, "other features", change.effects)
    for change in random_direction_changes(dictionary, opened.subject, prompts, features):
        add(change.feature, "random direction", change.effects)
    return {feature: {name: np.mean(parts, axis=0) for name, parts in arms.items()} for feature, arms in found.items()}


def ablated(opened: OpenSae, corpus: Corpus, features: Sequence[int]) -> dict[int, Values]:
    """Per feature, by document: what taking it away does to its tokens where it fires, and another active one instead."""
    contexts = report_contexts(corpus)
    rng, found = np.random.default_rng(2), {}
    for feature, firings in firing_places(opened, contexts, features).items():
        rows = list(ablations(opened, contexts, feature, firings, rng))
        if rows:
            found[feature] = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return found


def ablations(
    opened: OpenSae, contexts: Contexts, feature: int, firings: pl.DataFrame, rng: np.random.Generator
) -> Iterator[dict[str, float]]:
    dictionary, model, tokens = opened.probe.dictionary, opened.subject.model, claimed(opened, feature)
    own = decoder_rows(dictionary, feature)
    for row, column, beside in firings.select("row", "column", "beside").iter_rows():
        ids = torch.from_numpy(contexts.tokens[row, : column + 1]).long()
        other = decoder_rows(dictionary, int(rng.choice(beside)))
        there = np.arange(column + 1) == column
        editors = {
            "own": Editor(dictionary, model, [Edit(feature)]),
            "active feature": Editor(dictionary, model, [Edit(feature)], rows={feature: other * (own.norm() / other.norm())}),
        }
        with torch.no_grad():
            clean = next_token_logits(model, ids).log_softmax(0)
            measured = {}
            for arm, editor in editors.items():
                with editor.over(there):
                    effect = (next_token_logits(model, ids).log_softmax(0) - clean).cpu().numpy()[None]
                measured[f"{arm} log p"] = float(effect[0, tokens].mean())
                measured[f"{arm} AUROC"] = float(auroc_of_tokens(-effect, tokens)[0])
        yield measured


def report_contexts(corpus: Corpus) -> Contexts:
    """The first context of each report document, its first WINDOW tokens."""
    every = join_contexts([corpus.contexts(shard) for shard in corpus.shards])
    report = np.flatnonzero(every.splits == SPLITS.index("report"))
    first = {every.document_ids[i]: i for i in report[::-1]}
    kept = every.take(np.array([first[document] for document in sorted(first)]))
    return Contexts(kept.ids, kept.document_ids, kept.splits, kept.tokens[:, :WINDOW])


def firing_places(opened: OpenSae, contexts: Contexts, features: Sequence[int]) -> dict[int, pl.DataFrame]:
    """Per feature, the token of its highest activation in each of the first FIRINGS documents that it fires in: row, column,
    and the other features that are active there."""
    dictionary, found = opened.probe.dictionary, []
    for batch in read_batches(contexts, opened.subject, set(dictionary.sites_in)):
        acts = dictionary.encode([batch.acts[site] for site in dictionary.sites_in])
        place = batch.positions[acts.token.cpu().numpy()]
        found.append(pl.DataFrame({"place": place, "feature": acts.feature.cpu().numpy(), "value": acts.value.cpu().numpy()}))
    firing = pl.concat(found).with_columns(row=pl.col("place") // WINDOW, column=pl.col("place") % WINDOW)
    active = dict(firing.group_by("place").agg(pl.col("feature")).iter_rows())
    by_feature = {}
    for feature in features:
        mine = firing.filter(pl.col("feature") == feature).sort("value", descending=True).unique("row", keep="first")
        mine = mine.sort("row").head(FIRINGS)
        beside = [sorted(set(active[place]) - {feature}) for place in mine["place"]]
        mine = mine.with_columns(pl.Series("beside", beside, dtype=pl.List(pl.Int64)))
        by_feature[feature] = mine.filter(pl.col("beside").list.len() > 0)
    return by_feature


def mean_of(values: np.ndarray) -> dict[str, float]:
    """The mean of values [n] and its 95 % interval from a bootstrap over them."""
    weights = unit_weights(np.arange(len(values)))
    means = values @ weights / weights.sum(axis=0)
    low, high = interval(means[None, 1:])[0]
    return {"mean": float(means[0]), "low": float(low), "high": float(high)}


def summary(found: Mapping[int, Values], *, control: str, raises: bool) -> dict[str, object]:
    """Means over features of every arm and of own less `control`, and the share of features that are moved."""
    names = list(next(iter(found.values())))
    arms = {name: mean_of(np.array([values[name].mean() for values in found.values()])) for name in names}
    gained = {f: values["own log p"] - values[f"{control} log p"] for f, values in found.items()}
    over = [mean_of(values) for values in gained.values() if len(values) > 2]
    moved = [part["low"] > 0 if raises else part["high"] < 0 for part in over]
    beyond = mean_of(np.array([values.mean() for values in gained.values()]))
    return {
        "features": len(found),
        "arms": arms,
        f"own less {control}, log p": beyond,
        "moved": sum(moved),
        "tested": len(moved),
    }


def of_each(opened: OpenSae, found: Mapping[int, Values]) -> list[dict[str, object]]:
    facts = [opened.rows.row(feature, named=True) for feature in found]
    return [
        {"feature": row["feature"], "label": row["label"], "promoted": row["promoted"], "n": len(next(iter(values.values())))}
        | {name: float(value.mean()) for name, value in values.items()}
        for row, values in zip(facts, found.values(), strict=True)
    ]


def examples(opened: OpenSae, features: Sequence[int]) -> list[dict[str, object]]:
    """What single features make of one prompt's continuation; for looking at, not for counting."""
    found = []
    for feature in features:
        row = opened.rows.row(feature, named=True)
        edits = edits_of(opened, steer={feature: EXAMPLE_STRENGTH})
        told = intervene(opened, EXAMPLE_PROMPT, edits=edits, tokens=EXAMPLE_TOKENS)
        facts = {name: row[name] for name in ("feature", "label", "promoted")}
        found.append(facts | {"prompt": EXAMPLE_PROMPT, "clean": told.clean.text, "steered": told.edited.text, "kl": told.kl})
        print(f"\n{feature} ({row['label']}), which promotes {row['promoted']}\n  clean   {told.clean.text!r}")
        print(f"  steered {told.edited.text!r}")
    return found


def print_group(name: str, measured: Mapping[str, dict]) -> None:
    for what, found in measured.items():
        moved = f"{found['moved']} of the {found['tested']} with at least 3 prompts or documents are moved"
        print(f"\n{name}, {what}: {found['features']} features; {moved}")
        gains = {key: part for key, part in found.items() if "less" in key}
        for arm, part in {**found["arms"], **gains}.items():
            print(f"  {arm:<38}{part['mean']:8.3f} [{part['low']:.3f}, {part['high']:.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="store")
    parser.add_argument("--sae", default="layer_12")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    opened = open_atlas(arguments.store, subject=subject_model()).open(arguments.sae)
    corpus = open_corpus(opened.store, opened.corpus)
    groups = chosen(opened)
    features = [feature for group in groups.values() for feature in group]
    steering, ablation = steered(opened, corpus, features), ablated(opened, corpus, features)
    result: dict[str, object] = {"machine": machine(), "sae": opened.key, "groups": groups}
    for name, group in {**groups, "both": features}.items():
        result[name] = {
            "steering": summary({f: steering[f] for f in group}, control="other features", raises=True),
            "ablation": summary({f: ablation[f] for f in group if f in ablation}, control="active feature", raises=False),
        }
        print_group(name, result[name])  # type: ignore[arg-type]
    result |= {"steering by feature": of_each(opened, steering), "ablation by feature": of_each(opened, ablation)}
    result["examples"] = examples(opened, groups["any labelled"][:EXAMPLES])
    result["seconds"] = time.perf_counter() - start
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
