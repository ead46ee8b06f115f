"""How time, memory and disk grow with tokens, with width, and with the number of SAEs that share the pass.

    .venv/bin/python -m bench.scaling tokens --points 100000,200000,400000,800000 --width 65536 --layer 2 --out bench/results/scaling-tokens
    .venv/bin/python -m bench.scaling width --points 4096,16384,65536,262144 --tokens 20000 --out bench/results/scaling-width
    .venv/bin/python -m bench.scaling saes --points 1,2,4,8,12 --tokens 20000 --out bench/results/scaling-saes

Each point's `activation_cache` and `feature_examples` run in a process of their own, whose CPU seconds and peak resident
memory the kernel counts (on a GPU: seconds, and bytes allocated there). What an SAE promotes is of no corpus and is left
out (`bench/standins.py`). Beside each point stand its growth over the first and what growth in proportion would be.
An early layer keeps the subject model's share small, so that what is measured is what the points vary.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.floor import clock, stored_bytes
from bench.machine import machine, peak_bytes
from bench.standins import corpus_of, stand_ins, subject_model, without_outputs
from scopeatlas.activations.cache import cache_activations
from scopeatlas.mining.examples import mine_examples
from scopeatlas.storage.store import Store

SAES_PER_LAYER = 3


def prepare(arguments: argparse.Namespace, folder: Path):
    """Subject model, store, corpus and SAEs of one point: made at the first call, found at later ones."""
    subject = replace(subject_model(arguments.device), batch_tokens=arguments.batch_tokens)
    # A store for each point: what an earlier one made would be found done. SAEs and their text are the same.
    store = Store(folder / f"store-{arguments.tokens}-{arguments.width}-{arguments.saes}")
    corpus = corpus_of(store, subject, arguments.tokens)
    each = min(arguments.saes, SAES_PER_LAYER)
    layers = [arguments.layer + i for i in range(-(-arguments.saes // each))]
    entries = stand_ins(folder, subject, corpus, layers, arguments.width, l0=arguments.l0, each=each)[: arguments.saes]
    return subject, store, corpus, entries


def step(arguments: argparse.Namespace) -> None:
    """One step of one point, in this process; prints its figures as a line of JSON."""
    subject, store, corpus, entries = prepare(arguments, arguments.folder)
    device = subject.resolved_device
    if arguments.step == "prepare":
        without_outputs(store, entries, subject)
        return
    if arguments.step == "cache":
        for weights in subject.model.parameters():
            weights.sum()  # its mapped pages count from the start, not as words happen to occur
    before, wall = clock(device), time.monotonic()
    if arguments.step == "cache":
        cache_activations(store, corpus, entries, subject, log=lambda line: print(line, file=sys.stderr, flush=True))
    else:
        for entry in entries:
            mine_examples(store, corpus, entry, subject)
    figures = {"seconds": clock(device) - before, "wall": time.monotonic() - wall, "peak_bytes": peak_bytes(device)}
    figures["tokens"] = corpus.facts["tokens"]
    figures["nonzeros"], figures["stored_bytes"] = stored_bytes(store, corpus, entries, subject)
    print(json.dumps(figures), flush=True)


def point(arguments: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Both steps of one point, each in a process of its own."""
    command = [sys.executable, "-m", "bench.scaling", "step", "--folder", str(folder)]
    for name in ("tokens", "width", "saes", "layer", "l0", "device", "batch_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    found = {}
    for name in ("prepare", "cache", "examples"):
        done = subprocess.run([*command, "--step", name], stdout=subprocess.PIPE, text=True, check=True)
        if done.stdout.strip():
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(what: str, points: list[int], found: list[dict[str, dict]]) -> str:
    """The points as markdown: figures, and each over the first point's."""
    lines = [
        f"| {what} | cache s | x | examples s | x | cache peak MB | x | examples peak MB | x | on disk MB | x | bytes per non-zero |",
        "|---" * 12 + "|",
    ]
    first = found[0]
    for value, one in zip(points, found, strict=True):
        cells = [f"{value:,}"]
        for name, field, unit in (
            ("cache", "seconds", 1),
            ("examples", "seconds", 1),
            ("cache", "peak_bytes", 1e6),
            ("examples", "peak_bytes", 1e6),
            ("cache", "stored_bytes", 1e6),
        ):
            cells += [f"{one[name][field] / unit:,.1f}", f"{one[name][field] / first[name][field]:.2f}"]
        cells.append(f"{one['cache']['stored_bytes'] / one['cache']['nonzeros']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(what: str, points: list[int], found: list[dict[str, dict]], path: Path) -> None:
    """Growth over the first point, on logarithmic axes, with proportion as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4))
    series = {
        "cache, seconds": ("cache", "seconds"),
        "examples, seconds": ("examples", "seconds"),
        "cache, peak memory": ("cache", "peak_bytes"),
        "examples, peak memory": ("examples", "peak_bytes"),
        "on disk": ("cache", "stored_bytes"),
    }
    for label, (name, field) in series.items():
        axes.plot(points, [one[name][field] / found[0][name][field] for one in found], marker="o", label=label)
    axes.plot(points, [value / points[0] for value in points], "k--", linewidth=0.8, label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel=what, ylabel="over the first point")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "width", "saes", "step"])
    parser.add_argument("--points", help="values of what varies, with commas between")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--saes", type=int, default=1)
    parser.add_argument("--layer", type=int, default=2, help="the first; three SAEs share a layer")
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.png")
    parser.add_argument("--folder", type=Path, help="store and SAEs go here and stay; a temporary folder otherwise")
    parser.add_argument("--step", choices=["prepare", "cache", "examples"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "step":
        step(arguments)
        return
    points = [int(value) for value in arguments.points.split(",")]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for value in points:
            setattr(arguments, arguments.what, value)
            found.append(point(arguments, arguments.folder or Path(folder)))
            print(f"{arguments.what} {value:,}: {json.dumps(found[-1])}", file=sys.stderr, flush=True)
    print(table(arguments.what, points, found))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        body = {"machine": machine(), "what": arguments.what, "points": points, "found": found}
        arguments.out.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        draw(arguments.what, points, found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
