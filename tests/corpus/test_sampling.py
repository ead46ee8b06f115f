import random

import pytest

from scopeatlas.corpus.documents import make_document, split_of
from scopeatlas.corpus.sampling import Sampling, draw_sample, shard_of
from scopeatlas.errors import CorpusError


def random_text(words: int = 80) -> str:
    return " ".join("".join(random.choices("abcdefghij", k=6)) for _ in range(words))


@pytest.fixture
def documents():
    return [make_document(random_text(), source="s") for _ in range(400)]


def ids(sample) -> list[str]:
    return [document.id for document in sample.documents]


def test_a_larger_fraction_contains_the_smaller_sample(documents):
    nested = [set(ids(draw_sample(documents, Sampling(fraction=f)))) for f in (0.1, 0.3, 0.31, 1.0)]
    assert all(small < large or small == large for small, large in zip(nested, nested[1:], strict=False))
    assert 15 <= len(nested[0]) <= 70 and len(nested[-1]) == 400


def test_a_larger_fraction_contains_the_smaller_sample_even_with_near_duplicates(documents):
    mixed = [*documents, *(make_document(d.text + f" again {i}", source="s") for i, d in enumerate(documents))]
    nested = [set(ids(draw_sample(mixed, Sampling(fraction=f)))) for f in (0.2, 0.5, 1.0)]
    assert nested[0] <= nested[1] <= nested[2] and 400 <= len(nested[2]) <= 410  # the search for twins is approximate


def test_the_order_of_the_source_does_not_matter(documents):
    shuffled = random.sample(documents, len(documents))
    assert draw_sample(documents, Sampling(fraction=0.5)) == draw_sample(shuffled, Sampling(fraction=0.5))


def test_a_document_keeps_its_split_when_the_corpus_grows(documents):
    small, large = (draw_sample(documents, Sampling(fraction=f)) for f in (0.3, 1.0))
    split = dict(zip(ids(large), large.splits, strict=True))
    assert all(split[document] == of for document, of in zip(ids(small), small.splits, strict=True))


def test_splits_have_the_shares_asked_for_and_do_not_follow_the_sampling_order():
    names = [str(i) for i in range(20000)]
    for half in (names, [n for n in names if shard_of(n, 1) == 0]):
        splits = [split_of(n, (0.5, 0.2, 0.3)) for n in half]
        for split, share in (("explain", 0.5), ("select", 0.2), ("report", 0.3)):
            assert abs(splits.count(split) / len(half) - share) < 0.02


def test_shards_are_ranges_of_the_sampling_order(documents):
    sample = draw_sample(documents, Sampling())
    numbers = [shard_of(document, 3) for document in ids(sample)]
    assert numbers == sorted(numbers) and set(numbers) == set(range(8))


def test_the_same_text_twice_is_one_document(documents):
    again = [make_document(f"  {d.text}\n", source="elsewhere") for d in documents[:30]]
    sample = draw_sample([*documents, *again], Sampling())
    assert (len(sample.documents), sample.exact_duplicates, sample.near_duplicates) == (400, 30, 0)


def test_of_near_duplicates_only_the_one_of_lowest_hash_is_kept(documents):
    words = documents[0].text.split()
    copies = [make_document(" ".join([*words[:-1], f"other{i}"]), source="s") for i in range(5)]
    cluster = {d.id for d in [documents[0], *copies]}
    everything = ids(draw_sample([*documents[1:], documents[0], *copies], Sampling()))
    alone = [d for d in everything if d in cluster]
    from scopeatlas.corpus.documents import sampling_position

    assert alone == [min(cluster, key=sampling_position)]


def test_texts_that_share_half_their_words_are_no_duplicates():
    shared = random_text(60)
    texts = [make_document(f"{shared} {random_text(60)}", source="s") for _ in range(10)]
    assert len(draw_sample(texts, Sampling()).documents) == 10


def test_equal_texts_in_another_unicode_form_are_one_document():
    assert make_document("cafe\u0301", source="a").id == make_document("caf\u00e9", source="b").id


def test_an_empty_sample_is_an_error_that_names_the_settings(documents):
    with pytest.raises(CorpusError, match="corpus is empty: .*corpus.min_characters and corpus.fraction"):
        draw_sample(documents, Sampling(fraction=0.0))


@pytest.mark.parametrize("splits", [(0.5, 0.2, 0.2), (1.0, 0.0, 0.0), (0.7, 0.5, -0.2)])
def test_splits_that_do_not_add_up_are_an_error(documents, splits):
    with pytest.raises(CorpusError, match="corpus.splits must be three positive fractions"):
        draw_sample(documents, Sampling(splits=splits))
