"""A tiny subject model in float64 with a random SAE, transcoder, crosscoder or CLT, opened without a store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.dictionaries.sparse import Activation, InputNorm, Kind, LayerWeights, SparseDictionary
from scopeatlas.storage.store import Store
from scopeatlas.study.opening import OpenSae
from scopeatlas.subject.capture import capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import parse_hook_point
from tests.tiny_models import TINY_MODELS, tiny_tokenizer

WIDTH, L0 = 40, 8
PROMPT = "A river runs."
SITES = {
    "sae": (("model.layers.1.output",), ("model.layers.1.output",)),
    "transcoder": (("model.layers.1.mlp.input",), ("model.layers.1.post_feedforward_layernorm.output",)),
    "crosscoder": (("model.layers.0.output", "model.layers.1.output"),) * 2,
    "clt": (
        ("model.layers.0.mlp.input", "model.layers.1.mlp.input"),
        ("model.layers.0.post_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output"),
    ),
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_subject(rng: np.random.Generator, *, architecture: str = "gemma3") -> SubjectModel:
    """Its tokenizer has a token a byte, BOS, and CHATML's two special tokens."""
    subject = SubjectModel("tiny", device="cpu")
    tokenizer = tiny_tokenizer(bos="<s>", chat_template=CHATML, added=("<|im_start|>", "<|im_end|>"))
    vars(subject)["model"] = TINY_MODELS[architecture](int(rng.integers(1 << 30))).double()
    vars(subject)["tokenizer"] = tokenizer
    return subject


def tiny_dictionary(
    subject: SubjectModel,
    rng: np.random.Generator,
    *,
    kind: Kind = "sae",
    norm: InputNorm = "none",
    function: str = "jumprelu",
) -> SparseDictionary:
    """Random directions, about L0 of a layer's WIDTH features firing on a token, decoder rows about as long as activations."""
    inside, outside = (tuple(parse_hook_point(text) for text in side) for side in SITES[kind])
    tokens = torch.from_numpy(rng.integers(0, 256, (4, 40)))
    seen = capture(subject.model, tokens, {*inside, *outside})
    size = len(outside) if kind in ("crosscoder", "clt") else 1
    layers = []
    for position, site in enumerate(inside):
        x = seen[site].flatten(0, 1).float()
        w_enc = torch.from_numpy(rng.standard_normal((x.shape[1], WIDTH))).float() / x.shape[1] ** 0.5
        if norm == "token_norm":
            x = x / x.square().mean(1, keepdim=True).sqrt()
        if norm == "layer_norm":
            x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        pre = x @ w_enc
        first = position if kind == "clt" else 0
        spread = float(seen[outside[0]].std())
        w_dec = torch.from_numpy(rng.standard_normal((WIDTH, size - first, x.shape[1]))).float() * spread * 0.1 / float(pre.std())
        threshold = pre.quantile(1 - L0 / WIDTH, dim=0).clamp(min=1e-3)
        layers.append(LayerWeights(w_enc, torch.zeros(WIDTH), w_dec, threshold, first_output=first))
    b_dec = torch.from_numpy(rng.standard_normal((size, layers[0].w_dec.shape[2]))).float()
    activation = Activation(function, k=L0 if function == "topk" else None)  # type: ignore[arg-type]
    return SparseDictionary(kind, inside, outside, "", tuple(layers), b_dec, activation, norm=norm)


def tiny_opened(rng: np.random.Generator, *, architecture: str = "gemma3", **dictionary: str) -> OpenSae:
    """Opened by hand; `max_activation` of feature i is i / 10 + 1, and feature 0 has never fired."""
    subject = tiny_subject(rng, architecture=architecture)
    made = tiny_dictionary(subject, rng, **dictionary)  # type: ignore[arg-type]
    features = list(range(made.width))
    names = [f"{made.place(i)[0]}.{made.place(i)[1]}" if made.is_multi_layer else str(i) for i in features]
    rows = pl.DataFrame(
        {
            "feature": features,
            "key": [f"toy/{name}" for name in names],
            "kind": made.kind,
            "label": [f"label {i}" if i % 2 else "" for i in features],
            "status": ["ok" if i % 2 else "incoherent" for i in features],
            "trigger_tokens": [["a"]] * len(features),
            "f1": [0.5 if i % 2 else None for i in features],
            "max_activation": [0.0, *(i / 10 + 1 for i in features[1:])],
        }
    )
    opened = OpenSae(Store(Path("nowhere")), "toy", "corpus", SaeEntry.__new__(SaeEntry), subject, rows)
    vars(opened)["dictionary"] = made
    return opened


def with_rows(opened: OpenSae, **columns: pl.Series) -> OpenSae:
    """The same with other values in its rows."""
    other = replace(opened, rows=opened.rows.with_columns(**columns))
    vars(other)["dictionary"] = opened.dictionary
    return other
