"""Small crosscoders and cross-layer transcoders in Gemma Scope 2's sharded layout, whose features fire on real text."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from scopeatlas.dictionaries.gemma_scope_2 import HOOKS
from scopeatlas.dictionaries.sparse import Kind
from scopeatlas.subject.capture import capture
from scopeatlas.subject.sites import parse_hook_point
from tests.conftest import Stored, text_mask


def hook(kind: Kind, layers: list[int], side: int) -> str:
    """The hook string of a kind at some layers; side: 0 in, 1 out."""
    return f"model.layers.{{{','.join(map(str, layers))}}}.{HOOKS[kind][side]}"


def multi_layer_tensors(
    xs: list[torch.Tensor], *, width: int = 16, l0: float = 10, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """A random dictionary on activations [tokens, d] of each layer, one shard each: about `l0` of its features, over all
    layers, fire on a token. Shard i writes to outputs i, i + 1, ... with norms 1, 1/2, ..."""
    generator = torch.Generator().manual_seed(seed)
    shards = []
    for i, x_td in enumerate(xs):
        directions = torch.nn.functional.normalize(torch.randn(width, x_td.shape[1], generator=generator), dim=1)
        rows = torch.nn.functional.normalize(torch.randn(width, len(xs), x_td.shape[1], generator=generator), dim=2)
        norms = torch.tensor([1 / (1 + output - i) if output >= i else 0.0 for output in range(len(xs))])
        b_enc = -(x_td.mean(0) @ directions.T)
        threshold = (x_td @ directions.T + b_enc).quantile(1 - l0 / (width * len(xs)), dim=0).clamp(min=1e-3)
        tensors = {"w_enc": directions.T.contiguous(), "b_enc": b_enc, "threshold": threshold, "w_dec": rows * norms[:, None]}
        shards.append(tensors | {"b_dec": torch.zeros(x_td.shape[1])})
    return shards


def write_multi_layer(folder: Path, kind: Kind, layers: list[int], shards: list[dict[str, torch.Tensor]]) -> Path:
    """Write shards and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, tensors in enumerate(shards):
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    config = {
        "hf_hook_point_in": hook(kind, layers, 0),
        "hf_hook_point_out": hook(kind, layers, 1),
        "width": sum(tensors["b_enc"].shape[0] for tensors in shards),
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": False,
        "type": kind,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Seen:
    """Real text at some layers: tokens [n], and activations [n, d] of each layer."""

    tokens: torch.Tensor
    xs: list[torch.Tensor]


def seen_at(kind: Kind, layers: list[int], stored: Stored, subject) -> Seen:
    """What a dictionary of a kind at some layers reads of a corpus."""
    tokens = torch.from_numpy(np.concatenate([stored.corpus.contexts(shard).tokens for shard in stored.corpus.shards])).long()
    sites = [parse_hook_point(f"model.layers.{layer}.{HOOKS[kind][0]}") for layer in layers]
    mask = torch.from_numpy(text_mask(tokens.numpy(), subject))
    acts = capture(subject.model, tokens, sites)
    return Seen(tokens[mask], [acts[site][mask] for site in sites])


def detect(shard: dict[str, torch.Tensor], index: int, x_td: torch.Tensor, wanted: torch.Tensor) -> None:
    """Make one feature of a shard fire on the tokens `wanted` [n], by Fisher's linear discriminant."""
    centred = x_td - x_td.mean(0)
    covariance = centred.T @ centred / len(x_td)
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(x_td.shape[1])
    direction = torch.linalg.solve(covariance + ridge, x_td[wanted].mean(0) - x_td.mean(0))
    direction = direction / direction.norm()
    score = x_td @ direction
    shard["w_enc"][:, index], shard["b_enc"][index] = direction, -score.mean()
    shard["threshold"][index] = (score[wanted].mean() - score.mean()) / 2
