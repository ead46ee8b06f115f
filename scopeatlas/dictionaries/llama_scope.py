"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`; its R1-Distill: `config.json` and `sae_weights.safetensors`.

What belongs here: these two file formats, which share their tensors. What does not: arithmetic (`sparse.py`), or Llama
Scope 2 (llamascopium), which is recognised and refused.
"""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from scopeatlas.dictionaries.folding import scaled
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside
from scopeatlas.dictionaries.reading import Settings, expect, map_safetensors, read_settings, shapes_of
from scopeatlas.dictionaries.saelens import hook_site
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.errors import DictionaryError

FAMILY = "llama_scope"
MODEL = "meta-llama/Llama-3.1-8B"
DISTILLED_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"

_WEIGHTS, _CONFIG = "checkpoints/final.safetensors", "hyperparams.json"
_DISTILLED_WEIGHTS, _DISTILLED_CONFIG = "sae_weights.safetensors", "config.json"
_AXES = {
    "encoder.weight": "F d_in",
    "encoder.bias": "F",
    "decoder.weight": "d_out F",
    "decoder.bias": "d_out",
    "log_jumprelu_threshold": "F",
}
_HOOKS = {"R": "hook_resid_post", "M": "hook_mlp_out", "A": "hook_attn_out"}
_FOLDER = re.compile(r"(?:^|/|-)L(\d+)([RMA])(?:-(\d+)x)?(?=/|$)")
_UNSUPPORTED = ("apply_decoder_bias_to_pre_encoder", "use_glu_encoder")


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with checkpoints/final.safetensors, or with sae_weights.safetensors beside a config.json."""
    found = []
    folders = by_folder(files)
    for folder, names in sorted(folders.items()):
        place = PurePosixPath(folder)
        if place.name == "checkpoints" and "final.safetensors" in names:
            parent = "" if len(place.parts) == 1 else str(place.parent)
            configs = {_CONFIG} & folders.get(parent, set())
            missing = () if configs else (_CONFIG,)
            found.append(SaeFiles(FAMILY, parent, inside(parent, _WEIGHTS), inside(parent, *configs), missing))
        elif _DISTILLED_WEIGHTS in names and _DISTILLED_CONFIG in names and "cfg.json" not in names:
            found.append(SaeFiles(FAMILY, folder, inside(folder, _DISTILLED_WEIGHTS), inside(folder, _DISTILLED_CONFIG)))
    return found


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Site, layer and width of a folder named as on the Hub: Llama3_1-8B-Base-L15R-8x, or L15R of the R1-Distill."""
    model = DISTILLED_MODEL if _is_distilled(files) else MODEL
    match = _FOLDER.search(files.path)
    if match is None:
        return SaeFacts("", model=model)
    return SaeFacts("sae", _HOOKS[match[2]], (int(match[1]),), 4096 * int(match[3]) if match[3] else None, model=model)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE, its input and output scales folded. Raises DictionaryError naming the file, the fault and the fix.

    pre = (s_in * x) @ W_enc + b_enc, fires above the threshold, and y is what it decodes to over s_out, where
    s = sqrt(d) / the average norm of the activations that it was trained on.
    """
    import torch

    path, config_path = root / files.weights[0], root / files.configs[0]
    distilled, config = _is_distilled(files), read_settings(config_path)
    if distilled and "encoder.weight" not in shapes_of(path):
        raise DictionaryError(f"{config_path} is of Llama Scope 2 (llamascopium), whose weights are not supported")
    tensors = map_safetensors(path)
    expect(path, tensors, [name for name in _AXES if distilled or name != "log_jumprelu_threshold"])
    said = {"d_in": config.get("d_model"), "F": config.get("d_sae")}
    known = {axis: size for axis, size in said.items() if isinstance(size, int)}
    sizes = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES, **known)
    scale_in, scale_out = _scales(config, sizes, config_path)
    _check_config(config, config_path)
    site_in, site_out = (hook_site(str(config.get(name)), config_path) for name in ("hook_point_in", "hook_point_out"))
    if distilled:
        threshold = tensors["log_jumprelu_threshold"].double().exp().float()
        note = "thresholds are compared with the scaled pre-activation, as SAELens does: an inference"
    else:
        threshold = torch.full(
            (sizes["F"],), _number(config.get("jump_relu_threshold"), "jump_relu_threshold", config_path) * scale_in
        )
        note = "jump_relu_threshold is multiplied by the input scale, as SAELens does: an inference, to be checked by L0 on text"
    return SparseDictionary(
        kind="sae" if site_in == site_out else "transcoder",
        sites_in=(site_in,),
        sites_out=(site_out,),
        model_name=DISTILLED_MODEL if distilled else MODEL,
        layers=(
            LayerWeights(
                scaled(tensors["encoder.weight"].T, scale_in),
                tensors["encoder.bias"],
                scaled(tensors["decoder.weight"].T, 1 / scale_out)[:, None],
                threshold,
            ),
        ),
        b_dec=scaled(tensors["decoder.bias"], 1 / scale_out)[None],
        activation=Activation("jumprelu"),
        family=FAMILY,
        notes=("the average norms of its activations are folded into the weights", note),
    )


def _is_distilled(files: SaeFiles) -> bool:
    return PurePosixPath(files.weights[0]).name == _DISTILLED_WEIGHTS


def _scales(config: Settings, sizes: dict[str, int], path: Path) -> tuple[float, float]:
    """What activations were multiplied by to have, on average, the norm sqrt(d): on the way in, and on the way out."""
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise DictionaryError(
            f'{path} lacks \'dataset_average_activation_norm\'; add {{"in": n, "out": n}}, n the average norm of the site\'s '
            "activations (sqrt(d_model) / norm_scaling_factor of SAELens' pretrained_saes.yaml)"
        )
    norm_in, norm_out = (_number(norms.get(side), f"dataset_average_activation_norm.{side}", path) for side in ("in", "out"))
    return sizes["d_in"] ** 0.5 / norm_in, sizes["d_out"] ** 0.5 / norm_out


def _check_config(config: Settings, path: Path) -> None:
    for name, value in (("act_fn", "jumprelu"), ("norm_activation", "dataset-wise")):
        if config.get(name, value) != value:
            raise DictionaryError(f"{path}: {name} '{config[name]}' is not supported; {value} is")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise DictionaryError(f"{path}: {name} is not supported")


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise DictionaryError(f"{path}: {name} is {value}, not a positive number; download it again")
    return float(value)
