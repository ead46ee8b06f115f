"""What labelling would cost: an observation on `feature_labels`, for which nothing is sent and nothing is spent.

Not here: the estimate itself (scopeatlas/labels), or labelling (labels.py).
"""

import dagster as dg
from pydantic import Field

from assets.labels import LabelRun
from assets.support import failures
from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.corpus.build import open_corpus
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.labels.stage import estimate_labels
from scopeatlas.scoring.stage import estimate_scores
from scopeatlas.selection import features_wanted


class LabelCost(LabelRun):
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
        wanted = features_wanted(config.wanted(), opened, entry, model)
        found = estimate_labels(*there, settings=labelling.labels(), only=wanted)
        tests = estimate_scores(*there, labels=labelling.labels(), settings=labelling.scores(embedder.name))
    context.log.info(f"label cost: explaining and choosing: {found}")
    context.log.info(f"label cost: testing the labels that are there: {tests}")
    numbers = {f"would_cost_{name}": value for name, value in vars(found).items() if value is not None}
    numbers |= {f"testing_would_cost_{name}": value for name, value in vars(tests).items() if value is not None}
    context.log_event(dg.AssetObservation("feature_labels", partition=config.sae, metadata=numbers))
