"""Examples: windows of text around the peaks that a sketch remembers, and the stage that makes them.

What belongs here: choosing which remembered contexts become examples, cutting them, and the `examples` stage on disk.
What does not: the statistics (`sketches.py`), or judging a feature by its examples (`labels/`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.reading import text_mask
from scopeatlas.activations.shards import read_shard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.mining.promoted import PromotedTokens, promoted_tokens
from scopeatlas.mining.sketches import Sketch, draw_order, merge_all, read_sketch, sketch_shard, write_sketch
from scopeatlas.mining.writing import decoder_norms
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

STAGE_VERSION = 3
SKETCH_VERSION = 2
WINDOW = 32
BEFORE_PEAK = 20
TOP_EXAMPLES = 10
STRATA = 4
PER_STRATUM = 3
TILE_FEATURES = 4096
ROW_GROUP = 640


@dataclass(frozen=True)
class FeatureExamples:
    """The finished stage of one SAE over one corpus.

    features: one row per feature (see `feature_table`). histogram: see `Sketch`. examples: the
    path of the windows, sorted by feature; read some with `read_examples`.
    """

    features: pl.DataFrame
    histogram: pl.DataFrame
    examples: Path
    key: ShardKey


def examples_key(corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> ShardKey:
    """What determines the examples: every activation shard, and how windows are chosen."""
    chosen = (WINDOW, BEFORE_PEAK, TOP_EXAMPLES, STRATA, PER_STRATUM)
    shards = [key.identity for key in activation_keys(corpus, entry, subject)]
    return ShardKey("examples", content_hash(STAGE_VERSION, chosen, shards))


def mine_examples(
    store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, *, log: Log = silent
) -> tuple[FeatureExamples, bool]:
    """Sketch every shard that has no sketch yet, merge, cut the windows; returns the stage and whether it was there.

    Raises NotReadyError if a shard of activations is missing.
    """
    stage = store.stage(entry.key, corpus.id, "examples")
    key = examples_key(corpus, entry, subject)
    if stage.is_done(key):
        return open_examples(store, corpus.id, entry.key, key), True
    store.require_writable()
    dictionary = open_dictionary(entry)
    activations = store.stage(entry.key, corpus.id, "activations")
    shards = activation_keys(corpus, entry, subject)
    sketches = [
        _sketch(stage, activations, corpus, subject, shard, acts_key, dictionary.width)
        for shard, acts_key in zip(corpus.shards, shards, strict=True)
    ]
    sketch = merge_all(sketches)
    log(
        f"feature examples: {int((sketch.counts['tokens'].sum(0) > 0).sum()):,} of {sketch.width:,} features fire; cutting windows"
    )
    chosen = choose_examples(sketch)
    windows = stage.data_path(key, ".windows.parquet")
    with atomic_path(windows) as temporary:
        write_windows(chosen, corpus, subject, activations, dict(zip(corpus.shards, shards, strict=True)), temporary)
    log("feature examples: promoted and suppressed tokens through the unembedding")
    promoted = promoted_tokens(dictionary, subject)
    features, histogram = stage.data_path(key, ".features.parquet"), stage.data_path(key, ".histogram.parquet")
    with atomic_path(features) as temporary:
        feature_table(sketch, dictionary, promoted).write_parquet(temporary)
    with atomic_path(histogram) as temporary:
        sketch.histogram.write_parquet(temporary)
    stage.commit(key, [windows, features, histogram], {"examples": len(chosen), "features": sketch.width})
    return open_examples(store, corpus.id, entry.key, key), False


def open_examples(store: Store, corpus_id: str, sae: str, key: ShardKey) -> FeatureExamples:
    """The finished stage. Raises NotReadyError if it is not finished."""
    stage = store.stage(sae, corpus_id, "examples")
    stage.record(key)
    return FeatureExamples(
        pl.read_parquet(stage.data_path(key, ".features.parquet")),
        pl.read_parquet(stage.data_path(key, ".histogram.parquet")),
        stage.data_path(key, ".windows.parquet"),
        key,
    )


def read_examples(path: Path, features: list[int] | None = None) -> pl.DataFrame:
    """Examples of some features (or all): feature, split, kind (top, stratum), rank, context_id, document_id, peak,
    peak_at, tokens int32 [WINDOW] (-1 past the end), texts (of the tokens, none past the end), activations float32
    [WINDOW]."""
    filters = None if features is None else [("feature", "in", features)]
    return pl.DataFrame(pl.from_arrow(pq.read_table(path, filters=filters)))


def _sketch(
    stage: StageFolder,
    activations: StageFolder,
    corpus: Corpus,
    subject: SubjectModel,
    shard: ShardKey,
    acts_key: ShardKey,
    width: int,
) -> Sketch:
    """A shard's sketch: read back if it was made before, so that a larger corpus sketches only what is new."""
    key = ShardKey(f"sketch-{shard.name}", content_hash(SKETCH_VERSION, acts_key.identity))
    paths = [stage.data_path(key, f".{part}") for part in ("counts.npz", "histogram.parquet", "entries.parquet")]
    if stage.is_done(key):
        return read_sketch(*paths)
    record = activations.record(acts_key)
    contexts = corpus.contexts(shard)
    counted = text_mask(contexts, subject).sum(axis=1)
    seen = np.bincount(contexts.splits, counted, minlength=len(SPLITS)).astype(np.int64)
    acts = read_shard(activations.data_path(record.key, ".parquet"))
    sketch = sketch_shard(acts, contexts, width=width, shard=shard.name, seen=seen)
    write_sketch(sketch, *paths)
    stage.commit(key, paths, {})
    return sketch


def choose_examples(sketch: Sketch) -> pl.DataFrame:
    """Which remembered contexts become examples, per feature and split: the TOP_EXAMPLES strongest distinct documents,
    and PER_STRATUM from each quantile stratum of peaks, at most one a document and stratum. A top example is not
    repeated in a stratum."""
    cell = ["feature", "split"]
    entries = sketch.entries
    best = entries.unique(["feature", "split", "document"], keep="first", maintain_order=True)
    top = best.with_columns(rank=pl.int_range(pl.len()).over(cell)).filter(pl.col("rank") < TOP_EXAMPLES)
    top = top.with_columns(kind=pl.lit("top"), stratum=pl.lit(STRATA - 1))
    below = (pl.col("contexts").cum_sum().over(cell) - pl.col("contexts") / 2) / pl.col("contexts").sum().over(cell)
    strata = sketch.histogram.filter(pl.col("contexts") > 0).with_columns(
        stratum=(below * STRATA).floor().cast(pl.Int32).clip(0, STRATA - 1)
    )
    rest = entries.join(top.select("feature", "context_id"), on=["feature", "context_id"], how="anti")
    rest = draw_order(rest.join(strata.select(*cell, "bin", "stratum"), on=[*cell, "bin"])).sort(
        *cell, "stratum", "draw", "context_id"
    )
    rest = rest.unique([*cell, "stratum", "document"], keep="first", maintain_order=True)
    rest = rest.with_columns(rank=pl.int_range(pl.len()).over([*cell, "stratum"])).filter(pl.col("rank") < PER_STRATUM)
    rest = rest.with_columns(kind=pl.lit("stratum")).drop("draw")
    columns = [*cell, "kind", "stratum", "rank", "context_id", "peak", "position", "shard", "row"]
    return pl.concat([top.select(columns), rest.select(columns)], how="vertical_relaxed").sort(*cell, "kind", "stratum", "rank")


def write_windows(
    chosen: pl.DataFrame,
    corpus: Corpus,
    subject: SubjectModel,
    activations: StageFolder,
    acts_keys: dict[ShardKey, ShardKey],
    path: Path,
) -> None:
    """Write the windows of `chosen`, sorted by feature, in feature tiles; each tile reads a shard's part of it once."""
    writer: pq.ParquetWriter | None = None
    width = int(chosen["feature"].max() or 0) + 1  # type: ignore[arg-type]
    for start in range(0, width, TILE_FEATURES):
        tile = chosen.filter(pl.col("feature").is_between(start, start + TILE_FEATURES - 1))
        if tile.is_empty():
            continue
        table = pl.concat(list(_cut_tile(tile, corpus, subject, activations, acts_keys, start)))
        arrow = table.sort(
            "feature", "split", "kind", "stratum", "rank", descending=[False, False, True, False, False]
        ).to_arrow()
        writer = writer or pq.ParquetWriter(path, arrow.schema, compression="zstd")
        writer.write_table(arrow, row_group_size=ROW_GROUP)
    if writer is None:
        raise DictionaryError(
            "no feature of this SAE fires on the corpus: is it of this subject model, and the corpus large enough?"
        )
    writer.close()


def _cut_tile(
    tile: pl.DataFrame,
    corpus: Corpus,
    subject: SubjectModel,
    activations: StageFolder,
    acts_keys: dict[ShardKey, ShardKey],
    first: int,
) -> Iterator[pl.DataFrame]:
    for shard, acts_key in acts_keys.items():
        rows = tile.filter(pl.col("shard") == shard.name)
        if not len(rows):
            continue
        contexts = corpus.contexts(shard)
        length = contexts.tokens.shape[1]
        acts = read_shard(activations.data_path(acts_key, ".parquet"), features=range(first, first + TILE_FEATURES))
        row, position = rows["row"].to_numpy().astype(np.int64), rows["position"].to_numpy().astype(np.int64)
        starts = np.clip(position - BEFORE_PEAK, 0, max(0, length - WINDOW))
        offsets = np.arange(min(WINDOW, length))
        flat = (row * length + starts)[:, None] + offsets
        tokens = contexts.tokens.reshape(-1)[flat]
        values = windows_of(acts.feature, acts.token, acts.value, rows["feature"].to_numpy(), flat[:, 0], len(offsets))
        yield rows.select("feature", "kind", "stratum", "rank", "context_id", "peak").with_columns(
            split=pl.Series([SPLITS[s] for s in rows["split"]], dtype=pl.String),
            document_id=pl.Series([contexts.document_ids[r] for r in row], dtype=pl.String),
            peak_at=pl.Series((position - starts).astype(np.int32)),
            tokens=_fixed_lists(tokens.astype(np.int32)),
            texts=_text_lists(tokens, subject),
            activations=_fixed_lists(values),
        )


def windows_of(
    feature: np.ndarray, token: np.ndarray, value: np.ndarray, wanted: np.ndarray, start: np.ndarray, width: int
) -> np.ndarray:
    """Activations float32 [n, width] of `wanted` features at tokens start..start+width, from sorted non-zeros."""
    key = (feature.astype(np.uint64) << np.uint64(32)) | token.astype(np.uint64)
    low = (wanted.astype(np.uint64) << np.uint64(32)) | start.astype(np.uint64)
    first, last = np.searchsorted(key, low), np.searchsorted(key, low + np.uint64(width))
    counts = last - first
    window = np.repeat(np.arange(len(wanted)), counts)
    source = np.repeat(first - np.r_[0, counts.cumsum()[:-1]], counts) + np.arange(counts.sum())
    out = np.zeros((len(wanted), width), dtype=np.float32)
    out[window, token[source].astype(np.int64) - start[window]] = value[source]
    return out


def feature_table(sketch: Sketch, dictionary: SparseDictionary, promoted: PromotedTokens | None) -> pl.DataFrame:
    """One row per feature: its flat id, the model layer that it reads and its index there, the norms of its decoder row
    at each output site, density (share of unmasked tokens), contexts fired per split, moments, promoted tokens."""
    counts, seen = sketch.counts, int(sketch.seen.sum())
    tokens = counts["tokens"].sum(0)
    fired = np.maximum(tokens, 1)
    mean = counts["sum"].sum(0) / fired
    variance = np.maximum(counts["sum2"].sum(0) / fired - mean**2, 0)
    documents = sketch.entries.group_by("feature", "split").agg(documents=pl.col("document").n_unique())
    position, index = np.divmod(np.arange(sketch.width), dictionary.features_per_layer)
    columns: dict[str, object] = {
        "feature": np.arange(sketch.width, dtype=np.uint32),
        "layer": np.array([site.layer for site in dictionary.sites_in], dtype=np.int16)[position],
        "index": index.astype(np.int32),
        "decoder_norms": _lists(decoder_norms(dictionary)),
        "tokens": tokens,
        "density": (tokens / max(seen, 1)).astype(np.float64),
        "early_share": counts["early"].sum(0) / fired,
        "max_activation": counts["max"].max(0),
        "mean_activation": mean,
        "std_activation": np.sqrt(variance),
    }
    for index, split in enumerate(SPLITS):
        columns[f"{split}_contexts"] = counts["contexts"][index]
        columns[f"{split}_tokens"] = counts["tokens"][index]
    table = pl.DataFrame(columns)
    for index, split in enumerate(SPLITS):
        # The sketch remembers up to TOP_DOCUMENTS distinct documents, so this count saturates there.
        per_split = documents.filter(pl.col("split") == index).select("feature", pl.col("documents").alias(f"{split}_documents"))
        table = table.join(per_split, on="feature", how="left").with_columns(pl.col(f"{split}_documents").fill_null(0))
    if promoted is None:
        empty = pl.Series([[]] * sketch.width, dtype=pl.List(pl.Int32))
        return table.with_columns(promoted=empty, suppressed=empty, promoted_strength=empty.cast(pl.List(pl.Float32)))
    return table.with_columns(
        promoted=_lists(promoted.promoted), suppressed=_lists(promoted.suppressed), promoted_strength=_lists(promoted.strength)
    )


def _text_lists(tokens: np.ndarray, subject: SubjectModel) -> pl.Series:
    """The texts of each row of token ids [n, width], padding left out; so that readers need no tokenizer."""
    ids, place = np.unique(tokens, return_inverse=True)
    vocabulary = pl.Series(token_texts(subject.tokenizer, ids.tolist()), dtype=pl.String)
    is_text = tokens >= 0
    texts = vocabulary.gather(place.reshape(tokens.shape)[is_text]).to_arrow()
    ends = pa.array(np.r_[0, is_text.sum(axis=1).cumsum()].astype(np.int64))
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(ends, texts)))


def _lists(array: np.ndarray) -> pl.Series:
    return pl.Series(array.tolist(), dtype=pl.List(pl.Float32 if array.dtype.kind == "f" else pl.Int32))


def _fixed_lists(array: np.ndarray) -> pl.Series:
    flat = pa.array(np.ascontiguousarray(array).ravel())
    return pl.Series(pl.from_arrow(pa.FixedSizeListArray.from_arrays(flat, array.shape[1])))
