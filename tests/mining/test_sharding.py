import numpy as np

from bench import sketches


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
