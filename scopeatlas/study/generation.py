"""Generation: a prompt as the subject model reads it, what it expects next, and how it goes on while it is edited.

What belongs here: prompts, positions in them, and the loop that writes on. What does not: edits (`edits.py`), or what is
concluded from two texts (`intervene.py`).
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from scopeatlas.activations.probe import Text, checked_text
from scopeatlas.errors import ConfigError
from scopeatlas.subject.capture import next_token_logits
from scopeatlas.subject.conversations import TEMPLATE, tokenize_conversation
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

if TYPE_CHECKING:
    import torch

_Named = Literal["all", "prompt", "generated", "last"]
_NAMED = get_args(_Named)
Positions = _Named | Sequence[int]
"""Where a prompt and its continuation are edited: everywhere, in one of the two, at the last token of the prompt, or at the
prompt's tokens of these numbers (the first is 0, BOS not counted; the last is -1). BOS, special tokens and what a chat
template adds are never edited."""
Within = Callable[[np.ndarray], AbstractContextManager[None]]
"""From the positions of a pass that are edited, bool [t], to the context that the pass is run in (`Editor.over`)."""


def unedited(_mask: np.ndarray) -> AbstractContextManager[None]:
    """The `Within` that changes nothing."""
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt for the subject model. ids: int64 [t], BOS in front. is_text: bool [t], what counts and may be edited.
    first: how many tokens stand before the first that people see. tokens: the texts of those from there on."""

    ids: np.ndarray
    is_text: np.ndarray
    first: int
    tokens: tuple[str, ...]

    def edited(self, positions: Positions) -> np.ndarray:
        """Which of the prompt's tokens are edited: bool [t]. Raises ConfigError for a position that is none or no text."""
        if isinstance(positions, str):
            if positions not in _NAMED:
                raise ConfigError(f"no positions are called {positions!r}; there are {', '.join(_NAMED)}, or a list of numbers")
            if positions == "last":
                return np.arange(len(self.ids)) == np.flatnonzero(self.is_text)[-1]
            return self.is_text if positions in ("all", "prompt") else np.zeros(len(self.ids), dtype=bool)
        chosen = np.zeros(len(self.ids), dtype=bool)
        for position in positions:
            chosen[self.first + self._place(position)] = True
        if (chosen & ~self.is_text).any():
            place = int(np.flatnonzero(chosen & ~self.is_text)[0]) - self.first
            raise ConfigError(
                f"position {place} ({self.tokens[place]!r}) is no text: special tokens and a chat template's are not edited"
            )
        return chosen

    def until(self, position: int) -> "Prompt":
        """The prompt up to and with the token number `position` (-1: the last). Raises ConfigError if there is none."""
        count = self._place(position) + 1
        stop = self.first + count
        return Prompt(self.ids[:stop], self.is_text[:stop], self.first, self.tokens[:count])

    def _place(self, position: int) -> int:
        """A position counted from the front."""
        whole = _whole(position, "a position")
        if not -len(self.tokens) <= whole < len(self.tokens):
            raise ConfigError(f"no position {whole} in a prompt of {len(self.tokens)} tokens")
        return whole % len(self.tokens)


@dataclass(frozen=True)
class Continuation:
    """How the subject model went on. ids: token ids, without the one that ended it. text: as a reader sees them."""

    ids: tuple[int, ...]
    text: str


def read_prompt(subject: SubjectModel, prompt: Text) -> Prompt:
    """Plain text with BOS in front, or a conversation through the chat template, up to where the model's turn begins.

    Raises ConfigError for a prompt without text and as `checked_text` does, SubjectModelError if the model has no chat template or
    it refuses.
    """
    tokenizer, prompt = subject.tokenizer, checked_text(prompt)
    bos = tokenizer.bos_token_id
    if isinstance(prompt, str):
        spelled = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        ids = np.array([*([] if bos is None else [bos]), *spelled], dtype=np.int64)  # pyright: ignore[reportGeneralTypeIssues]
        is_text = np.ones(len(ids), dtype=bool)
    else:
        turns = [(turn["role"], turn["content"]) for turn in prompt]
        conversation = tokenize_conversation(turns, tokenizer, reply=True)
        ids, is_text = conversation.tokens.astype(np.int64), conversation.roles != TEMPLATE
    is_text = is_text & ~np.isin(ids, tokenizer.all_special_ids)
    is_text[:1] &= bos is not None  # what BOS is elsewhere: no SAE was trained on a first token
    if not is_text.any():
        raise ConfigError("the prompt has no text: give some words")
    first = int(bos is not None and ids[0] == bos)
    return Prompt(ids, is_text, first, tuple(token_texts(tokenizer, ids[first:].tolist())))


def generate(
    subject: SubjectModel,
    prompt: Prompt,
    *,
    tokens: int,
    within: Within = unedited,
    positions: Positions = "all",
    temperature: float = 0.0,
    seed: int = 0,
) -> "tuple[torch.Tensor, Continuation]":
    """The logits [vocabulary] of the token after the prompt, and at most `tokens` that the model goes on with.

    within: how passes are edited. temperature: 0 takes the likeliest token each time; above it they are drawn with `seed`.
    Keys and values of earlier tokens are kept, so that each step reads, and edits, its new token alone. Generation ends
    with a token that ends a text or a turn. Cost: one pass over the prompt and one of a token for each generated.
    Raises ConfigError for a negative count or seed, or a temperature that is negative or not finite.
    """
    import torch
    from transformers import DynamicCache

    if not 0 <= temperature < np.inf or tokens < 0 or seed < 0:
        raise ConfigError(
            f"cannot generate {tokens} tokens at temperature {temperature} with seed {seed}: give finite numbers, none below 0"
        )
    device = subject.resolved_device
    cache = DynamicCache(config=subject.model.config.get_text_config())
    generator = torch.Generator().manual_seed(seed)
    special, ends = set(subject.tokenizer.all_special_ids), _ends(subject)
    goes_on = isinstance(positions, str) and positions in ("all", "generated")
    written: list[int] = []

    def read(ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        with torch.no_grad(), within(mask):
            return next_token_logits(subject.model, torch.from_numpy(ids).to(device), cache=cache)

    first = logits = read(prompt.ids, prompt.edited(positions))
    while len(written) < tokens and (token := _chosen(logits, temperature, generator)) not in ends:
        written.append(token)
        if len(written) < tokens:
            logits = read(np.array([token]), np.array([goes_on and token not in special]))
    return first, Continuation(tuple(written), str(subject.tokenizer.decode(written)))


def token_id(subject: SubjectModel, token: str | int) -> int:
    """The id of a token given as one, or as the text that it stands for (spaces count: " Paris" is not "Paris").

    Raises ConfigError if the text is not one token, or there is no such id.
    """
    tokenizer = subject.tokenizer
    if not isinstance(token, str):
        whole = _whole(token, "a token")
        if not 0 <= whole < subject.model.get_output_embeddings().weight.shape[0]:  # pyright: ignore[reportOptionalMemberAccess]
            raise ConfigError(f"the subject model has no token {whole}")
        return whole
    if checked_text(token) != token:
        raise ConfigError(f"{token!r} is no text: no token of the subject model has half a character")
    ids = tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:  # pyright: ignore[reportArgumentType]
        parts = token_texts(tokenizer, ids)  # pyright: ignore[reportArgumentType]
        raise ConfigError(f"{token!r} is not one token of the subject model but {parts}; give one of them (spaces count)")
    return int(ids[0])  # pyright: ignore[reportIndexIssue]


def _chosen(logits: "torch.Tensor", temperature: float, generator: "torch.Generator") -> int:
    import torch

    if temperature == 0:
        return int(logits.argmax())
    below = logits.double().cpu() - logits.double().max().cpu()  # so that a tiny temperature divides nothing to infinity
    return int(torch.multinomial((below / temperature).softmax(0), 1, generator=generator))


def _whole(number: int, what: str) -> int:
    """A whole number of any type, numpy's too, as an int. Raises ConfigError for any other, and for a truth value."""
    try:
        if not isinstance(number, bool):
            return operator.index(number)
    except TypeError:
        pass
    raise ConfigError(f"{what} is a whole number, not {number!r}")


def _ends(subject: SubjectModel) -> set[int]:
    """The tokens that end a text, or a turn of a conversation."""
    settings = subject.model.generation_config
    named = None if settings is None else settings.eos_token_id
    ids = [*(named if isinstance(named, list) else [named]), subject.tokenizer.eos_token_id]
    return {int(i) for i in ids if i is not None}
