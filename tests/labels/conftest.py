"""A real HTTP server on loopback that speaks the chat completions protocol, and features whose firings are known."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scopeatlas.labels import chat
from tests.planted import Planted, planted_chain

GOOD = {
    "reads": "Words for ships.",
    "writes": "",
    "status": "ok",
    "label": "words for ships",
    "confidence": 0.7,
    "predicted_positive": "The ferry left.",
    "predicted_negative": "The train left.",
}


class Server:
    """`behave(number, body)` says what the `number`th request (from 1) gets: (status, headers, JSON or text)."""

    def __init__(self):
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.behave: Callable[[int, dict], tuple] = lambda number, body: completion(GOOD)
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    number = len(server.requests)
                status, headers, payload = server.behave(number, body)
                data = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


def completion(content, *, finish_reason="stop", usage=(900, 60), **message):
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    figures = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    return 200, {}, {"id": "c", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": figures}


def failure(status, message, headers=None, **details):
    return status, headers or {}, {"error": {"message": message, **details}}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat, "_backoff", lambda attempt: 0.01)
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def mined(medium, subject, tmp_path_factory) -> Planted:
    """Features whose firings are known, with their examples. Copy the store before changing it."""
    return planted_chain(medium, subject, tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture
def planted(mined, tmp_path) -> Planted:
    """A copy of `mined`, to be changed."""
    return mined.copy(tmp_path / "store")
