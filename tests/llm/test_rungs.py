import json
import threading

import pytest

from scopeatlas.errors import ExplainerError
from scopeatlas.llm import limits
from scopeatlas.llm.rungs import PROBES, known_rung, probe
from scopeatlas.llm.runner import ask
from tests.llm.asking import journal_in, question, server_config
from tests.llm_server import Server


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Ask `count` questions of a server and return the answers."""
    monkeypatch.setattr(limits, "backoff", lambda attempt: 0.01)

    def run(server: Server, count: int = 3, **settings):
        with journal_in(tmp_path) as journal:
            return ask([question(number) for number in range(count)], server_config(server.url, **settings), journal)

    return run


def test_a_server_that_enforces_schemas_is_probed_once(run):
    with Server() as server:
        found = run(server)
        run(server, 6)
        assert (len(server.probes), len(server.requests)) == (1, 6)
    assert {answer.rung for answer in found} == {"json_schema"}


@pytest.mark.parametrize("schemas", ["json_object", "rejected"])
def test_a_server_that_only_goes_with_a_stated_schema_is_asked_that_way(run, schemas):
    with Server(schemas=schemas) as server:
        found = run(server)
        probes = len(server.probes)
        assert {request["response_format"]["type"] for request in server.requests} == {"json_object"}
        run(server, 6)
        assert len(server.probes) == probes
    assert {answer.rung for answer in found} == {"json_object"}
    assert not any(answer.problem for answer in found)


def test_a_server_that_ignores_schemas_is_refused_before_anything_else_is_sent(run):
    with Server(schemas="ignored") as server:
        with pytest.raises(ExplainerError, match="keeps neither to response_format json_schema nor") as caught:
            run(server, 50)
        assert (len(server.probes), server.requests) == (2 * PROBES, [])
    assert server.url in str(caught.value)
    assert "use a server or model that does" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_was_mended_is_probed_again(run):
    with Server(schemas="ignored") as server:
        with pytest.raises(ExplainerError):
            run(server)
        server.schemas = "enforced"
        assert {answer.rung for answer in run(server)} == {"json_schema"}


def test_an_accident_in_a_probe_does_not_condemn_the_server(run, monkeypatch):
    with Server() as server:
        respond, calls = server.complete, []

        def at_first_wrong(call, fault, key=""):
            calls.append(call)
            return respond(call, "wrong_model" if len(calls) == 1 else fault, key)

        monkeypatch.setattr(server, "complete", at_first_wrong)
        assert {answer.rung for answer in run(server)} == {"json_schema"}
        assert len(server.probes) == 2


def test_each_server_and_model_is_probed_for_itself(run):
    with Server() as server, Server() as other:
        run(server)
        run(server, 4, model="n")
        run(other, 5)
        assert (len(server.probes), len(other.probes)) == (2, 1)


def test_the_verdict_is_in_the_journal(run, tmp_path):
    with Server() as server:
        run(server)
        with journal_in(tmp_path) as journal:
            config = server_config(server.url)
            assert known_rung(config, journal) == "json_schema"
            assert known_rung(server_config(server.url, model="n"), journal) is None
            assert journal.spent_by_purpose()["probe"].answers == 1
            assert journal.spent().settled_tokens == server.true_tokens()


def test_no_probe_can_be_obeyed_by_guessing_and_no_two_ask_for_the_same():
    config = server_config("http://127.0.0.1:9/v1")
    codes = []
    for rung in ("json_schema", "json_object"):
        for number in range(PROBES):
            request, code = probe(config, rung, number)
            assert code not in json.dumps(request.messages)
            codes.append(code)
    assert len(set(codes)) == 2 * PROBES


def test_nothing_goes_out_beside_the_probe(run, monkeypatch):
    with Server() as server:
        complete, seen = server.complete, []

        def watch(call, fault, key=""):
            if not server.requests:
                threading.Event().wait(0.2)
                seen.append(len(server.requests))
            return complete(call, fault, key)

        monkeypatch.setattr(server, "complete", watch)
        run(server, 8)
    assert seen == [0]


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b'{"ok": true}'])
def test_a_server_that_is_no_chat_api_is_named(run, monkeypatch, answer):
    with Server() as server:
        monkeypatch.setattr(server, "respond", lambda call, fault, key="": (200, answer, {}))
        with pytest.raises(ExplainerError, match=r"check that base_url .*often ending in /v1"):
            run(server, 5)
        assert server.requests == []


def test_a_server_without_such_a_path_is_named(run):
    with Server() as server, pytest.raises(ExplainerError, match="404"):
        run(server, base_url=server.url.removesuffix("/v1") + "/v2")
