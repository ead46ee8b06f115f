"""Every family and kind of release that is read: opened, encoded and decoded, against float64 formulas.

    .venv/bin/python -m bench.families

For each test release (tests/dictionaries/writers.py: written as published, the expectation computed in plain numpy from
the family's own formula) prints the kind, the sites, whether exactly the expected features fire, and the largest error
of activations and reconstruction as a share of the token's largest value. The tests hold both under 1e-5.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from scopeatlas.dictionaries.releases import find_saes, open_dictionary
from tests.dictionaries.writers import WRITERS
from tests.dictionaries.writing import Written


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    scale = np.abs(wanted).reshape(len(wanted), -1).max(1).reshape(-1, *[1] * (wanted.ndim - 1))
    return float((np.abs(found - wanted) / np.maximum(scale, 1e-6)).max())


def row(case: str, written: Written) -> str:
    entry = next(e for e in find_saes(written.root) if written.path in ("", e.path))
    dictionary = open_dictionary(entry)
    x = [torch.from_numpy(part) for part in written.x]
    acts = dictionary.encode(x)
    dense = acts.dense(dictionary.width).numpy()
    same = "yes" if np.array_equal(dense != 0, written.acts != 0) else "NO"
    errors = largest_error(dense, written.acts), largest_error(dictionary.decode(acts, x).numpy(), written.y)
    reads = str(dictionary.sites_in[0]) + (f" and {len(dictionary.sites_in) - 1} more" if len(dictionary.sites_in) > 1 else "")
    return f"| {case} | {dictionary.kind} | {reads} | {dictionary.activation.function} | {same} | {errors[0]:.0e} | {errors[1]:.0e} |"


def main() -> None:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print(f"seed {seed}\n")
    print("| release | kind | reads | activation | same features | activations | reconstruction |")
    print("|---|---|---|---|---|---|---|")
    for case, write in WRITERS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(row(case, write(Path(folder), np.random.default_rng(seed))), flush=True)


if __name__ == "__main__":
    main()
