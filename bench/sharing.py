"""What sharing the pass saves: 12 SAEs over 4 layers in one pass against 12 passes of one SAE each.

    .venv/bin/python -m bench.sharing --tokens 20000 --out bench/results/sharing

The corpus is cut into five parts; on each, the shared pass and the twelve take turns, each into a store of its own, from
nothing. CPU seconds of the whole process (on a GPU, seconds); the ratio is the median of the five.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench.floor import PARTS, clock
from bench.machine import machine
from bench.standins import corpus_of, only, stand_ins, subject_model
from scopeatlas.activations.cache import cache_activations
from scopeatlas.storage.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="5,9,12,15", help="those of Gemma Scope 2's 270M release")
    parser.add_argument("--each", type=int, default=3, help="SAEs per layer")
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="writes OUT.json")
    arguments = parser.parse_args()
    subject = replace(subject_model(arguments.device), batch_tokens=arguments.batch_tokens)
    device = subject.resolved_device
    layers = [int(layer) for layer in arguments.layers.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = Store(folder / "store")
        corpus = corpus_of(store, subject, arguments.tokens)
        entries = stand_ins(folder, subject, corpus, layers, arguments.width, l0=arguments.l0, each=arguments.each)
        for number in range(PARTS):
            part = only(corpus, slice(number, None, PARTS))
            started = clock(device)
            shared = cache_activations(Store(folder / f"shared-{number}"), part, entries, subject)
            between = clock(device)
            passes = 0
            for entry in entries:
                passes += cache_activations(Store(folder / f"alone-{number}"), part, [entry], subject).forward_passes
            seconds = between - started, clock(device) - between
            rows.append({"shared": seconds[0], "alone": seconds[1], "ratio": seconds[0] / seconds[1]})
            rows[-1] |= {"tokens": shared.tokens, "shared_passes": shared.forward_passes, "passes_alone": passes}
            print(json.dumps(rows[-1]), flush=True)
    report = {"machine": machine(), "saes": len(entries), "ratio": median(row["ratio"] for row in rows), "parts": rows}
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
