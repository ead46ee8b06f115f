"""Segments: a log that is only added to, in an object store, whose files cannot be.

What belongs here: adding one immutable segment after all that are there, and reading them in order. What does not: what is
in them.
"""

from upath import UPath

from scopeatlas.storage.files import create_once
from scopeatlas.storage.uris import read_all, sizes_under

_SUFFIX = ".segment"
_DIGITS = 8  # so that names sort as numbers


def append_segment(folder: UPath, content: bytes) -> None:
    """Add `content` after every segment that there is. Of writers on several machines each has a number of its own.

    Raises StoreError if it cannot be written.
    """
    names = _names(folder)
    number = int(names[-1].removesuffix(_SUFFIX)) + 1 if names else 0
    while not create_once(place := folder / f"{number:0{_DIGITS}}{_SUFFIX}", content):
        if read_all([place]) == [content]:
            return  # written by an attempt whose answer was lost
        number += 1


def read_segments(folder: UPath) -> list[bytes]:
    """The segments in the order in which they were added; none if there is no such folder."""
    found = read_all([folder / name for name in _names(folder)])
    return [content for content in found if content is not None]


def _names(folder: UPath) -> list[str]:
    return sorted(name for name in sizes_under(folder) if name.endswith(_SUFFIX))
