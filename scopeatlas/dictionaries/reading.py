"""Opening the files that releases are made of: safetensors, npz, pickles of tensors, JSON and YAML.

What belongs here: from a path to named tensors or settings, with one clear error when the file is damaged. What does
not: what the names mean (one module per format).
"""

import json
import math
import zipfile
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from scopeatlas.errors import DictionaryError

if TYPE_CHECKING:
    import torch

Settings = dict[str, "str | int | float | bool | list | dict | None"]


def read_settings(path: Path) -> Settings:
    """A JSON or YAML object. Raises DictionaryError naming the file if it is missing or is none."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise DictionaryError(f"{path} is missing; download the whole folder") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise DictionaryError(f"{path} is not readable {kind} ({first_line(error)}); download it again") from error
    if not isinstance(body, dict):
        raise DictionaryError(f"{path} does not hold an object; download it again")
    return body


def shapes_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) from a safetensors file's header alone; the file must be as long as its header says.

    Raises DictionaryError if it is not: an upload or download under way, or a truncated file.
    """
    return {name: (dtype, shape) for name, (dtype, shape, _) in _header(path).items()}


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype, shape, place of its first byte in the file)."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != 8 + size + end:
            raise ValueError(f"{path.stat().st_size:,} bytes where its header says {8 + size + end:,}")
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            expected = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 0)
            if expected and (first < 0 or last - first != expected):
                raise ValueError(f"{name} takes {last - first:,} bytes where its shape needs {expected:,}")
        return {
            name: (entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]) for name, entry in header.items()
        }
    except FileNotFoundError as error:
        raise DictionaryError(f"{path} is missing; download the whole folder") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DictionaryError(f"{path} is truncated or not safetensors ({first_line(error)}); download it again") from error


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


def map_safetensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file, mapped read-only: nothing is read before it is used, and memory is the page
    cache's. (safetensors' own mapping is private, for which Linux refuses files larger than memory.)
    """
    import mmap
    import warnings

    import torch

    tensors: dict[str, torch.Tensor] = {}
    header = _header(path)
    with path.open("rb") as stream:
        raw = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    for name, (dtype, shape, start) in header.items():
        if dtype not in _DTYPES:
            raise DictionaryError(f"{path}: {name} is of dtype {dtype}; weights are read as {', '.join(_DTYPES)}")
        kind = getattr(torch, _DTYPES[dtype])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the memory is read-only is the point
            count = math.prod(shape)
            flat = torch.frombuffer(raw, dtype=kind, count=count, offset=start) if count else torch.empty(0, dtype=kind)
        tensors[name] = flat.view(shape)
    return tensors


def read_npz(path: Path) -> "dict[str, torch.Tensor]":
    """The arrays of an .npz file; pickled objects inside are refused."""
    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError as error:
        raise DictionaryError(f"{path} is missing; download the whole folder") from error
    except (OSError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DictionaryError(
            f"{path} is truncated or not an .npz of plain arrays ({first_line(error)}); download it again"
        ) from error


def read_pickle(path: Path) -> dict:
    """A torch file, opened with `weights_only=True`: one that would run code is refused."""
    import pickle

    import torch

    try:
        body = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise DictionaryError(f"{path} is missing; download the whole folder") from error
    except pickle.UnpicklingError as error:
        raise DictionaryError(
            f"{path} is a pickle that holds more than tensors, or is damaged ({first_line(error)}); it is not opened: "
            "ask its publisher for safetensors, or download it again"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DictionaryError(f"{path} is truncated or not a torch file ({first_line(error)}); download it again") from error
    if not isinstance(body, dict):
        raise DictionaryError(f"{path} holds a {type(body).__name__}, not named tensors")
    return body


def expect(path: Path, found: Collection[str], required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raises DictionaryError unless `found` is exactly `required` and any of `optional`."""
    missing, unknown = set(required) - set(found), set(found) - set(required) - set(optional)
    if missing or unknown:
        raise DictionaryError(
            f"{path}: not the tensors expected (missing: {', '.join(sorted(missing)) or 'none'}; "
            f"unknown: {', '.join(sorted(unknown)) or 'none'})"
        )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
