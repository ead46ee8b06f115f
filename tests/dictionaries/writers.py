"""The table of test releases: one writer per family, kind and variant.

What belongs here: which cases there are. What does not: how they are written (`writers_*.py`, `writing.py`).
"""

from functools import partial

import torch

from tests.dictionaries.writers_gemma import (
    circuit_tracer_clt,
    circuit_tracer_plt,
    gemma_scope_1,
    gemma_scope_2,
    gemma_scope_2_multilayer,
)
from tests.dictionaries.writers_others import (
    dictionary_learning,
    goodfire,
    llama_scope,
    llama_scope_r1_distill,
    openai_gpt2,
    qwen_scope,
    saelens,
    sparsify,
)
from tests.dictionaries.writing import Writer

_TRANSCODER_HOOK = "blocks.8.ln2.hook_normalized"
_BF16 = torch.bfloat16

WRITERS: dict[str, Writer] = {
    **{f"gemma_scope_1-{what}": partial(gemma_scope_1, what=what) for what in ("res", "mlp", "att", "transcoders", "embedding")},
    "gemma_scope_1-9b_it": partial(gemma_scope_1, what="res", release="gemma-scope-9b-it-res", model="google/gemma-2-9b-it"),
    **{
        f"gemma_scope_2-{path.split('/')[0]}{name}": partial(gemma_scope_2, path=path, l0=l0)
        for name, path, l0 in (
            ("", "resid_post/layer_12_width_16k_l0_medium", 60),
            ("", "attn_out/layer_5_width_16k_l0_small", 18),
            ("", "mlp_out/layer_9_width_16k_l0_big", 150),
            ("", "transcoder/layer_15_width_16k_l0_small", 20),
            ("", "resid_post_all/layer_3_width_16k_l0_big", 90),
            ("_affine", "transcoder/layer_9_width_16k_l0_medium_affine", 60),
            ("_affine", "transcoder_all/layer_17_width_16k_l0_small_affine", 20),
            ("_seed_1", "resid_post/layer_12_width_16k_l0_medium_seed_1", 60),
        )
    },
    "gemma_scope_2-no_config": partial(gemma_scope_2, path="transcoder_all/layer_3_width_16k_l0_big_affine", l0=90, config=None),
    "gemma_scope_2-no_config_it": partial(
        gemma_scope_2,
        path="attn_out/layer_7_width_16k_l0_medium",
        release="gemma-scope-2-1b-it",
        model="google/gemma-3-1b-it",
        l0=54,
        config=None,
    ),
    "gemma_scope_2-no_prefix": partial(gemma_scope_2, config={"model_name": "gemma-3-270m"}),
    "gemma_scope_2-270m_pt": partial(gemma_scope_2, config={"model_name": "google/gemma-3-270m-pt"}),
    "gemma_scope_2-v3": partial(
        gemma_scope_2,
        path="resid_post/layer_17_width_16k_l0_big",
        release="gemma-scope-2-4b-pt",
        model="google/gemma-3-4b-pt",
        l0=150,
        config={"model_name": "gemma-v3-4b-pt"},
    ),
    "gemma_scope_2-float16": partial(gemma_scope_2, dtype=torch.float16),
    "gemma_scope_2-crosscoder": partial(gemma_scope_2_multilayer, path="crosscoder/layer_5_9_12_15_width_65k_l0_medium"),
    "gemma_scope_2-crosscoder_seed_1": partial(
        gemma_scope_2_multilayer,
        path="crosscoder/layer_7_13_17_22_width_262k_l0_medium_seed_1",
        release="gemma-scope-2-1b-it",
        model="google/gemma-3-1b-it",
    ),
    "gemma_scope_2-crosscoder_no_config": partial(
        gemma_scope_2_multilayer, path="crosscoder/layer_5_9_12_15_width_1m_l0_big", l0=150, config=None
    ),
    "gemma_scope_2-clt": partial(gemma_scope_2_multilayer, path="clt/width_262k_l0_big", l0=150),
    "gemma_scope_2-clt_affine": partial(gemma_scope_2_multilayer, path="clt/width_262k_l0_medium_affine"),
    "gemma_scope_2-clt_no_config": partial(gemma_scope_2_multilayer, path="clt/width_262k_l0_medium", config=None),
    **{
        f"saelens-{architecture}": partial(saelens, architecture=architecture)
        for architecture in ("standard", "gated", "topk", "abstopk", "jumprelu")
    },
    **{
        f"saelens-{architecture}": partial(saelens, architecture=architecture, hook=_TRANSCODER_HOOK)
        for architecture in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    },
    "saelens-hf_hook_name": partial(saelens, architecture="jumprelu_transcoder", hook="blocks.8.hook_mlp_in", hugging_face=True),
    **{
        f"saelens-{architecture}-{normalise}": partial(saelens, architecture=architecture, normalise=normalise)
        for architecture in ("standard", "gated", "topk", "jumprelu")
        for normalise in ("constant_norm_rescale", "layer_norm")
    },
    "saelens-topk-rescaled": partial(saelens, architecture="topk", rescale=True),
    "saelens-abstopk-rescaled": partial(saelens, architecture="abstopk", rescale=True),
    "saelens-topk-rescaled-layer_norm": partial(saelens, architecture="topk", rescale=True, normalise="layer_norm"),
    "saelens-expected_average_only_in": partial(saelens, normalise="expected_average_only_in"),
    "saelens-b_dec_kept": partial(saelens, architecture="jumprelu", subtract=False),
    "saelens-bf16": partial(saelens, architecture="jumprelu", dtype=_BF16),
    "saelens-hook_z": partial(saelens, hook="blocks.8.attn.hook_z"),
    "saelens-old": partial(saelens, old=True, normalise=False),
    "saelens-old-topk": partial(saelens, architecture="topk", old=True),
    "saelens-old-jumprelu": partial(saelens, architecture="jumprelu", old=True, subtract=False),
    "saelens-old-hook_z": partial(saelens, old=True, hook="blocks.8.attn.hook_z"),
    "sparsify-sae": partial(sparsify),
    "sparsify-expansion_factor": partial(sparsify, expanded=True, path="layers.0.mlp", site="model.layers.0.mlp.output"),
    "sparsify-embed_tokens": partial(sparsify, path="embed_tokens", site="model.embed_tokens.output"),
    "sparsify-groupmax": partial(sparsify, activation="groupmax"),
    "sparsify-bf16": partial(sparsify, dtype=_BF16),
    "sparsify-skip_transcoder": partial(
        sparsify,
        release="skip-transcoder-Llama-3.2-1B-131k",
        path="layers.5.mlp",
        site="model.layers.5.mlp.output",
        transcode=True,
    ),
    "sparsify-skip_transcoder-unsaid": partial(
        sparsify,
        release="Llama-3.2-1B-131k-skip",
        path="layers.5.mlp",
        site="model.layers.5.mlp.output",
        transcode=True,
        says_transcode=False,
    ),
    **{
        f"dictionary_learning-{dict_class}": partial(dictionary_learning, dict_class=dict_class)
        for dict_class in (
            "AutoEncoder",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
            "GatedAutoEncoder",
        )
    },
    "dictionary_learning-BatchTopKSAE-unset": partial(dictionary_learning, dict_class="BatchTopKSAE", threshold=-1.0),
    "llama_scope-R": partial(llama_scope, letter="R", hook="hook_resid_post"),
    "llama_scope-M": partial(llama_scope, letter="M", hook="hook_mlp_out"),
    "llama_scope-A": partial(llama_scope, letter="A", hook="hook_attn_out"),
    "llama_scope-r1_distill": llama_scope_r1_distill,
    "qwen_scope": qwen_scope,
    "goodfire-8b": partial(
        goodfire,
        release="Llama-3.1-8B-Instruct-SAE-l19",
        suffix=".pth",
        layer=19,
        model="meta-llama/Llama-3.1-8B-Instruct",
    ),
    "goodfire-70b": partial(
        goodfire,
        release="Llama-3.3-70B-Instruct-SAE-l50",
        suffix=".pt",
        layer=50,
        model="meta-llama/Llama-3.3-70B-Instruct",
    ),
    "openai_gpt2-v5": partial(openai_gpt2, location="resid_post_mlp", site="blocks.8.hook_resid_post", version="_v5_32k"),
    "openai_gpt2-v5_attn": partial(openai_gpt2, location="resid_post_attn", site="blocks.8.hook_resid_mid", version="_v5_128k"),
    "openai_gpt2-v1": partial(openai_gpt2, location="mlp_post_act", site="blocks.8.mlp.hook_post", version=""),
    "openai_gpt2-v4": partial(openai_gpt2, location="resid_delta_mlp", site="blocks.8.hook_mlp_out", version="_v4"),
    "circuit_tracer-plt": circuit_tracer_plt,
    "circuit_tracer-plt_jumprelu": partial(circuit_tracer_plt, activation="jumprelu"),
    "circuit_tracer-plt_topk": partial(circuit_tracer_plt, activation="topk"),
    "circuit_tracer-plt_skip": partial(circuit_tracer_plt, skip=True),
    "circuit_tracer-clt": circuit_tracer_clt,
    "circuit_tracer-clt_jumprelu": partial(circuit_tracer_clt, jumprelu=True),
}
"""One writer per family, kind and variant: (folder to hold the release, random numbers) -> what was written."""
