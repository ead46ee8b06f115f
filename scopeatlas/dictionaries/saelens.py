"""SAELens: `cfg.json` beside `sae_weights.safetensors`, in its schema from version 6.0 on and in the one before.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`), or the other families that call their
weights sae_weights.safetensors (`llama_scope.py`: beside a config.json). Source: the code of SAELens 6.54.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.folding import gated_magnitude, scale_by_decoder_norm
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside
from scopeatlas.dictionaries.reading import Settings, expect, map_safetensors, read_settings
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, InputNorm, LayerWeights, SparseDictionary, fold_b_dec
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site, parse_hook_point, parse_module_path

if TYPE_CHECKING:
    import torch

FAMILY = "saelens"
WEIGHT_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"

_AXES = {
    **{"W_enc": "d_in F", "W_dec": "F d_out", "b_dec": "d_out", "W_skip": "d_out d_in"},
    **{name: "F" for name in ("b_enc", "threshold", "b_gate", "b_mag", "r_mag", "scaling_factor")},
}
_OWN_TENSORS: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}
"""What each architecture has beside W_enc, W_dec and b_dec."""

_NORMS: Mapping[object, InputNorm] = {
    "none": "none",
    # Trained on scaled or whitened activations; what SAELens saves is used on the model's own, unless its registry says more.
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
    "constant_norm_rescale": "token_norm",
    "layer_norm": "layer_norm",
}
_OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_HOOK = re.compile(r"blocks\.(\d+)\.((?:\w+\.)?hook_[a-z]+(?:_[a-z]+)*)(?:_(\d+))?")


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with a sae_weights.safetensors, but for those of Llama Scope, whose config has another name."""
    return [
        SaeFiles(FAMILY, folder, inside(folder, WEIGHT_FILE), inside(folder, *({CONFIG_FILE} & names)), _missing(names))
        for folder, names in sorted(by_folder(files).items())
        if WEIGHT_FILE in names and (CONFIG_FILE in names or "config.json" not in names)
    ]


def _missing(names: Collection[str]) -> tuple[str, ...]:
    return () if CONFIG_FILE in names else (CONFIG_FILE,)


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Hook, layer and width of a folder named by its hook, such as blocks.8.hook_resid_pre_24576; others say nothing."""
    kind = "transcoder" if "transcoder" in f"{release}/{files.path}".lower() else ""
    match = _HOOK.search(files.path)
    if match is None:
        return SaeFacts(kind)
    return SaeFacts(kind, match[2], (int(match[1]),), int(match[3]) if match[3] else None)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE or transcoder. Raises DictionaryError naming the file and what is wrong with it, or what is missing."""
    path = root / files.weights[0]
    config_path = path.with_name(CONFIG_FILE)
    config = _read_config(config_path)
    architecture = _architecture(config, config_path)
    transcoder = "transcoder" in architecture
    tensors = map_safetensors(path)
    width = _check_tensors(tensors, config, architecture, path)
    norm = _norm(config, transcoder, config_path)
    notes = _notes(config, norm)
    subtracts = _subtracts_b_dec(config, transcoder, config_path)
    if subtracts:
        notes.append("b_dec is subtracted before encoding: folded into b_enc")
    layer = _layer(tensors, subtracts)
    if config.get("rescale_acts_by_decoder_norm") and "topk" in architecture:
        layer = scale_by_decoder_norm(layer)
        notes.append("activations are scaled by the norms of the decoder's rows: folded into the weights")
    activation = _activation(config, architecture, width, config_path)
    return SparseDictionary(
        kind="transcoder" if transcoder else "sae",
        sites_in=(_site(config, "", config_path),),
        sites_out=(_site(config, "_out" if transcoder else "", config_path),),
        model_name=str(config.get("model_name") or ""),
        layers=(layer,),
        b_dec=tensors["b_dec"][None],
        activation=activation,
        norm=norm,
        target_l0=None if activation.k is None else float(activation.k),
        family=FAMILY,
        notes=tuple(notes),
    )


def hook_site(hook: str, path: Path, parse: Callable[[str], Site] = parse_hook_point) -> Site:
    """The site of a hook string that the config at `path` holds. Raises DictionaryError naming that file."""
    try:
        return parse(hook)
    except DictionaryError as error:
        raise DictionaryError(f"{path}: {error}") from error


def _read_config(path: Path) -> Settings:
    """Settings and metadata in one, by the names and with the defaults of version 6."""
    body = read_settings(path)
    metadata = body.pop("metadata", None)
    config: Settings = {**(metadata if isinstance(metadata, dict) else {}), **body}
    major = re.match(r"\d+", str(config.get("sae_lens_version") or ""))
    if major and int(major[0]) >= 6:
        return config
    config = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    options = config.get("activation_fn_kwargs")
    k = options.get("k") if isinstance(options, dict) else None
    if k is not None and "topk" in (config.get("activation_fn"), config.get("architecture")):
        config |= {"architecture": "topk", "k": k}
    config.setdefault("architecture", "standard")
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return config


def _architecture(config: Settings, path: Path) -> str:
    architecture = config.get("architecture")
    if architecture in ("temporal", "matching_pursuit"):
        raise DictionaryError(
            f"{path}: architecture '{architecture}' does not encode each token in one pass; it is not supported"
        )
    if not isinstance(architecture, str) or architecture not in _OWN_TENSORS:
        raise DictionaryError(f"{path}: architecture '{architecture}' is not one of {', '.join(_OWN_TENSORS)}")
    return architecture


def _check_tensors(tensors: "Mapping[str, torch.Tensor]", config: Settings, architecture: str, path: Path) -> int:
    """The number of features, once names and shapes are those of the architecture and of the config."""
    expect(path, tensors, ["W_enc", "W_dec", "b_dec", *_OWN_TENSORS[architecture]], ["scaling_factor"])
    transcoder = "transcoder" in architecture
    axes = {name: text if transcoder else text.replace("d_out", "d_in") for name, text in _AXES.items()}
    sizes = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, axes)
    for name, axis in (("d_in", "d_in"), ("d_sae", "F"), ("d_out", "d_out")):
        if axis in sizes and config.get(name) not in (None, sizes[axis]):
            raise DictionaryError(
                f"{path.with_name(CONFIG_FILE)}: says {name} {config[name]}, the weights have {sizes[axis]}; download both again"
            )
    factor = tensors.get("scaling_factor")
    if factor is not None and not bool(((factor.float() - 1).abs() < 1e-5).all()):
        raise DictionaryError(f"{path}: scaling_factor is not all ones, which SAELens itself no longer loads; fold it into W_dec")
    return sizes["F"]


def _subtracts_b_dec(config: Settings, transcoder: bool, path: Path) -> bool:
    if transcoder and config.get("apply_b_dec_to_input"):
        raise DictionaryError(
            f"{path}: apply_b_dec_to_input is true, but a transcoder's b_dec belongs to its output; set it to false"
        )
    return not transcoder and bool(config.get("apply_b_dec_to_input", True))


def _layer(tensors: "Mapping[str, torch.Tensor]", subtracts: bool) -> LayerWeights:
    gated = "b_gate" in tensors
    b_enc, w_enc, skip = tensors["b_gate" if gated else "b_enc"], tensors["W_enc"], tensors.get("W_skip")
    return LayerWeights(
        w_enc,
        fold_b_dec(b_enc, tensors["b_dec"], w_enc) if subtracts else b_enc,
        tensors["W_dec"][:, None],
        tensors.get("threshold"),
        None if skip is None else skip.T,  # SAELens computes x @ W_skip.T
        gated_magnitude(tensors["r_mag"], tensors["b_gate"], tensors["b_mag"]) if gated else None,
    )


def _activation(config: Settings, architecture: str, width: int, path: Path) -> Activation:
    if "topk" in architecture:
        k = config.get("k")
        if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= width:
            raise DictionaryError(f"{path}: k is {k}, not a number of features from 1 to {width}; download it again")
        return Activation("topk" if architecture == "topk" else "abstopk", k)
    if architecture == "gated":
        return Activation("gated")
    return Activation("jumprelu" if architecture.startswith("jumprelu") else "relu")


def _norm(config: Settings, transcoder: bool, path: Path) -> InputNorm:
    name = config.get("normalize_activations") or "none"
    if not isinstance(name, str) or name not in _NORMS:
        raise DictionaryError(f"{path}: normalize_activations '{name}' is not one of {', '.join(map(str, _NORMS))}")
    if transcoder and _NORMS[name] != "none":
        raise DictionaryError(
            f"{path}: a transcoder with normalize_activations '{name}' is not supported: SAELens does not undo it on the output"
        )
    return _NORMS[name]


def _site(config: Settings, side: str, path: Path) -> Site:
    """The site of `hook_name` ("") or `hook_name_out` ("_out"): Hugging Face's name before TransformerLens', which can be off."""
    if config.get("hook_head_index") is not None:
        raise DictionaryError(f"{path}: hook_head_index {config['hook_head_index']}: an SAE of a single head is not supported")
    module = config.get(f"hf_hook_name{side}")
    if isinstance(module, str) and module:
        # A module's path alone means what the module gives.
        return hook_site(module, path, parse_hook_point if module.endswith((".input", ".output")) else parse_module_path)
    hook = config.get(f"hook_name{side}")
    if not isinstance(hook, str) or not hook:
        raise DictionaryError(f"{path} lacks 'hook_name{side}': the site cannot be known; add it to its metadata")
    return hook_site(hook, path)


def _notes(config: Settings, norm: InputNorm) -> list[str]:
    notes = []
    name, function = config.get("normalize_activations"), config.get("activation_fn", "relu")
    if norm == "none" and name not in (None, "none"):
        notes.append(f"normalize_activations is {name}: the weights are used as saved, as SAELens uses a local copy")
    if function not in ("relu", "topk", None):
        notes.append(f"activation_fn '{function}' is read as relu, as SAELens reads it")
    if config.get("model_from_pretrained_kwargs"):
        options = config["model_from_pretrained_kwargs"]
        notes.append(f"trained on a model loaded with {options}: its activations may differ from the published model's")
    return notes
