"""What a batch of texts is about: by hand on features that read letters, whose example texts say what each means."""

import numpy as np
import polars as pl
import pytest
import torch

from scopeatlas.atlas.embedding import Embedder
from scopeatlas.errors import ConfigError
from scopeatlas.plots.drawing import png
from scopeatlas.rendering.text import console
from scopeatlas.rendering.topics import print_topics
from scopeatlas.study import topics as module
from scopeatlas.study.topics import Topics, topics
from scopeatlas.subject.loading import SubjectModel
from tests.study.lettered import letter_sae
from tests.study.tiny_opened import tiny_subject

HOSTILE = "<script>alert(1)</script> [bold]x[/bold] $x^{$ \x1b[31mred"
MEANINGS = {
    "a": "the tennis player won the tournament in straight sets",
    "b": "she lost the tennis final of the tournament",
    "c": "astronomers saw a distant galaxy through the telescope",
    "d": "the telescope shows stars in a distant galaxy",
    " ": "one two three four",
}
TEXTS = ["aab abe", "ab bbe", "ccd", "cd ddd"]
WHOLE = ["sentence embeddings", "model's activations"]
GROUPS = ["sport", "sport", "space", "space"]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
def tiny(rng) -> SubjectModel:
    return tiny_subject(rng)


@pytest.fixture
def made(rng, tiny, embedder, tmp_path):
    """Topics of TEXTS: a and b mean alike, c and d do; a has a label; e has no example text, h fires nowhere. `.` fires in no text."""

    def make(texts=TEXTS, **columns) -> Topics:
        facts = {"label": {"a": "letter a"}, "example_text": MEANINGS, "decoder_norms": {"b": [2.0]}} | columns
        return topics(letter_sae(rng, tmp_path, gains={"d": 4.0}, subject=tiny, **facts), texts, embedder=embedder)

    return make


def test_a_weight_is_activation_times_norm_times_rarity_at_length_one(made):
    weights = made().features.weights
    first = dict(weights.filter(pl.col("text") == 0).select("item", "weight").iter_rows())
    # a fires 3 times with 1, b twice with 1 and writes twice as much, e once, the blank once; texts 2, 2, 2 and 3 of 4
    expected = np.array([3 * np.log(4 / 2), 2 * 2 * np.log(4 / 2), np.log(4 / 2), np.log(4 / 3)])
    expected /= np.linalg.norm(expected)
    assert [first[f"letters/{i}"] for i in (0, 1, 4, 8)] == pytest.approx(expected.tolist())


def test_what_fires_in_every_text_counts_nothing(made):
    assert "letters/8" not in made([text + " " for text in TEXTS]).features.weights["item"].to_list()


def test_features_whose_examples_mean_alike_make_a_topic(made):
    items = dict(made().features.items.select("item", "topic").iter_rows())
    a, b, c, d, e, blank = (items[f"letters/{i}"] for i in (0, 1, 2, 3, 4, 8))
    assert a == b and c == d and len({a, c, blank}) == 3 and e is None


def test_a_topic_is_called_by_its_heaviest_members_label_or_by_words_that_tell(made):
    topics_of = {tuple(sorted(row["members"])): row["name"] for row in made().features.topics.iter_rows(named=True)}
    assert any(set(name.split(", ")) & {"galaxy", "telescope", "distant"} for name in topics_of.values())
    assert "letter a" not in topics_of.values()  # b is heavier and has no label
    named = made(label={"b": "letter b"}).features.topics
    assert "letter b" in named["name"].to_list()


def test_no_topic_is_called_by_a_piece_of_a_word(made):
    cut = {letter: f"etti {MEANINGS[letter]} alliga\n<bos>agic galaxy and telescope alliga" for letter in "cd"}
    (name,) = [name for name in made(example_text=MEANINGS | cut).features.topics["name"] if "galaxy" in name]
    assert not set(name.split(", ")) & {"etti", "alliga", "agic", "bos"}


def test_shares_are_of_all_weight_and_spread_is_over_all_texts(made):
    found = made().features
    weights, items = found.weights, dict(found.items.select("item", "topic").iter_rows())
    table = np.zeros((4, found.topics.height))
    for text, item, weight in weights.iter_rows():
        if items[item] is not None:
            table[text, items[item]] += weight / weights.filter(pl.col("text") == text)["weight"].sum()
    for text, topic, share, excess in found.by_text.select("text", "topic", "share", "excess").iter_rows():
        assert share == pytest.approx(table[text, topic]) and excess == pytest.approx(table[text, topic] - table[:, topic].mean())
    assert found.by_text.height == (table > 0).sum()
    assert found.topics["share"].to_list() == pytest.approx(table.mean(0).tolist())
    assert found.topics["spread"].to_list() == pytest.approx(table.std(0).tolist())
    assert found.topics["spread"].to_list() == sorted(found.topics["spread"], reverse=True)
    assert found.topics["texts"].to_list() == (table > 0).sum(0).tolist()


def test_the_baseline_weighs_words_by_tf_idf_and_rolls_them_up_alike(made):
    texts = ["tennis tournament of the tennis club", "a distant galaxy", "the telescope and the galaxy"]
    words = made(texts).words
    first = dict(words.weights.filter(pl.col("text") == 0).select("item", "weight").iter_rows())
    # of, the are stop words; idf ln((1 + 3) / (1 + 1)) + 1 for each of the three
    assert first == pytest.approx({"tennis": 2 / 6**0.5, "tournament": 1 / 6**0.5, "club": 1 / 6**0.5})
    topic = dict(words.items.select("item", "topic").iter_rows())
    assert topic["galaxy"] == topic["telescope"] != topic["tennis"] == topic["tournament"]
    galaxy = words.topics.row(by_predicate=pl.col("topic") == topic["galaxy"], named=True)
    assert galaxy["name"] == "galaxy" and galaxy["texts"] == 2


def test_texts_without_a_word_or_a_firing_have_no_topics(made, capsys):
    found = made(["", "", ""])
    for roll_up in (found.features, found.words):
        assert roll_up.by_text.is_empty() and roll_up.topics.is_empty()
    print_topics(console(), found, None)
    assert "nothing" in capsys.readouterr().out and png(found.plot())[:4] == b"\x89PNG"


def test_only_the_heaviest_items_are_clustered(made, monkeypatch):
    monkeypatch.setattr(module, "MOST_ITEMS", 1)
    items = made().features.items
    assert items["topic"].drop_nulls().len() == 1 and items["topic"][0] == 0


def test_groups_that_the_features_tell_apart_are_found_again(made):
    table = made().agreement(GROUPS, seeds=3)
    rows = {row["description"]: row for row in table.iter_rows(named=True)}
    for description in ("features", "feature topics"):
        assert rows[description]["purity"] == rows[description]["adjusted_rand"] == rows[description]["lowest"] == 1.0
    assert list(rows)[2:] == ["words (TF-IDF)", "word topics", *WHOLE, "features, groups shuffled"]


def test_the_models_activations_are_means_over_tokens_less_the_mean_over_texts(made, tiny):
    found = made(["ab", "c", "bb a"])
    means = []
    for text in found.texts:
        ids = torch.tensor(tiny.tokenizer(text, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            means.append(tiny.model.get_input_embeddings()(ids).mean(0).double().numpy())
    expected = np.array(means) - np.mean(means, axis=0)
    assert np.allclose(found.activations, expected, rtol=1e-4, atol=1e-6)


def test_agreement_is_low_where_groups_have_nothing_to_do_with_the_texts(made):
    table = made().agreement(["x", "y", "x", "y"], seeds=3)
    assert table.row(0, named=True)["adjusted_rand"] < 0 and table.row(0, named=True)["purity"] == 0.5


@pytest.mark.parametrize("groups", [["x"], ["x"] * 4])
def test_groups_must_be_one_a_text_and_two_at_least(made, groups):
    with pytest.raises(ConfigError, match="for 4 texts"):
        made().agreement(groups)


def test_one_text_has_nothing_to_be_compared_with(made):
    with pytest.raises(ConfigError, match="give two or more, not 1"):
        made(["ab"])


def test_half_a_surrogate_is_a_question_mark_for_words_too(made):
    assert made(["ab\udcff galaxy", "cd"]).texts == ("ab? galaxy", "cd")


def test_a_conversation_counts_as_what_is_said_in_it(made):
    found = made([[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "the galaxy"}], "cd"])
    assert found.texts == ("ab\nthe galaxy", "cd") and "galaxy" in found.words.items["item"].to_list()


def test_hostile_text_is_only_text_on_a_page_and_in_a_picture(made, capsys):
    found = made([HOSTILE, HOSTILE + " ab", "ab cd"], label={"a": HOSTILE, "b": HOSTILE})
    page = found._repr_html_()
    assert "<script" not in page and "\x1b" not in page and png(found.plot())[:4] == b"\x89PNG"
    print_topics(console(), found, None)
    assert "\x1b" not in capsys.readouterr().out
