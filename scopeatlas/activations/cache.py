"""The activation cache: one pass of the subject model over the corpus serves every SAE of the run.

What belongs here: the shared pass and its resumption. What does not: the shard format (`shards.py`), the hooks
(`subject/capture.py`), what the figures mean (`fidelity.py`).
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.shards import round_values, write_shard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary, check_fits
from scopeatlas.errors import ScopeAtlasError
from scopeatlas.runner.local import LocalRunner, Log, Progress, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch

STAGE_VERSION = 1
BATCH_CONTEXTS = 16


@dataclass(frozen=True)
class CacheResult:
    """What one run of the cache did. failed: sae key -> why it was left out. reused: nothing had to be done."""

    shards_done: int
    shards_reused: int
    tokens: int
    seconds: float
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def reused(self) -> bool:
        return self.shards_done == 0


def activation_keys(corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> list[ShardKey]:
    """The shards of an SAE's activations over a corpus: which there are, and what determines their bytes."""
    determined = (STAGE_VERSION, BATCH_CONTEXTS, entry.hashes, subject.identity, str(subject.resolved_dtype))
    return [ShardKey(shard.name, content_hash(shard.identity, *determined)) for shard in corpus.shards]


def cache_activations(
    store: Store,
    corpus: Corpus,
    entries: Sequence[SaeEntry],
    subject: SubjectModel,
    *,
    unneeded: Collection[str] = (),
    runner: LocalRunner | None = None,
    log: Log = silent,
) -> CacheResult:
    """Encode every pending (SAE, shard) and commit each; finished ones are not touched.

    unneeded: SAE keys of which nothing downstream wants activations any more; their pruned shards stay pruned.

    An SAE that cannot be loaded or does not fit is left out, named in `failed` and recorded in the store; the others
    go on. Cost: one forward pass to the last site per shard that any SAE still needs.
    """
    store.require_writable()
    stages = {e.key: store.stage(e.key, corpus.id, "activations") for e in entries}
    pending: dict[ShardKey, dict[str, ShardKey]] = {}
    reused = 0
    for entry in entries:
        for shard, key in zip(corpus.shards, activation_keys(corpus, entry, subject), strict=True):
            if stages[entry.key].is_done(key, or_pruned=entry.key in unneeded):
                reused += 1
            else:
                pending.setdefault(shard, {})[entry.key] = key
    needed = {key for wanted in pending.values() for key in wanted}
    dictionaries, failed = _open_all(store, [e for e in entries if e.key in needed], subject)
    jobs = [
        (shard, {sae: key for sae, key in pending[shard].items() if sae in dictionaries})
        for shard in corpus.shards
        if pending.get(shard, {}).keys() & dictionaries.keys()
    ]
    if reused and jobs:
        log(f"activation cache: {reused} shards are there already, {sum(len(wanted) for _, wanted in jobs)} to do")
    loaded = {shard: corpus.contexts(shard) for shard, _ in jobs}
    total = sum(int(contexts.lengths().sum()) for contexts in loaded.values())
    progress = Progress("activation cache", total, "tokens", log)

    def encode(job: tuple[ShardKey, dict[str, ShardKey]]) -> int:
        shard, wanted = job
        sound = {sae: dictionaries[sae] for sae in wanted if sae not in failed}
        if not sound:
            return 0
        stopped = _encode_shard(loaded[shard], sound, wanted, stages, subject, progress)
        for sae, reason in stopped.items():
            failed[sae] = reason
            store.record_error(sae, "activation_cache", reason)
        return len(sound) - len(stopped)

    done = sum((runner or LocalRunner()).map(encode, jobs))
    if jobs:
        progress.finish()
    return CacheResult(done, reused, total, progress.seconds if jobs else 0.0, failed)


def _open_all(
    store: Store, entries: Sequence[SaeEntry], subject: SubjectModel
) -> tuple[dict[str, SparseDictionary], dict[str, str]]:
    """Load every dictionary that the pass needs; those that cannot serve are named with the reason."""
    opened: dict[str, SparseDictionary] = {}
    failed: dict[str, str] = {}
    for entry in entries:
        try:
            dictionary = open_dictionary(entry)
            _try_site(dictionary, entry, subject)
            opened[entry.key] = dictionary.to(subject.resolved_device)
        except ScopeAtlasError as error:
            failed[entry.key] = str(error)
        store.record_error(entry.key, "activation_cache", failed.get(entry.key))
    return opened, failed


def _try_site(dictionary: SparseDictionary, entry: SaeEntry, subject: SubjectModel) -> None:
    """Run one short context, so that a site or size that does not fit is an error before any real work."""
    import torch

    probe = torch.tensor([[subject.tokenizer.bos_token_id or 0, 1]], device=subject.resolved_device)
    sites = {dictionary.site_in, dictionary.site_out}
    seen = capture(subject.model, probe, sites)
    check_fits(dictionary, seen[dictionary.site_in].shape[-1], entry.folder, subject.name)


class _ShardAccumulator:
    """One SAE's non-zeros and, per split, moments over one shard."""

    def __init__(self, dictionary: SparseDictionary, contexts: Contexts):
        self.dictionary, self.contexts = dictionary, contexts
        self.scale = dictionary.value_scale
        self.columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        n = len(SPLITS)
        self.moments = {
            "tokens": np.zeros(n, dtype=np.int64),
            "nonzeros": np.zeros(n, dtype=np.int64),
            "sum_y": np.zeros((n, dictionary.d_out)),
            "sum_y2": np.zeros(n),
            "sum_error2": np.zeros(n),
        }

    def add(self, x_td: "torch.Tensor", y_td: "torch.Tensor", positions: np.ndarray) -> None:
        """x_td, y_td: unmasked activations at the input and output site; positions: their places in the shard."""
        acts = self.dictionary.encode(x_td)
        target = y_td.float()
        error2 = (target - self.dictionary.decode(acts, x_td)).double().square().sum(1).cpu().numpy()
        token = acts.token.cpu().numpy()
        split = self.contexts.splits[positions // self.contexts.tokens.shape[1]]
        targets = target.double().cpu().numpy()
        for index in np.unique(split):
            mine = split == index
            self.moments["tokens"][index] += mine.sum()
            self.moments["nonzeros"][index] += mine[token].sum()
            self.moments["sum_y"][index] += targets[mine].sum(axis=0)
            self.moments["sum_y2"][index] += np.square(targets[mine]).sum()
            self.moments["sum_error2"][index] += error2[mine].sum()
        rounded = round_values(acts.value.cpu().numpy(), self.scale)
        self.columns.append((acts.feature.cpu().numpy().astype(np.uint32), positions[token].astype(np.uint32), rounded))

    def write(self, stage: StageFolder, key: ShardKey, facts: dict[str, object]) -> None:
        feature, token, rounded = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        data, moments = stage.data_path(key, ".parquet"), stage.data_path(key, ".moments.npz")
        write_shard(data, feature, token, rounded, scale=self.scale)
        with atomic_path(moments) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **self.moments)
        stage.commit(key, [data, moments], {"tokens": int(self.moments["tokens"].sum()), "nonzeros": len(feature), **facts})


def _encode_shard(
    contexts: Contexts,
    dictionaries: dict[str, SparseDictionary],
    keys: dict[str, ShardKey],
    stages: dict[str, StageFolder],
    subject: SubjectModel,
    progress: Progress,
) -> dict[str, str]:
    """Encode one shard with every dictionary and commit it; returns those that had to be stopped, and why."""
    import torch

    started = time.monotonic()
    stopped: dict[str, str] = {}
    accumulators = {sae: _ShardAccumulator(dictionary, contexts) for sae, dictionary in dictionaries.items()}
    sites = {site for d in dictionaries.values() for site in (d.site_in, d.site_out)}
    length = contexts.tokens.shape[1]
    for rows in batches(contexts.tokens, BATCH_CONTEXTS):
        tokens = torch.from_numpy(contexts.tokens[rows]).long().to(subject.resolved_device)
        seen = capture(subject.model, tokens, sites)
        is_text = text_mask(contexts.tokens[rows], subject)
        positions = np.flatnonzero(is_text) + rows.start * length
        mask = torch.from_numpy(is_text).to(subject.resolved_device)
        flat = {site: acts_bsd[mask] for site, acts_bsd in seen.items()}
        for sae, accumulator in list(accumulators.items()):
            dictionary = dictionaries[sae]
            try:
                accumulator.add(flat[dictionary.site_in], flat[dictionary.site_out], positions)
            except ScopeAtlasError as error:  # a value that does not fit: this SAE's fault alone
                stopped[sae] = str(error)
                del accumulators[sae]
        progress.advance(int((contexts.tokens[rows] >= 0).sum()))
    facts = {
        "dtype": str(subject.resolved_dtype),
        "threads": torch.get_num_threads(),
        "device": subject.resolved_device.type,
        "seconds": round(time.monotonic() - started, 2),
    }
    for sae, accumulator in accumulators.items():
        accumulator.write(stages[sae], keys[sae], facts)
    return stopped


def text_mask(tokens: np.ndarray, subject: SubjectModel) -> np.ndarray:
    """Which positions [n, length] count in statistics: not padding (-1), not BOS or another special token."""
    return (tokens >= 0) & ~np.isin(tokens, subject.tokenizer.all_special_ids)
