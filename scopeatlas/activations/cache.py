"""The activation cache: one pass of the subject model over the corpus serves every SAE of the run.

What belongs here: the shared pass and its resumption. What does not: what is gathered and written of each SAE
(`accumulators.py`), the hooks (`subject/capture.py`), what fits into memory together (`memory.py`), what null features
are (`nulls.py`), what the figures mean (`fidelity.py`).
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from scopeatlas.activations.accumulators import NullAccumulator, ShardAccumulator
from scopeatlas.activations.memory import Footprint, PassPlan, footprint_of, free_memory, plan_pass
from scopeatlas.activations.nulls import Calibration, pending_nulls, read_null_features, write_null_features
from scopeatlas.activations.reading import BATCH_CONTEXTS, read_sites
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary, reopen_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.dictionaries.validation import check_fits
from scopeatlas.errors import DictionaryError, said
from scopeatlas.runner.local import LocalRunner, Log, Progress, silent
from scopeatlas.storage.files import content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import batches, capture
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 2


@dataclass(frozen=True)
class CacheResult:
    """What one run of the cache did. failed: sae key -> why it was left out. reused: nothing had to be done.

    forward_passes: batches of the corpus that the subject model was run on, however many SAEs shared each; what tries the
    sites beforehand, on two tokens for each SAE, and what calibrates null features are not among them. nulls_done: shards
    of null features, which are in none of the other counts of shards.
    """

    shards_done: int
    shards_reused: int
    tokens: int
    seconds: float
    forward_passes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    nulls_done: int = 0

    @property
    def reused(self) -> bool:
        return self.shards_done == self.nulls_done == 0


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

    Beside each SAE go its null features (`nulls.py`), which are made in the same passes; those of an SAE that is finished
    already cost a pass of their own. An SAE that cannot be loaded, does not fit its site or does not fit into memory is left out, named in `failed` and
    recorded in the store; the others go on. Cost: one forward pass to the last site per shard that any SAE still
    needs, times the number of chunks that memory makes necessary (one, as a rule; the plan is logged beforehand).
    """
    store.require_writable()
    calibration = Calibration(corpus, subject)
    pending, reused = _pending(store, corpus, entries, subject, calibration, unneeded)
    works = {work for wanted in pending.values() for work in wanted}
    failures = Failures(store)
    opened = _check_all([e for e in entries if e.key in {work.sae for work in works}], works, subject, failures, log)
    plan = _plan(store, corpus, pending, opened, subject, memory_bytes)
    for sae, reason in plan.refused.items():
        failures.add(_works_of(sae, works), reason)
    chunks = [[opened[sae][0] for sae in chunk] for chunk in plan.chunks]
    passes = [_Pass(store, corpus, chunk, subject, pending, calibration, failures) for chunk in chunks]
    total = sum(p.tokens for p in passes)
    if reused and total:
        to_do = [work.stage for p in passes for _, wanted in p.jobs for work in wanted]
        log(f"activation cache: {reused} shards are there already, {to_do.count('activations')} to do")
        if len(to_do) > 2 * to_do.count("activations"):
            log(f"activation cache: null features are missing on {to_do.count('nulls')} shards")
    for line in plan.lines() if total else ():
        log(f"activation cache: {line}")
    progress = Progress("activation cache", total, "tokens", log)
    done = [work.stage for p in passes for work in p.run(runner or LocalRunner(), progress)]
    forward_passes = sum(p.forward_passes for p in passes)
    if total:
        progress.finish()
        log(f"activation cache: {forward_passes:,} forward passes served {sum(len(c) for c in plan.chunks)} SAEs")
    return CacheResult(
        shards_done=done.count("activations"),
        shards_reused=reused,
        tokens=total,
        seconds=progress.seconds if total else 0.0,
        forward_passes=forward_passes,
        failed=failures.of_activations,
        nulls_done=done.count("nulls"),
    )


class Work(NamedTuple):
    """What is to be made of an SAE: its activations, or those of its null features."""

    sae: str
    stage: Literal["activations", "nulls"]


Pending = dict[ShardKey, dict[Work, ShardKey]]


def _works_of(sae: str, works: Iterable[Work]) -> list[Work]:
    return [work for work in works if work.sae == sae]


class Failures:
    """What could not be made, and why: named in the store, and left out of what follows.

    An SAE that fails takes its null features with it; null features fail alone.
    """

    NAMES = {"activations": "activation_cache", "nulls": "null_features"}

    def __init__(self, store: Store):
        self.store = store
        self._reasons: dict[Work, str] = {}

    @property
    def of_activations(self) -> dict[str, str]:
        """sae key -> why it has no activations."""
        return {work.sae: reason for work, reason in self._reasons.items() if work.stage == "activations"}

    def has(self, work: Work) -> bool:
        return work in self._reasons or work.sae in self.of_activations

    def add(self, works: Collection[Work], reason: str) -> None:
        self._reasons |= dict.fromkeys(works, reason)
        self.remember([*works, *(Work(work.sae, "nulls") for work in works)])

    def remember(self, works: Iterable[Work]) -> None:
        """Make the store say of `works` what is known by now."""
        for work in works:
            told = work.stage == "nulls" and work.sae in self.of_activations
            self.store.record_error(work.sae, self.NAMES[work.stage], None if told else self._reasons.get(work))

    @contextmanager
    def alone(self, *works: Work) -> Iterator[None]:
        """Whatever goes wrong inside is about these works alone."""
        try:
            yield
        except Exception as error:
            self.add(works, said(error))


def _pending(
    store: Store,
    corpus: Corpus,
    entries: Sequence[SaeEntry],
    subject: SubjectModel,
    calibration: Calibration,
    unneeded: Collection[str],
) -> tuple[Pending, int]:
    """Corpus shard -> what is still to be made there, with the key of each; and how many shards of activations are made."""
    pending: Pending = {}
    reused = 0
    for entry in entries:
        stage = store.stage(entry.key, corpus.id, "activations")
        for shard, key in zip(corpus.shards, activation_keys(corpus, entry, subject), strict=True):
            if stage.is_done(key, or_pruned=entry.key in unneeded):
                reused += 1
            else:
                pending.setdefault(shard, {})[Work(entry.key, "activations")] = key
        if entry.key in unneeded:
            continue
        missing = pending_nulls(store.stage(entry.key, corpus.id, "nulls"), calibration.keys(entry))
        for shard, key in zip(corpus.shards, missing, strict=True):
            if key is not None:
                pending.setdefault(shard, {})[Work(entry.key, "nulls")] = key
    return pending, reused


Opened = dict[str, tuple[SaeEntry, Footprint]]


def _check_all(
    entries: Sequence[SaeEntry], works: Collection[Work], subject: SubjectModel, failures: Failures, log: Log
) -> Opened:
    """Open every dictionary that the pass needs, one after the other; what cannot serve is among the failures."""
    opened: Opened = {}
    for entry in entries:
        mine = _works_of(entry.key, works)
        with failures.alone(*mine):
            dictionary = open_dictionary(entry)
            _try_sites(dictionary, entry, subject)
            opened[entry.key] = entry, footprint_of(dictionary)
            for note in dictionary.notes:
                log(f"activation cache: {entry.key}: {note}")
            failures.remember(mine)  # whatever was wrong with it before
    return opened


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
        saes = {work.sae for work in wanted if work.stage == "activations"} & opened.keys()
        contexts = len(corpus.contexts(shard)) if saes else 0
        for sae in saes:
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
        calibration: Calibration,
        failures: Failures,
    ):
        self.subject, self.calibration, self.failures = subject, calibration, failures
        self.entries = {entry.key: entry for entry in entries}
        self.jobs = [
            (corpus.contexts(shard), wanted)
            for shard in corpus.shards
            if (wanted := {work: key for work, key in pending.get(shard, {}).items() if work.sae in self.entries})
        ]
        self.works = list(dict.fromkeys(work for _, wanted in self.jobs for work in wanted))
        self.stages = {work: store.stage(work.sae, corpus.id, work.stage) for work in self.works}
        self.forward_passes = 0

    @property
    def tokens(self) -> int:
        return sum(int(contexts.lengths().sum()) for contexts, _ in self.jobs)

    def run(self, runner: LocalRunner, progress: Progress) -> list[Work]:
        """Encode every job; returns what was committed, once for each shard."""
        dictionaries = self._open()

        def encode(job: tuple[Contexts, dict[Work, ShardKey]]) -> list[Work]:
            contexts, wanted = job
            sound = {work: dictionaries[work] for work in wanted if work in dictionaries and not self.failures.has(work)}
            return self._encode_shard(contexts, sound, wanted, progress) if sound else []

        return [work for done in runner.map(encode, self.jobs) for work in done]

    def _open(self) -> dict[Work, SparseDictionary]:
        """What encodes each work; nothing for the null features of an SAE that has none."""
        opened: dict[Work, SparseDictionary] = {}
        for sae, entry in self.entries.items():
            mine = _works_of(sae, self.works)
            with self.failures.alone(*mine):
                opened |= dict.fromkeys(mine, reopen_dictionary(entry).to(self.subject.resolved_device))
        likes = {work: opened.pop(work) for work in self.works if work.stage == "nulls" and work in opened}
        keys = {work: self.calibration.keys(self.entries[work.sae]) for work in likes}
        undrawn = {work: like for work, like in likes.items() if not self.stages[work].is_done(keys[work].directions)}
        drawn, failed = self.calibration.draw(undrawn, keys)
        for work, error in failed.items():
            self.failures.add([work], said(error))
        for work, nulls in drawn.items():
            write_null_features(self.stages[work], keys[work].directions, nulls)
        for work in likes.keys() - failed.keys():
            nulls = read_null_features(self.stages[work], keys[work].directions)
            if len(nulls.matched):
                opened[work] = nulls.as_dictionary(likes[work])
        return opened

    def _encode_shard(
        self,
        contexts: Contexts,
        dictionaries: Mapping[Work, SparseDictionary],
        keys: Mapping[Work, ShardKey],
        progress: Progress,
    ) -> list[Work]:
        """Encode one shard with every dictionary and commit it; returns for which that went well."""
        import torch

        started = time.monotonic()
        accumulators: dict[Work, ShardAccumulator | NullAccumulator] = {}
        for work, dictionary in dictionaries.items():
            with self.failures.alone(work):
                accumulators[work] = (
                    NullAccumulator(dictionary) if work.stage == "nulls" else ShardAccumulator(dictionary, contexts)
                )
        sites = {site for accumulator in accumulators.values() for site in accumulator.sites}
        for rows in batches(contexts.tokens, BATCH_CONTEXTS):
            flat, positions = read_sites(contexts, rows, self.subject, sites)
            self.forward_passes += 1
            for work, accumulator in accumulators.items():
                with self.failures.alone(work):
                    accumulator.add(flat, positions)
            accumulators = {work: a for work, a in accumulators.items() if not self.failures.has(work)}
            progress.advance(int((contexts.tokens[rows] >= 0).sum()))
        facts: dict[str, object] = {
            "dtype": str(self.subject.resolved_dtype),
            "threads": torch.get_num_threads(),
            "device": self.subject.resolved_device.type,
            "seconds": round(time.monotonic() - started, 2),
        }
        for work, accumulator in accumulators.items():
            accumulator.write(self.stages[work], keys[work], facts)
        return list(accumulators)
