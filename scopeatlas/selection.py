"""Which features somebody is interested in: named by number, found by a search, or firing on a text.

What belongs here: from words to feature numbers. What does not: what is then done with those features.
"""

import re
from dataclasses import dataclass

import numpy as np

from scopeatlas.activations.probe import Probe
from scopeatlas.atlas.search import open_reader
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.dictionaries.sparse import SparseDictionary
from scopeatlas.errors import ConfigError
from scopeatlas.storage.store import Store
from scopeatlas.storage.uris import Location
from scopeatlas.subject.loading import SubjectModel

_PART = re.compile(r"(?P<first>\d+(\.\d+)?)(-(?P<last>\d+(\.\d+)?))?")


@dataclass(frozen=True)
class Wanted:
    """Features by number such as "12,40-48", by the words of a `query`, by a `text` that they fire on; any of the three.

    count: how many features a query or a text stands for.
    """

    features: str = ""
    query: str = ""
    text: str = ""
    count: int = 20


def features_wanted(wanted: Wanted, store: Store, entry: SaeEntry, subject: SubjectModel) -> list[int] | None:
    """The flat ids that `wanted` stands for, in order; None if nothing is asked for.

    Raises ConfigError for what is no feature of this SAE, AtlasError or UnknownSaeError if a search cannot be made.
    """
    found: set[int] = set()
    if wanted.features.strip() or wanted.text.strip():
        dictionary = open_dictionary(entry)
        found |= set(parse_features(wanted.features, dictionary))
        if wanted.text.strip():
            found |= set(features_of_text(Probe(dictionary, subject), wanted.text, count=wanted.count))
    if wanted.query.strip():
        found |= set(features_of_query(store.root, entry.key, wanted.query, count=wanted.count))
    asked = wanted.features.strip() or wanted.text.strip() or wanted.query.strip()
    return sorted(found) if asked else None


def parse_features(text: str, dictionary: SparseDictionary) -> list[int]:
    """The flat ids in a list such as "12,40-48"; of a multi-layer SAE also LAYER.INDEX, such as "7.123" or "7.120-7.130".

    Raises ConfigError naming the part that is no feature.
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _PART.fullmatch(part)
        if match is None:
            raise ConfigError(f"'{part}' names no features; write numbers and ranges such as 12,40-48")
        first = _flat(match["first"], dictionary)
        last = first if match["last"] is None else _flat(match["last"], dictionary)
        if last < first:
            raise ConfigError(f"'{part}' ends before it begins; write the lower number first")
        found |= set(range(first, last + 1))
    return sorted(found)


def _flat(name: str, dictionary: SparseDictionary) -> int:
    layer, _, index = name.rpartition(".")
    flat, limit = int(index), dictionary.width
    if layer:
        layers = [site.layer for site in dictionary.sites_in]
        limit = dictionary.features_per_layer
        if int(layer) not in layers or len(layers) == 1:
            raise ConfigError(f"'{name}': this SAE has no layer {layer}; write a feature's number alone, or one of its layers")
        if flat < limit:
            return layers.index(int(layer)) * limit + flat
    if flat >= limit:
        raise ConfigError(f"'{name}' is no feature of this SAE: the last one{' of a layer' if layer else ''} is {limit - 1}")
    return flat


def features_of_text(probe: Probe, text: str, *, count: int) -> list[int]:
    """The `count` features with the highest activation anywhere in a text, the highest first; ties go to the lower id."""
    (found,) = probe.activations([text])
    features, place = np.unique(found.feature, return_inverse=True)
    peaks = np.zeros(len(features), dtype=np.float32)
    np.maximum.at(peaks, place, found.value)
    return features[np.argsort(-peaks, kind="stable")][:count].tolist()


def features_of_query(root: Location, sae: str, query: str, *, count: int) -> list[int]:
    """The `count` features of an SAE whose descriptions come closest to what `query` says, the closest first."""
    return [hit.feature for hit in open_reader(root).search(query, k=count, sae=sae).nearest]
