import pytest

from scopeatlas.hypotheses.surface import SHAPES, ZONES, in_zone, scanner_of, shape_of


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (" dog", "lower"), ("ing", "piece"), ("Dog", "capitalised"), (" NASA", "upper"), (" A", "initial"), ("iPhone", "mixed"),
        ("東京", "caseless"), (" 12", "digits"), ("3.14", "decimal"), ("1,000", "decimal"), ("mp3", "alphanumeric"),
        ("don't", "marked"), (".", "stop"), ("?!", "stop"), (";", "comma"), (" (", "opening"), (").", "closing"), (' "', "quote"),
        ("–", "dash"), ("\n\n", "newline"), ("   ", "space"), ("*", "symbol"), ("==", "symbol"),
    ],
)  # fmt: skip
def test_a_token_has_the_shape_that_a_person_sees(text, shape):
    assert shape_of(text) == shape and shape in SHAPES


@pytest.mark.parametrize(
    ("zone", "marked"),
    [
        ("quotes", 'He said "|one two"| then “|three”| and'),
        ("quotes", 'An "|open one ends with its line\n|so it'),
        ("brackets", "a (|b [c] d)| e ) f"),
        ("heading", "text\n==| Early life ==\n|He was # not\n# |One\n|#tag"),
        ("list", "text\n* |one\n|- |two\n|12. |three\n|1984 was\n-5"),
        ("indented", "text\n    |code here\n|  no\n\t|code"),
        ("line", "text\n|A| b\n|  c| d"),
    ],
)
def test_a_zone_begins_after_what_opens_it_and_ends_after_what_closes_it(zone, marked):
    """Each | in the text changes whether the next character is inside."""
    inside, expected, characters = False, [], []
    for character in marked:
        if character == "|":
            inside = not inside
        else:
            expected.append(inside)
            characters.append(character)
    assert in_zone(zone, characters) == expected


def test_a_zone_does_not_depend_on_how_the_text_is_cut_into_tokens():
    text = 'x\n* "one (two)" and\n== A "b" ==\n1. c'
    for zone in ZONES:
        one_by_one = in_zone(zone, list(text))
        for size in (2, 3, 5):
            assert in_zone(zone, [text[i : i + size] for i in range(0, len(text), size)]) == one_by_one[::size]


def test_an_unknown_zone_is_refused():
    with pytest.raises(ValueError, match="italics"):
        scanner_of("italics")
