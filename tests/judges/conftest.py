"""Windows of features whose firings are known, of real text, and a way to put requests before a scripted judge."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from scopeatlas.hypotheses.neighbours import Neighbours
from scopeatlas.hypotheses.samples import Windows, draw_windows
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.judges.rounds import Claim, Round
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.requests import Answer, ChatReply
from scopeatlas.llm.runner import ask
from tests.llm_server import Brain, Server

THE, NUMBERS, RUNS, SCATTERED = range(4)
"""Features: of the word "the", of digits, of passages of some tokens, of random tokens."""


@pytest.fixture(autouse=True)
def _no_key_and_no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="session")
def units(medium_corpus, subject) -> Units:
    return Units(medium_corpus.corpus, subject)


@pytest.fixture(scope="session")
def windows(units) -> Windows:
    draw = np.random.default_rng(5)
    keys, texts = units.column("token")
    counted = np.flatnonzero(units.counted)
    the = [i for i, text in enumerate(texts) if text.strip().lower() == "the"]
    digits = [i for i, text in enumerate(texts) if text.strip().isdigit()]
    starts = draw.choice(counted[units.document[counted] % 2 == 0], 120, replace=False)
    runs = np.unique((starts[:, None] + np.arange(5))[draw.random((120, 5)) < 0.8])
    picks = [np.flatnonzero(np.isin(keys, the)), np.flatnonzero(np.isin(keys, digits)), runs[units.counted[runs]]]
    picks.append(draw.choice(counted, 300, replace=False))
    position = np.concatenate(picks)
    feature = np.repeat(np.arange(4, dtype=np.uint32), [len(p) for p in picks])
    firings = Firings(feature, position, 4, value=draw.uniform(5, 10, len(position)).astype(np.float32))
    others = np.array([[1], [0], [0], [0]], dtype=np.int32)
    near = Neighbours(others, others)
    return draw_windows(units, firings, range(4), split="report", neighbours=near, positives=40, random=20, trigger=15)


@pytest.fixture
def judge(tmp_path) -> Callable[..., list[Answer]]:
    """Ask a brain on a server of its own: judge(rounds, brain, **of the server)."""

    def judge(rounds: Sequence[Round], brain: Brain, **server: object) -> list[Answer]:
        with Server(brain, **server) as there, journal_in(tmp_path / f"{len(list(tmp_path.iterdir()))}") as journal:
            return ask([round.request for round in rounds], ServerConfig(model="m", base_url=there.url), journal)

    return judge


def journal_in(folder: Path) -> Journal:
    return Journal(folder / "llm" / "journal.jsonl")


def claim(feature: int, text: str = 'the word "the"') -> Claim:
    return Claim(feature, f"label-{feature}", text)


def said(round: Round, text: str, **reply: object) -> Answer:
    """An answer with `text` to a round, as `ask` returns it."""
    return Answer(round.request, "key", ChatReply(text, "stop", **reply))
