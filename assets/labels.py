"""The feature labels asset and its blocking checks. Not here: how labels are proposed (scopeatlas/labels)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import dagster as dg
from pydantic import Field

from assets.examples import feature_examples
from assets.partitions import OWNERS, SAES, SHARED_RUNS
from assets.previews import counts_table, label_preview
from assets.support import Events, Outcome, SaeRun, each_sae, failures, open_run
from resources.corpus import CorpusResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.corpus.leakage import find_leaks
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import LeakError
from scopeatlas.labels import stage
from scopeatlas.llm.config import ServerConfig
from scopeatlas.llm.journal import read_journal
from scopeatlas.llm.ledger import Spent
from scopeatlas.mining.examples import examples_key, open_examples
from scopeatlas.selection import Wanted, features_wanted
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

CHECKS = {
    "no_leak": "No document that a label was proposed from is one that it is chosen or scored on.",
    "answers_valid": "The LLM's answers keep to the schema; fails where most do not.",
    "within_budget": "What was spent and what may still be charged stays within the budget.",
}
MOST_INVALID = 0.5
"""Of the LLM's answers; above it the model does not keep to the schema, and scoring with it would be money thrown away."""


class LabelWanted(dg.Config):
    """Which features the LLM is to explain, beside those asked for before. Without any of it: the best-evidenced ones.

    A feature costs about 4,400 tokens to explain and 10,000 to 14,000 to score with a judge (`bench/memoriser.py`); the job
    `label_cost`, launched with the same config, says what this very run would cost and spends nothing.
    """

    features: str = Field(default="", description="Features by number, such as 12,40-48 (LAYER.INDEX of a multi-layer SAE).")
    query: str = Field(default="", description="The features that a search for these words finds.")
    text: str = Field(default="", description="The features that fire most on this text.")
    count: int = Field(default=20, ge=1, description="How many features a query or a text stands for.")

    def of(self, entries: Sequence[SaeEntry], store: Store, subject: SubjectModel) -> dict[str, list[int] | None]:
        """The features of each SAE, by its key. Raises ConfigError for what is no feature of one."""
        wanted = Wanted(features=self.features, query=self.query, text=self.text, count=self.count)
        return {entry.key: features_wanted(wanted, store, entry, subject) for entry in entries}


class LabelRun(LabelWanted):
    """The same, and what to do about answers that were not usable."""

    retry_errors: bool = Field(default=False, description="Ask again, and pay again, where an answer was not usable.")


@dataclass
class _Tally:
    """What the checks look at, over the SAEs of the run."""

    leaks: dict[str, str] = field(default_factory=dict)
    documents: str = ""
    asked: int = 0
    invalid: int = 0
    unanswered: int = 0


@dg.asset(
    deps=[feature_examples],
    partitions_def=SAES,
    backfill_policy=SHARED_RUNS,
    group_name="labels",
    kinds={"openai", "parquet"},
    owners=OWNERS,
    pool="llm",
    code_version=str(stage.STAGE_VERSION),
    check_specs=[
        dg.AssetCheckSpec(name, asset="feature_labels", blocking=True, description=text) for name, text in CHECKS.items()
    ],
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn("feature", "uint32", "Index of the feature."),
                dg.TableColumn("method", "string", "rule, llm, imported or human."),
                dg.TableColumn("version", "string", "Which labeller: the rules' version, or model and prompt, or author."),
                dg.TableColumn("status", "string", "ok, or why there is no label: dead, rare, dense, incoherent, falsified, ..."),
                dg.TableColumn("label", "string", "A few words; empty when refused."),
                dg.TableColumn("reads", "string", "What it fires on, as a sentence."),
                dg.TableColumn("writes", "string", "What it promotes in the output."),
                dg.TableColumn("rule", "string", "The rule as data, to be run again on any text."),
                dg.TableColumn("select_score", "float32", "What the label was chosen by, on select documents."),
                dg.TableColumn("current", "bool", "Whether this is the label shown."),
            ]
        )
    },
)
def feature_labels(
    context: dg.AssetExecutionContext,
    config: LabelRun,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    labelling: LabellingResource,
) -> Events:
    """A label or a typed refusal for every feature: proposed on explain documents, chosen on select ones, tried to falsify."""
    with failures("feature_labels"):
        run = open_run(context, store, corpus, subject)
        wanted = config.of(run.open_entries, run.store, run.subject)
    tally = _Tally()

    def label(entry: SaeEntry) -> Outcome:
        labels, reused = stage.label_features(
            run.store,
            run.corpus,
            entry,
            run.subject,
            settings=labelling.labels(),
            only=wanted[entry.key],
            retry_errors=config.retry_errors,
            log=context.log.info,
        )
        _look(tally, run, entry, labels)
        windows = open_examples(run.store, run.corpus.id, entry.key, examples_key(run.corpus, entry, run.subject)).examples
        preview = label_preview(labels.current, windows, labels.falsification)
        return describe(labels) | {"preview": preview}, labels.key.identity, reused

    def checks() -> list[dg.AssetCheckResult]:
        asked = (labelling.explainer.config(), labelling.judge.config())
        return [
            _no_leak(tally, len(context.partition_keys)),
            answers_valid(tally.asked - tally.unanswered, tally.invalid),
            within_budget(read_journal(run.store.root).spent(), asked, tally.unanswered),
        ]

    yield from each_sae(context, run, label, checks=checks)


def _look(tally: _Tally, run: SaeRun, entry: SaeEntry, labels: stage.FeatureLabels) -> None:
    """What one SAE's labels mean for the checks. Raises LeakError where a document is on both sides."""
    leaks = find_leaks(run.corpus, stage.documents_read(labels.table, labels.falsification))
    tally.documents = str(leaks)
    tally.asked += labels.tally.asked
    tally.invalid += labels.tally.invalid
    tally.unanswered += labels.tally.unanswered
    if leaks.found:
        tally.leaks[entry.key] = str(leaks)
        raise LeakError(f"{leaks}; build the corpus again under another name")


def _no_leak(tally: _Tally, saes: int) -> dg.AssetCheckResult:
    """Blocks the run where every SAE of it leaks; one among good ones is stopped alone, and warns."""
    return dg.AssetCheckResult(
        check_name="no_leak",
        passed=not tally.leaks,
        severity=dg.AssetCheckSeverity.ERROR if len(tally.leaks) == saes else dg.AssetCheckSeverity.WARN,
        description="; ".join(f"{key}: {leak}" for key, leak in tally.leaks.items()) or tally.documents,
        metadata={"saes_with_shared_documents": len(tally.leaks)},
    )


def answers_valid(answers: int, invalid: int) -> dg.AssetCheckResult:
    """Blocks where most answers are of no use; a few warn."""
    too_many = invalid > MOST_INVALID * answers
    return dg.AssetCheckResult(
        check_name="answers_valid",
        passed=not invalid,
        severity=dg.AssetCheckSeverity.ERROR if too_many else dg.AssetCheckSeverity.WARN,
        description=f"{invalid} of {answers} answers are not usable; they are kept, and can be asked for again",
        metadata={"answers": answers, "unusable": invalid},
    )


def within_budget(spent: Spent, servers: Sequence[ServerConfig], unanswered: int) -> dg.AssetCheckResult:
    """Blocks where more is spent or reserved than any of the servers asked may cost; requests left over warn."""
    enabled = [server for server in servers if server.enabled]
    tokens, usd = spent.settled_tokens + spent.open_tokens, spent.settled_usd + spent.open_usd
    limits = [(server.max_tokens_total, server.max_usd_total) for server in enabled]
    over = any(tokens > most or (dollars is not None and usd > dollars) for most, dollars in limits)
    allowed = ", ".join(f"{most:,} tokens" + (f" and ${dollars:.2f}" if dollars is not None else "") for most, dollars in limits)
    return dg.AssetCheckResult(
        check_name="within_budget",
        passed=not over and not unanswered,
        severity=dg.AssetCheckSeverity.ERROR if over else dg.AssetCheckSeverity.WARN,
        description=f"{tokens:,} tokens and ${usd:.2f} are spent or reserved, of {allowed or 'nothing: no LLM is asked'}; "
        f"{unanswered} requests are left for the next run",
        metadata={"settled_tokens": spent.settled_tokens, "open_tokens": spent.open_tokens, "unanswered_requests": unanswered},
    )


def describe(labels: stage.FeatureLabels) -> dict[str, dg.MetadataValue]:
    """Labels as metadata: coverage, refusals by reason, spend, what failed its predictions."""
    tally = labels.tally
    metadata: dict[str, dg.MetadataValue] = {
        "coverage": dg.MetadataValue.float(round(labels.coverage, 4)),
        **{f"status_{name}": dg.MetadataValue.int(count) for name, count in labels.by_status().items()},
        "refusals": counts_table("reason", {k: v for k, v in labels.by_status().items() if k != "ok"}),
        "asked": dg.MetadataValue.int(tally.asked),
        "unusable_answers": dg.MetadataValue.int(tally.invalid),
        "unanswered": dg.MetadataValue.int(tally.unanswered),
        "prompt_tokens": dg.MetadataValue.int(tally.prompt_tokens),
        "completion_tokens": dg.MetadataValue.int(tally.completion_tokens),
    }
    return metadata | ({"usd": dg.MetadataValue.float(tally.usd)} if tally.usd is not None else {})
