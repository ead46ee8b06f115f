"""A contrast from texts to what it says, by a tiny subject model and SAE; and its faces."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from scopeatlas.api import Atlas
from scopeatlas.cli import cli
from scopeatlas.errors import ConfigError
from scopeatlas.study.contrast import Contrast, contrast, contrast_documents, read_documents
from scopeatlas.study.permutation import Design
from scopeatlas.subject.capture import capture
from tests.study.tiny_opened import WIDTH, tiny_opened, with_rows

HOSTILE = "<script>alert(1)</script> \x1b[31m [bold]x[/]"


def sentences(rng: np.random.Generator, count: int, letters: str) -> list[str]:
    """Random words of some letters; a text is a token a letter."""
    return ["".join(rng.choice(list(letters + " "), rng.integers(12, 30))) + letters[0] for _ in range(count)]


@pytest.fixture
def opened(rng):
    return tiny_opened(rng)


@pytest.fixture
def found(opened, rng) -> Contrast:
    """Two sets that one letter tells apart."""
    a, b = sentences(rng, 15, "abcd"), sentences(rng, 15, "efgd")
    return contrast(opened, a, b, permutations=500)


def test_documents_have_each_features_mean_activation_and_the_mean_of_what_is_read(opened, rng):
    texts = sentences(rng, 5, "abcdef")
    documents = read_documents(opened, texts)
    for number, text in enumerate(texts):
        ids = torch.tensor([opened.subject.tokenizer(f"<s>{text}")["input_ids"]])
        site = opened.dictionary.sites_in[0]
        x = capture(opened.subject.model, ids, [site])[site][0, 1:]
        dense = opened.dictionary.encode(x.float()).dense(WIDTH).mean(0).numpy()
        assert np.allclose(documents.values[[number]].toarray()[0], dense, rtol=5e-3, atol=1e-3)  # rounded to 16 bits
        assert np.allclose(documents.site[number], x.mean(0).numpy(), atol=1e-5)


def test_of_a_conversation_the_template_does_not_count(opened):
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    documents = read_documents(opened, [turns, "abcde"])
    assert documents.tokens.tolist() == [5, 5] and documents.readings[0].roles.count("template") > 5
    (firing,) = documents.readings[:1]
    assert documents.values[[0]].toarray().sum() == pytest.approx(firing.value.astype(float).sum() / 5)


def test_a_multi_layer_kind_is_contrasted_at_all_its_sites(rng):
    opened = tiny_opened(rng, kind="clt")
    documents = read_documents(opened, sentences(rng, 3, "abc"))
    assert documents.site.shape == (3, 2 * opened.dictionary.d_in) and documents.values.shape == (3, 2 * WIDTH)


def test_features_come_with_what_the_atlas_says_of_them_the_surest_first(found, opened):
    assert found.significant.height > 0 and found.features["p_adjusted"].is_sorted()
    named = found.features.select("feature", "key", "label", "status", "trigger_tokens", "f1")
    assert named.equals(named.select("feature").join(opened.rows.select(named.columns), on="feature", how="left"))
    assert found.to_polars() is found.features


def test_the_effect_splits_into_what_words_predict_and_what_is_left(opened, rng):
    texts = [*sentences(rng, 12, "abcdef"), *sentences(rng, 12, "cdefgh")]
    documents = read_documents(opened, texts)
    found = contrast_documents(opened, documents, Design(12, 12), permutations=99, seed=0, alpha=0.9)
    assert found.significant.height and found.significant["matched_effect"].null_count() == 0
    rest = found.features.filter(pl.col("p_adjusted") > 0.9)
    assert rest["matched_effect"].null_count() == rest["matched_p"].null_count() == rest.height
    for row in found.significant.iter_rows(named=True):
        column = documents.values[:, [row["feature"]]].toarray()[:, 0]
        assert row["effect"] == pytest.approx((column[:12].mean() - column[12:].mean()) / column.std(ddof=1))
        assert (row["mean_a"], row["mean_b"]) == (pytest.approx(column[:12].mean()), pytest.approx(column[12:].mean()))


def test_words_and_baselines_stand_beside_the_features(opened, rng):
    a, b = [f"x {text}" for text in sentences(rng, 15, "abc")], [f"y {text}" for text in sentences(rng, 15, "abc")]
    found = contrast(opened, a, b, permutations=500)
    assert set(found.words.head(2)["word"]) == {"x", "y"} and found.words["p_adjusted"][1] <= 0.05
    assert found.baselines["by"].to_list() == ["all features", "best feature", "words", "linear probe", "length"]
    auroc = dict(found.baselines.select("by", "auroc").iter_rows())
    assert auroc["words"] == 1 and auroc["linear probe"] > 0.7
    assert not found.gains.filter(pl.col("against") == "words")["beats"].any()
    said = [line for line in found.verdict if "held-out AUROC" in line]
    assert len(said) == 2 and all("not beat" in line and "the words (1.00" in line for line in said)


def test_features_that_do_beat_a_baseline_are_said_to(opened, rng):
    """The same letters in another order: the words that there are tell nothing."""
    a = ["".join(rng.permutation(list("aaabbbccc"))) + "zz" for _ in range(20)]
    b = ["zz" + text[:-2] for text in a]
    found = contrast(opened, [" ".join(text) for text in a], [" ".join(text) for text in b], pairs=True, permutations=500)
    assert found.words.filter(pl.col("p_adjusted") <= 0.05).is_empty()
    gains = found.gains.filter(pl.col("by") == "all features")
    assert gains.filter(pl.col("against") == "words")["beats"].item()
    assert any(line.startswith("All features") and "beat the words (0.50" in line for line in found.verdict)


def test_matched_pairs_see_what_two_sets_do_not(opened, rng):
    a = sentences(rng, 12, "abcdefghijklmnop")
    b = [text + "q" for text in a]
    paired = contrast(opened, a, b, pairs=True, permutations=2000)
    apart = contrast(opened, a, b, permutations=2000)
    assert paired.significant.height > apart.significant.height
    assert "12 pairs" in paired.verdict[0] and "12 against 12 documents" in apart.verdict[0]


def test_sets_too_small_for_any_answer_say_so(opened, rng):
    found = contrast(opened, sentences(rng, 3, "abc"), sentences(rng, 3, "xyz"))
    assert found.significant.is_empty() and found.least_p == pytest.approx(2 / 20) and found.permutations == 19
    said = " ".join(found.verdict)
    assert (
        "Nothing could have been reported: the smallest p-value that 3 against 3 documents with 19 arrangements allow is 0.1"
        in said
    )
    assert "No baseline was tried" in said and found.baselines.is_empty() and found.gains.is_empty()
    assert found._repr_html_() and found.plot().axes


def test_what_cannot_be_contrasted_is_refused(opened):
    for a, b, options, message in (
        (["a"], ["b", "c"], {}, "two documents in each set"),
        (["a", "b", "c"], ["b", "c"], {"pairs": True}, "sets of one length"),
        (["a", "b"], ["c", ""], {}, "text 4 of 4 .* has no tokens"),
        (["a", "b"], ["c", "d"], {"alpha": 1.0}, "alpha between 0 and 1"),
        (["a", "b"], ["c", "d"], {"seed": -1}, "seed of 0 or more"),
        (["a", "b"], ["c", "d"], {"permutations": 0}, "at least one permutation"),
    ):
        with pytest.raises(ConfigError, match=message):
            contrast(opened, a, b, **options)


def test_everything_is_there_as_json_and_the_same_seed_gives_the_same(found, opened, rng):
    facts = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert facts["documents"] == [15, 15] and facts["tested"] == len(facts["features"]) and facts["pairs"] is False
    assert facts["significant"] == found.significant.height and facts["verdict"] == list(found.verdict)
    assert {"word", "effect", "low", "high", "p_adjusted"} <= set(facts["words"][0])
    a, b = sentences(rng, 4, "abc"), sentences(rng, 4, "xyz")
    assert contrast(opened, a, b, seed=3).as_dict() == contrast(opened, a, b, seed=3).as_dict()


def test_the_page_and_the_picture_take_text_for_text(found):
    hostile = replace(found, features=found.features.with_columns(label=pl.lit(HOSTILE)))
    page = hostile._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "data:image/png;base64," in page
    names = [tick.get_text() for tick in hostile.plot(top=3).axes[0].get_yticklabels()]
    assert len(names) == 3 + min(5, found.words.height) and names[3].startswith("word ")


@pytest.fixture
def shell(opened, monkeypatch, tmp_path):
    """Runs `contrast` on an atlas that holds one SAE, of hostile labels."""
    labels = pl.Series([HOSTILE] * WIDTH)
    atlas = Atlas.__new__(Atlas)
    monkeypatch.setattr(Atlas, "open", lambda self, sae: with_rows(opened, label=labels))
    monkeypatch.setattr("scopeatlas.api.open_atlas", lambda root: atlas)
    return lambda *arguments: CliRunner().invoke(cli, ["contrast", "toy", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def files(rng, tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    a.write_text("\n".join(sentences(rng, 12, "abcd")) + "\n\n", encoding="utf-8")
    turns = [[{"role": "user", "content": text}] for text in sentences(rng, 12, "efgd")]
    b.write_text("\n".join(json.dumps({"messages": conversation}) for conversation in turns), encoding="utf-8")
    return a, b


def test_the_command_prints_what_was_found(shell, files, tmp_path):
    picture = tmp_path / "forest.png"
    result = shell(*files, "--permutations", 500, "--top", 4, "--plot", picture)
    assert result.exit_code == 0 and "\x1b" not in result.output
    lines = result.output.splitlines()
    assert "Features that differ" in lines[1] and "12 against 12 documents, 500 arrangements" in lines[1]
    assert result.output.count("[bold]x[/]") == 4  # nothing in a label is markup
    assert "in a (12)" in result.output and "linear probe" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_gives_json(shell, files):
    result = shell(*files, "--pairs", "--permutations", 300, "--alpha", 0.1, "--json")
    facts = json.loads(result.output)
    assert facts["pairs"] is True and facts["alpha"] == 0.1 and facts["permutations"] == 300
    assert facts["features"][0]["label"] == HOSTILE


def test_the_command_says_in_a_line_what_it_cannot_do(shell, files, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one\n", encoding="utf-8")
    result = shell(short, files[1])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "two documents in each set" in result.stderr
    assert "cannot read" in shell(tmp_path / "none.txt", files[1]).stderr
