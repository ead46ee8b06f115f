"""Where the similarity of a search's best hit stops meaning anything, on the demo's atlas.

    .venv/bin/python -m bench.cutoff

Prints the best similarity of queries about what the Wikipedia sample's articles are about, and of queries about what
none of them is; `WEAK_SIMILARITY` lies between the two.
"""

from scopeatlas import open_atlas
from scopeatlas.atlas.search import WEAK_SIMILARITY

PRESENT = (
    "wars, armies and battles", "months of the year", "dates in history", "plants and animals", "political parties and elections",
    "film and actors", "mathematics and algorithms", "languages and grammar", "spaceflight", "Greek gods", "religion",
    "numbers and counting", "cities and countries", "law and courts", "medicine and disease",
)  # fmt: skip
ABSENT = (
    "chocolate cake recipe", "knitting patterns", "smartphone battery life", "Pokemon trading cards", "mortgage refinancing",
    "skateboard tricks", "kubernetes deployment", "wedding dress shopping", "hair styling tips", "electric guitar pedals",
    "tax return software", "puppy training",
)  # fmt: skip


def main() -> None:
    atlas = open_atlas("store")
    for title, queries in (("present", PRESENT), ("absent", ABSENT)):
        best = sorted((atlas.search(query, k=1).best_similarity, query) for query in queries)
        weak = sum(similarity < WEAK_SIMILARITY for similarity, _ in best)
        print(f"{title}: {weak} of {len(best)} under {WEAK_SIMILARITY}; " + ", ".join(f"{q} {s:.2f}" for s, q in best))


if __name__ == "__main__":
    main()
