"""Releases of SAELens, sparsify, dictionary_learning, Llama Scope, Qwen Scope, Goodfire and OpenAI, as published.

What belongs here: file names, keys, dtypes, orientation, configs and float64 formulas of these families. What does not:
the Gemma Scopes and circuit-tracer (`writers_gemma.py`), or the table of all cases (`writers.py`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.dictionaries.writers_gemma import GEMMA_2_SITES
from tests.dictionaries.writing import (
    Activate,
    Array,
    F,
    Weights,
    Written,
    abstopk,
    draw,
    expected,
    f64,
    gated,
    groupmax,
    layer_normed,
    layer_unnormed,
    relu,
    save_pickle,
    save_settings,
    save_tensors,
    topk,
    unit,
)


def saelens_formula(weights: Weights, architecture: str, normalise: str, *, subtract: bool, k: int, rescale: bool) -> Activate:
    """process_sae_in, then the architecture's encode, as SAELens 6.54 has them."""
    w = {name: f64(tensor) for name, tensor in weights.items()}

    def encode(x: Array) -> tuple[Array, Array]:
        if normalise == "constant_norm_rescale":
            x = x * (np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True))
        elif normalise == "layer_norm":
            x = layer_normed(x)
        z = x - w["b_dec"] if subtract else x
        if architecture == "gated":
            return gated(z @ w["W_enc"] + w["b_gate"], z @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])
        pre = z @ w["W_enc"] + w["b_enc"]
        if "topk" in architecture:
            pre = pre * np.linalg.norm(w["W_dec"], axis=1) if rescale else pre
            return (abstopk if architecture == "abstopk" else topk)(pre, k)
        return relu(pre, w.get("threshold", 0.0))

    return encode


def saelens_restore(normalise: str) -> Callable[[Array, Array], Array] | None:
    return {
        "constant_norm_rescale": lambda y, x: y / (np.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)),
        "layer_norm": layer_unnormed,
    }.get(normalise)


def saelens(
    root: Path,
    rng: np.random.Generator,
    *,
    architecture: str = "standard",
    normalise: str | bool = "none",
    subtract: bool = True,
    rescale: bool = False,
    hook: str = "blocks.8.hook_resid_pre",
    old: bool = False,
    hugging_face: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """cfg.json in the schema from 6.0 on, or the one before, and sae_weights.safetensors."""
    d, release, k = 16, "gpt2-small-res-jb", 14
    transcoder, skips = "transcoder" in architecture, "skip" in architecture
    subtract &= not transcoder
    d_out, hook_out = (12, "blocks.8.hook_mlp_out") if transcoder else (d, hook)
    w = {"W_enc": draw(rng, d, F, scale=d**-0.5), "W_dec": draw(rng, F, d_out), "b_dec": draw(rng, d_out)}
    w |= {name: draw(rng, F, scale=0.3) for name in (("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",))}
    w |= {"threshold": torch.from_numpy(rng.uniform(0.1, 1, F)).float()} if "jumprelu" in architecture else {}
    w |= {"W_skip": draw(rng, d_out, d)} if skips else {}
    w = {name: tensor.to(dtype) for name, tensor in w.items()}
    save_tensors(root / release / hook / "sae_weights.safetensors", w)

    names = {"model_name": "gpt2-small", "hook_name": hook, "hook_head_index": None, "prepend_bos": True, "context_size": 128}
    body = {
        "d_in": d,
        "d_sae": F,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "normalize_activations": normalise,
    }
    if old:  # the names of 2024: no version, no metadata, the subtraction left to its default of True
        body |= names | {"hook_layer": 8, "activation_fn_str": "topk" if architecture == "topk" else "relu"}
        body |= {"activation_fn_kwargs": {"k": k} if architecture == "topk" else {}}
        body |= {"architecture": "standard" if architecture == "topk" else architecture}
        body["hook_point"] = body.pop("hook_name")
        body |= {} if subtract else {"apply_b_dec_to_input": False}
    else:
        body |= {"architecture": architecture, "apply_b_dec_to_input": subtract, "reshape_activations": "none"}
        body |= {"d_out": d_out} if transcoder else {}
        body |= {"k": k, "rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
        body["metadata"] = names | {"sae_lens_version": "6.54.12"} | ({"hook_name_out": hook_out} if transcoder else {})
    if hugging_face:  # as the Gemma Scope 2 transcoders are described: the lens name is wrong, the other is right
        hook, hook_out = (f"model.layers.8.{end}" for end in GEMMA_2_SITES["transcoder"])
        body["metadata"] |= {"hf_hook_name": hook, "hf_hook_name_out": hook_out}
    path = names["hook_name"]
    save_settings(root / release / path / "cfg.json", body)

    encode = saelens_formula(w, architecture, str(normalise), subtract=subtract, k=k, rescale=rescale)
    rows = f64(w["W_dec"]) / (np.linalg.norm(f64(w["W_dec"]), axis=1, keepdims=True) if rescale else 1)
    skip = [f64(w["W_skip"]).T] if skips else []
    truth = expected(rng, d, [encode], rows[:, None], f64(w["b_dec"])[None], skip=skip, restore=saelens_restore(str(normalise)))
    kind = "transcoder" if transcoder else "sae"
    return Written(root, release, str(path), kind, **truth, sites_in=(hook,), sites_out=(hook_out,), model_name="gpt2-small")


def sparsify(
    root: Path,
    rng: np.random.Generator,
    *,
    release: str = "sae-llama-3-8b-32x",
    path: str = "layers.3",
    site: str = "model.layers.3.output",
    activation: str = "topk",
    transcode: bool = False,
    says_transcode: bool = True,
    expanded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """cfg.json without a hook: the folder is the module. A published skip transcoder's config says skip_connection alone."""
    d, k = 12, 6
    w = {
        "encoder.weight": draw(rng, F, d, scale=d**-0.5, dtype=dtype),
        "encoder.bias": draw(rng, F, scale=0.3, dtype=dtype),
        "W_dec": unit(draw(rng, F, d)).to(dtype),
        "b_dec": draw(rng, d, dtype=dtype),
    } | ({"W_skip": draw(rng, d, d, dtype=dtype)} if transcode else {})
    save_tensors(root / release / path / "sae.safetensors", w)
    body = {"expansion_factor": 2 if expanded else 32, "normalize_decoder": True, "num_latents": 0 if expanded else F, "k": k}
    body |= {"multi_topk": False, "skip_connection": transcode, "d_in": d}
    body |= {"activation": activation} if activation != "topk" else {}
    body |= {"transcode": True} if transcode and says_transcode else {}
    save_settings(root / release / path / "cfg.json", body)
    n = {name: f64(tensor) for name, tensor in w.items()}

    def encode(x: Array) -> tuple[Array, Array]:
        z = x if transcode else x - n["b_dec"]
        pre = np.einsum("td,fd->tf", z, n["encoder.weight"]) + n["encoder.bias"]
        return (groupmax if activation == "groupmax" else topk)(pre, k)

    truth = expected(rng, d, [encode], n["W_dec"][:, None], n["b_dec"][None], skip=[n["W_skip"].T] if transcode else [])
    kind, site_in = ("transcoder", site.replace(".output", ".input")) if transcode else ("sae", site)
    return Written(root, release, path, kind, **truth, sites_in=(site_in,), sites_out=(site,), model_name=None)


def dictionary_learning(root: Path, rng: np.random.Generator, *, dict_class: str, threshold: float = 0.7) -> Written:
    """ae.pt, a plain state dict, and config.json with everything under `trainer`."""
    d, k, release, path = 12, 5, "saes-llama-3.1-8b-instruct", "resid_post_layer_3/trainer_1"
    w_enc, w_dec, b_enc, b_dec = draw(rng, F, d, scale=0.3), unit(draw(rng, F, d)), draw(rng, F, scale=0.3), draw(rng, d)
    thresholds = torch.from_numpy(rng.uniform(0.1, 1, F)).float()
    gate = {"r_mag": draw(rng, F, scale=0.3), "gate_bias": draw(rng, F, scale=0.3), "mag_bias": draw(rng, F, scale=0.3)}
    batch = {"k": torch.tensor(k), "threshold": torch.tensor(threshold)}
    linear = {"encoder.weight": w_enc, "encoder.bias": b_enc, "decoder.weight": w_dec.T.contiguous()}
    matrices = {"W_enc": w_enc.T.contiguous(), "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    state = {
        "AutoEncoder": linear | {"bias": b_dec},
        "AutoEncoderTopK": linear | batch | {"b_dec": b_dec},
        "BatchTopKSAE": linear | batch | {"b_dec": b_dec},
        "MatryoshkaBatchTopKSAE": matrices | batch | {"group_sizes": torch.tensor([8, 16])},
        "JumpReluAutoEncoder": matrices | {"threshold": thresholds},
        "GatedAutoEncoder": {"encoder.weight": w_enc, "decoder.weight": w_dec.T.contiguous(), "decoder_bias": b_dec} | gate,
    }[dict_class]
    save_pickle(root / release / path / "ae.pt", state)
    trainer = {"dict_class": dict_class, "trainer_class": "BatchTopKTrainer", "activation_dim": d, "dict_size": F}
    trainer |= {"k": k} if "TopK" in dict_class else {}
    trainer |= {"layer": 3, "lm_name": "meta-llama/Llama-3.1-8B-Instruct", "submodule_name": "resid_post_layer_3"}
    save_settings(root / release / path / "config.json", {"trainer": trainer, "buffer": {"d_submodule": d, "ctx_len": 1024}})
    enc, scale, gate_bias, mag_bias = f64(w_enc), *(f64(gate[name]) for name in ("r_mag", "gate_bias", "mag_bias"))

    def encode(x: Array) -> tuple[Array, Array]:
        z = x if dict_class == "JumpReluAutoEncoder" else x - f64(b_dec)
        if dict_class == "GatedAutoEncoder":
            return gated(z @ enc.T + gate_bias, np.exp(scale) * (z @ enc.T) + mag_bias)
        pre = z @ enc.T + f64(b_enc)
        if dict_class == "JumpReluAutoEncoder":
            return relu(pre, f64(thresholds))
        if "BatchTopK" in dict_class:  # relu(pre) > threshold: never set, at -1, it lets all of relu(pre) through
            return relu(pre, max(float(batch["threshold"]), 0))
        return relu(pre) if dict_class == "AutoEncoder" else topk(pre, k)

    truth = expected(rng, d, [encode], f64(w_dec)[:, None], f64(b_dec)[None])
    site = ("model.layers.3.output",)
    return Written(root, release, path, "sae", **truth, sites_in=site, sites_out=site, model_name=trainer["lm_name"])


def llama_scope(root: Path, rng: np.random.Generator, *, letter: str, hook: str) -> Written:
    """bfloat16, input scaled by sqrt(d) / average norm, one threshold for all features, in standardised units."""
    d, release, path = 16, f"Llama3_1-8B-Base-LX{letter}-8x", f"Llama3_1-8B-Base-L15{letter}-8x"
    width, norm_in, norm_out, threshold = 8 * d, 9.5, 9.5, 0.53125
    w = {
        "encoder.weight": draw(rng, width, d, scale=d**-0.5, dtype=torch.bfloat16),
        "encoder.bias": draw(rng, width, scale=0.3, dtype=torch.bfloat16),
        "decoder.weight": draw(rng, d, width, dtype=torch.bfloat16),
        "decoder.bias": draw(rng, d, dtype=torch.bfloat16),
    }
    save_tensors(root / release / path / "checkpoints" / "final.safetensors", w)
    body = {"hook_point_in": f"blocks.15.{hook}", "hook_point_out": f"blocks.15.{hook}", "d_model": d, "d_sae": width}
    body |= {"expansion_factor": 8, "jump_relu_threshold": threshold, "dtype": "torch.bfloat16", "act_fn": "jumprelu"}
    body |= {"dataset_average_activation_norm": {"in": norm_in, "out": norm_out}, "norm_activation": "dataset-wise"}
    save_settings(root / release / path / "hyperparams.json", body)
    n, s, s_out = {name: f64(tensor) for name, tensor in w.items()}, np.sqrt(d) / norm_in, np.sqrt(d) / norm_out
    truth = expected(
        rng,
        d,
        [lambda x: relu((s * x) @ n["encoder.weight"].T + n["encoder.bias"], threshold * s)],
        n["decoder.weight"].T[:, None] / s_out,
        n["decoder.bias"][None] / s_out,
    )
    site = (f"blocks.15.{hook}",)
    return Written(root, release, path, "sae", **truth, sites_in=site, sites_out=site, model_name="meta-llama/Llama-3.1-8B")


def llama_scope_r1_distill(root: Path, rng: np.random.Generator) -> Written:
    """config.json beside sae_weights.safetensors; a log-threshold per feature, of the pre-activation of the scaled input."""
    d, norm, release, path = 16, 9.5, "Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L15R"
    width, site = 8 * d, ("blocks.15.hook_resid_post",)
    w = {
        "encoder.weight": draw(rng, width, d, scale=d**-0.5),
        "encoder.bias": draw(rng, width, scale=0.3),
        "decoder.weight": draw(rng, d, width),
        "decoder.bias": draw(rng, d),
        "log_jumprelu_threshold": draw(rng, width, scale=0.3) - 0.5,
    }
    save_tensors(root / release / path / "sae_weights.safetensors", w)
    body = {"sae_type": "sae", "hook_point_in": site[0], "hook_point_out": site[0], "d_model": d, "expansion_factor": 8}
    body |= {
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
    }
    save_settings(root / release / path / "config.json", body)
    n, s = {name: f64(tensor) for name, tensor in w.items()}, np.sqrt(d) / norm
    threshold = np.exp(n["log_jumprelu_threshold"])
    encode = [lambda x: relu((s * x) @ n["encoder.weight"].T + n["encoder.bias"], threshold)]
    truth = expected(rng, d, encode, n["decoder.weight"].T[:, None] / s, n["decoder.bias"][None] / s)
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return Written(root, release, path, "sae", **truth, sites_in=site, sites_out=site, model_name=model)


def qwen_scope(root: Path, rng: np.random.Generator) -> Written:
    """One pickle per layer beside one config for all of them; W_enc (F, d), W_dec (d, F)."""
    d, width, k, release = 16, 1024, 50, "SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"
    layers = [
        {
            "W_enc": draw(rng, width, d, scale=d**-0.5),
            "W_dec": draw(rng, d, width),
            "b_enc": draw(rng, width),
            "b_dec": draw(rng, d),
        }
        for _ in range(3)
    ]
    for i, layer in enumerate(layers):
        save_pickle(root / release / f"layer{i}.sae.pt", layer)
    body = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": d, "d_sae": width, "k": k}
    save_settings(root / release / "config.json", body | {"num_layers": 3, "hook_point": "resid_post", "dtype": "float32"})
    n = {name: f64(tensor) for name, tensor in layers[1].items()}
    encode = [lambda x: topk(np.einsum("td,fd->tf", x, n["W_enc"]) + n["b_enc"], k)]
    truth = expected(rng, d, encode, n["W_dec"].T[:, None], n["b_dec"][None])
    site = ("model.layers.1.output",)
    return Written(root, release, "layer1", "sae", **truth, sites_in=site, sites_out=site, model_name=body["base_model"])


def goodfire(root: Path, rng: np.random.Generator, *, release: str, suffix: str, layer: int, model: str) -> Written:
    """One pickle, two linear layers, ReLU."""
    d = 16
    w = {
        "encoder_linear.weight": draw(rng, F, d, scale=0.3),
        "encoder_linear.bias": draw(rng, F, scale=0.3),
        "decoder_linear.weight": draw(rng, d, F),
        "decoder_linear.bias": draw(rng, d),
    }
    save_pickle(root / release / f"{release}{suffix}", w)
    n = {name.removesuffix("ht").replace("_linear.weig", "").replace("_linear.", "_"): f64(t) for name, t in w.items()}
    encode = [lambda x: relu(x @ n["encoder"].T + n["encoder_bias"])]
    truth = expected(rng, d, encode, n["decoder"].T[:, None], n["decoder_bias"][None])
    site = (f"model.layers.{layer}.output",)
    return Written(root, release, "", "sae", **truth, sites_in=site, sites_out=site, model_name=model)


def openai_gpt2(root: Path, rng: np.random.Generator, *, location: str, site: str, version: str) -> Written:
    """v5: the input layer-normalised, TopK 32 then ReLU, undone on output. v1: plain ReLU. pre_bias comes off first."""
    d, width, k, release = 16, 128, 32, "gpt2-small"
    folder = location + version
    w: dict[str, object] = {
        "pre_bias": draw(rng, d),
        "latent_bias": draw(rng, width, scale=0.3),
        "encoder.weight": draw(rng, width, d, scale=0.3),
        "decoder.weight": draw(rng, d, width),
    }
    n = {name: f64(tensor) for name, tensor in w.items() if isinstance(tensor, torch.Tensor)}
    v5 = version.startswith("_v5")
    w |= {"stats_last_nonzero": torch.zeros(width, dtype=torch.long), "activation": "TopK" if v5 else "ReLU"}
    w |= {"activation_state_dict": {"k": k, "postact_fn": "ReLU"} if v5 else {}}
    for layer in (7, 8):
        other = {"pre_bias": draw(rng, d)} if layer == 7 else {}
        save_pickle(root / release / folder / "autoencoders" / f"{layer}.pt", w | other)

    def encode(x: Array) -> tuple[Array, Array]:
        z = (layer_normed(x) if v5 else x) - n["pre_bias"]
        pre = z @ n["encoder.weight"].T + n["latent_bias"]
        return topk(pre, k) if v5 else relu(pre)

    rows, bias = n["decoder.weight"].T[:, None], n["pre_bias"][None]
    truth = expected(rng, d, [encode], rows, bias, restore=layer_unnormed if v5 else None)
    path = f"{folder}/autoencoders/8"
    return Written(root, release, path, "sae", **truth, sites_in=(site,), sites_out=(site,), model_name="gpt2")
