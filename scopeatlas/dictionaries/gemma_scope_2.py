"""Gemma Scope 2's single-layer format: `config.json` beside `params.safetensors`, one folder per SAE or transcoder.

What belongs here: this one file format. What does not: arithmetic (`sparse.py`), other formats, the multi-layer kinds.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.dictionaries.sparse import SparseDictionary, validate
from scopeatlas.errors import DictionaryError
from scopeatlas.subject.sites import parse_hook_point

if TYPE_CHECKING:
    import torch

WEIGHT_FILE = "params.safetensors"
CONFIG_FILE = "config.json"
_REQUIRED = {"w_enc", "b_enc", "threshold", "w_dec", "b_dec"}
_SKIP = "affine_skip_connection"


def load(folder: Path) -> SparseDictionary:
    """Load and validate one SAE or transcoder. Raises DictionaryError naming the file and what is wrong with it."""
    config = _config(folder / CONFIG_FILE)
    weights = folder / WEIGHT_FILE
    tensors = _tensors(weights)
    kind = config.get("type", "sae")
    if kind not in {"sae", "transcoder"}:
        raise DictionaryError(f"{folder / CONFIG_FILE}: type '{kind}' is not a single-layer kind (sae, transcoder)")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise DictionaryError(f"{folder / CONFIG_FILE}: architecture '{config['architecture']}' is not jump_relu")
    if config.get("affine_connection", _SKIP in tensors) != (_SKIP in tensors):
        raise DictionaryError(f"{weights}: config.json and the file disagree about an {_SKIP}; download both again")
    if tensors["w_enc"].ndim != 2 or tensors["w_dec"].ndim != 2:
        raise DictionaryError(f"{weights}: w_enc and w_dec must be matrices; this may be a shard of a multi-layer dictionary")
    dictionary = SparseDictionary(
        kind=kind,
        site_in=parse_hook_point(_required(config, "hf_hook_point_in", folder)),
        site_out=parse_hook_point(_required(config, "hf_hook_point_out", folder)),
        model_name=config.get("model_name", ""),
        target_l0=config.get("l0"),
        skip=tensors.get(_SKIP),
        **{name: tensors[name] for name in sorted(_REQUIRED)},
    )
    validate(dictionary, str(weights))
    if config.get("width") not in (None, dictionary.width):
        raise DictionaryError(
            f"{weights}: has {dictionary.width} features, config.json says {config['width']}; download both again"
        )
    return dictionary


def is_whole(folder: Path) -> bool:
    """Whether the folder's files are complete: a readable config, and a safetensors file as long as its header says."""
    try:
        _config(folder / CONFIG_FILE)
        weights = folder / WEIGHT_FILE
        with weights.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size))
    except (DictionaryError, OSError, ValueError):
        return False
    end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    return weights.stat().st_size == 8 + header_size + end


def _config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DictionaryError(f"{path} is missing; download the whole folder") from error
    except (OSError, ValueError) as error:
        raise DictionaryError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} does not hold a JSON object; download it again")
    return config


def _required(config: dict, name: str, folder: Path) -> str:
    if not isinstance(config.get(name), str):
        raise DictionaryError(f"{folder / CONFIG_FILE} lacks '{name}': the site cannot be known")
    return config[name]


def _tensors(path: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise DictionaryError(f"{path} is missing; download the whole folder") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DictionaryError(f"{path} is truncated or not safetensors ({error}); download it again") from error
    unknown, missing = tensors.keys() - _REQUIRED - {_SKIP}, _REQUIRED - tensors.keys()
    if unknown or missing:
        raise DictionaryError(
            f"{path}: not Gemma Scope 2's tensors (missing: {', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(unknown)) or 'none'})"
        )
    return {name: tensor.float() for name, tensor in tensors.items()}
