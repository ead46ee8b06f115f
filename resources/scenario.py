"""A scenario: one YAML under configs/ that says what every resource is. Not here: the resources themselves."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from pydantic import ValidationError

from resources.corpus import CorpusResource
from resources.embedder import EmbedderResource
from resources.labelling import LabellingResource
from resources.runner import ShardRunnerResource
from resources.sae import SaeSourceResource
from resources.store import StoreResource
from resources.subject import SubjectResource
from scopeatlas.errors import ConfigError

VARIABLE = "SCOPE_ATLAS_CONFIG"
DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
RESOURCES: dict[str, type[dg.ConfigurableResource]] = {
    "store": StoreResource,
    "subject": SubjectResource,
    "corpus": CorpusResource,
    "saes": SaeSourceResource,
    "labelling": LabellingResource,
    "embedder": EmbedderResource,
    "runner": ShardRunnerResource,
}


def scenario_path() -> Path:
    """The scenario in force: $SCOPE_ATLAS_CONFIG, or the demo's."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def load_scenario(path: Path) -> dict[str, dg.ConfigurableResource]:
    """The resources that a scenario describes. Raises ConfigError naming the file and the setting at fault."""
    try:
        body: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"cannot read scenario {path}: {error.strerror}; set {VARIABLE} to a YAML file under configs/"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    unknown = body.keys() - RESOURCES.keys()
    if unknown:
        raise ConfigError(f"{path}: unknown section {', '.join(sorted(unknown))}; there are {', '.join(RESOURCES)}")
    loaded = {}
    for name, resource in RESOURCES.items():
        try:
            loaded[name] = resource(**_known_fields(resource, body.get(name) or {}, path, name))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (name, *first["loc"]))
            raise ConfigError(f"{path}: {where}: {first['msg']}") from error
    return loaded


def _known_fields(resource: type[dg.ConfigurableResource], values: dict[str, Any], path: Path, section: str) -> dict[str, Any]:
    unknown = values.keys() - resource.model_fields.keys()
    if unknown:
        raise ConfigError(
            f"{path}: {section} has no setting {', '.join(sorted(unknown))}; it has {', '.join(resource.model_fields)}"
        )
    return values
