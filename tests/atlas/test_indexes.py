import numpy as np
import pytest

from scopeatlas.atlas import indexes
from scopeatlas.atlas.indexes import IndexRecall, index_recall
from scopeatlas.atlas.publish import publish
from scopeatlas.atlas.tables import FEATURES, VECTORS, open_table
from tests.atlas.conftest import feature_rows

DIM, ROWS = 24, 600


@pytest.fixture
def put(tmp_path, embedder, rng, monkeypatch):
    """Publish an SAE of random vectors, of which every tenth has no text; returns its vectors."""
    monkeypatch.setattr(indexes, "EXACT_ROWS", 500)

    def _put(sae: str, rows: int = ROWS, *, has_text: bool = True) -> dict[str, np.ndarray]:
        vectors = {name: rng.normal(size=(rows, DIM)).astype(np.float32) for name in VECTORS}
        texts = ["" if n % 10 == 3 or not has_text else f"text {n}" for n in range(rows)]
        publish(feature_rows(sae, texts), vectors, root=tmp_path, folder=tmp_path / sae, embedder=embedder)
        return vectors

    return _put


def trained(root) -> dict[str, int]:
    """The rows that each vector index was trained on."""
    held = [index for index in open_table(root, FEATURES).list_indices() if index.columns[0] in VECTORS]
    return {index.columns[0]: int(index.name.rpartition("_")[2]) for index in held}


def test_up_to_so_many_rows_there_is_no_index_and_search_is_exact(put, tmp_path):
    put("one", rows=500)
    assert trained(tmp_path) == {}
    measured = index_recall(tmp_path)
    assert measured == IndexRecall(500, 0, {}) and measured.is_enough


def test_without_an_atlas_there_is_nothing_to_measure(tmp_path):
    assert index_recall(tmp_path) == IndexRecall(0, 0, {})


def test_an_index_is_trained_anew_once_the_table_has_outgrown_it(put, tmp_path):
    put("one")
    assert trained(tmp_path) == dict.fromkeys(VECTORS, 600)
    put("two")
    put("three")
    assert trained(tmp_path) == dict.fromkeys(VECTORS, 600)
    put("four")
    assert trained(tmp_path) == dict.fromkeys(VECTORS, 2400)


@pytest.mark.slow
def test_recall_is_the_share_of_the_nearest_that_the_index_finds(put, tmp_path, monkeypatch):
    vectors = [put(sae, rows=300) for sae in ("one", "two")]
    measured = index_recall(tmp_path, queries=40)
    assert (measured.rows, measured.queries) == (600, 40) and measured.recall == dict.fromkeys(VECTORS, 1.0)
    # With one partition looked into, of a table in few partitions, recall is what remains: counted here by itself.
    monkeypatch.setattr(indexes, "PROBES", 1)
    narrow = index_recall(tmp_path, queries=600)
    assert narrow.queries == 540  # every row that has a vector
    for column in VECTORS:
        matrix = np.concatenate([part[column] for part in vectors]).astype(np.float16).astype(np.float64)
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        keys = [f"{sae}/{n}" for sae in ("one", "two") for n in range(300)]
        has_text = np.array([int(key.rpartition("/")[2]) % 10 != 3 for key in keys])
        table = open_table(tmp_path, FEATURES)
        shares = []
        for key in (key for key, has in zip(keys, has_text, strict=True) if has):
            cosines = np.where(has_text, matrix @ matrix[keys.index(key)], -np.inf)
            cosines[keys.index(key)] = -np.inf
            true = {keys[at] for at in np.argsort(-cosines)[:10]}
            query = matrix[keys.index(key)].astype(np.float32)
            found = table.search(query, vector_column_name=column).distance_type("cosine").nprobes(1).refine_factor(3)  # pyright: ignore[reportAttributeAccessIssue]
            hits = found.select(["key", "_distance"]).limit(11).to_arrow()["key"].to_pylist()
            shares.append(len(true & set(hits)) / 10)
        assert narrow.recall[column] == pytest.approx(np.mean(shares), abs=0.02)


def test_saes_of_which_no_feature_has_a_text_leave_recall_alone(put, tmp_path, monkeypatch):
    monkeypatch.setattr(indexes, "_TILE_ROWS", 50)
    put("one")
    put("dead", rows=300, has_text=False)  # six tiles of nulls, and more rows than are drawn
    assert index_recall(tmp_path, queries=40) == IndexRecall(900, 40, dict.fromkeys(VECTORS, 1.0))


def test_an_indexed_column_without_a_vector_has_no_recall(put, tmp_path):
    put("one")
    open_table(tmp_path, FEATURES).update(values={"example_vector": None})
    assert index_recall(tmp_path, queries=40) == IndexRecall(600, 40, {"vector": 1.0})


def test_too_low_a_recall_is_not_enough():
    assert IndexRecall(10, 1, {"vector": 0.95}).is_enough and not IndexRecall(10, 1, {"vector": 0.949}).is_enough
