"""What features do to the output: remembered once it was measured, and shown to an explainer."""

import numpy as np
import pytest

from scopeatlas.dictionaries.releases import open_dictionary
from scopeatlas.errors import SubjectModelError
from scopeatlas.labels import outputs
from scopeatlas.labels.outputs import Outputs, read_outputs, steered
from scopeatlas.mining.examples import examples_key, open_examples
from scopeatlas.mining.steering import token_changes
from scopeatlas.subject.vocabulary import token_texts
from tests.planted import EXACT, WORDS


@pytest.fixture
def raised(planted, subject, tmp_path):
    """What steering raises, as measured or remembered in one file; `said` is the log."""
    said: list[str] = []

    def raised(*features: int, source: str = "one") -> dict[int, tuple[str, ...]]:
        path = tmp_path / "raised.jsonl"
        dictionary = lambda: open_dictionary(planted.entry)  # noqa: E731  # as the run gives it, loaded when needed
        return steered(path, source, features, corpus=planted.corpus, subject=subject, dictionary=dictionary, log=said.append)

    raised.said = said  # type: ignore[attr-defined]
    return raised


@pytest.mark.slow
def test_what_steering_raises_is_measured_once_for_each_feature(raised, monkeypatch):
    measured: list[int] = []

    def spy(dictionary, subject, prompts, features):
        measured.extend(features)
        assert prompts.shape == (outputs.STEERED_PROMPTS, outputs.STEERED_LENGTH)
        return token_changes(dictionary, subject, prompts, features)

    monkeypatch.setattr(outputs, "token_changes", spy)
    first = raised(EXACT)
    assert 0 < len(first[EXACT]) <= 10 and all(first[EXACT])
    both = raised(EXACT, WORDS)
    assert both[EXACT] == first[EXACT] and measured == [EXACT, WORDS]
    raised(EXACT, source="another")
    assert measured == [EXACT, WORDS, EXACT]


def test_a_site_that_cannot_be_steered_leaves_nothing_and_is_said(raised, monkeypatch):
    def refuse(*_):
        raise SubjectModelError("no such site")

    monkeypatch.setattr(outputs, "token_changes", refuse)
    assert raised(EXACT) == {}
    assert any("no steering: no such site" in line for line in raised.said)


def test_outputs_are_the_tokens_of_the_features_table_as_text(planted, subject):
    examples = open_examples(
        planted.store, planted.corpus.id, planted.entry.key, examples_key(planted.corpus, planted.entry, subject)
    )
    found = read_outputs(examples, subject, [EXACT, WORDS], {WORDS: (" a",)})
    for feature, row in zip([EXACT, WORDS], examples.features.head(2).to_dicts(), strict=True):
        promoted, suppressed = (tuple(token_texts(subject.tokenizer, row[name])) for name in ("promoted", "suppressed"))
        assert found[feature] == Outputs(promoted, suppressed, (" a",) if feature == WORDS else ())
    assert np.all([len(o.promoted) > 0 for o in found.values()])
