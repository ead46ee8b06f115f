"""Damaged releases of every family: each gives one DictionaryError that names the file, and nothing else is raised."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scopeatlas.dictionaries.releases import find_saes, open_dictionary, refuse_incomplete
from scopeatlas.errors import DictionaryError
from tests.dictionaries.writers import WRITERS

# Of each family, a case, a file of it and the tensors in that file: encoder, decoder, encoder bias.
WEIGHTS = {
    "gemma_scope_1-res": ("params.npz", "W_enc", "W_dec", "b_enc"),
    "gemma_scope_2-resid_post": ("params.safetensors", "w_enc", "w_dec", "b_enc"),
    "gemma_scope_2-transcoder_affine": ("params.safetensors", "w_enc", "w_dec", "b_enc"),
    "gemma_scope_2-crosscoder": ("params_layer_2.safetensors", "w_enc", "w_dec", "b_enc"),
    "gemma_scope_2-clt": ("params_layer_7.safetensors", "w_enc", "w_dec", "b_enc"),
    "saelens-jumprelu": ("sae_weights.safetensors", "W_enc", "W_dec", "b_enc"),
    "saelens-skip_transcoder": ("sae_weights.safetensors", "W_enc", "W_dec", "b_enc"),
    "sparsify-sae": ("sae.safetensors", "encoder.weight", "W_dec", "encoder.bias"),
    "dictionary_learning-AutoEncoder": ("ae.pt", "encoder.weight", "decoder.weight", "encoder.bias"),
    "dictionary_learning-MatryoshkaBatchTopKSAE": ("ae.pt", "W_enc", "W_dec", "b_enc"),
    "llama_scope-R": ("final.safetensors", "encoder.weight", "decoder.weight", "encoder.bias"),
    "qwen_scope": ("layer1.sae.pt", "W_enc", "W_dec", "b_enc"),
    "goodfire-8b": (
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        "encoder_linear.weight",
        "decoder_linear.weight",
        "encoder_linear.bias",
    ),
    "openai_gpt2-v5": ("8.pt", "encoder.weight", "decoder.weight", "latent_bias"),
    "circuit_tracer-plt": ("layer_1.safetensors", "W_enc", "W_dec", "b_enc"),
    "circuit_tracer-clt": ("W_enc_2.safetensors", "W_enc_2", "", "b_enc_2"),
}
MATRICES = [(case, tensor) for case, (_, *names) in WEIGHTS.items() for tensor in names[:2] if tensor]
PICKLES = [case for case, (name, *_) in WEIGHTS.items() if name.endswith((".pt", ".pth"))]
CONFIGS = {
    "saelens-standard": "cfg.json",
    "sparsify-sae": "cfg.json",
    "dictionary_learning-AutoEncoder": "config.json",
    "llama_scope-R": "hyperparams.json",
    "qwen_scope": "config.json",
    "circuit_tracer-plt": "config.yaml",
    "circuit_tracer-clt": "config.yaml",
}
"""Files without which the family cannot be read."""


def the(name: str, root: Path) -> Path:
    """The one file of that name."""
    (path,) = root.rglob(name)
    return path


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors or settings in a file, in place."""
    readers = {
        ".npz": lambda: {name: torch.from_numpy(array) for name, array in np.load(path).items()},
        ".safetensors": lambda: load_file(path),
        ".json": lambda: json.loads(path.read_text(encoding="utf-8")),
        ".yaml": lambda: yaml.safe_load(path.read_text(encoding="utf-8")),
    }
    body = readers.get(path.suffix, lambda: torch.load(path, weights_only=True))()
    change(body)
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in body.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in body.items()}, path)
    elif path.suffix in (".json", ".yaml"):
        path.write_text(json.dumps(body) if path.suffix == ".json" else yaml.safe_dump(body), encoding="utf-8")
    else:
        torch.save(body, path)


@pytest.fixture
def root(tmp_path, rng):
    def write(case: str) -> Path:
        WRITERS[case](tmp_path, rng)
        return tmp_path

    return write


def assert_refused(root: Path, name: str, saying: str = "") -> None:
    """Looking for SAEs raises nothing; asking why one is not there, or opening it, names `name`, in one line."""
    entries = find_saes(root)
    with pytest.raises(DictionaryError, match=saying or None) as error:
        refuse_incomplete(root)
        for entry in entries:
            open_dictionary(entry)
    message = str(error.value)
    assert name in message and "\n" not in message, message


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_off(root, case, share):
    folder, name = root(case), WEIGHTS[case][0]
    path = the(name, folder)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(folder, name)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_file_of_other_bytes(root, case, rng):
    folder, name = root(case), WEIGHTS[case][0]
    path = the(name, folder)
    path.write_bytes(rng.bytes(path.stat().st_size))
    assert_refused(folder, name)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("gemma_scope_2-clt", "params_layer_0.safetensors"),
        ("gemma_scope_2-clt", "params_layer_7.safetensors"),
        ("gemma_scope_2-clt", "params_layer_17.safetensors"),
        ("gemma_scope_2-clt_no_config", "params_layer_17.safetensors"),
        ("gemma_scope_2-crosscoder", "params_layer_3.safetensors"),
        ("circuit_tracer-clt", "W_dec_1.safetensors"),
        ("circuit_tracer-clt", "W_enc_3.safetensors"),
        ("circuit_tracer-clt", "W_dec_3.safetensors"),
    ],
)
def test_a_shard_that_is_missing(root, case, name):
    folder = root(case)
    the(name, folder).unlink()
    assert_refused(folder, name)


def test_the_last_layers_of_a_relative_clt_that_are_missing_altogether(root):
    folder = root("circuit_tracer-clt")
    for name in ("W_enc_3.safetensors", "W_dec_3.safetensors"):
        the(name, folder).unlink()
    assert_refused(folder, "W_dec_")


@pytest.mark.parametrize(("case", "name"), CONFIGS.items())
def test_a_config_that_is_missing(root, case, name):
    folder = root(case)
    the(name, folder).unlink()
    assert_refused(folder, name)


@pytest.mark.parametrize(("case", "name"), [*CONFIGS.items(), ("gemma_scope_2-resid_post", "config.json")])
@pytest.mark.parametrize("text", ['{"d_in": [', "[1, 2]", ""], ids=["cut_off", "list", "empty"])
def test_a_config_that_is_no_object(root, case, name, text):
    folder = root(case)
    the(name, folder).write_text(text, encoding="utf-8")
    assert_refused(folder, name)


@pytest.mark.parametrize(("case", "name"), [*CONFIGS.items(), ("gemma_scope_2-resid_post", "config.json")])
def test_a_config_that_says_nothing(root, case, name):
    folder = root(case)
    the(name, folder).write_text("{}", encoding="utf-8")
    assert_refused(folder, name)


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_would_run_code_runs_none(root, case, tmp_path):
    folder, name = root(case), WEIGHTS[case][0]
    trace = tmp_path / "it_ran"

    class Harmful:
        def __reduce__(self):
            return Path.touch, (trace,)

    path = the(name, folder)
    for write in (lambda: torch.save({"encoder.weight": Harmful()}, path), lambda: path.write_bytes(pickle.dumps(Harmful()))):
        write()
        assert_refused(folder, name)
        assert not trace.exists()


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_of_a_lone_tensor(root, case):
    folder, name = root(case), WEIGHTS[case][0]
    torch.save(torch.zeros(3), the(name, folder))
    assert_refused(folder, name)


def test_a_zip_that_is_no_npz(root):
    folder = root("gemma_scope_1-res")
    with zipfile.ZipFile(the("params.npz", folder), "w") as archive:
        archive.writestr("W_enc.txt", "no array")
    assert_refused(folder, "params.npz")


def test_an_npz_of_pickled_objects(root):
    folder = root("gemma_scope_1-res")
    np.savez(the("params.npz", folder), W_enc=np.array([{"a": 1}], dtype=object))
    assert_refused(folder, "params.npz")


# --------------------------------------------------------------------------------------------------------- the tensors


@pytest.mark.parametrize(("case", "tensor"), MATRICES + [(case, bias) for case, (*_, bias) in WEIGHTS.items()])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_value_that_is_no_number(root, case, tensor, value):
    folder, name = root(case), WEIGHTS[case][0]
    edit(the(name, folder), lambda body: body[tensor].view(-1)[5:6].fill_(value))
    assert_refused(folder, name, saying="NaN or infinite")


@pytest.mark.parametrize(
    ("case", "name", "key"),
    [
        ("gemma_scope_1-res", "params.npz", "threshold"),
        ("gemma_scope_2-resid_post", "params.safetensors", "threshold"),
        ("gemma_scope_2-clt", "params_layer_11.safetensors", "threshold"),
        ("gemma_scope_2-crosscoder", "params_layer_1.safetensors", "threshold"),
        ("circuit_tracer-plt_jumprelu", "layer_1.safetensors", "activation_function.threshold"),
        ("circuit_tracer-clt_jumprelu", "W_enc_1.safetensors", "threshold_1"),
    ],
)
def test_a_negative_threshold(root, case, name, key):
    folder = root(case)
    edit(the(name, folder), lambda body: body[key].view(-1)[3:4].fill_(-0.1))
    assert_refused(folder, name, saying="threshold")


@pytest.mark.parametrize(("case", "tensor"), MATRICES)
def test_a_matrix_that_is_transposed(root, case, tensor):
    folder, name = root(case), WEIGHTS[case][0]
    edit(the(name, folder), lambda body: body.update({tensor: body[tensor].transpose(0, -1)}))
    assert_refused(folder, name)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_bias_that_is_one_too_short(root, case):
    folder, (name, *_, bias) = root(case), WEIGHTS[case]
    edit(the(name, folder), lambda body: body.update({bias: body[bias][:-1]}))
    assert_refused(folder, name)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_tensor_that_is_missing(root, case):
    folder, (name, encoder, *_) = root(case), WEIGHTS[case]
    edit(the(name, folder), lambda body: body.pop(encoder))
    assert_refused(folder, name, saying=encoder)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_tensor_that_nobody_expects(root, case):
    folder, (name, *_) = root(case), WEIGHTS[case]
    edit(the(name, folder), lambda body: body.update({"whitening": torch.zeros(2)}))
    assert_refused(folder, name, saying="whitening")


def test_a_decoder_of_a_relative_clt_that_writes_to_too_many_layers(root):
    folder = root("circuit_tracer-clt")
    edit(the("W_dec_2.safetensors", folder), lambda body: body.update(W_dec_2=torch.randn(6, 4, 16)))
    assert_refused(folder, "W_dec_2.safetensors")


@pytest.mark.parametrize(
    ("case", "name", "key"),
    [
        ("gemma_scope_2-clt", "params_layer_7.safetensors", "b_dec"),
        ("gemma_scope_2-crosscoder", "params_layer_2.safetensors", "b_dec"),
        ("circuit_tracer-clt", "W_enc_2.safetensors", "b_dec_2"),
    ],
)
def test_a_shard_whose_output_bias_holds_nan(root, case, name, key):
    folder = root(case)
    edit(the(name, folder), lambda body: body[key][1:2].fill_(torch.nan))
    assert_refused(folder, name, saying="NaN or infinite")


def test_a_decoder_shard_of_a_relative_clt_with_nan(root):
    folder = root("circuit_tracer-clt")
    edit(the("W_dec_1.safetensors", folder), lambda body: body["W_dec_1"][0, 0].fill_(torch.nan))
    assert_refused(folder, "W_dec_1.safetensors", saying="NaN or infinite")


@pytest.mark.parametrize("size", [1e-6, 0.1])
def test_a_clt_that_writes_to_an_earlier_layer(root, size):
    folder = root("gemma_scope_2-clt")
    edit(the("params_layer_5.safetensors", folder), lambda body: body["w_dec"][2, 4, 1:2].fill_(size))
    assert_refused(folder, "params_layer_5.safetensors", saying="before its own")


def test_a_clt_whose_shards_differ_in_width(root):
    folder = root("gemma_scope_2-clt")

    def narrow(body: dict) -> None:
        body.update({name: body[name][:5] for name in ("b_enc", "threshold", "w_dec")}, w_enc=body["w_enc"][:, :5])

    edit(the("params_layer_9.safetensors", folder), narrow)
    assert_refused(folder, "params_layer_9.safetensors")


def test_a_clt_of_which_one_shard_has_no_skip(root):
    folder = root("gemma_scope_2-clt_affine")
    edit(the("params_layer_4.safetensors", folder), lambda body: body.pop("affine_skip_connection"))
    assert_refused(folder, "params_layer_4.safetensors", saying="affine_skip_connection")


@pytest.mark.parametrize("case", ["gemma_scope_1-res", "gemma_scope_2-resid_post"])
def test_gemma_scope_decoder_rows_that_are_not_of_unit_norm(root, case):
    folder, (name, _, decoder, _) = root(case), WEIGHTS[case]
    edit(the(name, folder), lambda body: body[decoder].mul_(1.5))
    assert_refused(folder, name, saying="not unit norm")


# ---------------------------------------------------------------------------------------------- what the configs claim


@pytest.mark.parametrize(
    ("case", "name", "claim", "saying"),
    [
        ("gemma_scope_2-resid_post", "config.json", {"architecture": "topk"}, "topk"),
        ("gemma_scope_2-resid_post", "config.json", {"type": "molt"}, "molt"),
        ("gemma_scope_2-resid_post", "config.json", {"width": 65536}, "65,?536"),
        ("gemma_scope_2-resid_post", "config.json", {"affine_connection": True}, "affine"),
        ("gemma_scope_2-resid_post", "config.json", {"hf_hook_point_in": "model.layers.twelve.output"}, "twelve"),
        ("gemma_scope_2-clt", "config.json", {"architecture": "topk"}, "topk"),
        ("gemma_scope_2-clt", "config.json", {"affine_connection": True}, "affine"),
        ("gemma_scope_2-crosscoder", "config.json", {"hf_hook_point_in": "model.layers.{5,9,12}.output"}, ""),
        ("saelens-standard", "cfg.json", {"architecture": "temporal"}, "temporal"),
        ("saelens-standard", "cfg.json", {"architecture": "matching_pursuit"}, "matching_pursuit"),
        ("saelens-standard", "cfg.json", {"normalize_activations": "covariance"}, "covariance"),
        ("sparsify-sae", "cfg.json", {"activation": "softmax"}, "softmax"),
        ("sparsify-sae", "cfg.json", {"k": 0}, "k"),
        ("dictionary_learning-AutoEncoder", "config.json", {"trainer": {"dict_class": "CrossCoder", "layer": 3}}, "CrossCoder"),
        ("llama_scope-R", "hyperparams.json", {"act_fn": "softmax"}, "softmax"),
        ("qwen_scope", "config.json", {"model_type": "relu_sae"}, "relu_sae"),
        ("qwen_scope", "config.json", {"k": None}, "k"),
        ("circuit_tracer-plt", "config.yaml", {"activation": "softmax"}, "softmax"),
        ("circuit_tracer-clt", "config.yaml", {"feature_input_hook": "hook_pattern"}, "hook_pattern"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else "-".join(value),
)
def test_a_config_that_claims_what_cannot_be(root, case, name, claim, saying):
    folder = root(case)
    edit(the(name, folder), lambda body: body.update(claim))
    assert_refused(folder, name, saying=saying)


def test_gemma_scope_1_in_a_folder_whose_name_does_not_say_its_site(root):
    folder = root("gemma_scope_1-res")
    (folder / "gemma-scope-2b-pt-res").rename(folder / "downloads")
    assert_refused(folder, "params.npz", saying="gemma-scope-")


def test_an_openai_activation_that_is_not_known(root):
    folder = root("openai_gpt2-v5")
    edit(the("8.pt", folder), lambda body: body.update(activation="Softmax"))
    assert_refused(folder, "8.pt", saying="Softmax")


def test_a_saelens_sae_of_one_head(root):
    folder = root("saelens-hook_z")
    edit(the("cfg.json", folder), lambda body: body["metadata"].update(hook_head_index=3))
    assert_refused(folder, "cfg.json", saying="hook_head_index")


def test_a_saelens_scaling_factor_that_is_not_all_ones(root):
    folder = root("saelens-standard")
    edit(the("sae_weights.safetensors", folder), lambda body: body.update(scaling_factor=torch.rand(24)))
    assert_refused(folder, "sae_weights.safetensors", saying="scaling_factor")


def test_a_saelens_width_that_is_not_the_tensors(root):
    folder = root("saelens-standard")
    edit(the("cfg.json", folder), lambda body: body.update(d_sae=25))
    assert_refused(folder, "blocks.8.hook_resid_pre", saying="25")


def test_llamascopium_s_format_is_refused_by_name(tmp_path):
    """Llama Scope 2: the same file names as Llama Scope R1-Distill's."""
    folder = tmp_path / "Llama-Scope-2-Qwen3-1.7B" / "transcoder" / "8x" / "k128" / "layer12_transcoder_8x_k128"
    folder.mkdir(parents=True)
    shapes = {"W_E": (16, 24), "b_E": (24,), "W_D": (24, 16), "b_D": (16,), "activation_function.log_jumprelu_threshold": (24,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "sae_weights.safetensors")
    settings = {"sae_type": "sae", "hook_point_in": "blocks.12.hook_resid_post", "norm_activation": "dataset-wise", "d_model": 16}
    (folder / "config.json").write_text(json.dumps(settings | {"act_fn": "jumprelu", "expansion_factor": 1.5}), encoding="utf-8")
    assert_refused(tmp_path, folder.name, saying="llamascopium|Llama Scope 2")
