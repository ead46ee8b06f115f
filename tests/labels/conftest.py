"""An LLM on loopback that explains and judges, and features whose firings are known."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.explainer_brain import ExplainerBrain
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
