"""Contrast on two real sets of texts with a known difference, on random halves of one set, and its cost at 16,384 features.

    .venv/bin/python -m bench.contrast --store store --out bench/results/contrast

Known difference: 60 questions against 60 statements of the same words in another order (`bench/contrast/`), real activations of
the demo's SAE; as two sets, as matched pairs, and as pairs in lower case without their last mark, so that no word differs.
None: a passage of each article of the Wikipedia sample that is long enough, encoded once and halved at random 200 times; at a
nominal 5 % anything is reported in at most 16 of 200 halvings. Cost: synthetic sparse values, no model.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, random_array

from bench.machine import machine
from bench.standins import subject_model
from scopeatlas import open_atlas
from scopeatlas.corpus.sources import Source, open_source
from scopeatlas.study.contrast import ALPHA, Contrast, contrast_documents, read_documents
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.permutation import PERMUTATIONS, Design, effects, max_t, worth_testing

TEXTS = Path(__file__).parent / "contrast"
HALVINGS, HALVING_PERMUTATIONS = 200, 1000
PASSAGE = slice(1000, 1400)
WIDTH, DENSITY = 16_384, 0.1
SHOWN = 5


def lines(name: str) -> list[str]:
    return (TEXTS / name).read_text(encoding="utf-8").splitlines()


def known_difference(opened: OpenSae) -> list[dict[str, object]]:
    """The three contrasts of questions and statements."""
    texts = [*lines("questions.txt"), *lines("statements.txt")]
    marked, bare = read_documents(opened, texts), read_documents(opened, [text[:-1].lower() for text in texts])
    rows = []
    for name, documents, pairs in (
        ("two sets", marked, False),
        ("matched pairs", marked, True),
        ("matched pairs in lower case without the last mark", bare, True),
    ):
        start = time.perf_counter()
        design = Design(len(texts) // 2, len(texts) // 2, pairs)
        found = contrast_documents(opened, documents, design, permutations=PERMUTATIONS, seed=0, alpha=ALPHA)
        rows.append({"texts": name} | summary(found) | {"seconds": time.perf_counter() - start})
    return rows


def summary(found: Contrast) -> dict[str, object]:
    """What a contrast says, without its thousands of rows."""
    columns = ("feature", "effect", "low", "high", "docs_a", "docs_b", "p_adjusted", "matched_effect", "matched_p", "label")
    facts = found.as_dict()
    kept = ("documents", "tokens", "pairs", "permutations", "fired", "tested", "significant", "baselines", "gains", "verdict")
    matched = int((found.significant["matched_p"] <= found.alpha).sum())
    words = found.words.filter(found.words["p_adjusted"] <= found.alpha)["word"].to_list()
    strongest = found.features.select(columns).head(SHOWN).to_dicts()
    return {name: facts[name] for name in kept} | {"left_at_equal_words": matched, "words": words, "strongest": strongest}


def halvings(opened: OpenSae) -> dict[str, object]:
    """Random halves of one set: in how many anything is reported, and the smallest corrected p-value of each."""
    texts = [document.text for document in open_source(Source("wikipedia-sample"))]
    passages = [text[PASSAGE] for text in texts if len(text) >= PASSAGE.stop]
    values = read_documents(opened, passages).values
    half = len(passages) // 2
    design, generator = Design(half, half), np.random.default_rng(0)
    smallest, sizes, start = [], [], time.perf_counter()
    for seed in range(HALVINGS):
        halved = csr_array(values[generator.permutation(len(passages))[: 2 * half]])
        chosen = worth_testing(halved, design, ALPHA)
        found = max_t(csr_array(halved[:, chosen]), design, permutations=HALVING_PERMUTATIONS, seed=seed)
        smallest.append(float(found["p_adjusted"].min()))  # pyright: ignore[reportArgumentType]
        sizes.append(len(chosen))
    reported = sum(p <= ALPHA for p in smallest)
    assert reported <= 16, f"{reported} of {HALVINGS} halvings report something"
    facts: dict[str, object] = {
        "texts": len(passages),
        "halvings": HALVINGS,
        "permutations": HALVING_PERMUTATIONS,
        "reported": reported,
    }
    seconds = {"seconds": time.perf_counter() - start}
    return facts | {"tested": [min(sizes), max(sizes)], "smallest_p": sorted(smallest)[:20]} | seconds


def cost() -> list[dict[str, object]]:
    """Seconds of the permutation test and of the intervals at WIDTH features, each other than zero in a tenth of the documents."""
    rows = []
    for a in (40, 200):
        generator, design = np.random.default_rng(0), Design(a, a)
        values = csr_array(
            random_array((2 * a, WIDTH), density=DENSITY, rng=generator, data_sampler=generator.standard_exponential)
        )
        start = time.perf_counter()
        chosen = csr_array(values[:, worth_testing(values, design, ALPHA)])
        max_t(chosen, design)
        tested_at = time.perf_counter()
        effects(chosen, design)
        seconds = {"seconds_test": tested_at - start, "seconds_intervals": time.perf_counter() - tested_at}
        counts = {
            "documents": [a, a],
            "features": WIDTH,
            "tested": int(chosen.sum(axis=0).shape[0]),
            "permutations": PERMUTATIONS,
        }
        rows.append(counts | seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="store", help="of the demo, published")
    parser.add_argument("--sae", default="layer_12_width_4k")
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    arguments = parser.parse_args()
    opened = open_atlas(arguments.store, subject=subject_model("cpu")).open(arguments.sae)
    result = {"machine": machine(), "sae": opened.key, "known_difference": known_difference(opened)}
    result |= {"halvings": halvings(opened), "cost": cost()}
    for row in result["known_difference"]:
        print(f"\n{row['texts']} ({row['seconds']:.1f} s once the texts are read)")
        print("\n".join(f"  {sentence}" for sentence in row["verdict"]))
    none = result["halvings"]
    print(f"\n{none['reported']} of {none['halvings']} random halvings of {none['texts']} passages report anything at 5 %")
    for row in result["cost"]:
        print(
            f"{row['documents'][0]} + {row['documents'][1]} documents, {row['features']:,} features ({row['tested']:,} tested), ",
            end="",
        )
        print(f"{row['permutations']:,} permutations: {row['seconds_test']:.1f} s; intervals {row['seconds_intervals']:.1f} s")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
