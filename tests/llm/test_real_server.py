"""The wire, against a server that somebody else wrote: transformers' own, with a small instruct model on the CPU.

What it answers is of no interest here. SmolLM2-135M stands in a cache laid out as the Hub's, under the name it has there.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from scopeatlas.errors import ExplainerError
from scopeatlas.llm import rungs
from scopeatlas.llm.client import open_client
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.counting import token_counter
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.requests import ChatRequest
from scopeatlas.llm.rungs import probe
from scopeatlas.llm.runner import ask, send_all

pytestmark = pytest.mark.slow

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "0" * 40
SCHEMA = {"name": "x", "strict": True, "schema": {"type": "object", "properties": {}, "additionalProperties": False}}
REQUEST = ChatRequest(
    "explain", "sae", 1, ({"role": "user", "content": "Name three ships."},), SCHEMA, max_output_tokens=12, prompt="ships@1"
)


@pytest.fixture(scope="module")
def real(smollm2, tmp_path_factory) -> Iterator[str]:
    """The URL of `transformers serve`."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / f"models--{MODEL.replace('/', '--')}"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / REVISION).symlink_to(Path(smollm2).resolve())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "NO_PROXY": "127.0.0.1"}
    with (cache / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(3000):
        assert server.poll() is None, "the server did not start"
        try:
            urlopen(url, timeout=1).close()
            return
        except (URLError, OSError):
            time.sleep(0.1)
    raise AssertionError("the server did not start in time")


@pytest.fixture
def config(real, smollm2) -> ServerConfig:
    return ServerConfig(MODEL, real, tokenizer=smollm2, offline=True)


def test_it_lists_the_model(config):
    async def names() -> list[str]:
        async with open_client(config) as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(names()) == [MODEL]


def test_an_answer_comes_over_the_wire_and_is_charged_what_it_took(config, tmp_path):
    with Journal(tmp_path / "j") as journal:
        sent = {REQUEST.key(config): REQUEST}
        problems = asyncio.run(send_all(sent, config, journal, rung="json_object", stopped=asyncio.Event()))
        entry = journal.entry(REQUEST.key(config))
    assert problems == {}
    assert entry.reply.text
    assert entry.reply.model.startswith(MODEL)
    counter = token_counter(config)
    assert entry.reply.prompt_tokens == counter.prompt(REQUEST, "json_object").high
    # the token that ends a turn is generated, and is no part of the text
    assert 0 <= entry.reply.completion_tokens - counter.completion(entry.reply.text) <= 1
    assert (entry.charge.prompt_tokens, entry.charge.completion_tokens) == (
        entry.reply.prompt_tokens,
        entry.reply.completion_tokens,
    )


def test_since_it_ignores_schemas_it_is_refused_before_anything_but_probes_is_sent(config, tmp_path, monkeypatch):
    # it would go on to the end of the room that a probe leaves for thinking
    monkeypatch.setattr(rungs, "probe", lambda *asked: _shorter(*probe(*asked)))
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(ExplainerError, match="keeps neither to response_format json_schema nor"):
            ask([REQUEST], config, journal)
        assert list(journal.spent_by_purpose()) == ["probe"]
        assert journal.spent().open_tokens == 0
        first, _ = rungs.probe(config, "json_schema", 0)
        assert json.loads(journal.reply(first.key(config)).text) == {"greeting": "hello"}


def _shorter(request: ChatRequest, code: str) -> tuple[ChatRequest, str]:
    return replace(request, max_output_tokens=24), code
