"""Forward passes written out from the architectures' definitions, in float64, on weights alone: every site by name.

Each function takes a model's weights by name and one sequence of token ids [s], and gives the residual stream and all
that is added to it: {hook point: [s, d]}, under Hugging Face names and, where there is one, TransformerLens names.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tiny_models import LAYERS, RMS_EPSILON, WINDOW

Weights = dict[str, Tensor]
Sites = dict[str, Tensor]
LAYER_NORM_EPSILON = 1e-5


def weights_of(model: torch.nn.Module, prefix: str) -> Weights:
    """The float64 weights under `prefix`, named from there."""
    return {n.removeprefix(prefix): w.double() for n, w in model.state_dict().items() if n.startswith(prefix)}


def bare_rms_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + RMS_EPSILON)


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + LAYER_NORM_EPSILON)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def heads(x: Tensor, number: int) -> Tensor:
    return x.reshape(len(x), number, -1)


def rotate(x: Tensor, *, theta: float = 10_000.0, share: float = 1.0) -> Tensor:
    """Rotary positions on the first `share` of each head's coordinates of [s, h, d]; pairs are (i, i + half)."""
    d = int(x.shape[-1] * share)
    half = d // 2
    angles = torch.arange(len(x)).double()[:, None] * theta ** (-torch.arange(half).double() * 2 / d)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b, rest = x[..., :half], x[..., half:d], x[..., d:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, cap: float | None = None) -> Tensor:
    """Causal attention [s, h, d], keys and values shared by groups of heads: [s, h * d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (distance >= 0) & (distance < (window or len(q)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)


def gemma(w: Weights, tokens: Tensor, *, version: int) -> Sites:
    def norm(x: Tensor, name: str) -> Tensor:
        return bare_rms_norm(x) * (1 + w[f"{name}.weight"])

    raw = w["embed_tokens.weight"][tokens]
    x = raw * math.sqrt(raw.shape[1])
    sites = {"model.embed_tokens.output": x, "hook_embed": x, "model.embed_tokens.output.unscaled": raw}
    for n in range(LAYERS):
        at, hf, lens = f"layers.{n}", f"model.layers.{n}", f"blocks.{n}"
        local = n % 2 == 0
        into = norm(x, f"{at}.input_layernorm")
        q, k, v = (heads(linear(into, w, f"{at}.self_attn.{p}_proj"), h) for p, h in (("q", 4), ("k", 2), ("v", 2)))
        if version == 3:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        theta = 1e6 if version == 3 and not local else 1e4
        z = attend(
            rotate(q, theta=theta),
            rotate(k, theta=theta),
            v,
            scale=24**-0.5,
            window=WINDOW if local else None,
            cap=2.0 if version == 2 else None,
        )
        projected = linear(z, w, f"{at}.self_attn.o_proj")
        attn_out = norm(projected, f"{at}.post_attention_layernorm")
        mid = x + attn_out
        mlp_in = norm(mid, f"{at}.pre_feedforward_layernorm")
        pre = linear(mlp_in, w, f"{at}.mlp.gate_proj")
        post = F.gelu(pre, approximate="tanh") * linear(mlp_in, w, f"{at}.mlp.up_proj")
        mlp = linear(post, w, f"{at}.mlp.down_proj")
        mlp_out = norm(mlp, f"{at}.post_feedforward_layernorm")
        sites |= {
            f"{hf}.input_layernorm.output": into,
            f"{hf}.self_attn.output": projected,
            f"{hf}.post_attention_layernorm.output": attn_out,
            f"{hf}.pre_feedforward_layernorm.input": mid,
            f"{hf}.pre_feedforward_layernorm.input.rms_norm": bare_rms_norm(mid),
            f"{hf}.pre_feedforward_layernorm.output": mlp_in,
            f"{hf}.post_feedforward_layernorm.output": mlp_out,
            f"{lens}.ln1.hook_normalized": bare_rms_norm(x),
            f"{lens}.ln2.hook_normalized": bare_rms_norm(mid),
        }
        sites |= _common(n, x, z, attn_out, mid, mlp_in, pre, post, mlp, mlp_out, x := mid + mlp_out)
        sites |= {f"{hf}.self_attn.o_proj.input": z}
    return sites


def llama(w: Weights, tokens: Tensor, *, head_norms: bool = False) -> Sites:
    """Llama and, with its query and key biases found among the weights, Qwen 2; with `head_norms`, Qwen 3."""

    def norm(x: Tensor, name: str) -> Tensor:
        return bare_rms_norm(x) * w[f"{name}.weight"]

    x = w["embed_tokens.weight"][tokens]
    sites = {"model.embed_tokens.output": x, "hook_embed": x}
    for n in range(LAYERS):
        at, hf, lens = f"layers.{n}", f"model.layers.{n}", f"blocks.{n}"
        into = norm(x, f"{at}.input_layernorm")
        q, k, v = (heads(linear(into, w, f"{at}.self_attn.{p}_proj"), h) for p, h in (("q", 4), ("k", 2), ("v", 2)))
        if head_norms:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        z = attend(rotate(q), rotate(k), v, scale=q.shape[-1] ** -0.5)
        attn_out = linear(z, w, f"{at}.self_attn.o_proj")
        mid = x + attn_out
        mlp_in = norm(mid, f"{at}.post_attention_layernorm")
        pre = linear(mlp_in, w, f"{at}.mlp.gate_proj")
        post = F.silu(pre) * linear(mlp_in, w, f"{at}.mlp.up_proj")
        mlp = linear(post, w, f"{at}.mlp.down_proj")
        sites |= {
            f"{hf}.self_attn.o_proj.input": z,
            f"{hf}.self_attn.output": attn_out,
            f"{hf}.post_attention_layernorm.output": mlp_in,
            f"{hf}.mlp.down_proj.input": post,
            f"{lens}.ln1.hook_normalized": bare_rms_norm(x),
            f"{lens}.ln2.hook_normalized": bare_rms_norm(mid),
        }
        sites |= _common(n, x, z, attn_out, mid, mlp_in, pre, post, mlp, mlp, x := mid + mlp)
    return sites


def gpt2(w: Weights, tokens: Tensor) -> Sites:
    def project(x: Tensor, name: str) -> Tensor:  # GPT-2's "Conv1D" keeps its matrices the other way round
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    embedded = w["wte.weight"][tokens]
    x = embedded + w["wpe.weight"][: len(tokens)]
    sites = {"model.embed_tokens.output": embedded, "hook_embed": embedded}
    for n in range(LAYERS):
        at, hf = f"h.{n}", f"model.layers.{n}"
        q, k, v = (heads(part, 4) for part in project(layer_norm(x, w, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, dim=-1))
        z = attend(q, k, v, scale=q.shape[-1] ** -0.5)
        attn_out = project(z, f"{at}.attn.c_proj")
        mid = x + attn_out
        mlp_in = layer_norm(mid, w, f"{at}.ln_2")
        pre = project(mlp_in, f"{at}.mlp.c_fc")
        post = F.gelu(pre, approximate="tanh")
        mlp = project(post, f"{at}.mlp.c_proj")
        sites |= {f"{hf}.attn.c_proj.input": z, f"{hf}.attn.output": attn_out, f"{hf}.ln_2.output": mlp_in}
        sites |= _common(n, x, z, attn_out, mid, mlp_in, pre, post, mlp, mlp, x := mid + mlp)
    return sites


def neox(w: Weights, tokens: Tensor, *, parallel: bool = True) -> Sites:
    x = w["embed_in.weight"][tokens]
    sites = {"model.embed_tokens.output": x, "hook_embed": x}
    for n in range(LAYERS):
        at, hf = f"layers.{n}", f"model.layers.{n}"
        into = layer_norm(x, w, f"{at}.input_layernorm")
        q, k, v = heads(linear(into, w, f"{at}.attention.query_key_value"), 4).chunk(3, dim=-1)
        z = attend(rotate(q, share=0.25), rotate(k, share=0.25), v, scale=q.shape[-1] ** -0.5)
        attn_out = linear(z, w, f"{at}.attention.dense")
        before_mlp = x if parallel else x + attn_out
        mlp_in = layer_norm(before_mlp, w, f"{at}.post_attention_layernorm")
        pre = linear(mlp_in, w, f"{at}.mlp.dense_h_to_4h")
        post = F.gelu(pre)
        mlp = linear(post, w, f"{at}.mlp.dense_4h_to_h")
        sites |= {f"{hf}.attention.dense.input": z, f"{hf}.attention.output": attn_out}
        sites |= _common(n, x, z, attn_out, before_mlp, mlp_in, pre, post, mlp, mlp, x := x + attn_out + mlp)
        if parallel:
            del sites[f"blocks.{n}.hook_resid_mid"]
    return sites


def _common(
    n: int,
    before: Tensor,
    z: Tensor,
    attn_out: Tensor,
    mid: Tensor,
    mlp_in: Tensor,
    pre: Tensor,
    post: Tensor,
    mlp: Tensor,
    mlp_out: Tensor,
    after: Tensor,
) -> Sites:
    """The sites that every architecture has, by the names they share."""
    lens = {
        "hook_resid_pre": before,
        "attn.hook_z": z,
        "hook_attn_out": attn_out,
        "hook_resid_mid": mid,
        "hook_mlp_in": mid,
        "mlp.hook_in": mlp_in,
        "mlp.hook_pre": pre,
        "mlp.hook_post": post,
        "mlp.hook_out": mlp,
        "hook_mlp_out": mlp_out,
        "hook_resid_post": after,
    }
    hf = {"input": before, "mlp.input": mlp_in, "mlp.output": mlp, "output": after}
    return {f"blocks.{n}.{name}": x for name, x in lens.items()} | {f"model.layers.{n}.{name}": x for name, x in hf.items()}
