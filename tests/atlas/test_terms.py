import pytest

from scopeatlas.atlas.terms import PROMOTED, TRIGGER, coverage, matches, query_terms, terms_of, token_term, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Dogs, cats & the 3rd bus", ["dog", "cat", "the", "3rd", "bus"]),
        ("cities; classes; species", ["city", "classe", "specy"]),
        ("Königsberg's ÉCOLES", ["königsberg", "s", "école"]),
        ("gas bus his", ["gas", "bus", "his"]),
        ("snake_case (x+y)", ["snake", "case", "x", "y"]),
        (" \n«» ", []),
    ],
)
def test_words_have_neither_case_nor_plural(text, words):
    assert words_of(text) == words


def test_a_token_is_one_term_whatever_is_in_it():
    terms = terms_of("", ["\n\n", " a b", "%"], ["«"], True).split()
    assert [term for term in terms if ":" in term] == [
        *(token_term(TRIGGER, token) for token in ("\n\n", "a b", "%")),
        token_term(PROMOTED, "«"),
    ]


def test_case_and_surrounding_space_of_a_token_do_not_matter_and_all_else_does():
    same = {token_term(TRIGGER, token) for token in (" Paris", "paris", "PARIS ")}
    other = {token_term(TRIGGER, token) for token in ("pari", "paris.", "\n", "\n\n", " ")} | {token_term(PROMOTED, "paris")}
    assert len(same) == 1 and len(other) == 6 and not same & other


def test_without_evidence_a_feature_is_found_by_what_it_promotes_alone():
    assert terms_of("a label", ["x"], [" Paris"], False) == token_term(PROMOTED, "Paris")


def test_a_query_s_words_come_back_as_they_were_written():
    row = {"label": "a war", "trigger_tokens": ["Battles"], "promoted": [" Wars", "peace"]}
    terms = query_terms("Wars and BATTLE and Kings")
    assert matches(terms, row) == {"label": ("Wars",), "trigger_tokens": ("BATTLE",), "promoted": ("Wars",)}


def test_coverage_is_of_the_words_that_say_something():
    row = {"label": "the war of the roses", "trigger_tokens": [], "promoted": []}

    def covered(query: str) -> float:
        return coverage(query_terms(query), matches(query_terms(query), row))

    assert covered("the war of the worlds") == 0.5 and covered("a war") == 1 and covered("for the peace") == 0
    assert covered("of the") == 1 and covered("and of") == 0.5
