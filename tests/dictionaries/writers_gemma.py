"""Releases of Gemma Scope 1 and 2, and of circuit-tracer, the other one with cross-layer transcoders, as published.

What belongs here: file names, keys, orientation, configs and float64 formulas of these families. What does not: the
other families (`writers_others.py`), or the table of all cases (`writers.py`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from tests.dictionaries.writing import (
    Activate,
    Array,
    F,
    Weights,
    Written,
    draw,
    expected,
    f64,
    relu,
    save_settings,
    save_tensors,
    topk,
    unit,
)


def gemma_weights(rng: np.random.Generator, d_in: int, width: int, d_out: int) -> Weights:
    """JumpReLU in the convention of both Gemma Scopes: x @ w_enc, decoder rows of unit norm, few features active."""
    return {
        "w_enc": draw(rng, d_in, width, scale=d_in**-0.5),
        "b_enc": draw(rng, width, scale=0.2),
        "threshold": torch.from_numpy(rng.uniform(1.0, 2.5, width)).float(),
        "w_dec": unit(draw(rng, width, d_out)),
        "b_dec": draw(rng, d_out),
    }


def gemma_encoder(weights: Mapping[str, torch.Tensor]) -> Activate:
    w_enc, b_enc, threshold = (f64(weights[name]) for name in ("w_enc", "b_enc", "threshold"))
    return lambda x: relu(np.einsum("td,df->tf", x, w_enc) + b_enc, threshold)


def gemma_scope_1(
    root: Path, rng: np.random.Generator, *, what: str, release: str = "", model: str = "google/gemma-2-2b"
) -> Written:
    """params.npz in float32, no config. The average L0 of the folder's name is measured."""
    sites = {
        "res": ("model.layers.12.output",) * 2,
        "mlp": ("model.layers.12.post_feedforward_layernorm.output",) * 2,
        "att": ("model.layers.12.self_attn.o_proj.input",) * 2,
        "transcoders": (
            "model.layers.12.pre_feedforward_layernorm.input.rms_norm",
            "model.layers.12.post_feedforward_layernorm.output",
        ),
        "embedding": ("model.embed_tokens.output.unscaled",) * 2,
    }
    embedding = what == "embedding"
    path, width = ("embedding/width_4k/average_l0_21", 4096) if embedding else ("layer_12/width_16k/average_l0_82", 16384)
    release = release or f"gemma-scope-2b-pt-{'res' if embedding else what}"
    weights = gemma_weights(rng, 8, width, 10 if what == "transcoders" else 8)
    (root / release / path).mkdir(parents=True)
    others = {name: weights[name].numpy() for name in ("b_enc", "b_dec", "threshold")}
    np.savez(root / release / path / "params.npz", W_enc=weights["w_enc"].numpy(), W_dec=weights["w_dec"].numpy(), **others)  # pyright: ignore[reportArgumentType]
    truth = expected(rng, 8, [gemma_encoder(weights)], f64(weights["w_dec"])[:, None], f64(weights["b_dec"])[None])
    kind, (site_in, site_out) = ("transcoder" if what == "transcoders" else "sae"), sites[what]
    l0 = 21 if embedding else 82
    return Written(root, release, path, kind, **truth, sites_in=(site_in,), sites_out=(site_out,), model_name=model, measured_l0=l0)  # fmt: skip


AS_PUBLISHED: Mapping[str, object] = MappingProxyType({})
GEMMA_2_SITES = {
    "resid_post": ("output", "output"),
    "mlp_out": ("post_feedforward_layernorm.output",) * 2,
    "attn_out": ("self_attn.o_proj.input",) * 2,
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def gemma_scope_2(
    root: Path,
    rng: np.random.Generator,
    *,
    path: str = "resid_post/layer_12_width_16k_l0_medium",
    release: str = "gemma-scope-2-270m-pt",
    model: str = "google/gemma-3-270m",
    l0: float = 60,
    config: Mapping[str, object] | None = AS_PUBLISHED,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """One layer: params.safetensors and, unless `config` is None, config.json with `config` in place of its entries."""
    what, layer = path.split("_all/")[0].split("/")[0], int(re.findall(r"layer_(\d+)", path)[0])
    width, affine = {"16k": 16384, "65k": 65536}[path.split("width_")[1].split("_")[0]], path.endswith("_affine")
    site_in, site_out = (f"model.layers.{layer}.{rest}" for rest in GEMMA_2_SITES[what])
    kind = "transcoder" if what == "transcoder" else "sae"
    weights = {name: tensor.to(dtype) for name, tensor in gemma_weights(rng, 8, width, 8).items()}
    skip = draw(rng, 8, 8, dtype=dtype)
    save_tensors(root / release / path / "params.safetensors", weights | ({"affine_skip_connection": skip} if affine else {}))
    if config is not None:
        body = {"hf_hook_point_in": site_in, "hf_hook_point_out": site_out, "width": width, "model_name": model}
        body |= {"architecture": "jump_relu", "l0": l0, "affine_connection": affine, "type": kind}
        save_settings(root / release / path / "config.json", body | dict(config))
    rows, bias = f64(weights["w_dec"])[:, None], f64(weights["b_dec"])[None]
    truth = expected(rng, 8, [gemma_encoder(weights)], rows, bias, skip=[f64(skip)] if affine else [])
    return Written(root, release, path, kind, **truth, sites_in=(site_in,), sites_out=(site_out,), model_name=model, target_l0=l0)  # fmt: skip


def gemma_scope_2_multilayer(
    root: Path,
    rng: np.random.Generator,
    *,
    path: str,
    release: str = "gemma-scope-2-270m-pt",
    model: str = "google/gemma-3-270m",
    l0: float = 50,
    config: Mapping[str, object] | None = AS_PUBLISHED,
) -> Written:
    """Shards of one encoder layer each, w_dec [f, L, d] by absolute output; a crosscoder's are numbered by position."""
    is_clt, affine, d, f = path.startswith("clt"), path.endswith("_affine"), 8, 6
    listed = range(18) if is_clt else [int(n) for n in re.findall(r"layer_([\d_]+)_width", path)[0].split("_")]
    n = len(listed)
    shards = [gemma_weights(rng, d, f, d) | {"w_dec": draw(rng, f, n, d, scale=d**-0.5)} for _ in listed]
    for position, shard in enumerate(shards):
        shard["w_dec"][:, :position] = 0  # a crosscoder is causal as well, if weakly: it writes to its own layer too
        shard |= {"affine_skip_connection": draw(rng, d, d)} if affine else {}
        save_tensors(root / release / path / f"params_layer_{position}.safetensors", shard)
    written = "{all}" if is_clt else "{" + ",".join(map(str, listed)) + "}"
    ends = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output") if is_clt else ("output", "output")
    if config is not None:
        hooks = {f"hf_hook_point_{side}": f"model.layers.{written}.{e}" for side, e in zip(("in", "out"), ends, strict=True)}
        body = hooks | {"width": n * f, "model_name": model, "architecture": "jump_relu", "l0": l0, "affine_connection": affine}
        body |= {"type": "clt" if is_clt else "crosscoder"}
        save_settings(root / release / path / "config.json", body | dict(config))
    rows, bias = np.concatenate([f64(shard["w_dec"]) for shard in shards]), np.stack([f64(shard["b_dec"]) for shard in shards])
    skip = [f64(shard["affine_skip_connection"]) for shard in shards] if affine else []
    truth = expected(rng, d, [gemma_encoder(shard) for shard in shards], rows, bias, skip=skip, squeeze=False)
    sites_in, sites_out = (tuple(f"model.layers.{layer}.{end}" for layer in listed) for end in ends)
    kind = "clt" if is_clt else "crosscoder"
    return Written(root, release, path, kind, **truth, sites_in=sites_in, sites_out=sites_out, model_name=model, target_l0=l0)  # fmt: skip


def circuit_tracer_plt(root: Path, rng: np.random.Generator, *, activation: str = "relu", skip: bool = False) -> Written:
    """layer_{i}.safetensors beside one config.yaml: W_enc and W_dec both (F, d), the threshold inside the activation's name."""
    d, k, release = 16, 4, "qwen3-0.6b-transcoders-lowl0"
    layers = []
    for i in range(3):
        w = {
            "W_enc": draw(rng, F, d, scale=0.3),
            "W_dec": draw(rng, F, d),
            "b_enc": draw(rng, F, scale=0.3),
            "b_dec": draw(rng, d),
        }
        threshold = torch.from_numpy(rng.uniform(0.1, 1, F)).float()
        w |= {"activation_function.threshold": threshold} if activation == "jumprelu" else {}
        w |= {"W_skip": draw(rng, d, d)} if skip else {}
        layers.append(w)
        save_tensors(root / release / f"layer_{i}.safetensors", w)
    body: dict[str, object] = {"model_name": "Qwen/Qwen3-0.6B", "model_kind": "transcoder_set", "scan": release}
    body |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    save_settings(root / release / "config.yaml", body | ({"activation": "topk", "k": k} if activation == "topk" else {}))
    n = {name: f64(tensor) for name, tensor in layers[1].items()}

    def encode(x: Array) -> tuple[Array, Array]:
        pre = np.einsum("td,fd->tf", x, n["W_enc"]) + n["b_enc"]
        return topk(pre, k) if activation == "topk" else relu(pre, n.get("activation_function.threshold", 0.0))

    truth = expected(rng, d, [encode], n["W_dec"][:, None], n["b_dec"][None], skip=[n["W_skip"].T] if skip else [])
    sites_in, sites_out = ("blocks.1.mlp.hook_in",), ("blocks.1.hook_mlp_out",)
    return Written(
        root, release, "layer_1", "transcoder", **truth, sites_in=sites_in, sites_out=sites_out, model_name="Qwen/Qwen3-0.6B"
    )


def circuit_tracer_clt(root: Path, rng: np.random.Generator, *, jumprelu: bool = False) -> Written:
    """W_enc_{i} and W_dec_{i}.safetensors: W_dec_i[:, j] writes to layer i + j."""
    n, d, f, release = 4, 16, 6, "clt-gemma-2-2b-426k"
    encoders: list[Activate] = []
    rows, bias = np.zeros((n, f, n, d)), np.zeros((n, d))
    for i in range(n):
        w = {f"W_enc_{i}": draw(rng, f, d, scale=0.3), f"b_enc_{i}": draw(rng, f, scale=0.3), f"b_dec_{i}": draw(rng, d)}
        threshold = torch.from_numpy(rng.uniform(0.1, 1, f)).float() if jumprelu else torch.zeros(f)
        save_tensors(root / release / f"W_enc_{i}.safetensors", w | ({f"threshold_{i}": threshold} if jumprelu else {}))
        w_dec = draw(rng, f, n - i, d)
        save_tensors(root / release / f"W_dec_{i}.safetensors", {f"W_dec_{i}": w_dec})
        w_enc, b_enc, floor = f64(w[f"W_enc_{i}"]), f64(w[f"b_enc_{i}"]), f64(threshold)
        encoders.append(lambda x, w=w_enc, b=b_enc, t=floor: relu(np.einsum("td,fd->tf", x, w) + b, t))
        for j in range(n - i):
            rows[i, :, i + j] = f64(w_dec)[:, j]
        bias[i] = f64(w[f"b_dec_{i}"])
    body = {"model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder", "scan": release}
    body |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    save_settings(root / release / "config.yaml", body)
    truth = expected(rng, d, encoders, rows.reshape(n * f, n, d), bias, squeeze=False)
    sites_in, sites_out = (tuple(f"blocks.{i}.{hook}" for i in range(n)) for hook in ("hook_resid_mid", "hook_mlp_out"))
    return Written(root, release, "", "clt", **truth, sites_in=sites_in, sites_out=sites_out, model_name="google/gemma-2-2b")
