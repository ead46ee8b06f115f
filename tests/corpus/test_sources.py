import json
from dataclasses import replace
from itertools import islice

import polars as pl
import pytest

from scopeatlas.corpus.documents import make_conversation, make_document
from scopeatlas.corpus.sources import Source, open_source, source_fingerprint
from scopeatlas.errors import CorpusError

TEXTS = [f"text number {i} " + "word " * i for i in range(1, 7)]


@pytest.fixture
def folder(tmp_path):
    """Six texts, two each as parquet, jsonl and txt."""
    pl.DataFrame({"text": [TEXTS[0], None, TEXTS[1]], "other": [1, 2, 3]}).write_parquet(tmp_path / "a.parquet")
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS[2:4])
    (tmp_path / "b.jsonl").write_text(f"{lines}\n\n", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text(TEXTS[4], encoding="utf-8")
    (tmp_path / "d.txt").write_text(TEXTS[5], encoding="utf-8")
    return tmp_path


def files(*paths: object, **settings: object) -> Source:
    return replace(Source("files", tuple(map(str, paths)), min_characters=1), **settings)


def texts_of(source: Source) -> list[str]:
    return [document.text for document in open_source(source)]


def test_globs_of_parquet_jsonl_and_txt_are_read(folder):
    found = texts_of(files(folder / "*.parquet", folder / "*.jsonl", folder / "**" / "*.txt"))
    assert sorted(found) == sorted(text.strip() for text in TEXTS)


def test_lines_without_a_text_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "one"}\n', encoding="utf-8")
    assert texts_of(files(tmp_path / "a.jsonl")) == ["one"]


def test_a_file_that_two_globs_match_is_read_once(folder):
    assert len(texts_of(files(folder / "*.txt", folder / "d.*"))) == 1


def test_the_column_of_the_text_may_have_another_name(tmp_path):
    pl.DataFrame({"body": ["one", "two"]}).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}', encoding="utf-8")
    assert texts_of(files(tmp_path / "*", text_field="body")) == ["one", "two", "three"]


TALK = [{"role": "user", "content": " What is it? "}, {"role": "assistant", "content": "A river."}]


@pytest.mark.parametrize("column", ["messages", "conversation"])
def test_rows_of_turns_are_conversations(tmp_path, column):
    pl.DataFrame({column: [TALK, None, TALK[:1]]}).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({column: TALK}) + "\n" + json.dumps({column: []}), encoding="utf-8")
    found = list(open_source(files(tmp_path / "*", text_field=column)))
    turns = (("user", "What is it?"), ("assistant", "A river."))
    assert [document.turns for document in found] == [turns, turns[:1], turns]
    assert found[0].text == "user: What is it?\n\nassistant: A river."
    assert found[0].id == found[2].id != found[1].id


def test_who_says_what_makes_a_conversation_another():
    one = make_conversation([("user", "a"), ("assistant", "b")], source="s")
    other = make_conversation([("assistant", "a"), ("user", "b")], source="s")
    assert one.id != other.id != make_document(one.text, source="s").id


@pytest.mark.parametrize(
    "value", [[{"from": "user", "value": "x"}], [{"role": "user", "content": [{"text": "x"}]}], [1], {"a": 1}, 7]
)
def test_a_column_that_holds_neither_texts_nor_turns_is_an_error(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": value}), encoding="utf-8")
    with pytest.raises(CorpusError, match="a.jsonl: 'messages' holds neither text nor a list of {role, content}"):
        texts_of(files(tmp_path / "a.jsonl", text_field="messages"))


def test_short_documents_are_left_out_and_reading_stops_at_the_cap(folder):
    everything = files(folder / "**" / "*.*")
    assert len(texts_of(replace(everything, min_characters=len(TEXTS[3]) - 1))) == 3
    assert len(texts_of(replace(everything, max_documents=2))) == 2


def test_a_document_knows_its_file(folder):
    document = next(open_source(files(folder / "d.txt")))
    assert document.source == "d.txt" and document.metadata == {"file": "d.txt"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"other": "x"}', "a.jsonl: cannot read a 'text' column"),
        ("a.jsonl", "{", "a.jsonl: cannot read"),
        ("a.jsonl", "[]", "a.jsonl: cannot read"),
        ("a.parquet", "no parquet", "a.parquet: cannot read"),
        ("a.csv", "text", "a corpus file is .parquet, .jsonl, .ndjson or .txt"),
        ("a.txt", b"\xff\xfe\xff", "a.txt: cannot read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError, match=message):
        texts_of(files(tmp_path / name))


def test_globs_that_match_nothing_are_an_error(tmp_path):
    with pytest.raises(CorpusError, match=r"no file matches .*\*.txt; set corpus.paths"):
        texts_of(files(tmp_path / "*.txt"))


def test_an_unknown_source_is_an_error_that_lists_the_known():
    with pytest.raises(CorpusError, match="unknown corpus source 'web'; use one of wikipedia-sample, files, huggingface"):
        texts_of(Source("web"))  # type: ignore[arg-type]


@pytest.fixture
def dataset(folder, tmp_path):
    """A Hub dataset as a local folder: parquet files by split."""
    pl.DataFrame({"text": TEXTS, "label": range(6)}).write_parquet(tmp_path / "train-00000-of-00001.parquet")
    home = tmp_path / "dataset"
    (home / "data").mkdir(parents=True)
    pl.DataFrame({"text": TEXTS[:4]}).write_parquet(home / "data" / "train-00000-of-00001.parquet")
    pl.DataFrame({"text": TEXTS[4:]}).write_parquet(home / "data" / "test-00000-of-00001.parquet")
    return home


def test_a_hugging_face_dataset_is_streamed_by_split(dataset):
    source = Source("huggingface", dataset=str(dataset), min_characters=1)
    assert texts_of(source) == [text.strip() for text in TEXTS[:4]]
    assert texts_of(replace(source, split="test")) == [text.strip() for text in TEXTS[4:]]


def test_a_streamed_dataset_is_read_no_further_than_the_cap(dataset):
    pl.DataFrame({"text": [f"{i} text" for i in range(5000)]}).write_parquet(dataset / "data" / "train-00000-of-00001.parquet")
    source = Source("huggingface", dataset=str(dataset), min_characters=1, max_documents=3)
    assert texts_of(source) == ["0 text", "1 text", "2 text"]


def test_a_missing_text_field_lists_the_fields_there_are(dataset):
    with pytest.raises(CorpusError, match="has no field 'body'; it has text: set corpus.text_field"):
        texts_of(Source("huggingface", dataset=str(dataset), text_field="body"))


def test_a_dataset_that_cannot_be_reached_is_named(tmp_path, dataset):
    with pytest.raises(CorpusError, match="cannot stream dataset .*nowhere.*check its name, its split and the network"):
        texts_of(Source("huggingface", dataset=str(tmp_path / "nowhere")))
    with pytest.raises(CorpusError, match="cannot stream dataset"):
        texts_of(Source("huggingface", dataset=str(dataset), split="validation"))


def test_the_wikipedia_sample_needs_no_network_and_holds_articles_without_markup():
    articles = list(islice(open_source(Source("wikipedia-sample")), 8))
    assert all(len(a.text) >= 500 and a.metadata["title"] for a in articles)
    assert not any(mark in a.text for a in articles for mark in ("[[", "{{", "'''", "<ref"))
    assert len({a.id for a in articles}) == 8


def test_a_file_that_changes_changes_the_fingerprint_of_its_source(folder):
    source = files(folder / "*.txt")
    before = source_fingerprint(source)
    assert before == source_fingerprint(source)
    (folder / "e.txt").write_text("more")
    assert before != source_fingerprint(source)


def test_a_dataset_is_pinned_by_its_revision():
    source = Source("huggingface", dataset="a/b", revision="1")
    assert source_fingerprint(source) != source_fingerprint(replace(source, revision="2"))
    assert source_fingerprint(Source("wikipedia-sample")) == source_fingerprint(Source("wikipedia-sample"))
