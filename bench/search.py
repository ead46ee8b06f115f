"""Search at a million features: latency, recall of the index, build time, disk and memory, beside a plain numpy scan.

    .venv/bin/python -m bench.search --store store --folder /tmp/million --out bench/results/search.json

The features of a real atlas, and beside them SAEs named synthetic-NNN of 16,384 features each, made of the real ones:
rows of one real feature, promoted tokens of another, and both vectors normalize(.75 E_i + .45 E_j + .30 noise with the
covariance of E), so that they cluster as real ones do. They are published as any SAE is, one after the other. Queries are
those of `bench.cutoff` and `bench.judged`, through `Atlas.search`, the embedding of the query included and told apart.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from bench.cutoff import ABSENT, PRESENT
from bench.judged import QUERIES
from bench.machine import machine
from scopeatlas import open_atlas
from scopeatlas.api import Atlas
from scopeatlas.atlas.asking import DENSE
from scopeatlas.atlas.indexes import index_recall
from scopeatlas.atlas.publish import maintain, publish
from scopeatlas.atlas.tables import FEATURE_ROW, FEATURES, VECTORS, database_folder, open_table
from scopeatlas.storage.uris import sizes_under

SAE_FEATURES, SEED, K, WARM = 16_384, 20_261_121, 10, 5
OWN, OTHER, NOISE = 0.75, 0.45, 0.30
Features = tuple[pl.DataFrame, dict[str, np.ndarray]]


def real_features(atlas: Atlas) -> list[Features]:
    """Rows and vectors of every SAE of the atlas; where a text is empty the vector is zero."""
    table = pl.DataFrame(pl.from_arrow(open_table(atlas.root, FEATURES).to_arrow())).sort("sae", "feature")
    dim = table.schema["vector"].shape[0]  # type: ignore[attr-defined]
    zero = [0.0] * dim
    parts = []
    for (_,), mine in table.group_by("sae", maintain_order=True):
        vectors = {name: np.stack(mine[name].fill_null(zero).to_list()).astype(np.float32) for name in VECTORS}
        parts.append((mine.select(FEATURE_ROW.names()), vectors))
    return parts


def synthetic(real: Sequence[Features], saes: int) -> Iterator[Features]:
    """SAEs made of those real features that have evidence."""
    rng = np.random.default_rng(SEED)
    rows = pl.concat([part[0] for part in real])
    has_text = np.flatnonzero(((rows["example_text"] != "") & (rows["search_text"] != "")).to_numpy())
    rows = rows[has_text]
    vectors = {name: np.concatenate([part[1][name] for part in real])[has_text] for name in VECTORS}
    factors = {
        name: np.linalg.cholesky(np.cov(v.T) + 1e-6 * np.eye(v.shape[1])).astype(np.float32) for name, v in vectors.items()
    }
    for number in range(saes):
        i, j = rng.integers(0, len(rows), (2, SAE_FEATURES))
        sae, feature = f"synthetic-{number:03d}", pl.Series(range(SAE_FEATURES), dtype=pl.Int32)
        named = {"release": pl.lit("synthetic"), "sae": pl.lit(sae), "feature": feature, "index": feature}
        named |= {"key": pl.format("{}/{}", pl.lit(sae), feature), "promoted": rows["promoted"].gather(j)}
        named |= {"layer": pl.lit(number % 18, dtype=pl.Int16)}
        made = {}
        for name, v in vectors.items():
            noise = rng.standard_normal((SAE_FEATURES, v.shape[1]), dtype=np.float32) @ factors[name].T
            made[name] = OWN * v[i] + OTHER * v[j] + NOISE * noise
            made[name] /= np.linalg.norm(made[name], axis=1, keepdims=True)
        yield rows[i].with_columns(**named), made


def disk_bytes(folder: Path, part: str = "") -> int:
    """Bytes of the features table, or of that part of it."""
    sizes = sizes_under(database_folder(folder) / f"{FEATURES}.lance", nested=True)
    return sum(size for name, size in sizes.items() if name.startswith(part))


def rss_bytes() -> int:
    """Resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def quantiles(call: Callable[[str], object], queries: Sequence[str]) -> dict[str, float]:
    """p50 and p95 in ms of a call for each query, after a few to warm up, and the mean time on all processors: on a machine
    that others use it tells more."""
    for query in queries[:WARM]:
        call(query)
    times, began = [], time.process_time()
    for query in queries:
        start = time.perf_counter()
        call(query)
        times.append(1000 * (time.perf_counter() - start))
    cpu = 1000 * (time.process_time() - began) / len(queries)
    return {
        "cpu_ms": cpu,
        "p50_ms": float(np.quantile(times, 0.5)),
        "p95_ms": float(np.quantile(times, 0.95)),
        "queries": len(times),
    }


def scan(matrix: np.ndarray, vector: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """The K rows of a float32 matrix nearest to a vector by dot product, of `rows` or of all."""
    values = matrix @ vector if rows is None else matrix[rows] @ vector
    top = np.argpartition(-values, K)[:K]
    return (top if rows is None else rows[top])[np.argsort(-values[top])]


def build(folder: Path, source: Atlas, saes: int) -> dict[str, object]:
    """Publish the real SAEs, then the synthetic ones; returns what it took."""
    real = real_features(source)
    start, steps = time.perf_counter(), []
    for rows, vectors in (*real, *synthetic(real, saes)):
        began = time.perf_counter()
        done = publish(rows, vectors, root=folder, folder=folder / "saes" / rows["sae"][0], embedder=source.embedder)
        steps.append(time.perf_counter() - began)
        print(f"{rows['sae'][0]}: {done.rows} rows in {steps[-1]:.1f} s, RSS {rss_bytes() / 1e9:.2f} GB", flush=True)
    maintain(folder)
    seconds, with_versions = time.perf_counter() - start, disk_bytes(folder)
    # An atlas that is read keeps a week of versions; nobody reads this one yet.
    open_table(folder, FEATURES).optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
    return {
        "publish_s": seconds,
        "disk_with_all_versions_bytes": with_versions,
        "publication_p50_s": float(np.median(steps)),
        "publication_max_s": max(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="store", help="A real atlas.")
    parser.add_argument("--folder", type=Path, required=True, help="Where the large atlas is built, or was built before.")
    parser.add_argument("--saes", type=int, default=61, help="Synthetic SAEs of 16,384 features.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, object] = {"machine": machine(), "saes": arguments.saes}
    build_file = arguments.folder / "build.json"
    if not build_file.exists():
        build_file.write_text(json.dumps(build(arguments.folder, open_atlas(arguments.store), arguments.saes)), encoding="utf-8")
    result["build"] = json.loads(build_file.read_text(encoding="utf-8"))
    result |= measured(open_atlas(arguments.folder))
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(atlas: Atlas) -> dict[str, object]:
    """Latency, disk, memory and recall of an atlas, and of a scan of its vectors in memory."""
    judged = yaml.safe_load(QUERIES.read_text(encoding="utf-8"))["queries"]
    queries = [*PRESENT, *ABSENT, *(query["query"] for query in judged)]
    table = open_table(atlas.root, FEATURES)
    folder = Path(str(atlas.root))
    result: dict[str, object] = {"rows": table.count_rows(), "disk_bytes": disk_bytes(folder)}
    result["disk_of_indexes_bytes"] = disk_bytes(folder, "_indices")
    result["indexes"] = {
        i.name: {"type": i.index_type, "bytes": i.size_bytes, "rows": i.num_indexed_rows} for i in table.list_indices()
    }
    result["embedding"] = quantiles(lambda query: atlas.embedder.embed([query]), queries)
    one = atlas.saes()["sae"][-1]
    ways: dict[str, Callable[[str], object]] = {
        "hybrid": lambda query: atlas.search(query),
        "dense": lambda query: atlas.search(query, by="dense"),
        "text": lambda query: atlas.search(query, by="text"),
        "hybrid, one SAE of 16,384": lambda query: atlas.search(query, sae=one),
        "hybrid, one layer of 18": lambda query: atlas.search(query, layer=3),
        "hybrid, labelled with F1 of 0.5 or more": lambda query: atlas.search(query, status="ok", min_score=0.5),
        "hybrid, density of 0.001 to 0.01": lambda query: atlas.search(query, density=(0.001, 0.01)),
        "hybrid, the tenth page": lambda query: atlas.search(query, offset=90),
        "hybrid, SQL": lambda query: atlas.search(query, where="label LIKE '%the%' AND lift > 0.1"),
    }
    result["search"] = {}
    for name, way in ways.items():
        result["search"][name] = quantiles(way, queries)  # type: ignore[index]
        print(name, result["search"][name], flush=True)  # type: ignore[index]
    result["rss_after_search_bytes"] = rss_bytes()
    result["recall_of_own_vectors"] = index_recall(atlas.root).recall
    result["numpy"], result["recall_of_queries"] = beside_numpy(atlas, queries, one)
    result["rss_with_numpy_bytes"] = rss_bytes()
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def beside_numpy(atlas: Atlas, queries: Sequence[str], one: str) -> tuple[dict[str, object], dict[str, float]]:
    """A scan of both vector columns, whole in memory as float32, and how many of its K the index finds by column."""
    table = open_table(atlas.root, FEATURES)
    began = time.perf_counter()
    matrices, keys, of_one = {}, {}, {}
    for name, column in DENSE.items():
        parts, names = [], []
        for batch in table.search().where(f"{column} IS NOT NULL").select(["key", column]).to_batches(batch_size=65_536):
            flat = batch[column].flatten().to_numpy(zero_copy_only=False)
            parts.append(flat.reshape(len(batch), -1).astype(np.float32))
            names.append(pl.Series(pl.from_arrow(batch["key"])))
        matrices[name], keys[name] = np.concatenate(parts), pl.concat(names)
        matrices[name] /= np.linalg.norm(matrices[name], axis=1, keepdims=True)
        of_one[name] = np.flatnonzero(keys[name].str.starts_with(f"{one}/").to_numpy())
    loaded = time.perf_counter() - began
    vectors = dict(zip(queries, atlas.embedder.embed(queries), strict=True))
    told: dict[str, object] = {"load_s": loaded, "bytes": sum(m.nbytes for m in matrices.values())}
    told["dense"] = quantiles(lambda query: [scan(m, vectors[query]) for m in matrices.values()], queries)
    told["dense, one SAE of 16,384"] = quantiles(
        lambda query: [scan(m, vectors[query], of_one[n]) for n, m in matrices.items()], queries
    )
    recall = {}
    for name, matrix in matrices.items():
        shares = []
        for query in queries:
            least = float(np.sort(matrix @ vectors[query])[-K])
            found = atlas.search(query, by=name).nearest  # type: ignore[arg-type]
            shares.append(np.mean([hit.why is not None and hit.why.places[name].value >= least - 2e-4 for hit in found]))
        recall[name] = float(np.mean(shares))
    return told, recall


if __name__ == "__main__":
    main()
