import pytest

from scopeatlas.hypotheses.labels import LABEL_SCHEMA, Label, label_table
from scopeatlas.hypotheses.rules import PAIR, Rule

TOKENS = ["The", " walking", " dog", " the", " Walk", " the", ".", " x1ing"]


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        (Rule("token", (" the",)), {3, 5}),
        (Rule("token", (" the", "The")), {0, 3, 5}),
        (Rule("word", ("the",)), {0, 3, 5}),
        (Rule("word", ("The",)), set()),
        (Rule("previous", (" the",)), {4, 6}),
        (Rule("next", (" the",)), {2, 4}),
        (Rule("next", ("",)), set()),
        (Rule("previous", ("",)), set()),
        (Rule("bigram", (f"the{PAIR}.",)), {6}),
        (Rule("bigram", (f"{PAIR}the",)), set()),
        (Rule("prefix", ("walk",)), {1}),
        (Rule("prefix", ("wal",)), {1, 4}),
        (Rule("suffix", ("ing",)), {1}),
        (Rule("suffix", ("he", "og")), {0, 2, 3, 5}),
        (Rule("topic", ("dog", "cat")), set(range(8))),
        (Rule("topic", ("cat",)), set()),
    ],
)
def test_a_rule_matches_the_tokens_that_it_says(rule, matched):
    assert {i for i, matches in enumerate(rule.matches(TOKENS)) if matches} == matched


@pytest.mark.parametrize(
    ("rule", "sentence", "short"),
    [
        (Rule("token", (" the",)), 'the token " the"', "the"),
        (Rule("token", ("\n",)), r'the token "\n"', r"\n"),
        (Rule("word", ("a", "b", "c")), 'the words "a", "b" or "c", in any case', "a, b, c"),
        (Rule("previous", (" of",)), 'the token after " of"', "after of"),
        (Rule("next", (" of",)), 'the token before " of"', "before of"),
        (Rule("bigram", (f"new{PAIR}york",)), '"york" after "new"', "new york"),
        (Rule("prefix", ("un",)), 'words that begin with "un"', "un-"),
        (Rule("suffix", ("ing", "ed")), 'words that end in "ing" or "ed"', "-ing / -ed"),
        (Rule("topic", ("river", "lake")), "texts about river, lake", "about river, lake"),
    ],
)
def test_a_rule_reads_as_a_person_would_say_it(rule, sentence, short):
    assert (rule.sentence(), rule.short()) == (sentence, short)


def test_a_rule_survives_json():
    rule = Rule("bigram", (f' "Ä\n{PAIR} ü', f"a{PAIR}b"))
    assert Rule.from_json(rule.to_json()) == rule


def test_only_topics_are_tested_on_contexts():
    assert Rule("topic", ("a",)).unit == "context" and Rule("word", ("a",)).unit == "token"


def test_labels_make_a_table_sorted_by_feature_and_method():
    table = label_table([Label(3, "rule", "dead"), Label(1, "rule", "ok", "x", select_score=0.5), Label(1, "llm", "unclear")])
    assert table.select("feature", "method", "status").rows() == [(1, "llm", "unclear"), (1, "rule", "ok"), (3, "rule", "dead")]
    assert dict(table.schema) == LABEL_SCHEMA and label_table([]).is_empty()
