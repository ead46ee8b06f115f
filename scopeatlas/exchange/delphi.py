"""delphi's cache of latents made into a corpus and activation shards, and these written as such a cache.

What belongs here: what of the one has a counterpart in the other. What does not: the cache's files (`delphi_layout.py`), or how a
corpus or a shard is kept (`corpus/build.py`, `activations/shards.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from scopeatlas.activations.cache import activation_keys
from scopeatlas.activations.reading import text_mask
from scopeatlas.activations.shards import SPILL_BYTES, ShardWriter, read_shard
from scopeatlas.corpus.build import Corpus, open_corpus, write_corpus_shard
from scopeatlas.corpus.contexts import Contexts
from scopeatlas.corpus.documents import SPLITS, Document, Split, split_of
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.dictionaries.releases import SaeEntry, open_dictionary
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange.delphi_layout import DelphiCache, NonZeros, open_cache, split_latents, write_split
from scopeatlas.runner.local import Log, silent
from scopeatlas.storage.files import content_hash, read_json_if_there, stable_id, write_json
from scopeatlas.storage.records import ShardKey, StageFolder
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel

IMPORT_VERSION = 1
SHARD_TOKENS = 1 << 18
SPLIT_ROWS = 16


@dataclass(frozen=True)
class Imported:
    """What an import gave. left_out: non-zeros that are no evidence here: below zero, or at a token that does not count."""

    corpus: Corpus
    nonzeros: int
    left_out: int


def import_delphi(
    store: Store,
    folder: Path,
    entry: SaeEntry,
    subject: SubjectModel,
    *,
    name: str = "delphi",
    documents: Sequence[str] | None = None,
    log: Log = silent,
) -> Imported:
    """Make the cache of one hookpoint a corpus, and the activations over it of the SAE that it was made with.

    folder: the hookpoint's. entry: that SAE, which mining reads decoder and tokenizer facts from. documents: of each row the
    document that it is cut from; delphi does not keep it. Without it each row is a document of its own, and rows go to
    splits SPLIT_ROWS together, because neighbours as a rule continue one text. Another hookpoint of the same run joins the
    same corpus. The values stay as they are, rounded by delphi to 16 bits; fidelity cannot be measured on them.
    Activations that are there already, of these files, are left alone. Raises ExchangeError if the cache is damaged or of
    another SAE, model or tokenizer than said, or if other activations of the SAE are there.
    """
    cache = open_cache(folder)
    _check_fits(cache, entry, subject)
    store.require_writable()
    corpus = _corpus(store, cache, subject, name, documents)
    stage = store.stage(entry.key, corpus.id, "activations")
    keys = activation_keys(corpus, entry, subject)
    pending = set(stage.pending(keys))
    for key in set(keys) - pending:
        if stage.record(key).facts.get("delphi") != cache.hashes:
            raise ExchangeError(
                f"{entry.key} has activations over {corpus.id} that are not of {folder}; import into another store"
            )
    if pending:
        log(f"importing {len(pending)} shards from {folder}")
        _write_activations(stage, cache, corpus, keys, pending, subject)
    facts = [record.facts for record in stage.manifest(keys)]
    if entry.key not in store.registered():
        store.register(entry.key, entry.as_json())
    return Imported(corpus, sum(fact["nonzeros"] for fact in facts), sum(fact["left_out"] for fact in facts))


def _check_fits(cache: DelphiCache, entry: SaeEntry, subject: SubjectModel) -> None:
    dictionary = open_dictionary(entry)
    if cache.width != dictionary.width:
        raise ExchangeError(
            f"{cache.folder} has {cache.width:,} latents and {entry.key} {dictionary.width:,}; name the SAE it is of"
        )
    for model_name in (str(cache.config.get("model_name", "")), dictionary.model_name):
        if not subject.matches(model_name):
            raise ExchangeError(f"{cache.folder} is of {model_name} and the subject model is {subject.name}; name its model")
    if not 0 <= cache.tokens.min() <= cache.tokens.max() < len(subject.tokenizer):
        raise ExchangeError(
            f"{cache.folder} holds token {cache.tokens.max()}, which {subject.name} does not have; name its model"
        )


def _corpus(store: Store, cache: DelphiCache, subject: SubjectModel, name: str, documents: Sequence[str] | None) -> Corpus:
    """The rows as contexts, SHARD_TOKENS to a shard, in their order."""
    rows, length = cache.tokens.shape
    if documents is not None and len(documents) != rows:
        raise ExchangeError(
            f"{len(documents):,} documents are named for the {rows:,} rows of {cache.folder}; name one for each row"
        )
    content = sha256(cache.tokens.tobytes()).hexdigest()
    request = content_hash(IMPORT_VERSION, cache.tokens.shape, content, documents, subject.tokenizer_identity)
    corpus_id = f"{name}-{request[:8]}"
    folder = store.corpus_folder(corpus_id)
    if read_json_if_there(folder / "corpus.json") is not None:
        corpus = open_corpus(store, corpus_id)
        if not StageFolder(folder).pending(corpus.shards):
            return corpus
    owners, owned = _documents(cache, subject, content, documents)
    contexts = Contexts(
        np.array([stable_id("context", f"{owner}:{row}") for row, owner in enumerate(owners)], dtype=np.int64),
        owners,
        np.array([SPLITS.index(owned[owner][1]) for owner in owners], dtype=np.uint8),
        cache.tokens.astype(np.int32),
    )
    unwritten = dict(owned)
    keys: list[ShardKey] = []
    for number, part in enumerate(np.array_split(np.arange(rows), _shards(rows, length))):
        mine = [unwritten.pop(owner) for owner in dict.fromkeys(owners[row] for row in part) if owner in unwritten]
        keys.append(write_corpus_shard(StageFolder(folder), f"{number:04x}", mine, contexts.take(part)))
    body = {
        "request": request,
        "settings": {"name": name, "source": {"kind": "delphi", "config": cache.config}},
        "facts": _facts(cache, contexts, subject, [split for _, split in owned.values()], rows_are_documents=documents is None),
        "shards": [[key.name, key.identity] for key in keys],
    }
    write_json(folder / "corpus.json", body)
    return open_corpus(store, corpus_id)


def _shards(rows: int, length: int) -> int:
    return max(1, rows * length // SHARD_TOKENS)


def _documents(
    cache: DelphiCache, subject: SubjectModel, content: str, documents: Sequence[str] | None
) -> tuple[list[str], dict[str, tuple[Document, Split]]]:
    """The document id of each row; and each document, its text decoded from its rows, with its split."""
    texts = subject.tokenizer.batch_decode(cache.tokens, skip_special_tokens=True)
    fractions = Sampling().splits
    if documents is None:
        owners = [content_hash("delphi row", row.tolist())[:32] for row in cache.tokens]
        titles = [f"row {row}" for row in range(len(owners))]
        splits: list[Split] = [split_of(f"{content}:{row // SPLIT_ROWS}", fractions) for row in range(len(owners))]
    else:
        owners = [content_hash("delphi document", document)[:32] for document in documents]
        titles = list(documents)
        splits = [split_of(owner, fractions) for owner in owners]
    rows: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(owner, []).append(row)
    return owners, {
        owner: (
            Document(owner, "".join(texts[row] for row in dict.fromkeys(mine)), "delphi", {"title": titles[mine[0]]}),
            splits[mine[0]],
        )
        for owner, mine in rows.items()
    }


def _facts(
    cache: DelphiCache, contexts: Contexts, subject: SubjectModel, splits: Sequence[Split], *, rows_are_documents: bool
) -> dict[str, object]:
    counted = text_mask(contexts, subject).sum(axis=1)
    return {
        "documents": len(splits),
        "documents_per_split": {split: splits.count(split) for split in SPLITS},
        "contexts": len(contexts),
        "context_length": contexts.tokens.shape[1],
        "tokens": int(counted.sum()),
        "tokens_per_split": {split: int(counted[contexts.splits == index].sum()) for index, split in enumerate(SPLITS)},
        "rows_are_documents": rows_are_documents,
        "rows_that_begin_with_bos": int((cache.tokens[:, 0] == subject.tokenizer.bos_token_id).sum()),
    }


def _write_activations(
    stage: StageFolder,
    cache: DelphiCache,
    corpus: Corpus,
    keys: Sequence[ShardKey],
    pending: set[ShardKey],
    subject: SubjectModel,
) -> None:
    """Sort the cache's non-zeros into the pending shards, in bounded memory."""
    length = cache.tokens.shape[1]
    counted = np.concatenate([text_mask(corpus.contexts(shard), subject) for shard in corpus.shards])
    sizes = [len(corpus.contexts(shard)) for shard in corpus.shards]
    starts = np.cumsum([0, *sizes])
    left_out = np.zeros(len(keys), dtype=np.int64)
    with ExitStack() as stack:
        wanted = [number for number, key in enumerate(keys) if key in pending]
        spill_bytes = SPILL_BYTES // len(wanted)
        writers = {n: stack.enter_context(ShardWriter(scale=1.0, spill_bytes=spill_bytes)) for n in wanted}
        for part in cache.nonzeros():
            shard = np.searchsorted(starts, part.row, side="right") - 1
            evident = counted[part.row, part.position] & (part.value > 0)
            left_out += np.bincount(shard[~evident], minlength=len(keys))
            for number, writer in writers.items():
                mine = part.where(evident & (shard == number))
                writer.add(mine.latent, (mine.row - starts[number]) * length + mine.position, mine.value)
        for number, writer in writers.items():
            data = stage.data_path(keys[number], ".parquet")
            facts = {"tokens": int(counted[starts[number] : starts[number + 1]].sum()), "nonzeros": writer.write(data)}
            stage.commit(keys[number], [data], facts | {"left_out": int(left_out[number]), "delphi": cache.hashes})


def export_delphi(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel, folder: Path, *, splits: int = 5) -> Path:
    """Write an SAE's activations over a corpus as delphi's cache, in `splits` files; returns the hookpoint's folder in `folder`.

    Each file is made in memory, as delphi makes and reads it. Contexts are rows, in order; where they are padded stands the
    tokenizer's padding token, or its end of text. Raises NotReadyError if the activations are not there, ExchangeError if the folder holds a
    cache already or a value does not fit delphi's 16 bits.
    """
    target = folder / (entry.path.replace("/", ".") or entry.release)
    if target.exists() and any(target.iterdir()):
        raise ExchangeError(f"{target} holds files already; delete it or name another folder")
    dictionary = open_dictionary(entry)
    stage = store.stage(entry.key, corpus.id, "activations")
    keys = activation_keys(corpus, entry, subject)
    stage.manifest(keys)
    contexts = [corpus.contexts(shard).tokens for shard in corpus.shards]
    tokens = np.concatenate(contexts).astype(np.int64)
    tokens[tokens < 0] = _padding(subject)
    starts = np.cumsum([0, *map(len, contexts)])
    for latents in split_latents(dictionary.width, splits):
        found = list(_of_latents(stage, keys, latents, starts, tokens.shape[1]))
        columns = ("row", "position", "latent", "value")
        write_split(target, latents, NonZeros(*(np.concatenate([getattr(p, c) for p in found]) for c in columns)), tokens)
    config = {
        "dataset_repo": corpus.id,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": tokens.shape[1],
        "n_tokens": tokens.size,
        "n_splits": splits,
        "model_name": dictionary.model_name or subject.name,
    }
    write_json(target / "config.json", config)
    return target


def _padding(subject: SubjectModel) -> int:
    tokens = (subject.tokenizer.pad_token_id, subject.tokenizer.eos_token_id)
    return next((token for token in tokens if isinstance(token, int)), 0)


def _of_latents(
    stage: StageFolder, keys: Sequence[ShardKey], latents: range, starts: np.ndarray, length: int
) -> Iterator[NonZeros]:
    for key, start in zip(keys, starts, strict=False):
        acts = read_shard(stage.data_path(key, ".parquet"), features=latents)
        row, position = np.divmod(acts.token.astype(np.int64), length)
        with np.errstate(over="ignore"):
            value = acts.value.astype(np.float16)
        if not np.isfinite(value).all():
            raise ExchangeError(f"an activation of {acts.value.max():.3g} in shard {key.name} does not fit delphi's 16 bits")
        yield NonZeros(row + start, position, acts.feature.astype(np.int64), value)
