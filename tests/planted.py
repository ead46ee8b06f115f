"""Features whose firings are known, written as activation shards, so that every later stage runs on them for real."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.shards import write_shard
from scopeatlas.corpus.documents import SPLITS, Split
from scopeatlas.hypotheses.rules import Rule
from scopeatlas.hypotheses.units import Firings, Units
from scopeatlas.mining.examples import mine_examples
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.vocabulary import token_texts
from tests.conftest import WIDTH, Stored, text_mask

EXACT, WORDS, SUFFIX, TOPIC, RANDOM, OTHER_RANDOM, RARE, DENSE, FEW_REPORT, NO_REPORT, DEAD = range(11)
"""EXACT fires on every " the" and nowhere else; FEW_REPORT and NO_REPORT on " of", in two report documents and in none.
Every feature from DEAD on never fires."""


@dataclass(frozen=True)
class Planted(Stored):
    """A store whose one SAE has known firings."""

    units: Units
    firings: Firings

    def copy(self, root: Path) -> "Planted":
        """The same store at another place, to be changed."""
        shutil.copytree(self.store.root, root)
        return replace(self, store=Store(root))


def texts_of(stored: Stored, subject: SubjectModel) -> list[tuple[np.ndarray, list[str]]]:
    """Each context of a corpus: which of its positions count, and their texts."""
    tables = [stored.corpus.contexts(shard).tokens for shard in stored.corpus.shards]
    rows = [row for table in tables for row in table]
    masks = [mask for table in tables for mask in text_mask(table, subject)]
    return [(np.flatnonzero(m), token_texts(subject.tokenizer, row[m].tolist())) for row, m in zip(rows, masks, strict=True)]


def matching(stored: Stored, subject: SubjectModel, rule: Rule) -> np.ndarray:
    """The positions (in `Units`) that a rule matches, by running it on the text of each context."""
    length = stored.corpus.contexts(stored.corpus.shards[0]).tokens.shape[1]
    found = [
        number * length + at[np.array(rule.matches(texts), dtype=bool)]
        for number, (at, texts) in enumerate(texts_of(stored, subject))
    ]
    return np.concatenate(found)


def topic_of(units: Units) -> str:
    """A content word that is in many contexts of every split."""
    held, words = units.topic_words
    per_split = [np.asarray(held[units.context_split == i].sum(axis=0)).ravel() for i in range(len(SPLITS))]
    return words[int(np.argmax(np.min(per_split, axis=0)))]


def firings_of(positions: Sequence[np.ndarray], width: int = WIDTH) -> Firings:
    """The firings of features 0, 1, ... at their positions."""
    feature = np.repeat(np.arange(len(positions), dtype=np.uint32), [len(p) for p in positions])
    silent = Firings(feature, np.concatenate([np.sort(p) for p in positions]), width, value=np.zeros(len(feature), np.float32))
    return replace(silent, value=values_of(silent).astype(np.float32))


def planted_firings(stored: Stored, subject: SubjectModel, units: Units) -> Firings:
    """One feature for each of the names above."""
    draw = np.random.default_rng(0)
    counted = np.flatnonzero(units.counted)

    def most(rule: Rule, share: float) -> np.ndarray:
        at = matching(stored, subject, rule)
        return at[draw.random(len(at)) < share]

    of = matching(stored, subject, Rule("token", (" of",)))
    in_report = units.in_split("report")[of]
    documents = np.unique(units.document[of[in_report]])
    positions = {
        EXACT: matching(stored, subject, Rule("token", (" the",))),
        WORDS: most(Rule("word", ("was", "were", "is", "are")), 0.9),
        SUFFIX: most(Rule("suffix", ("ing",)), 0.9),
        TOPIC: most(Rule("topic", (topic_of(units),)), 0.1),
        RANDOM: draw.choice(counted, 300, replace=False),
        OTHER_RANDOM: draw.choice(counted, 200, replace=False),
        RARE: draw.choice(np.flatnonzero(units.in_split("explain")), 3, replace=False),
        DENSE: draw.choice(counted, len(counted) // 5, replace=False),
        FEW_REPORT: of[~in_report | np.isin(units.document[of], documents[:2])],
        NO_REPORT: of[~in_report],
    }
    return firings_of([positions[feature] for feature in sorted(positions)])


def elsewhere(units: Units, firings: Firings, split: Split) -> Firings:
    """The same firings, but those in documents of `split` are at other, random positions of that split."""
    draw = np.random.default_rng(1)
    inside = units.in_split(split)
    moved = [
        np.r_[mine[~inside[mine]], draw.choice(np.flatnonzero(inside), inside[mine].sum(), replace=False)]
        for mine in (firings.position[firings.feature == feature] for feature in range(DEAD))
    ]
    return firings_of(moved, firings.width)


def silent_in(units: Units, firings: Firings, split: Split) -> Firings:
    """The same firings but for those in documents of `split`."""
    kept = ~units.in_split(split)[firings.position]
    return Firings(firings.feature[kept], firings.position[kept], firings.width, value=firings.value[kept])


def values_of(firings: Firings) -> np.ndarray:
    """Activations from 1 to 11 that depend on feature and position alone: float16 [n]."""
    mixed = (firings.position.astype(np.uint64) * np.uint64(2654435761) + firings.feature.astype(np.uint64)) % np.uint64(1009)
    return (1 + mixed.astype(np.float32) / 101).astype(np.float16)


def plant(
    stored: Stored, subject: SubjectModel, units: Units, firings: Firings, root: Path, *, values: np.ndarray | None = None
) -> Planted:
    """A store at `root` with the corpus and `firings` as the activations of its SAE, in place of any that are there."""
    store, entry = Store(root), stored.entry
    shutil.copytree(stored.corpus.folder, store.corpus_folder(stored.corpus.id), dirs_exist_ok=True)
    store.register(entry.key, entry.as_json())
    stage = store.stage(entry.key, stored.corpus.id, "activations")
    stage.root.mkdir(parents=True, exist_ok=True)
    values = firings.value.astype(np.float16) if values is None else values
    ends = [*units.offsets[1:], units.contexts * units.length]
    for key, start, end in zip(activation_keys(stored.corpus, entry, subject), units.offsets, ends, strict=True):
        for record in [r for r in stage.records() if r.key == key]:
            stage.discard(record)
        mine = (firings.position >= start) & (firings.position < end)
        path = stage.data_path(key, ".parquet")
        write_shard(path, firings.feature[mine], firings.position[mine] - start, values[mine], scale=1.0)
        stage.commit(key, [path], {})
    return Planted(store, stored.corpus, [entry], units, firings)


def planted_chain(stored: Stored, subject: SubjectModel, root: Path) -> Planted:
    """`planted_firings` over a corpus, and their examples."""
    units = Units(stored.corpus, subject)
    return mined_again(stored, subject, units, planted_firings(stored, subject, units), root)


def mined_again(
    stored: Stored, subject: SubjectModel, units: Units, firings: Firings, root: Path, *, values: np.ndarray | None = None
) -> Planted:
    """`plant`, and the examples of what was planted."""
    planted = plant(stored, subject, units, firings, root, values=values)
    mine_examples(planted.store, planted.corpus, planted.entry, subject)
    return planted
