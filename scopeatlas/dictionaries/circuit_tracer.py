"""circuit-tracer's own formats: per-layer transcoders (`layer_{i}.safetensors`) and CLTs (`W_enc_{i}`, `W_dec_{i}`).

What belongs here: these file formats, with the `config.yaml` beside them. What does not: arithmetic (`sparse.py`), or
repos that hold only a config.yaml pointing at another release's files: those are read where they lie.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.layout import SaeFacts, SaeFiles, by_folder, inside, numbered
from scopeatlas.dictionaries.reading import Settings, expect, map_safetensors, read_settings, shapes_of
from scopeatlas.dictionaries.shapes import bind_axes
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, LazyLayers, SparseDictionary
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import Site, parse_hook_point

if TYPE_CHECKING:
    import torch

FAMILY = "circuit_tracer"
CONFIG_FILE = "config.yaml"
TRAINING_CONFIGS = ("wandb-config.yaml", "wanb-config.yaml")
"""What the Qwen3 sets have besides or, one of them, instead; the second is a typo of some of the published repos."""

_LAYER = r"layer_(\d+)\.safetensors"
_CLT_FILE = r"W_(?:enc|dec)_(\d+)\.safetensors"
_THRESHOLD = "activation_function.threshold"
_AXES = {"W_enc": "F d_in", "b_enc": "F", "W_dec": "F d_out", "b_dec": "d_out", _THRESHOLD: "F", "W_skip": "d_out d_in"}
# The output index of W_dec_{i} is relative: its L - i output layers are i, i + 1, ..., L - 1.
_ENCODER_AXES = {"W_enc": "F d", "b_enc": "F", "b_dec": "d", "threshold": "F"}
_CRV_RELEASE, _CRV_K = "crv-8b-instruct-transcoders", 128
_QWEN3 = re.compile(r"qwen3-(\d+(?:\.\d+)?)b", re.IGNORECASE)


def find(files: Collection[str]) -> list[SaeFiles]:
    """One per-layer transcoder per layer_{i}.safetensors, one CLT per folder with W_enc_{i}.safetensors."""
    found = []
    for folder, names in sorted(by_folder(files).items()):
        configs = inside(folder, *sorted(names & {CONFIG_FILE} or names & {*TRAINING_CONFIGS}))
        missing = () if configs else (CONFIG_FILE,)
        for _, name in numbered(names, _LAYER):
            path = inside(folder, name.removesuffix(".safetensors"))[0]
            found.append(SaeFiles(FAMILY, path, inside(folder, name), configs, missing))
        shards = numbered(names, _CLT_FILE)
        if shards:
            wanted = [name for i in range(shards[-1][0] + 1) for name in _pair(i)]
            weights = inside(folder, *(name for name in wanted if name in names))
            lacking = tuple(name for name in wanted if name not in names)
            found.append(SaeFiles(FAMILY, folder or "clt", weights, configs, lacking + missing))
    return found


def facts(files: SaeFiles, release: str) -> SaeFacts:
    """Kind and layers from the file names; the model only of the Qwen3 sets, whose release names it."""
    if _is_clt(files):
        return SaeFacts("clt", "clt", tuple(range(len(files.weights) // 2)), model=_qwen3(release))
    return SaeFacts("transcoder", "transcoder", (_layer_of(files),), model=_qwen3(release))


def load(root: Path, files: SaeFiles, release: str) -> SparseDictionary:
    """A transcoder, or a CLT whose layers are mapped one at a time, when they are asked for.

    Raises DictionaryError naming the file and what is wrong with it, or what is missing.
    """
    path, notes = root / files.weights[0], []
    config = _config(root, files, release, notes)
    kind = "cross_layer_transcoder" if _is_clt(files) else "transcoder_set"
    if config.get("model_kind", kind) != kind:
        raise DictionaryError(f"{path}: is of a {kind}, {CONFIG_FILE} says {config['model_kind']}; download the release again")
    if _is_clt(files):
        return _load_clt(root, files, config, tuple(notes))
    return _load_transcoder(path, _layer_of(files), release, config, notes)


def _load_transcoder(path: Path, layer: int, release: str, config: Settings, notes: list[str]) -> SparseDictionary:
    tensors = map_safetensors(path)
    expect(path, tensors, ["W_enc", "b_enc", "W_dec", "b_dec"], [_THRESHOLD, "W_skip", "k"])
    bind_axes(path, {name: tensor.shape for name, tensor in tensors.items()}, _AXES)
    skip = tensors.get("W_skip")
    weights = LayerWeights(
        tensors["W_enc"].T,
        tensors["b_enc"],
        tensors["W_dec"][:, None],
        tensors.get(_THRESHOLD),
        skip if skip is None else skip.T,
    )
    stored_k = int(tensors["k"]) if "k" in tensors else None
    activation = _activation(config, release, _THRESHOLD in tensors, stored_k, path, notes)
    return SparseDictionary(
        kind="transcoder",
        sites_in=(_site(config, "feature_input_hook", layer, path),),
        sites_out=(_site(config, "feature_output_hook", layer, path),),
        model_name=str(config.get("model_name") or ""),
        layers=(weights,),
        b_dec=tensors["b_dec"][None],
        activation=activation,
        target_l0=None if activation.k is None else float(activation.k),
        family=FAMILY,
        notes=tuple(notes),
    )


def _load_clt(root: Path, files: SaeFiles, config: Settings, notes: tuple[str, ...]) -> SparseDictionary:
    folder = (root / files.weights[0]).parent
    if files.missing:
        raise DictionaryError(f"{folder} lacks {', '.join(files.missing)}; download the whole folder")
    count = len(files.weights) // 2
    pairs = [tuple(folder / name for name in _pair(i)) for i in range(count)]
    jumps = _check_pairs(pairs)

    def open_layer(i: int) -> LayerWeights:
        encoder, relative = map_safetensors(pairs[i][0]), map_safetensors(pairs[i][1])[f"W_dec_{i}"]
        threshold = encoder.get(f"threshold_{i}")
        return LayerWeights(encoder[f"W_enc_{i}"].T, encoder[f"b_enc_{i}"], relative, threshold, first_output=i)

    return SparseDictionary(
        kind="clt",
        sites_in=tuple(_site(config, "feature_input_hook", i, folder) for i in range(count)),
        sites_out=tuple(_site(config, "feature_output_hook", i, folder) for i in range(count)),
        model_name=str(config.get("model_name") or ""),
        layers=LazyLayers(open_layer, count),
        b_dec=_b_dec([encoder for encoder, _ in pairs]),
        activation=Activation("jumprelu" if jumps else "relu"),
        family=FAMILY,
        notes=(*notes, "the decoders' relative output index is read as absolute layers"),
    )


def _pair(i: int) -> tuple[str, str]:
    return f"W_enc_{i}.safetensors", f"W_dec_{i}.safetensors"


def _is_clt(files: SaeFiles) -> bool:
    return re.fullmatch(_CLT_FILE, Path(files.weights[0]).name) is not None


def _layer_of(files: SaeFiles) -> int:
    ((layer, _),) = numbered([Path(files.weights[0]).name], _LAYER)
    return layer


def _qwen3(release: str) -> str:
    match = _QWEN3.search(release)
    return f"Qwen/Qwen3-{match[1]}B" if match else ""


def _config(root: Path, files: SaeFiles, release: str, notes: list[str]) -> Settings:
    """config.yaml; of a Qwen3 set without one, what its siblings say, with a note."""
    for name in files.configs:
        if Path(name).name == CONFIG_FILE:
            return read_settings(root / name)
    path = (root / files.weights[0]).with_name(CONFIG_FILE)
    if not files.configs or not _qwen3(release):
        raise DictionaryError(f"{path} is missing, and with it what the dictionary reads and writes; download it too")
    notes.append(f"no {CONFIG_FILE}: sites and model are those of the other Qwen3 sets of this publisher")
    return {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "model_name": _qwen3(release)}


def _site(config: Settings, name: str, layer: int, path: Path) -> Site:
    """hook_resid_mid, mlp.hook_in, ... of a layer; some converters write blocks.{layer}. in front."""
    hook = config.get(name)
    if not isinstance(hook, str):
        raise DictionaryError(f"{path}: {CONFIG_FILE} beside it lacks '{name}': the site cannot be known; download it again")
    try:
        return parse_hook_point(f"blocks.{layer}.{hook.removeprefix('blocks.{layer}.')}")
    except DictionaryError as error:
        raise DictionaryError(f"{path}: {name} of {CONFIG_FILE}: {error}") from error


def _activation(config: Settings, release: str, jumps: bool, k: int | None, path: Path, notes: list[str]) -> Activation:
    named = config.get("activation")
    if named == "topk" or (named is None and k is not None):
        chosen = config.get("k", k)
        if chosen is None and _CRV_RELEASE in release:
            chosen = _CRV_K
            notes.append(f"k is {_CRV_K}, which circuit-tracer's code holds for this release")
        if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 1:
            raise DictionaryError(f"{path}: activation is topk, and neither {CONFIG_FILE} nor the file has a k; add 'k:' there")
        notes.append("of the k largest pre-activations only the positive count; circuit-tracer keeps negative ones too")
        return Activation("topk", chosen)
    if named not in (None, "relu", "jump_relu", "jumprelu"):
        raise DictionaryError(f"{path}: activation '{named}' of {CONFIG_FILE} is not one of relu, jumprelu, topk")
    if named is not None and (named != "relu") != jumps:
        raise DictionaryError(f"{path}: activation '{named}' of {CONFIG_FILE} does not go with its tensors; download both again")
    return Activation("jumprelu" if jumps else "relu")


def _check_pairs(pairs: list[tuple[Path, ...]]) -> bool:
    """Check all shapes from headers alone, and say whether there are thresholds."""
    sizes: dict[str, int] = {}
    jumps: set[bool] = set()
    for i, (encoder, decoder) in enumerate(pairs):
        found = shapes_of(encoder)
        expect(encoder, found, [f"{name}_{i}" for name in _ENCODER_AXES if name != "threshold"], [f"threshold_{i}"])
        shapes = {name.removesuffix(f"_{i}"): shape for name, (_, shape) in found.items()}
        sizes = bind_axes(encoder, shapes, _ENCODER_AXES, **sizes)
        jumps.add("threshold" in shapes)
        if len(jumps) > 1:
            raise DictionaryError(f"{encoder}: some layers have thresholds and some have none; download the folder again")
        found = shapes_of(decoder)
        expect(decoder, found, [f"W_dec_{i}"])
        bind_axes(decoder, {"W_dec": found[f"W_dec_{i}"][1]}, {"W_dec": "F outputs d"}, outputs=len(pairs) - i, **sizes)
    return jumps.pop()


def _b_dec(encoders: list[Path]) -> "torch.Tensor":
    """The output biases [L, d], one from each encoder file."""
    import torch

    return torch.stack([map_safetensors(path)[f"b_dec_{i}"].float() for i, path in enumerate(encoders)])
