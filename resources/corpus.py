"""The corpus: which text, how much of it, how it is cut. What does not belong here: drawing it (scopeatlas/corpus)."""

from typing import Literal

import dagster as dg
from pydantic import Field

from scopeatlas.corpus.build import CorpusSettings
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source


class CorpusResource(dg.ConfigurableResource):
    """The text that features are mined, labelled and scored on."""

    name: str = Field(description="A short name; the corpus id adds a hash of what follows.")
    source: Literal["wikipedia-sample", "files", "huggingface"] = Field(
        description="wikipedia-sample (105 articles, no network), files (globs of parquet, jsonl, txt), huggingface (a dataset, streamed)."
    )
    paths: list[str] = Field(default=[], description="For files: globs.")
    dataset: str = Field(default="", description="For huggingface: the dataset's id, or a local folder.")
    subset: str | None = Field(default=None, description="For huggingface: the dataset's configuration.")
    split: str = Field(default="train", description="For huggingface: the dataset's split.")
    revision: str | None = Field(default=None, description="For huggingface: the dataset's revision.")
    text_field: str = Field(default="text", description="The column or key that holds the text.")
    min_characters: int = Field(default=500, description="Shorter documents are left out.")
    max_documents: int | None = Field(default=None, description="Read at most so many documents of the source.")
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="Share of documents kept, by hash; raising it only adds documents."
    )
    shard_bits: int = Field(default=4, ge=0, le=16, description="The hash space is cut into 2**shard_bits shards.")
    explain_share: float = Field(default=0.5, description="Share of documents that labels are proposed from.")
    select_share: float = Field(
        default=0.2, description="Share of documents that labels are chosen on; the rest are reported on."
    )
    context_length: int = Field(default=128, ge=16, description="Tokens per context, BOS included.")
    contexts_per_document: int = Field(default=8, ge=1, description="At most so many contexts of one document, by hash.")

    def settings(self) -> CorpusSettings:
        report_share = 1.0 - self.explain_share - self.select_share
        return CorpusSettings(
            name=self.name,
            source=Source(
                kind=self.source,
                paths=tuple(self.paths),
                dataset=self.dataset,
                subset=self.subset,
                split=self.split,
                revision=self.revision,
                text_field=self.text_field,
                min_characters=self.min_characters,
                max_documents=self.max_documents,
            ),
            sampling=Sampling(self.fraction, self.shard_bits, (self.explain_share, self.select_share, report_share)),
            rules=ContextRules(self.context_length, self.contexts_per_document),
        )
