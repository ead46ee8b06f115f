"""An LLM on loopback that explains and judges, and features whose firings are known."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from scopeatlas.labels.stage import FeatureLabels, LabelSettings, label_features
from tests.explainer_brain import ExplainerBrain
from tests.labels.staging import RULES, Label, config
from tests.llm_server import Server
from tests.planted import Planted, planted_chain


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., Server]]:
    """`Server(...)` of tests/llm_server.py with an explainer's brain, closed when the test ends."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ExitStack() as stack:
        yield lambda *, brain=None, **options: stack.enter_context(Server(brain=brain or ExplainerBrain(), **options))


@pytest.fixture
def server(serve) -> Server:
    return serve()


@pytest.fixture(scope="session")
def mined(medium, subject, tmp_path_factory) -> Planted:
    """Features whose firings are known, with their examples. Copy the store before changing it."""
    return planted_chain(medium, subject, tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture
def planted(mined, tmp_path) -> Planted:
    """A copy of `mined`, to be changed."""
    return mined.copy(tmp_path / "store")


@pytest.fixture
def label(subject) -> Label:
    """Label the features of a store by some settings, rules alone unless said otherwise."""

    def label(planted: Planted, settings: LabelSettings = RULES, **options) -> FeatureLabels:
        return label_features(planted.store, planted.corpus, planted.entry, subject, settings=settings, **options)[0]

    return label


@pytest.fixture
def asking(server) -> LabelSettings:
    """Rules, and the LLM of the loopback server."""
    return LabelSettings(explainer=config(server), method="contrastive")


@pytest.fixture
def judging(asking) -> LabelSettings:
    """The same, and that LLM is the judge too."""
    return replace(asking, judge=asking.explainer)
