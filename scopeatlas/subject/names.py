"""The names of subject models: releases, TransformerLens and the Hub spell the same model differently.

What belongs here: bringing such names to one spelling. What does not: loading the model (`loading.py`).
"""

import re

# Families whose Hub organisation is often left out, by how their names begin.
_ORGANISATIONS = {
    "gemma-": "google",
    "gpt2": "openai-community",
    "pythia-": "eleutherai",
    "llama-": "meta-llama",
    "qwen": "qwen",
    "mistral-": "mistralai",
    "deepseek-": "deepseek-ai",
}


def canonical_model_name(text: str) -> str:
    """One spelling of a subject model's name, to compare and not to download by: the Hub id in lower case.

    It undoes what releases are known to write: no organisation, `gemma-v3-1b-pt` or a trailing `-v3`, Meta's own prefix,
    TransformerLens' names (`gpt2-small`, `gemma-2-2b`), and `-pt` where the Hub has none (`gemma-3-270m-pt`) or none
    where it has one (`gemma-3-1b`). "" stays "".
    """
    organisation, _, name = text.strip().strip("/").lower().rpartition("/")
    name = name.removeprefix("meta-")
    if name.startswith("gemma-"):
        name = _canonical_gemma(name)
    if name == "gpt2-small":
        name = "gpt2"
    if not organisation:
        organisation = next((owner for start, owner in _ORGANISATIONS.items() if name.startswith(start)), "")
    return f"{organisation}/{name}" if organisation else name


def _canonical_gemma(name: str) -> str:
    name = re.sub(r"^gemma-v(\d)", r"gemma-\1", name)
    name = re.sub(r"-v3$", "", name)
    base = name.removesuffix("-pt")
    if not base.startswith("gemma-3-") or base == "gemma-3-270m" or base.endswith("-it"):
        return base
    return f"{base}-pt"


def names_same_model(name: str, other: str) -> bool:
    """Whether two names mean one model; where one gives no organisation, that of the other is not held against it."""
    one, two = canonical_model_name(name), canonical_model_name(other)
    if "/" in one and "/" in two:
        return one == two
    return one.rpartition("/")[2] == two.rpartition("/")[2]
