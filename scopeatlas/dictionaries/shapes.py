"""Checking the shapes of named tensors against the axes that a format gives them.

What belongs here: shapes alone, known from headers or tensors. What does not: opening files (`reading.py`), or the
checks of a whole dictionary (`validation.py`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from scopeatlas.errors import DictionaryError


def bind_axes(path: Path, shapes: Mapping[str, Sequence[int]], axes: Mapping[str, str], **known: int) -> dict[str, int]:
    """The size of every axis: `bind_axes(path, shapes, {"w_enc": "d_in F", "b_enc": "F"})["F"]`.

    shapes: by tensor name; a name in `axes` that is not among them is left out. known: sizes given beforehand. Raises
    DictionaryError naming the file and the tensor whose shape does not go with the others.
    """
    sizes = dict(known)
    for name, text in axes.items():
        if name not in shapes:
            continue
        shape, letters = tuple(shapes[name]), text.split()
        if len(shape) != len(letters) or any(sizes.setdefault(*pair) != pair[1] for pair in zip(letters, shape, strict=True)):
            expected = ", ".join(str(sizes[axis]) if axis in sizes else axis for axis in letters)
            raise DictionaryError(f"{path}: {name} has shape {shape}, expected ({expected}); download the file again")
    return sizes
