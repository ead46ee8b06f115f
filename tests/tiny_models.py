"""Tiny subject models with random weights, from transformers' own classes, and a byte-level tokenizer for them.

Every weight is random, norm gains and biases included, so that leaving one out changes what is captured. Three layers,
32 wide; attention is 64 wide where the architecture lets it differ. Ids under 256 are ordinary tokens in all of them.
"""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

VOCABULARY = 300
WINDOW = 4
LAYERS = 3
D_MODEL = 32

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
RMS_EPSILON = 0.05  # large enough to be missed
_RMS_SIZES = _SIZES | {"rms_norm_eps": RMS_EPSILON}
_GEMMA = _RMS_SIZES | {
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]


def tiny_gemma2(seed: int = 0) -> PreTrainedModel:
    config = Gemma2Config(**_GEMMA, layer_types=_LOCAL_AND_GLOBAL, attn_logit_softcapping=2.0)
    return _randomised(Gemma2ForCausalLM._from_config(config, attn_implementation="eager"), seed)


def tiny_gemma3(seed: int = 0) -> PreTrainedModel:
    return _randomised(Gemma3ForCausalLM(_gemma3_text()), seed)


def tiny_gemma3_with_vision(seed: int = 0) -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Gemma3Config(
        text_config=_gemma3_text(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=297,
        boi_token_index=298,
        eoi_token_index=299,
    )
    return _randomised(Gemma3ForConditionalGeneration(config), seed)


def _gemma3_text() -> Gemma3TextConfig:
    return Gemma3TextConfig(**_GEMMA, layer_types=_LOCAL_AND_GLOBAL)


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    return _randomised(LlamaForCausalLM(LlamaConfig(**_RMS_SIZES)), seed)


def tiny_qwen2(seed: int = 0) -> PreTrainedModel:
    sizes = {name: size for name, size in _RMS_SIZES.items() if name != "head_dim"}
    return _randomised(Qwen2ForCausalLM(Qwen2Config(**sizes)), seed)


def tiny_qwen3(seed: int = 0) -> PreTrainedModel:
    return _randomised(Qwen3ForCausalLM(Qwen3Config(**_RMS_SIZES)), seed)


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    return _randomised(GPT2LMHeadModel(config), seed)


def tiny_neox(seed: int = 0, *, parallel: bool = True) -> PreTrainedModel:
    sizes = {name: size for name, size in _SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
    return _randomised(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, use_parallel_residual=parallel)), seed)


TINY_MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "gemma3-vision": tiny_gemma3_with_vision,
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
}


def _randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # A norm's gain and a bias stay near what they start from; a matrix roughly keeps the size of what it multiplies.
        parameter.data = parameter.data + 0.3 * noise if parameter.ndim == 1 else 0.2 * noise
    return model.eval().requires_grad_(False)


def tiny_tokenizer(
    *, bos: str | None = None, eos: str = "<|endoftext|>", chat_template: str | None = None, added: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then the special tokens: eos, bos if there is one, and those `added`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, additional_special_tokens=list(added)
    )
    tokenizer.chat_template = chat_template
    return tokenizer
