"""Null features: random directions that fire as often as features of an SAE, the control for what any direction would give.

What belongs here: drawing and calibrating them, and where their activations lie in a store. What does not: the pass that
encodes them beside their SAE (`cache.py`), or what labels and scores make of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from scopeatlas.activations.memory import NULL_FEATURES, NULL_TOKENS
from scopeatlas.activations.reading import read_batches
from scopeatlas.activations.shards import ActivationShard, read_shard, round_values
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts, join_contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import readable
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch

NULL_VERSION = 2
MIN_FIRINGS = 5
"""A feature that fires on fewer tokens of the calibration text has no density to speak of there, and is not matched."""
MAX_DENSITY = 0.2
"""Nor is one that fires on more: it is refused a label whatever it reads."""
STAGE = "nulls"

Asked = TypeVar("Asked")
"""Whatever stands for an SAE where null features are asked for."""


@dataclass(frozen=True)
class NullKeys:
    """What determines an SAE's null features, and their activations on each shard of a corpus."""

    directions: ShardKey
    shards: tuple[ShardKey, ...]


@dataclass(frozen=True)
class NullFeatures:
    """n <= NULL_FEATURES directions. matched: uint32 [n], the feature that each is like. w_enc: float32 [d_in, n], uniform
    on the sphere and as long as that feature's encoder column. b_enc, threshold: float32 [n]."""

    matched: np.ndarray
    w_enc: np.ndarray
    b_enc: np.ndarray
    threshold: np.ndarray

    def as_dictionary(self, like: SparseDictionary) -> SparseDictionary:
        """The same as a dictionary that reads what `like` reads, on its device; it encodes, and what it writes is nothing."""
        import torch

        device = like.b_dec.device
        w_enc, b_enc, threshold = (torch.from_numpy(part).to(device) for part in (self.w_enc, self.b_enc, self.threshold))
        layer = LayerWeights(w_enc, b_enc, torch.zeros(len(b_enc), 1, 1, device=device), threshold)
        return replace(like, layers=(layer,), activation=Activation("jumprelu"))


class Calibration:
    """The text on which densities are matched: the explain contexts of the documents of lowest hash, which a growing
    corpus keeps. A corpus of fewer tokens is calibrated on all it has."""

    def __init__(self, corpus: Corpus, subject: SubjectModel):
        self.corpus, self.subject = corpus, subject
        wanted = max(1, NULL_TOKENS // corpus.facts["context_length"])
        found: list[Contexts] = []
        for shard in corpus.shards:
            contexts = corpus.contexts(shard)
            mine = np.flatnonzero(contexts.splits == SPLITS.index("explain"))
            found.append(contexts.take(mine[: wanted - sum(map(len, found))]))
            if sum(map(len, found)) == wanted:
                break
        self.contexts = join_contexts(found)
        self._determined = (
            NULL_VERSION,
            subject.batch_tokens,
            self.contexts.identity(),
            subject.identity,
            str(subject.resolved_dtype),
        )

    def keys(self, entry: SaeEntry) -> NullKeys:
        """The identities of an SAE's null features."""
        directions = ShardKey("directions", content_hash(entry.hashes, *self._determined))
        shards = [ShardKey(s.name, content_hash(s.identity, directions.identity)) for s in self.corpus.shards]
        return NullKeys(directions, tuple(shards))

    def draw(
        self, dictionaries: Mapping[Asked, SparseDictionary], keys: Mapping[Asked, NullKeys]
    ) -> tuple[dict[Asked, NullFeatures], dict[Asked, Exception]]:
        """Null features for each of some SAEs, matched and calibrated on one pass over the text for all of them; and what
        went wrong, each about one SAE alone."""
        failed: dict[Asked, Exception] = {}
        matches = {asked: _Match(dictionary, keys[asked].directions.identity) for asked, dictionary in dictionaries.items()}
        single = {asked: match for asked, match in matches.items() if not match.dictionary.is_multi_layer}
        sites = {match.site for match in single.values()}
        for batch in read_batches(self.contexts, self.subject, sites) if single else ():
            for asked in [asked for asked in single if asked not in failed]:
                try:
                    single[asked].add(batch.acts[single[asked].site])
                except Exception as error:
                    failed[asked] = error
        return {asked: match.features() for asked, match in matches.items() if asked not in failed}, failed


class _Match:
    """Random unit directions, what they and the features of one SAE give on the calibration text."""

    def __init__(self, dictionary: SparseDictionary, seed: str):
        import torch

        self.dictionary, self.site = dictionary, dictionary.sites_in[0]
        self.generator = np.random.default_rng(int(seed[:16], 16))
        drawn = self.generator.standard_normal((dictionary.d_in, NULL_FEATURES))
        self.unit = (drawn / np.linalg.norm(drawn, axis=0)).astype(np.float32)
        layer = LayerWeights(torch.from_numpy(self.unit), torch.zeros(NULL_FEATURES), torch.zeros(NULL_FEATURES, 1, 1))
        # The largest NULL_FEATURES of NULL_FEATURES by absolute value are all of them, signs kept.
        every = replace(dictionary, layers=(layer,), activation=Activation("abstopk", NULL_FEATURES))
        self.every = every.to(dictionary.b_dec.device)
        self.counts = np.zeros(dictionary.width, dtype=np.int64)
        self.scores: list[np.ndarray] = []

    def add(self, x_td: "torch.Tensor") -> None:
        acts = self.dictionary.encode(x_td, max_l0=self.dictionary.plausible_l0)
        fires = round_values(acts.value.cpu().numpy(), self.dictionary.value_scale) > 0
        self.counts += np.bincount(acts.feature.cpu().numpy()[fires], minlength=self.dictionary.width)
        self.scores.append(self.every.encode(x_td).dense(NULL_FEATURES).cpu().numpy())

    def features(self) -> NullFeatures:
        """A direction for each of at most NULL_FEATURES features drawn at random; none for a multi-layer kind."""
        scores = np.concatenate(self.scores) if self.scores else np.zeros((0, NULL_FEATURES), dtype=np.float32)
        known = np.flatnonzero((self.counts >= MIN_FIRINGS) & (self.counts <= MAX_DENSITY * len(scores)))
        matched = np.sort(self.generator.choice(known, min(NULL_FEATURES, len(known)), replace=False))
        scores, unit = scores[:, : len(matched)], self.unit[:, : len(matched)]
        norm = np.array([float(self.dictionary.reading_direction(int(f)).norm()) for f in matched], dtype=np.float32)
        if not len(matched):
            return NullFeatures(matched.astype(np.uint32), unit, norm, norm)
        # As an SAE's bias does, this one takes away what all tokens have in common; a mean would follow its outliers.
        centre = np.median(scores, axis=0)
        ordered = -np.sort(-(scores - centre) * norm, axis=0)
        fired, columns = self.counts[matched], np.arange(len(matched))
        threshold = (ordered[fired - 1, columns] + ordered[fired, columns]) / 2
        return NullFeatures(matched.astype(np.uint32), unit * norm, -centre * norm, threshold.astype(np.float32))


def write_null_features(stage: StageFolder, key: ShardKey, nulls: NullFeatures) -> None:
    """Write and commit the directions; the record says how many there are."""
    path = stage.data_path(key, ".npz")
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, matched=nulls.matched, w_enc=nulls.w_enc, b_enc=nulls.b_enc, threshold=nulls.threshold)
    stage.commit(key, [path], {"features": len(nulls.matched)})


def read_null_features(stage: StageFolder, key: ShardKey) -> NullFeatures:
    """The directions that were written. Raises NotReadyError if none were."""
    stage.record(key)
    with np.load(readable(stage.data_path(key, ".npz"))) as saved:
        return NullFeatures(saved["matched"], saved["w_enc"], saved["b_enc"], saved["threshold"])


def pending_nulls(stage: StageFolder, keys: NullKeys) -> tuple[ShardKey | None, ...]:
    """For each shard of the corpus, the key of the null activations that are still to be made there, or None."""
    if stage.is_done(keys.directions) and stage.record(keys.directions).facts["features"] == 0:
        return (None,) * len(keys.shards)
    return tuple(None if stage.is_done(key) else key for key in keys.shards)


def null_matches(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> np.ndarray:
    """The feature that each null feature is like: uint32 [n]. Raises NotReadyError if there are none."""
    keys = Calibration(corpus, subject).keys(entry)
    return read_null_features(store.stage(entry.key, corpus.id, STAGE), keys.directions).matched


def null_shards(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> list[ActivationShard] | None:
    """The activations of an SAE's null features on each shard of a corpus; None where there are none: of a multi-layer kind,
    of an SAE with no feature to match, or where they were not made or have been pruned."""
    stage, keys = store.stage(entry.key, corpus.id, STAGE), Calibration(corpus, subject).keys(entry)
    if not stage.is_done(keys.directions) or stage.pending(keys.shards):
        return None
    return [read_shard(stage.data_path(key, ".parquet")) for key in keys.shards]
