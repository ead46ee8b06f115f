"""What the writers of test releases share: what a release is, drawing weights and tokens, activation functions, files.

What belongs here: float64 numpy that holds for any family. What does not: a family's formats and formulas (the modules
`writers_*.py`), or anything of the loaders, whose independent check this is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

Array = np.ndarray
Weights = dict[str, torch.Tensor]
Activate = Callable[[Array], tuple[Array, Array]]
"""x [T, d_in] -> activations [T, F], and how far each token [T] is from any other set of active features."""

TOKENS = 12
F = 24


class Truth(TypedDict):
    x: list[Array]
    acts: Array
    y: Array
    rows: Array


@dataclass(frozen=True)
class Written:
    """A release on disk and what is true of it, in float64.

    path: of the SAE inside the release. x: one float32 [T, d_in] per input site. acts: [T, L * F]. y: [T, d_out], or
    [T, L_out, d_out] of a multi-layer kind. rows: [L * F, L_out, d_out], what one unit of a feature writes. Sites are
    hook strings. model_name: None where nothing in the release says it.
    """

    root: Path
    release: str
    path: str
    kind: str
    x: list[Array]
    acts: Array
    y: Array
    rows: Array
    sites_in: tuple[str, ...]
    sites_out: tuple[str, ...]
    model_name: str | None
    target_l0: float | None = None
    measured_l0: float | None = None

    @property
    def folder(self) -> Path:
        return self.root / self.release


Writer = Callable[[Path, np.random.Generator], Written]


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, scale, shape)).to(dtype)


def f64(tensor: torch.Tensor) -> Array:
    """What the file holds, exactly."""
    return tensor.double().numpy()


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def expected(
    rng: np.random.Generator,
    d_in: int,
    encoders: Sequence[Activate],
    rows: Array,
    bias: Array,
    *,
    skip: Sequence[Array] = (),
    restore: Callable[[Array, Array], Array] | None = None,
    squeeze: bool = True,
) -> Truth:
    """x, acts, y and rows: y[o] = sum of acts * rows[:, o] + bias[o], its norm restored, plus x[o] @ skip[o].

    Of many tokens, at usual, large and small scale, those are kept whose active features float32 cannot change.
    """
    x = rng.normal(size=(len(encoders), 20 * TOKENS, d_in))
    x[:, ::5] *= 30
    x[:, 1::5] *= 0.01
    x = x.astype(np.float32)
    parts = [encode(x_td.astype(np.float64)) for encode, x_td in zip(encoders, x, strict=True)]
    acts, margin = np.concatenate([part for part, _ in parts], 1), np.min([part for _, part in parts], 0)
    kept = np.flatnonzero(margin > 1e-4 + 2e-6 * np.abs(acts).max(1))[:TOKENS]
    assert len(kept) == TOKENS, "too many ties: draw fewer features"
    x, acts = x[:, kept], acts[kept]
    assert 0 < (acts != 0).mean() < 0.9, "a case in which nothing, or nearly everything, fires tests little"
    y = np.einsum("tf,fod->tod", acts, rows) + bias
    if restore is not None:
        y = restore(y, x[0].astype(np.float64)[:, None])
    for output, matrix in enumerate(skip):
        y[:, output] += x[output].astype(np.float64) @ matrix
    return {"x": list(x), "acts": acts, "y": y[:, 0] if squeeze else y, "rows": rows}


def relu(pre: Array, threshold: Array | float = 0.0) -> tuple[Array, Array]:
    """relu(pre) * H(pre > threshold)."""
    return np.maximum(pre, 0) * (pre > threshold), np.abs(pre - threshold).min(1)


def topk(pre: Array, k: int) -> tuple[Array, Array]:
    """relu of the k largest."""
    ordered = -np.sort(-pre, 1)
    kept = pre >= ordered[:, k - 1 : k]
    return np.maximum(pre, 0) * kept, np.minimum(ordered[:, k - 1] - ordered[:, k], np.abs(pre).min(1))


def abstopk(pre: Array, k: int) -> tuple[Array, Array]:
    ordered = -np.sort(-np.abs(pre), 1)
    return pre * (np.abs(pre) >= ordered[:, k - 1 : k]), ordered[:, k - 1] - ordered[:, k]


def groupmax(pre: Array, k: int) -> tuple[Array, Array]:
    groups = pre.reshape(len(pre), k, -1)
    ordered = -np.sort(-groups, 2)
    acts = np.maximum(groups, 0) * (groups == ordered[:, :, :1])
    return acts.reshape(pre.shape), np.minimum((ordered[:, :, 0] - ordered[:, :, 1]).min(1), np.abs(pre).min(1))


def gated(gate: Array, magnitude: Array) -> tuple[Array, Array]:
    return (gate > 0) * np.maximum(magnitude, 0), np.minimum(np.abs(gate).min(1), np.abs(magnitude).min(1))


def layer_normed(x: Array, eps: float = 1e-5) -> Array:
    return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + eps)


def layer_unnormed(y: Array, x: Array) -> Array:
    """SAELens and OpenAI keep the deviation without the epsilon, and multiply it back so."""
    return y * x.std(-1, ddof=1, keepdims=True) + x.mean(-1, keepdims=True)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def save_pickle(path: Path, body: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(body, path)


def save_settings(path: Path, body: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(body) if path.suffix == ".json" else yaml.safe_dump(dict(body))
    path.write_text(text, encoding="utf-8")
