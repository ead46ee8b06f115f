"""The leak check finds every document that is on both sides, whatever put it there."""

from dataclasses import replace

import polars as pl
import pytest

from scopeatlas.corpus.build import Corpus
from scopeatlas.corpus.leakage import find_leaks


def corpus_of(*rows: tuple[str, str, str]) -> Corpus:
    corpus = Corpus("corpus", None, (), {})  # type: ignore[arg-type]
    corpus.__dict__["documents"] = pl.DataFrame(rows, schema=["document_id", "split", "text"], orient="row")
    return corpus


CLEAN = (("a", "explain", "one text"), ("b", "select", "another text"), ("c", "report", "a third text"))


def test_disjoint_documents_are_no_leak():
    leaks = find_leaks(corpus_of(*CLEAN), [("a", "explain"), ("b", "select")])
    assert not leaks.found and leaks.documents == {"explain": 1, "select": 1, "report": 1}
    assert "1 explain, 1 select, 1 report" in str(leaks)


@pytest.mark.parametrize("again", ["one text", "One  Text!", "\none\ntext\n"])
def test_the_same_text_in_two_splits_is_one(again):
    assert find_leaks(corpus_of(*CLEAN, ("d", "report", again)), []).shared == ("a", "d")


def test_the_same_text_twice_in_one_split_is_none():
    assert not find_leaks(corpus_of(*CLEAN, ("d", "explain", "one text")), []).found


def test_one_document_in_two_splits_is_one():
    assert find_leaks(corpus_of(*CLEAN, ("a", "report", "other words")), []).shared == ("a",)


@pytest.mark.parametrize("document", ["c", "unknown"])
def test_a_document_read_as_of_another_split_is_one(document):
    leaks = find_leaks(corpus_of(*CLEAN), [(document, "explain")])
    assert leaks.misplaced == (document,) and document in str(leaks)


def test_the_real_corpus_has_none(medium):
    read = medium.corpus.documents.select("document_id", "split").rows()
    assert not find_leaks(medium.corpus, read).found


def test_a_real_document_copied_into_another_split_is_found(medium):
    documents = medium.corpus.documents
    copied = documents.filter(pl.col("split") == "explain").head(1).with_columns(split=pl.lit("report"))
    corpus = replace(medium.corpus)
    corpus.__dict__["documents"] = pl.concat([documents, copied])
    assert find_leaks(corpus, []).shared == (copied["document_id"][0],)
