"""OpenAI's autoencoders of GPT-2 small: `{location}[_{version}]/autoencoders/{layer}.pt`, as in their public container.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`) or other formats. Source: the code of
openai/sparse_autoencoder (`model.py`, `paths.py`).
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles
from scopeatlas.dictionaries.reading import expect, read_pickle
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary, fold_b_dec
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import parse_hook_point

FAMILY = "openai_gpt2"
MODEL = "gpt2"

_HOOKS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}
"""TransformerLens' names of OpenAI's locations, as their README gives them."""

_FILE = re.compile(r"(?:.*/)?autoencoders/(\d+)\.pt")
_LOCATION = re.compile(rf"(?:^|/)({'|'.join(_HOOKS)})(?:_v(\d+))?(?:_(32k|128k))?/autoencoders/")
_WIDTHS = {"32k": 32768, "128k": 131072}
_AXES = {"encoder.weight": "F d", "latent_bias": "F", "decoder.weight": "d F", "pre_bias": "d"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every autoencoders/{layer}.pt; the path is the file's without the suffix."""
    return [SaeFiles(FAMILY, file.removesuffix(".pt"), (file,)) for file in sorted(files) if _FILE.fullmatch(file)]


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Location, layer, width, L0 and model: those of version 5 have 32 active latents and their width in the name."""
    layer, match = _FILE.fullmatch(files.weights[0]), _location(files, release)
    layers = (int(layer[1]),) if layer else ()
    if match is None:
        return SaeFacts("sae", layers=layers, model=MODEL)
    return SaeFacts("sae", match[1], layers, _WIDTHS.get(match[3], 32768), 32.0 if match[2] == "5" else None, MODEL)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE. Raises DictionaryError naming the file and what is wrong with it, or what is missing."""
    import torch

    path, named = root / files.weights[0], facts(files, release)
    if not named.site:
        raise DictionaryError(f"{path}: the folder around autoencoders must be named as published, such as resid_post_mlp_v5_32k")
    body = read_pickle(path)
    tensors = {str(name): tensor for name, tensor in body.items() if isinstance(tensor, torch.Tensor)}
    expect(path, tensors, _AXES, _STATISTICS)
    width = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES)["F"]
    activation, w_enc = _activation(body, width, path), tensors["encoder.weight"].T
    hook = f"blocks.{named.layers[0]}.{_HOOKS[named.site]}"
    site = parse_hook_point(hook)
    normalised = activation.function == "topk"  # the two go together in OpenAI's own loader
    notes = [f"OpenAI's location {named.site} is read as {hook}", "pre_bias is subtracted before encoding: folded into b_enc"]
    return SparseDictionary(
        kind="sae",
        sites_in=(site,),
        sites_out=(site,),
        model_name=MODEL,
        layers=(
            LayerWeights(
                w_enc,
                fold_b_dec(tensors["latent_bias"], tensors["pre_bias"], w_enc),
                tensors["decoder.weight"].T[:, None],
            ),
        ),
        b_dec=tensors["pre_bias"][None],
        activation=activation,
        norm="layer_norm" if normalised else "none",
        target_l0=None if activation.k is None else float(activation.k),
        family=FAMILY,
        notes=(*notes, "inputs are layer-normalised, and outputs scaled back") if normalised else tuple(notes),
    )


def _location(files: SaeFiles, release: str) -> re.Match[str] | None:
    return _LOCATION.search(f"{release}/{files.path}/{files.weights[0]}")


def _activation(body: Mapping, width: int, path: Path) -> Activation:
    """ReLU, which is also what a file without a word means; or TopK with ReLU after it."""
    name, state = body.get("activation", "ReLU"), body.get("activation_state_dict")
    if name == "ReLU":
        return Activation("relu")
    state = state if isinstance(state, Mapping) else {}
    k, after = state.get("k"), state.get("postact_fn", "ReLU")
    if name != "TopK" or after != "ReLU" or not isinstance(k, int) or not 0 < k <= width:
        raise DictionaryError(f"{path}: activation '{name}' with k {k} and {after} after it is neither ReLU nor TopK with ReLU")
    return Activation("topk", k)
