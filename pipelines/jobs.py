"""Jobs, named by intent. Not here: when they run (schedules.py, sensors.py)."""

import dagster as dg

from assets.costs import observe_label_cost

index_release = dg.define_asset_job(
    "index_release",
    selection=dg.AssetSelection.assets("feature_index").upstream(),
    description="Everything for the SAEs of the run, from the corpus to the atlas; finished stages are reused.",
)

relabel = dg.define_asset_job(
    "relabel",
    selection=dg.AssetSelection.assets("feature_labels").downstream(),
    description="Labels, scores and index again, after the labelling settings or the explainer changed.",
)

rebuild_index = dg.define_asset_job(
    "rebuild_index",
    selection=dg.AssetSelection.assets("feature_index"),
    description="Publish again from finished stages, after the embedder changed or the atlas was lost.",
)

refresh_catalog = dg.define_asset_job(
    "refresh_catalog",
    selection=dg.AssetSelection.assets("sae_catalog"),
    description="Look at every source of releases, and bring the catalog up to what was done with each SAE.",
    # On Kubernetes a run has a GPU unless it says otherwise (deploy/kubernetes/dagster.yaml).
    tags={"dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": 0}}}}},
)


@dg.job(description="What explaining features of one SAE would cost, before anything is spent.")
def label_cost() -> None:
    observe_label_cost()


JOBS = [index_release, relabel, rebuild_index, refresh_catalog, label_cost]
