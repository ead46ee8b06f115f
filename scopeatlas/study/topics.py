"""Topics: a batch of texts as a table of text by feature, rolled up by what features mean; words beside it, the same way.

What belongs here: weights, roll-ups, and how well each agrees with groups that are known. What does not: what fires
(`trace.py`), where vectors come from (`atlas/embedding.py`), or looks (`rendering/topics.py`, `plots/topics.py`).
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import polars as pl

from scopeatlas.activations.probe import Text
from scopeatlas.activations.reading import SiteBatch
from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import ConfigError
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.texts import as_texts
from scopeatlas.study.trace import Trace, short_name, trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from scipy.sparse import csr_matrix

_Rows = TypeVar("_Rows", np.ndarray, "csr_matrix")

DISTANCE = 0.6
MOST_ITEMS = 4000
"""So many of the heaviest features or words are clustered: the distances between all pairs of them are 64 MB."""
MEMBERS, TITLE_WORDS = 5, 3
_AT_ENDS = re.compile(r"^\S+|\S+$", re.MULTILINE)
"""The first and the last word of each line of an example text: a window may begin and end within a word."""
_ITEMS = {"item": pl.String, "name": pl.String, "title": pl.String, "meaning": pl.String}
"""name: for lists. title: what a topic can be called by, or "". meaning: the text that stands for the item, or ""."""
_WEIGHTS = {"text": pl.Int32, "item": pl.String, "weight": pl.Float64}


@dataclass(frozen=True)
class RollUp:
    """Items (features by key, or words) of several texts, and the topics that items of like meaning make.

    weights: text, item, weight; the weights of one text are a vector of length 1. items: item, name, topic (null if it is in
    none: no description, or not among the MOST_ITEMS heaviest), texts (how many it is in), weight (its sum), the heaviest
    first. topics: topic, name, members (the names of the MEMBERS heaviest), items, texts, share (of a text's weight, mean over
    texts) and spread (its standard deviation over texts), in order of spread: what texts differ in comes first. by_text: text,
    topic, name, share of the text's weight and excess, by how much that is more than the mean, the largest excess first; what
    a text's shares lack to 1 is of items in no topic.
    """

    weights: pl.DataFrame
    items: pl.DataFrame
    topics: pl.DataFrame
    by_text: pl.DataFrame


@dataclass(frozen=True)
class Topics:
    """What a batch of texts is about: by `features` of an SAE and by the baseline's `words`. texts: as plain text.
    Two more baselines, a vector of each whole text: sentences, by the atlas's embedder, float32 [texts, dim], and activations,
    what the SAE reads, mean over the text's tokens less its mean over all texts, float64 [texts, d]."""

    sae: str
    texts: tuple[str, ...]
    trace: Trace
    features: RollUp
    words: RollUp
    sentences: np.ndarray
    activations: np.ndarray

    def to_polars(self) -> pl.DataFrame:
        """A row per text and topic of features: text, topic, name, share, excess."""
        return self.features.by_text

    def as_dict(self) -> dict[str, object]:
        """Texts, and of features and of words the weights, the topics, and the topics of each text, as JSON."""
        return {
            "sae": self.sae,
            "texts": list(self.texts),
            **{
                name: {part: getattr(roll_up, part).to_dicts() for part in ("topics", "by_text", "weights")}
                for name, roll_up in (("features", self.features), ("words", self.words))
            },
        }

    def agreement(self, groups: Sequence[str], *, seeds: int = 20) -> pl.DataFrame:
        """How well clusters of the texts agree with groups that are known: a row per description of the texts.

        groups: a name for each text. The texts are clustered by k-means (k the number of groups, 10 starts) `seeds` times on
        each description, vectors of length 1: weights of features, shares of their topics, TF-IDF weights of words, shares of
        theirs, sentence embeddings, activations of the model itself; the last row has the features' clusters against shuffled groups, which is chance. Columns:
        description, purity, adjusted_rand (Hubert & Arabie 1985) with lowest and highest over seeds, and mutual_information
        (normalised). Raises ConfigError if the groups are not one a text, or fewer than two.
        """
        if len(groups) != len(self.texts) or len(set(groups)) < 2:
            raise ConfigError(f"{len(groups)} group names, {len(set(groups))} of them different, for {len(self.texts)} texts")
        described = {
            "features": _matrix(self.features.weights, "item", "weight", len(self.texts)),
            "feature topics": _matrix(self.features.by_text, "topic", "share", len(self.texts)),
            "words (TF-IDF)": _matrix(self.words.weights, "item", "weight", len(self.texts)),
            "word topics": _matrix(self.words.by_text, "topic", "share", len(self.texts)),
            "sentence embeddings": self.sentences,
            "model's activations": _unit(self.activations),
        }
        truth = np.unique(np.asarray(groups), return_inverse=True)[1]
        rows = [{"description": name} | _agreement(matrix, truth, seeds) for name, matrix in described.items()]
        chance = _agreement(described["features"], truth, seeds, shuffled=True)
        return pl.DataFrame([*rows, {"description": "features, groups shuffled"} | chance])

    def plot(self) -> "Figure":
        """Texts by the heaviest topics of features, and beside it by those of words."""
        from scopeatlas.plots.topics import topic_maps

        return topic_maps(self)

    def _repr_html_(self) -> str:
        from scopeatlas.rendering.topics import topics_html

        return topics_html(self)


def topics(opened: OpenSae, texts: Sequence[Text], *, embedder: Embedder, distance: float = DISTANCE) -> Topics:
    """What at least two texts are about, by the features of an SAE and by their words.

    The weight of feature f in a text is its activation summed over tokens, times the norm of what it writes, times
    ln(N / df): N texts, in df of which it fires, so that what fires in all counts nothing. Each text's weights are then scaled to
    length 1. Features make a topic by average linkage of the cosine distances between the vectors of their example texts,
    cut at `distance`. Words are weighted by TF-IDF (English stop words left out) and make topics by their own vectors in
    the same way. A topic is called by the label of its member of most weight; if that one has none, by the words that tell the
    example texts of its members from those of other topics.
    embedder: the atlas's own. Raises ConfigError for fewer than two texts.
    """
    asked = as_texts(texts)
    if len(asked) < 2:
        raise ConfigError(f"topics compare texts with each other: give two or more, not {len(asked)}")
    means = _Means(opened.probe.dictionary, len(asked))
    traced = trace([opened], asked, seen=means.add)
    plain = tuple(text if isinstance(text, str) else "\n".join(turn["content"] for turn in text) for text in asked)
    features = _feature_topics(opened, traced, embedder, distance)
    words = _word_topics(plain, embedder, distance)
    return Topics(opened.key, plain, traced, features, words, embedder.embed(plain), means.centred())


class _Means:
    """What a dictionary reads, summed over the tokens of each text while they are read."""

    def __init__(self, dictionary: SparseDictionary, texts: int):
        self._sites = dictionary.sites_in
        self._sums = np.zeros((texts, len(self._sites) * dictionary.d_in))
        self._tokens = np.zeros(texts)

    def add(self, batch: SiteBatch, text: np.ndarray) -> None:
        acts = np.concatenate([batch.acts[site].float().cpu().numpy() for site in self._sites], axis=1)
        np.add.at(self._sums, text, acts)
        np.add.at(self._tokens, text, 1)

    def centred(self) -> np.ndarray:
        means = self._sums / np.maximum(self._tokens, 1)[:, None]
        return means - means.mean(axis=0)


def _feature_topics(opened: OpenSae, traced: Trace, embedder: Embedder, distance: float) -> RollUp:
    texts = len(traced.tokens)
    rarity = (texts / pl.col("text").n_unique().over("key")).log()
    weights = traced.totals.select("text", item="key", weight=pl.col("written") * rarity).filter(pl.col("weight") > 0)
    facts = opened.rows.join(weights, left_on="key", right_on="item", how="semi")
    rows = [
        (key, short_name(label, tokens), label, example)
        for key, label, tokens, example in facts.select("key", "label", "trigger_tokens", "example_text").iter_rows()
    ]
    items = pl.DataFrame(rows, schema=_ITEMS, orient="row")
    return _roll_up(weights, items, EmbeddingCache(opened.store.root, embedder).embed, texts=texts, distance=distance)


def _word_topics(texts: Sequence[str], embedder: Embedder, distance: float) -> RollUp:
    from scipy.sparse import coo_array
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer, words, weights = TfidfVectorizer(stop_words="english"), [], pl.DataFrame(schema=_WEIGHTS)
    with suppress(ValueError):  # no text has any word that is not a stop word
        table = coo_array(vectorizer.fit_transform(texts))
        words = vectorizer.get_feature_names_out().tolist()
        weights = pl.DataFrame({"text": table.row, "item": [words[i] for i in table.col], "weight": table.data}, schema=_WEIGHTS)
    items = pl.DataFrame([(word,) * len(_ITEMS) for word in words], schema=_ITEMS, orient="row")
    return _roll_up(weights, items, embedder.embed, texts=len(texts), distance=distance)


def _roll_up(
    weights: pl.DataFrame,
    facts: pl.DataFrame,
    embed: Callable[[Sequence[str]], np.ndarray],
    *,
    texts: int,
    distance: float,
) -> RollUp:
    """weights: text, item, weight, of any scale. facts: _ITEMS, a row per item."""
    scaled = pl.col("weight") / (pl.col("weight") ** 2).sum().sqrt().over("text")
    weights = weights.with_columns(weight=scaled).sort("text", "item")
    items = weights.group_by("item", maintain_order=True).agg(texts=pl.len().cast(pl.Int64), weight=pl.col("weight").sum())
    items = items.join(facts, on="item", how="left", maintain_order="left").sort(["weight", "item"], descending=[True, False])
    joined = items.filter(pl.col("meaning") != "").head(MOST_ITEMS)
    clusters = _clustered(embed(joined["meaning"].to_list()), distance) if joined.height else np.zeros(0, dtype=np.int32)
    joined = joined.with_columns(cluster=pl.Series(clusters, dtype=pl.Int32))
    shares = _shares(weights, joined.select("item", "cluster"))
    topics = _described(joined, shares, texts)
    numbered = topics.select("cluster", "topic", "name", mean="share")
    by_text = shares.join(numbered, on="cluster", how="left").with_columns(excess=pl.col("share") - pl.col("mean"))
    by_text = by_text.sort(["text", "excess", "topic"], descending=[False, True, False])
    placed = joined.join(numbered, on="cluster", how="left").select("item", "topic")
    return RollUp(
        weights,
        items.join(placed, on="item", how="left", maintain_order="left").select("item", "name", "topic", "texts", "weight"),
        topics.drop("cluster"),
        by_text.select("text", "topic", "name", "share", "excess"),
    )


def _shares(weights: pl.DataFrame, clusters: pl.DataFrame) -> pl.DataFrame:
    """text, cluster, share: what part of a text's weight is of a cluster's items."""
    whole = weights.with_columns(share=pl.col("weight") / pl.col("weight").sum().over("text"))
    return whole.join(clusters, on="item", how="inner").group_by("text", "cluster").agg(pl.col("share").sum())


def _described(joined: pl.DataFrame, shares: pl.DataFrame, texts: int) -> pl.DataFrame:
    """Clusters as topics, in order of spread: cluster, topic, name, members, items, texts, share, spread."""
    over = shares.group_by("cluster").agg(
        texts=pl.len().cast(pl.Int64), share=pl.col("share").sum() / texts, squared=(pl.col("share") ** 2).sum() / texts
    )
    over = over.with_columns(spread=(pl.col("squared") - pl.col("share") ** 2).clip(0).sqrt())
    made = joined.group_by("cluster", maintain_order=True).agg(
        pl.col("title").first(), members=pl.col("name").head(MEMBERS), items=pl.len().cast(pl.Int64)
    )
    topics = made.join(over, on="cluster").sort(["spread", "cluster"], descending=[True, False])
    words = _telling_words(joined) if (topics["title"] == "").any() else {}
    named = zip(topics["cluster"], topics["title"], topics["members"], strict=True)
    names = [title or words.get(cluster, members[0]) for cluster, title, members in named]
    topics = topics.with_columns(name=pl.Series(names, dtype=pl.String)).with_row_index("topic").cast({"topic": pl.Int32})
    return topics.select("cluster", "topic", "name", "members", "items", "texts", "share", "spread")


def _telling_words(members: pl.DataFrame) -> dict[int, str]:
    """For each cluster of members (cluster, meaning, weight), the TITLE_WORDS words that most tell their texts from those of
    other clusters: class-based TF-IDF (Grootendorst 2022, eq. 2), a member counting by its weight. Words at the ends of a line
    are left out: they may be cut."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    vectorizer = CountVectorizer(stop_words="english", token_pattern=r"[^\W\d_]{3,}")
    try:
        counts = vectorizer.fit_transform([_AT_ENDS.sub("", text) for text in members["meaning"]])
    except ValueError:  # no text has any such word
        return {}
    words, clusters = vectorizer.get_feature_names_out(), members["cluster"].to_numpy()
    weights = csr_matrix((members["weight"].to_numpy(), (clusters, np.arange(len(clusters)))))
    of_class = csr_matrix(weights @ normalize(counts, "l1"))
    everywhere = np.asarray(of_class.sum(axis=0)).ravel()
    rarity = np.log1p(everywhere.sum() / len(np.unique(clusters)) / everywhere)
    cluster, word = of_class.nonzero()
    weighed = pl.DataFrame({"cluster": cluster, "word": words[word], "weight": of_class[cluster, word].A1 * rarity[word]})
    best = weighed.sort(["weight", "word"], descending=[True, False]).group_by("cluster").agg(pl.col("word").head(TITLE_WORDS))
    return {cluster: ", ".join(words) for cluster, words in best.iter_rows()}


def _clustered(vectors: np.ndarray, distance: float) -> np.ndarray:
    """A cluster for each row of `vectors` [n, d], none of length 0: average linkage of cosine distances, cut at `distance`."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(vectors) < 2:
        return np.zeros(len(vectors), dtype=np.int32)
    return fcluster(linkage(vectors.astype(np.float64), "average", metric="cosine"), distance, "distance").astype(np.int32)


def _matrix(table: pl.DataFrame, column: str, value: str, texts: int) -> "csr_matrix":
    """Rows of length 1, one a text, of the values in a long table of text, `column` and `value`."""
    from scipy.sparse import csr_matrix

    place = table[column].rank("dense").to_numpy() - 1
    shape = (texts, int(place.max(initial=0)) + 1)
    return _unit(csr_matrix((table[value].to_numpy(), (table["text"].to_numpy(), place)), shape=shape))


def _unit(rows: _Rows) -> _Rows:
    """Rows of length 1, but for rows of zeros."""
    from sklearn.preprocessing import normalize

    return normalize(rows)  # pyright: ignore[reportReturnType]  # gives what it takes, dense or sparse


def _agreement(
    described: "csr_matrix | np.ndarray", truth: np.ndarray, seeds: int, *, shuffled: bool = False
) -> dict[str, float]:
    """purity, adjusted_rand with its lowest and highest, and mutual_information over k-means of different seeds."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    purities, rands, informations = [], [], []
    for seed in range(seeds):
        clusters = KMeans(int(truth.max()) + 1, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]  # its stub
        found = clusters.fit_predict(described)
        known = np.random.default_rng(seed).permutation(truth) if shuffled else truth
        purities.append(sum(np.bincount(known[found == cluster]).max() for cluster in np.unique(found)) / len(known))
        rands.append(adjusted_rand_score(known, found))
        informations.append(normalized_mutual_info_score(known, found))
    return {
        "purity": float(np.mean(purities)),
        "adjusted_rand": float(np.mean(rands)),
        "lowest": float(min(rands)),
        "highest": float(max(rands)),
        "mutual_information": float(np.mean(informations)),
    }
