"""A process killed with SIGKILL while publishing: readers never see half, and the next run ends where an unhurt one does."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from scopeatlas.atlas.publish import publish
from scopeatlas.atlas.tables import FEATURES, PUBLICATIONS, has_table, open_table
from tests.atlas.conftest import MLP, RES, TEXTS, feature_rows

WORKER = """
import os, signal, sys, threading
from pathlib import Path
import numpy as np, polars as pl
from scopeatlas.atlas import publish as publishing
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.storage.records import StageFolder

root, rows, moment = Path(sys.argv[1]), pl.read_parquet(sys.argv[2]), sys.argv[4]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
where, _, detail = moment.partition(":")
owner = StageFolder if where == "commit" else publishing.pq if where == "write_table" else publishing
if where != "none":
    real = getattr(owner, where)
    if detail == "after":
        setattr(owner, where, lambda *a, **k: (real(*a, **k), die()))
    elif detail:  # so many seconds into it
        setattr(owner, where, lambda *a, **k: (threading.Timer(float(detail), die).start(), real(*a, **k))[1])
    else:
        setattr(owner, where, die)
publishing.publish(rows, dict(np.load(sys.argv[3])), root=root, folder=root / "saes" / rows["sae"][0], embedder=Embedder())
"""
MOMENTS = [
    "write_table:after",  # a temporary file beside the generation
    "commit",  # the generation without its record
    "_tables:after",
    "_merge",
    "_merge:0.002",
    "_merge:0.01",
    "_merge:after",
    "_append",
    "_append:after",
]
FIRST_MOMENTS = ["_tables:after", "_merge:0.005", "build_indexes:0.02"]  # in a store that has no atlas yet
CASES = [(moment, False) for moment in MOMENTS] + [(moment, True) for moment in FIRST_MOMENTS]
CHANGED = [*TEXTS[RES][:7], "tulips and roses", *TEXTS[RES][8:17]]


def start(root, rows, vectors, moment, scratch):
    name = rows["sae"][0]
    rows.write_parquet(scratch / f"{name}.parquet")
    np.savez(scratch / f"{name}.npz", **vectors)
    arguments = [str(root), str(scratch / f"{name}.parquet"), str(scratch / f"{name}.npz"), moment]
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stderr=subprocess.PIPE)


def contents(root):
    return pl.from_arrow(open_table(root, FEATURES).to_arrow()).sort("key")


def newest(root):
    ledger = pl.from_arrow(open_table(root, PUBLICATIONS).to_arrow()).sort("published_at")
    return dict(zip(ledger["sae"], ledger["generation"], strict=True))


@pytest.mark.parametrize(("moment", "first"), CASES)
def test_a_killed_publication_converges(published, tmp_path, embedder, vectors_of, moment, first):
    rows = feature_rows(RES, CHANGED)
    vectors = vectors_of(rows)
    roots = [tmp_path / "unhurt", tmp_path / "killed"]
    for root in roots:
        root.mkdir() if first else shutil.copytree(published, root)
    unhurt, killed = roots
    publish(rows, vectors, root=unhurt, folder=unhurt / "saes" / RES, embedder=embedder)

    process = start(killed, rows, vectors, moment, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    if not first:  # whoever reads now sees the old rows or the new, and the other SAE untouched
        seen = contents(killed)
        assert seen.filter(sae=RES).height in (20, len(CHANGED)) and seen.filter(sae=RES)["generation"].n_unique() == 1
        assert seen.filter(sae=MLP).equals(contents(unhurt).filter(sae=MLP))

    again = publish(rows, vectors, root=killed, folder=killed / "saes" / RES, embedder=embedder)
    assert contents(killed).equals(contents(unhurt)) and newest(killed) == newest(unhurt)
    assert again.reused == (moment == "_append:after") or moment[-1].isdigit()  # a timer may go off after the last step
    assert publish(rows, vectors, root=killed, folder=killed / "saes" / RES, embedder=embedder).reused
    assert len(open_table(killed, FEATURES).list_indices()) == 11


def test_a_table_whose_creation_was_killed_is_created_again(tmp_path, embedder, vectors_of):
    (tmp_path / "atlas" / "features.lance" / "data").mkdir(parents=True)
    assert not has_table(tmp_path, FEATURES)
    rows = feature_rows(RES)
    assert publish(rows, vectors_of(rows), root=tmp_path, folder=tmp_path / "f", embedder=embedder).rows == 20


def test_processes_publishing_at_once_do_not_disturb_each_other(tmp_path, vectors_of, published):
    root = tmp_path / "store"
    root.mkdir()
    processes = []
    for number, sae in enumerate((RES, MLP, RES)):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        processes.append(start(root, feature_rows(sae), vectors_of(feature_rows(sae)), "none", scratch))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert contents(root).equals(contents(published)) and newest(root) == newest(published)
    assert pl.from_arrow(open_table(root, PUBLICATIONS).to_arrow()).height == 2
