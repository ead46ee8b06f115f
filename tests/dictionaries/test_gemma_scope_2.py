import pytest
import torch

from scopeatlas.dictionaries.gemma_scope_2 import is_whole, load
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site
from tests.conftest import sae_tensors, write_sae


@pytest.fixture
def tensors():
    return sae_tensors(torch.randn(300, 32), width=20, l0=3)


def test_a_folder_loads_as_it_was_written(tmp_path, tensors):
    dictionary = load(write_sae(tmp_path, tensors, hf_hook_point_in="model.layers.7.self_attn.o_proj.input"))
    assert (dictionary.d_in, dictionary.width, dictionary.d_out) == (32, 20, 32)
    assert all(torch.equal(getattr(dictionary, name), tensor) for name, tensor in tensors.items())
    assert dictionary.site_in == Site(7, "self_attn.o_proj", "input") and dictionary.site_out == Site(1, "", "output")
    assert (dictionary.kind, dictionary.target_l0, dictionary.model_name) == ("sae", 10, "google/gemma-3-270m")


def test_a_transcoder_with_a_skip_connection_loads(tmp_path, tensors):
    folder = write_sae(tmp_path, tensors | {"affine_skip_connection": torch.randn(32, 32)}, type="transcoder")
    dictionary = load(folder)
    assert dictionary.kind == "transcoder" and dictionary.skip is not None and dictionary.skip.shape == (32, 32)


def test_weights_in_half_precision_become_float32(tmp_path, tensors):
    dictionary = load(write_sae(tmp_path, {name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert dictionary.w_enc.dtype == torch.float32


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_named_as_such(tmp_path, tensors, kept):
    weights = write_sae(tmp_path, tensors) / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(DictionaryError, match="params.safetensors is truncated or not safetensors .*; download it again"):
        load(tmp_path)


def test_a_missing_config_is_named(tmp_path, tensors):
    (write_sae(tmp_path, tensors) / "config.json").unlink()
    with pytest.raises(DictionaryError, match="config.json is missing; download the whole folder"):
        load(tmp_path)


def test_missing_weights_are_named(tmp_path, tensors):
    (write_sae(tmp_path, tensors) / "params.safetensors").unlink()
    with pytest.raises(DictionaryError, match="params.safetensors is missing; download the whole folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ("[1]", "does not hold a JSON object"), ("{}", "lacks 'hf_hook_point_in'")]
)
def test_a_config_that_says_nothing_is_named(tmp_path, tensors, text, message):
    (write_sae(tmp_path, tensors) / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(DictionaryError, match=f"config.json .*{message}|config.json {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "crosscoder"}, "type 'crosscoder' is not a single-layer kind"),
        ({"architecture": "topk"}, "architecture 'topk' is not jump_relu"),
        ({"affine_connection": True}, "disagree about an affine_skip_connection"),
        ({"width": 16384}, "has 20 features, config.json says 16384"),
        ({"hf_hook_point_out": "blocks.3.hook_resid_post"}, "hook point 'blocks.3.hook_resid_post' is not of the form"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, tensors, config, message):
    with pytest.raises(DictionaryError, match=message):
        load(write_sae(tmp_path, tensors, **config))


def test_tensors_of_another_format_are_listed(tmp_path, tensors):
    tensors["W_enc"] = tensors.pop("w_enc")
    with pytest.raises(DictionaryError, match=r"not Gemma Scope 2's tensors \(missing: w_enc; unknown: W_enc\)"):
        load(write_sae(tmp_path, tensors))


def test_a_shard_of_a_multi_layer_dictionary_is_refused(tmp_path, tensors):
    tensors["w_dec"] = tensors["w_dec"][:, None, :].repeat(1, 2, 1)
    with pytest.raises(DictionaryError, match="multi-layer dictionary"):
        load(write_sae(tmp_path, tensors))


def test_nan_in_the_weights_is_counted(tmp_path, tensors):
    tensors["w_enc"][:2, 3] = torch.nan
    with pytest.raises(DictionaryError, match=r"params.safetensors: w_enc holds 2 value\(s\) that are NaN"):
        load(write_sae(tmp_path, tensors))


def test_a_folder_is_whole_only_when_every_byte_is_there(tmp_path, tensors):
    weights = write_sae(tmp_path, tensors) / "params.safetensors"
    assert is_whole(tmp_path)
    data = weights.read_bytes()
    for kept in (0, 4, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:kept])
        assert not is_whole(tmp_path), kept
    weights.write_bytes(data)
    (tmp_path / "config.json").write_text('{"type": "sa', encoding="utf-8")
    assert not is_whole(tmp_path)
