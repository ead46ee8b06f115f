"""What labelling would cost: an observation on `feature_labels`, for which nothing is sent and nothing is spent.

Not here: the estimate itself (scopeatlas/labels), or labelling (labels.py).
"""

import dagster as dg
from pydantic import Field

from assets.labels import LabelWanted
from assets.support import failures
from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.corpus.build import Corpus, open_corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import NotReadyError
from scopeatlas.labels.stage import estimate_labels
from scopeatlas.llm.estimate import Estimate
from scopeatlas.scoring.stage import estimate_scores
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

JUDGED_TOKENS = 17_000
"""Of one label by detection, fuzzing and intruder without early stopping (`bench/memoriser.py`)."""


class LabelCost(LabelWanted):
    """Which SAE, and what a run with the same config would ask for."""

    sae: str = Field(description="The SAE's key, which is its partition.")


@dg.op(description="Count what the explainer would be sent, answers that are there already left out.", tags={"kind": "openai"})
def observe_label_cost(
    context: dg.OpExecutionContext,
    config: LabelCost,
    store: StoreResource,
    corpus: CorpusResource,
    subject: SubjectResource,
    labelling: LabellingResource,
    embedder: EmbedderResource,
) -> None:
    with failures("label_cost"):
        opened, model = store.open(), subject.open()
        entry = SaeEntry.from_json(opened.entry(config.sae))
        there = opened, open_corpus(opened, corpus.settings().corpus_id(model)), entry, model
        wanted = config.of([entry], opened, model)[entry.key]
        found = estimate_labels(*there, settings=labelling.labels(), only=wanted)
        context.log.info(f"label cost: explaining and choosing: {found}")
        tests = _testing(*there, labelling, embedder)
    told = tests or f"not known before the labels are made; at most {JUDGED_TOKENS:,} tokens for each new one"
    context.log.info(f"label cost: testing the labels that are there: {told}")
    numbers = {f"would_cost_{name}": value for name, value in vars(found).items() if value is not None}
    numbers |= {f"testing_would_cost_{name}": value for name, value in vars(tests or Estimate()).items() if value is not None}
    context.log_event(dg.AssetObservation("feature_labels", partition=config.sae, metadata=numbers))


def _testing(
    store: Store,
    corpus: Corpus,
    entry: SaeEntry,
    model: SubjectModel,
    labelling: LabellingResource,
    embedder: EmbedderResource,
) -> Estimate | None:
    """What testing the labels that are there would cost; None where there are none yet with these settings."""
    try:
        return estimate_scores(
            store, corpus, entry, model, labels=labelling.labels(), settings=labelling.scores(embedder.identity())
        )
    except NotReadyError:
        return None
