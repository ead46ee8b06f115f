"""EleutherAI's sparsify: a folder per hook point, named by its module's path, with `cfg.json` and `sae.safetensors`.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`) or other formats. Source: the code of
EleutherAI/sparsify (`sparse_coder.py`, `fused_encoder.py`) and, for `signed`, of its predecessor `sae`.
"""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside, parse_width
from scopeatlas.dictionaries.reading import Settings, expect, map_safetensors, read_settings
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary, fold_b_dec
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import EMBEDDING, Site, module_input, parse_module_path

FAMILY = "sparsify"
WEIGHT_FILE = "sae.safetensors"
CONFIG_FILE = "cfg.json"
RUN_CONFIG = "config.json"
"""What a training run writes beside its hook points; the only file that names the model."""

_AXES = {"encoder.weight": "F d_in", "encoder.bias": "F", "W_dec": "F d_out", "b_dec": "d_out", "W_skip": "d_out d_in"}
_UNSUPPORTED = ("embed_skip", "gram_lookup")
"""Options of newer versions whose output depends on more than the site's own tensor."""


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with a sae.safetensors."""
    found = []
    folders = by_folder(files)
    for folder, names in sorted(folders.items()):
        if WEIGHT_FILE in names:
            runs = [str(parent) if parent.name else "" for parent in PurePosixPath(folder).parents if folder]
            run = next((inside(parent, RUN_CONFIG) for parent in runs if RUN_CONFIG in folders.get(parent, ())), ())
            configs = inside(folder, CONFIG_FILE) if CONFIG_FILE in names else ()
            found.append(SaeFiles(FAMILY, folder, inside(folder, WEIGHT_FILE), configs + run, () if configs else (CONFIG_FILE,)))
    return found


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Layer and module from the folder's name, kind and width where the release's name has them."""
    kind = "transcoder" if _named_transcoder(files.path, release) else "sae"
    width = re.search(r"-(\d+k)(?:-|$)", release)
    site = _site(files.path)
    if site is None:
        return SaeFacts(kind, width=parse_width(width[1]) if width else None)
    layers = () if site.layer == EMBEDDING else (site.layer,)
    word = site.module or ("layer" if layers else "embed_tokens")
    return SaeFacts(kind, word, layers, parse_width(width[1]) if width else None)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE or transcoder. Raises DictionaryError naming the file and what is wrong with it, or what is missing."""
    path = root / files.weights[0]
    config_path = path.with_name(CONFIG_FILE)
    config = read_settings(config_path)
    tensors = map_safetensors(path)
    expect(path, tensors, _AXES.keys() - {"W_skip"}, ["W_skip"])
    sizes = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES)
    _check_config(config, config_path, sizes, "W_skip" in tensors)
    notes: list[str] = []
    transcoder = _is_transcoder(config, files.path, release, notes)
    site = _site(files.path) or _site(path.parent.as_posix())
    if site is None:
        raise DictionaryError(f"{path}: its folder must have the name of a module, such as layers.5.mlp, to say what it reads")
    w_enc, b_enc, skip = tensors["encoder.weight"].T, tensors["encoder.bias"], tensors.get("W_skip")
    if not transcoder:
        bind_axes(path, {"b_dec": tensors["b_dec"].shape}, {"b_dec": "d_in"}, d_in=sizes["d_in"])
        b_enc = fold_b_dec(b_enc, tensors["b_dec"], w_enc)
        notes.append("b_dec is subtracted before encoding: folded into b_enc")
    model = _model(root, files)
    if not model:
        notes.append("the release does not say which model it was trained on")
    activation = _activation(config, config_path, sizes["F"])
    layer = LayerWeights(w_enc, b_enc, tensors["W_dec"][:, None], skip=skip if skip is None else skip.T)
    return SparseDictionary(
        kind="transcoder" if transcoder else "sae",
        sites_in=(module_input(site) if transcoder else site,),
        sites_out=(site,),
        model_name=model,
        layers=(layer,),
        b_dec=tensors["b_dec"][None],
        activation=activation,
        target_l0=None if activation.k is None else float(activation.k),
        family=FAMILY,
        notes=tuple(notes),
    )


def _site(path: str) -> Site | None:
    """The output of the module that the last of the path's folders that is a module path names (seed folders are not)."""
    for name in reversed(path.split("/")):
        try:
            return parse_module_path(name)
        except DictionaryError:
            continue
    return None


def _named_transcoder(path: str, release: str) -> bool:
    return "transcoder" in f"{release}/{path}".lower()


def _is_transcoder(config: Settings, path: str, release: str, notes: list[str]) -> bool:
    if isinstance(config.get("transcode"), bool):
        return bool(config["transcode"])
    # Published skip transcoders predate the `transcode` key.
    why = "the release's name says transcoder" if _named_transcoder(path, release) else ""
    why = why or ("it has a skip connection" if config.get("skip_connection") else "")
    if why:
        notes.append(f"read as a transcoder, by inference: cfg.json has no 'transcode', and {why}")
    return bool(why)


def _check_config(config: Settings, path: Path, sizes: dict[str, int], skip: bool) -> None:
    for name in _UNSUPPORTED:
        if config.get(name):
            raise DictionaryError(f"{path}: {name} is not supported: its output depends on more than one tensor of the model")
    if bool(config.get("skip_connection", skip)) != skip:
        raise DictionaryError(f"{path}: it and {WEIGHT_FILE} disagree about a skip connection; download both again")
    d_in, factor = config.get("d_in", sizes["d_in"]), config.get("expansion_factor")
    width = config.get("num_latents") or (factor * d_in if isinstance(factor, int) and isinstance(d_in, int) else sizes["F"])
    if (d_in, width) != (sizes["d_in"], sizes["F"]):
        raise DictionaryError(
            f"{path}: says {width} latents of size {d_in}, {WEIGHT_FILE} has {sizes['F']} of size {sizes['d_in']}; download both again"
        )


def _activation(config: Settings, path: Path, width: int) -> Activation:
    name, k = config.get("activation", "topk"), config.get("k")
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= width:
        raise DictionaryError(f"{path}: k is {k}, not a number of latents from 1 to {width}; download it again")
    if name == "groupmax" and width % k == 0:
        return Activation("groupmax", k)
    if name != "topk":
        raise DictionaryError(
            f"{path}: activation '{name}' with k {k} of {width} latents is not topk, nor groupmax with equal groups"
        )
    return Activation("abstopk" if config.get("signed") else "topk", k)


def _model(root: Path, files: SaeFiles) -> str:
    """The model that the training run's config names, where it lies above the hook point's folder."""
    runs = [root / name for name in files.configs if PurePosixPath(name).name == RUN_CONFIG]
    model = read_settings(runs[0]).get("model") if runs else None
    return model if isinstance(model, str) else ""
