"""Probing: where the features of SAEs fire in texts and conversations that are given, whatever their source.

What belongs here: texts through the subject model and SAEs. What does not: the corpus (`cache.py`), or what a firing says
about a label (`labels/falsification.py`) or a text (`study/`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scopeatlas.activations.reading import SiteBatch, read_batches
from scopeatlas.activations.shards import round_values
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import ConfigError, SubjectModelError
from scopeatlas.subject.conversations import ROLES, TEMPLATE, TEXT, tokenize_conversation
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts

Text = str | Sequence[Mapping[str, str]]
"""Plain text, or a conversation: turns {"role": user, assistant or system, "content": text}."""

_TURN = ("role", "content")

CONTEXT_TOKENS = 512
"""A longer text is read in consecutive contexts of so many tokens, BOS in front of each, as the corpus is."""


@dataclass(frozen=True)
class TextActivations:
    """Where features fire in one text, sorted by position, then feature.

    tokens: texts, BOS left out. roles: who says each token, one of `conversations.ROLES`; a `template` token (the chat
    template's own, and where the model has no BOS the first of a context) does not count and never has a firing. feature:
    uint32 [n]. position: int32 [n], index into tokens. value: float32 [n], positive and rounded to 16 bits as in activation
    shards.
    """

    tokens: list[str]
    roles: tuple[str, ...]
    feature: np.ndarray
    position: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class CutTexts:
    """Texts as the subject model reads them.

    tokens, roles: of each text, ids and who says each as indices into `conversations.ROLES`, BOS left out. contexts: the
    table that is read, a short text in one row, a long one in several. text, start: int64 [rows], which text a row is of, and
    the place in it of the row's first token after BOS.
    """

    tokens: list[list[int]]
    roles: list[list[int]]
    contexts: Contexts
    text: np.ndarray
    start: np.ndarray
    front: int

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of positions in the flattened table (`SiteBatch.positions`): number of the text, and index into its tokens."""
        row, column = np.divmod(positions, self.contexts.tokens.shape[1])
        return self.text[row], self.start[row] + column - self.front


def checked_text(text: object) -> Text:
    """The text or conversation as a tokenizer takes it: of turns the role and the content alone, and for half a surrogate (an
    undecodable byte, half an escape in JSON) a question mark.

    Raises ConfigError for what is neither a str nor turns, at least one, each with a role and a content that are str.
    """
    if isinstance(text, str):
        return _encodable(text)
    turns = list(text) if isinstance(text, Iterable) and not isinstance(text, Mapping) else []
    if not turns or not all(_is_turn(turn) for turn in turns):
        raise ConfigError('a conversation is turns like {"role": "user", "content": "..."}, at least one')
    return [{name: _encodable(turn[name]) for name in _TURN} for turn in turns]


def checked_texts(texts: Iterable[object]) -> list[Text]:
    """`checked_text` of each; what it raises names the text by its number."""
    checked: list[Text] = []
    for number, text in enumerate(texts):
        try:
            checked.append(checked_text(text))
        except ConfigError as error:
            raise ConfigError(f"text {number}: {error}") from error
    return checked


def _is_turn(turn: object) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(name), str) for name in _TURN)


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


def cut_texts(texts: Sequence[Text], subject: SubjectModel) -> CutTexts:
    """Tokenise texts plainly and conversations through the chat template, and cut them into contexts of CONTEXT_TOKENS.

    Special tokens that a text spells are split into plain ones; an empty text has no tokens and no row. Raises
    SubjectModelError for a conversation that the subject model's template does not take, ConfigError as `checked_texts` does.
    """
    bos = subject.tokenizer.bos_token_id
    front: list[int] = [] if bos is None else [bos]  # pyright: ignore[reportAssignmentType]
    tokens, roles = [], []
    for number, text in enumerate(checked_texts(texts)):
        ids, codes = _plain(text, subject) if isinstance(text, str) else _conversation(text, number, subject, len(front))
        tokens.append(ids)
        roles.append(codes)
    size = CONTEXT_TOKENS - len(front)
    rows = [(i, s) for i, ids in enumerate(tokens) for s in range(0, len(ids), size)]
    if not front:
        for i, start in rows:
            roles[i][start] = TEMPLATE  # `reading.text_mask` leaves it out
    table = np.full((len(rows), len(front) + max((min(len(ids), size) for ids in tokens), default=0)), -1, dtype=np.int32)
    codes = np.full(table.shape, TEMPLATE, dtype=np.uint8)
    for row, (i, start) in enumerate(rows):
        part = slice(start, start + size)
        ids = front + tokens[i][part]
        table[row, : len(ids)] = ids
        codes[row, len(front) : len(ids)] = roles[i][part]
    contexts = Contexts(np.zeros(len(rows), dtype=np.int64), [""] * len(rows), np.zeros(len(rows), dtype=np.uint8), table, codes)
    text, start = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    return CutTexts(tokens, roles, contexts, text, start, len(front))


def _plain(text: str, subject: SubjectModel) -> tuple[list[int], list[int]]:
    ids = subject.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return list(ids), [TEXT] * len(ids)


def _conversation(
    turns: Sequence[Mapping[str, str]], number: int, subject: SubjectModel, front: int
) -> tuple[list[int], list[int]]:
    try:
        conversation = tokenize_conversation([(turn["role"], turn["content"]) for turn in turns], subject.tokenizer)
    except SubjectModelError as error:
        raise SubjectModelError(f"text {number}: {error}") from error
    return conversation.tokens[front:].tolist(), conversation.roles[front:].tolist()


class Probe:
    """Texts through the subject model and one SAE; a feature fires here exactly where the activation cache says so."""

    def __init__(self, dictionary: SparseDictionary, subject: SubjectModel):
        self.dictionary, self.subject = dictionary.to(subject.resolved_device), subject

    def activations(
        self, texts: Sequence[Text], *, features: Sequence[int] | None = None, seen: "Seen | None" = None
    ) -> list[TextActivations]:
        """What fires in each text, of all features or of `features`. How texts are read: `cut_texts`.

        seen: is given every batch of the tokens that count, and int64 [T] which text each is of, before it is encoded.
        Cost: one forward pass to the last input site over all tokens, texts of like length together.
        """
        (found,) = shared_activations(texts, [self], features=features, seen=seen)
        return found


Seen = Callable[[SiteBatch, np.ndarray], None]


def shared_activations(
    texts: Sequence[Text], probes: Sequence[Probe], *, features: Sequence[int] | None = None, seen: Seen | None = None
) -> list[list[TextActivations]]:
    """What `Probe.activations` gives for each probe, from one forward pass to the last of their sites. The probes share one
    subject model."""
    subject = probes[0].subject
    cut = cut_texts(texts, subject)
    sites = {site for probe in probes for site in probe.dictionary.sites_in}
    parts: list[list[_Found]] = [[] for _ in probes]
    for batch in read_batches(cut.contexts, subject, sites):
        if seen is not None:
            seen(batch, cut.places(batch.positions)[0])
        for probe, mine in zip(probes, parts, strict=True):
            mine.append(_read(batch, cut, probe.dictionary))
    tokens = [token_texts(subject.tokenizer, ids) for ids in cut.tokens]
    roles = [tuple(ROLES[code] for code in codes) for codes in cut.roles]
    return [_by_text(mine, tokens, roles, features) for mine in parts]


_Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _read(batch: SiteBatch, cut: CutTexts, dictionary: SparseDictionary) -> _Found:
    """Text, position in the text, feature and value of everything that fires in a batch."""
    acts = dictionary.encode([batch.acts[site] for site in dictionary.sites_in])
    scale = dictionary.value_scale
    rounded = round_values(acts.value.cpu().numpy(), scale)
    fires = rounded > 0
    text, position = cut.places(batch.positions[acts.token.cpu().numpy()[fires]])
    return text, position, acts.feature.cpu().numpy()[fires], rounded[fires].astype(np.float32) * np.float32(scale)


def _by_text(
    found: list[_Found], tokens: list[list[str]], roles: list[tuple[str, ...]], features: Sequence[int] | None
) -> list[TextActivations]:
    text, position, feature, value = (
        np.concatenate([part[i] for part in found]) if found else np.zeros(0, dtype=np.int64) for i in range(4)
    )
    if features is not None:
        kept = np.isin(feature, np.asarray(features, dtype=np.int64))
        text, position, feature, value = text[kept], position[kept], feature[kept], value[kept]
    order = np.lexsort((feature, position, text))
    ends = np.searchsorted(text[order], np.arange(len(tokens) + 1))
    return [
        TextActivations(
            tokens[i],
            roles[i],
            feature[rows].astype(np.uint32),
            position[rows].astype(np.int32),
            value[rows].astype(np.float32),
        )
        for i, rows in enumerate(order[start:stop] for start, stop in zip(ends[:-1], ends[1:], strict=True))
    ]
