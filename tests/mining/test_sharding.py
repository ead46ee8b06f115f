import numpy as np

from bench import sketches
from scopeatlas.mining import sketches as library


def test_sketches_of_a_real_sae_are_the_same_in_1_3_and_7_shards_merged_in_3_orders(medium, rng, capsys):
    assert sketches.measure(medium.store, medium.entry.key, medium.corpus.id, orders=3, rng=rng)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(medium.entry.key)]
    assert [int(line[1]) for line in lines] == [1, 1, 1, 3, 3, 3, 7, 7, 7]
    assert all(line[5] == "yes" and int(line[3].replace(",", "")) > 10_000 for line in lines)


def test_a_context_that_is_counted_twice_is_noticed(medium):
    acts, contexts = sketches.read_all(medium.store, medium.entry.key, medium.corpus.id)
    rows = np.arange(len(contexts))
    whole, once_more = (sketches.sketch_of(acts, contexts, r, 96) for r in (rows, rows[:1]))
    assert not sketches.compare(sketches.merge([whole, once_more]), whole)[0]


def test_no_more_than_a_few_sketches_wait_to_be_merged_however_many_shards(medium, monkeypatch):
    """Each holds counts of every feature, whether it fires or not."""
    acts, contexts = sketches.read_all(medium.store, medium.entry.key, medium.corpus.id)
    parts = [sketches.sketch_of(acts, contexts, np.array([row]), 96) for row in range(40)]
    at_once, merge = [], library.merge
    monkeypatch.setattr(library, "merge", lambda some: at_once.append(len(some)) or merge(some))
    monkeypatch.setattr(library, "MERGE_ENTRIES", 10**9)
    merged = library.merge_all(iter(parts))
    assert max(at_once) == library.MERGE_SKETCHES and sketches.compare(merged, merge(parts))[0]
