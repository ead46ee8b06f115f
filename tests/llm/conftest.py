"""A small instruct model for exact token counts and for a real server, and an environment with no key and no proxy."""

import pytest

from bench import kills


@pytest.fixture(autouse=True)
def _no_key_and_no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct: float32 weights, the tokenizer and its chat template; unpacked once (20 s)."""
    return kills.smollm2()
