"""Windows of text on which claims are put to the test, each of one split: where a feature fires, and where it does not.

What belongs here: drawing them, and the type that carries their split. What does not: what is asked about them (`judges/`),
or the examples that people look at (`mining/examples.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import numpy as np
import polars as pl

from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.errors import LeakError
from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.units import Firings, Units, key_hits
from scopeatlas.storage.files import stable_id

WindowKind = Literal["positive", "random", "trigger", "neighbour"]
KINDS: tuple[WindowKind, ...] = ("positive", "random", "trigger", "neighbour")

WINDOW_SCHEMA = {
    "feature": pl.UInt32,
    "kind": pl.String,
    "decile": pl.Int8,
    "context": pl.Int32,
    "document": pl.Int32,
    "document_id": pl.String,
    "start": pl.Int32,
    "focus": pl.Int32,
    "texts": pl.List(pl.String),
    "activations": pl.List(pl.Float32),
    "neighbour": pl.Int32,
}

WIDTH = 32
TRIGGER_TOKENS = 5
POOL = 512
"""Of a token, or of another feature, at most so many places are tried as negatives, in as many documents as there are."""
TILE_FEATURES = 256
FIRING_RANK = 2**16
"""More than any neighbour's rank: added to negatives of contexts in which the feature fires elsewhere."""

S = TypeVar("S", bound=Split, covariant=True)


@dataclass(frozen=True, eq=False)
class Windows(Generic[S]):
    """Windows of some features in one split. Whoever uses them calls `require` first.

    table: WINDOW_SCHEMA. decile: of the window's peak among the feature's context peaks in this split, 0 weakest to 9,
    -1 in negatives. context: row of `Units`. document: index into `Units.documents`. start: first position in the
    context. focus: index in the window of the peak, the trigger, the neighbour's peak, or a random place. texts: of the
    tokens. activations: this feature's, all 0 in negatives. neighbour: the feature that fires instead, or -1.
    document_splits: of every document of the corpus, as `draw_windows` recorded it; without that nothing is believed.
    """

    split: S
    table: pl.DataFrame
    document_splits: Mapping[str, Split] = field(default_factory=dict, repr=False)

    def of(self, feature: int) -> pl.DataFrame:
        """The windows of one feature."""
        return self.table.filter(pl.col("feature") == feature)


def require(windows: Windows, split: Split) -> None:
    """Raise LeakError unless `windows` are of `split`, and so is the document of every one of them."""
    if windows.split != split:
        raise LeakError(f"windows of the {windows.split} split were given to a test that may see only the {split} split")
    for document in windows.table["document_id"].unique().sort():
        found = windows.document_splits.get(document)
        if found != split:
            raise LeakError(
                f"document {document} is of {f'the {found} split' if found else 'no known split'}, and was given to a test that "
                f"may see only the {split} split: draw the windows with draw_windows(split={split!r})"
            )


def draw_windows(
    units: Units,
    firings: Firings,
    features: Sequence[int],
    *,
    split: S,
    neighbours: Neighbours | None,
    positives: int = 50,
    random: int = 20,
    trigger: int = 15,
    neighbour: int = 15,
    width: int = WIDTH,
    seed: int = 0,
) -> Windows[S]:
    """At most so many windows of each kind for each of `features`, of distinct documents as far as there are any.

    positive: around the highest activation of a context in which the feature fires, all deciles of those peaks alike.
    random: of contexts in which it never fires. trigger: around one of its `trigger_tokens`. neighbour: around the peak of
    the nearest other feature that leaves such a window. The feature is silent in the windows of both, and in all of their
    context as far as there are such; else they share no position with a positive window that is drawn. The place
    of the focus in its window is drawn alike for all kinds, so that it tells nothing. Fewer, down to none, where the
    split has no more. A feature's windows depend on the corpus, its firings, its neighbours and `seed` alone.

    firings: of every split (trigger tokens are those of explain). Sorted by feature, kind and order of drawing.
    """
    draw = _Draw(units, firings, split, width, seed)
    triggers = trigger_tokens(units, firings, features)
    tables = [pl.DataFrame(schema=WINDOW_SCHEMA)]
    for start in range(0, len(features), TILE_FEATURES):
        tile = np.unique(np.asarray(features[start : start + TILE_FEATURES], dtype=np.int64))
        firing = _spread(draw.positives(tile), "feature", positives)
        kinds: dict[WindowKind, pl.DataFrame] = {
            "positive": firing,
            "random": _spread(draw.random(tile, random), "feature", random),
            "trigger": _spread(draw.apart(draw.triggers(tile, triggers), firing), "feature", trigger),
            "neighbour": _spread(draw.apart(draw.neighbours(tile, neighbours), firing), "feature", neighbour),
        }
        tables += [draw.cut(places, kind) for kind, places in kinds.items()]
    order = pl.col("kind").replace_strict(list(KINDS), list(range(len(KINDS))), return_dtype=pl.Int8)
    table = pl.concat(tables).sort("feature", order, maintain_order=True)
    splits = {units.documents[d]: SPLITS[s] for d, s in zip(units.context_document, units.context_split, strict=True)}
    return Windows(split, table, splits)


def trigger_tokens(units: Units, firings: Firings, features: Sequence[int] | np.ndarray) -> pl.DataFrame:
    """The TRIGGER_TOKENS tokens on which each feature fires most often in explain documents: feature, key, hits.

    key: of the column "token" of `Units`. Most frequent first; ties go to the lower token id.
    """
    wanted = np.isin(firings.feature, np.asarray(features))
    mine = Firings(firings.feature[wanted], firings.position[wanted], firings.width, value=firings.value[wanted])
    hits = key_hits(units, mine.within(units, "explain"), "token")
    ordered = hits.sort("feature", "hits", "key", descending=[False, True, False])
    return ordered.group_by("feature", maintain_order=True).head(TRIGGER_TOKENS)


class _Draw:
    """One split of a corpus with the firings in it, sorted by feature and position.

    Candidates are tables: feature, context, position (of the focus, in `Units`), document, decile, neighbour, rank (lower
    is taken first), draw (uint64, the order of chance).
    """

    def __init__(self, units: Units, firings: Firings, split: Split, width: int, seed: int):
        self.units, self.width, self.seed = units, width, seed
        inside = units.in_split(split)
        self.inside = np.flatnonzero(inside)
        kept = inside[firings.position]
        key = firings.feature[kept].astype(np.int64) * len(inside) + firings.position[kept]
        order = np.argsort(key, kind="stable")
        self.key, self.value = key[order], firings.value[kept][order]
        counted = units.counted.reshape(units.contexts, units.length)
        self.first = counted.argmax(axis=1)
        self.end = units.length - counted[:, ::-1].argmax(axis=1)
        self.members = np.flatnonzero((units.context_split == SPLITS.index(split)) & counted.any(axis=1))
        self.place = _places(units)

    def positives(self, features: np.ndarray) -> pl.DataFrame:
        """Every context peak of each feature, with its decile."""
        peaks = self._peaks(features)
        rank = pl.col("value").rank("max").over("feature").cast(pl.Int64) - 1
        steps = pl.len().over("feature").cast(pl.Int64) - 1
        # numpy's quantiles: the k-th decile lies at rank k * (n - 1) / 10, and a peak is above each that is no higher.
        decile = pl.when(steps > 0).then(10 * rank // pl.max_horizontal(steps, 1)).otherwise(9).clip(0, 9)
        return self._candidates(peaks.with_columns(decile=decile.cast(pl.Int8)), "positive")

    def random(self, features: np.ndarray, count: int) -> pl.DataFrame:
        """Contexts in which the feature never fires: four times as many as are wanted, at a random place of each."""
        peaks = self._peaks(features)
        draw = _mixed(self.seed, KINDS.index("random"), features[:, None], self.place[self.members][None])
        fired = np.zeros(draw.shape, dtype=bool)
        fired[np.searchsorted(features, peaks["feature"]), np.searchsorted(self.members, peaks["context"])] = True
        draw[fired] = np.iinfo(np.uint64).max
        most = min(4 * count, len(self.members))
        nearest = np.argpartition(draw, most - 1, axis=1)[:, :most] if most else np.zeros((len(features), 0), dtype=np.int64)
        rows = np.repeat(np.arange(len(features)), most)
        silent = ~fired[rows, nearest.ravel()]
        rows, contexts = rows[silent], self.members[nearest.ravel()[silent]]
        lengths = (self.end - self.first)[contexts].astype(np.uint64)
        offset = self.first[contexts] + (_mixed(self.seed, 9, features[rows], self.place[contexts]) % lengths).astype(np.int64)
        return self._candidates(_table(features[rows], contexts * self.units.length + offset), "random")

    def triggers(self, features: np.ndarray, triggers: pl.DataFrame) -> pl.DataFrame:
        """Places of the features' trigger tokens around which they are silent."""
        triggers = triggers.filter(pl.col("feature").is_in(features.tolist())).select(pl.col("feature").cast(pl.Int64), "key")
        keys = self.units.column("token")[0][self.inside]
        at = np.isin(keys, triggers["key"].unique())
        pool = pl.DataFrame({"key": keys[at], "position": self.inside[at]}, schema_overrides={"position": pl.Int64})
        pool = _spread(self._candidates(pool.with_columns(feature=pl.col("key")), "trigger"), "key", POOL)
        return self._silent(self._candidates(triggers.join(pool.select("key", "position"), on="key"), "trigger"))

    def neighbours(self, features: np.ndarray, nearest: Neighbours | None) -> pl.DataFrame:
        """Peaks of the features nearest to each around which it is silent, those of the nearest first."""
        if nearest is None:
            return self._candidates(_table(np.zeros(0, np.int64), np.zeros(0, np.int64)), "neighbour")
        parts = [(table[features, k], k) for k in range(nearest.cosine.shape[1]) for table in (nearest.cosine, nearest.coactive)]
        pairs = pl.concat([pl.DataFrame({"feature": features, "neighbour": n, "rank": np.full(len(n), k)}) for n, k in parts])
        pairs = pairs.filter(pl.col("neighbour") >= 0, pl.col("neighbour") != pl.col("feature"))
        pairs = pairs.sort("rank").unique(["feature", "neighbour"], keep="first", maintain_order=True)
        peaks = self._peaks(pairs["neighbour"].unique().sort().to_numpy().astype(np.int64))
        pool = _spread(self._candidates(peaks, "neighbour"), "feature", POOL)
        pool = pool.select(pl.col("feature").cast(pl.Int32).alias("neighbour"), "position")
        return self._silent(self._candidates(pairs.join(pool, on="neighbour"), "neighbour"))

    def apart(self, places: pl.DataFrame, drawn: pl.DataFrame) -> pl.DataFrame:
        """Those candidates whose windows share no position with the `drawn` ones of the feature, at most one of a context;
        those of contexts in which the feature fires anywhere come last."""
        start, stop = self._bounds(drawn)
        taken = drawn.select("feature", "context", taken=pl.Series(start), taken_to=pl.Series(stop))
        start, stop = self._bounds(places)
        base = places["feature"].to_numpy() * (self.units.contexts * self.units.length)
        row = places["context"].to_numpy().astype(np.int64) * self.units.length
        fires = np.searchsorted(self.key, base + row) < np.searchsorted(self.key, base + row + self.units.length)
        ranked = places.with_columns(pl.col("rank") + FIRING_RANK * pl.Series(fires).cast(pl.Int64))
        both = ranked.with_columns(start=pl.Series(start), stop=pl.Series(stop)).join(
            taken, on=["feature", "context"], how="left", maintain_order="left"
        )
        overlaps = (pl.col("start") < pl.col("taken_to")) & (pl.col("taken") < pl.col("stop"))
        return both.filter(~overlaps.fill_null(False)).select(places.columns)

    def cut(self, places: pl.DataFrame, kind: WindowKind) -> pl.DataFrame:
        """The windows around candidates: WINDOW_SCHEMA."""
        start, stop = self._bounds(places)
        lengths = stop - start
        ends = np.cumsum(lengths)
        flat = np.repeat(start - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        keys, texts = self.units.column("token")
        spelled = pl.Series(["", *texts], dtype=pl.String).gather(keys[flat] + 1)
        values = self._values(np.repeat(places["feature"].to_numpy().astype(np.int64), lengths), flat)
        row = pl.Series(np.repeat(np.arange(len(places)), lengths))
        lists = pl.DataFrame({"row": row, "texts": spelled, "activations": values}).group_by("row", maintain_order=True).all()
        columns = {
            "kind": pl.lit(kind),
            "document_id": pl.Series([self.units.documents[d] for d in places["document"]], dtype=pl.String),
            "start": pl.Series(start % self.units.length),
            "focus": pl.Series(places["position"].to_numpy() - start),
        }
        table = places.with_columns(**columns).with_columns(lists.drop("row"))
        return table.select(pl.col(name).cast(dtype) for name, dtype in WINDOW_SCHEMA.items())

    def _peaks(self, features: np.ndarray) -> pl.DataFrame:
        """The first highest positive activation of each feature in each context: feature, position, value."""
        size = self.units.contexts * self.units.length
        low, high = np.searchsorted(self.key, features * size), np.searchsorted(self.key, (features + 1) * size)
        counts = high - low
        at = np.repeat(low - np.r_[0, np.cumsum(counts)[:-1]], counts) + np.arange(counts.sum())
        table = _table(self.key[at] // size, self.key[at] % size).with_columns(value=pl.Series(self.value[at], dtype=pl.Float32))
        table = table.filter(pl.col("value") > 0).with_columns(context=(pl.col("position") // self.units.length).cast(pl.Int32))
        ordered = table.sort("feature", "context", "value", "position", descending=[False, False, True, False])
        return ordered.unique(["feature", "context"], keep="first", maintain_order=True)

    def _candidates(self, table: pl.DataFrame, kind: WindowKind) -> pl.DataFrame:
        """`table` (feature, position and more) with every other column that candidates have."""
        position = table["position"].to_numpy()
        context = position // self.units.length
        draw = _mixed(
            self.seed, KINDS.index(kind), table["feature"].to_numpy(), self.place[context], position % self.units.length
        )
        defaults = {"decile": pl.Int8, "neighbour": pl.Int32}
        return table.with_columns(
            *(pl.lit(-1, dtype=dtype).alias(name) for name, dtype in defaults.items() if name not in table.columns),
            *([] if "rank" in table.columns else [pl.lit(0).alias("rank")]),
            context=pl.Series(context, dtype=pl.Int32),
            document=pl.Series(self.units.context_document[context], dtype=pl.Int32),
            draw=pl.Series(draw, dtype=pl.UInt64),
        )

    def _silent(self, places: pl.DataFrame) -> pl.DataFrame:
        """Those candidates in whose window the feature has no activation at all."""
        start, stop = self._bounds(places)
        base = places["feature"].to_numpy().astype(np.int64) * (self.units.contexts * self.units.length)
        return places.filter(pl.Series(np.searchsorted(self.key, base + start) == np.searchsorted(self.key, base + stop)))

    def _bounds(self, places: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """First position and the one after the last of each window, in `Units`: int64 [n].

        The focus lies in the window's second half (a feature sees only what stands before it), but for the ends of a context.
        """
        position = places["position"].to_numpy()
        context = position // self.units.length
        half = self.width // 2
        before = half + (places["draw"].to_numpy() % np.uint64(self.width - half)).astype(np.int64)
        low = context * self.units.length + self.first[context]
        high = context * self.units.length + self.end[context]
        start = np.clip(position - before, low, np.maximum(low, high - self.width))
        return start, np.minimum(start + self.width, high)

    def _values(self, feature: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The activations of features at positions: float32 [n]."""
        wanted = feature * (self.units.contexts * self.units.length) + position
        at = np.minimum(np.searchsorted(self.key, wanted), max(len(self.key) - 1, 0))
        if not len(self.key):
            return np.zeros(len(wanted), dtype=np.float32)
        return np.where(self.key[at] == wanted, self.value[at], 0).astype(np.float32)


def _spread(places: pl.DataFrame, group: str, limit: int) -> pl.DataFrame:
    """At most `limit` candidates of each group, one of a context: by rank, then documents in turn, deciles alike.

    Of two neighbours that peak at one place, whose draws are the same, that of the lower number is taken.
    """
    once = places.sort(group, "rank", "draw", "neighbour").unique([group, "context"], keep="first", maintain_order=True)
    turns = once.with_columns(turn=pl.int_range(pl.len()).over(group, "rank", "document")).sort(group, "rank", "turn", "draw")
    stratum = turns.with_columns(stratum=pl.int_range(pl.len()).over(group, "rank", "decile"))
    ordered = stratum.sort(group, "rank", "turn", "stratum", "draw")
    return ordered.filter(pl.int_range(pl.len()).over(group) < limit).select(places.columns)


def _table(feature: np.ndarray, position: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({"feature": feature, "position": position}, schema={"feature": pl.Int64, "position": pl.Int64})


def _places(units: Units) -> np.ndarray:
    """A number of each context that does not depend on what else is in the corpus, nearly: uint64 [contexts].

    From its document and how many of that document's contexts stand before it.
    """
    document = np.array([stable_id("window", d) for d in units.documents], dtype=np.uint64)
    table = pl.DataFrame({"document": units.context_document})
    before = table.select(pl.int_range(pl.len()).over("document")).to_series().to_numpy()
    return _mixed(document[units.context_document], before)


def _mixed(*parts: "np.ndarray | int") -> np.ndarray:
    """A uniform uint64 from integers (arrays broadcast), by the finaliser of splitmix64 (Steele et al. 2014)."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
