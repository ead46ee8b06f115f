"""The layout of delphi's cache of latents: reading one, and writing one.

What belongs here: its files, and what is wrong with them. What does not: what of it has a counterpart here (`delphi.py`).

It is EleutherAI/delphi's at cd43058b9f3c (`delphi/latents/cache.py`: `InMemoryCache.add`, `LatentCache.save_splits`,
`save_config`; read by `delphi/latents/loader.py`: `TensorBuffer.load`). A folder per hookpoint holds config.json and files
{first}_{last}.safetensors, each of the latents first to last, both included: `locations` uint16 or uint32 [n, 3] of (row,
position, latent - first), sorted by these; `activations` float16 [n]; `tokens` int64 [rows, length], the same in every file.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.activations.shards import round_values
from scopeatlas.errors import ExchangeError, StoreError
from scopeatlas.storage.files import atomic_path, file_sha256

if TYPE_CHECKING:
    from safetensors import safe_open

READ_NONZEROS = 1 << 20
_NAME = re.compile(r"(\d+)_(\d+)")


@dataclass(frozen=True)
class NonZeros:
    """Some of a cache's non-zeros: row, position, latent int64 [n]; value float16 [n], finite, of either sign."""

    row: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    value: np.ndarray

    def where(self, mask: np.ndarray) -> "NonZeros":
        return NonZeros(self.row[mask], self.position[mask], self.latent[mask], self.value[mask])


@dataclass(frozen=True)
class DelphiCache:
    """The cache of one hookpoint. files: latents -> file, in order. tokens: int64 [rows, length]."""

    folder: Path
    config: dict[str, object]
    files: dict[range, Path]
    tokens: np.ndarray

    @property
    def width(self) -> int:
        return max(latents.stop for latents in self.files)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File name -> sha256."""
        return {path.name: file_sha256(path) for path in self.files.values()}

    def nonzeros(self) -> Iterator[NonZeros]:
        """All of them, READ_NONZEROS at a time. Raises ExchangeError naming the file that holds what cannot be."""
        for latents, path in self.files.items():
            with _opened(path) as file:
                locations, activations = (file.get_slice(name) for name in ("locations", "activations"))
                count = activations.get_shape()[0]
                for start in range(0, count, READ_NONZEROS):
                    part = np.s_[start : min(start + READ_NONZEROS, count)]
                    yield self._checked(path, latents, locations[part], activations[part])

    def _checked(self, path: Path, latents: range, locations: np.ndarray, activations: np.ndarray) -> NonZeros:
        at = locations.astype(np.int64)
        if ((at < 0) | (at >= (*self.tokens.shape, len(latents)))).any():
            raise ExchangeError(f"{path}: a location lies outside its tokens or its latents; cache the activations again")
        try:
            value = round_values(activations.astype(np.float32), 1.0)
        except StoreError as error:
            raise ExchangeError(
                f"{path}: an activation is no number or does not fit 16 bits; cache them again, scaled"
            ) from error
        return NonZeros(at[:, 0], at[:, 1], at[:, 2] + latents.start, value)


def open_cache(folder: Path) -> DelphiCache:
    """The cache in the folder of one hookpoint. Raises ExchangeError if it is damaged, not whole, or has no tokens."""
    found = {match: path for path in folder.glob("*.safetensors") if (match := _NAME.fullmatch(path.stem))}
    ranges = {range(int(match[1]), int(match[2]) + 1): path for match, path in found.items()}
    files = dict(sorted(ranges.items(), key=lambda item: item[0].start))
    if not files:
        raise ExchangeError(f"{folder} holds no FIRST_LAST.safetensors; name the folder of one hookpoint in delphi's latents/")
    expected = 0
    for latents in files:
        if latents.start != expected:
            raise ExchangeError(f"{folder} holds no file that begins with latent {expected}; copy the whole folder of one run")
        expected = latents.stop
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExchangeError(f"cannot read {folder / 'config.json'}: {error}; copy the whole folder") from error
    return DelphiCache(folder, config, files, _common_tokens(list(files.values())))


def _common_tokens(files: list[Path]) -> np.ndarray:
    """The tokens that all files hold; the shapes of what else they hold are checked."""
    common: np.ndarray | None = None
    for path in files:
        with _opened(path) as file:
            if "tokens" not in file.keys():  # noqa: SIM118
                raise ExchangeError(f"{path} holds no tokens; cache the activations again with save_tokens=True")
            shapes = {name: file.get_slice(name).get_shape() for name in ("locations", "activations", "tokens")}
            n = shapes["activations"][0] if len(shapes["activations"]) == 1 else -1
            if shapes["locations"] != [n, 3] or len(shapes["tokens"]) != 2:
                raise ExchangeError(f"{path} is not delphi's: it holds {shapes}; expected [n, 3], [n] and [rows, length]")
            tokens = file.get_tensor("tokens").astype(np.int64)
        if common is not None and not np.array_equal(common, tokens):
            raise ExchangeError(f"{path} holds other tokens than {files[0].name}; copy the whole folder of one run")
        common = tokens
    assert common is not None
    return common


@contextmanager
def _opened(path: Path) -> "Iterator[safe_open]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ExchangeError(f"{path} is truncated or not delphi's ({error}); copy it or cache the activations again") from error


def split_latents(width: int, splits: int) -> list[range]:
    """The latents of each file, cut as `LatentCache._generate_split_indices` cuts them."""
    import torch

    bounds = torch.linspace(0, width, steps=splits + 1).long().tolist()
    return [range(first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]


def write_split(folder: Path, latents: range, nonzeros: NonZeros, tokens: np.ndarray) -> Path:
    """One file, atomically. nonzeros: of these latents, in any order; tokens: int64 [rows, length]."""
    from safetensors.numpy import save_file

    order = np.lexsort((nonzeros.latent, nonzeros.position, nonzeros.row))
    locations = np.stack([nonzeros.row, nonzeros.position, nonzeros.latent - latents.start], axis=1)[order]
    small = max(locations[:, 0].max(initial=0), locations[:, 2].max(initial=0)) < 2**16
    path = folder / f"{latents.start}_{latents.stop - 1}.safetensors"
    tensors: Mapping[str, np.ndarray] = {
        "locations": locations.astype(np.uint16 if small else np.uint32),
        "activations": nonzeros.value[order],
        "tokens": tokens,
    }
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary)
    return path
