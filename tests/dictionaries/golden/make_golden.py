"""Writes the golden SAEs in this folder: tiny releases saved by SAELens and dictionary_learning themselves, with what
those libraries compute from them. Neither library is a dependency of Scope Atlas; to make the files again:

    python -m venv oracle && oracle/bin/pip install "torch==2.13.0"
    oracle/bin/pip install "sae-lens==6.54.12"
    oracle/bin/pip install --no-deps "dictionary-learning==0.1.0" && oracle/bin/pip install zstandard
    PYTHONHASHSEED=0 oracle/bin/python tests/dictionaries/golden/make_golden.py

Each folder LIBRARY/CASE holds a release's files and expected.safetensors: x [24, 16], acts [24, 32] (dense feature
activations), y [24, 16] (the reconstruction; [24, 12] for transcoders), all float32. Tensors of SAEs on hook_z, which
SAELens reads as [token, head, d_head], are flattened.
"""
# The oracles live in an environment of their own:
# pyright: reportMissingImports=false

import json
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from dictionary_learning.trainers.trainer import SAETrainer
    from sae_lens import SAE

HERE = Path(__file__).parent
D_IN, D_OUT, FEATURES, TOKENS, K = 16, 12, 32, 24, 5
LOUD_TOKENS, LOUDNESS = [3, 11, 17], 30
"""Some tokens have far larger norms than others, as in language models: what a normalisation is for."""

RESIDUAL = {"model_name": "gemma-3-270m", "hook_name": "blocks.1.hook_resid_post", "prepend_bos": True, "context_size": 1024}
ATTENTION = RESIDUAL | {"hook_name": "blocks.1.attn.hook_z"}
MLP = RESIDUAL | {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}

SAELENS_CASES = {
    "standard": {},
    "standard_no_b_dec": {"apply_b_dec_to_input": False},
    "standard_expected_average_only_in": {"normalize_activations": "expected_average_only_in"},
    "standard_constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "standard_layer_norm": {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
    "standard_hook_z": {"reshape_activations": "hook_z", "metadata": ATTENTION},
    "gated": {},
    "gated_layer_norm": {"normalize_activations": "layer_norm"},
    "topk": {"k": K},
    "topk_rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk_rescaled_constant_norm_rescale": {
        "k": K,
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": False,
        "normalize_activations": "constant_norm_rescale",
    },
    "abstopk": {"k": K},
    "abstopk_rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "jumprelu_layer_norm": {"normalize_activations": "layer_norm"},
    "jumprelu_no_b_dec": {"apply_b_dec_to_input": False},
    "transcoder": {"d_out": D_OUT},
    "skip_transcoder": {"d_out": D_OUT},
    "jumprelu_transcoder": {"d_out": D_OUT},
    "jumprelu_skip_transcoder": {"d_out": D_OUT},
}
"""The longest architecture that a name begins with, and the settings that differ from SAELens' defaults."""

OLD_CONFIG = {
    "d_in": D_IN,
    "d_sae": FEATURES,
    "dtype": "torch.float32",
    "device": "cpu",
    "model_name": "gemma-3-270m",
    "hook_layer": 1,
}
PRE_6_0_CASES = {
    # Says as little as may be: every default of the old schema shows. Its weights hold a scaling factor of ones.
    "pre_6_0_minimal": ("standard", {"hook_point": "blocks.1.hook_resid_post", "hook_point_head_index": None}),
    # activation_fn wins over architecture, and normalize_activations was a flag.
    "pre_6_0_topk": (
        "topk",
        {
            "architecture": "standard",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
            "apply_b_dec_to_input": False,
            "normalize_activations": False,
            "finetuning_scaling_factor": False,
            "hook_name": "blocks.1.hook_resid_post",
            "sae_lens_training_version": "3.20.0",
        },
    ),
    # hook_z in the hook's name means flattening, and True means expected_average_only_in.
    "pre_6_0_hook_z": (
        "standard",
        {
            "architecture": "standard",
            "normalize_activations": True,
            "hook_name": "blocks.1.attn.hook_z",
            "sae_lens_version": "5.10.3",
        },
    ),
}


def random_input() -> torch.Tensor:
    x = torch.randn(TOKENS, D_IN) + 0.5
    x[LOUD_TOKENS] *= LOUDNESS
    return x


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Fill every parameter, the biases too; decoders get norms from 0.5 to 2, and encoders are not their transposes."""
    draws = {
        "bias": lambda p: torch.randn_like(p) * 0.3,
        "threshold": lambda p: torch.rand_like(p) + 0.1,
        "W_dec": lambda p: torch.randn_like(p) / 4 * (0.5 + 1.5 * torch.rand(len(p), 1)),
        "decoder.weight": lambda p: torch.randn_like(p) / 4 * (0.5 + 1.5 * torch.rand(p.shape[1])),
    }
    for name, parameter in module.named_parameters():
        draw = draws.get(name) or (draws["bias"] if parameter.ndim == 1 else lambda p: torch.randn_like(p) / 4)
        parameter.copy_(draw(parameter))


@torch.no_grad()
def write_expected(
    folder: Path, encode: Callable[[torch.Tensor], torch.Tensor], forward: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """What the library computes on an input for which no feature's firing hangs on float32's rounding."""
    while True:
        x = random_input()
        acts = encode(x)
        nudged = (encode(x + x.abs() * 3e-5 * torch.randn_like(x)) for _ in range(20))
        if all(torch.equal(acts != 0, other != 0) for other in nudged):
            break
    fired = (acts != 0).sum(dim=1)
    print(f"{folder.relative_to(HERE)}: {fired.float().mean():.1f} of {FEATURES} features fire per token")
    assert 0 < fired.min() and fired.max() < FEATURES
    save_file({"x": x, "acts": acts.contiguous(), "y": forward(x).contiguous()}, folder / "expected.safetensors")


def write_saelens_expected(folder: Path) -> None:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    heads = (lambda x: x.reshape(TOKENS, 4, -1)) if sae.cfg.reshape_activations == "hook_z" else (lambda x: x)
    write_expected(folder, lambda x: sae.encode(heads(x)), lambda x: sae(heads(x)).reshape(TOKENS, -1))


def random_saelens(architecture: str, settings: dict) -> "SAE":
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    if "transcoder" in architecture:  # SAELens refuses its own default for these
        settings = {"apply_b_dec_to_input": False, "metadata": MLP} | settings
    settings = settings | {"metadata": SAEMetadata(**settings.get("metadata", RESIDUAL))}
    sae = sae_class(config_class(d_in=D_IN, d_sae=FEATURES, **settings))
    randomise(sae)
    return sae


def make_saelens(root: Path) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    for case, settings in SAELENS_CASES.items():
        torch.manual_seed(zlib.crc32(case.encode()))
        architecture = max((name for name in SAE_CLASS_REGISTRY if case.startswith(name)), key=len)
        random_saelens(architecture, settings).save_model(root / case)
        write_saelens_expected(root / case)
    make_batch_topk(root / "batchtopk_as_jumprelu")
    for case, (architecture, config) in PRE_6_0_CASES.items():
        torch.manual_seed(zlib.crc32(case.encode()))
        random_saelens(architecture, {"k": K} if architecture == "topk" else {}).save_model(root / case)
        (root / case / "cfg.json").write_text(json.dumps(OLD_CONFIG | config), encoding="utf-8")
        if case == "pre_6_0_minimal":
            weights = root / case / "sae_weights.safetensors"
            save_file(load_file(weights) | {"scaling_factor": torch.ones(FEATURES)}, weights)
        write_saelens_expected(root / case)


def make_batch_topk(folder: Path) -> None:
    """Batch top-k exists in training only: what is saved for inference is a JumpReLU SAE with folded decoder norms."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(zlib.crc32(folder.name.encode()))
    config = BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=FEATURES, k=K, rescale_acts_by_decoder_norm=True, metadata=SAEMetadata(**RESIDUAL)
    )
    sae = BatchTopKTrainingSAE(config)
    randomise(sae)
    sae.topk_threshold.fill_(0.7)
    sae.save_inference_model(folder)
    write_saelens_expected(folder)


def import_dictionary_learning() -> None:
    """dictionary_learning imports nnsight (which wants an older transformers) for a buffer that is not used here."""
    nnsight = types.ModuleType("nnsight")
    nnsight.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["nnsight"] = nnsight


def make_dictionary_learning(root: Path) -> None:
    import_dictionary_learning()
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    top_k = {"k": K}
    groups = {"k": K, "group_fractions": [0.25, 0.25, 0.5]}
    cases = {
        "auto_encoder": (StandardTrainer, {}, None),
        "auto_encoder_april_update": (StandardTrainerAprilUpdate, {}, None),
        "auto_encoder_top_k": (TopKTrainer, top_k, 0.7),
        "batch_top_k": (BatchTopKTrainer, top_k, 0.7),
        "batch_top_k_no_threshold": (BatchTopKTrainer, top_k, -1.0),
        "matryoshka_batch_top_k": (MatryoshkaBatchTopKTrainer, groups, 0.7),
        "jump_relu": (JumpReluTrainer, {}, None),
        "gated": (GatedSAETrainer, {}, None),
    }
    for case, (trainer_class, settings, threshold) in cases.items():
        torch.manual_seed(zlib.crc32(case.encode()))
        trainer = trainer_class(
            steps=10_000,
            activation_dim=D_IN,
            dict_size=FEATURES,
            layer=1,
            lm_name="google/gemma-3-270m",
            submodule_name="resid_post_layer_1",
            device="cpu",
            **settings,
        )
        randomise(trainer.ae)
        if trainer_class is StandardTrainer:  # which keeps decoder columns at unit norm
            trainer.ae.decoder.weight.data /= trainer.ae.decoder.weight.data.norm(dim=0)
        if threshold is not None:
            trainer.ae.threshold.fill_(threshold)
        save_trained(root / case, trainer)


def save_trained(folder: Path, trainer: "SAETrainer") -> None:
    """What `train_sae` of dictionary_learning leaves of a trainer, loaded again by `load_dictionary`."""
    from dictionary_learning.utils import load_dictionary

    folder.mkdir(parents=True, exist_ok=True)
    buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 244, "ctx_len": 1024, "refresh_batch_size": 4}
    buffer |= {"out_batch_size": 2048, "device": "cpu"}
    text = json.dumps({"trainer": trainer.config, "buffer": buffer}, indent=4)
    (folder / "config.json").write_text(text, encoding="utf-8")
    torch.save({name: tensor.cpu() for name, tensor in trainer.ae.state_dict().items()}, folder / "ae.pt")
    loaded, _ = load_dictionary(str(folder), device="cpu")
    write_expected(folder, loaded.encode, loaded)


if __name__ == "__main__":
    make_saelens(HERE / "saelens")
    make_dictionary_learning(HERE / "dictionary_learning")
