"""Asking an OpenAI-compatible server: requests, a journal of paid answers, a budget, limits, the runner and its estimate."""
