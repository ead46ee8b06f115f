"""How features are labelled and tested, and the LLMs that may explain and judge. Not here: doing it (scopeatlas/labels)."""

from typing import Literal

import dagster as dg
from pydantic import Field

from scopeatlas.labels.explainers import ExplainMethod
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import LabelSettings
from scopeatlas.llm.config import ServerConfig
from scopeatlas.scoring.stage import ScoreSettings
from scopeatlas.scoring.table import Scorer

JUDGED_BY_DEFAULT: tuple[Scorer, ...] = ("detection", "fuzzing", "intruder")


class ServerSettings(dg.Config):
    """An OpenAI-compatible LLM; off unless it names a model."""

    model: str = Field(default="", description="The model's name at the server; empty is off.")
    base_url: str | None = Field(default=None, description="The server, if not OpenAI's: vLLM, llama.cpp, Ollama and so on.")
    api_key_variable: str = Field(default="OPENAI_API_KEY", description="Name of the environment variable that holds the key.")
    temperature: float = Field(default=0.0, description="Of its answers; 0 is not yet determinism, so answers are kept.")
    timeout_seconds: float = Field(default=60, description="For a whole request, answer included.")
    max_concurrency: int = Field(default=8, ge=1, description="Requests in flight at most; fewer while the server pushes back.")
    max_attempts: int = Field(default=5, ge=1, description="How often one request is sent at most.")
    requests_per_minute: int | None = Field(default=None, description="The account's limit, if it has one.")
    tokens_per_minute: int | None = Field(default=None, description="The account's limit, if it has one.")
    max_tokens_total: int = Field(
        default=2_000_000,
        description="Tokens that this store may ever use, by whatever model; no request goes out that would pass it.",
    )
    max_usd_total: float | None = Field(default=None, description="The same in US dollars; needs the prices.")
    usd_per_million_input: float | None = Field(default=None, description="Price of prompt tokens.")
    usd_per_million_cached: float | None = Field(default=None, description="Price of prompt tokens that the server had cached.")
    usd_per_million_output: float | None = Field(default=None, description="Price of answers.")
    tokenizer: str | None = Field(default=None, description="Folder or Hub id of the server's tokenizer, to count exactly.")
    reasoning_tokens: int = Field(
        default=0, ge=0, description="Tokens that an answer may use beyond its own, for a model that thinks first."
    )
    batch: Literal["off", "provider", "local"] = Field(
        default="off",
        description="provider: the Batch API, at half the price within a day; local: the same files, our own runner.",
    )
    offline: bool = Field(default=False, description="Refuse any server that is not on this machine.")

    def config(self) -> ServerConfig:
        return ServerConfig(**self.model_dump())


class LabellingResource(dg.ConfigurableResource):
    """When a label is given, when it is refused, how it is tested."""

    explainer: ServerSettings = Field(default=ServerSettings(), description="Explains features; off unless it names a model.")
    judge: ServerSettings = Field(
        default=ServerSettings(), description="Judges whether texts fit a label; better another model than the explainer."
    )
    second_judge: ServerSettings = Field(default=ServerSettings(), description="Judges a tenth of the features again.")
    method: ExplainMethod = Field(
        default="combined",
        description="What the explainer is shown: max_activating, quantile_mixed, contrastive, output_centric or all combined.",
    )
    max_features: int = Field(default=100, ge=0, description="Explain at most so many features of each SAE unasked.")
    falsified_features: int = Field(
        default=128, ge=0, description="Run predictions of so many features' labels through the subject model; 0 is off."
    )
    min_lift: float = Field(default=0.3, description="A rule must gain this much on select documents, after its complexity cost.")
    max_density: float = Field(default=0.1, description="A feature that fires on a larger share of tokens is dense: refused.")
    min_contexts: int = Field(default=6, description="A feature that fires in fewer explain contexts is rare: refused.")
    min_documents: int = Field(default=3, description="A feature that fires in fewer explain documents is refused.")
    min_report_documents: int = Field(
        default=3, description="A label is scored only if its feature fires in as many report documents."
    )
    judged_features: int = Field(
        default=1000, ge=0, description="Text labels that the judge tests at most, of each SAE; rules are executed instead."
    )
    retrieved_features: int = Field(default=24, ge=0, description="Labels tested by embedding retrieval, of each SAE; 0 is off.")
    steered_features: int = Field(
        default=8, ge=0, description="`writes` claims tested by steering the subject model, of each SAE; 0 is off."
    )
    simulation: bool = Field(
        default=False, description="Also have the judge simulate activations; needs log-probabilities and costs most."
    )
    random_model: bool = Field(
        default=False,
        description="Also run the chain on a randomly initialised subject model: a control that costs as much again.",
    )

    def labels(self) -> LabelSettings:
        rules = RuleSettings(
            min_lift=self.min_lift,
            max_density=self.max_density,
            min_contexts=self.min_contexts,
            min_documents=self.min_documents,
        )
        return LabelSettings(
            rules,
            explainer=self.explainer.config(),
            judge=self.judge.config(),
            method=self.method,
            llm_features=self.max_features,
            falsified_features=self.falsified_features,
        )

    def scores(self, embedder: str) -> ScoreSettings:
        """embedder: the name of the model that embeds, which scores of retrieval depend on."""
        return ScoreSettings(
            embedder=embedder,
            scorers=(*JUDGED_BY_DEFAULT, *(("simulation",) if self.simulation else ())),
            random_model=self.random_model,
            min_report_documents=self.min_report_documents,
            judge=self.judge.config(),
            second_judge=self.second_judge.config(),
            judged_features=self.judged_features,
            retrieved_features=self.retrieved_features,
            steered_features=self.steered_features,
        )
