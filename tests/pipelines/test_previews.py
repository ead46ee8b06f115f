"""What a person sees in the UI: corpus text is data there, never markup."""

import polars as pl

from assets.previews import highlighted, histogram_image


def test_what_fires_is_highlighted_even_inside_a_word_or_next_to_punctuation():
    assert highlighted("non«sense» and «,» more") == "non«`sense`» and «`,`» more"


def test_markup_in_corpus_text_stays_literal():
    assert highlighted("[a](b) <b>«x`y»") == "\\[a\\]\\(b\\) \\<b\\>«`x'y`»"


def test_a_histogram_of_nothing_and_of_one_value_is_still_a_picture():
    for values in ([], [0.5], [0.0, 0.0]):
        assert "data:image/png" in histogram_image(pl.Series(values, dtype=pl.Float32), "x", "y").value
