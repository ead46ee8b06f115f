"""Labels asked for on demand through Dagster, from a scripted explainer and judge on a loopback server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from pipelines.bootstrap import execute, materialise, register
from pipelines.definitions import build_defs
from resources.labelling import LabellingResource, ServerSettings
from scopeatlas.atlas.tables import FEATURES, open_table
from scopeatlas.llm.config import ServerConfig
from tests.explainer_brain import ExplainerBrain
from tests.llm_server import Server
from tests.pipelines.conftest import World, small_resources

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(brain=ExplainerBrain()) as server:
        yield server


@pytest.fixture
def asking(finished: World, instance: dg.DagsterInstance, server: Server, tmp_path: Path) -> World:
    """The finished chain in another store, with an LLM that explains nothing unasked."""
    shutil.copytree(finished.store_root, tmp_path / "store")
    resources = small_resources(tmp_path / "store", Path(finished.resources["saes"].folders[0]))  # type: ignore[attr-defined]
    llm = ServerSettings(model="m", base_url=server.url, offline=True)
    same = {name: getattr(resources["labelling"], name) for name in ("min_contexts", "min_documents", "min_report_documents")}
    resources["labelling"] = LabellingResource(
        explainer=llm, judge=llm, max_features=0, falsified_features=4, retrieved_features=0, steered_features=0, **same
    )
    return World(instance, resources, register(instance, resources), tmp_path / "store")


def labelled_by_llm(world: World) -> pl.DataFrame:
    paths = (world.store_root / "saes" / world.keys[0]).rglob("labels/labels-*.parquet")
    tables = [pl.read_parquet(path) for path in paths if "falsification" not in path.name]
    return pl.concat(table.filter(pl.col("method") == "llm") for table in tables).unique("label_id")


def ask(world: World, **config: object) -> bool:
    return materialise(world.instance, world.resources, world.keys[:1], job="relabel", ops={"feature_labels": {"config": config}})


def test_only_the_features_that_are_asked_for_are_explained_and_once(asking: World, server: Server):
    features = open_features(asking, "incoherent")[:2]
    assert ask(asking, features=",".join(map(str, features)))
    assert sorted(labelled_by_llm(asking)["feature"]) == features
    asked = len(server.requests)
    assert asked > 0 and ask(asking, features=str(features[0]))
    assert len(server.requests) == asked


def open_features(world: World, status: str) -> list[int]:
    rows = pl.from_arrow(open_table(world.store_root, FEATURES).to_arrow())
    assert isinstance(rows, pl.DataFrame)
    return rows.filter((pl.col("sae") == world.keys[0]) & (pl.col("status") == status))["feature"].sort().to_list()


def test_a_text_names_the_features_that_fire_on_it(asking: World, server: Server):
    assert ask(asking, text="In October 1944 the army crossed the river.", count=3)
    assert 0 < len(labelled_by_llm(asking)) <= 3


def test_what_it_would_cost_is_observed_and_nothing_is_sent(asking: World, server: Server):
    config = {"sae": asking.keys[0], "features": ",".join(map(str, open_features(asking, "incoherent")[:5]))}
    job = build_defs(asking.resources).resolve_job_def("label_cost")
    assert execute(job, asking.instance, ops={"observe_label_cost": {"config": config}}, tags={})
    (record,) = asking.instance.fetch_observations(dg.AssetKey("feature_labels"), limit=1).records
    metadata = record.asset_observation.metadata  # type: ignore[union-attr]
    assert metadata["would_cost_requests"].value >= 5 and metadata["would_cost_prompt_tokens"].value > 1000
    assert not server.requests


def test_the_settings_of_a_server_are_those_of_the_library():
    assert ServerSettings().config() == ServerConfig()
    assert ServerSettings.model_fields.keys() == ServerConfig.__dataclass_fields__.keys()
