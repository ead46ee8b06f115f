"""The budget: every attempt is reserved in the journal before it is sent, and settled there after it.

What belongs here: how much an attempt can cost, whether there is room for it, and what an answer is charged. What does
not: counting tokens (`counting.py`), adding up the past (`ledger.py`).
"""

from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.counting import TokenCounter, token_counter
from scopeatlas.llm.journal import Journal
from scopeatlas.llm.ledger import Reservation
from scopeatlas.llm.replies import fault
from scopeatlas.llm.requests import Charge, ChatReply, ChatRequest, Rung

BATCH_PRICE = 0.5  # of the usual one, by a provider's Batch API


def reservation_for(
    request: ChatRequest, config: ServerConfig, counter: TokenCounter, rung: Rung, *, price: float = 1.0
) -> Reservation:
    """What one attempt at `request` can cost at most; `send` is -1 until it is sent."""
    prompt, output = counter.prompt(request, rung), request.output_limit(config)
    usd = config.usd(prompt.high, output)
    usd = None if usd is None else usd * price
    return Reservation(-1, request.key(config), request.purpose, prompt.low, prompt.high, output, usd, counter.exact)


class Budget:
    """What may still be spent by `config`, given all that stands in `journal`. Thread-safe.

    At every moment settled + open <= max_tokens_total (and the same in money), as long as no server reports more than
    it was allowed to use. Where the counter is exact, settled <= what the server used <= settled + open, even if it
    reports less. price: a factor on all prices, such as BATCH_PRICE.
    """

    def __init__(self, config: ServerConfig, journal: Journal, *, price: float = 1.0):
        self._config = config
        self._journal = journal
        self._price = price
        self._counter = token_counter(config)

    def needed(self, request: ChatRequest, rung: Rung) -> Reservation:
        """What an attempt at `request` would reserve."""
        return reservation_for(request, self._config, self._counter, rung, price=self._price)

    def reserve(self, request: ChatRequest, rung: Rung, *, attempt: int = 1) -> Reservation | None:
        """Set aside what `request` can cost and record it as sent; None, and no record, where there is no room."""
        needed = self.needed(request, rung)
        with self._journal.lock:
            if not self._has_room(needed):
                return None
            return self._journal.sent(request, needed, model=self._config.model, attempt=attempt)

    def refusal(self, request: ChatRequest, rung: Rung) -> str:
        """Why `request` is not sent, for one that `reserve` had no room for."""
        needed = self.needed(request, rung)
        config, spent = self._config, self._journal.spent()
        if spent.settled_tokens + spent.open_tokens + needed.tokens > config.max_tokens_total:
            used = f"{spent.settled_tokens} are used and {spent.open_tokens} reserved"
            message = f"up to {needed.tokens} tokens more would pass max_tokens_total={config.max_tokens_total}, {used}"
            return f"not sent: {message}; raise max_tokens_total and run again"
        used = f"${spent.settled_usd:.2f} are spent and ${spent.open_usd:.2f} reserved"
        message = f"up to ${needed.usd or 0:.4f} more would pass max_usd_total={config.max_usd_total}, {used}"
        return f"not sent: {message}; raise max_usd_total and run again"

    def settle(self, reservation: Reservation, reply: ChatReply, rung: Rung) -> Charge:
        """Record the answer, why it is none where that is plain, and its charge, which is returned.

        The charge is the larger of the server's report and our own count. Where the server reports nothing and our count is only a lower bound, the rest of the reservation stays open.
        """
        # no more can have been generated than was allowed, however the text is cut into tokens again
        counted = min(self._counter.completion(reply.text) + self._counter.completion(reply.refusal), reservation.output)
        prompt = max(reply.prompt_tokens or 0, reservation.prompt_low)
        completion = max(reply.completion_tokens or 0, counted)
        cached = min(reply.cached_tokens or 0, prompt)
        usd = self._config.usd(prompt, completion, cached)
        usd = None if usd is None else usd * self._price
        reported = reply.prompt_tokens is not None and reply.completion_tokens is not None
        known = reported or (reservation.exact and self._counter.exact)
        charge = Charge(prompt, completion, cached, usd)
        self._journal.received(
            reservation,
            reply,
            rung=rung,
            charge=charge,
            open_tokens=0 if known else max(0, reservation.tokens - prompt - completion),
            open_usd=0.0 if known else max(0.0, (reservation.usd or 0.0) - (usd or 0.0)),
        )
        if problem := fault(reply, self._config.model):
            self._journal.invalid(reservation.key, problem)
        return charge

    def release(self, reservation: Reservation, problem: str) -> None:
        """Give back what was reserved for an attempt that cannot have been billed."""
        self._journal.failed(reservation, problem)

    def lose(self, reservation: Reservation, problem: str) -> None:
        """Record an attempt that brought no answer and may have been billed: what was reserved stays so."""
        self._journal.lost(reservation, problem)

    def _has_room(self, needed: Reservation) -> bool:
        config, spent = self._config, self._journal.spent()
        tokens = spent.settled_tokens + spent.open_tokens + needed.tokens
        dollars = spent.settled_usd + spent.open_usd + (needed.usd or 0.0)
        return tokens <= config.max_tokens_total and (config.max_usd_total is None or dollars <= config.max_usd_total)
