"""The code location as Dagster and its users see it."""

import subprocess
import sys

import dagster as dg

from pipelines.definitions import build_defs

ASSETS = ("corpus_sample", "activation_cache", "feature_examples", "feature_labels", "label_scores", "feature_index")


def specs() -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in build_defs().resolve_all_asset_specs()}


def test_definitions_load():
    dg.Definitions.validate_loadable(build_defs())


def test_there_are_the_catalog_and_a_chain_of_six_assets_each_depending_on_the_one_before():
    found = specs()
    assert set(found) == {*ASSETS, "sae_catalog"}
    for before, after in zip(ASSETS[:-1], ASSETS[1:], strict=True):
        assert before in {dep.asset_key.to_user_string() for dep in found[after].deps}


def test_every_asset_says_what_it_is_to_a_person():
    for name, spec in specs().items():
        assert spec.description, name
        assert spec.group_name and spec.group_name != "default", name
        assert spec.owners and spec.kinds and spec.code_version, name
        assert "dagster/column_schema" in spec.metadata, name


def test_every_asset_but_the_corpus_is_partitioned_by_sae_with_one_backfill_policy():
    graph = build_defs().resolve_asset_graph()
    policies = set()
    for name in ASSETS[1:]:
        node = graph.get(dg.AssetKey(name))
        assert node.partitions_def is not None and node.partitions_def.name == "saes"
        policies.add(node.backfill_policy)
    assert policies == {dg.BackfillPolicy.multi_run(max_partitions_per_run=16)}
    assert all(graph.get(dg.AssetKey(name)).partitions_def is None for name in ("corpus_sample", "sae_catalog"))


def test_what_costs_money_or_time_by_itself_is_off_by_default():
    definitions = build_defs()
    assert definitions.resolve_sensor_def("new_saes").default_status == dg.DefaultSensorStatus.STOPPED
    for name in ("retry_incomplete", "refresh_catalog_hourly"):
        assert definitions.resolve_schedule_def(name).default_status == dg.DefaultScheduleStatus.STOPPED


def test_importing_the_definitions_loads_no_heavy_package():
    program = (
        "import sys, pipelines.definitions;"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'lancedb', 'openai', 'datasets'} & sys.modules.keys();"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_library_never_imports_dagster():
    program = "import sys, scopeatlas.atlas.stage, scopeatlas.upkeep, scopeatlas.cli; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
