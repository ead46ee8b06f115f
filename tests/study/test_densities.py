"""The spread of an SAE's densities."""

import numpy as np
import polars as pl
import pytest

from scopeatlas.plots.drawing import png
from scopeatlas.study.densities import densities


@pytest.fixture
def rows(rng) -> pl.DataFrame:
    density = np.where(rng.random(400) < 0.1, 0.0, 10 ** rng.uniform(-5, -0.5, 400)).astype(np.float32)
    label = np.where((rng.random(400) < 0.3) & (density > 0), "a label", "")
    status = np.where(density == 0, "dead", np.where(label != "", "ok", "incoherent"))
    return pl.DataFrame({"density": density, "label": label, "status": status})


def test_every_feature_is_counted_once_in_the_bin_of_its_density(rows):
    found = densities("toy", rows)
    for low, high, features, labelled in found.bins.iter_rows():
        inside = rows.filter((pl.col("density") >= low * (1 - 1e-9)) & (pl.col("density") < high * (1 - 1e-9)))
        assert (features, labelled) == (inside.height, (inside["label"] != "").sum())
    assert found.features == 400 and found.silent == (rows["density"] == 0).sum()


def test_bins_leave_no_gap_and_are_quarters_of_a_decade(rows):
    bins = densities("toy", rows).bins
    assert bins["high"].to_numpy()[:-1] == pytest.approx(bins["low"].to_numpy()[1:])
    assert np.log10(bins["high"] / bins["low"]).to_numpy() == pytest.approx(0.25)


def test_statuses_are_counted_most_frequent_first(rows):
    found = densities("toy", rows).statuses
    assert dict(found.iter_rows()) == dict(rows["status"].value_counts().iter_rows())
    assert found["features"].is_sorted(descending=True)


def test_an_sae_that_never_fired_has_no_bins_and_can_be_drawn(rows):
    found = densities("toy", rows.with_columns(density=pl.lit(0.0, dtype=pl.Float32)))
    assert (found.bins.height, found.silent, found.features) == (0, 400, 400)
    assert png(found.plot()).startswith(b"\x89PNG")


def test_the_picture_and_the_page_say_the_same(rows):
    found = densities("<b>toy</b>", rows)
    page = found._repr_html_()
    assert png(found.plot()).startswith(b"\x89PNG") and "<b>" not in page and "&lt;b&gt;toy" in page
    assert found.as_dict()["features"] == 400
