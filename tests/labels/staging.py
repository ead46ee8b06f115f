"""What the tests of the labels stage share: its settings, and reading its table.

What belongs here: names and plain functions. What does not: fixtures (`conftest.py`).
"""

import json
from collections.abc import Callable

import polars as pl

from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import FeatureLabels, LabelSettings
from scopeatlas.llm.config import ServerConfig
from tests.llm_server import Server
from tests.planted import DEAD, DENSE, RARE

RULES = LabelSettings()
STRICT = LabelSettings(RuleSettings(min_lift=0.9))
ASKED = [feature for feature in range(DEAD) if feature not in (RARE, DENSE)]
Label = Callable[..., FeatureLabels]


def config(server: Server, **changes) -> ServerConfig:
    return ServerConfig(**{"model": "m", "base_url": server.url, "max_attempts": 2, **changes})


def by_llm(labels: FeatureLabels) -> pl.DataFrame:
    return labels.table.filter(pl.col("method") == "llm")


def provenance_of(labels: FeatureLabels, feature: int, method: str) -> dict:
    is_it = (pl.col("feature") == feature) & (pl.col("method") == method)
    return json.loads(labels.table.row(by_predicate=is_it, named=True)["provenance"])


def current_of(labels: FeatureLabels, feature: int) -> dict:
    return labels.current.row(by_predicate=pl.col("feature") == feature, named=True)
