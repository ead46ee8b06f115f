from dataclasses import replace

import numpy as np
import pytest

from scopeatlas.corpus.documents import SPLITS
from scopeatlas.errors import CorpusError, SubjectModelError
from scopeatlas.hypotheses.units import Units, read_firings
from scopeatlas.study.shared_tokens import sample_contexts, share_tokens
from scopeatlas.subject.capture import counting_passes
from tests.conftest import WIDTH, changed
from tests.study.opened import copied, opened, random_acts


@pytest.fixture(scope="module")
def both(small, subject):
    return tuple(opened(small, entry, subject) for entry in small.entries)


@pytest.fixture(scope="module")
def cached(both):
    return share_tokens(*both, splits=SPLITS)


@pytest.fixture
def uncached(small, subject, tmp_path):
    """The same two SAEs in a store that has no activations of the first."""
    stored = copied(small, tmp_path / "store")
    stage = stored.store.stage(stored.entries[0].key, stored.corpus.id, "activations")
    for record in list(stage.records()):
        stage.discard(record)
    return tuple(opened(stored, entry, subject) for entry in stored.entries)


def test_shards_give_every_firing_at_its_token(small, subject, cached):
    units = Units(small.corpus, subject)
    assert cached.tokens == units.counted.sum()
    for entry, acts in zip(small.entries, (cached.a, cached.b), strict=True):
        whole = read_firings(small.store, small.corpus, entry, subject, units, width=WIDTH)
        mine, inside = cached.firings(acts), Units(cached.sample, subject)
        assert (
            inside.document[mine.position] == units.document[whole.position[np.lexsort((whole.position, whole.feature))]]
        ).all()
        order = np.lexsort((whole.position, whole.feature))
        for name in ("feature", "position", "value"):
            assert (getattr(mine, name) == getattr(whole, name)[order]).all()


def test_tokens_lie_in_the_documents_that_they_are_of(small, subject, cached):
    units = Units(small.corpus, subject)
    names = [units.documents[number] for number in units.document[cached.position]]
    assert [cached.documents[number] for number in cached.document] == names


def test_a_pass_of_the_model_gives_what_shards_give(cached, uncached):
    with counting_passes() as count:
        shared = share_tokens(*uncached, splits=SPLITS)
    assert not shared.cached and cached.cached and count.passes > 0
    for made, read in ((shared.a, cached.a), (shared.b, cached.b)):
        assert (abs(made.fires - read.fires)).sum() <= 1e-3 * read.fires.sum()  # batches are packed otherwise: the last bits
        np.testing.assert_allclose(made.matrix.multiply(read.fires).sum(), read.matrix.sum(), rtol=1e-3)


def test_one_pass_serves_both_where_they_have_one_model_and_two_where_they_have_two(uncached, subject):
    one, other = uncached
    with counting_passes() as together:
        shared = share_tokens(one, other, splits=["select"])
    tuned = replace(other, subject=changed(subject, identity="the same model, trained further"))
    with counting_passes() as apart:
        again = share_tokens(one, tuned, splits=["select"])
    assert apart.tokens == 2 * together.tokens > 0
    assert (abs(again.b.matrix - shared.b.matrix)).max() == 0


def test_one_feature_of_each_is_what_all_have_of_it(both, uncached, cached):
    for pair in (both, uncached):
        few = share_tokens(*pair, splits=SPLITS, features=(3, 7))
        assert set(np.flatnonzero(few.a.fired)) == {3} and set(np.flatnonzero(few.b.fired)) == {7}
        assert few.a.fired[3] == pytest.approx(cached.a.fired[3], abs=2)
        assert few.b.fired[7] == pytest.approx(cached.b.fired[7], abs=2)


def test_a_smaller_sample_is_part_of_a_larger_one_and_within_its_budget(small):
    rows = {}
    for tokens in (200, 700):
        sample = sample_contexts(small.corpus, ["explain", "report"], tokens)
        contexts = [sample.contexts(shard) for shard in sample.shards]
        assert sum(c.lengths().sum() for c in contexts) <= tokens
        assert {SPLITS[split] for c in contexts for split in c.splits} <= {"explain", "report"}
        rows[tokens] = {int(i) for c in contexts for i in c.ids}
    assert rows[200] and rows[200] < rows[700]


def test_only_documents_of_the_splits_asked_for_are_read(small, both):
    splits = {}
    for shard in small.corpus.shards:
        contexts = small.corpus.contexts(shard)
        splits |= dict(zip(contexts.document_ids, (SPLITS[s] for s in contexts.splits), strict=True))
    shared = share_tokens(*both, splits=["report"])
    assert {splits[document] for document in shared.documents} == {"report"}
    assert set(shared.documents) == {document for document, split in splits.items() if split == "report"}


def test_models_that_split_text_otherwise_share_no_tokens(both, subject):
    other = replace(both[1], subject=changed(subject, tokenizer_identity="another"))
    with pytest.raises(SubjectModelError, match="different tokens"):
        share_tokens(both[0], other, splits=SPLITS)


def test_a_corpus_without_a_document_of_the_split_is_named(both):
    with pytest.raises(CorpusError, match="no document of the split"):
        share_tokens(*both, splits=[])


def test_shifted_activations_keep_their_order_in_a_circle(rng):
    acts = random_acts(rng, 6, 50, 0.3)
    assert (acts.shifted(17).matrix.toarray() == np.roll(acts.matrix.toarray(), 17, axis=1)).all()


def test_only_some_features_are_left_where_the_others_are_silenced(rng):
    acts = random_acts(rng, 20, 50, 0.3)
    kept = rng.random(20) < 0.5
    assert (acts.only(kept).matrix.toarray() == acts.matrix.toarray() * kept[:, None]).all()
    assert (acts.only(kept).fired == acts.fired * kept).all()
