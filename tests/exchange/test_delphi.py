import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from scopeatlas.activations.cache import activation_keys, cache_activations
from scopeatlas.activations.shards import read_shard
from scopeatlas.cli import cli
from scopeatlas.corpus.build import Corpus, CorpusSettings, build_corpus
from scopeatlas.corpus.contexts import ContextRules
from scopeatlas.corpus.documents import SPLITS
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry
from scopeatlas.errors import ExchangeError
from scopeatlas.exchange import delphi, delphi_layout
from scopeatlas.exchange.delphi import SPLIT_ROWS, export_delphi, import_delphi
from scopeatlas.exchange.delphi_layout import NonZeros, open_cache, write_split
from scopeatlas.mining.examples import mine_examples, read_examples
from scopeatlas.storage.store import Store
from scopeatlas.subject.loading import SubjectModel
from tests.conftest import entry_of, sae_tensors, write_sae
from tests.tiny_models import D_MODEL, tiny_llama, tiny_tokenizer

WIDTH, ROWS, LENGTH, SPLIT_FILES = 40, 50, 24, 3
MODEL = "tiny/llama"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SubjectModel:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer(bos="<s>").save_pretrained(folder)
    return SubjectModel(str(folder), device="cpu", serves=(MODEL,))


@pytest.fixture(scope="module")
def entry(tmp_path_factory) -> SaeEntry:
    x = torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(0))
    return entry_of(write_sae(tmp_path_factory.mktemp("release") / "sae", sae_tensors(x, width=WIDTH), model_name=MODEL))


@dataclass(frozen=True)
class Dense:
    """What delphi would have seen: tokens int64 [rows, length], latents float32 [rows, length, WIDTH]."""

    tokens: np.ndarray
    latents: np.ndarray


@pytest.fixture
def dense(rng) -> Dense:
    """Plain tokens, no BOS; a tenth of the latents positive, a hundredth of them too small for delphi to keep."""
    latents = rng.lognormal(0, 1.5, (ROWS, LENGTH, WIDTH)) * (rng.random((ROWS, LENGTH, WIDTH)) < 0.1)
    latents[rng.random(latents.shape) < 0.001] = 5e-6
    return Dense(rng.integers(0, 256, (ROWS, LENGTH)), latents.astype(np.float32))


def cache(folder: Path, dense: Dense, *, files: int = SPLIT_FILES, **config: object) -> Path:
    """What delphi writes: its own sequence of operations on dense latents (cache.py at cd43058b9f3c)."""
    folder.mkdir(parents=True)
    latents = torch.from_numpy(dense.latents)
    where = latents.abs() > 1e-5
    locations, activations = torch.nonzero(where), latents[where]
    bounds = torch.linspace(0, latents.shape[2], steps=files + 1).long().tolist()
    for first, stop in zip(bounds, bounds[1:], strict=False):
        mask = (locations[:, 2] >= first) & (locations[:, 2] <= stop - 1)
        mine = locations[mask].numpy() - [0, 0, first]
        tensors = {
            "locations": mine.astype(np.uint16),
            "activations": activations[mask].half().numpy(),
            "tokens": dense.tokens,
        }
        save_file(tensors, folder / f"{first}_{stop - 1}.safetensors")
    settings = {"cache_ctx_len": dense.tokens.shape[1], "dataset_repo": "some/text", "model_name": MODEL} | config
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def read_as_delphi(folder: Path, shape: tuple[int, ...]) -> Dense:
    """What delphi reads (`TensorBuffer.load` of loader.py at cd43058b9f3c), as dense latents."""
    latents = np.zeros(shape, dtype=np.float16)
    tokens = np.zeros(shape[:2], dtype=np.int64)
    for path in folder.glob("*.safetensors"):
        data = load_file(path)
        locations = data["locations"].astype(np.int64)
        locations[:, 2] += int(path.name.split("_")[0])
        latents[tuple(locations.T)] = data["activations"]
        tokens = data["tokens"]
    return Dense(tokens, latents.astype(np.float32))


def stored(store: Store, corpus: Corpus, entry: SaeEntry, subject: SubjectModel) -> Dense:
    """What a store holds of an SAE over a corpus, as dense latents."""
    stage = store.stage(entry.key, corpus.id, "activations")
    tokens, latents = [], []
    for shard, key in zip(corpus.shards, activation_keys(corpus, entry, subject), strict=True):
        tokens.append(corpus.contexts(shard).tokens)
        acts = read_shard(stage.data_path(key, ".parquet"))
        flat = np.zeros((tokens[-1].size, WIDTH), dtype=np.float32)
        flat[acts.token, acts.feature] = acts.value
        latents.append(flat.reshape(*tokens[-1].shape, WIDTH))
    return Dense(np.concatenate(tokens).astype(np.int64), np.concatenate(latents))


def as_delphi_keeps(latents: np.ndarray) -> np.ndarray:
    return np.where(np.abs(latents) > 1e-5, latents, 0).astype(np.float16).astype(np.float32)


def test_an_imported_cache_holds_what_delphi_saw(tmp_path, dense, entry, tiny, monkeypatch):
    monkeypatch.setattr(delphi, "SHARD_TOKENS", 10 * LENGTH)
    monkeypatch.setattr(delphi_layout, "READ_NONZEROS", 500)
    store = Store(tmp_path / "store")
    made = import_delphi(store, cache(tmp_path / "layers.1", dense), entry, tiny)
    found = stored(store, made.corpus, entry, tiny)
    assert len(made.corpus.shards) == 5
    assert np.array_equal(found.tokens, dense.tokens) and np.array_equal(found.latents, as_delphi_keeps(dense.latents))
    assert (made.nonzeros, made.left_out) == (np.count_nonzero(as_delphi_keeps(dense.latents)), 0)


def test_what_is_imported_is_exported_again_byte_for_byte(tmp_path, dense, entry, tiny, monkeypatch):
    monkeypatch.setattr(delphi, "SHARD_TOKENS", 10 * LENGTH)
    source = cache(tmp_path / "layers.1", dense)
    store = Store(tmp_path / "store")
    made = import_delphi(store, source, entry, tiny)
    target = export_delphi(store, made.corpus, entry, tiny, tmp_path / "latents", splits=SPLIT_FILES)
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(names) == SPLIT_FILES and names == sorted(path.name for path in target.glob("*.safetensors"))
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_our_activations_are_what_delphi_reads_and_come_back_unchanged(tmp_path, rng, entry, tiny):
    store = Store(tmp_path / "store")
    texts = ("".join(chr(letter) for letter in rng.integers(97, 123, size)) for size in rng.integers(40, 200, 20))
    lines = [json.dumps({"text": " ".join(text)}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Source("files", paths=(str(tmp_path / "texts.jsonl"),), min_characters=1)
    settings = CorpusSettings("tiny", source, Sampling(shard_bits=1), ContextRules(LENGTH))
    corpus = build_corpus(store, settings, tiny)[0]
    assert not cache_activations(store, corpus, [entry], tiny).failed
    ours = stored(store, corpus, entry, tiny)
    target = export_delphi(store, corpus, entry, tiny, tmp_path / "latents")
    read = read_as_delphi(target, ours.latents.shape)
    assert np.count_nonzero(ours.latents) > 100
    assert np.array_equal(read.latents, ours.latents)
    assert np.array_equal(read.tokens, np.where(ours.tokens < 0, tiny.tokenizer.eos_token_id, ours.tokens))
    assert json.loads((target / "config.json").read_text(encoding="utf-8"))["model_name"] == MODEL
    again = Store(tmp_path / "again")
    made = import_delphi(again, target, entry, tiny)
    assert np.array_equal(stored(again, made.corpus, entry, tiny).latents, ours.latents) and made.left_out == 0


def test_examples_are_mined_from_an_imported_cache(tmp_path, dense, entry, tiny):
    store = Store(tmp_path / "store")
    made = import_delphi(store, cache(tmp_path / "layers.1", dense), entry, tiny)
    mined, _ = mine_examples(store, made.corpus, entry, tiny)
    kept = as_delphi_keeps(dense.latents)
    best = read_examples(mined.examples, [7]).filter(pl.col("kind") == "top")["peak"].max()
    assert best == kept[:, :, 7].max()


def test_what_is_negative_or_at_a_special_token_is_left_out_and_counted(tmp_path, dense, entry, tiny):
    tokens = dense.tokens.copy()
    tokens[:, 0] = tiny.tokenizer.bos_token_id
    tokens[3, 5] = tiny.tokenizer.eos_token_id
    latents = dense.latents.copy()
    latents[10:20, 3] *= -1
    kept = as_delphi_keeps(latents)
    evident = np.where(np.isin(tokens, tiny.tokenizer.all_special_ids)[:, :, None] | (kept < 0), 0, kept)
    store = Store(tmp_path / "store")
    made = import_delphi(store, cache(tmp_path / "layers.1", Dense(tokens, latents)), entry, tiny)
    assert np.array_equal(stored(store, made.corpus, entry, tiny).latents, evident)
    assert made.left_out == np.count_nonzero(kept) - np.count_nonzero(evident) > 0
    assert made.corpus.facts["rows_that_begin_with_bos"] == ROWS
    assert made.corpus.facts["tokens"] == ROWS * (LENGTH - 1) - 1


def test_rows_are_documents_whose_neighbours_share_a_split(tmp_path, dense, entry, tiny):
    rows = np.concatenate([dense.tokens] * 4)
    rows[:, 0] = np.arange(len(rows)) % 250
    larger = Dense(rows, np.concatenate([dense.latents] * 4))
    corpus = import_delphi(Store(tmp_path / "store"), cache(tmp_path / "layers.1", larger), entry, tiny).corpus
    contexts = corpus.contexts(corpus.shards[0])
    assert len(set(contexts.document_ids)) == len(contexts) == len(corpus.documents) == 4 * ROWS
    assert all(len(set(contexts.splits[start : start + SPLIT_ROWS])) == 1 for start in range(0, 4 * ROWS, SPLIT_ROWS))
    assert corpus.facts["rows_are_documents"]
    by_id = dict(corpus.documents.select("document_id", "text").iter_rows())
    assert by_id[contexts.document_ids[5]] == tiny.tokenizer.decode(rows[5])


def test_rows_of_a_named_document_are_one_document_of_one_split(tmp_path, dense, entry, tiny, monkeypatch):
    monkeypatch.setattr(delphi, "SHARD_TOKENS", 10 * LENGTH)
    names = [f"article {row // 7}" for row in range(ROWS)]
    source = cache(tmp_path / "layers.1", dense)
    corpus = import_delphi(Store(tmp_path / "store"), source, entry, tiny, documents=names).corpus
    contexts = [corpus.contexts(shard) for shard in corpus.shards]
    owners = [owner for part in contexts for owner in part.document_ids]
    splits = np.concatenate([part.splits for part in contexts])
    assert len(set(owners)) == len(set(names)) == len(corpus.documents)
    for start in range(0, ROWS, 7):
        assert len(set(owners[start : start + 7])) == len(set(splits[start : start + 7])) == 1
    found = corpus.documents.filter(pl.col("title") == "article 2").row(0, named=True)
    assert found["text"] == "".join(tiny.tokenizer.decode(row) for row in dense.tokens[14:21])
    assert found["split"] == SPLITS[splits[14]]
    with pytest.raises(ExchangeError, match="49 documents are named for the 50 rows"):
        import_delphi(Store(tmp_path / "store"), source, entry, tiny, documents=names[1:])


def test_a_second_import_writes_nothing_and_other_values_are_refused(tmp_path, dense, entry, tiny):
    store = Store(tmp_path / "store")
    source = cache(tmp_path / "layers.1", dense)
    made = import_delphi(store, source, entry, tiny)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*.parquet")}
    assert import_delphi(store, source, entry, tiny) == made
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*.parquet")} == before
    other = cache(tmp_path / "other", replace(dense, latents=dense.latents * 2))
    with pytest.raises(ExchangeError, match="that are not of .*other"):
        import_delphi(store, other, entry, tiny)


def test_another_hookpoint_of_the_run_joins_the_corpus(tmp_path, dense, entry, tiny):
    store = Store(tmp_path / "store")
    made = import_delphi(store, cache(tmp_path / "layers.1", dense), entry, tiny)
    x = torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(1))
    second = entry_of(write_sae(tmp_path / "second", sae_tensors(x, width=WIDTH, seed=1), model_name=MODEL))
    joined = import_delphi(store, cache(tmp_path / "layers.2", replace(dense, latents=dense.latents * 2)), second, tiny)
    assert joined.corpus == made.corpus
    assert np.array_equal(stored(store, joined.corpus, second, tiny).latents, as_delphi_keeps(dense.latents * 2))


def change(path: Path, **tensors: np.ndarray | None) -> None:
    """Write a file anew with some of its tensors replaced, or left out where None."""
    data = load_file(path) | tensors
    save_file({name: array for name, array in data.items() if array is not None}, path)


def first_of(folder: Path) -> Path:
    return min(folder.glob("0_*.safetensors"))


def truncate(folder: Path) -> None:
    first_of(folder).write_bytes(first_of(folder).read_bytes()[:-100])


def drop_last(folder: Path) -> None:
    first_of(folder).unlink()


def set_nan(folder: Path) -> None:
    values = load_file(first_of(folder))["activations"]
    change(first_of(folder), activations=np.where(np.arange(len(values)) == 3, np.float16(np.nan), values))


def set_infinite(folder: Path) -> None:
    values = load_file(first_of(folder))["activations"]
    change(first_of(folder), activations=np.where(np.arange(len(values)) == 3, np.float16(np.inf), values))


def beyond(axis: int, value: int):
    def damage(folder: Path) -> None:
        locations = load_file(first_of(folder))["locations"]
        locations[2, axis] = value
        change(first_of(folder), locations=locations)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"0_12\.safetensors is truncated or not delphi's .*; copy it"),
        (drop_last, "no file that begins with latent 0; copy the whole folder"),
        (lambda f: (f / "config.json").unlink(), r"cannot read .*config\.json"),
        (lambda f: change(first_of(f), tokens=None), r"0_12\.safetensors holds no tokens; .* save_tokens=True"),
        (lambda f: change(first_of(f), tokens=np.zeros((ROWS, LENGTH), np.int64)), "holds other tokens than 0_12"),
        (lambda f: change(first_of(f), locations=np.zeros((5, 2), np.uint16)), r"0_12\.safetensors is not delphi's"),
        (lambda f: change(first_of(f), activations=np.zeros(5, np.float16)), r"0_12\.safetensors is not delphi's"),
        (set_nan, r"0_12\.safetensors: an activation is no number"),
        (set_infinite, r"0_12\.safetensors: an activation .* does not fit 16 bits"),
        (beyond(0, ROWS), r"0_12\.safetensors: a location lies outside"),
        (beyond(1, LENGTH), r"0_12\.safetensors: a location lies outside"),
        (beyond(2, 13), r"0_12\.safetensors: a location lies outside"),
        (lambda f: [path.unlink() for path in f.glob("*.safetensors")], "name the folder of one hookpoint"),
    ],
)
def test_a_damaged_cache_is_one_error_that_names_the_file(tmp_path, dense, entry, tiny, damage, said):
    source = cache(tmp_path / "layers.1", dense)
    damage(source)
    store = Store(tmp_path / "store")
    with pytest.raises(ExchangeError, match=said):
        import_delphi(store, source, entry, tiny)
    assert not list(store.root.rglob("activations/*"))


def test_a_cache_of_another_sae_model_or_tokenizer_is_refused(tmp_path, dense, entry, tiny):
    store = Store(tmp_path / "store")
    narrow = cache(tmp_path / "narrow", replace(dense, latents=dense.latents[:, :, :30]))
    with pytest.raises(ExchangeError, match="has 30 latents and .* 40"):
        import_delphi(store, narrow, entry, tiny)
    with pytest.raises(ExchangeError, match="is of google/gemma-2-2b"):
        import_delphi(store, cache(tmp_path / "gemma", dense, model_name="google/gemma-2-2b"), entry, tiny)
    with pytest.raises(ExchangeError, match="holds token 1255"):
        import_delphi(store, cache(tmp_path / "tokens", replace(dense, tokens=dense.tokens + 1000)), entry, tiny)


def test_an_export_does_not_mix_with_files_that_are_there(tmp_path, dense, entry, tiny):
    store = Store(tmp_path / "store")
    made = import_delphi(store, cache(tmp_path / "layers.1", dense), entry, tiny)
    export_delphi(store, made.corpus, entry, tiny, tmp_path / "latents", splits=2)
    with pytest.raises(ExchangeError, match="holds files already"):
        export_delphi(store, made.corpus, entry, tiny, tmp_path / "latents", splits=3)


@pytest.mark.parametrize(("latent", "row", "kind"), [(65_535, 65_535, np.uint16), (65_536, 0, np.uint32), (0, 65_536, np.uint32)])
def test_locations_take_16_bits_where_delphi_takes_16(tmp_path, latent, row, kind):
    first, tokens = 1000, np.zeros((65_537, 1), dtype=np.int64)
    nonzeros = NonZeros(np.array([row]), np.array([0]), np.array([first + latent]), np.array([2.5], dtype=np.float16))
    path = write_split(tmp_path, range(first, first + 70_000), nonzeros, tokens)
    locations = load_file(path)["locations"]
    assert locations.dtype == kind and locations.tolist() == [[row, 0, latent]]
    assert path.name == "1000_70999.safetensors"


def test_a_cache_with_a_file_without_non_zeros_is_read(tmp_path, dense):
    latents = dense.latents.copy()
    latents[:, :, :13] = 0
    source = cache(tmp_path / "layers.1", replace(dense, latents=latents))
    found = list(open_cache(source).nonzeros())
    assert sum(len(part.row) for part in found) == np.count_nonzero(as_delphi_keeps(latents))


def test_import_and_export_from_the_command_line(tmp_path, dense, entry, tiny):
    source = cache(tmp_path / "layers.1", dense, model_name="")
    common = ["--store", str(tmp_path / "store")]
    ran = CliRunner().invoke(cli, [*common, "import", "delphi", str(source), entry.folder, "--model", tiny.name])
    assert ran.exit_code == 0, ran.output
    assert "0 of 50 rows begin with BOS" in ran.output
    key = Store(tmp_path / "store").registered()[0]
    ran = CliRunner().invoke(
        cli, [*common, "export", "delphi", key, str(tmp_path / "latents"), "--model", tiny.name, "--splits", "3"]
    )
    assert ran.exit_code == 0, ran.output
    exported = tmp_path / "latents" / "sae"
    said = CliRunner().invoke(cli, [*common, "import", "delphi", str(source), entry.folder, "--model", tiny.name, "--json"])
    made = json.loads(said.stdout)
    corpus = Store(tmp_path / "store").corpora_of(key)[0]
    assert (made["sae"], made["corpus"], made["contexts"], made["rows_that_begin_with_bos"]) == (key, corpus, 50, 0)
    assert made["nonzeros"] + made["left_out"] == np.count_nonzero(as_delphi_keeps(dense.latents))
    again = str(tmp_path / "again")
    said = CliRunner().invoke(cli, [*common, "export", "delphi", key, again, "--model", tiny.name, "--splits", "3", "--json"])
    assert json.loads(said.stdout) == {"folder": f"{again}/sae", "sae": key, "corpus": corpus, "splits": 3}
    assert (exported / "0_12.safetensors").read_bytes() == (source / "0_12.safetensors").read_bytes()
    truncate(source)
    ran = CliRunner().invoke(cli, [*common, "import", "delphi", str(source), entry.folder, "--model", tiny.name])
    assert ran.exit_code == 2 and "0_12.safetensors is truncated" in ran.output and "Traceback" not in ran.output
