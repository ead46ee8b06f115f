import numpy as np
import polars as pl
import pytest

from scopeatlas.hypotheses.labels import Label
from scopeatlas.scoring.controls import partners, with_q_values
from scopeatlas.scoring.table import score_table


def labels_of(features) -> list[Label]:
    return [Label(feature, "llm", "ok", version=f"v{i}") for i, feature in enumerate(features)]


@pytest.mark.parametrize("seed", range(10))
def test_a_partner_is_of_another_feature_and_says_something_else(seed, rng):
    features = rng.integers(0, 12, 40).tolist()
    claims = [f"claim {n}" for n in rng.integers(0, 6, 40)]
    chosen = partners(labels_of(features), claims, [""] * 40, seed=seed)
    assert all(features[i] != features[j] and claims[i] != claims[j] for i, j in enumerate(chosen))


@pytest.mark.parametrize("seed", range(10))
def test_a_partner_is_of_the_same_group_where_there_is_one(seed, rng):
    groups = ["token"] * 10 + ["context"] * 2 + ["alone"]
    chosen = partners(labels_of(range(13)), [str(i) for i in range(13)], groups, seed=seed)
    assert all(groups[i] == groups[j] for i, j in enumerate(chosen[:12])) and chosen[12] != 12


def test_where_all_claims_are_the_same_there_is_no_partner_but_the_label_itself():
    assert partners(labels_of(range(3)), ["the"] * 3, [""] * 3, seed=0) == [0, 1, 2]
    assert partners(labels_of([5]), ["the"], [""], seed=0) == [0] and partners([], [], [], seed=0) == []


def test_most_labels_have_partners_of_their_own():
    """So that the mean over shuffled labels is no mean over a few of them."""
    chosen = partners(labels_of(range(100)), [str(i) for i in range(100)], [""] * 100, seed=0)
    assert sorted(chosen) == list(range(100))


def test_one_label_more_gives_about_one_other_label_another_partner(rng):
    """So that what was asked of the shuffled labels need not be asked anew."""
    features, claims = rng.permutation(300).tolist(), [f"claim {n}" for n in rng.integers(0, 100, 300)]
    labels = [Label(feature, "llm", "ok", claim) for feature, claim in zip(features, claims, strict=True)]
    groups = rng.choice(["token", "context"], 300).tolist()

    def by_label(count: int) -> dict[str, str]:
        chosen = partners(labels[:count], claims[:count], groups[:count], seed=0)
        return {labels[i].label_id: labels[j].label_id for i, j in enumerate(chosen)}

    moved = []
    for count in range(200, 299):
        fewer, more = by_label(count), by_label(count + 1)
        moved.append(sum(more[label] != partner for label, partner in fewer.items()))
    assert np.mean(moved) < 1.5 and max(moved) <= 6


def test_partners_depend_on_the_labels_and_not_on_their_order(rng):
    labels, order = labels_of(range(60)), rng.permutation(60).tolist()
    claims = [str(i) for i in range(60)]
    straight = partners(labels, claims, [""] * 60, seed=0)
    mixed = partners([labels[i] for i in order], [claims[i] for i in order], [""] * 60, seed=0)
    assert {order[i]: order[j] for i, j in enumerate(mixed)} == dict(enumerate(straight))


def test_other_seeds_shuffle_otherwise():
    claims = [str(i) for i in range(50)]
    one, two = (partners(labels_of(range(50)), claims, [""] * 50, seed=seed) for seed in (0, 1))
    assert one != two and one == partners(labels_of(range(50)), claims, [""] * 50, seed=0)


def test_false_discovery_is_counted_within_a_scorer(rng):
    p = rng.random(30)
    rows = [
        {"feature": i, "label_id": str(i), "scorer": scorer, "arm": "own", "p_value": float(p[i])}
        for i, scorer in enumerate(["detection"] * 20 + ["fuzzing"] * 10)
    ]
    rows.append({"feature": 3, "label_id": "3", "scorer": "detection", "arm": "shuffled"})
    found = with_q_values(score_table(rows))
    assert found.columns == score_table(rows).columns and found.drop("q_value").equals(score_table(rows).drop("q_value"))
    for scorer, part in (("detection", p[:20]), ("fuzzing", p[20:])):
        q = found.filter((pl.col("scorer") == scorer) & (pl.col("arm") == "own")).sort("feature")["q_value"].to_numpy()
        ranked = sorted(part)
        expected = [min(min(len(part) * ranked[k] / (k + 1) for k in range(len(part)) if ranked[k] >= one), 1) for one in part]
        assert np.allclose(q, expected, atol=1e-6)
    assert found.filter(pl.col("arm") == "shuffled")["q_value"].to_list() == [None]


def test_a_table_without_p_values_has_no_q_values():
    assert with_q_values(score_table([])).equals(score_table([]))
