"""Conversations as an instruction-tuned model reads them: token ids through its chat template, and who says each token.

What belongs here: rendering and tokenising turns. What does not: where conversations come from (`corpus/sources.py`) or
how they become contexts (`corpus/contexts.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.errors import SubjectModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("template", "user", "assistant", "system", "text")
"""Order matters: a token's role is stored as its index here. `template` is BOS, special tokens and what the template adds
around the turns, none of which counts in statistics; `text` is plain text, outside any conversation."""
TEMPLATE, TEXT = ROLES.index("template"), ROLES.index("text")

_OTHER_NAMES = {"model": "assistant", "developer": "system"}


@dataclass(frozen=True)
class Conversation:
    """One conversation from its beginning. tokens: int32 [t], BOS once and in front; roles: uint8 [t], indices into ROLES."""

    tokens: np.ndarray
    roles: np.ndarray


def tokenize_conversation(
    turns: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase", *, reply: bool = False
) -> Conversation:
    """The tokens of (role, text) turns through the chat template, texts stripped as Gemma's templates do.

    reply: followed by what the template puts before the model's next turn, for it to write.
    A system text that the template refuses or drops (Gemma 2) is put before the first user text, as Gemma 3's own
    template does. Special tokens that a text happens to spell are split into plain ones. Raises SubjectModelError if
    there is no chat template, if it refuses the turns, or for a role that is none of user, assistant and system.
    """
    roles = [ROLES.index(_known_role(role)) for role, _ in turns]
    literals = _rendered_frame(roles, tokenizer, reply)
    texts = [text.strip() for _, text in turns]
    # The template spells BOS itself where it wants one: adding special tokens here would make it two.
    pieces = [(TEMPLATE, _token_ids(tokenizer, literals[0], split_special_tokens=False))]
    for role, text, literal in zip(roles, texts, literals[1:], strict=True):
        pieces.append((role, _token_ids(tokenizer, text, split_special_tokens=True)))
        pieces.append((TEMPLATE, _token_ids(tokenizer, literal, split_special_tokens=False)))
    tokens = [token for _, ids in pieces for token in ids]
    codes = [code for code, ids in pieces for _ in ids]
    bos = tokenizer.bos_token_id
    if bos is not None and tokens[:1] != [bos]:
        tokens, codes = [bos, *tokens], [TEMPLATE, *codes]
    return Conversation(np.array(tokens, dtype=np.int32), np.array(codes, dtype=np.uint8))


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, split_special_tokens: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False)["input_ids"]  # type: ignore[return-value]


def _known_role(role: str) -> str:
    name = _OTHER_NAMES.get(role, role)
    if name not in ("user", "assistant", "system"):
        raise SubjectModelError(f"a turn's role is user, assistant or system, not '{role}'; leave such turns out of the corpus")
    return name


def _rendered_frame(roles: list[int], tokenizer: "PreTrainedTokenizerBase", reply: bool) -> list[str]:
    """What the template writes before, between and after the turns' texts: one piece more than there are turns.

    It is rendered with a mark for each text, not with the texts, so that a text saying "user" is not taken for the
    template's own word.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise SubjectModelError(
            f"{tokenizer.name_or_path} has no chat template: read conversations with an instruction-tuned subject model"
        )
    marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
    messages = [{"role": ROLES[role], "content": mark} for role, mark in zip(roles, marks, strict=True)]
    refusal = "it leaves out a turn"
    for attempt in (messages, _system_folded(messages)):
        try:
            rendered = str(tokenizer.apply_chat_template(attempt, tokenize=False, add_generation_prompt=reply))
        except TemplateError as error:
            refusal = str(error)
            continue
        if (frame := _split_at(rendered, marks)) is not None:
            return frame
    raise SubjectModelError(f"the chat template of {tokenizer.name_or_path} does not take this conversation: {refusal}")


def _system_folded(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _split_at(rendered: str, marks: list[str]) -> list[str] | None:
    """The text around the marks, or None if one of them is missing, repeated or out of order."""
    frame: list[str] = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            return None
        frame.append(before)
    return None if any(mark in piece for mark in marks for piece in frame) else [*frame, rendered]
