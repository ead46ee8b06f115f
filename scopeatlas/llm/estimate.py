"""What asking would cost, before anything is asked.

What belongs here: the dry run. What does not: what was spent in the end (`ledger.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from scopeatlas.llm.budget import BATCH_PRICE
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.counting import token_counter
from scopeatlas.llm.ledger import Ledger
from scopeatlas.llm.requests import ChatRequest
from scopeatlas.llm.rungs import known_rung, probe


@dataclass(frozen=True)
class Estimate:
    """What asking `requests` would use at most, retries of lost attempts aside.

    answered: how many of them are answered already, or equal to another one, and cost nothing. prompt_tokens,
    max_output_tokens, usd (None without prices): of the rest, and of the probe that a new server gets, as the budget
    would reserve them. likely_prompt_tokens: the same without the margin that counting without the server's tokenizer
    needs. room: the tokens that max_tokens_total leaves, which may be fewer.
    """

    requests: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    likely_prompt_tokens: int = 0
    max_output_tokens: int = 0
    usd: float | None = None
    room: int = 0

    def __str__(self) -> str:
        """One line for people."""
        new = self.requests - self.answered
        tokens = f"about {self.likely_prompt_tokens:,} prompt tokens (at most {self.prompt_tokens:,})"
        money = "" if self.usd is None else f", at most ${self.usd:.2f}"
        room = f"; the budget leaves {self.room:,} tokens"
        return f"{new:,} of {self.requests:,} requests are new: {tokens} and at most {self.max_output_tokens:,} for answers{money}{room}"


def estimate(requests: Iterable[ChatRequest], config: ServerConfig, journal: Ledger) -> Estimate:
    """What `ask` would use for `requests`; spends nothing and contacts nobody. Off: nothing."""
    if not config.enabled:
        return Estimate()
    counter, known = token_counter(config), known_rung(config, journal)
    rung = known or "json_object"  # the longer prompt of the two
    price = BATCH_PRICE if config.batch == "provider" else 1.0
    asked, new = 0, {}
    for request in requests:
        asked += 1
        key = request.key(config)
        if journal.reply(key) is None:
            new[key] = request
    answered = asked - len(new)
    if new and known is None:
        new["probe"], _ = probe(config, rung, 0)
    prompt = likely = output = 0
    usd = 0.0
    for key, request in new.items():
        bounds = counter.prompt(request, rung)
        limit = request.output_limit(config)
        prompt, likely, output = prompt + bounds.high, likely + bounds.likely, output + limit
        dollars = config.usd(bounds.high, limit)
        usd += (dollars or 0.0) * (1.0 if key == "probe" else price)
    spent = journal.spent()
    room = max(0, config.max_tokens_total - spent.settled_tokens - spent.open_tokens)
    return Estimate(asked, answered, prompt, likely, output, None if config.usd(0, 0) is None else usd, room)
