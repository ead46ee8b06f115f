"""Feature examples: the stage of one SAE over one corpus, from activation shards to what people and labellers look at.

What belongs here: the `examples` stage on disk, made a range of features at a time. What does not: the statistics
(`sketches.py`), which contexts become examples (`choosing.py`), cutting them (`cutting.py`), what features fire together
(`coactivation.py`), or judging a feature by its examples (`labels/`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.reading import text_mask
from scopeatlas.activations.shards import ActivationShard, read_shard, read_tiles
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import DictionaryError
from scopeatlas.mining.choosing import MOST_EXAMPLES, PER_STRATUM, STRATA, TOP_EXAMPLES, choose_examples
from scopeatlas.mining.coactivation import PARTNER_SCHEMA, draw_sample, firing_matrix, partners
from scopeatlas.mining.cutting import BEFORE_PEAK, WINDOW, cut_windows
from scopeatlas.mining.outputs import feature_outputs, outputs_identity
from scopeatlas.mining.segments import begins, first_of_each, numbers
from scopeatlas.mining.sketch_files import SketchFiles, read_context_table, read_counts, read_sketch, write_sketch
from scopeatlas.mining.sketches import Sketch, context_table, merge_all, sketch_shard
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location, readable
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

STAGE_VERSION = 4
SKETCH_VERSION = 3
RANGE_WINDOWS = 1 << 17
"""About so many windows are held at once: a range of features that can have no more is finished before the next."""
ROW_GROUP = 2048
PARTNER_ROWS = 8192
TABLES = ("features", "histogram", "windows", "vocabulary", "coactivation")


@dataclass(frozen=True)
class FeatureExamples:
    """The finished stage of one SAE over one corpus.

    features: one row per feature (see `feature_table`). Tables that are read in parts: histogram (see `Sketch`); examples,
    the windows, sorted by feature (`read_examples`); partners (PARTNER_SCHEMA, see `coactivation.partners`), sorted too.
    """

    features: pl.DataFrame
    histogram: Location
    examples: Location
    partners: Location
    key: ShardKey


def examples_key(corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> ShardKey:
    """What determines the examples: every activation shard, what the SAE writes, and how windows are chosen."""
    chosen = (WINDOW, BEFORE_PEAK, TOP_EXAMPLES, STRATA, PER_STRATUM)
    shards = [key.identity for key in activation_keys(corpus, entry, subject)]
    return ShardKey("examples", content_hash(STAGE_VERSION, chosen, outputs_identity(entry, subject), shards))


def mine_examples(
    store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, *, log: Log = silent
) -> tuple[FeatureExamples, bool]:
    """Sketch every shard that has no sketch yet, merge, cut the windows, count what fires together; returns the stage and
    whether it was there.

    Memory: a tile of a shard, the counts of all features, and of a range of features what is remembered of them; it grows
    with neither the corpus nor the number of shards. Raises NotReadyError if a shard of activations is missing.
    """
    stage = store.stage(entry.key, corpus.id, "examples")
    key = examples_key(corpus, entry, subject)
    if stage.is_done(key):
        return open_examples(store, corpus.id, entry.key, key), True
    store.require_writable()
    mining = _Mining(store, corpus, entry, subject, log)
    mining.sketch()
    paths = {name: stage.data_path(key, f".{name}.parquet") for name in TABLES}
    with ExitStack() as files:
        windows, histogram, features = (
            files.enter_context(_written(paths[name], groups))
            for name, groups in (("windows", ROW_GROUP), ("histogram", None), ("features", None))
        )
        written = 0
        for sketch, outputs in mining.ranges():
            table = mining.windows(sketch)
            windows(table)
            histogram(sketch.histogram.to_arrow())
            features(feature_table(sketch, outputs).to_arrow())
            written += len(table)
    with _written(paths["vocabulary"]) as add:
        add(mining.vocabulary())
    log("feature examples: counting which features fire together")
    with _written(paths["coactivation"], PARTNER_ROWS) as add:
        counted = mining.partners(add)
    stage.commit(key, list(paths.values()), {"examples": written, "features": mining.width, "coactivation": counted})
    return open_examples(store, corpus.id, entry.key, key), False


def open_examples(store: Store, corpus_id: str, sae: str, key: ShardKey) -> FeatureExamples:
    """The finished stage. Raises NotReadyError if it is not finished."""
    stage = store.stage(sae, corpus_id, "examples")
    stage.record(key)
    return FeatureExamples(
        pl.read_parquet(readable(stage.data_path(key, ".features.parquet"))),
        stage.data_path(key, ".histogram.parquet"),
        stage.data_path(key, ".windows.parquet"),
        stage.data_path(key, ".coactivation.parquet"),
        key,
    )


def read_examples(path: Location, features: list[int] | None = None) -> pl.DataFrame:
    """Examples of some features (or all): feature, kind (top, stratum), stratum, rank, context_id, peak, split,
    document_id, peak_at, tokens int32 [WINDOW] (-1 past the end), activations float32 [WINDOW], texts (of the tokens, none
    past the end)."""
    filters = None if features is None else [("feature", "in", features)]
    table = pq.read_table(readable(path), filters=filters)
    vocabulary = pl.read_parquet(readable(vocabulary_path(path)))
    return pl.DataFrame(pl.from_arrow(table)).with_columns(texts=_texts(table["tokens"].combine_chunks(), vocabulary))


def vocabulary_path(windows: Location) -> Location:
    """Where the texts of the tokens of windows lie, beside them."""
    return windows.with_name(windows.name.replace(".windows.", ".vocabulary."))


def _texts(tokens: pa.FixedSizeListArray, vocabulary: pl.DataFrame) -> pl.Series:
    """The texts of each row of token ids, padding left out."""
    flat = tokens.flatten().to_numpy()
    is_text = flat >= 0
    ends = np.r_[0, np.cumsum(is_text.reshape(len(tokens), tokens.type.list_size).sum(axis=1))]
    place = np.searchsorted(vocabulary["token"].to_numpy(), flat[is_text])
    texts = pa.LargeListArray.from_arrays(pa.array(ends.astype(np.int64)), vocabulary["text"].gather(place).to_arrow())
    return pl.Series(pl.from_arrow(texts))


class _Mining:
    """One SAE's activation shards on their way to examples, a range of features after the other.

    Raises NotReadyError if one is missing.
    """

    def __init__(self, store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, log: Log):
        self.corpus, self.subject, self.log = corpus, subject, log
        self.length: int = corpus.facts["context_length"]
        self.stage = store.stage(entry.key, corpus.id, "examples")
        activations = store.stage(entry.key, corpus.id, "activations")
        keys = activation_keys(corpus, entry, subject)
        activations.manifest(keys)
        self.shards = [activations.data_path(key, ".parquet") for key in keys]
        self.sketches = [ShardKey(f"sketch-{key.name}", content_hash(SKETCH_VERSION, key.identity)) for key in keys]
        self.files = [SketchFiles.of(self.stage, key) for key in self.sketches]
        self.outputs = feature_outputs(store, entry, subject, log=log)
        self.width = len(self.outputs)
        self.shown = np.zeros(len(subject.tokenizer), dtype=bool)  # which tokens are in windows

    def sketch(self) -> None:
        """Sketch the shards that have no sketch: of a larger corpus only what is new."""
        pending = set(self.stage.pending(self.sketches))
        for number, key in enumerate(self.sketches):
            if key in pending:
                contexts = self.corpus.contexts(self.corpus.shards[number])
                table = context_table(contexts, text_mask(contexts, self.subject).sum(axis=1))
                sketch, pairs = sketch_shard(read_tiles(self.shards[number]), table, length=self.length, width=self.width)
                write_sketch(self.files[number], sketch, table.with_columns(pairs=pairs))
                self.stage.commit(key, self.files[number].all, {})

    def ranges(self) -> Iterator[tuple[Sketch, pl.DataFrame]]:
        """The merged sketch of each range of features, with what is known of them from the SAE alone.

        Raises DictionaryError if no feature fires.
        """
        contexts = sum(read_counts(files, range(self.width))["contexts"] for files in self.files)
        assert isinstance(contexts, np.ndarray), "a corpus has shards"
        fire = int(contexts.any(axis=0).sum())
        if not fire:
            raise DictionaryError(
                "no feature of this SAE fires on the corpus: is it of this subject model, and the corpus large enough?"
            )
        self.log(f"feature examples: {fire:,} of {self.width:,} features fire; cutting windows")
        windows = np.minimum(contexts, MOST_EXAMPLES).sum(axis=0)
        begin = np.flatnonzero(begins((np.cumsum(windows) - windows) // RANGE_WINDOWS))
        for start, stop in zip(begin, np.r_[begin[1:], self.width], strict=True):
            features = range(int(start), int(stop))
            sketches = (read_sketch(files, features, shard=number) for number, files in enumerate(self.files))
            yield merge_all(sketches), self.outputs[features.start : features.stop]

    def windows(self, sketch: Sketch) -> pa.Table:
        """The windows of a range of features: of each shard only what it holds of them is read."""

        def read(number: int) -> ActivationShard:
            return read_shard(self.shards[number], features=sketch.features)

        table = cut_windows(choose_examples(sketch), self.corpus, read)
        tokens = table["tokens"].combine_chunks().flatten().to_numpy()
        self.shown[tokens[tokens >= 0]] = True
        return table

    def vocabulary(self) -> pa.Table:
        """The tokens of all windows and their texts, so that readers need no tokenizer: token (sorted), text."""
        ids = np.flatnonzero(self.shown).astype(np.int32)
        return pa.table({"token": ids, "text": pa.array(token_texts(self.subject.tokenizer, ids.tolist()), pa.large_string())})

    def partners(self, write: Callable[[pa.Table], None]) -> dict[str, int]:
        """Write each feature's partners; returns how much was counted."""
        sample = draw_sample(read_context_table(files) for files in self.files)
        fires = firing_matrix(sample, lambda number: read_tiles(self.shards[number]), length=self.length, width=self.width)
        write(pl.DataFrame(schema=PARTNER_SCHEMA).to_arrow())
        for table in partners(fires, sample.tokens):
            write(table.to_arrow())
        return {"contexts": len(sample.table), "tokens": sample.tokens}


@contextmanager
def _written(path: Location, row_group: int | None = None) -> Iterator[Callable[[pa.Table], None]]:
    """Yields what adds a table to the parquet file at `path`, which is there once everything went well."""
    writer: pq.ParquetWriter | None = None

    def add(table: pa.Table) -> None:
        nonlocal writer
        writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=row_group)

    with atomic_path(path) as temporary:
        yield add
        if writer is not None:
            writer.close()


def feature_table(sketch: Sketch, outputs: pl.DataFrame) -> pl.DataFrame:
    """One row per feature: its flat id, the model layer that it reads and its index there, the norms of its decoder row
    at each output site, density (share of unmasked tokens), contexts fired per split, moments, promoted tokens."""
    counts, seen = sketch.counts, int(sketch.seen.sum())
    tokens = counts["tokens"].sum(0)
    fired = np.maximum(tokens, 1)
    mean = counts["sum"].sum(0) / fired
    variance = np.maximum(counts["sum2"].sum(0) / fired - mean**2, 0)
    documents = _documents(sketch)
    columns: dict[str, np.ndarray] = {
        "tokens": tokens,
        "density": tokens / max(seen, 1),
        "early_share": counts["early"].sum(0) / fired,
        "max_activation": counts["max"].max(0),
        "mean_activation": mean,
        "std_activation": np.sqrt(variance),
    }
    for index, split in enumerate(SPLITS):
        columns[f"{split}_contexts"] = counts["contexts"][index]
        columns[f"{split}_tokens"] = counts["tokens"][index]
    for index, split in enumerate(SPLITS):
        columns[f"{split}_documents"] = documents[index]
    place, written = ["feature", "layer", "index", "decoder_norms"], ["promoted", "suppressed", "promoted_strength"]
    return pl.concat([outputs.select(place), pl.DataFrame(columns), outputs.select(written)], how="horizontal")


def _documents(sketch: Sketch) -> np.ndarray:
    """Distinct documents among the contexts remembered of each split and feature, uint32 [splits, F]: saturates at
    TOP_DOCUMENTS or a little above."""
    feature, split, document = (sketch.entries[name].to_numpy() for name in ("feature", "split", "document"))
    first = first_of_each(numbers(begins(feature, split)), document)
    cell = split[first].astype(np.int64) * len(sketch.features) + (feature[first] - np.uint32(sketch.features.start))
    counted = np.bincount(cell, minlength=len(SPLITS) * len(sketch.features))
    return counted.reshape(len(SPLITS), -1).astype(np.uint32)
