"""Asking on behalf of one run of the labels stage: what was asked, what was usable, what it cost.

What belongs here: from requests to values read from their answers, asking again where an answer was unusable, the tally.
What does not: sending and paying (`llm/`), or what is asked (`explainers.py`, `choosing.py`, `falsification.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Generic, Self, TypeVar

from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.replies import InvalidReply
from scopeatlas.llm.requests import Answer, ChatRequest
from scopeatlas.llm.runner import ask
from scopeatlas.runner.local import Log

T = TypeVar("T")


@dataclass(frozen=True)
class Question(Generic[T]):
    """A request, and how its answer is read: `read` raises InvalidReply for an unusable one."""

    request: ChatRequest
    read: Callable[[Answer], T]


@dataclass(frozen=True)
class Heard(Generic[T]):
    """What came of one request: a value, or the problem with its answer."""

    answer: Answer
    value: T | None
    problem: str = ""


@dataclass(frozen=True)
class Tally:
    """Requests of one generation of labels, whenever they were paid for.

    asked: all of them. invalid: answered by something unusable. unanswered: there is no answer yet, and a later run asks
    again. usd: None without prices.
    """

    asked: int = 0
    invalid: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    usd: float | None = None

    @classmethod
    def of(cls, heard: Iterable[Heard]) -> Self:
        """The tally of some answers, each request counted once."""
        once = list({one.answer.key: one for one in heard}.values())
        charges = [one.answer.charge for one in once]
        priced = [charge.usd for charge in charges if charge.usd is not None]
        return cls(
            asked=len(once),
            invalid=sum(one.answer.reply is not None and one.value is None for one in once),
            unanswered=sum(one.answer.reply is None for one in once),
            prompt_tokens=sum(charge.prompt_tokens for charge in charges),
            completion_tokens=sum(charge.completion_tokens for charge in charges),
            cached_tokens=sum(charge.cached_tokens for charge in charges),
            usd=sum(priced) if priced else None,
        )

    def as_dict(self) -> dict[str, int | float | None]:
        return asdict(self)


class Asking:
    """The requests of one run, through one journal.

    attempts: how often a request was asked again, by the key of its first attempt; raised here where `retry` says so and
    an answer that stood in the journal is unusable.
    """

    def __init__(self, journal: Journal, attempts: dict[str, int], *, retry: bool, log: Log):
        self.heard: list[Heard] = []
        self.attempts = attempts
        self._journal, self._retry, self._log = journal, retry, log

    def ask(self, questions: Sequence[Question[T]], config: ServerConfig) -> list[Heard[T]]:
        """One result per question, in order.

        Raises ExplainerError if the server as a whole is unusable, ConfigError if there is no key.
        """
        found = self._ask(questions, config)
        stale = [i for i, one in enumerate(found) if self._retry and one.answer.reused and one.value is None]
        if stale:
            for key in {questions[i].request.key(config) for i in stale}:
                self.attempts[key] = self.attempts.get(key, 0) + 1
            again = self._ask([questions[i] for i in stale], config)
            for i, one in zip(stale, again, strict=True):
                found[i] = one
        self.heard += found
        return found

    def _ask(self, questions: Sequence[Question[T]], config: ServerConfig) -> list[Heard[T]]:
        requests = [numbered(question.request, config, self.attempts) for question in questions]
        answers = ask(requests, config, self._journal, log=self._log)
        return [_hear(answer, question.read) for answer, question in zip(answers, questions, strict=True)]


def numbered(request: ChatRequest, config: ServerConfig, attempts: Mapping[str, int]) -> ChatRequest:
    """A request with the number of its latest attempt."""
    return replace(request, attempt=attempts.get(request.key(config), 0))


def _hear(answer: Answer, read: Callable[[Answer], T]) -> Heard[T]:
    if answer.reply is None:
        return Heard(answer, None, answer.problem)
    try:
        return Heard(answer, read(answer))
    except InvalidReply as error:
        return Heard(answer, None, str(error))
