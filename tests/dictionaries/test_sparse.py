from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.activations.shards import round_values
from scopeatlas.dictionaries import sparse
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.dictionaries.sparse import SparseActivations, SparseDictionary, check_fits, validate
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site


@pytest.fixture
def dictionary() -> SparseDictionary:
    """Random, with a skip connection, thresholds of zero among others, and an output of another size."""
    d_in, width, d_out = 24, 70, 16
    return SparseDictionary(
        kind="transcoder",
        site_in=Site(1, "mlp", "input"),
        site_out=Site(1, "mlp", "output"),
        model_name="some/model",
        target_l0=None,
        w_enc=torch.randn(d_in, width),
        b_enc=torch.randn(width),
        threshold=(torch.rand(width) * 4 - 1).clamp(min=0),
        w_dec=torch.nn.functional.normalize(torch.randn(width, d_out), dim=1),
        b_dec=torch.randn(d_out),
        skip=torch.randn(d_in, d_out),
    )


def dense_of(acts: SparseActivations, width: int) -> torch.Tensor:
    dense = torch.zeros(acts.tokens, width)
    dense[acts.token, acts.feature] = acts.value
    return dense


def looped(dictionary: SparseDictionary, x: torch.Tensor) -> np.ndarray:
    """JumpReLU in float64, one activation at a time."""
    w, b, threshold = (t.double().numpy() for t in (dictionary.w_enc, dictionary.b_enc, dictionary.threshold))
    out = np.zeros((len(x), dictionary.width))
    for i, row in enumerate(x.double().numpy()):
        for f in range(dictionary.width):
            pre = float(row @ w[:, f] + b[f])
            out[i, f] = pre if pre > threshold[f] and pre > 0 else 0.0
    return out


@pytest.mark.parametrize("tile_bytes", [256 << 20, 4 * 30 * 7, 1])
def test_encoding_equals_a_loop_over_every_activation(dictionary, monkeypatch, tile_bytes):
    monkeypatch.setattr(sparse, "TILE_BYTES", tile_bytes)
    x = torch.randn(30, dictionary.d_in)
    acts = dictionary.encode(x)
    assert np.allclose(dense_of(acts, dictionary.width).numpy(), looped(dictionary, x), atol=1e-4)
    assert (acts.value > 0).all() and acts.tokens == 30
    order = (acts.token * dictionary.width + acts.feature).tolist()
    assert order == sorted(set(order))


def test_encoding_equals_the_dense_activations_on_the_real_model_however_many_tiles(two_saes, residual, monkeypatch):
    dictionary = open_dictionary(two_saes[0])
    dense = dictionary.dense_activations(residual)
    for features in (96, 50, 7):
        monkeypatch.setattr(sparse, "TILE_BYTES", 4 * len(residual) * features)
        assert len(list(dictionary.feature_tiles(len(residual)))) == -(-96 // features)
        acts = dictionary.encode(residual)
        assert torch.allclose(dense_of(acts, 96), dense, rtol=1e-4, atol=1e-2)
        assert abs(len(acts.value) / len(residual) - 10) < 0.5


def test_tiles_cover_each_feature_once(dictionary, monkeypatch):
    for size in (1, 5, 70, 1000):
        monkeypatch.setattr(sparse, "TILE_BYTES", 4 * 13 * size)
        covered = [f for tile in dictionary.feature_tiles(13) for f in range(tile.start, tile.stop)]
        assert covered == list(range(70))


def test_decoding_equals_the_dense_product(dictionary):
    x = torch.randn(40, dictionary.d_in)
    acts = dictionary.encode(x)
    dense = dense_of(acts, dictionary.width).double()
    expected = dense @ dictionary.w_dec.double() + dictionary.b_dec + x.double() @ dictionary.skip.double()
    assert torch.allclose(dictionary.decode(acts, x).double(), expected, atol=1e-4)


def test_tokens_on_which_nothing_fires_decode_to_the_bias(dictionary):
    plain = replace(dictionary, skip=None, threshold=torch.full((70,), 6.0))
    x = torch.randn(50, 24)
    x[[0, 17, 49]] = 0
    decoded = plain.decode(plain.encode(x))
    assert torch.allclose(decoded[[0, 17, 49]], plain.b_dec.expand(3, -1))
    nothing = SparseActivations(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), tokens=2)
    assert torch.equal(plain.decode(nothing), plain.b_dec.expand(2, -1))


def test_a_skip_connection_cannot_be_decoded_without_the_input(dictionary):
    with pytest.raises(ValueError, match="its input too"):
        dictionary.decode(dictionary.encode(torch.randn(3, 24)))


def test_half_precision_inputs_are_computed_in_float32(dictionary):
    x = torch.randn(20, 24).bfloat16()
    acts = dictionary.encode(x)
    assert acts.value.dtype == torch.float32
    assert np.allclose(dense_of(acts, 70).numpy(), looped(dictionary, x.float()), atol=1e-4)


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3, 1e7])
def test_the_value_scale_leaves_room_above_and_precision_below(dictionary, size):
    scaled = replace(dictionary, threshold=torch.rand(70) * size + size / 2)
    scale = scaled.value_scale
    median = float(scaled.threshold.median())
    assert np.log2(scale) == round(np.log2(scale)) and 0.7 * 2**-3 <= median / scale <= 1.42 * 2**-3
    values = np.float32(median) * np.array([2.0**-9, 0.01, 1, 300, 2.0**17], dtype=np.float32)
    assert np.allclose(round_values(values, scale).astype(np.float64) * scale, values, rtol=2**-11)


def test_the_value_scale_is_one_where_no_threshold_is_positive(dictionary):
    assert replace(dictionary, threshold=torch.zeros(70)).value_scale == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_enc": torch.full((24, 70), torch.nan)}, "w_enc holds 1680 value\\(s\\) that are NaN or infinite"),
        ({"b_dec": torch.full((16,), torch.inf)}, "b_dec holds 16"),
        ({"threshold": torch.full((70,), -0.1)}, "negative thresholds"),
        ({"b_enc": torch.zeros(69)}, r"b_enc has shape \(69,\), expected \(70,\)"),
        ({"w_dec": torch.randn(16, 70)}, r"w_dec has shape \(16, 70\), expected \(70, 70\)"),
        ({"w_dec": torch.randn(70, 16) * 3}, "decoder rows are not unit norm"),
        ({"skip": torch.randn(16, 24)}, r"skip has shape \(16, 24\), expected \(24, 16\)"),
    ],
)
def test_a_damaged_tensor_is_named_with_its_file(dictionary, change, message):
    validate(dictionary, "here.safetensors")
    with pytest.raises(DictionaryError, match=f"here.safetensors: .*{message}"):
        validate(replace(dictionary, **change), "here.safetensors")


def test_a_dictionary_of_another_size_than_the_model_is_refused(dictionary):
    check_fits(dictionary, 24, "folder", "the/subject")
    with pytest.raises(
        DictionaryError, match="folder: .* size 24, but model.layers.1.mlp.input of the/subject has 640.*some/model"
    ):
        check_fits(dictionary, 640, "folder", "the/subject")
