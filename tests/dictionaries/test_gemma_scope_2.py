import json

import pytest
import torch

from scopeatlas.dictionaries.gemma_scope_2 import clean_model_name, facts, find, load, model_of
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.dictionaries.validation import validate
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site
from tests.conftest import sae_tensors, write_sae

RELEASE = "gemma-scope-2-4b-it"
FOLDER = "attn_out_all/layer_11_width_16k_l0_small"


@pytest.fixture
def tensors():
    return sae_tensors(torch.randn(300, 32), width=20, l0=3)


def find_one(root) -> SaeFiles:
    (files,) = find([path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()])
    return files


def open_only(root, release: str = RELEASE) -> SparseDictionary:
    return load(root, find_one(root), release)


def without_config(root, tensors, path: str):
    (write_sae(root / path, tensors) / "config.json").unlink()


def test_a_folder_loads_as_it_was_written(tmp_path, tensors):
    write_sae(tmp_path, tensors, hf_hook_point_in="model.layers.7.self_attn.o_proj.input")
    dictionary = open_only(tmp_path)
    (layer,) = dictionary.layers
    assert (dictionary.d_in, dictionary.width, dictionary.d_out) == (32, 20, 32)
    assert all(torch.equal(getattr(layer, name), tensors[name]) for name in ("w_enc", "b_enc", "threshold"))
    assert torch.equal(layer.w_dec[:, 0], tensors["w_dec"]) and torch.equal(dictionary.b_dec[0], tensors["b_dec"])
    assert dictionary.sites_in == (Site(7, "self_attn.o_proj", "input"),) and dictionary.sites_out == (Site(1, "", "output"),)
    assert (dictionary.kind, dictionary.target_l0, dictionary.model_name) == ("sae", 10, "google/gemma-3-270m")


def test_a_skip_connection_multiplies_the_input_from_the_right(tmp_path, tensors):
    skip, x = torch.randn(32, 32), torch.randn(5, 32)
    write_sae(tmp_path, tensors | {"affine_skip_connection": skip}, type="transcoder")
    dictionary = open_only(tmp_path)
    acts = dictionary.encode(x)
    expected = acts.dense(20) @ tensors["w_dec"] + tensors["b_dec"] + x @ skip
    assert dictionary.kind == "transcoder"
    torch.testing.assert_close(dictionary.decode(acts, x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_stay_so_and_are_computed_in_float32(tmp_path, tensors, dtype):
    halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_sae(tmp_path, halved)
    dictionary, x = open_only(tmp_path), torch.randn(40, 32)
    pre = x @ halved["w_enc"].float() + halved["b_enc"].float()
    assert dictionary.layers[0].w_enc.dtype == dtype
    torch.testing.assert_close(dictionary.encode(x).dense(20), pre * (pre > halved["threshold"].float()))


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_named_as_such(tmp_path, tensors, kept):
    weights = write_sae(tmp_path, tensors) / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(DictionaryError, match="params.safetensors is truncated or not safetensors .*; download it again"):
        open_only(tmp_path)


# Layers, sites, target L0 by hand from the formulas of the published configs: t = min(1, 3 L / n) with n = 34.
@pytest.mark.parametrize(
    ("path", "site_in", "site_out", "l0"),
    [
        ("resid_post/layer_9_width_65k_l0_big", "", "", 60 + 71),
        ("resid_post_all/layer_9_width_16k_l0_big", "", "", 60 + 47),
        ("resid_post/layer_17_width_262k_l0_medium_seed_1", "", "", 60),
        ("mlp_out_all/layer_2_width_16k_l0_small", "post_feedforward_layernorm", "post_feedforward_layernorm", 10 + 1),
        ("transcoder_all/layer_0_width_16k_l0_big", "pre_feedforward_layernorm", "post_feedforward_layernorm", 60),
    ],
)
def test_without_a_config_the_names_say_everything(tmp_path, tensors, path, site_in, site_out, l0):
    without_config(tmp_path, tensors, path)
    dictionary = open_only(tmp_path)
    layer = int(path.split("layer_")[1].split("_")[0])
    assert dictionary.sites_in == (Site(layer, site_in, "output"),) and dictionary.sites_out == (Site(layer, site_out, "output"),)
    assert (dictionary.target_l0, dictionary.model_name) == (l0, "google/gemma-3-4b-it")
    assert dictionary.kind == ("transcoder" if path.startswith("transcoder") else "sae")
    assert any(note.startswith("no config.json") for note in dictionary.notes)


def test_without_a_config_attention_is_read_where_the_heads_are_still_apart(tmp_path, tensors):
    without_config(tmp_path, tensors, FOLDER)
    dictionary = open_only(tmp_path)
    assert dictionary.sites_in == dictionary.sites_out == (Site(11, "self_attn.o_proj", "input"),)


def test_a_missing_config_whose_folder_says_nothing_is_named(tmp_path, tensors):
    without_config(tmp_path, tensors, "mine/layer_2")
    with pytest.raises(DictionaryError, match="config.json is missing; download the whole folder, or name it as on the Hub"):
        open_only(tmp_path)


def test_the_names_give_the_facts_of_a_listing():
    (files,) = find([f"{FOLDER}/params.safetensors", f"{FOLDER}/examples.safetensors", f"{FOLDER}/config.json"])
    assert files.all == (f"{FOLDER}/params.safetensors", f"{FOLDER}/config.json") and not files.missing
    assert facts(files, RELEASE) == SaeFacts("sae", "attn_out", (11,), 16384, 19.0, "google/gemma-3-4b-it")
    assert facts(files, "my-copy") == SaeFacts("sae", "attn_out", (11,), 16384, None, "")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gemma-v3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-it", "google/gemma-3-270m-it"),
    ],
)
def test_a_config_s_model_name_is_mended(tmp_path, tensors, written, meant):
    write_sae(tmp_path, tensors, model_name=written)
    dictionary = open_only(tmp_path)
    assert dictionary.model_name == meant == clean_model_name(meant)
    assert any(written in note for note in dictionary.notes) == (written != meant)


@pytest.mark.parametrize(
    ("release", "model"),
    [
        ("gemma-scope-2-270m-pt", "google/gemma-3-270m"),
        ("gemma-scope-2-27b-it", "google/gemma-3-27b-it"),
        ("scope-atlas-demo-gemma-3-270m", "google/gemma-3-270m"),
        ("gemma-scope-2", ""),
        ("gemma-scope-2b-pt-res", ""),
    ],
)
def test_a_release_s_name_tells_the_model(release, model):
    assert model_of(release) == model


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ("[1]", "does not hold an object"), ("{}", "lacks 'hf_hook_point_in'")]
)
def test_a_config_that_says_nothing_is_named(tmp_path, tensors, text, message):
    (write_sae(tmp_path, tensors) / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(DictionaryError, match=f"config.json .*{message}|config.json {message}"):
        open_only(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "crosscoder"}, "type 'crosscoder' is not one of sae, transcoder"),
        ({"architecture": "topk"}, "architecture 'topk' is not jump_relu"),
        ({"affine_connection": True}, "disagree about an affine_skip_connection"),
        ({"width": 16384}, "says 16384 features, the weights have 20"),
        ({"l0": "many"}, "l0 'many' is not a number"),
        ({"hf_hook_point_out": "blocks.3.hook_nothing"}, "hook point 'blocks.3.hook_nothing'"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, tensors, config, message):
    write_sae(tmp_path, tensors, **config)
    with pytest.raises(DictionaryError, match=f"config.json.*{message}"):
        open_only(tmp_path)


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        (FOLDER, {"hf_hook_point_in": "model.layers.12.self_attn.o_proj.input"}, "name says a sae of model.layers.11.self_attn"),
        (FOLDER, {"hf_hook_point_in": "model.layers.11.output"}, "config.json a sae of model.layers.11.output"),
        (
            "transcoder/layer_1_width_16k_l0_big",
            {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output"},
            "a transcoder of",
        ),
        ("resid_post/layer_1_width_16k_l0_big_affine", {}, "name and its tensors disagree about an affine_skip_connection"),
    ],
)
def test_a_config_that_does_not_fit_its_folder_s_name_is_refused(tmp_path, tensors, path, config, message):
    write_sae(tmp_path / path, tensors, **config)
    with pytest.raises(DictionaryError, match=message):
        open_only(tmp_path)


def test_tensors_of_another_format_are_listed(tmp_path, tensors):
    tensors["W_enc"] = tensors.pop("w_enc")
    write_sae(tmp_path, tensors)
    with pytest.raises(DictionaryError, match=r"params.safetensors: not the tensors expected \(missing: w_enc; unknown: W_enc\)"):
        open_only(tmp_path)


def test_a_transposed_encoder_is_refused(tmp_path, tensors):
    tensors["w_enc"] = tensors["w_enc"].T.contiguous()
    write_sae(tmp_path, tensors)
    with pytest.raises(DictionaryError, match=r"params.safetensors: b_enc has shape \(20,\), expected \(32\)"):
        open_only(tmp_path)


def test_a_shard_of_a_multi_layer_dictionary_is_refused(tmp_path, tensors):
    tensors["w_dec"] = tensors["w_dec"][:, None, :].repeat(1, 2, 1)
    write_sae(tmp_path, tensors)
    with pytest.raises(DictionaryError, match="multi-layer dictionary"):
        open_only(tmp_path)


def test_nan_in_the_weights_is_counted(tmp_path, tensors):
    tensors["w_enc"][:2, 3] = torch.nan
    write_sae(tmp_path, tensors)
    with pytest.raises(DictionaryError, match=r"params.safetensors: w_enc holds 2 value\(s\) that are NaN"):
        validate(open_only(tmp_path), "params.safetensors")


def test_a_width_in_the_name_that_the_tensors_have_not_is_noted(tmp_path, tensors):
    config = {"hf_hook_point_in": "model.layers.11.self_attn.o_proj.input"} | {
        "hf_hook_point_out": "model.layers.11.self_attn.o_proj.input"
    }
    folder = write_sae(tmp_path / FOLDER, tensors, **config)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["width"] == 20
    assert "its folder's name says 16384 features, its tensors hold 20" in open_only(tmp_path).notes
