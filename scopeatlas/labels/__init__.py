"""Proposing labels: the rule labeller, LLM explainers, prompts, journal."""
