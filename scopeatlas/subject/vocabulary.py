"""Token ids as the text they stand for, leading spaces kept.

What belongs here: reading a tokenizer's vocabulary. What does not: tokenising documents (`corpus/contexts.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCEPIECE_SPACE = "▁"


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text of each token id, with its leading space; "" for padding (-1).

    Sentencepiece vocabularies spell a space as a block; byte-level ones spell every byte as a letter that their
    decoder maps back ("Ã©" is "é", "Ġ" a space).
    """
    pieces = tokenizer.convert_ids_to_tokens([max(int(i), 0) for i in ids])
    byte_level = _is_byte_level(tokenizer)
    return ["" if i < 0 else _text_of(tokenizer, piece, byte_level) for i, piece in zip(ids, pieces, strict=True)]


def _text_of(tokenizer: "PreTrainedTokenizerBase", piece: str, byte_level: bool) -> str:
    if byte_level:
        return tokenizer.convert_tokens_to_string([piece])
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:-1], 16)]).decode("utf-8", errors="replace")
    return piece.replace(_SENTENCEPIECE_SPACE, " ")


def _is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)  # type: ignore[attr-defined]
