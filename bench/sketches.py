"""Are sketches the same however a corpus is sharded, and in whatever order shards are merged? On the activations in a store.

    python -m bench.sketches [--store .scopeatlas/store] [--orders 3]

Of each SAE, all its contexts are dealt into 1, 3 and 7 shards at random, sketched, and merged in random orders and trees. Counts,
histogram and remembered contexts must be identical; the largest relative difference of a moment is printed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from scopeatlas.activations.shards import ActivationShard, read_shard
from scopeatlas.corpus.build import open_corpus
from scopeatlas.corpus.contexts import Contexts, join_contexts
from scopeatlas.mining.sketches import Sketch, context_table, merge, sketch_shard
from scopeatlas.storage.store import Store

SHARDINGS = (1, 3, 7)
MOMENTS = ("sum", "sum2")
WHERE = ("shard", "row")
"""Columns that say where a context lies: the only ones that a sharding may change."""


def read_all(store: Store, sae: str, corpus_id: str) -> tuple[ActivationShard, Contexts]:
    """Every non-zero of an SAE as one shard, and its contexts."""
    corpus, stage = open_corpus(store, corpus_id), store.stage(sae, corpus_id, "activations")
    done = {record.key.name: record.key for record in stage.records()}
    contexts = [corpus.contexts(shard) for shard in corpus.shards]
    first = np.r_[0, np.cumsum([c.tokens.size for c in contexts])]
    parts = [read_shard(stage.data_path(done[shard.name], ".parquet")) for shard in corpus.shards]
    token = np.concatenate([acts.token + np.uint32(start) for acts, start in zip(parts, first[:-1], strict=True)])
    feature, value = (np.concatenate([getattr(acts, name) for acts in parts]) for name in ("feature", "value"))
    return _in_order(feature, token, value), join_contexts(contexts)


def _in_order(feature: np.ndarray, token: np.ndarray, value: np.ndarray) -> ActivationShard:
    order = np.lexsort((token, feature))
    return ActivationShard(feature[order], token[order], value[order])


def sketch_of(acts: ActivationShard, contexts: Contexts, rows: np.ndarray, width: int) -> Sketch:
    """The sketch of the contexts at `rows`, in that order, as one shard."""
    length = contexts.tokens.shape[1]
    place = np.full(len(contexts), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    row, position = np.divmod(acts.token.astype(np.int64), length)
    at = np.flatnonzero(place[row] >= 0)
    token = (place[row[at]] * length + position[at]).astype(np.uint32)
    shard = _in_order(acts.feature[at], token, acts.value[at])
    chosen = contexts.take(rows)
    table = context_table(chosen, chosen.lengths())
    return sketch_shard([shard] if len(at) else [], table, length=length, width=width)[0]


def merged(parts: list[Sketch], rng: np.random.Generator) -> Sketch:
    """Merge two, three or more at a time, whichever come."""
    parts = [parts[i] for i in rng.permutation(len(parts))]
    while len(parts) > 1:
        some = [parts.pop() for _ in range(min(len(parts), int(rng.integers(2, 5))))]
        parts.insert(0, merge(some))
    return parts[0]


def compare(a: Sketch, b: Sketch) -> tuple[bool, float]:
    """Whether two sketches are identical but for their moments, and the largest relative difference of those."""
    same = all((a.counts[name] == b.counts[name]).all() for name in a.counts if name not in MOMENTS)
    same &= bool((a.seen == b.seen).all()) and a.histogram.equals(b.histogram)
    same &= a.entries.drop(WHERE).equals(b.entries.drop(WHERE))
    apart = [np.abs(a.counts[name] - b.counts[name]) / np.maximum(np.abs(b.counts[name]), 1e-300) for name in MOMENTS]
    return same, float(max(difference.max() for difference in apart))


def measure(store: Store, sae: str, corpus_id: str, *, orders: int, rng: np.random.Generator) -> bool:
    """Print a line for each sharding and order of an SAE's contexts; returns whether all sketches agree."""
    acts, contexts = read_all(store, sae, corpus_id)
    width, good = int(acts.feature.max(initial=0)) + 1, True
    whole = sketch_of(acts, contexts, np.arange(len(contexts)), width)
    for shards in SHARDINGS:
        for order in range(orders):
            dealt = rng.integers(0, shards, len(contexts))
            rows = [rng.permutation(np.flatnonzero(dealt == number)) for number in range(shards)]
            same, apart = compare(merged([sketch_of(acts, contexts, mine, width) for mine in rows], rng), whole)
            good &= same and apart <= 1e-12
            facts = f"{shards:6d} {order:5d} {len(acts):10,d} {len(whole.entries):9,d}"
            print(f"{sae[:60]:60s} {facts}  {'yes' if same else 'NO':9s}  {apart:.1e}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", type=Path, default=Path(".scopeatlas/store"))
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    store, rng = Store(chosen.store), np.random.default_rng(chosen.seed)
    print(f"{'SAE':60s} {'shards':>6s} {'order':>5s} {'non-zeros':>10s} {'entries':>9s}  identical  moments, relative")
    pairs = [(sae, corpus_id) for sae in store.registered() for corpus_id in store.corpora_of(sae)]
    sys.exit(0 if all([measure(store, *pair, orders=chosen.orders, rng=rng) for pair in pairs]) else 1)


if __name__ == "__main__":
    main()
