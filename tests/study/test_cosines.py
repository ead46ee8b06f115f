from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.dictionaries.releases import load_folder, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.study import cosines
from scopeatlas.study.cosines import different_spaces, nearest_directions, pair_cosines
from tests.conftest import WIDTH, changed, entry_of, sae_tensors, write_sae
from tests.multi_layer import multi_layer_tensors, write_multi_layer
from tests.study.opened import opened


@pytest.fixture(scope="module")
def pair(two_saes) -> tuple[SparseDictionary, SparseDictionary]:
    one, other = (open_dictionary(entry) for entry in two_saes)
    return one, other


@pytest.fixture(scope="module")
def crosscoders(tmp_path_factory) -> list[SparseDictionary]:
    root, draw = tmp_path_factory.mktemp("crosscoders"), torch.Generator().manual_seed(0)
    xs = [torch.randn(200, 24, generator=draw) for _ in range(3)]
    folders = [root / "demo" / "crosscoder" / f"seed_{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write_multi_layer(folder, "crosscoder", [0, 1, 2], multi_layer_tensors(xs, width=11, seed=seed))
    return [load_folder(folder) for folder in folders]


def dense_cosines(a: SparseDictionary, b: SparseDictionary) -> np.ndarray:
    """[F_a, F_b] in float64, of all that a feature writes, one site after another."""

    def rows(of: SparseDictionary) -> np.ndarray:
        every = [
            torch.cat([of.steering_vector(f, output) for output in range(len(of.sites_out))]).double().numpy()
            for f in range(of.width)
        ]
        return np.array([row / np.linalg.norm(row) for row in every])

    return rows(a) @ rows(b).T


@pytest.mark.parametrize("kind", ["sae", "crosscoder"])
def test_cosines_and_nearest_are_those_of_all_rows_together_whatever_the_tiles(kind, pair, crosscoders, monkeypatch, rng):
    a, b = pair if kind == "sae" else crosscoders
    expected = dense_cosines(a, b)
    for tile in (7, 2048):
        monkeypatch.setattr(cosines, "TILE_ROWS", tile)
        of_a, of_b = rng.integers(0, a.width, 50), rng.integers(0, b.width, 50)
        np.testing.assert_allclose(pair_cosines(a, b, of_a, of_b), expected[of_a, of_b], atol=1e-6)
        for nearest, values in zip(nearest_directions(a, b), (expected, expected.T), strict=True):
            np.testing.assert_allclose(nearest.cosine, values.max(axis=1), atol=1e-6)
            np.testing.assert_allclose(values[np.arange(len(values)), nearest.feature], values.max(axis=1), atol=1e-6)


def test_layers_of_the_residual_stream_are_one_space_and_other_sites_are_not(small, subject, residual, tmp_path):
    def sae_at(site: str):
        folder = write_sae(
            tmp_path / site, sae_tensors(residual, width=WIDTH, seed=3), hf_hook_point_in=site, hf_hook_point_out=site
        )
        return opened(small, entry_of(folder), subject)

    stream, later, mlp, later_mlp = map(
        sae_at, ("model.layers.1.output", "model.layers.9.output", "model.layers.1.mlp.output", "model.layers.9.mlp.output")
    )
    assert different_spaces(stream, later) == "" == different_spaces(mlp, mlp)
    for one, other in ((stream, mlp), (mlp, later_mlp)):
        said = different_spaces(one, other)
        assert str(one.dictionary.sites_out[0]) in said and str(other.dictionary.sites_out[0]) in said


def test_models_of_another_shape_are_another_space_and_a_fine_tune_is_not(small, subject):
    one = opened(small, small.entries[0], subject)
    wider = replace(one, subject=changed(subject, name="wider", config=changed_config(subject, hidden_size=9)))
    tuned = replace(one, subject=changed(subject, name="tuned", identity="trained further"))
    assert "different shape" in different_spaces(one, wider)
    assert different_spaces(one, tuned) == ""


def changed_config(subject, **fields):
    from copy import copy

    config = copy(subject.config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config
