"""Releases saved by SAELens and dictionary_learning give the numbers that those libraries compute from them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scopeatlas.dictionaries.releases import load_folder

GOLDEN = Path(__file__).parent / "golden"  # written by make_golden.py there
FOLDERS = sorted(file.parent for file in GOLDEN.glob("*/*/expected.safetensors"))
assert FOLDERS, f"{GOLDEN} is empty"

golden = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")


def assert_equals(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of each token's largest value: tokens differ in norm by a factor of 30."""
    scale = expected.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@golden
def test_encoding_gives_the_activations_of_the_library(folder):
    expected = load_file(folder / "expected.safetensors")
    acts = load_folder(folder).encode(expected["x"])
    dense = torch.zeros_like(expected["acts"])
    dense[acts.token, acts.feature] = acts.value
    assert torch.equal(dense != 0, expected["acts"] != 0)
    assert_equals(dense, expected["acts"])


@golden
def test_decoding_gives_the_reconstruction_of_the_library(folder):
    expected = load_file(folder / "expected.safetensors")
    dictionary = load_folder(folder)
    assert_equals(dictionary.decode(dictionary.encode(expected["x"]), expected["x"]), expected["y"])
