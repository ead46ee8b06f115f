"""A scripted explainer and judge for the loopback server: what they say follows from what they are shown.

What belongs here: reading the evidence out of a request, and answers to the questions of `labels/`. What does not: the wire
and its faults (`llm_server.py`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.llm_brain import Body, SchemaBrain

Evidence = dict[str, list[Any]]
_MARKED = re.compile("<<(.+?)>>")


def evidence_of(body: Body) -> Evidence:
    """The sections between the fence lines of a request, by title."""
    lines = body["messages"][1]["content"].splitlines()
    fences = [i for i, line in enumerate(lines) if re.fullmatch("=== DATA [0-9a-f]+ (BEGIN|END) ===", line)]
    sections: Evidence = {}
    for line in lines[fences[0] + 1 : fences[1]]:
        try:
            value = json.loads(line)
        except ValueError:
            sections[line] = []
        else:
            sections[list(sections)[-1]].append(value)
    return sections


def most_marked(evidence: Evidence) -> dict[str, Any]:
    """The explanation that the feature fires on the word that is marked most often, the first in the alphabet among equals."""
    words = Counter(word for example in evidence.get("ACTIVATING EXAMPLES", []) for word in _MARKED.findall(example["text"]))
    best = min(words, key=lambda word: (-words[word], word), default="nothing")
    return explanation(best)


def explanation(word: str, **changes: Any) -> dict[str, Any]:
    """A whole answer that names one word."""
    said: dict[str, Any] = {
        "reads": f'The word "{word}".',
        "writes": "",
        "status": "ok",
        "label": " ".join(f"the word {word}".split()[:8]),
        "scope": "token",
        "confidence": 0.7,
        "predicted_positive": [f"It says {word} here.", f"Once more {word}."],
        "predicted_negative": ["It says something else here.", "Never again."],
    }
    return {**said, **changes}


def quoted(evidence: Evidence) -> dict[str, int]:
    """The verdict that a text is meant if it holds a word that the description quotes: a judge who is right about words."""
    words = re.findall('"(.+?)"', evidence["DESCRIPTION"][0])
    return {str(number): int(any(word in text for word in words)) for number, text in evidence["TEXTS"]}


@dataclass
class ExplainerBrain:
    """Explains, judges and, by SchemaBrain, does whatever else is asked. Each is told what it is shown."""

    explains: Callable[[Evidence], Any] = most_marked
    judges: Callable[[Evidence], Any] = quoted
    others: SchemaBrain = field(default_factory=SchemaBrain)

    def answer(self, body: Body) -> str:
        says: Mapping[str, Callable[[Evidence], Any]] = {"feature_explanation": self.explains, "detection": self.judges}
        name = body.get("response_format", {}).get("json_schema", {}).get("name", "")
        return json.dumps(says[name](evidence_of(body))) if name in says else str(self.others.answer(body))
