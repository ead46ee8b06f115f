"""How far above the floor the pipeline is: the bare forward and encoder products against `activation_cache` and `feature_examples`.

    .venv/bin/python -m bench.floor --width 16384 --tokens 200000 --outputs --out bench/results/floor-16k
    .venv/bin/python -m bench.floor --width 65536 --tokens 200000 --out bench/results/floor-65k
    .venv/bin/python -m bench.floor --layers 5,9,12,15 --width 262144 --tokens 200000 --device cuda --batch-tokens 16384

In one process and one run:
(a) the subject model's forward to the last site and every SAE's dense encoder product, in the same precision and batches,
    nothing thresholded and nothing kept;
(b) `activation_cache` as it is run: opening and checking the SAEs, their null features, encoding, decoding, fidelity's sums,
    sorting, writing, committing;
(c) `feature_examples` as it is run, all features. The tokens that an SAE promotes are of no corpus and made once for it:
    with --outputs they are timed too, beside (c).

(a) and (b) take turns, batch by batch, so that whatever else the machine does meets both. On a CPU the figures are CPU
seconds of the whole process, on a GPU seconds between synchronisations. The run is cut into five equal parts; the ratio is
the median of theirs, what (b) does outside batches spread evenly, and the five are printed. (c) is run five times.
SAEs are stand-ins of the shape asked for (`bench/standins.py`).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.machine import machine, peak_bytes
from bench.standins import corpus_of, stand_ins, subject_model, without_outputs
from scopeatlas.activations import encoding
from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.reading import SiteBatch, packed, read_batches
from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import TILE_BYTES, SparseDictionary
from scopeatlas.mining.examples import mine_examples
from scopeatlas.mining.outputs import feature_outputs
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import decoder_layers

PARTS = 5


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or on a GPU seconds once it is idle."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.monotonic()


class Floor:
    """The bare forward pass to the last site and the dense encoder products, on the batches that the cache reads."""

    def __init__(self, subject: SubjectModel, dictionaries: list[SparseDictionary]):
        self.subject, self.dictionaries = subject, [d.to(subject.resolved_device) for d in dictionaries]
        self.seconds: list[float] = []
        self.marks: list[float] = []  # the clock before the first batch and after each, less what the floor itself took
        self.tokens: list[int] = []

    def batch(self, tokens_bs: np.ndarray, is_text: np.ndarray) -> None:
        started = clock(self.subject.resolved_device)
        self._run(torch.from_numpy(tokens_bs).long(), torch.from_numpy(is_text))
        self.seconds.append(clock(self.subject.resolved_device) - started)
        self.tokens.append(int(is_text.sum()))

    @torch.no_grad()
    def _run(self, tokens_bs: torch.Tensor, is_text: torch.Tensor) -> None:
        device, model = self.subject.resolved_device, self.subject.model
        tokens_bs, is_text = tokens_bs.to(device), is_text.to(device)
        layers = decoder_layers(model)
        wanted = {site.layer for d in self.dictionaries for site in d.sites_in}
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            layers[i].register_forward_hook(
                lambda _m, _a, out, i=i: seen.__setitem__(i, out[0] if isinstance(out, tuple) else out)
            )
            for i in wanted
        ]
        with truncated(model, max(wanted) + 1):
            mask = (tokens_bs >= 0).long()
            model.base_model(input_ids=tokens_bs.clamp(min=0), attention_mask=mask, use_cache=False)
        for hook in hooks:
            hook.remove()
        for dictionary in self.dictionaries:
            x = seen[dictionary.sites_in[0].layer][is_text].float()
            weights = dictionary.layers[0]
            # In the tiles that suit the machine and into one buffer: an untiled product is slower.
            size = max(1, TILE_BYTES[x.device.type] // (4 * len(x)))
            out = x.new_empty(len(x) * size)
            for start in range(0, dictionary.width, size):
                bias, columns = weights.b_enc[start : start + size], weights.w_enc[:, start : start + size]
                torch.addmm(bias, x, columns, out=out[: len(x) * len(bias)].view(len(x), len(bias)))


@contextmanager
def truncated(model: torch.nn.Module, count: int) -> Iterator[None]:
    """The model with its first `count` layers only."""
    base = model.base_model
    whole = base.layers
    base.layers = whole[:count]
    try:
        yield
    finally:
        base.layers = whole


@contextmanager
def interleaved(floor: Floor, subject: SubjectModel) -> Iterator[None]:
    """While this lasts, the floor is run on each batch just before the cache gets it."""

    def taking_turns(contexts: Contexts, model: SubjectModel, sites) -> Iterator[SiteBatch]:
        batches = read_batches(contexts, model, sites)
        lengths = contexts.lengths()
        for rows in packed(lengths, model.batch_tokens):
            floor.marks = floor.marks or [clock(subject.resolved_device)]
            tokens = contexts.tokens[rows, : int(lengths[rows].max())]
            floor.batch(tokens, (tokens >= 0) & ~np.isin(tokens, model.tokenizer.all_special_ids))
            yield next(batches)
            floor.marks.append(clock(subject.resolved_device) - sum(floor.seconds))

    encoding.read_batches = taking_turns
    try:
        yield
    finally:
        encoding.read_batches = read_batches


def measure(
    store: Store, corpus: Corpus, entries: list[SaeEntry], subject: SubjectModel, rounds: int, *, outputs: bool
) -> dict[str, object]:
    """The run; every figure of the report."""
    device = subject.resolved_device
    floor = Floor(subject, [open_dictionary(entry) for entry in entries])
    some = corpus.contexts(corpus.shards[0])
    floor.batch(some.tokens[:8], some.tokens[:8] >= 0)  # warm-up: first-touch and thread pools are nobody's
    floor.seconds.clear(), floor.tokens.clear()
    started, wall = clock(device), time.monotonic()
    with interleaved(floor, subject):
        result = cache_activations(store, corpus, entries, subject, log=lambda line: print(line, flush=True))
    cached = clock(device) - started - sum(floor.seconds)
    wall = time.monotonic() - wall
    if len(floor.seconds) < PARTS:
        raise SystemExit(f"{len(floor.seconds)} batches make no {PARTS} parts; ask for more tokens")
    cuts = np.linspace(0, len(floor.seconds), PARTS + 1).astype(int)
    a = [sum(floor.seconds[i:j]) for i, j in zip(cuts, cuts[1:], strict=False)]
    inside = [floor.marks[j] - floor.marks[i] for i, j in zip(cuts, cuts[1:], strict=False)]
    spread = (cached - sum(inside)) / PARTS
    parts = [(b + spread) / floor_part for b, floor_part in zip(inside, a, strict=True)]
    nonzeros, stored = stored_bytes(store, corpus, entries, subject)
    after_cache = peak_bytes(device)
    for entry in entries:
        shutil.rmtree(store.outputs(entry.key).root, ignore_errors=True)
    started = clock(device)
    if outputs:
        for entry in entries:
            feature_outputs(store, entry, subject)
    else:
        without_outputs(store, entries, subject)
    made = clock(device) - started
    mined = mine(store, corpus, entries, subject, rounds)
    total = sum(a)
    return {
        "machine": machine(),
        "device": str(device),
        "dtype": str(subject.resolved_dtype),
        "saes": [entry.key for entry in entries],
        "tokens": sum(floor.tokens),
        "batch_tokens": subject.batch_tokens,
        "floor_seconds": total,
        "cache_seconds": cached,
        "outside_batches_seconds": cached - sum(inside),
        "examples_seconds": mined,
        "outputs_seconds": made if outputs else None,
        "cache_over_floor": median(parts),
        "cache_over_floor_parts": parts,
        "cache_over_floor_whole": cached / total,
        "examples_over_floor": median(mined) / total,
        "outputs_over_floor": made / total if outputs else None,
        "tokens_per_second_both_sides": result.tokens / wall,
        "cache_tokens_per_clock_second": sum(floor.tokens) / cached,
        "nonzeros": nonzeros,
        "l0": nonzeros / sum(floor.tokens) / len(entries),
        "bytes_per_nonzero": stored / nonzeros,
        "peak_bytes_after_cache": after_cache,
        "peak_bytes": peak_bytes(device),
    }


def mine(store: Store, corpus: Corpus, entries: list[SaeEntry], subject: SubjectModel, rounds: int) -> list[float]:
    """Seconds of `feature_examples` over all SAEs, each round from nothing but the activations and what is of the SAEs alone."""
    seconds = []
    for _ in range(rounds):
        for entry in entries:
            shutil.rmtree(store.stage(entry.key, corpus.id, "examples").root, ignore_errors=True)
        started = clock(subject.resolved_device)
        for entry in entries:
            mine_examples(store, corpus, entry, subject)
        seconds.append(clock(subject.resolved_device) - started)
    return seconds


def stored_bytes(store: Store, corpus: Corpus, entries: list[SaeEntry], subject: SubjectModel) -> tuple[int, int]:
    """Non-zeros of all SAEs, and the bytes of every file that holds them."""
    nonzeros = stored = 0
    for entry in entries:
        stage = store.stage(entry.key, corpus.id, "activations")
        for key in activation_keys(corpus, entry, subject):
            record = stage.record(key)
            nonzeros += int(record.facts["nonzeros"])
            stored += sum(file["bytes"] for file in record.files.values())
    return nonzeros, stored


def draw(report: dict, path: Path) -> None:
    """The three sides as bars, in the floor's units."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.4))
    rows = {
        "(a) floor": 1.0,
        "(b) activation_cache": report["cache_over_floor"],
        "(c) feature_examples": report["examples_over_floor"],
    }
    bars = axes.barh(list(rows), list(rows.values()), color=["#999999", "#3b6ea8", "#b5653b"])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(rows.values()))
    axes.set_xlabel("times the floor")
    axes.set_title(
        f"{len(report['saes'])} SAE(s), {report['tokens']:,} tokens, L0 {report['l0']:.0f}, {report['device']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="12", help="residual stream after these layers, one SAE each")
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=128, help="tokens of a context")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=PARTS, help="of feature_examples")
    parser.add_argument("--outputs", action="store_true", help="also time what is made once for an SAE: the tokens it promotes")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.png")
    parser.add_argument("--folder", type=Path, help="store and SAEs go here and stay; a temporary folder otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        subject = replace(subject_model(arguments.device), batch_tokens=arguments.batch_tokens)
        store = Store(folder / "store")
        corpus = corpus_of(store, subject, arguments.tokens, length=arguments.length)
        layers = [int(layer) for layer in arguments.layers.split(",")]
        entries = stand_ins(folder, subject, corpus, layers, arguments.width, l0=arguments.l0)
        report = measure(store, corpus, entries, subject, arguments.rounds, outputs=arguments.outputs)
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw(report, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
