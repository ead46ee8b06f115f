"""Labels that people wrote or brought from elsewhere: methods like the others, scored by the same scorers.

What belongs here: writing one down, taking one back, reading those that stand. What does not: whether one is current
(`choosing.py`), or other tools' files (`exchange/`). They lie in `annotations.jsonl` of the labels stage, which is only ever
added to.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from scopeatlas.errors import ConfigError
from scopeatlas.hypotheses.labels import Label
from scopeatlas.labels import versions
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location

MAX_LENGTH = 2000
SHORT_WORDS = 8
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")


def annotate(
    store: Store, corpus_id: str, sae: str, feature: int, *, reads: str, writes: str = "", label: str = "", author: str = ""
) -> Label:
    """Write a person's label of one feature down, in place of an earlier one of the same author.

    reads, writes: what the feature fires on and what it promotes; one of the two is needed. label: a few words, by default
    the first of those. The labels stage takes it up when it next runs. Raises ConfigError if there is nothing to write
    down, UnknownSaeError for an SAE that the store does not know, StoreError if it cannot be written.
    """
    store.entry(sae)
    texts = [one_line(text) for text in (reads, writes, label, author)]
    reads, writes, label, author = texts
    if not (reads or writes):
        raise ConfigError(f"an annotation of feature {feature} says nothing: give what it reads or what it writes")
    if feature < 0 or any(len(text) > MAX_LENGTH for text in texts):
        raise ConfigError(f"an annotation needs a feature's number and texts of at most {MAX_LENGTH} characters")
    short = label or " ".join((reads or writes).split()[:SHORT_WORDS])
    provenance = json.dumps({"author": author, "time": datetime.now(UTC).isoformat(timespec="seconds")}, ensure_ascii=False)
    version = f"human:{author}" if author else "human"
    made = Label(feature, "human", "ok", short, reads, writes, version=version, current=False, provenance=provenance)
    versions.append(_path(store, corpus_id, sae), [{"label": versions.as_entry(made)}])
    return made


def retract(store: Store, corpus_id: str, sae: str, feature: int, *, author: str = "") -> Label:
    """Take back what an author wrote of a feature; returns what that was. Raises ConfigError if there is nothing."""
    version = f"human:{one_line(author)}" if one_line(author) else "human"
    standing = [mine for mine in read_annotations(store, corpus_id, sae) if (mine.feature, mine.version) == (feature, version)]
    if not standing:
        raise ConfigError(f"{author or 'nobody'} has no annotation of feature {feature} of {sae} to take back")
    versions.append(_path(store, corpus_id, sae), [{"retracted": {"feature": feature, "version": version}}])
    return standing[0]


def imported_label(feature: int, reads: str, *, version: str, provenance: Mapping[str, object]) -> Label:
    """A label from elsewhere, as an annotation: on one line, its first words as the short form.

    version: who said it where; of one version a feature has one label. provenance: kept as it is, but that half a surrogate
    pair becomes "?". Raises ConfigError as `annotate` does.
    """
    text = one_line(reads)
    if not text or feature < 0 or len(text) > MAX_LENGTH:
        raise ConfigError(f"an explanation needs a feature's number and a text of 1 to {MAX_LENGTH} characters")
    short = " ".join(text.split()[:SHORT_WORDS])
    origin = _encodable(json.dumps(provenance, ensure_ascii=False, sort_keys=True))
    return Label(feature, "imported", "ok", short, text, version=version, current=False, provenance=origin)


def take_in(store: Store, corpus_id: str, sae: str, labels: Iterable[Label]) -> list[Label]:
    """Write `imported_label`s down in place of earlier ones of the same feature and version; returns those that were not there
    already. Of several with one feature and version the last stands. The labels stage takes them up when it next runs.
    Raises UnknownSaeError, StoreError as `annotate` does."""
    store.entry(sae)
    last = {(label.feature, label.version): label for label in labels}
    standing = {label.label_id for label in read_annotations(store, corpus_id, sae)}
    new = [label for label in last.values() if label.label_id not in standing]
    if new:
        versions.append(_path(store, corpus_id, sae), [{"label": versions.as_entry(label)} for label in new])
    return new


def read_annotations(store: Store, corpus_id: str, sae: str) -> list[Label]:
    """The annotations that stand: of each author and feature the last, unless it was taken back. By feature, then author."""
    return _standing(versions.read(_path(store, corpus_id, sae)))


def _standing(entries: Iterable[dict]) -> list[Label]:
    found: dict[tuple[int, str], Label] = {}
    for entry in entries:
        if "retracted" in entry:
            found.pop((entry["retracted"]["feature"], entry["retracted"]["version"]), None)
        else:
            made = versions.from_entry(entry["label"])
            found[made.feature, made.version] = made
    return [found[key] for key in sorted(found)]


def _path(store: Store, corpus_id: str, sae: str) -> Location:
    return store.stage(sae, corpus_id, "labels").root / "annotations.jsonl"


def one_line(text: str) -> str:
    """A text as a label holds it: no line breaks, runs of spaces, control characters or half surrogate pairs (which become
    "?")."""
    return " ".join(_CONTROL.sub(" ", _encodable(text)).split())


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
