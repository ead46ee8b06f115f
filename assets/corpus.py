"""The corpus asset. Not here: sources, sampling, splits (scopeatlas/corpus)."""

import dagster as dg

from assets.partitions import OWNERS
from assets.support import failures
from resources.corpus import CorpusResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.corpus import build
from scopeatlas.storage.records import generation


@dg.asset(
    group_name="corpus",
    kinds={"huggingface", "parquet"},
    owners=OWNERS,
    code_version=str(build.STAGE_VERSION),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("context_id", "int64", "Hash of document and position, independent of sharding."),
                dg.TableColumn("document_id", "string", "Hash of the document's text."),
                dg.TableColumn("split", "uint8", "0 explain, 1 select, 2 report: a property of the document."),
                dg.TableColumn("tokens", "int32[length]", "BOS in front, padded with -1."),
            ]
        )
    },
)
def corpus_sample(
    context: dg.AssetExecutionContext, store: StoreResource, corpus: CorpusResource, subject: SubjectResource
) -> dg.MaterializeResult:
    """Documents drawn by hash, near-duplicates removed, split by document into explain, select and report, cut into contexts."""
    with failures("corpus_sample"):
        built, reused = build.build_corpus(store.open(), corpus.settings(), subject.open(), log=context.log.info)
    facts = built.facts
    splits = ", ".join(f"{count} {split}" for split, count in facts["documents_per_split"].items())
    said = "reused, nothing had changed" if reused else "done"
    context.log.info(f"corpus_sample: {facts['documents']} documents ({splits}), {facts['tokens']:,} tokens: {said}")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(generation(built.shards)[:16]),
        metadata={
            "corpus": built.id,
            "documents": facts["documents"],
            "contexts": facts["contexts"],
            "tokens": facts["tokens"],
            **{f"{split}_documents": count for split, count in facts["documents_per_split"].items()},
            "near_duplicates": facts["near_duplicates"],
            "reused": reused,
            "dagster/row_count": facts["contexts"],
        },
    )
