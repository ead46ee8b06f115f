"""Scenarios: the YAML files under configs/."""

from pathlib import Path

import pytest

from resources.scenario import RESOURCES, load_scenario
from scopeatlas.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_scenario_that_ships_loads(path: Path):
    assert set(load_scenario(path)) == set(RESOURCES)


def test_every_setting_is_described():
    for resource in RESOURCES.values():
        for name, field in resource.model_fields.items():
            assert field.description or name == "explainer", f"{resource.__name__}.{name}"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = "subject: {name: m}\ncorpus: {name: c, source: files, paths: ['*.txt']}\n"


def test_a_misspelt_setting_is_named_with_those_that_exist(tmp_path: Path):
    path = write(tmp_path, MINIMAL + "embedder: {nmae: x}\n")
    with pytest.raises(ConfigError, match=r"scenario.yaml: embedder has no setting nmae; it has name"):
        load_scenario(path)


def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path):
    path = write(tmp_path, MINIMAL.replace("name: c", "name: c, contexts_per_document: many"))
    with pytest.raises(ConfigError, match=r"corpus.*contexts_per_document"):
        load_scenario(path)


def test_an_unknown_section_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown section extra"):
        load_scenario(write(tmp_path, MINIMAL + "extra: {}\n"))


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read scenario .*nowhere.yaml"):
        load_scenario(tmp_path / "nowhere.yaml")
