import polars as pl
import pytest

from scopeatlas.atlas.rows import PUNCTUATION, SNIPPETS, TRIGGER_TOKENS, described_by, feature_rows, sites_text, word_around
from scopeatlas.atlas.tables import FEATURE_ROW, SCORES, checked_rows
from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.errors import AtlasError
from scopeatlas.hypotheses.labels import LABEL_SCHEMA
from scopeatlas.labels.stage import LabelSettings, label_features
from scopeatlas.mining.examples import mine_examples, read_examples
from scopeatlas.mining.windows import mark
from scopeatlas.scoring.stage import ScoreSettings, score_labels
from scopeatlas.scoring.table import published
from scopeatlas.subject.sites import parse_hook_points
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import WIDTH, Stored
from tests.planted import DEAD, DENSE, EXACT, NO_REPORT, RANDOM, RARE, TOPIC, planted_chain


class Finished:
    """The finished stages of one SAE, and the rows made of them."""

    def __init__(self, stored: Stored, subject):
        self.stored, self.subject = stored, subject
        there = stored.store, stored.corpus, stored.entry, subject
        self.examples = mine_examples(*there)[0]
        self.labels = label_features(*there, settings=LabelSettings())[0].current
        tests = score_labels(*there, labels=LabelSettings(), settings=ScoreSettings())[0].table
        self.scores = published(tests, self.labels)
        self.windows = read_examples(self.examples.examples)

    def rows(self, labels: pl.DataFrame | None = None, scores: pl.DataFrame | None = None) -> pl.DataFrame:
        entry = self.stored.entry
        labels, scores = (self.labels if labels is None else labels), (self.scores if scores is None else scores)
        dictionary = open_dictionary(entry)
        return feature_rows(entry, dictionary, self.stored.corpus.id, self.subject, self.examples, labels, scores)

    def top(self, feature: int, split: str) -> list[str]:
        """A feature's top windows of one split as lines, the strongest first."""
        is_one = (pl.col("feature") == feature) & (pl.col("split") == split) & (pl.col("kind") == "top")
        found = self.windows.filter(is_one).sort("rank").select("texts", "activations")
        return [mark(texts, activations) for texts, activations in found.iter_rows()]


@pytest.fixture(scope="module")
def planted(medium, subject, tmp_path_factory) -> Finished:
    """Features whose firings are known."""
    return Finished(planted_chain(medium, subject, tmp_path_factory.mktemp("planted") / "store"), subject)


@pytest.fixture(scope="module")
def real(small, subject) -> Finished:
    """A small SAE on a few real articles."""
    return Finished(small, subject)


@pytest.mark.parametrize(
    ("tokens", "at", "word"),
    [
        ([" the", " ferry", " left"], 1, "ferry"),
        ([" Kön", "igs", "berg", " fell"], 0, "Königsberg"),
        ([" Kön", "igs", "berg", " fell"], 1, "Königsberg"),
        ([" Kön", "igs", "berg", " fell"], 2, "Königsberg"),
        (["Kön", "igs"], 1, "Königs"),
        ([" in", " 1", "9", "4", "5", "."], 3, "1945"),
        ([" it", "'", "s"], 0, "it"),
        ([" it", "'", "s"], 1, ""),
        ([" it", "'", "s"], 2, "s"),
        ([" left", ".", " Then"], 1, ""),
        ([" (", "see", ")"], 1, "see"),
        ([" well", "-", "known"], 2, "known"),
        ([" ferry", "\n\n", "The"], 2, "The"),
        ([" ferry", "\n\n", "The"], 1, ""),
        (['"word'], 0, "word"),
        ([" ", "word"], 1, "word"),
        ([" a", "", "b"], 1, ""),
    ],
)
def test_the_word_around_a_token_is_whole_and_bare(tokens, at, word):
    assert word_around(tokens, at) == word


def test_a_real_run_gives_one_row_per_feature(real):
    rows = real.rows()
    assert rows["feature"].to_list() == list(range(WIDTH))
    assert rows.schema == FEATURE_ROW and rows["key"].is_unique().all()
    assert set(rows["sae"]) == {real.stored.entry.key} and set(rows["corpus"]) == {real.stored.corpus.id}


def test_the_rows_of_a_real_run_are_fit_to_be_published(real):
    assert checked_rows(real.rows()).equals(real.rows())


def test_a_row_names_its_site_and_promoted_tokens(real):
    row = real.rows().row(7, named=True)
    features = real.examples.features.row(7, named=True)
    assert (row["kind"], row["layer"], row["index"], row["feature"]) == ("sae", 1, 7, 7)
    assert row["site"] == row["site_out"] == "model.layers.1.output" and len(row["decoder_norms"]) == 1
    assert row["key"] == f"{real.stored.entry.key}/7"
    assert row["promoted"] == token_texts(real.subject.tokenizer, features["promoted"][:5])
    assert row["suppressed"] == token_texts(real.subject.tokenizer, features["suppressed"][:5])


@pytest.mark.parametrize(
    "hook", ["model.layers.3.output", "model.layers.{5,9}.mlp.input", "blocks.{0,1,2}.hook_mlp_out", "hook_embed"]
)
def test_several_sites_are_one_hook_string(hook):
    sites = parse_hook_points(hook)
    assert parse_hook_points(sites_text(sites)) == sites


def test_rows_of_a_key_that_is_not_their_name_are_refused(real):
    rows = real.rows()
    renamed = rows.with_columns(kind=pl.lit("clt"))
    with pytest.raises(AtlasError, match=f"{rows['key'][0]}' should be {rows['sae'][0]}/1.0"):
        checked_rows(renamed)
    named = renamed.with_columns(key=pl.format("{}/1.{}", "sae", "feature"))
    assert checked_rows(named).equals(named)


@pytest.mark.parametrize(("feature", "status"), [(DEAD, "dead"), (RARE, "rare")])
def test_features_without_evidence_have_no_search_text(planted, feature, status):
    row = planted.rows().row(feature, named=True)
    assert (row["status"], row["search_text"], row["label"], row["method"]) == (status, "", "", "")


@pytest.mark.parametrize("status", ["dead", "rare", "too_few_documents", "incoherent", "dense"])
def test_whether_a_refused_feature_has_a_search_text_is_a_matter_of_its_evidence(planted, status):
    is_random = pl.col("feature") == RANDOM
    labels = planted.labels.with_columns(status=pl.when(is_random).then(pl.lit(status)).otherwise("status"))
    row = planted.rows(labels).row(RANDOM, named=True)
    assert bool(row["search_text"]) == bool(row["example_text"]) == (status in {"incoherent", "dense"})


def test_a_search_text_holds_the_label_and_the_words_the_feature_fires_on(planted):
    row = planted.rows().row(EXACT, named=True)
    assert row["search_text"].startswith("the: the")
    dense = planted.rows().row(DENSE, named=True)
    assert dense["label"] == "" and dense["search_text"]


def test_trigger_tokens_are_those_at_the_strongest_peaks(planted):
    rows = planted.rows()
    assert rows.row(EXACT, named=True)["trigger_tokens"] == ["the"]
    assert rows["trigger_tokens"].list.len().max() <= TRIGGER_TOKENS
    assert rows.row(DEAD, named=True)["trigger_tokens"] == []


def test_snippets_are_the_strongest_windows_of_report_documents(planted):
    rows = planted.rows()
    for feature in (EXACT, TOPIC, RANDOM, DENSE):
        assert rows.row(feature, named=True)["snippets"] == planted.top(feature, "report")[:SNIPPETS]


def test_where_report_documents_have_none_snippets_are_of_select_documents(planted):
    assert planted.top(NO_REPORT, "report") == []
    assert planted.rows().row(NO_REPORT, named=True)["snippets"] == planted.top(NO_REPORT, "select")[:SNIPPETS]


def test_where_only_explain_documents_have_windows_they_are_shown(planted):
    assert planted.rows().row(RARE, named=True)["snippets"] == planted.top(RARE, "explain")[:SNIPPETS]


def test_trigger_shares_are_of_the_strongest_peaks(planted):
    rows = planted.rows()
    assert rows.row(EXACT, named=True)["trigger_shares"] == [1.0]
    strongest = planted.windows.filter(pl.col("feature") == RANDOM, pl.col("kind") == "top")
    strongest = strongest.sort("peak", "context_id", descending=[True, False]).head(10)
    at_peaks = [texts[at].strip() or texts[at] for texts, at in strongest.select("texts", "peak_at").iter_rows()]
    row = rows.row(RANDOM, named=True)
    expected = [at_peaks.count(token) / len(at_peaks) for token in row["trigger_tokens"]]
    assert row["trigger_shares"] == pytest.approx(expected) and len(expected) > 1


def test_an_example_text_is_the_snippets_without_their_marks(planted):
    row = planted.rows().row(EXACT, named=True)
    assert row["example_text"] == "\n".join(row["snippets"]).replace("«", "").replace("»", "") != ""


def test_snippets_mark_the_tokens_that_fire(planted):
    assert all("«the»" in snippet for snippet in planted.rows().row(EXACT, named=True)["snippets"])


def test_scores_stand_beside_the_rules_they_are_of(planted):
    rows = planted.rows()
    scored = planted.scores.filter(pl.col("f1").is_not_null())
    found = rows.filter(pl.col("f1").is_not_null())
    assert found["feature"].to_list() == scored["feature"].to_list() and len(found)
    for name in ("scorer", "unit", *SCORES):
        assert found[name].to_list() == scored[name].to_list()


def test_a_label_that_nothing_has_tested_has_no_score(planted):
    row = planted.rows(scores=planted.scores.filter(pl.col("feature") != EXACT)).row(EXACT, named=True)
    assert (row["method"], row["scorer"]) == ("rule", "")
    assert all(row[name] is None for name in SCORES)


@pytest.mark.parametrize("status", ["falsified", "unclear", "error"])
def test_a_label_that_does_not_stand_is_not_shown_as_one(planted, status):
    changed = pl.when(pl.col("feature") == EXACT).then(pl.lit(status)).otherwise("status")
    row = planted.rows(planted.labels.with_columns(status=changed)).row(EXACT, named=True)
    assert (row["status"], row["method"], row["label_id"], row["label"]) == (status, "", "", "")


def test_refused_scores_are_null(planted):
    row = planted.rows().row(NO_REPORT, named=True)
    assert (row["status"], row["report_documents"]) == ("ok", 0)
    assert all(row[name] is None for name in SCORES)


def test_an_sae_without_a_single_rule_has_rows_all_the_same(planted):
    refused = planted.labels.with_columns(status=pl.lit("incoherent"), label=pl.lit(""), rule=pl.lit(""))
    rows = planted.rows(refused, planted.scores.clear())
    assert len(checked_rows(rows)) == WIDTH and set(rows["method"]) == {""}
    assert dict(refused.schema) == LABEL_SCHEMA


def test_words_lose_all_punctuation_at_their_ends():
    assert word_around([f"{PUNCTUATION}word{PUNCTUATION}"], 0) == "word"


def test_a_feature_is_described_by_the_words_it_repeatedly_fires_on():
    peaks = [
        ([" in", " March", ",", " 1990"], 1),
        ([" last", " April"], 1),
        ([" by", " March"], 1),
        ([" on", " April"], 1),
        ([" a", " cat"], 1),
    ]
    assert described_by(peaks) == ["march", "april"]


def test_a_feature_that_fires_here_and_there_keeps_its_stop_words():
    assert described_by([([" the"], 0), ([" war"], 0), ([" of"], 0), ([" ets"], 0)]) == ["the", "war", "of", "ets"]


def test_a_content_word_that_most_windows_share_describes_the_feature_too():
    peaks = [([" the", " acid", f" x{i}"], 0) for i in range(5)]
    assert described_by(peaks) == ["the", "acid"]


def test_words_shared_by_as_many_windows_come_in_a_fixed_order():
    peaks = [([" the", " links", " external", " acid"], 0) for _ in range(5)]
    assert described_by(peaks) == ["the", "acid", "external", "links"]


def test_a_piece_of_many_words_is_described_by_itself():
    peaks = [([" al", "ga"], 0), ([" al", "bedo"], 0), ([" Al", "kali"], 0)]
    assert described_by(peaks) == ["al"]
