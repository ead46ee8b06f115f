"""What an SAE's files are inside a release, and what their names alone say.

What belongs here: the two records that every format module gives back, and the names of widths. What does not: the
formats themselves (one module each), or opening a file (`reading.py`).
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

WIDTHS = {
    "4k": 4096,
    "16k": 16384,
    "32k": 32768,
    "65k": 65536,
    "131k": 131072,
    "262k": 262144,
    "524k": 524288,
    "1m": 1048576,
}
"""What a width in a folder's name means: 65k is 2**16, so arithmetic on the number would be wrong."""


@dataclass(frozen=True)
class SaeFiles:
    """One SAE's files inside a release, known from names alone.

    path: its identity inside the release. weights (in the order of encoder layers) and configs: paths from the
    release's root, with slashes; configs are those that exist. missing: what it lacks to be whole, such as a shard.
    """

    family: str
    path: str
    weights: tuple[str, ...]
    configs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.weights + self.configs


@dataclass(frozen=True)
class SaeFacts:
    """What the names of an SAE's files tell: empty or None where they do not.

    kind: sae, transcoder, crosscoder, clt. site: the family's own word for it, such as resid_post. width: features in
    all. l0: the release's own figure. model: the subject model's Hub id.
    """

    kind: str = ""
    site: str = ""
    layers: tuple[int, ...] = ()
    width: int | None = None
    l0: float | None = None
    model: str = ""


def parse_width(text: str) -> int | None:
    """16k, 65k, 1m or a plain number as a count of features; None for anything else."""
    text = text.lower()
    if text in WIDTHS:
        return WIDTHS[text]
    match = re.fullmatch(r"(\d+)(k?)", text)
    return None if match is None else int(match[1]) * (1024 if match[2] else 1)


def by_folder(files: Iterable[str]) -> dict[str, set[str]]:
    """File names by folder ("" for the root)."""
    folders: dict[str, set[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        folders.setdefault("" if str(path.parent) == "." else str(path.parent), set()).add(path.name)
    return folders


def inside(folder: str, *names: str) -> tuple[str, ...]:
    """Paths of `names` in `folder`."""
    return tuple(f"{folder}/{name}" if folder else name for name in names)


def numbered(names: Collection[str], pattern: str) -> list[tuple[int, str]]:
    """Those of `names` that match `pattern` whole, with the number that its first group captures, in its order."""
    found = ((re.fullmatch(pattern, name), name) for name in names)
    return sorted((int(match[1]), name) for match, name in found if match)


def gaps(numbers: Collection[int], count: int | None = None) -> list[int]:
    """Which of 0..count-1 (without `count`: up to the largest) are not among `numbers`."""
    return [n for n in range(count if count is not None else max(numbers, default=-1) + 1) if n not in set(numbers)]
