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
        (Rule("shape", ("capitalised",)), {0, 4}),
        (Rule("shape", ("stop", "alphanumeric")), {6, 7}),
        (Rule("skip", (" the",)), {5, 7}),
        (Rule("previous_shape", ("capitalised",)), {1, 5}),
        (Rule("next_shape", ("stop",)), {5}),
        (Rule("near", ("walking",)), set(range(2, 8))),
        (Rule("position", ("1", "3")), {0, 2}),
        (Rule("and", parts=(Rule("word", ("the",)), Rule("next_shape", ("stop",)))), {5}),
        (Rule("or", parts=(Rule("prefix", ("wal",)), Rule("position", ("1",)))), {0, 1, 4}),
        (Rule("and_not", parts=(Rule("word", ("the",)), Rule("shape", ("capitalised",)))), {3, 5}),
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
        (Rule("shape", ("digits", "closing")), "a number or a closing bracket", "number / closing bracket"),
        (Rule("bigram", (f"in{PAIR}the", f"of{PAIR}the")), '"the" after "in" or "of"', "in the, of the"),
        (Rule("bigram", (f"\n{PAIR}==",)), r'"==" after "\n"', r"\n =="),
        (Rule("skip", (" of",)), 'a token two after " of"', "two after of"),
        (Rule("next_shape", ("digits",)), "a token before a number", "before a number"),
        (Rule("near", ("river",)), 'a token among the 8 after the word "river"', "soon after river"),
        (Rule("format", ("quotes",)), "a token inside quotation marks", "inside quotation marks"),
        (Rule("position", ("2", "1", "3")), "a token among the first 3 of a context", "among the first 3 of a context"),
        (Rule("position", ("12", "9")), "a token at position 9 or 12 of a context", "at position 9 or 12 of a context"),
        (Rule("token", tuple("abcdef")), 'the token "a", "b", "c", "d", "e" or "f"', "a, b, c, d, …"),
        (
            Rule("and", parts=(Rule("previous", (" of",)), Rule("shape", ("capitalised",)))),
            'a capitalised word after " of"',
            "capitalised word after of",
        ),
        (
            Rule("and", parts=(Rule("format", ("list",)), Rule("previous_shape", ("dash",)))),
            "a token in an item of a list and after a dash",
            "in an item of a list after a dash",
        ),
        (
            Rule("and", parts=(Rule("suffix", ("ing",)), Rule("shape", ("lower",)))),
            'words that end in "ing", where that is a lowercase word',
            "-ing & lowercase word",
        ),
        (
            Rule("or", parts=(Rule("word", ("is",)), Rule("next", (" of",)))),
            'the word "is", in any case, or the token before " of"',
            "is or before of",
        ),
        (
            Rule("and_not", parts=(Rule("word", ("is",)), Rule("format", ("brackets",)))),
            'the word "is", in any case, but not inside brackets',
            "is, not inside brackets",
        ),
    ],
)
def test_a_rule_reads_as_a_person_would_say_it(rule, sentence, short):
    assert (rule.sentence(), rule.short()) == (sentence, short)


def test_a_rule_survives_json():
    rule = Rule("bigram", (f' "Ä\n{PAIR} ü', f"a{PAIR}b"))
    both = Rule("and_not", parts=(rule, Rule("format", ("line", "quotes"))))
    assert Rule.from_json(rule.to_json()) == rule and Rule.from_json(both.to_json()) == both


@pytest.mark.parametrize(
    ("kind", "keys", "parts"),
    [
        ("and", (), None),
        ("and", ("a",), (Rule("word", ("a",)), Rule("word", ("b",)))),
        ("word", (), (Rule("word", ("a",)), Rule("word", ("b",)))),
        ("or", (), (Rule("topic", ("a",)), Rule("word", ("b",)))),
        ("or", (), (Rule("or", parts=(Rule("word", ("a",)), Rule("word", ("b",)))), Rule("word", ("c",)))),
        ("shape", ("round",), None),
        ("format", ("italics",), None),
    ],
)
def test_a_rule_that_cannot_be_is_refused(kind, keys, parts):
    with pytest.raises(ValueError, match="rule|composition"):
        Rule(kind, keys, parts)


def test_a_token_that_does_not_count_is_matched_by_nothing_and_is_no_neighbour():
    tokens = [" of", "", " the"]
    silent = [
        Rule("previous", (" of", "")),
        Rule("token", ("",)),
        Rule("bigram", (f"of{PAIR}the",)),
        Rule("next_shape", ("space",)),
    ]
    assert not any(any(rule.matches(tokens)) for rule in silent)
    assert Rule("position", ("2", "3")).matches(tokens) == [False, False, True]
    assert Rule("skip", (" of",)).matches(tokens) == [False, False, True]


def test_only_topics_are_tested_on_contexts():
    assert Rule("topic", ("a",)).unit == "context" and Rule("word", ("a",)).unit == "token"


def test_labels_make_a_table_sorted_by_feature_and_method():
    table = label_table([Label(3, "rule", "dead"), Label(1, "rule", "ok", "x", select_score=0.5), Label(1, "llm", "unclear")])
    assert table.select("feature", "method", "status").rows() == [(1, "llm", "unclear"), (1, "rule", "ok"), (3, "rule", "dead")]
    assert dict(table.schema) == LABEL_SCHEMA and label_table([]).is_empty()
