"""Batches: packed by length, and the activations of a context whatever it shares a batch with."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scopeatlas.activations.reading import packed, read_batches, text_mask
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.subject.capture import capture, counting_passes
from scopeatlas.subject.sites import parse_hook_point
from tests.conftest import changed

SITE = parse_hook_point("model.layers.1.output")


def test_every_context_is_in_one_batch_and_no_batch_holds_more_tokens_than_it_may(rng):
    lengths = rng.integers(1, 200, 500)
    batches = list(packed(lengths, 1000))
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(rows) * lengths[rows].max() <= 1000 for rows in batches)


def test_contexts_of_like_length_share_a_batch_so_that_little_is_padding(rng):
    lengths = rng.integers(1, 200, 500)
    padded = sum(len(rows) * lengths[rows].max() for rows in packed(lengths, 1000))
    in_order = sum(5 * lengths[i : i + 5].max() for i in range(0, 500, 5))  # as many contexts as always fit
    assert padded < 1.1 * lengths.sum() < in_order


def test_a_context_longer_than_a_batch_goes_alone():
    assert [rows.tolist() for rows in packed(np.array([5, 300, 7]), 100)] == [[1], [2, 0]]


def short_and_long(contexts: Contexts, rng: np.random.Generator) -> Contexts:
    """The same contexts, each cut to a length of its own."""
    tokens = contexts.tokens.copy()
    for row in tokens:
        row[rng.integers(3, len(row) + 1) :] = -1
    return replace(contexts, tokens=tokens)


@pytest.mark.parametrize("batch_tokens", [64, 2048])
def test_activations_are_those_of_each_context_alone_whatever_the_batch(small_corpus, subject, rng, batch_tokens):
    contexts = short_and_long(small_corpus.corpus.contexts(small_corpus.corpus.shards[0]), rng)
    seen = np.zeros((contexts.tokens.size, subject.d_model), dtype=np.float32)
    found = []
    for batch in read_batches(contexts, changed(subject, batch_tokens=batch_tokens), {SITE}):
        seen[batch.positions] = batch.acts[SITE].numpy()
        found.extend(batch.positions.tolist())
    assert sorted(found) == np.flatnonzero(text_mask(contexts, subject)).tolist()
    for row, alone in enumerate(contexts.tokens):
        length = int((alone >= 0).sum())
        acts = capture(subject.model, torch.from_numpy(alone[None, :length]).long(), [SITE])[SITE][0]
        mine = seen.reshape(*contexts.tokens.shape, -1)[row, 1:length]
        assert np.allclose(mine, acts[1:].numpy(), rtol=1e-4, atol=1e-2 * float(acts.abs().mean()))


def test_one_forward_pass_serves_a_batch_however_many_sites(small_corpus, subject):
    contexts = small_corpus.corpus.contexts(small_corpus.corpus.shards[0])
    sites = {parse_hook_point(f"model.layers.{layer}.output") for layer in (0, 1, 2)}
    with counting_passes() as count:
        batches = list(read_batches(contexts, subject, sites))
    assert count.passes == len(batches) and all(batch.acts.keys() == sites for batch in batches)
