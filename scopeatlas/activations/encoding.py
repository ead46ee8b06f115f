"""Encoding one shard of a corpus for every SAE of a shared pass: what a worker does, wherever it runs.

What belongs here: the description of that work, which may travel to another process, and the work itself. What does not: what is
pending and which SAEs share a pass (`cache.py`), what is gathered and written of each SAE (`accumulators.py`).
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from scopeatlas.activations.accumulators import NullAccumulator, ShardAccumulator
from scopeatlas.activations.nulls import read_null_features
from scopeatlas.activations.reading import read_batches
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.dictionaries.releases import SaeEntry, reopen_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import SubjectModelError, said
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import Precision, SubjectModel


class Product(NamedTuple):
    """What is to be made of an SAE: its activations, or those of its null features."""

    sae: str
    stage: Literal["activations", "nulls"]


@dataclass(frozen=True)
class Job:
    """A shard of the corpus, and what is to be made there, with the key of each."""

    shard: ShardKey
    wanted: Mapping[Product, ShardKey]

    def __str__(self) -> str:
        return self.shard.name


@dataclass(frozen=True)
class Encoded:
    """What a worker did with one shard. failed: why, of all that it has given up until now. tokens: run through the model."""

    committed: tuple[Product, ...]
    failed: Mapping[Product, str] = field(default_factory=dict)
    tokens: int = 0
    forward_passes: int = 0


class Failures:
    """What could not be made, and why. An SAE that fails takes its null features with it; null features fail alone."""

    def __init__(self) -> None:
        self.reasons: dict[Product, str] = {}

    def has(self, product: Product) -> bool:
        return product in self.reasons or Product(product.sae, "activations") in self.reasons

    def add(self, products: Collection[Product], reason: str) -> None:
        self.reasons |= dict.fromkeys(products, reason)

    @contextmanager
    def alone(self, *products: Product) -> Iterator[None]:
        """Whatever goes wrong inside is about these alone."""
        try:
            yield
        except Exception as error:
            self.add(products, said(error))


@dataclass(frozen=True)
class Encoding:
    """One pass of the subject model for some SAEs over shards of a corpus, as a runner's work on `Job`s.

    products: all that is made on any shard. directions: of each SAE with null features among them, the key of their
    directions, which are in the store. identity: that of the subject model, which a worker elsewhere must find again.
    """

    store: Store
    corpus: Corpus
    entries: tuple[SaeEntry, ...]
    products: tuple[Product, ...]
    directions: Mapping[str, ShardKey]
    subject: SubjectModel
    identity: str = ""

    def open(self, device: str | None) -> Callable[[Job], Encoded]:
        """Raises SubjectModelError if the model cannot be loaded, or is another than where the work comes from."""
        subject = self.subject if device is None else replace(self.subject, device=device)
        _ = subject.model
        if self.identity and subject.identity != self.identity:
            raise SubjectModelError(
                f"{subject.name} is not the same model here as where the run was started; set subject.revision to a commit, or "
                "give all machines the same files"
            )
        return _Encoder(self, subject).encode

    def __getstate__(self) -> dict[str, object]:
        """What travels: nothing that is loaded, no path relative to this process' folder, the precision decided here."""
        precision: Precision = "bfloat16" if "bfloat16" in str(self.subject.resolved_dtype) else "float32"
        name = str(Path(self.subject.name).absolute()) if Path(self.subject.name).exists() else self.subject.name
        subject = replace(self.subject, name=name, cache=self.subject.cache.absolute(), precision=precision)
        store = Store(self.store.root.absolute())
        entries = tuple(replace(entry, root=str(Path(entry.root).absolute())) for entry in self.entries)
        corpus = replace(self.corpus, folder=self.corpus.folder.absolute())
        here: dict[str, object] = {"store": store, "corpus": corpus, "entries": entries, "subject": subject}
        return {**self.__dict__, **here, "identity": replace(subject).identity}


class _Encoder:
    """A worker with its subject model and dictionaries loaded. What fails once is not tried on its later shards."""

    def __init__(self, work: Encoding, subject: SubjectModel):
        self.work, self.subject = work, subject
        self.failures = Failures()
        self.dictionaries: dict[Product, SparseDictionary] = {}
        for entry in work.entries:
            mine = [product for product in work.products if product.sae == entry.key]
            with self.failures.alone(*mine):
                self._open(entry, mine)

    def _stage(self, product: Product) -> StageFolder:
        return self.work.store.stage(product.sae, self.work.corpus.id, product.stage)

    def _open(self, entry: SaeEntry, products: Collection[Product]) -> None:
        """Load what encodes each product of an SAE; nothing for the null features of one that has none."""
        dictionary = reopen_dictionary(entry).to(self.subject.resolved_device)
        for product in products:
            if product.stage == "activations":
                self.dictionaries[product] = dictionary
                continue
            with self.failures.alone(product):
                nulls = read_null_features(self._stage(product), self.work.directions[entry.key])
                if len(nulls.matched):
                    self.dictionaries[product] = nulls.as_dictionary(dictionary)

    def encode(self, job: Job) -> Encoded:
        """Encode one shard with every dictionary that is wanted there, and commit it.

        What is committed already, by a worker that was lost before it could say so, is left as it is.
        """
        sound = [product for product in job.wanted if product in self.dictionaries and not self.failures.has(product)]
        there = tuple(product for product in sound if self._stage(product).is_done(job.wanted[product]))
        missing = [product for product in sound if product not in there]
        if not missing:
            return Encoded(there, dict(self.failures.reasons))
        contexts = self.work.corpus.contexts(job.shard)
        made, forward_passes = self._encode(contexts, missing, job.wanted)
        return Encoded(there + made, dict(self.failures.reasons), int(contexts.lengths().sum()), forward_passes)

    def _encode(
        self, contexts: Contexts, products: Collection[Product], keys: Mapping[Product, ShardKey]
    ) -> tuple[tuple[Product, ...], int]:
        """Encode and commit; returns for which that went well, and how many forward passes it took."""
        import torch

        started = time.monotonic()
        forward_passes = 0
        accumulators: dict[Product, ShardAccumulator | NullAccumulator] = {}
        with ExitStack() as opened:
            for product in products:
                with self.failures.alone(product):
                    dictionary = self.dictionaries[product]
                    is_null = product.stage == "nulls"
                    accumulators[product] = NullAccumulator(dictionary) if is_null else ShardAccumulator(dictionary, contexts)
                    opened.callback(accumulators[product].close)
            if not accumulators:
                return (), 0
            sites = {site for accumulator in accumulators.values() for site in accumulator.sites}
            for batch in read_batches(contexts, self.subject, sites):
                forward_passes += 1
                for product, accumulator in accumulators.items():
                    with self.failures.alone(product):
                        accumulator.add(batch)
                accumulators = {product: a for product, a in accumulators.items() if not self.failures.has(product)}
                if not accumulators:
                    return (), forward_passes
            facts: dict[str, object] = {
                "dtype": str(self.subject.resolved_dtype),
                "threads": torch.get_num_threads(),
                "device": self.subject.resolved_device.type,
                "seconds": round(time.monotonic() - started, 2),
            }
            for product, accumulator in accumulators.items():
                with self.failures.alone(product):
                    accumulator.write(self._stage(product), keys[product], facts)
        return tuple(product for product in accumulators if not self.failures.has(product)), forward_passes
