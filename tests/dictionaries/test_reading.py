"""Opening files: mapped safetensors, archives, and what is said of damaged ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scopeatlas.dictionaries.reading import map_safetensors, read_npz, read_settings, shapes_of
from scopeatlas.errors import DictionaryError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_mapped_tensors_are_those_that_were_saved(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "empty": torch.zeros(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = map_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def written(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_shapes_are_read_off_the_header_of_a_file_larger_than_memory(tmp_path):
    """A sparse file: nothing of its data is on disk, and none of it is read."""
    path = written(tmp_path / "large", {"w": {"dtype": "F32", "shape": [1 << 20, 1 << 15], "data_offsets": [0, 1 << 37]}}, b"")
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (1 << 37))
    assert shapes_of(path) == {"w": ("F32", (1 << 20, 1 << 15))}
    assert map_safetensors(path)["w"][-1, -1] == 0


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8), "w takes 8 bytes where its shape needs 12"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7), "truncated or not safetensors"),
        ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "truncated or not safetensors"),
        ({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2), "w is of dtype F8_E4M3"),
        ([], b"", "truncated or not safetensors"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_one_error_that_names_it(tmp_path, header, data, said):
    path = written(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(DictionaryError, match=f"bad.safetensors.*{said}"):
        map_safetensors(path)


def test_a_compressed_archive_whose_bytes_were_damaged_is_named(tmp_path, rng):
    path = tmp_path / "params.npz"
    np.savez_compressed(path, w=rng.normal(size=(200, 200)))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 64] = bytes(64)
    path.write_bytes(damaged)
    with pytest.raises(DictionaryError, match="params.npz is truncated or not an .npz"):
        read_npz(path)


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "[1]"), ("config.yaml", "- 1"), ("config.json", "{"), ("config.yaml", "{")]
)
def test_settings_that_are_no_object_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DictionaryError, match=f"{name} (does not hold an object|is not readable)"):
        read_settings(tmp_path / name)
