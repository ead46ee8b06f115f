"""People's own labels: written down for good, one of each author standing, taken back on request."""

import pytest

from scopeatlas.errors import ConfigError, StoreError, UnknownSaeError
from scopeatlas.labels.annotations import annotate, imported_label, read_annotations, retract, take_in
from scopeatlas.storage.store import Store

SAE, CORPUS = "toy.one", "small-1"


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path)
    store.register(SAE, {"key": SAE})
    return store


@pytest.fixture
def path(store):
    return store.stage(SAE, CORPUS, "labels").root / "annotations.jsonl"


def say(store: Store, feature: int, reads: str, author: str = "ann", **more):
    return annotate(store, CORPUS, SAE, feature, reads=reads, author=author, **more)


def test_what_is_written_down_is_read_back_as_it_was(store):
    made = say(store, 7, "Names of rivers,\n such as Danube.", writes="river banks")
    assert read_annotations(store, CORPUS, SAE) == [made]
    assert (made.method, made.status, made.version) == ("human", "ok", "human:ann")
    assert (made.reads, made.writes, made.label) == (
        "Names of rivers, such as Danube.",
        "river banks",
        "Names of rivers, such as Danube.",
    )


def test_a_short_label_is_the_first_eight_words_unless_one_is_given(store):
    assert say(store, 1, "one two three four five six seven eight nine").label == "one two three four five six seven eight"
    assert say(store, 1, "a long explanation of it", label="rivers").label == "rivers"


def test_several_authors_each_have_one_label_of_a_feature(store):
    say(store, 2, "old", "ann")
    others = [say(store, 2, "bob's", "bob"), say(store, 1, "another feature", "ann")]
    newest = say(store, 2, "new", "ann")
    assert read_annotations(store, CORPUS, SAE) == [others[1], newest, others[0]]


def test_what_is_taken_back_no_longer_stands_and_may_be_said_anew(store):
    first = say(store, 2, "old")
    assert retract(store, CORPUS, SAE, 2, author="ann") == first
    assert read_annotations(store, CORPUS, SAE) == []
    again = say(store, 2, "old")
    assert read_annotations(store, CORPUS, SAE) == [again] and again.label_id == first.label_id


def test_only_what_stands_can_be_taken_back(store):
    say(store, 2, "ann's")
    with pytest.raises(ConfigError, match="bob has no annotation of feature 2"):
        retract(store, CORPUS, SAE, 2, author="bob")


def test_the_file_is_only_ever_added_to(store, path):
    say(store, 2, "one")
    before = path.read_bytes()
    say(store, 2, "two")
    retract(store, CORPUS, SAE, 2, author="ann")
    assert path.read_bytes().startswith(before) and len(path.read_text("ascii").splitlines()) == 3


def test_a_line_that_a_crash_cut_short_is_dropped(store, path):
    kept = say(store, 2, "one")
    with path.open("ab") as stream:
        stream.write(b'{"label": {"feature": 3')
    assert read_annotations(store, CORPUS, SAE) == [kept]
    added = say(store, 4, "two")
    assert read_annotations(store, CORPUS, SAE) == [kept, added]


def test_a_damaged_line_is_named(store, path):
    say(store, 2, "one")
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(StoreError, match="line 1 of .*annotations.jsonl"):
        read_annotations(store, CORPUS, SAE)


@pytest.mark.parametrize("reads", ["", "  \n\t", "\x00\u2028"])
def test_an_annotation_that_says_nothing_is_refused(store, path, reads):
    with pytest.raises(ConfigError, match="says nothing"):
        say(store, 2, reads)
    assert not path.exists()


def test_a_text_beyond_all_measure_is_refused(store):
    with pytest.raises(ConfigError, match="at most 2000"):
        say(store, 2, "x" * 2001)


def test_half_a_surrogate_pair_becomes_a_question_mark(store):
    made = say(store, 2, "a\ud800b", "ann\udfff")
    assert (made.reads, made.version) == ("a?b", "human:ann?")
    assert retract(store, CORPUS, SAE, 2, author="ann\udfff") == made


def test_of_labels_taken_in_together_the_last_of_a_version_stands(store):
    labels = [imported_label(2, text, version="imported:x:1", provenance={"x": "\ud800"}) for text in ("one", "two")]
    assert take_in(store, CORPUS, SAE, labels) == [labels[1]]
    assert take_in(store, CORPUS, SAE, labels) == []
    assert read_annotations(store, CORPUS, SAE) == [labels[1]] and labels[1].provenance == '{"x": "?"}'


def test_an_sae_that_nobody_knows_cannot_be_annotated(store):
    with pytest.raises(UnknownSaeError):
        annotate(store, CORPUS, "toy.two", 2, reads="x")
