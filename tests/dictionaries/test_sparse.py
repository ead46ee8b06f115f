"""Encoding and decoding against float64 loops and einsums written from the papers' formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.activations.shards import round_values
from scopeatlas.dictionaries import sparse
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, LazyLayers, SparseActivations, SparseDictionary, fold_b_dec
from scopeatlas.dictionaries.validation import check_fits, validate
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site

D_IN, F, D_OUT, L = 24, 70, 16, 3


def draw(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.fixture
def transcoder(rng) -> SparseDictionary:
    """Random, with a skip connection, thresholds of zero among others, and an output of another size."""
    layer = LayerWeights(
        w_enc=draw(rng, D_IN, F),
        b_enc=draw(rng, F),
        w_dec=unit(draw(rng, F, 1, D_OUT)),
        threshold=draw(rng, F).mul(2).clamp(min=0),
        skip=draw(rng, D_IN, D_OUT),
    )
    sites = (Site(1, "mlp", "input"),), (Site(1, "mlp", "output"),)
    return SparseDictionary("transcoder", *sites, "some/model", (layer,), draw(rng, 1, D_OUT), Activation("jumprelu"))


@pytest.fixture
def clt(rng) -> SparseDictionary:
    """Three layers, each writing to itself and later ones, with a skip at every layer."""
    layers = []
    for position in range(L):
        w_dec = draw(rng, F, L, D_IN)
        w_dec[:, :position] = 0
        threshold = draw(rng, F).abs() + 2
        layers.append(LayerWeights(draw(rng, D_IN, F), draw(rng, F), w_dec, threshold, skip=draw(rng, D_IN, D_IN)))
    sites = tuple(Site(i, "ln2", "output") for i in range(L)), tuple(Site(i, "hook_mlp_out", "output") for i in range(L))
    return SparseDictionary("clt", *sites, "some/model", tuple(layers), draw(rng, L, D_IN), Activation("jumprelu"))


def only_layer(dictionary: SparseDictionary, **changes) -> SparseDictionary:
    return replace(dictionary, layers=(replace(dictionary.layers[0], **changes),))


def pre_activations(layer: LayerWeights, x: torch.Tensor) -> np.ndarray:
    return np.einsum("ti,if->tf", x.double().numpy(), layer.w_enc.double().numpy()) + layer.b_enc.double().numpy()


def draw_clear(rng: np.random.Generator, tokens: int, layer: LayerWeights) -> torch.Tensor:
    """Inputs [tokens, D_IN] that bring no pre-activation so close to its threshold, or to 0, that float32 might decide otherwise."""
    x, near = draw(rng, tokens, D_IN), np.ones(tokens, dtype=bool)
    floor = 0.0 if layer.threshold is None else layer.threshold.double().numpy()
    while near.any():
        x[near] = draw(rng, int(near.sum()), D_IN)
        pre = pre_activations(layer, x)
        near = (np.minimum(np.abs(pre - floor), np.abs(pre)) < 1e-4).any(axis=1)
    return x


def jumprelu(layer: LayerWeights, x: torch.Tensor) -> np.ndarray:
    """In float64, one activation at a time."""
    pre, threshold = pre_activations(layer, x), layer.threshold.double().numpy()
    return np.array([[p if p > t and p > 0 else 0.0 for p, t in zip(row, threshold, strict=True)] for row in pre])


def assert_sorted(acts: SparseActivations, width: int) -> None:
    order = (acts.token * width + acts.feature).tolist()
    assert order == sorted(set(order))


@pytest.mark.parametrize("tile_bytes", [256 << 20, 4 * 30 * 7, 1])
def test_encoding_equals_a_loop_over_every_activation(transcoder, rng, monkeypatch, tile_bytes):
    monkeypatch.setitem(sparse.TILE_BYTES, "cpu", tile_bytes)
    x = draw_clear(rng, 30, transcoder.layers[0])
    acts = transcoder.encode(x)
    assert np.allclose(acts.dense(F).numpy(), jumprelu(transcoder.layers[0], x), atol=1e-4)
    assert (acts.value > 0).all() and acts.tokens == 30
    assert_sorted(acts, F)


def largest(size: np.ndarray, k: int) -> np.ndarray:
    """Which k of each row are largest."""
    return np.argsort(np.argsort(-size, axis=1, kind="stable"), axis=1) < k


FORMULAS = {
    "relu": (Activation("relu"), lambda pre: np.maximum(pre, 0)),
    "topk": (Activation("topk", 5), lambda pre: np.maximum(pre, 0) * largest(np.maximum(pre, 0), 5)),
    "topk of more than fire": (Activation("topk", 60), lambda pre: np.maximum(pre, 0) * largest(np.maximum(pre, 0), 60)),
    "abstopk": (Activation("abstopk", 5), lambda pre: pre * largest(np.abs(pre), 5)),
    "groupmax": (
        Activation("groupmax", 10),
        lambda pre: np.maximum(pre, 0) * np.repeat(pre.reshape(-1, 10, 7).max(2), 7, axis=1).__eq__(pre),
    ),
}


@pytest.mark.parametrize("tile_bytes", [256 << 20, 4 * 30 * 16, 1])
@pytest.mark.parametrize("name", FORMULAS)
def test_every_activation_function_is_its_formula_however_many_tiles(transcoder, rng, monkeypatch, name, tile_bytes):
    monkeypatch.setitem(sparse.TILE_BYTES, "cpu", tile_bytes)
    activation, formula = FORMULAS[name]
    dictionary = replace(only_layer(transcoder, threshold=None), activation=activation)
    x = draw(rng, 30, D_IN)
    acts = dictionary.encode(x)
    assert np.allclose(acts.dense(F).numpy(), formula(pre_activations(dictionary.layers[0], x)), atol=1e-4)
    assert_sorted(acts, F)


def test_a_gated_sae_opens_a_gate_and_gives_another_magnitude(transcoder, rng):
    scale, shift = draw(rng, F).exp(), draw(rng, F)
    dictionary = replace(only_layer(transcoder, threshold=None, magnitude=(scale, shift)), activation=Activation("gated"))
    x = draw(rng, 30, D_IN)
    pre = pre_activations(dictionary.layers[0], x)
    expected = (pre > 0) * np.maximum(pre * scale.double().numpy() + shift.double().numpy(), 0)
    assert np.allclose(dictionary.encode(x).dense(F).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["token_norm", "layer_norm"])
def test_an_input_norm_is_applied_before_encoding_and_undone_after_decoding(transcoder, rng, norm):
    layer = LayerWeights(draw(rng, D_IN, F), draw(rng, F), draw(rng, F, 1, D_IN), threshold=draw(rng, F).abs())
    dictionary = replace(transcoder, layers=(layer,), b_dec=draw(rng, 1, D_IN), norm=norm)
    x = draw(rng, 20, D_IN) * 30 + 5
    x64 = x.double().numpy()
    if norm == "token_norm":
        size = np.linalg.norm(x64, axis=1, keepdims=True) / np.sqrt(D_IN)
        z, centre = x64 / size, 0.0
    else:
        centre, size = x64.mean(1, keepdims=True), x64.std(1, ddof=1, keepdims=True)
        z = (x64 - centre) / (size + 1e-5)
    acts = jumprelu(layer, torch.from_numpy(z))
    y = (acts @ layer.w_dec[:, 0].double().numpy() + dictionary.b_dec.double().numpy()) * size + centre
    found = dictionary.encode(x)
    assert np.allclose(found.dense(F).numpy(), acts, atol=1e-4)
    assert np.allclose(dictionary.decode(found, x).numpy(), y, rtol=1e-4, atol=1e-3)


def test_subtracting_b_dec_can_be_folded_into_b_enc(transcoder, rng):
    x, b_dec, layer = draw(rng, 20, D_IN), draw(rng, D_IN), transcoder.layers[0]
    folded = only_layer(transcoder, b_enc=fold_b_dec(layer.b_enc, b_dec, layer.w_enc))
    assert np.allclose(folded.encode(x).dense(F).numpy(), jumprelu(layer, x.double() - b_dec.double()), atol=1e-4)


def test_encoding_on_the_real_model_equals_float64_however_many_tiles(two_saes, residual, monkeypatch):
    dictionary = open_dictionary(two_saes[0])
    expected = torch.from_numpy(jumprelu(dictionary.layers[0], residual)).float()
    for features in (96, 50, 7):
        monkeypatch.setitem(sparse.TILE_BYTES, "cpu", 4 * len(residual) * features)
        acts = dictionary.encode(residual)
        assert torch.allclose(acts.dense(96), expected, rtol=1e-4, atol=1e-2)
        assert abs(len(acts.value) / len(residual) - 10) < 0.5


def test_decoding_equals_the_dense_product(transcoder, rng):
    layer = transcoder.layers[0]
    x = draw_clear(rng, 40, layer)
    acts = transcoder.encode(x)
    expected = acts.dense(F).double() @ layer.w_dec[:, 0].double() + transcoder.b_dec.double() + x.double() @ layer.skip.double()
    assert torch.allclose(transcoder.decode(acts, x).double(), expected, atol=1e-4)


def clt_einsum(clt: SparseDictionary, xs: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """acts [T, L, F] and y [T, L, d] in float64, from stacked tensors."""
    acts = np.stack([jumprelu(layer, x) for layer, x in zip(clt.layers, xs, strict=True)], axis=1)
    w_dec = np.stack([layer.w_dec.double().numpy() for layer in clt.layers])
    skip = np.stack([layer.skip.double().numpy() for layer in clt.layers])
    x = np.stack([x.double().numpy() for x in xs], axis=1)
    y = np.einsum("tlf,lfod->tod", acts, w_dec) + clt.b_dec.double().numpy() + np.einsum("tli,lid->tld", x, skip)
    return acts, y


@pytest.mark.parametrize("streamed", [False, True])
def test_a_multi_layer_dictionary_equals_the_einsums_over_all_layers(clt, rng, streamed):
    xs = [draw_clear(rng, 25, layer) for layer in clt.layers]
    expected_acts, expected_y = clt_einsum(clt, xs)
    dictionary = replace(clt, layers=LazyLayers(lambda i: clt.layers[i], L)) if streamed else clt
    acts = dictionary.encode(xs)
    assert np.allclose(acts.dense(L * F).numpy(), expected_acts.reshape(25, L * F), atol=1e-4)
    assert np.allclose(dictionary.decode(acts, xs).numpy(), expected_y, atol=1e-3)
    assert_sorted(acts, L * F)


def test_a_layer_may_store_only_the_outputs_from_its_own_on(clt, rng):
    xs = [draw_clear(rng, 25, layer) for layer in clt.layers]
    short = [replace(layer, w_dec=layer.w_dec[:, i:].contiguous(), first_output=i) for i, layer in enumerate(clt.layers)]
    dictionary = validate(replace(clt, layers=tuple(short)), "here")
    for moved in (dictionary, dictionary.to(torch.device("cpu"))):
        assert torch.allclose(moved.decode(moved.encode(xs), xs), clt.decode(clt.encode(xs), xs), atol=1e-5)
    for output in range(L):
        assert torch.equal(dictionary.steering_vector(2 * F + 7, output), clt.steering_vector(2 * F + 7, output))
    assert torch.equal(torch.cat(list(short[1].row_tiles(7))), clt.layers[1].w_dec)
    late = replace(short[1], w_dec=short[1].w_dec[:, 1:], first_output=2)
    with pytest.raises(DictionaryError, match="writes nothing to its own layer"):
        validate(replace(clt, layers=(short[0], late, short[2])), "here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoder_rows_of_any_dtype_are_computed_in_float32(clt, rng, dtype):
    narrow = [replace(layer, w_dec=layer.w_dec.to(dtype)) for layer in clt.layers]
    widened = [replace(layer, w_dec=layer.w_dec.float()) for layer in narrow]
    xs = [draw_clear(rng, 25, layer) for layer in clt.layers]
    acts = clt.encode(xs)
    got, expected = (replace(clt, layers=tuple(layers)).decode(acts, xs) for layers in (narrow, widened))
    assert torch.equal(got, expected)


def test_streamed_layers_are_opened_one_at_a_time_and_kept_by_nobody(clt, rng):
    opened: list[int] = []
    dictionary = replace(clt, layers=LazyLayers(lambda i: opened.append(i) or clt.layers[i], L))
    xs = [draw(rng, 5, D_IN) for _ in range(L)]
    _ = dictionary.width
    opened.clear()
    dictionary.encode(xs)
    assert opened == [0, 1, 2]
    assert [len(part) for part in (dictionary.layers[1:], dictionary.layers[-1:])] == [2, 1]
    with pytest.raises(IndexError):
        dictionary.layers[L]


def test_a_feature_is_known_by_layer_and_index_with_a_direction_to_read_and_one_to_write_at_each_output(clt):
    feature = 2 * F + 7
    assert clt.place(feature) == (2, 7) and clt.width == L * F
    for output in range(L):
        assert torch.equal(clt.steering_vector(feature, output), clt.layers[2].w_dec[7, output])
    assert torch.equal(clt.reading_direction(feature), clt.layers[2].w_enc[:, 7])


def test_tokens_on_which_nothing_fires_decode_to_the_bias(transcoder, rng):
    plain = only_layer(transcoder, skip=None, threshold=torch.full((F,), 50.0))
    x = draw(rng, 50, D_IN)
    x[[0, 17, 49]] = 0
    decoded = plain.decode(plain.encode(x))
    assert torch.allclose(decoded[[0, 17, 49]], plain.b_dec.expand(3, -1))
    nothing = SparseActivations(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), tokens=2)
    assert torch.equal(plain.decode(nothing), plain.b_dec.expand(2, -1))


def test_a_skip_connection_cannot_be_decoded_without_the_input(transcoder, rng):
    with pytest.raises(ValueError, match="its input too"):
        transcoder.decode(transcoder.encode(draw(rng, 3, D_IN)))


def test_half_precision_inputs_are_computed_in_float32(transcoder, rng):
    x = draw(rng, 20, D_IN).bfloat16()
    acts = transcoder.encode(x)
    assert acts.value.dtype == torch.float32
    assert np.allclose(acts.dense(F).numpy(), jumprelu(transcoder.layers[0], x.float()), atol=1e-4)


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3, 1e7])
def test_the_value_scale_leaves_room_above_and_precision_below(transcoder, rng, size):
    thresholds = torch.from_numpy(rng.random(F).astype(np.float32)) * size + size / 2
    scale = only_layer(transcoder, threshold=thresholds).value_scale
    median = float(thresholds.median())
    assert np.log2(scale) == round(np.log2(scale)) and 0.7 * 2**-3 <= median / scale <= 1.42 * 2**-3
    values = np.float32(median) * np.array([2.0**-9, 0.01, 1, 300, 2.0**17], dtype=np.float32)
    assert np.allclose(round_values(values, scale).astype(np.float64) * scale, values, rtol=2**-11)


def test_without_thresholds_the_value_scale_still_holds_values_from_a_thousandth_to_a_million(transcoder):
    scale = only_layer(transcoder, threshold=None).value_scale
    values = np.array([1e-3, 1.0, 1e6], dtype=np.float32)
    assert np.allclose(round_values(values, scale).astype(np.float64) * scale, values, rtol=2**-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_enc": torch.full((D_IN, F), torch.nan)}, "w_enc holds 1680 value\\(s\\) that are NaN or infinite"),
        ({"threshold": torch.full((F,), -0.1)}, "negative thresholds"),
        ({"b_enc": torch.zeros(69)}, r"b_enc has shape \(69,\), expected \(70,\)"),
        ({"w_dec": torch.randn(16, 1, 70)}, r"w_dec has shape \(16, 1, 70\), expected \(70, 1, 70\)"),
        ({"skip": torch.randn(16, 24)}, r"skip has shape \(16, 24\), expected \(24, 16\)"),
    ],
)
def test_a_damaged_tensor_is_named_with_its_file(transcoder, change, message):
    validate(transcoder, "here.safetensors")
    with pytest.raises(DictionaryError, match=f"here.safetensors: .*{message}"):
        validate(only_layer(transcoder, **change), "here.safetensors")


def test_a_damaged_bias_is_named(transcoder):
    with pytest.raises(DictionaryError, match="here: b_dec holds 16"):
        validate(replace(transcoder, b_dec=torch.full((1, D_OUT), torch.inf)), "here")


def test_decoder_rows_that_are_not_of_unit_norm_are_an_error_in_gemma_scope_and_a_note_elsewhere(transcoder):
    long = only_layer(transcoder, w_dec=transcoder.layers[0].w_dec * 3)
    assert validate(long, "here").notes == ("70 of 70 decoder rows are not of unit norm (3 to 3)",)
    with pytest.raises(DictionaryError, match="here: 70 of 70 decoder rows are not unit norm"):
        validate(replace(long, family="gemma_scope_2"), "here")


def test_a_single_odd_decoder_row_is_a_note_in_gemma_scope_too(transcoder):
    rows = transcoder.layers[0].w_dec.repeat(3, 1, 1).clone()
    rows[5] = 0
    layer = transcoder.layers[0]
    wide = replace(
        layer, w_enc=layer.w_enc.repeat(1, 3), b_enc=layer.b_enc.repeat(3), threshold=layer.threshold.repeat(3), w_dec=rows
    )
    found = validate(replace(transcoder, layers=(wide,), family="gemma_scope_1"), "here")
    assert found.notes == ("1 of 210 decoder rows are not of unit norm (0 to 1)",)


def test_encoding_stops_as_soon_as_more_features_fire_than_may(transcoder, rng, monkeypatch):
    monkeypatch.setitem(sparse.TILE_BYTES, "cpu", 4 * 30 * 7)
    x = draw(rng, 30, D_IN) * 100
    active = len(transcoder.encode(x).token) / 30
    assert len(transcoder.encode(x, max_l0=active + 1).token) == round(active * 30)
    with pytest.raises(DictionaryError, match="features fire on the average token: the SAE is read at a wrong site"):
        transcoder.encode(x, max_l0=active / 2)


def test_a_clt_that_writes_backwards_or_not_to_itself_is_refused(clt):
    files = ["shard 0", "shard 1", "shard 2"]
    validate(clt, "here", files=files)
    backwards = clt.layers[2].w_dec.clone()
    backwards[5, 1, 0] = 1e-3
    with pytest.raises(DictionaryError, match="shard 2: w_dec writes to layers before its own"):
        validate(replace(clt, layers=(*clt.layers[:2], replace(clt.layers[2], w_dec=backwards))), "here", files=files)
    silent = clt.layers[1].w_dec.clone()
    silent[:, 1] = 0
    with pytest.raises(DictionaryError, match="shard 1: w_dec writes nothing to its own layer"):
        validate(replace(clt, layers=(clt.layers[0], replace(clt.layers[1], w_dec=silent), clt.layers[2])), "here", files=files)


def test_a_dictionary_of_another_size_than_the_model_is_refused(transcoder):
    sizes = {transcoder.sites_in[0]: D_IN, transcoder.sites_out[0]: D_OUT}
    check_fits(transcoder, sizes, "folder", "the/subject")
    for verb, site, size in (("reads", transcoder.sites_in[0], D_IN), ("writes", transcoder.sites_out[0], D_OUT)):
        message = f"folder: {verb} activations of size {size}, but {site} of the/subject has 640.*some/model"
        with pytest.raises(DictionaryError, match=message):
            check_fits(transcoder, sizes | {site: 640}, "folder", "the/subject")
