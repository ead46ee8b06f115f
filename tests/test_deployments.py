import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._config import process_config
from dagster._core.instance.ref import InstanceRef
from dagster._core.workspace.load_target import WorkspaceFileTarget
from kubernetes.client import ApiClient

from resources.runner import ShardRunnerResource
from resources.scenario import load_scenario
from resources.store import StoreResource

REPOSITORY = Path(__file__).resolve().parents[1]
DEPLOY = REPOSITORY / "deploy"
WITH_INSTANCE = ("ray", "kubernetes")
ENVIRONMENT = {
    "DAGSTER_PG_HOST": "localhost",
    "DAGSTER_PG_USER": "dagster",
    "DAGSTER_PG_PASSWORD": "x",
    "DAGSTER_PG_DB": "postgres",
    "DAGSTER_RAY_JOBS": "http://head:8265",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "kind", "is_remote"), [("several-gpus", "processes", False), ("ray", "ray", True), ("kubernetes", "local", True)]
)
def test_a_deployments_scenario_loads_and_says_how_shards_are_run(name, kind, is_remote):
    resources = load_scenario(DEPLOY / name / "scenario.yaml")
    runner, store = resources["runner"], resources["store"]
    assert isinstance(runner, ShardRunnerResource) and isinstance(store, StoreResource)
    assert runner.kind == kind and store.root.startswith("s3://") == is_remote


@pytest.mark.parametrize("name", WITH_INSTANCE)
def test_every_part_of_a_deployments_instance_can_be_imported_and_takes_its_settings(name):
    parts = instance_parts(name)
    assert {data.class_name for data in parts} >= {"DagsterPostgresStorage", "NoOpComputeLogManager"}
    for data in parts:
        part = getattr(import_module(data.module_name), data.class_name)
        checked = process_config(part.config_type(), data.config_dict)
        assert checked.success, (data.class_name, [error.message for error in checked.errors or ()])


def instance_parts(name: str) -> list:
    ref = InstanceRef.from_dir(str(DEPLOY / name))
    return [data for data in (ref.storage_data, ref.run_launcher_data, ref.compute_logs_data) if data is not None]


@pytest.mark.parametrize("folder", [REPOSITORY, *(DEPLOY / name for name in WITH_INSTANCE)])
def test_no_instance_leaves_pool_slots_to_dead_runs_or_sends_telemetry(folder):
    settings = InstanceRef.from_dir(str(folder)).settings
    assert settings["concurrency"]["pools"] == {"granularity": "op", "default_limit": 1}
    assert settings["run_monitoring"]["enabled"] and settings["run_monitoring"]["free_slots_after_run_end_seconds"] > 0
    assert settings["telemetry"] == {"enabled": False}
    assert settings["run_retries"]["retry_on_asset_or_op_failure"] is False


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of a real server, where one is installed."""
    initdb = shutil.which("initdb")
    if initdb is None:
        pytest.skip("no Postgres server is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not under tmp_path: a server refuses to be root, and another user cannot get there.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        user = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
        data = f"{folder}/data"
        control = [*user, str(Path(initdb).with_name("pg_ctl")), "-D", data, "-w", "-l", f"{folder}/log"]
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        for command in (
            [*user, initdb, "-D", data, "-U", "dagster", "--auth=trust", "--no-sync"],
            [*control, "-o", options, "start"],
        ):
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        yield port
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=folder, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", WITH_INSTANCE)
def test_a_deployments_instance_keeps_its_history_in_postgres(postgres, tmp_path, name):
    body = yaml.safe_load((DEPLOY / name / "dagster.yaml").read_text())
    body["storage"]["postgres"]["postgres_db"]["port"] = postgres
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(body))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        instance.add_dynamic_partitions("saes", [name])
        instance.event_log_storage.set_concurrency_slots("gpu", 4)
    with dg.DagsterInstance.from_config(str(tmp_path)) as again:
        assert name in again.get_dynamic_partitions("saes")
        assert len(again.event_log_storage.get_concurrency_info("gpu").claimed_slots) == 0
        assert again.event_log_storage.get_concurrency_info("gpu").slot_count == 4
    assert not list(tmp_path.rglob("*.db"))


@pytest.fixture
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "ray" / "compose.yaml").read_text())


def test_no_value_of_the_environment_is_given_to_ray_which_would_log_it():
    from dagster_ray import RayRunLauncher

    launcher = InstanceRef.from_dir(str(DEPLOY / "ray")).run_launcher
    assert isinstance(launcher, RayRunLauncher)
    assert launcher.address == ENVIRONMENT["DAGSTER_RAY_JOBS"] and launcher.num_gpus == 1
    assert not launcher.env_vars and not launcher.runtime_env


def test_every_ray_container_has_what_the_instance_and_the_scenario_read_from_the_environment(compose):
    read = set(re.findall(r"env: (\w+)", (DEPLOY / "ray" / "dagster.yaml").read_text()))
    example = set(re.findall(r"^(?:# )?([A-Z_]+)=", (DEPLOY / "ray" / "env.example").read_text(), re.M))
    for name, service in compose["services"].items():
        if name == "postgres":
            continue
        assert service["env_file"] == ".env"
        assert read | {"SCOPE_ATLAS_CONFIG", "DAGSTER_HOME"} <= service["environment"].keys() | example
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"} <= example
    filled = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / "ray" / "compose.yaml").read_text()))
    assert filled <= example


def test_nodes_of_ray_on_several_machines_reach_each_other_and_the_history(compose):
    """A container on Docker's own network is reached by nobody but its neighbours."""
    services = compose["services"]
    for node in ("ray-head", "ray-worker"):
        assert services[node]["network_mode"] == "host" and "ports" not in services[node]
    assert "--address=${SCOPE_ATLAS_HEAD}:6379" in services["ray-worker"]["command"]
    assert compose["x-app"]["environment"]["DAGSTER_RAY_JOBS"] == "http://${SCOPE_ATLAS_HEAD}:8265"
    assert compose["x-app"]["environment"]["DAGSTER_PG_HOST"] == "${SCOPE_ATLAS_HEAD}"
    assert services["postgres"]["ports"] == ["${SCOPE_ATLAS_HEAD}:5432:5432"]


def test_the_compose_file_has_what_the_ray_deployment_needs(compose):
    (device,) = compose["services"]["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    for name, service in compose["services"].items():
        sources = {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}
        shared = sources.pop("/cache", None)
        assert name == "postgres" or shared == "${SCOPE_ATLAS_SHARED}"
        assert all(source in compose["volumes"] or (DEPLOY / "ray" / source).exists() for source in sources.values()), name
    build = compose["x-app"]["build"]
    assert (DEPLOY / "ray" / build["context"] / build["dockerfile"]).exists()


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict]:
    """Every object of the Kubernetes deployment by kind and name, those that kustomize makes as well."""
    folder = DEPLOY / "kubernetes"
    rules = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = [body for name in rules["resources"] for body in yaml.safe_load_all((folder / name).read_text())]
    for made in rules["configMapGenerator"]:
        data = {name: (folder / name).read_text() for name in made.get("files", [])}
        data |= dict(literal.split("=", 1) for literal in made.get("literals", []))
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    return {(body["kind"], body["metadata"]["name"]): body for body in found}


def test_kubernetes_knows_every_field_of_every_manifest(manifests):
    """What the client does not know it drops, so what comes back must be what went in."""
    client = ApiClient()
    for (kind, _), body in manifests.items():
        read = client._ApiClient__deserialize(body, f"V1{kind}")  # pyright: ignore[reportAttributeAccessIssue]
        assert client.sanitize_for_serialization(read) == body


def test_what_manifests_refer_to_is_there(manifests):
    names = {
        kind: {name for k, name in manifests if k == kind} for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount")
    }
    for (kind, _), body in manifests.items():
        if kind not in ("Deployment", "Job"):
            continue
        pod = body["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            assert volume.get("configMap", {}).get("name") in names["ConfigMap"] or (
                volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
            )
        (container,) = pod["containers"]
        assert all(mount["name"] in volumes for mount in container["volumeMounts"])
        assert container["envFrom"] == [
            {"configMapRef": {"name": "scope-atlas-env"}},
            {"secretRef": {"name": "scope-atlas-secrets"}},
        ]


@pytest.fixture
def pod(monkeypatch) -> Callable[..., dict]:
    """The pod that the run launcher would make for a run with these tags."""
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import construct_dagster_k8s_job

    monkeypatch.setattr("dagster_k8s.launcher.load_kubernetes_config", lambda **_: None)  # there is no cluster here
    launcher = InstanceRef.from_dir(str(DEPLOY / "kubernetes")).run_launcher
    assert isinstance(launcher, K8sRunLauncher)

    def make(**tags: str) -> dict:
        run = dg.DagsterRun(job_name="index_release", run_id="0", tags=tags)
        context = K8sContainerContext.create_for_run(run, launcher, include_run_tags=True)
        settings = context.get_k8s_job_config("scope-atlas:0.1.0", launcher)
        job = construct_dagster_k8s_job(
            settings, ["dagster"], "run", user_defined_k8s_config=context.run_k8s_config, pod_name="run"
        )
        return ApiClient().sanitize_for_serialization(job)["spec"]["template"]["spec"]

    return make


def test_a_kubernetes_run_is_a_job_with_one_gpu_the_scenario_and_the_cache(manifests, pod):
    made = pod()
    (container,) = made["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts >= {"/scenario", "/cache", "/state", "/dagster/dagster.yaml"}
    claims = {v["persistentVolumeClaim"]["claimName"] for v in made["volumes"] if v.get("persistentVolumeClaim")}
    assert claims and all(("PersistentVolumeClaim", claim) in manifests for claim in claims)
    assert {v["configMap"]["name"] for v in made["volumes"] if v.get("configMap")} == {"scope-atlas-instance"}
    assert {"dagster.yaml", "scenario.yaml"} <= manifests["ConfigMap", "scope-atlas-instance"]["data"].keys()
    assert ("ServiceAccount", made["serviceAccountName"]) in manifests
    sources = {source.get("configMapRef", source.get("secretRef"))["name"] for source in container["envFrom"]}
    assert sources == {"scope-atlas-env", "scope-atlas-secrets"}


def test_a_kubernetes_run_that_says_so_asks_for_no_gpu(pod):
    tag = {"container_config": {"resources": {"limits": {"nvidia.com/gpu": 0}}}}
    (container,) = pod(**{"dagster-k8s/config": json.dumps(tag)})["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "0"


def test_workspaces_point_to_the_definitions_and_to_the_service_that_serves_them(manifests):
    (ray,) = WorkspaceFileTarget([str(DEPLOY / "ray" / "workspace.yaml")]).create_origins()
    assert ray.loadable_target_origin.module_name == "pipelines.definitions"
    assert ray.loadable_target_origin.working_directory == "/app"
    (kubernetes,) = WorkspaceFileTarget([str(DEPLOY / "kubernetes" / "workspace.yaml")]).create_origins()
    (port,) = manifests["Service", kubernetes.host]["spec"]["ports"]
    command = manifests["Deployment", kubernetes.host]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert port["port"] == kubernetes.port and str(kubernetes.port) in command and "pipelines.definitions" in command


def test_the_image_is_built_from_files_and_extras_that_exist():
    lines = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", lines)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    sources = [word for line in re.findall(r"^COPY (.+)$", lines, re.M) for word in line.split()[:-1]]
    allowed = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M)
    assert set(sources) == set(allowed) and all((REPOSITORY / source).exists() for source in sources)
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim", lines, re.M)
    packages = project["optional-dependencies"]
    shipped = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "only-include"
    ]
    assert set(shipped) <= set(sources) and packages


def test_nothing_secret_is_in_a_deployment():
    secret = r"(?i)(password|secret_access_key|token|api_key)[ \t]*[=:][ \t]*(?!\{env:|\$\{|token$)\S"
    for path in DEPLOY.rglob("*"):
        assert path.is_dir() or not re.search(secret, path.read_text(), re.M), path
