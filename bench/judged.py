"""How good the search is, on queries judged by hand before it was tuned.

    .venv/bin/python -m bench.judged --store store --out bench/results/judged.json

nDCG@10 (gain 2^grade - 1, Burges et al., 2005) of the nearest features, whether or not they are called hits, for full-text,
dense and hybrid search, in all and by kind of query, with 95 % intervals of a bootstrap over queries; and which of the
queries that nothing answers are said to find nothing, beside which of the others are.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.machine import machine
from scopeatlas import open_atlas

QUERIES = Path(__file__).parent / "judged_queries.yaml"
WAYS = ("text", "label", "examples", "dense", "hybrid")
K, RESAMPLES, SEED = 10, 10_000, 20_261_121
NOTHING = "nothing"


def ndcg(found: list[str], grades: dict[str, int]) -> float:
    """nDCG@K of keys in order; a key without a grade is worth nothing."""
    discounts = 1 / np.log2(np.arange(2, K + 2))
    gains = [2 ** grades.get(key, 0) - 1 for key in found[:K]]
    ideal = sorted((2**grade - 1 for grade in grades.values()), reverse=True)[:K]
    return float(gains @ discounts[: len(gains)] / (ideal @ discounts[: len(ideal)]))


def with_interval(values: np.ndarray) -> dict[str, float]:
    """Mean of [queries] values and its 95 % interval."""
    draws = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return {"queries": len(values), "ndcg": float(values.mean()), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="store")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    atlas, judged = open_atlas(arguments.store), yaml.safe_load(QUERIES.read_text(encoding="utf-8"))
    saes, kinds = judged["saes"], [query["kind"] for query in judged["queries"]]
    answered = np.array([kind != NOTHING for kind in kinds])
    result: dict[str, Any] = {"machine": machine(), "rows": atlas.saes()["features"].sum(), "ways": {}, "queries": []}
    values, weak = {}, {}
    for way in WAYS:
        scores, said = [], []
        for query in judged["queries"]:
            grades = {f"{saes[sae]}/{f}": grade for sae, of in (query["accepted"] or {}).items() for f, grade in of.items()}
            found = atlas.search(query["query"], by=way, k=K)
            said.append(found.is_weak)
            scores.append(ndcg([hit.key for hit in found.nearest], grades) if grades else 0.0)
        values[way], weak[way] = np.array(scores), np.array(said)
        by_kind = {kind: with_interval(values[way][np.array(kinds) == kind]) for kind in dict.fromkeys(kinds) if kind != NOTHING}
        found_nothing = {
            "of_those_that_nothing_answers": int(weak[way][~answered].sum()),
            "of_the_others": int(weak[way][answered].sum()),
        }
        result["ways"][way] = {"all": with_interval(values[way][answered]), **by_kind, "said_to_find_nothing": found_nothing}
        print(
            f"{way:<9} nDCG@{K} "
            + "  ".join(
                f"{kind} {r['ndcg']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
                for kind, r in result["ways"][way].items()
                if "ndcg" in r
            )
        )
        print(
            f"{'':<9} said to find nothing: {found_nothing['of_those_that_nothing_answers']} of {int((~answered).sum())} that nothing answers, {found_nothing['of_the_others']} of {int(answered.sum())} others"
        )
    for better, other in (("hybrid", "dense"), ("hybrid", "text"), ("hybrid", "label")):
        gap = with_interval((values[better] - values[other])[answered])
        result[f"{better}_minus_{other}"] = gap
        print(f"{better} - {other}: {gap['ndcg']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
    result["queries"] = [
        {
            "query": query["query"],
            "kind": query["kind"],
            **{way: round(float(values[way][i]), 4) for way in WAYS},
            "weak": [way for way in WAYS if weak[way][i]],
        }
        for i, query in enumerate(judged["queries"])
    ]
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
