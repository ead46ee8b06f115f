"""More like this: decoder rows against float64, co-activation against what the examples stage counted."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from scopeatlas.api import open_atlas
from scopeatlas.atlas.embedding import Embedder
from scopeatlas.atlas.hits import Why
from scopeatlas.atlas.stage import index_features
from scopeatlas.atlas.tables import FEATURE_ROW
from scopeatlas.dictionaries.sparse import Activation, LayerWeights, SparseDictionary
from scopeatlas.errors import AtlasError, NotReadyError
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.storage.store import Store
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.similar import by_decoder, by_vector
from scopeatlas.subject.sites import parse_hook_point
from tests.conftest import Stored

D, F = 12, 30


def made(rng: np.random.Generator, key: str = "toy", *, layers: int = 1, d_out: int = D, site: str = "output") -> OpenSae:
    """An SAE of random decoder rows, of one layer, or a CLT of several."""
    sites = tuple(parse_hook_point(f"model.layers.{i}.{site}") for i in range(layers))

    def rows(first: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(F, layers - first, d_out))).to(torch.bfloat16)

    weights = [LayerWeights(torch.zeros(D, F), torch.zeros(F), rows(i), first_output=i) for i in range(layers)]
    dictionary = SparseDictionary(
        "sae" if layers == 1 else "clt", sites, sites, "toy", weights, torch.zeros(layers, d_out), Activation("relu")
    )
    empty = {name: [] if isinstance(dtype, pl.List) else None for name, dtype in FEATURE_ROW.items()}
    keys = [{"feature": n, "key": f"{key}/{n}"} for n in range(F * layers)]
    table = pl.DataFrame([empty | row for row in keys], schema=FEATURE_ROW)
    config = SimpleNamespace(model_type="toy", num_hidden_layers=4)
    subject = SimpleNamespace(name=f"toy-{d_out}", d_model=d_out, config=config)
    opened = OpenSae(None, key, "c", None, subject, table)  # type: ignore[arg-type]  # no question here needs more of them
    vars(opened)["dictionary"] = dictionary
    return opened


def cosines(opened: OpenSae, vector: np.ndarray) -> np.ndarray:
    """In float64, over all outputs together."""
    layers = opened.dictionary.layers
    rows = np.concatenate([layer.rows(slice(None)).double().flatten(1).numpy() for layer in layers])
    return rows @ vector.ravel() / np.linalg.norm(rows, axis=1) / np.linalg.norm(vector)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_vector_finds_the_rows_of_the_highest_cosine(rng, layers):
    opened = made(rng, layers=layers)
    vector = rng.normal(size=(layers, D) if layers > 1 else D)
    found = by_vector(opened, vector, k=7, offset=0)
    expected = cosines(opened, vector)
    order = np.argsort(-expected)[:7]
    assert [hit.feature for hit in found] == order.tolist() and found.by == "decoder"
    assert [(hit.why or Why({})).places["decoder"].value for hit in found] == pytest.approx(expected[order], abs=1e-5)
    assert [(hit.why or Why({})).places["decoder"].rank for hit in found] == list(range(1, 8))


def test_pages_of_a_vector_are_disjoint_and_together_one(rng):
    opened, vector = made(rng), rng.normal(size=D)
    whole = [hit.feature for hit in by_vector(opened, vector, k=F, offset=0)]
    pages = [by_vector(opened, vector, k=8, offset=offset) for offset in range(0, 32, 8)]
    assert [hit.feature for page in pages for hit in page] == whole and sorted(whole) == list(range(F))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_feature_is_not_like_itself(rng, layers):
    opened = made(rng, layers=layers)
    feature = F * layers - 3
    rows = np.concatenate([layer.rows(slice(None)).double().numpy() for layer in opened.dictionary.layers])
    expected = cosines(opened, rows[feature])
    order = [n for n in np.argsort(-expected) if n != feature][:5]
    found = by_decoder(opened, feature, within=opened, k=5, offset=0)
    assert [hit.feature for hit in found] == order and found.query == f"toy/{feature}"


def test_decoders_of_two_saes_are_compared(rng):
    one, two = made(rng), made(rng, "other")
    row = one.dictionary.layers[0].rows(4).double().numpy()
    found = by_decoder(one, 4, within=two, k=3, offset=0)
    assert [hit.key for hit in found] == [f"other/{n}" for n in np.argsort(-cosines(two, row))[:3]]


def test_what_does_not_compare_is_refused(rng):
    one = made(rng)
    with pytest.raises(AtlasError, match="toy and other do not compare: .* models of different shape"):
        by_decoder(one, 4, within=made(rng, "other", d_out=D + 1), k=3, offset=0)
    with pytest.raises(AtlasError, match=r"do not compare: one writes .*output, the other .*mlp\.output"):
        by_decoder(one, 4, within=made(rng, "other", site="mlp.output"), k=3, offset=0)
    with pytest.raises(AtlasError, match="k of 1 or more"):
        by_vector(one, np.ones(D), k=0, offset=0)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.zeros(D), "is zero"),
        (np.full(D, np.nan), "is not finite"),
        ([np.inf] * D, "is not finite"),
        (np.ones(D + 1), rf"of shape \[1, {D + 1}\], but the rows of toy of \[1, {D}\]"),
        (np.ones((2, D)), "of shape"),
        (np.ones((1, 1, D)), "of shape"),
        (["a"] * D, "real numbers"),
        ([[1.0], [1.0, 2.0]], "real numbers"),
        (np.ones(D) * 1j, "real numbers"),
    ],
)
def test_a_vector_that_is_none_is_refused_for_what_it_is(rng, vector, message):
    with pytest.raises(AtlasError, match=message):
        by_vector(made(rng), vector, k=3, offset=0)


@pytest.mark.parametrize("scale", [1, 1e-20, 1e20])
def test_a_vector_may_be_a_list_an_array_or_a_tensor_of_any_size(rng, scale):
    opened, vector = made(rng), torch.from_numpy(rng.integers(-8, 9, D) + 0.5)  # exact in bfloat16
    expected = np.sort(cosines(opened, vector.numpy()))[::-1][:3]
    scaled = vector * scale
    for given in (scaled, scaled.float(), scaled.tolist(), scaled.numpy(), torch.nn.Parameter(scaled)):
        found = by_vector(opened, given, k=3, offset=0)
        assert [(hit.why or Why({})).places["decoder"].value for hit in found] == pytest.approx(expected, abs=1e-5)
    found = by_vector(opened, vector.bfloat16(), k=3, offset=0)
    assert [(hit.why or Why({})).places["decoder"].value for hit in found] == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def published(small: Stored, subject, tmp_path_factory):
    """A small SAE on real articles, published; copied, since other tests share the store."""
    root = tmp_path_factory.mktemp("similar") / "store"
    shutil.copytree(small.store.root, root)
    stored = replace(small, store=Store(root))
    there = stored.store, stored.corpus, stored.entry, subject
    stored.store.register(stored.entry.key, stored.entry.as_json())
    examples = mine_examples(*there)[0]
    label_features(*there, settings=LabelSettings())
    score_labels(*there, labels=LabelSettings(), settings=ScoreSettings())
    index_features(*there, embedder=Embedder(), labels=LabelSettings(), scores=ScoreSettings())
    return open_atlas(root, subject=subject), stored, pl.read_parquet(examples.partners)


@pytest.mark.slow
def test_an_atlas_answers_by_decoder_and_by_coactivation(published):
    atlas, stored, partners = published
    key = stored.entry.key
    feature = int(partners["feature"][0])
    likest = partners.filter(pl.col("feature") == feature, pl.col("jaccard_rank").is_not_null()).sort("jaccard_rank")
    found = atlas.similar(key, feature, by="coactivation")
    assert [hit.feature for hit in found] == likest["partner"].to_list()
    assert [(hit.why or Why({})).places["coactivation"].value for hit in found] == pytest.approx(likest["jaccard"].to_list())
    row = atlas.open(key).dictionary.layers[0].rows(feature)[0]
    assert atlas.by_vector(key, row, k=1)[0].feature == feature
    assert atlas.similar(key, feature, by="decoder", k=1)[0].feature == atlas.by_vector(key, row, k=2)[1].feature
    for path in stored.store.stage(key, stored.corpus.id, "examples").root.glob("*.coactivation.parquet"):
        path.unlink()
    with pytest.raises(NotReadyError, match="run its examples stage"):
        atlas.similar(key, feature, by="coactivation")
