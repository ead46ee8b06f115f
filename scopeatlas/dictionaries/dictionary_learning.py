"""dictionary_learning (saprmarks; SAEBench, andyrdt): `config.json` beside `ae.pt`, a pickled state dict.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`) or other formats. Source: the code of
dictionary_learning 0.1.0; what `load_dictionary` gives is what is computed here.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.folding import gated_magnitude, scale_by_decoder_norm, scaled
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside
from scopeatlas.dictionaries.reading import expect, read_pickle, read_settings
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary, fold_b_dec
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

FAMILY = "dictionary_learning"
WEIGHT_FILE = "ae.pt"
CONFIG_FILE = "config.json"

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
_TENSORS: Mapping[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*_LINEAR, "b_dec"),
    "BatchTopKSAE": (*_LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": _MATRICES,
    "JumpReluAutoEncoder": (*_MATRICES, "threshold"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
}
"""What each `dict_class` has, beside the buffers of the top-k classes."""

_BUFFERS = ("k", "threshold", "group_sizes")
_AXES = {
    **{"encoder.weight": "F d", "decoder.weight": "d F", "W_enc": "d F", "W_dec": "F d"},
    **{name: "d" for name in ("bias", "b_dec", "decoder.bias", "decoder_bias")},
    **{name: "F" for name in ("encoder.bias", "b_enc", "r_mag", "gate_bias", "mag_bias")},
}
_OUTPUT_BIASES = ("bias", "b_dec", "decoder.bias", "decoder_bias")
_SUBTRACTS_NOTHING = ("AutoEncoderNew", "JumpReluAutoEncoder")
_SITE = re.compile(r"(resid(?:_post)?|mlp(?:_out)?)(?:_layer)?_?(\d+)?")
_PATH = re.compile(r"(?:^|/)(resid_post|mlp_out)_layer_(\d+)")


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with an ae.pt."""
    return [
        SaeFiles(
            FAMILY,
            folder,
            inside(folder, WEIGHT_FILE),
            inside(folder, *({CONFIG_FILE} & names)),
            () if CONFIG_FILE in names else (CONFIG_FILE,),
        )
        for folder, names in sorted(by_folder(files).items())
        if WEIGHT_FILE in names
    ]


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Site and layer from the path's resid_post_layer_N; the width where SAEBench's names have it (2pow16)."""
    width = re.search(r"width-2pow(\d+)", f"{release}/{files.path}")
    match = _PATH.search(files.path)
    site, layers = (match[1], (int(match[2]),)) if match else ("", ())
    return SaeFacts("sae", site, layers, 2 ** int(width[1]) if width else None)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE. Raises DictionaryError naming the file and what is wrong with it, or what is missing."""
    path = root / files.weights[0]
    config_path = path.with_name(CONFIG_FILE)
    config = read_settings(config_path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise DictionaryError(f"{config_path} lacks 'trainer': neither the class of the SAE nor its layer can be known")
    dict_class = trainer.get("dict_class")
    if not isinstance(dict_class, str) or dict_class not in _TENSORS:
        raise DictionaryError(f"{config_path}: dict_class '{dict_class}' is not one of {', '.join(_TENSORS)}")
    notes: list[str] = []
    tensors = _read_tensors(path, notes)
    expect(path, tensors, _TENSORS[dict_class], _BUFFERS if "TopK" in dict_class else ())
    said = {axis: trainer.get(name) for axis, name in (("d", "activation_dim"), ("F", "dict_size"))}
    known = {axis: size for axis, size in said.items() if isinstance(size, int)}
    width = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES, **known)["F"]
    activation, threshold = _activation(dict_class, trainer, tensors, width, path, notes)
    b_dec = next(tensors[name] for name in _OUTPUT_BIASES if name in tensors)
    site = _site(trainer, config.get("buffer"), config_path)
    return SparseDictionary(
        kind="sae",
        sites_in=(site,),
        sites_out=(site,),
        model_name=str(trainer.get("lm_name") or ""),
        layers=(_layer(dict_class, tensors, b_dec, threshold, notes),),
        b_dec=b_dec[None],
        activation=activation,
        target_l0=float(trainer["k"]) if isinstance(trainer.get("k"), int) else None,
        family=FAMILY,
        notes=tuple(notes),
    )


def _read_tensors(path: Path, notes: list[str]) -> "Tensors":
    """The state dict, also from a training checkpoint that nests it beside `norm_factor`."""
    import torch

    body = read_pickle(path)
    nested = [part for part in body.values() if isinstance(part, dict) and {"encoder.weight", "W_enc"} & part.keys()]
    state = nested[0] if len(nested) == 1 else body
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    factor = body.get("norm_factor") if nested else None
    if factor is None:
        return tensors
    # Training divides activations by the factor; the library's `scale_biases` makes the weights those of the model's own.
    notes.append("a training checkpoint with a norm_factor: its biases and thresholds are multiplied by it, by inference")
    scalable = {*_OUTPUT_BIASES, "encoder.bias", "b_enc", "gate_bias", "mag_bias", "threshold"}
    # A threshold of -1 means that there is none, and is no length.
    return {n: scaled(t, float(factor)) if n in scalable and not (t.ndim == 0 and t < 0) else t for n, t in tensors.items()}


def _activation(
    dict_class: str, trainer: Mapping, tensors: "Tensors", width: int, path: Path, notes: list[str]
) -> "tuple[Activation, torch.Tensor | None]":
    """The activation function, and the thresholds [F] where it has them."""
    k, threshold = trainer.get("k"), tensors.get("threshold")
    if "TopK" in dict_class:
        stored = tensors["k"].tolist() if "k" in tensors else k
        if not isinstance(k, int) or not 0 < k <= width or stored != k:
            raise DictionaryError(
                f"{path}: k is {stored}, {CONFIG_FILE} says {k}, of {width} features; they must agree: download both again"
            )
    if threshold is not None and threshold.ndim:
        bind_axes(path, {"threshold": threshold.shape}, {"threshold": "F"}, F=width)
    if dict_class == "AutoEncoderTopK":
        return Activation("topk", k), None
    if dict_class == "GatedAutoEncoder":
        return Activation("gated"), None
    if "BatchTopK" in dict_class:
        if threshold is None or bool((threshold < 0).all()):
            notes.append("its threshold was never set: plain ReLU, as the library encodes it, with far more features than k")
            return Activation("relu"), None
        return Activation("jumprelu"), threshold.expand(width)
    return Activation("relu" if threshold is None else "jumprelu"), threshold


def _layer(
    dict_class: str, tensors: "Tensors", b_dec: "torch.Tensor", threshold: "torch.Tensor | None", notes: list[str]
) -> LayerWeights:
    gated = dict_class == "GatedAutoEncoder"
    w_enc = tensors["W_enc"] if "W_enc" in tensors else tensors["encoder.weight"].T
    w_dec = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T
    b_enc = next(tensors[name] for name in ("encoder.bias", "b_enc", "gate_bias") if name in tensors)
    magnitude = gated_magnitude(tensors["r_mag"], tensors["gate_bias"], tensors["mag_bias"]) if gated else None
    if dict_class not in _SUBTRACTS_NOTHING:
        b_enc = fold_b_dec(b_enc, b_dec, w_enc)
        notes.append("the decoder's bias is subtracted before encoding: folded into b_enc")
    layer = LayerWeights(w_enc, b_enc, w_dec[:, None], threshold, None, magnitude)
    norms = w_dec.float().norm(dim=1)
    if dict_class == "AutoEncoder" and not norms.allclose(norms.new_ones(1)):
        notes.append(
            "the decoder's rows are brought to unit norm and activations scaled to match, as the library does on loading"
        )
        return scale_by_decoder_norm(layer)
    return layer


def _site(trainer: Mapping, buffer: object, path: Path) -> Site:
    """The output (or input, as the buffer says) of the layer, or of its MLP."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    match = _SITE.fullmatch(str(name or "resid_post"))
    if match is None:
        raise DictionaryError(f"{path}: submodule_name '{name}' is not known; resid_post_layer_N and mlp_out_layer_N are")
    if layer is None and match[2]:
        layer = int(match[2])
    if not isinstance(layer, int) or (match[2] and int(match[2]) != layer):
        raise DictionaryError(f"{path}: layer {layer} and submodule_name '{name}' do not name one layer; download it again")
    side = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    if side not in ("in", "out"):
        raise DictionaryError(f"{path}: buffer.io '{side}' is not in or out: a transcoder of this library is not supported")
    return Site(layer, "mlp" if match[1].startswith("mlp") else "", "output" if side == "out" else "input")
