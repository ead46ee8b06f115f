"""What fires in a text: by hand on features that read letters, and against dense float64 on real ones."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.errors import ConfigError, SubjectModelError
from scopeatlas.plots.drawing import png
from scopeatlas.rendering.text import console
from scopeatlas.rendering.trace import print_trace
from scopeatlas.storage.store import Store
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.trace import Trace, name_of, trace
from scopeatlas.subject.capture import counting_passes
from tests.study.lettered import LETTERS, MARKUP, letter_sae
from tests.study.tiny_opened import tiny_subject

HOSTILE = "<script>alert(1)</script> [bold]x[/bold] $x^{$ \x1b[31mred"
CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b."}]


@pytest.fixture
def letters(rng) -> OpenSae:
    """a is labelled with F1 0.5 and writes twice as much, b is labelled and untested, the others have no label."""
    return letter_sae(
        rng,
        gains={"b": 2.0, "c": 4.0},
        label={"a": "letter a", "b": "letter b"},
        status={"a": "ok", "b": "ok"},
        f1={"a": 0.5},
        decoder_norms={"a": [0.0, 2.0], "b": [3.0, 4.0]},
        density={"c": 1.0, "d": 0.0},
    )


def test_every_firing_is_a_row_with_its_token_and_its_label(letters):
    table = trace([letters], ["ab", "c"]).to_polars()
    shown = table.select("text", "position", "token", "role", "sae", "feature", "key", "label", "status", "f1", "activation")
    assert shown.rows() == [
        (0, 0, "a", "text", "letters", 0, "letters/0", "letter a", "ok", 0.5, 1.0),
        (0, 1, "b", "text", "letters", 1, "letters/1", "letter b", "ok", None, 2.0),
        (1, 0, "c", "text", "letters", 2, "letters/2", "", "incoherent", None, 4.0),
    ]
    assert table["f1_low"][0] == pytest.approx(0.4) and table["f1_high"][0] == pytest.approx(0.6)


def test_totals_add_up_each_text_and_put_what_is_rare_first(letters):
    totals = trace([letters], ["abbc d", "a"]).totals
    first = {row["key"][-1]: row for row in totals.filter(pl.col("text") == 0).iter_rows(named=True)}
    assert (first["1"]["activation"], first["1"]["peak"], first["1"]["peak_position"], first["1"]["tokens"]) == (4.0, 2.0, 1, 2)
    assert first["0"]["written"] == pytest.approx(2.0) and first["1"]["written"] == pytest.approx(20.0)
    assert first["1"]["weight"] == pytest.approx(4 * math.log(10)) and first["2"]["weight"] == 0.0
    assert first["3"]["weight"] == pytest.approx(math.log(1e5))
    # d 11.5, b 9.2, a and the blank 2.3 each, and c, which fires on every token of the corpus
    assert totals.filter(pl.col("text") == 0)["key"].to_list() == [f"letters/{i}" for i in (3, 1, 0, 8, 2)]


def test_the_share_that_labels_explain_is_of_all_activation(letters):
    found = trace([letters], ["abbc", "c", ""])
    # a 1, b 2 + 2, c 4: labelled 5 of 9; of norms 2 + 20 of 26; with a label as its F1 0.5 of 9
    first, second, empty = found.explained.iter_rows(named=True)
    assert (first["tokens"], first["features"], first["activation"]) == (4, 3, 9.0)
    assert [first[name] for name in ("explained", "explained_norm", "explained_f1")] == pytest.approx([5 / 9, 22 / 26, 0.5 / 9])
    assert (second["explained"], second["explained_norm"], second["explained_f1"]) == (0.0, 0.0, 0.0)
    assert (empty["tokens"], empty["features"], empty["activation"], empty["explained"]) == (0, 0, 0.0, None)
    assert found.overall["explained"].to_list() == pytest.approx([5 / 13])


def test_what_fires_less_than_asked_does_not_fire(letters):
    found = trace([letters], "abc", min_activation=2.0)
    assert found.to_polars()["token"].to_list() == ["b", "c"] and found.explained["explained"].to_list() == pytest.approx([2 / 6])


def test_a_conversation_has_roles_and_its_markup_never_fires(letters):
    table = trace([letters], [CHAT, "\n"]).to_polars()
    assert table.select("text", "token", "role", "feature").rows() == [
        (0, "a", "user", 0),
        (0, "b", "user", 1),
        (0, "b", "assistant", 1),
        (0, ".", "assistant", LETTERS.index(".")),
        (1, "\n", "text", MARKUP),
    ]
    found = trace([letters], CHAT)
    spoken = [token for token, role in zip(found.tokens[0], found.roles[0], strict=True) if role != "template"]
    assert spoken == ["a", "b", "b", "."] and "<|im_start|>" in found.tokens[0]


def test_several_saes_are_traced_in_one_pass(letters, rng):
    other = letter_sae(rng, subject=letters.subject, key="other", gains={"a": 8.0})
    with counting_passes() as passes:
        both = trace([letters, other], ["ab", "ba"])
    assert passes.passes == 1
    for opened in (letters, other):
        alone = trace([opened], ["ab", "ba"])
        mine = pl.col("sae") == opened.key
        assert both.to_polars().filter(mine).equals(alone.to_polars()) and both.explained.filter(mine).equals(alone.explained)


def test_an_sae_named_twice_counts_once(letters):
    once, twice = trace([letters], ["ab", "c"]), trace([letters, letters], ["ab", "c"])
    assert twice.saes == ("letters",) and twice.as_dict() == once.as_dict() and twice.firings.equals(once.firings)


def test_half_a_surrogate_and_a_bare_turn_are_no_tracebacks(letters):
    assert "".join(trace([letters], "a\udcff b").tokens[0]) == "a? b"
    with pytest.raises(ConfigError, match="a conversation is turns like"):
        trace([letters], CHAT[0])


def test_saes_of_two_subject_models_are_refused(letters, rng):
    other = tiny_subject(rng)
    object.__setattr__(other, "name", "another")
    with pytest.raises(ConfigError, match="SAEs of one subject model"):
        trace([letters, letter_sae(rng, subject=other)], "a")
    with pytest.raises(ConfigError, match="no text to trace"):
        trace([letters], [])


def test_a_conversation_that_the_template_refuses_is_named(letters):
    with pytest.raises(SubjectModelError, match="text 1: a turn's role is user, assistant or system, not 'tool'"):
        trace([letters], ["a", [{"role": "tool", "content": "b"}]])


def test_a_trace_of_real_saes_is_what_dense_float64_says(two_saes, subject, small_corpus):
    texts = [text[:200] for text in small_corpus.corpus.documents["text"].to_list()[:3]]
    saes = [OpenSae(Store("nowhere"), entry.key, "c", entry, subject, rows_of(entry.key)) for entry in two_saes]
    table = trace(saes, texts).to_polars()
    for sae in saes:
        layer = open_dictionary(sae.entry).layers[0]
        for number, text in enumerate(texts):
            ids = [subject.tokenizer.bos_token_id, *subject.tokenizer(text, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                seen = subject.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[2]
            pre = (seen[0, 1:].double() @ layer.w_enc.double() + layer.b_enc.double()).numpy()
            expected = np.where(pre > layer.threshold.double().numpy(), pre, 0)
            mine = table.filter((pl.col("text") == number) & (pl.col("sae") == sae.key))
            dense = np.zeros_like(expected)
            dense[mine["position"].to_numpy(), mine["feature"].to_numpy()] = mine["activation"].to_numpy()
            both = (dense > 0) & (expected > 0)
            assert ((dense > 0) != (expected > 0)).sum() <= 1e-3 * both.sum() and both.sum() > 100
            assert np.allclose(dense[both], expected[both], rtol=3e-3, atol=1e-2)


def rows_of(key: str) -> pl.DataFrame:
    facts = {"label": "", "status": "ok", "f1": 0.5, "f1_low": 0.4, "f1_high": 0.6, "density": 0.1, "max_activation": 1.0}
    rows = [
        facts | {"sae": key, "feature": i, "key": f"{key}/{i}", "trigger_tokens": ["t"], "decoder_norms": [1.0]}
        for i in range(96)
    ]
    return pl.DataFrame(rows, schema_overrides={"feature": pl.Int32})


def test_json_names_the_heaviest_features_with_and_without_a_label(letters):
    found = json.loads(json.dumps(trace([letters], ["abcd", ""], top=1).as_dict()))
    first, empty = found["texts"]
    assert first["tokens"] == ["a", "b", "c", "d"] and first["roles"] == ["text"] * 4
    (shares,) = first["saes"]
    assert [row["label"] for row in shares["labelled"]] == ["letter b"] and shares["labelled"][0]["activations"] == [0, 2, 0, 0]
    assert [row["key"] for row in shares["unexplained"]] == ["letters/3"]
    assert empty["saes"][0]["explained"] is None and found["overall"][0]["explained"] == pytest.approx(3 / 8)


def test_a_feature_that_fires_nowhere_has_no_strip(letters):
    found = trace([letters], "abb")
    assert found.strip(0, "letters/1").tolist() == [0, 2, 2]
    with pytest.raises(ConfigError, match="letters/7 fires in none of the texts"):
        found.strip(0, "letters/7")


def printed(found: Trace, capsys) -> str:
    print_trace(console(), found)
    return capsys.readouterr().out


def test_the_tokens_where_features_peak_are_marked_without_colour_too(letters, capsys):
    # a 1, b 2 + 2, h 1 + 1, the blank 1
    text = printed(trace([letters], "h abbh", top=1), capsys)
    assert text.startswith("1  «h» a«b»bh\n   labels explain 62 % of the activation (6 % counting each as its F1)\n")
    assert "at b and 1 more  F1 -  letter b" in text and "unexplained 38 %, most of it by" in text
    assert 'at h and 1 more    no label (incoherent); fires on "t"' in text and "letter a" not in text and "\x1b" not in text


def test_of_several_saes_each_has_its_features_under_a_text(letters, rng, capsys):
    other = letter_sae(rng, subject=letters.subject, key="other", label={"c": "the letter c"})
    lines = printed(trace([letters, other], "ac"), capsys).splitlines()
    headings = [line.split(":")[0].strip() for line in lines if "labels explain" in line]
    assert headings == ["letters", "other", "letters", "other"]  # under the text, and of all texts
    assert any("the letter c" in line for line in lines) and any("letter a" in line for line in lines)


def test_a_transcript_says_who_speaks(letters, capsys):
    assert "user: «ab» assistant: b«.»" in printed(trace([letters], CHAT), capsys)


def test_of_a_long_text_only_what_is_around_a_peak_is_printed(letters, capsys):
    line = printed(trace([letters], "h" * 100 + "a" + "h" * 100, top=1), capsys).splitlines()[0]
    assert "«a»" in line and line.count("h") < 40 and " … " in line


def test_nothing_that_fires_is_said(letters, capsys):
    assert "nothing fires" in printed(trace([letters], ["", "a"]), capsys)


@pytest.mark.parametrize("texts", [[HOSTILE], [HOSTILE] * 7 + [""], [CHAT], ["ab" * 60]])
def test_hostile_text_is_only_text_on_a_page_and_in_a_picture(rng, texts, capsys):
    opened = letter_sae(rng, label={"a": HOSTILE}, trigger_tokens={"b": [HOSTILE]})
    found = trace([opened], texts)
    page = found._repr_html_()
    assert "<script" not in page and "\x1b" not in page and "labels explain" in page
    assert png(found.plot())[:4] == b"\x89PNG"
    assert "\x1b" not in printed(found, capsys)


def test_a_label_of_blanks_is_shown_in_quotes():
    assert name_of(" ", "ok", []) == '" "' and name_of("", "dead", []) == "no label (dead)"
    assert name_of("", "rare", ["a", "\n"]) == 'no label (rare); fires on "a" "\\n"'
