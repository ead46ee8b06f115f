"""The format of an activation shard, beside the others that it was chosen from: size, and time to write and to read.

    .venv/bin/python -m bench.shards --store store --out bench/results/shards

Data: the shards of every SAE in a store, each a file of its own as they lie there; and one of the sixteen shards that 200,000
tokens give an SAE of 65,536 features at L0 50. Nothing published of that shape runs here, so that one is made up: features
fire independently at log-normal rates (sigma 1.5), with log-normal values. All files that a format makes are counted.

Per format: bytes per non-zero; CPU seconds, and seconds in brackets, to write and to read the whole per million non-zeros; CPU
milliseconds, and milliseconds, to read one feature (in every shard of the SAE), and one context (one shard); medians of
--repeats, the formats taking turns. Ours packs and sorts what it writes, the others are given it sorted.
Beside them what else a store has per non-zero, and what one feature's examples take to read (`read_examples`).
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol, TypeVar
from unittest.mock import patch

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.machine import machine
from scopeatlas.activations import shards
from scopeatlas.activations.shards import read_shard, round_values, write_shard
from scopeatlas.mining.examples import read_examples

CONTEXT = 128
PROBES = 8


@dataclass(frozen=True)
class Columns:
    """A shard's non-zeros sorted by (feature, token): feature, token uint32 [n]; value float16 [n]."""

    feature: np.ndarray
    token: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.feature)

    def where(self, mask: np.ndarray) -> "Columns":
        return Columns(self.feature[mask], self.token[mask], self.value[mask])

    def table(self) -> pa.Table:
        return pa.table({"feature": self.feature, "token": self.token, "value": self.value})


class Format(Protocol):
    """A way to keep a shard in a folder. Reading gives the non-zeros sorted by (feature, token); `feature` limits it to one."""

    def write(self, columns: Columns, folder: Path) -> None: ...

    def read(self, folder: Path, feature: int | None = None) -> Columns: ...


def of_table(table: pa.Table) -> Columns:
    return Columns(table["feature"].to_numpy(), table["token"].to_numpy(), table["value"].to_numpy())


@dataclass(frozen=True)
class Ours:
    """`scopeatlas.activations.shards`: parquet, features and gaps; `row_group` non-zeros to a row group."""

    row_group: int = shards.ROW_GROUP

    def write(self, columns: Columns, folder: Path) -> None:
        with patch.object(shards, "ROW_GROUP", self.row_group):
            write_shard(folder / "a.parquet", columns.feature, columns.token, columns.value, scale=1.0)

    def read(self, folder: Path, feature: int | None = None) -> Columns:
        acts = read_shard(folder / "a.parquet", features=None if feature is None else range(feature, feature + 1))
        return Columns(acts.feature, acts.token, acts.value.astype(np.float16))


@dataclass(frozen=True)
class Flat:
    """Parquet by pyarrow, tokens as they are: features run-length, tokens delta-packed, values byte-stream-split, zstd."""

    level: int = 1

    def write(self, columns: Columns, folder: Path) -> None:
        pq.write_table(
            columns.table(),
            folder / "a.parquet",
            row_group_size=shards.ROW_GROUP,
            compression="zstd",
            compression_level=self.level,
            use_dictionary=["feature"],  # pyright: ignore[reportArgumentType]
            column_encoding={"token": "DELTA_BINARY_PACKED", "value": "BYTE_STREAM_SPLIT"},
        )

    def read(self, folder: Path, feature: int | None = None) -> Columns:
        return of_table(pq.read_table(folder / "a.parquet", filters=None if feature is None else [("feature", "==", feature)]))


class Polars:
    """Parquet as Polars writes it: a row per non-zero, sorted, zstd."""

    def write(self, columns: Columns, folder: Path) -> None:
        frame = pl.DataFrame({"feature": columns.feature, "token": columns.token, "value": columns.value})
        frame.write_parquet(folder / "a.parquet", compression="zstd", row_group_size=shards.ROW_GROUP)

    def read(self, folder: Path, feature: int | None = None) -> Columns:
        frame = pl.scan_parquet(folder / "a.parquet")
        found = (frame if feature is None else frame.filter(pl.col("feature") == feature)).collect()
        return Columns(found["feature"].to_numpy(), found["token"].to_numpy(), found["value"].to_numpy())


@dataclass(frozen=True)
class Lance:
    """A LanceDB table with a row per non-zero, its columns zstd; with or without an index on `feature`."""

    indexed: bool

    def write(self, columns: Columns, folder: Path) -> None:
        import lancedb

        table = columns.table()
        asked = {"lance-encoding:compression": "zstd"}
        fields = [table.schema.field(name).with_metadata(asked) for name in table.column_names]
        written = lancedb.connect(folder).create_table("a", table.cast(pa.schema(fields)))
        if self.indexed:
            from lancedb.index import BTree

            written.create_index("feature", config=BTree())

    def read(self, folder: Path, feature: int | None = None) -> Columns:
        import lancedb

        table = lancedb.connect(folder).open_table("a")
        if feature is None:
            return of_table(table.to_arrow())
        return of_table(table.search().where(f"feature = {feature}").limit(1 << 30).to_arrow())


class Raw:
    """Blocks of non-zeros, each byte plane of gaps and values compressed by itself: what is left to gain over `Ours`."""

    CODEC = pa.Codec("zstd", compression_level=1)

    def write(self, columns: Columns, folder: Path) -> None:
        index = []
        with (folder / "a.raw").open("wb") as stream:
            for start in range(0, len(columns), shards.ROW_GROUP):
                part = columns.where(np.s_[start : start + shards.ROW_GROUP])  # type: ignore[arg-type]
                starts = np.flatnonzero(np.r_[True, part.feature[1:] != part.feature[:-1]])
                gap = np.diff(part.token, prepend=np.uint32(0))
                gap[starts] = part.token[starts]
                arrays = [part.feature[starts], np.diff(starts, append=len(part)).astype(np.uint32), gap, part.value]
                packed = [self.CODEC.compress(plane, asbytes=True) for array in arrays for plane in planes(array)]
                index.append([stream.tell(), len(starts), len(part), *(int(part.feature[i]) for i in (0, -1)), *map(len, packed)])
                stream.write(b"".join(packed))
        (folder / "a.json").write_text(json.dumps(index), encoding="utf-8")

    def read(self, folder: Path, feature: int | None = None) -> Columns:
        parts = []
        with (folder / "a.raw").open("rb") as stream:
            for at, rows, nonzeros, first, last, *sizes in json.loads((folder / "a.json").read_text(encoding="utf-8")):
                if feature is None or first <= feature <= last:
                    stream.seek(at)
                    parts.append(self._block(stream.read(sum(sizes)), rows, nonzeros, sizes))
        joined = Columns(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("feature", "token", "value")))
        return joined if feature is None else joined.where(joined.feature == feature)

    def _block(self, data: bytes, rows: int, nonzeros: int, sizes: list[int]) -> Columns:
        ends = np.cumsum(sizes)
        lengths = [rows] * 8 + [nonzeros] * 6
        found = [
            np.frombuffer(self.CODEC.decompress(data[end - size : end], length, asbytes=True), np.uint8)
            for end, size, length in zip(ends, sizes, lengths, strict=True)
        ]
        feature, count, gap = (np.stack(found[i : i + 4], axis=1).view(np.uint32).ravel() for i in (0, 4, 8))
        starts = np.cumsum(count) - count
        summed = np.cumsum(gap, dtype=np.uint32)
        token = summed - np.repeat(summed[starts] - gap[starts], count)
        return Columns(np.repeat(feature, count), token, np.stack(found[12:], axis=1).view(np.float16).ravel())


def planes(array: np.ndarray) -> list[bytes]:
    """The k-th bytes of all items together, for each k."""
    return [plane.tobytes() for plane in array.view(np.uint8).reshape(len(array), -1).T]


Result = TypeVar("Result")

FORMATS: dict[str, Format] = {
    "ours: parquet, features and gaps": Ours(),
    "ours, row groups of 32k": Ours(1 << 15),
    "ours, row groups of 512k": Ours(1 << 19),
    "parquet, features and tokens": Flat(),
    "parquet, features and tokens, zstd 9": Flat(9),
    "parquet by Polars": Polars(),
    "Lance": Lance(indexed=False),
    "Lance with an index": Lance(indexed=True),
    "raw byte planes, zstd": Raw(),
}


def made_up(width: int, l0: float, tokens: int, rng: np.random.Generator) -> Columns:
    """Features that fire independently, at log-normal rates whose sum is l0."""
    rate = rng.lognormal(0, 1.5, width)
    fires = rng.binomial(tokens, np.minimum(rate * l0 / rate.sum(), 0.9))
    feature = np.repeat(np.arange(width, dtype=np.uint32), fires)
    token = np.concatenate([np.sort(rng.choice(tokens, n, replace=False)) for n in fires if n]).astype(np.uint32)
    typical = rng.normal(0, 0.5, width)[feature]
    return Columns(feature, token, np.exp(typical + rng.normal(0, 0.6, len(feature))).astype(np.float16))


def real(store: Path) -> Iterator[tuple[str, list[Columns]]]:
    """The shards of each SAE of a store."""
    for sae in sorted({path.parents[2] for path in store.glob("saes/*/*/activations/*.parquet")}):
        found = [read_shard(path) for path in sorted(sae.glob("*/activations/*.parquet"))]
        yield sae.name, [Columns(acts.feature, acts.token, round_values(acts.value, 1.0)) for acts in found]


@dataclass
class Timer:
    """CPU seconds and seconds of each call."""

    cpu: list[float]
    wall: list[float]

    def __call__(self, call: Callable[[], Result]) -> Result:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return result


def measure(data: list[Columns], repeats: int, rng: np.random.Generator, folder: Path) -> list[dict[str, object]]:
    """One row per format, over all shards in `data`. Raises AssertionError if a format loses anything."""
    timers = {name: {what: Timer([], []) for what in ("write", "read", "feature", "context")} for name in FORMATS}
    size = dict.fromkeys(FORMATS, 0)
    firing = np.unique(np.concatenate([columns.feature for columns in data]))
    for repeat in range(repeats):
        features = rng.choice(firing, PROBES)
        for name, form in FORMATS.items():
            places = [folder / f"{repeat}" / name.replace(":", "") / str(i) for i in range(len(data))]
            for place in places:
                place.mkdir(parents=True)
            mine = timers[name]
            mine["write"](lambda form=form, places=places: [form.write(c, p) for c, p in zip(data, places, strict=True)])
            size[name] = sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())
            whole = mine["read"](lambda form=form, places=places: [form.read(p) for p in places])
            for feature in features:
                found = mine["feature"](lambda form=form, places=places, f=int(feature): [form.read(p, f) for p in places])
                assert all(same(got, c.where(c.feature == feature)) for got, c in zip(found, data, strict=True)), name
            assert all(same(got, columns) for got, columns in zip(whole, data, strict=True)), name
            row = int(rng.integers(0, data[0].token.max() // CONTEXT + 1))
            mine["context"](lambda form=form, place=places[0], row=row: context_of(form.read(place), row))
            shutil.rmtree(folder / f"{repeat}" / name.replace(":", ""))
    millions = sum(map(len, data)) / 1e6
    return [
        {
            "format": name,
            "bytes_per_nonzero": size[name] / millions / 1e6,
            "write_cpu_s_per_million": median(mine["write"].cpu) / millions,
            "write_s_per_million": median(mine["write"].wall) / millions,
            "read_cpu_s_per_million": median(mine["read"].cpu) / millions,
            "read_s_per_million": median(mine["read"].wall) / millions,
            **{f"{what}_cpu_ms": 1e3 * median(mine[what].cpu) for what in ("feature", "context")},
            **{f"{what}_ms": 1e3 * median(mine[what].wall) for what in ("feature", "context")},
        }
        for name, mine in timers.items()
    ]


def context_of(columns: Columns, row: int) -> Columns:
    return columns.where(columns.token // CONTEXT == row)


def same(a: Columns, b: Columns) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("feature", "token", "value"))


def beside(store: Path, repeats: int, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Of each SAE in a store: bytes per non-zero of its `activations` folder, all files counted; milliseconds to read one
    feature's examples."""
    found: dict[str, dict[str, float]] = {}
    for folder in sorted(store.glob("saes/*/*/activations")):
        nonzeros = sum(json.loads(p.read_text(encoding="utf-8"))["facts"]["nonzeros"] for p in folder.glob("*.commit.json"))
        facts = {"bytes_per_nonzero_all_files": sum(p.stat().st_size for p in folder.iterdir()) / nonzeros}
        for windows in folder.parent.glob("examples/*.windows.parquet"):
            features = pc.unique(pq.read_table(windows, columns=["feature"])["feature"]).to_numpy()  # type: ignore[attr-defined]
            timer = Timer([], [])
            for feature in rng.choice(features, repeats * PROBES):
                timer(lambda windows=windows, feature=feature: read_examples(windows, [int(feature)]))
            facts["examples_ms"] = 1e3 * median(timer.wall)
        found[folder.parents[1].name] = facts
    return found


def show(title: str, data: list[Columns], rows: list[dict[str, object]]) -> str:
    nonzeros, features = sum(map(len, data)), len(np.unique(np.concatenate([c.feature for c in data])))
    lines = [
        f"\n{title}: {nonzeros:,} non-zeros of {features:,} features in {len(data)} shards\n",
        "| format | bytes / non-zero | write, CPU s (s) / M | read, CPU s (s) / M | one feature, CPU ms (ms) | one context, CPU ms (ms) |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [
        f"| {r['format']} | {r['bytes_per_nonzero']:.2f} | {r['write_cpu_s_per_million']:.3f} ({r['write_s_per_million']:.3f}) | "
        f"{r['read_cpu_s_per_million']:.3f} ({r['read_s_per_million']:.3f}) | "
        f"{r['feature_cpu_ms']:.1f} ({r['feature_ms']:.1f}) | {r['context_cpu_ms']:.1f} ({r['context_ms']:.1f}) |"
        for r in rows
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a store with activations; without it only the made-up shard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    rng = np.random.default_rng(seed)
    report: dict[str, object] = {"seed": seed, "machine": machine(), "pyarrow": pa.__version__, "polars": pl.__version__}
    results: dict[str, list[dict[str, object]]] = {}
    for title, data in [*(real(asked.store) if asked.store else ()), ("made up", [made_up(65536, 50, 12_500, rng)])]:
        with tempfile.TemporaryDirectory(prefix="scopeatlas-bench-") as folder:
            results[title] = measure(data, asked.repeats, rng, Path(folder))
        print(show(title, data, results[title]), flush=True)
    report["formats"] = results
    if asked.store:
        report["stores"] = beside(asked.store, asked.repeats, rng)
        print("\n" + json.dumps(report["stores"], indent=1))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "shards.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
