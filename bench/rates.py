"""The rates that `scopeatlas plan` turns operations into hours with, measured on this machine by running the stages.

    .venv/bin/python -m bench.rates --config configs/demo.yaml

Draws a small corpus of the scenario's text into a temporary store and runs the stages over one of its SAEs: the language
model and the encoder's product alone first, then the stages around them. Writes rates.json into the scenario's store. On a
CPU, CPU seconds are counted, so that other processes on the machine do not matter: the two products have them shared by the
threads, everything else takes them as if it had one thread. On an accelerator seconds are the clock's. --labels goes on to
labels, scores and index, which takes minutes more.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.scenario import load_scenario
from resources.subject import SubjectResource
from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.fidelity import measure_fidelity
from scopeatlas.atlas.stage import index_features
from scopeatlas.corpus.build import Corpus, build_corpus
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.labels.stage import label_features
from scopeatlas.listings import shape_of_config
from scopeatlas.mining.examples import examples_key, mine_examples
from scopeatlas.rates import FILE, Rates, write_rates
from scopeatlas.scoring.stage import score_labels
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import capture, counting_passes
from scopeatlas.subject.loading import SubjectModel

BATCH = 16
ROUNDS = 3
LATER_STAGES = ("nulls", "labels", "scores", "publication")


@dataclass(frozen=True)
class Bench:
    """What is measured: one SAE on one corpus in a store that is thrown away."""

    store: Store
    corpus: Corpus
    entry: SaeEntry
    subject: SubjectModel
    context_length: int
    threads: int

    def seconds(self, work: Callable[[], object]) -> float:
        """CPU seconds of all threads, or seconds of the clock on an accelerator, for `work`."""
        if self.subject.resolved_device.type == "cpu":
            started = time.process_time()
            work()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def products(self) -> tuple[float, float]:
        """Operations in one of `seconds` of the language model to the SAE's last site, and of its encoder's product."""
        dictionary = open_dictionary(self.entry)
        layers = 1 + max(site.layer for site in dictionary.sites)
        vocabulary = self.subject.config.vocab_size
        tokens = torch.randint(vocabulary, (BATCH, self.context_length), device=self.subject.resolved_device)
        x = torch.randn(tokens.numel(), dictionary.d_in, device=self.subject.resolved_device)
        w_enc = dictionary.layers[0].w_enc.to(x.device, torch.float32)
        model = self.subject.model

        def fastest(work: Callable[[], object]) -> float:
            work()
            return median(self.seconds(work) for _ in range(ROUNDS))

        layer = shape_of_config(self.subject.config).layer_flop(self.context_length)
        lm = fastest(lambda: capture(model, tokens, dictionary.sites))
        encoder = fastest(lambda: [x @ w_enc for _ in range(4)]) / 4
        return layers * tokens.numel() * layer / lm, 2 * x.numel() * w_enc.shape[1] / encoder


def measure(bench: Bench, *, chain: Callable[[], object] | None) -> Rates:
    """All rates; chain: runs labels, scores and index, where they are wanted too."""
    dictionary = open_dictionary(bench.entry)
    print("language model and encoder alone", flush=True)
    lm_flop, encoder_flop = bench.products()
    print("activation_cache", flush=True)
    with counting_passes() as run:
        caching = bench.seconds(lambda: cache_activations(bench.store, bench.corpus, [bench.entry], bench.subject))
    keys = activation_keys(bench.corpus, bench.entry, bench.subject)
    stage = bench.store.stage(bench.entry.key, bench.corpus.id, "activations")
    records = [stage.record(key) for key in keys]
    nonzeros = sum(record.facts["nonzeros"] for record in records)
    layer = shape_of_config(bench.subject.config).layer_flop(bench.context_length)
    layers = 1 + max(site.layer for site in dictionary.sites)
    encoded = 2 * dictionary.d_in * dictionary.width * bench.corpus.facts["tokens"]
    rest = caching - run.tokens * layers * layer / lm_flop - encoded / encoder_flop

    def mine() -> None:
        mine_examples(bench.store, bench.corpus, bench.entry, bench.subject)

    print("feature_examples, twice", flush=True)
    mining = bench.seconds(mine)
    examples = bench.store.stage(bench.entry.key, bench.corpus.id, "examples")
    examples.discard(examples.record(examples_key(bench.corpus, bench.entry, bench.subject)))
    cutting = bench.seconds(mine)  # the sketches are still there
    labelling = bench.seconds(chain) if chain else None
    together = bench.threads if bench.subject.resolved_device.type == "cpu" else 1
    place = ("saes", bench.entry.key, bench.corpus.id)
    return Rates(
        machine=_machine(bench.subject, bench.threads),
        subject=f"{bench.subject.name} in {str(bench.subject.resolved_dtype).removeprefix('torch.')}",
        lm_flop=lm_flop * together,
        encoder_flop=encoder_flop * together,
        cached_nonzeros=nonzeros / rest if rest > 0 else None,
        sketched_nonzeros=nonzeros / (mining - cutting) if mining > cutting else None,
        example_features=dictionary.width / cutting,
        labelled_features=None if labelling is None else dictionary.width / labelling,
        bytes_per_nonzero=sum(record.files[f"{record.key.stem}.parquet"]["bytes"] for record in records) / nonzeros,
        example_bytes=bench.store.bytes_used(*place, "examples") / dictionary.width,
        index_bytes=None if chain is None else _later_bytes(bench.store, place) / dictionary.width,
    )


def _later_bytes(store: Store, place: tuple[str, ...]) -> int:
    """Bytes of all that comes after the examples."""
    stages = sum(store.bytes_used(*place, stage) for stage in LATER_STAGES)
    return stages + store.bytes_used("atlas") + store.bytes_used("embeddings")


def _machine(subject: SubjectModel, threads: int) -> str:
    if subject.resolved_device.type == "cuda":
        return torch.cuda.get_device_name(subject.resolved_device)
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {threads} threads"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--fraction", type=float, default=1.0, help="of the scenario's documents")
    parser.add_argument("--sae", default="", help="part of a key; the widest of those that match is measured")
    parser.add_argument("--labels", action="store_true", help="also labels, scores and index")
    parser.add_argument("--out", type=Path, help="default: rates.json in the scenario's store")
    arguments = parser.parse_args()
    scenario = load_scenario(arguments.config)
    subject, text, labelling = scenario["subject"], scenario["corpus"], scenario["labelling"]
    assert isinstance(subject, SubjectResource) and isinstance(text, CorpusResource) and isinstance(labelling, LabellingResource)
    embedder = scenario["embedder"]
    assert isinstance(embedder, EmbedderResource)
    entries = [entry for entry in scenario["saes"].everything() if arguments.sae in entry.key]
    entry = max(entries, key=lambda entry: open_dictionary(entry).width)
    settings = text.settings()
    settings = replace(settings, sampling=replace(settings.sampling, fraction=settings.sampling.fraction * arguments.fraction))
    with tempfile.TemporaryDirectory() as folder:
        store, model = Store(Path(folder)), subject.open()
        corpus, _ = build_corpus(store, settings, model)
        store.register(entry.key, entry.as_json())
        bench = Bench(store, corpus, entry, model, settings.rules.length, torch.get_num_threads())

        def chain() -> None:
            measure_fidelity(store, corpus, [entry], model)
            labels, scores = labelling.labels(), labelling.scores(embedder.identity())
            label_features(store, corpus, entry, model, settings=labels)
            score_labels(store, corpus, entry, model, labels=labels, settings=scores, embed=embedder.open().embed)
            index_features(store, corpus, entry, model, embedder=embedder.open(), labels=labels, scores=scores)

        rates = measure(bench, chain=chain if arguments.labels else None)
    out = arguments.out or scenario["store"].open().root / FILE
    write_rates(out, rates)
    for name, value in vars(rates).items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value or 'not measured'}")
    print(f"{corpus.facts['tokens']:,} tokens of {entry.key}; written to {out}")


if __name__ == "__main__":
    main()
