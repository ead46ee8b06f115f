"""The subject model: the language model under study. What does not belong here: loading it (scopeatlas/subject)."""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import dagster as dg
from pydantic import Field

from scopeatlas.subject.loading import BATCH_TOKENS, SubjectModel


class SubjectResource(dg.ConfigurableResource):
    """The language model whose activations the SAEs read."""

    name: str = Field(
        description="A Hub id, a local folder, a .gguf file, or package:NAME for a Python package that carries a GGUF."
    )
    revision: str | None = Field(default=None, description="The Hub revision; a commit hash pins it.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on CUDA, float32 elsewhere. float16 overflows in Gemma and is not offered."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    serves: list[str] = Field(
        default=[],
        description="Names under which releases know this model, such as google/gemma-3-270m; needed where `name` is a file or package.",
    )
    memory_gb: float | None = Field(
        default=None, gt=0, description="GiB that the SAEs of a run may use beside the model; empty takes 80 % of what is free."
    )
    cache: str = Field(default=".scopeatlas/models", description="Where a GGUF is unpacked, once.")
    batch_tokens: int = Field(
        default=BATCH_TOKENS,
        gt=0,
        description="Tokens of one batch; more on a GPU (16384). Another number makes other activations, in their last bits.",
    )

    def open(self) -> SubjectModel:
        """The model, shared by all steps of this process so that it is loaded once."""
        return _subject(self.name, self.revision, self.precision, self.device, self.cache, tuple(self.serves), self.batch_tokens)

    def memory_bytes(self) -> int | None:
        """`memory_gb` in bytes."""
        return None if self.memory_gb is None else int(self.memory_gb * 2**30)


@lru_cache(maxsize=1)
def _subject(
    name: str,
    revision: str | None,
    precision: Literal["auto", "float32", "bfloat16"],
    device: str,
    cache: str,
    serves: tuple[str, ...],
    batch_tokens: int,
) -> SubjectModel:
    return SubjectModel(name, revision, precision, device, Path(cache), serves=serves, batch_tokens=batch_tokens)
