"""Where the best that a search finds stops meaning anything, on the demo's atlas.

    .venv/bin/python -m bench.cutoff --store store

For queries about what the Wikipedia sample's articles are about, and queries about what none of them is, some of them
mistyped or no words at all: the values that CUTOFFS are about. Then what other bars would do for a label without a word in
common and for examples: the share of absent queries for which something is found, and of present ones for which nothing is.
CUTOFFS are the bars that cost the fewest present ones among those that let through one absent query in 20 at most. None of
these queries is among the judged ones (`bench/judged.py`).
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from scopeatlas import open_atlas
from scopeatlas.atlas.ranking import CUTOFFS, WITH_WORD

PRESENT = (
    "wars, armies and battles", "months of the year", "dates in history", "plants and animals", "political parties and elections",
    "film and actors", "mathematics and algorithms", "languages and grammar", "spaceflight", "Greek gods", "religion",
    "numbers and counting", "cities and countries", "law and courts", "medicine and disease", "the word and", "commas",
    "He was elected president of the United States in 1860.", "The acid reacts with the base to form a salt.",
    "The rocket was launched toward the Moon with three astronauts.", "She won the award for best actress.",
    "The species lives in the forests of South America.", "The island lies in the Caribbean Sea.",
    "chemical compounds", "kings and queens", "physics and energy", "birds, fish and insects", "poems and novels",
    "computers and programming", "football and other sports", "the human brain", "economics and trade", "names of people",
    "prepositions such as of and in", "quotation marks", "years", "philosophers", "oceans and rivers",
    "The king died and his son took the throne.", "Prices rose because the central bank printed money.",
    "The function returns a list of numbers.", "The painting hangs in a museum in Paris.",
    "Scientists measured the temperature of the star.",
)  # fmt: skip
ABSENT = (
    "chocolate cake recipe", "knitting patterns", "smartphone battery life", "Pokemon trading cards", "mortgage refinancing",
    "skateboard tricks", "kubernetes deployment", "wedding dress shopping", "hair styling tips", "electric guitar pedals",
    "tax return software", "puppy training", "sushi restaurants", "yoga poses", "lawn mower repair", "coffee brewing methods",
    "Preheat the oven and whisk the eggs with the sugar.", "Tap the icon to update the app on your phone.",
    "The goalkeeper saved a penalty in the last minute.", "Our hotel room had a lovely view of the swimming pool.",
    "Please restart the router and check the cable.", "The new sneakers come in three colours.",
    "vacuum cleaner for carpets", "nail polish", "credit card late fees", "potty training toddlers", "dry shampoo",
    "contact lens solution", "video call background blur", "garage door opener", "bicycle tyre puncture kit", "cat litter box",
    "printer paper jam", "online dating profile", "bathroom tile grout", "microwave popcorn", "karaoke night",
    "sunscreen for sensitive skin", "spreadsheet pivot table", "Unsubscribe from this newsletter at any time.",
    "Your parcel will be delivered tomorrow between nine and noon.", "Add the milk slowly and stir until the sauce thickens.",
)  # fmt: skip
MISTYPED = (
    "choclate cak recipie", "smartfone batery lief", "skatebord triks", "gitar peddals", "cofee brooing", "yoag posse",
    "sushy restarant", "mortgag refinansing", "lown mowr repare", "weding dres shoping",
)  # fmt: skip
GIBBERISH = (
    "asdfqwer zxcv", "qwpoeiru", "xjkq vbwz", "hjklhjkl", "zzgrfp blorptang", "lkjsdf 0983 mnbv", "aaaaaaa bbbbbb", "wqrtz",
    "zorp gleeb quix", "uyt rew qas", "ghxzj", "sdf;lk wer,.m", "qwertyuiop", "brmblfx tnk", "x9q2 kk7v",
)  # fmt: skip
BARS = {"label": (0.5, 0.525, 0.55, 0.575, 0.6, 0.625, 0.65, 0.7), "examples": (0.4, 0.425, 0.45, 0.475, 0.5)}

Best = Mapping[str, float]
"""What the best of a search came to, by the names of CUTOFFS."""


def found(bests: Sequence[Best], cutoffs: Best) -> int:
    """For how many searches anything reaches its cut-off."""
    return sum(any(value >= cutoffs[name] for name, value in best.items()) for best in bests)


def table(present: Sequence[Best], absent: Sequence[Best]) -> Iterator[str]:
    """A line for each pair of bars: what is found although it is absent, and not found although it is present."""
    for label, examples in product(*BARS.values()):
        cutoffs = CUTOFFS | {"label": label, "examples": examples}
        wrong, missed = found(absent, cutoffs), len(present) - found(present, cutoffs)
        chosen = "  <- CUTOFFS" if cutoffs == CUTOFFS else ""
        yield (
            f"label {label:.3f}, examples {examples:.3f}: {wrong} of {len(absent)} absent found ({wrong / len(absent):.1%}), "
            f"{missed} of {len(present)} present not ({missed / len(present):.1%}){chosen}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="store")
    atlas = open_atlas(parser.parse_args().store)

    def told(title: str, queries: Sequence[str]) -> list[Best]:
        bests = {query: atlas.search(query, k=1).best for query in queries}
        print(f"{title}: hybrid search finds something for {found([*bests.values()], CUTOFFS)} of {len(queries)}")
        for name in ("label", WITH_WORD, "examples", "words"):
            values = sorted((best.get(name, 0.0), query) for query, best in bests.items())
            under = sum(value < CUTOFFS[name] for value, _ in values)
            listed = ", ".join(f"{query} {value:.3f}" for value, query in values)
            print(f"  {name}: {under} of {len(values)} under {CUTOFFS[name]}; {listed}")
        return [*bests.values()]

    present = told("present", PRESENT)
    absent = [*told("absent", ABSENT), *told("mistyped", MISTYPED), *told("gibberish", GIBBERISH)]
    print(*table(present, absent), sep="\n")


if __name__ == "__main__":
    main()
