"""The activation cache: one pass of the subject model over the corpus serves every SAE of the run.

What belongs here: what is pending, which SAEs share a pass, and what became of them. What does not: encoding a shard
(`encoding.py`), where that is done (`runner/`), what fits into memory together (`memory.py`), what null features are
(`nulls.py`), what the figures mean (`fidelity.py`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scopeatlas.activations.encoding import Encoded, Encoding, Failures, Job, Product
from scopeatlas.activations.memory import Footprint, PassPlan, footprint_of, free_memory, plan_pass
from scopeatlas.activations.nulls import Calibration, pending_nulls, write_null_features
from scopeatlas.corpus.build import Corpus
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary, reopen_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.dictionaries.validation import check_fits
from scopeatlas.errors import DictionaryError, said
from scopeatlas.runner.local import LocalRunner, Log, Progress, silent
from scopeatlas.runner.work import ShardRunner
from scopeatlas.storage.files import content_hash
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import capture
from scopeatlas.subject.loading import SubjectModel

STAGE_VERSION = 3


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
    determined = (STAGE_VERSION, subject.batch_tokens, entry.hashes, subject.identity, str(subject.resolved_dtype))
    return [ShardKey(shard.name, content_hash(shard.identity, *determined)) for shard in corpus.shards]


def cache_activations(
    store: Store,
    corpus: Corpus,
    entries: Sequence[SaeEntry],
    subject: SubjectModel,
    *,
    unneeded: Collection[str] = (),
    memory_bytes: int | None = None,
    runner: ShardRunner | None = None,
    log: Log = silent,
) -> CacheResult:
    """Encode every pending (SAE, shard) and commit each; finished ones are not touched.

    unneeded: SAE keys of which nothing downstream wants activations any more; their pruned shards stay pruned.
    memory_bytes: what may be used beside the subject model on its device, by each of the runner's workers; None takes what is
    free. runner: where shards are encoded, in this process by default; the bytes do not depend on it, as long as device,
    precision and torch's threads are the same.

    Beside each SAE go its null features (`nulls.py`), which are made in the same passes; those of an SAE that is finished
    already cost a pass of their own. An SAE that cannot be loaded, does not fit its site or does not fit into memory is left
    out, named in `failed` and recorded in the store; the others go on. Cost: one forward pass to the last site per shard that
    any SAE still needs, times the number of chunks that memory makes necessary (one, as a rule; the plan is logged
    beforehand). Raises RunnerError if a shard cannot be encoded at all; what was committed by then is not done again.
    """
    store.require_writable()
    runner = runner or LocalRunner()
    calibration = Calibration(corpus, subject)
    pending, reused = _pending(store, corpus, entries, subject, calibration, unneeded)
    products = {product for wanted in pending.values() for product in wanted}
    failures = _RecordedFailures(store)
    opened = _check_all([e for e in entries if e.key in {p.sae for p in products}], products, subject, failures, log)
    if not opened:
        return CacheResult(0, reused, 0, 0.0, failed=failures.of_activations)
    tokens = {shard: int(corpus.contexts(shard).lengths().sum()) for shard in pending}
    available = _available(subject, runner) if memory_bytes is None else memory_bytes
    plan = _plan(store, pending, tokens, opened, subject, device=runner.device, available=available)
    for sae, reason in plan.refused.items():
        failures.add(_products_of(sae, products), reason)
    passes = [([opened[sae][0] for sae in chunk], _jobs(corpus, chunk, pending)) for chunk in plan.chunks]
    total = sum(tokens[job.shard] for _, jobs in passes for job in jobs)
    for line in _announced(plan, [job for _, jobs in passes for job in jobs], reused):
        log(f"activation cache: {line}")
    progress = Progress("activation cache", total, "tokens", log)
    done: list[Encoded] = []
    for chunk, jobs in passes:
        made = tuple(dict.fromkeys(product for job in jobs for product in job.wanted))
        directions = _draw_nulls(store, corpus, chunk, made, subject, calibration, failures)
        if runner.device is not None:
            _give_back_memory()
        sound = tuple(product for product in made if not failures.has(product))
        work = Encoding(store, corpus, tuple(chunk), sound, directions, subject)
        for encoded in runner.map(work, jobs):
            done.append(encoded)
            failures.learn(encoded.failed)
            progress.advance(encoded.tokens)
    forward_passes = sum(encoded.forward_passes for encoded in done)
    if total:
        progress.finish()
        log(f"activation cache: {forward_passes:,} forward passes served {sum(len(chunk) for chunk in plan.chunks)} SAEs")
    stages = [product.stage for encoded in done for product in encoded.committed]
    return CacheResult(
        shards_done=stages.count("activations"),
        shards_reused=reused,
        tokens=total,
        seconds=progress.seconds if total else 0.0,
        forward_passes=forward_passes,
        failed=failures.of_activations,
        nulls_done=stages.count("nulls"),
    )


Pending = dict[ShardKey, dict[Product, ShardKey]]


def _products_of(sae: str, products: Iterable[Product]) -> list[Product]:
    return [product for product in products if product.sae == sae]


class _RecordedFailures(Failures):
    """What could not be made, named in the store as well."""

    NAMES = {"activations": "activation_cache", "nulls": "null_features"}

    def __init__(self, store: Store):
        super().__init__()
        self.store = store

    @property
    def of_activations(self) -> dict[str, str]:
        """sae key -> why it has no activations."""
        return {product.sae: reason for product, reason in self.reasons.items() if product.stage == "activations"}

    def add(self, products: Collection[Product], reason: str) -> None:
        super().add(products, reason)
        self.remember([*products, *(Product(product.sae, "nulls") for product in products)])

    def learn(self, reasons: Mapping[Product, str]) -> None:
        """Add what a worker has given up; what was known before keeps its reason."""
        for product, reason in reasons.items():
            if not self.has(product):
                self.add([product], reason)

    def remember(self, products: Iterable[Product]) -> None:
        """Make the store say of `products` what is known by now."""
        for product in products:
            told = product.stage == "nulls" and product.sae in self.of_activations
            self.store.record_error(product.sae, self.NAMES[product.stage], None if told else self.reasons.get(product))


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
                pending.setdefault(shard, {})[Product(entry.key, "activations")] = key
        if entry.key in unneeded:
            continue
        missing = pending_nulls(store.stage(entry.key, corpus.id, "nulls"), calibration.keys(entry))
        for shard, key in zip(corpus.shards, missing, strict=True):
            if key is not None:
                pending.setdefault(shard, {})[Product(entry.key, "nulls")] = key
    return pending, reused


Opened = dict[str, tuple[SaeEntry, Footprint]]


def _check_all(
    entries: Sequence[SaeEntry], products: Collection[Product], subject: SubjectModel, failures: _RecordedFailures, log: Log
) -> Opened:
    """Open every dictionary that the pass needs, one after the other; what cannot serve is among the failures."""
    opened: Opened = {}
    for entry in entries:
        mine = _products_of(entry.key, products)
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
    store: Store,
    pending: Pending,
    tokens: Mapping[ShardKey, int],
    opened: Opened,
    subject: SubjectModel,
    *,
    device: str | None,
    available: int,
) -> PassPlan:
    """tokens: of each shard. device: of the runner's workers, None for the subject model's own."""
    of_sae = {
        sae: sum(tokens[shard] for shard, wanted in pending.items() if Product(sae, "activations") in wanted) for sae in opened
    }
    return plan_pass(
        {sae: footprint for sae, (_, footprint) in opened.items()},
        tokens=of_sae,
        batch_tokens=subject.batch_tokens,
        shard_tokens=max(tokens.values()),
        device=device or str(subject.resolved_device),
        available=available,
        store=store.root,
    )


class _FreeMemory:
    """Work that says how many bytes are free where it is done."""

    def open(self, device: str | None) -> Callable[[str], int]:
        import torch

        return lambda _: free_memory(torch.device(device or "cpu"))


def _available(subject: SubjectModel, runner: ShardRunner) -> int:
    """Bytes for the SAEs of a pass: what is free beside the subject model, in this process or on one of the runner's workers."""
    if runner.device is None:
        return free_memory(subject.resolved_device)
    (free,) = runner.map(_FreeMemory(), ["of measuring free memory"])
    model = sum(parameter.nbytes for parameter in subject.model.parameters())
    return max(0, free // runner.sharing - model)


def _jobs(corpus: Corpus, saes: Collection[str], pending: Pending) -> list[Job]:
    """What is pending of some SAEs, shard by shard."""
    jobs = [Job(shard, {p: key for p, key in pending.get(shard, {}).items() if p.sae in saes}) for shard in corpus.shards]
    return [job for job in jobs if job.wanted]


def _announced(plan: PassPlan, jobs: Sequence[Job], reused: int) -> Iterator[str]:
    """What is about to be done, before it is; nothing if it is nothing."""
    stages = [product.stage for job in jobs for product in job.wanted]
    if stages and reused:
        yield f"{reused} shards are there already, {stages.count('activations')} to do"
        if len(stages) > 2 * stages.count("activations"):
            yield f"null features are missing on {stages.count('nulls')} shards"
    if stages:
        yield from plan.lines()


def _give_back_memory() -> None:
    """Let workers have what this process was using on a GPU, which torch would keep for itself."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _draw_nulls(
    store: Store,
    corpus: Corpus,
    entries: Sequence[SaeEntry],
    products: Collection[Product],
    subject: SubjectModel,
    calibration: Calibration,
    failures: Failures,
) -> dict[str, ShardKey]:
    """Draw null directions where they are wanted and not there: once, before any worker reads them. Their keys, by SAE."""
    wanted = [entry for entry in entries if Product(entry.key, "nulls") in products]
    stages = {entry.key: store.stage(entry.key, corpus.id, "nulls") for entry in wanted}
    keys = {entry.key: calibration.keys(entry) for entry in wanted}
    likes: dict[str, SparseDictionary] = {}
    for entry in wanted:
        if not stages[entry.key].is_done(keys[entry.key].directions):
            with failures.alone(*_products_of(entry.key, products)):
                likes[entry.key] = reopen_dictionary(entry).to(subject.resolved_device)
    drawn, failed = calibration.draw(likes, keys)
    for sae, error in failed.items():
        failures.add([Product(sae, "nulls")], said(error))
    for sae, nulls in drawn.items():
        write_null_features(stages[sae], keys[sae].directions, nulls)
    return {sae: mine.directions for sae, mine in keys.items()}
