"""SAEs opened by hand, without an atlas: as many rows as features, labels where a test gives some."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from scipy import sparse

from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.hypotheses.labels import Label, label_table
from scopeatlas.storage.records import ShardKey
from scopeatlas.storage.store import Store
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.shared_tokens import TokenActivations
from scopeatlas.subject.loading import SubjectModel
from tests.conftest import WIDTH, Stored


def opened(stored: Stored, entry: SaeEntry, subject: SubjectModel, labels: Mapping[int, Label] | None = None) -> OpenSae:
    """An SAE with the columns of its rows that are looked at."""
    given = labels or {}
    rows = pl.DataFrame(
        {
            "feature": pl.Series(range(WIDTH), dtype=pl.Int32),
            "key": [f"{entry.key}/{feature}" for feature in range(WIDTH)],
            "label": [given[f].label if f in given else "" for f in range(WIDTH)],
            "label_id": [given[f].label_id if f in given else "" for f in range(WIDTH)],
            "f1": pl.Series([None] * WIDTH, dtype=pl.Float32),
        }
    )
    return OpenSae(stored.store, entry.key, stored.corpus.id, entry, subject, rows)


def write_labels(stored: Stored, entry: SaeEntry, labels: list[Label]) -> None:
    """A finished labels stage that holds `labels`."""
    stage, key = stored.store.stage(entry.key, stored.corpus.id, "labels"), ShardKey("labels", "0" * 16)
    stage.root.mkdir(parents=True, exist_ok=True)
    path = stage.data_path(key, ".parquet")
    label_table(labels).write_parquet(path)
    stage.commit(key, [path], {})


def copied(stored: Stored, root: Path) -> Stored:
    """The same store at another place, to be changed."""
    shutil.copytree(stored.store.root, root)
    return replace(stored, store=Store(root))


def random_acts(rng: np.random.Generator, width: int, tokens: int, density: float) -> TokenActivations:
    """Random activations, lognormal where there are any."""
    dense = np.where(rng.random((width, tokens)) < density, rng.lognormal(size=(width, tokens)), 0.0)
    return TokenActivations(sparse.csr_matrix(dense), width, tokens)


def dense_correlations(a: TokenActivations, b: TokenActivations) -> np.ndarray:
    """Pearson's correlations [F_a, F_b] in float64, of centred dense rows; 0 for a constant one."""
    rows = [acts.matrix.toarray() - acts.matrix.toarray().mean(axis=1, keepdims=True) for acts in (a, b)]
    norms = [np.linalg.norm(of, axis=1) for of in rows]
    products = norms[0][:, None] * norms[1][None]
    return np.divide(rows[0] @ rows[1].T, products, out=np.zeros(products.shape), where=products > 1e-9)
