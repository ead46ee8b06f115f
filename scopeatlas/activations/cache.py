"""The activation cache: one pass of the subject model over the corpus serves every SAE of the run.

What belongs here: the shared pass and its resumption. What does not: the shard format (`shards.py`), the hooks
(`subject/capture.py`), what fits into memory together (`planning.py`), what the figures mean (`fidelity.py`).
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.memory import Footprint, PassPlan, footprint_of, free_memory, plan_pass
from scopeatlas.activations.shards import round_values, write_shard
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary, reopen_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.dictionaries.validation import check_fits
from scopeatlas.errors import DictionaryError, said
from scopeatlas.runner.local import LocalRunner, Log, Progress, silent
from scopeatlas.storage.files import atomic_path, content_hash
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel

if TYPE_CHECKING:
    import torch

    from scopeatlas.subject.sites import Site

STAGE_VERSION = 2
BATCH_CONTEXTS = 16


@dataclass(frozen=True)
class CacheResult:
    """What one run of the cache did. failed: sae key -> why it was left out. reused: nothing had to be done.

    forward_passes: batches of the corpus that the subject model was run on, however many SAEs shared each; what tries the
    sites beforehand, on two tokens for each SAE, is not among them.
    """

    shards_done: int
    shards_reused: int
    tokens: int
    seconds: float
    forward_passes: int = 0
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
    memory_bytes: int | None = None,
    runner: LocalRunner | None = None,
    log: Log = silent,
) -> CacheResult:
    """Encode every pending (SAE, shard) and commit each; finished ones are not touched.

    unneeded: SAE keys of which nothing downstream wants activations any more; their pruned shards stay pruned.
    memory_bytes: what may be used on the subject model's device; None takes what is free.

    An SAE that cannot be loaded, does not fit its site or does not fit into memory is left out, named in `failed` and
    recorded in the store; the others go on. Cost: one forward pass to the last site per shard that any SAE still
    needs, times the number of chunks that memory makes necessary (one, as a rule; the plan is logged beforehand).
    """
    store.require_writable()
    pending, reused = _pending(store, corpus, entries, subject, unneeded)
    needed = {key for wanted in pending.values() for key in wanted}
    opened, failed = _check_all(store, [e for e in entries if e.key in needed], subject, log)
    plan = _plan(store, corpus, pending, opened, subject, memory_bytes)
    for sae, reason in plan.refused.items():
        failed[sae] = reason
        store.record_error(sae, "activation_cache", reason)
    passes = [_Pass(store, corpus, [opened[sae][0] for sae in chunk], subject, pending, failed) for chunk in plan.chunks]
    total = sum(p.tokens for p in passes)
    if reused and total:
        log(f"activation cache: {reused} shards are there already, {sum(p.shards for p in passes)} to do")
    for line in plan.lines() if total else ():
        log(f"activation cache: {line}")
    progress = Progress("activation cache", total, "tokens", log)
    done = sum(p.run(runner or LocalRunner(), progress) for p in passes)
    forward_passes = sum(p.forward_passes for p in passes)
    if total:
        progress.finish()
        log(f"activation cache: {forward_passes:,} forward passes served {sum(len(c) for c in plan.chunks)} SAEs")
    return CacheResult(done, reused, total, progress.seconds if total else 0.0, forward_passes, failed)


Pending = dict[ShardKey, dict[str, ShardKey]]


def _pending(
    store: Store, corpus: Corpus, entries: Sequence[SaeEntry], subject: SubjectModel, unneeded: Collection[str]
) -> tuple[Pending, int]:
    """Corpus shard -> SAE -> its activation shard, of those still to be made; and how many are made."""
    pending: Pending = {}
    reused = 0
    for entry in entries:
        stage = store.stage(entry.key, corpus.id, "activations")
        for shard, key in zip(corpus.shards, activation_keys(corpus, entry, subject), strict=True):
            if stage.is_done(key, or_pruned=entry.key in unneeded):
                reused += 1
            else:
                pending.setdefault(shard, {})[entry.key] = key
    return pending, reused


Opened = dict[str, tuple[SaeEntry, Footprint]]


def _check_all(store: Store, entries: Sequence[SaeEntry], subject: SubjectModel, log: Log) -> tuple[Opened, dict[str, str]]:
    """Open every dictionary that the pass needs, one after the other; those that cannot serve are named with the reason."""
    opened: Opened = {}
    failed: dict[str, str] = {}
    for entry in entries:
        try:
            dictionary = open_dictionary(entry)
            _try_sites(dictionary, entry, subject)
            opened[entry.key] = entry, footprint_of(dictionary)
            for note in dictionary.notes:
                log(f"activation cache: {entry.key}: {note}")
        except Exception as error:  # whatever it is, it is about this SAE alone
            failed[entry.key] = said(error)
        store.record_error(entry.key, "activation_cache", failed.get(entry.key))
    return opened, failed


def _try_sites(dictionary: SparseDictionary, entry: SaeEntry, subject: SubjectModel) -> None:
    """Run one short context, so that a site or size that does not fit is an error before any real work."""
    import torch

    if not subject.matches(dictionary.model_name):
        raise DictionaryError(
            f"{entry.folder}: was trained on {dictionary.model_name}, and the subject model is {subject.name}; run it in a "
            "scenario of its own model, or add the name to subject.serves"
        )
    probe = torch.tensor([[subject.tokenizer.bos_token_id or 0, 1]], device=subject.resolved_device)
    sizes = {site: acts.shape[-1] for site, acts in capture(subject.model, probe, dictionary.sites).items()}
    check_fits(dictionary, sizes, entry.folder, subject.name)


def _plan(
    store: Store, corpus: Corpus, pending: Pending, opened: Opened, subject: SubjectModel, memory_bytes: int | None
) -> PassPlan:
    length = corpus.facts["context_length"]
    tokens = {sae: 0 for sae in opened}
    for shard, wanted in pending.items():
        contexts = len(corpus.contexts(shard)) if wanted.keys() & opened.keys() else 0
        for sae in wanted.keys() & opened.keys():
            tokens[sae] += contexts * length
    return plan_pass(
        {sae: footprint for sae, (_, footprint) in opened.items()},
        tokens=tokens,
        batch_tokens=BATCH_CONTEXTS * length,
        shard_tokens=max((len(corpus.contexts(shard)) * length for shard in pending), default=0),
        device=str(subject.resolved_device),
        available=free_memory(subject.resolved_device) if memory_bytes is None else memory_bytes,
        store=store.root,
    )


class _Pass:
    """One pass of the subject model over the shards that a chunk of SAEs still needs."""

    def __init__(
        self,
        store: Store,
        corpus: Corpus,
        entries: Sequence[SaeEntry],
        subject: SubjectModel,
        pending: Pending,
        failed: dict[str, str],
    ):
        self.store, self.subject, self.failed = store, subject, failed
        self.entries = {entry.key: entry for entry in entries}
        self.stages = {sae: store.stage(sae, corpus.id, "activations") for sae in self.entries}
        self.jobs = [
            (corpus.contexts(shard), wanted)
            for shard in corpus.shards
            if (wanted := {sae: key for sae, key in pending.get(shard, {}).items() if sae in self.entries})
        ]
        self.forward_passes = 0

    @property
    def shards(self) -> int:
        return sum(len(wanted) for _, wanted in self.jobs)

    @property
    def tokens(self) -> int:
        return sum(int(contexts.lengths().sum()) for contexts, _ in self.jobs)

    def run(self, runner: LocalRunner, progress: Progress) -> int:
        """Encode every job; returns how many shards were committed."""
        dictionaries: dict[str, SparseDictionary] = {}
        for sae, entry in self.entries.items():
            with self._alone(sae):
                dictionaries[sae] = reopen_dictionary(entry).to(self.subject.resolved_device)

        def encode(job: tuple[Contexts, dict[str, ShardKey]]) -> int:
            contexts, wanted = job
            sound = {sae: dictionaries[sae] for sae in wanted if sae in dictionaries and sae not in self.failed}
            return self._encode_shard(contexts, sound, wanted, progress) if sound else 0

        return sum(runner.map(encode, self.jobs))

    def _encode_shard(
        self,
        contexts: Contexts,
        dictionaries: Mapping[str, SparseDictionary],
        keys: Mapping[str, ShardKey],
        progress: Progress,
    ) -> int:
        """Encode one shard with every dictionary and commit it; returns for how many that went well."""
        import torch

        started = time.monotonic()
        accumulators: dict[str, _ShardAccumulator] = {}
        for sae, dictionary in dictionaries.items():
            with self._alone(sae):
                accumulators[sae] = _ShardAccumulator(dictionary, contexts)
        sites = {site for dictionary in dictionaries.values() for site in dictionary.sites}
        for rows in batches(contexts.tokens, BATCH_CONTEXTS):
            flat, positions = self._activations(contexts, rows, sites)
            for sae, accumulator in accumulators.items():
                with self._alone(sae):
                    accumulator.add(flat, positions)
            accumulators = {sae: a for sae, a in accumulators.items() if sae not in self.failed}
            progress.advance(int((contexts.tokens[rows] >= 0).sum()))
        facts: dict[str, object] = {
            "dtype": str(self.subject.resolved_dtype),
            "threads": torch.get_num_threads(),
            "device": self.subject.resolved_device.type,
            "seconds": round(time.monotonic() - started, 2),
        }
        for sae, accumulator in accumulators.items():
            accumulator.write(self.stages[sae], keys[sae], facts)
        return len(accumulators)

    @contextmanager
    def _alone(self, sae: str) -> Iterator[None]:
        """Whatever goes wrong inside is about this SAE alone: it is named, remembered and left out of what follows."""
        try:
            yield
        except Exception as error:
            self.failed[sae] = said(error)
            self.store.record_error(sae, "activation_cache", said(error))

    def _activations(
        self, contexts: Contexts, rows: slice, sites: "Collection[Site]"
    ) -> "tuple[dict[Site, torch.Tensor], np.ndarray]":
        """The activations [tokens, d] of a batch at each site, unmasked tokens only, and their places in the shard."""
        import torch

        device = self.subject.resolved_device
        seen = capture(self.subject.model, torch.from_numpy(contexts.tokens[rows]).long().to(device), sites)
        self.forward_passes += 1
        is_text = text_mask(contexts, self.subject)[rows]
        mask = torch.from_numpy(is_text).to(device)
        positions = np.flatnonzero(is_text) + rows.start * contexts.tokens.shape[1]
        return {site: acts_bsd[mask] for site, acts_bsd in seen.items()}, positions


class _ShardAccumulator:
    """One SAE's non-zeros and, per split and output site, moments over one shard."""

    def __init__(self, dictionary: SparseDictionary, contexts: Contexts):
        self.dictionary, self.contexts = dictionary, contexts
        self.scale = dictionary.value_scale
        self.columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        n, outputs = len(SPLITS), len(dictionary.sites_out)
        self.moments = {
            "tokens": np.zeros(n, dtype=np.int64),
            "nonzeros": np.zeros(n, dtype=np.int64),
            "sum_y": np.zeros((n, outputs, dictionary.d_out)),
            "sum_y2": np.zeros((n, outputs)),
            "sum_error2": np.zeros((n, outputs)),
        }

    def add(self, flat: "Mapping[Site, torch.Tensor]", positions: np.ndarray) -> None:
        """flat: unmasked activations [tokens, d] at every site; positions: their places in the shard."""
        x = [flat[site] for site in self.dictionary.sites_in]
        acts = self.dictionary.encode(x, max_l0=self.dictionary.plausible_l0)
        y_tod = self.dictionary.decode(acts, x).view(len(positions), len(self.dictionary.sites_out), self.dictionary.d_out)
        token = acts.token.cpu().numpy()
        split = self.contexts.splits[positions // self.contexts.tokens.shape[1]]
        present = [(index, split == index) for index in np.unique(split)]
        for index, mine in present:
            self.moments["tokens"][index] += mine.sum()
            self.moments["nonzeros"][index] += mine[token].sum()
        for output, site in enumerate(self.dictionary.sites_out):
            target = flat[site].float()
            error2 = (target - y_tod[:, output]).double().square().sum(1).cpu().numpy()
            targets = target.double().cpu().numpy()
            for index, mine in present:
                self.moments["sum_y"][index, output] += targets[mine].sum(axis=0)
                self.moments["sum_y2"][index, output] += np.square(targets[mine]).sum()
                self.moments["sum_error2"][index, output] += error2[mine].sum()
        # Evidence is of features that fire: what a signed dictionary makes negative, and what 16 bits round to nothing,
        # counts in the moments alone.
        rounded = round_values(acts.value.cpu().numpy(), self.scale)
        fires = rounded > 0
        feature = acts.feature.cpu().numpy()[fires].astype(np.uint32)
        self.columns.append((feature, positions[token[fires]].astype(np.uint32), rounded[fires]))

    def write(self, stage: StageFolder, key: ShardKey, facts: dict[str, object]) -> None:
        feature, token, rounded = (np.concatenate(column) for column in zip(*self.columns, strict=True))
        data, moments = stage.data_path(key, ".parquet"), stage.data_path(key, ".moments.npz")
        write_shard(data, feature, token, rounded, scale=self.scale)
        with atomic_path(moments) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **self.moments)
        stage.commit(key, [data, moments], {"tokens": int(self.moments["tokens"].sum()), "nonzeros": len(feature), **facts})


def text_mask(contexts: Contexts, subject: SubjectModel) -> np.ndarray:
    """Which positions [n, length] count in statistics: not padding, BOS (where a model has none, the first token), another
    special token or a chat template's."""
    counted = contexts.counted(subject.tokenizer.all_special_ids)
    if subject.tokenizer.bos_token_id is None:
        counted[:, 0] = False  # what BOS is elsewhere: the first token's norm is an outlier that no SAE was trained on
    return counted
