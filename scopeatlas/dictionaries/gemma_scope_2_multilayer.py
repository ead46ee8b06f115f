"""Gemma Scope 2's sharded kinds, crosscoders and cross-layer transcoders: `params_layer_{i}.safetensors`, one per layer.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`), or what it shares with the
single-layer format (`gemma_scope_2.py`).
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.gemma_scope_2 import (
    CONFIG_FILE,
    HOOKS,
    N_LAYERS,
    SKIP,
    check_config,
    clean_model_name,
    model_notes,
    model_of,
    number,
    size_of,
    text,
)
from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, gaps, inside, numbered, parse_width
from scopeatlas.dictionaries.reading import Settings, expect, map_safetensors, read_settings, shapes_of
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, Kind, LayerWeights, LazyLayers, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site, parse_hook_points

if TYPE_CHECKING:
    import torch

FAMILY = "gemma_scope_2_multilayer"
TARGET_L0 = {"medium": 50.0, "big": 150.0}
"""Over all layers together."""

_SHARD = r"params_layer_(\d+)\.safetensors"
# L is the output layers, indexed absolutely: w_dec[:, o] is zero for every layer o before the shard's own.
_AXES = {"w_enc": "d F", "b_enc": "F", "threshold": "F", "w_dec": "F L d", "b_dec": "d", SKIP: "d d"}
_FOLDER = re.compile(
    r"(?:^|/)(?:crosscoder/layer_(?P<layers>\d+(?:_\d+)*)_|clt/)width_(?P<width>[^_/]+)_l0_(?P<l0>[a-z]+)"
    r"(?P<affine>_affine)?(?:_seed_\d+)?(?=/|$)"
)


def find(files: Collection[str]) -> list[SaeFiles]:
    """Every folder with a params_layer_{i}.safetensors; shards that the numbering or the layer list wants are missing."""
    found = []
    for folder, names in sorted(by_folder(files).items()):
        shards = numbered(names, _SHARD)
        if shards:
            count = max(len(_listed(folder)), shards[-1][0] + 1)
            missing = [_shard(i) for i in gaps([i for i, _ in shards], count)]
            weights = inside(folder, *(name for _, name in shards))
            found.append(SaeFiles(FAMILY, folder, weights, inside(folder, *({CONFIG_FILE} & names)), tuple(missing)))
    return found


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Kind, layers, nominal width, target L0 and model, as far as the names say."""
    match, model = _FOLDER.search(files.path), model_of(release)
    if match is None:
        return SaeFacts(model=model)
    kind = _kind_of(match)
    layers = tuple(_listed(files.path)) or tuple(range(N_LAYERS.get(size_of(release), 0)))
    return SaeFacts(kind, kind, layers, parse_width(match["width"]), TARGET_L0.get(match["l0"]), model)


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """A crosscoder or CLT whose shards are mapped one at a time, when they are asked for.

    Raises DictionaryError naming the shard or config and what is wrong with it, or what is missing.
    """
    paths = [root / name for name in files.weights]
    sizes, skip = _check_shards(paths)
    count, folder = sizes["L"], paths[0].parent
    names, config_path = _FOLDER.search(files.path), folder / CONFIG_FILE
    config = read_settings(config_path) if files.configs else _config_of(names, release, config_path)
    check_config(config, config_path, {"crosscoder", "clt"}, count * sizes["F"], skip)
    kind: Kind = "crosscoder" if config.get("type") == "crosscoder" else "clt"
    sites_in, sites_out = (_sites(config, f"hf_hook_point_{side}", count, config_path) for side in ("in", "out"))
    _check_layers(kind, count, release, folder)
    if names is not None:
        _check_names(names, kind, sites_in, skip, folder)

    def open_layer(i: int) -> LayerWeights:
        shard = map_safetensors(paths[i])
        return LayerWeights(shard["w_enc"], shard["b_enc"], shard["w_dec"], shard["threshold"], shard.get(SKIP))

    return SparseDictionary(
        kind=kind,
        sites_in=sites_in,
        sites_out=sites_out,
        model_name=clean_model_name(text(config, "model_name")) or model_of(release),
        layers=LazyLayers(open_layer, count),
        b_dec=_b_dec(paths),
        activation=Activation("jumprelu"),
        target_l0=number(config, "l0", config_path, TARGET_L0.get(names["l0"]) if names else None),
        family=FAMILY,
        notes=(*_notes(files), *model_notes(config)),
    )


def _listed(path: str) -> list[int]:
    """The layers in a crosscoder folder's name."""
    match = _FOLDER.search(path)
    return [int(layer) for layer in match["layers"].split("_")] if match and match["layers"] else []


def _shard(i: int) -> str:
    return f"params_layer_{i}.safetensors"


def _kind_of(match: re.Match[str]) -> Kind:
    return "crosscoder" if match["layers"] else "clt"


def _check_shards(paths: list[Path]) -> tuple[dict[str, int], bool]:
    """The size of each axis, and whether there is a skip, from headers alone; every shard must be there and alike."""
    sizes: dict[str, int] = {}
    skips: set[bool] = set()
    for path in paths:
        shapes = {name: shape for name, (_, shape) in shapes_of(path).items()}
        expect(path, shapes, _AXES.keys() - {SKIP}, [SKIP])
        sizes = bind_axes(path, shapes, _AXES, **sizes)
        skips.add(SKIP in shapes)
        if len(skips) > 1:
            raise DictionaryError(f"{path}: it and the other shards disagree about an {SKIP}; download the folder again")
    missing = [_shard(i) for i in range(sizes["L"]) if _shard(i) not in {path.name for path in paths}]
    if missing:
        raise DictionaryError(
            f"{paths[0].parent} lacks {', '.join(missing)}: its shards write {sizes['L']} layers; download them"
        )
    if len(paths) != sizes["L"]:
        raise DictionaryError(f"{paths[-1]}: one of {len(paths)} shards that write {sizes['L']} layers; remove what is too much")
    return sizes, skips.pop()


def _config_of(names: re.Match[str] | None, release: str, path: Path) -> Settings:
    if names is None:
        raise DictionaryError(
            f"{path} is missing; download the whole folder, or name it as on the Hub, such as clt/width_262k_l0_medium: "
            f"{path.parent.name} does not say what it reads"
        )
    kind = _kind_of(names)
    layers = f"{{{names['layers'].replace('_', ',')}}}" if names["layers"] else "{all}"
    hook_in, hook_out = (f"model.layers.{layers}.{hook}" for hook in HOOKS[kind])
    return {"type": kind, "hf_hook_point_in": hook_in, "hf_hook_point_out": hook_out, "model_name": model_of(release)}


def _sites(config: Settings, name: str, count: int, path: Path) -> tuple[Site, ...]:
    hook = text(config, name)
    if not hook:
        raise DictionaryError(f"{path} lacks '{name}': the sites cannot be known; download it again")
    try:
        sites = parse_hook_points(hook, layers=count)
    except DictionaryError as error:
        raise DictionaryError(f"{path}: {error}") from error
    if len(sites) != count:
        raise DictionaryError(
            f"{path}: {name} '{hook}' names {len(sites)} layers, the shards write {count}; download the folder again"
        )
    return sites


def _check_layers(kind: Kind, count: int, release: str, folder: Path) -> None:
    expected = N_LAYERS.get(size_of(release), count)
    if kind == "clt" and count != expected:
        raise DictionaryError(
            f"{folder}: its shards write {count} layers, {model_of(release) or release} has {expected}; it belongs to another release"
        )


def _check_names(names: re.Match[str], kind: Kind, sites_in: tuple[Site, ...], skip: bool, folder: Path) -> None:
    listed = [int(layer) for layer in names["layers"].split("_")] if names["layers"] else range(len(sites_in))
    if kind != _kind_of(names) or [site.layer for site in sites_in] != list(listed):
        raise DictionaryError(
            f"{folder / CONFIG_FILE}: its kind or layers are not those of its folder's name; download the folder again"
        )
    if bool(names["affine"]) != skip:
        raise DictionaryError(f"{folder}: its name and its tensors disagree about an {SKIP}; download the folder again")


def _b_dec(paths: list[Path]) -> "torch.Tensor":
    """The output biases [L, d], one from each shard."""
    import torch

    return torch.stack([map_safetensors(path)["b_dec"].float() for path in paths])


def _notes(files: SaeFiles) -> list[str]:
    return [] if files.configs else ["no config.json: sites, kind, model and target L0 are inferred from the names"]
