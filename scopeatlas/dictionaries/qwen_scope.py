"""Qwen Scope: one pickle `layer{n}.sae.pt` per layer, and one `config.json` for all of them.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`) or other formats.
"""

import re
from collections.abc import Collection
from pathlib import Path

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside, numbered
from scopeatlas.dictionaries.reading import Settings, expect, read_pickle, read_settings
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site

FAMILY = "qwen_scope"
CONFIG_FILE = "config.json"

_WEIGHT_FILE = re.compile(r"(?:.*/)?layer(\d+)\.sae\.pt")
_AXES = {"W_enc": "F d", "b_enc": "F", "W_dec": "d F", "b_dec": "d"}
_RELEASE = re.compile(r"SAE-Res-(?P<model>[^/]+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every layer{n}.sae.pt, as `layer{n}`."""
    return [
        SaeFiles(
            FAMILY,
            "".join(inside(folder, f"layer{n}")),
            inside(folder, name),
            inside(folder, *({CONFIG_FILE} & names)),
            () if CONFIG_FILE in names else (CONFIG_FILE,),
        )
        for folder, names in sorted(by_folder(files).items())
        for n, name in numbered(names, _WEIGHT_FILE.pattern)
    ]


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Everything: the layer from the file's name, the rest from the release's (SAE-Res-Qwen3-8B-Base-W64K-L0_50)."""
    match = _RELEASE.search(f"{release}/{files.path}")
    width, k, model = (int(match["width"]) * 1024, float(match["k"]), f"Qwen/{match['model']}") if match else (None, None, "")
    return SaeFacts("sae", "resid_post", (_layer(files),), width, k, model)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """One SAE. Raises DictionaryError naming the file and what is wrong with it, or what is missing."""
    import torch

    path = root / files.weights[0]
    config_path = path.with_name(CONFIG_FILE)
    config = read_settings(config_path)
    for name, value in (("model_type", "topk_sae"), ("hook_point", "resid_post")):
        if config.get(name, value) != value:
            raise DictionaryError(f"{config_path}: {name} '{config[name]}' is not supported; {value} is")
    tensors = {name: tensor for name, tensor in read_pickle(path).items() if isinstance(tensor, torch.Tensor)}
    expect(path, tensors, _AXES)
    said = {"d": config.get("d_model"), "F": config.get("d_sae")}
    known = {axis: size for axis, size in said.items() if isinstance(size, int)}
    sizes = bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES, **known)
    k = _k(config, sizes["F"], config_path)
    site = Site(_layer(files), "", "output")
    return SparseDictionary(
        kind="sae",
        sites_in=(site,),
        sites_out=(site,),
        model_name=str(config.get("base_model") or facts(files, release).model),
        layers=(LayerWeights(tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"].T[:, None]),),
        b_dec=tensors["b_dec"][None],
        activation=Activation("topk", k),
        target_l0=float(k),
        family=FAMILY,
    )


def _layer(files: SaeFiles) -> int:
    match = _WEIGHT_FILE.fullmatch(files.weights[0])
    assert match is not None, files
    return int(match[1])


def _k(config: Settings, width: int, path: Path) -> int:
    k = config.get("k")
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= width:
        raise DictionaryError(f"{path}: k is {k}, not a number of features from 1 to {width}; download it again")
    return k
