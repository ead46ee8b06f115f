"""Forty features written by hand, of two SAEs, and the real embedder's vectors of them."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.atlas.rows import feature_vectors
from scopeatlas.atlas.tables import FEATURE_ROW, SCORES

TEXTS = {
    "demo-res-l3-aaaa1111": [
        "dates: names of months such as January, March and November",
        "years written as four digits, 1987, 2004",
        "opening brackets in Python source code",
        "the word 'import' at the start of a line of code",
        "names of chemical elements: iron, copper, zinc",
        "cooking verbs: simmer, whisk, fry, bake",
        "German articles der, die, das",
        "French text about the government in Paris",
        "legal contracts: liability, indemnity, the parties",
        "court rulings and judges",
        "football scores and goals",
        "chess openings and moves",
        "stock prices falling on Wall Street",
        "bank loans and interest rates",
        "dogs, puppies and their training",
        "birds and their feathers",
        "rain, storms and weather forecasts",
        "earthquakes and volcanoes",
        "cancer treatment and chemotherapy",
        "",
    ],
    "demo-mlp-l7-bbbb2222": [
        "vaccines and the immune system",
        "sadness and grief after a death",
        "anger, shouting and insults",
        "love letters and weddings",
        "space rockets and satellites",
        "stars, galaxies and telescopes",
        "rivers, lakes and drinking water",
        "ships, ports and sailors",
        "railways and train stations",
        "cars, engines and traffic jams",
        "airports and delayed flights",
        "poems that rhyme",
        "guitar solos and drum rhythms",
        "paintings in museums",
        "prayers, churches and bishops",
        "mosques and the Quran",
        "elections, votes and candidates",
        "soldiers, tanks and war",
        "web addresses that begin with https",
        "e-mail addresses and the @ sign",
    ],
}
LAYERS = {"demo-res-l3-aaaa1111": 3, "demo-mlp-l7-bbbb2222": 7}
RES, MLP = TEXTS


def feature_rows(sae: str, texts: list[str] | None = None) -> pl.DataFrame:
    """One row per text; an empty text is a dead feature, and every fifth feature has no score."""
    rows = []
    for feature, text in enumerate(TEXTS[sae] if texts is None else texts):
        row = dict.fromkeys(FEATURE_ROW, "") | {"key": f"{sae}/{feature}", "sae": sae, "feature": feature, "release": sae[:8]}
        row |= {"model": "toy", "corpus": "c1", "kind": "sae", "layer": LAYERS.get(sae, 0), "index": feature}
        row |= dict.fromkeys(("site", "site_out"), f"model.layers.{row['layer']}.output") | {"decoder_norms": [1.0]}
        row |= {"label": text, "search_text": text}
        row |= {"status": "ok" if text else "dead", "method": "rule" if text else "", "reads": text}
        row |= {"example_text": text and f"{text} and more"}
        tokens = text.split()[:3]
        row |= {
            "trigger_tokens": tokens,
            "trigger_shares": [0.5, 0.3, 0.2][: len(tokens)],
            "promoted": [],
            "suppressed": ["the"],
            "density": 0.01,
            "max_activation": 7.5,
        }
        scored = 0.05 * feature if text and feature % 5 else None
        row |= dict.fromkeys(SCORES, scored) | {
            "scorer": "rule_execution" if scored is not None else "",
            "label_id": f"id{feature}",
        }
        rows.append(row | {"report_documents": 12, "snippets": [f"«{text}» and more"] if text else []})
    return pl.DataFrame(rows, schema=FEATURE_ROW)


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture(scope="session")
def cache(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingCache:
    return EmbeddingCache(tmp_path_factory.mktemp("cache"), embedder)


@pytest.fixture(scope="session")
def vectors_of(cache: EmbeddingCache):
    def of(rows: pl.DataFrame) -> dict[str, np.ndarray]:
        return feature_vectors(rows, cache)

    return of


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder, vectors_of) -> Path:
    """A store with both SAEs in its atlas; copy it before writing to it."""
    from scopeatlas.atlas.publish import publish

    root = tmp_path_factory.mktemp("store")
    for sae in TEXTS:
        rows = feature_rows(sae)
        publish(rows, vectors_of(rows), root=root, folder=root / "saes" / sae, embedder=embedder)
    return root
