"""How features are labelled and scored, and the LLM that may explain them. Not here: doing it (scopeatlas/labels)."""

import dagster as dg
from pydantic import Field

from scopeatlas.labels.chat import ExplainerConfig
from scopeatlas.labels.rule_labeller import RuleSettings
from scopeatlas.labels.stage import LabelSettings
from scopeatlas.scoring.stage import ScoreSettings


class ExplainerSettings(dg.Config):
    """An OpenAI-compatible LLM that explains features; off unless it names a model."""

    model: str = Field(default="", description="The model's name at the server; empty is off.")
    base_url: str | None = Field(default=None, description="The server, if not OpenAI's: vLLM, llama.cpp, Ollama and so on.")
    api_key_variable: str = Field(default="OPENAI_API_KEY", description="Name of the environment variable that holds the key.")
    max_features: int = Field(default=100, ge=0, description="Explain at most so many features of each SAE.")
    max_tokens_total: int = Field(default=2_000_000, description="A run stops before it would pass so many tokens.")
    max_concurrency: int = Field(default=4, ge=1, description="Requests in flight.")

    def config(self) -> ExplainerConfig:
        return ExplainerConfig(
            model=self.model,
            base_url=self.base_url,
            api_key_variable=self.api_key_variable,
            max_tokens_total=self.max_tokens_total,
            max_concurrency=self.max_concurrency,
        )


class LabellingResource(dg.ConfigurableResource):
    """When a label is given, when it is refused, and when it is scored."""

    explainer: ExplainerSettings = ExplainerSettings()
    min_lift: float = Field(default=0.3, description="A rule must gain this much on select documents, after its complexity cost.")
    max_density: float = Field(default=0.1, description="A feature that fires on a larger share of tokens is dense: refused.")
    min_contexts: int = Field(default=6, description="A feature that fires in fewer explain contexts is rare: refused.")
    min_documents: int = Field(default=3, description="A feature that fires in fewer explain documents is refused.")
    min_report_documents: int = Field(
        default=3, description="A label is scored only if its feature fires in as many report documents."
    )

    def labels(self) -> LabelSettings:
        rules = RuleSettings(
            min_lift=self.min_lift,
            max_density=self.max_density,
            min_contexts=self.min_contexts,
            min_documents=self.min_documents,
        )
        return LabelSettings(rules, self.explainer.config(), self.explainer.max_features)

    def scores(self) -> ScoreSettings:
        return ScoreSettings(min_report_documents=self.min_report_documents)
