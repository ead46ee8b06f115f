import json
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from bench.rates import Bench, measure
from scopeatlas.activations.memory import footprint_of
from scopeatlas.cli import cli
from scopeatlas.costs import Plan, Prices
from scopeatlas.dictionaries import formats
from scopeatlas.errors import ConfigError, DictionaryError
from scopeatlas.listings import ModelShape, gemma_3, listed_releases, listed_saes, shape_of_config
from scopeatlas.planning import Work, plan_releases
from scopeatlas.rates import Rates, read_rates, write_rates
from tests.runner.tiny_cache import tiny_cache

MEASURED = Rates("a machine", "a model", 1.5e11, 2.5e11, 3e6, 4e6, 700.0, 90.0, 2.9, 12_000.0, 1_300.0)
SINGLE_LAYER = {"270m": 556, "1b": 728, "4b": 876, "12b": 1156, "27b": 1431}
"""Entries of a repo in SAELens' registry, counted there, where the registry is whole."""
WORK = Work(10_000_000, memory_bytes=400 * 10**9)


def plan(*names: str, work: Work = WORK, **more) -> Plan:
    return plan_releases(names, work, store=Path(), **more)


def test_a_listed_repo_holds_as_many_saes_as_were_counted_in_the_registry():
    listed = {repo: listed_saes(repo) for repo in listed_releases()}
    counts = {repo: sum(not sae.is_multi_layer for sae in saes.values()) for repo, saes in listed.items()}
    assert counts == {f"google/gemma-scope-2-{size}-{tuned}": n for size, n in SINGLE_LAYER.items() for tuned in ("pt", "it")}
    assert sum(counts.values()) == 8784 + 70 + 640  # what the registry holds, and what it lacks of two repos
    assert sum(sae.kind == "crosscoder" for saes in listed.values() for sae in saes.values()) == 10 * 8
    assert sum(sae.kind == "clt" for saes in listed.values() for sae in saes.values()) == 4 * 8


@pytest.mark.parametrize(
    ("repo", "path", "size"),
    [
        ("google/gemma-scope-2-4b-it", "resid_post/layer_17_width_262k_l0_big", 5.4e9),
        ("google/gemma-scope-2-27b-pt", "resid_post/layer_31_width_1m_l0_medium", 45e9),
        ("google/gemma-scope-2-27b-pt", "crosscoder/layer_16_31_40_53_width_1m_l0_big", 113e9),
        ("google/gemma-scope-2-1b-pt", "clt/width_262k_l0_medium", 30.4 * 2**30),
    ],
)
def test_listed_sizes_are_those_of_the_published_files(repo, path, size):
    assert listed_saes(repo)[path].nbytes == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("path", "files", "shapes"),
    [
        ("attn_out/layer_9_width_16k_l0_small", ["params"], {"w_enc": (1024, 16384), "w_dec": (16384, 1024)}),
        (
            "transcoder_all/layer_3_width_16k_l0_big_affine",
            ["params"],
            {"w_enc": (640, 16384), "w_dec": (16384, 640), "affine_skip_connection": (640, 640)},
        ),
        (
            "crosscoder/layer_5_9_12_15_width_65k_l0_medium",
            [f"params_layer_{i}" for i in range(4)],
            {"w_enc": (640, 16384), "w_dec": (16384, 4, 640)},
        ),
        (
            "clt/width_524k_l0_big_affine",
            [f"params_layer_{i}" for i in range(18)],
            {"w_enc": (640, 29120), "w_dec": (29120, 18, 640), "affine_skip_connection": (640, 640)},
        ),
    ],
)
def test_a_listed_sae_takes_what_its_opened_files_take(tmp_path, path, files, shapes):
    """The files are headers and holes of the real size."""
    d, features = shapes["w_enc"]
    for name in files:
        tensors = shapes | {"b_enc": (features,), "threshold": (features,), "b_dec": (d,)}
        write_holes(tmp_path / "gemma-scope-2-270m-pt" / path / f"{name}.safetensors", tensors)
    root = tmp_path / "gemma-scope-2-270m-pt"
    (found,) = formats.find([p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()])
    opened, listed = formats.load(root, found, root.name), listed_saes("google/gemma-scope-2-270m-pt")[path]
    assert footprint_of(listed) == footprint_of(opened)
    assert (listed.kind, listed.sites_in, listed.sites_out) == (opened.kind, opened.sites_in, opened.sites_out)
    assert (listed.target_l0, listed.model_name) == (opened.target_l0, opened.model_name)


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


@pytest.mark.parametrize("build", ["gemma", "llama"])
def test_a_layers_operations_are_those_that_torch_counts(rng, build):
    heads = int(rng.choice([2, 4]))
    sizes = {
        "hidden_size": int(rng.integers(2, 8)) * 16,
        "intermediate_size": int(rng.integers(20, 200)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([1, 2])),
        "head_dim": int(rng.choice([8, 16])),
        "vocab_size": 50,
    }
    length, batch = int(rng.integers(5, 40)), int(rng.integers(1, 4))
    config = Gemma3TextConfig(**sizes) if build == "gemma" else LlamaConfig(**sizes)
    model = (Gemma3ForCausalLM if build == "gemma" else LlamaForCausalLM)._from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
        model.model(input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False)
    counted = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if re.search(r"\.layers\.\d+$", name)]
    shape = shape_of_config(config)
    assert counted == [batch * length * shape.layer_flop(length)] * shape.layers


@pytest.mark.parametrize("size", SINGLE_LAYER)
def test_the_table_of_models_agrees_with_models_built_from_it(size):
    """Gemma 3 by its published sizes: d_model, MLP, heads, key-value heads, head size, layers."""
    published = {
        "270m": (640, 2048, 4, 1, 256, 18),
        "1b": (1152, 6912, 4, 1, 256, 26),
        "4b": (2560, 10240, 8, 4, 256, 34),
        "12b": (3840, 15360, 16, 8, 256, 48),
        "27b": (5376, 21504, 32, 16, 128, 62),
    }
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    assert gemma_3(size) == shape_of_config(Gemma3TextConfig(**dict(zip(names, published[size], strict=True))))


def test_all_of_gemma_scope_2_is_the_sum_of_its_repos():
    whole, repos = plan("gemma-scope-2", rates=MEASURED), [plan(repo, rates=MEASURED) for repo in listed_releases()]
    for number in ("saes", "features", "weight_bytes", "encoder_flop", "nonzeros"):
        assert whole.total(attrgetter(number)) == sum(repo.total(attrgetter(number)) for repo in repos) > 0
    assert whole.hours == pytest.approx(sum(repo.hours for repo in repos if repo.hours))
    layers = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}
    k16, k65, k262, k524, m1 = (1 << n for n in (14, 16, 18, 19, 20))
    features = 0
    for size, n in layers.items():
        one_l0 = 4 * (4 * (k16 + k65 + k262) + m1 + (k16 + k65 + k262))  # resid_post, attn_out, mlp_out, transcoder twice
        features += 2 * (3 * one_l0 + 4 * k262 + 2 * 5 * n * (k16 + k262) + 2 * (k65 + k262 + k524 + m1))
        features += 2 * 3 * 4 * m1 if size == "1b" else 0
        features += 2 * 4 * (262080 + 524160) if size in ("270m", "1b") else 0
        features -= 2 * 5 * k16 if size == "27b" else 0
    assert whole.total(attrgetter("features")) == features


def test_every_figure_of_a_plan_follows_from_shapes_tokens_rates_and_prices():
    work = Work(3_000_000, context_length=64, memory_bytes=400 * 10**9, site="attn_out")
    made = plan("gemma-scope-2-1b-pt", work=work, rates=MEASURED, prices=Prices(1.5, 100, 16_000, 0.3))
    features = 4 * 3 * ((1 << 14) + (1 << 16) + (1 << 18))
    l0 = 0
    for layer in (7, 13, 17, 22):
        t = min(1, 3 * layer / 26)
        l0 += 3 * (int(10 + 10 * t) + int(30 + 30 * t) + int(60 + 90 * t))
    assert made.total(attrgetter("saes")) == 36 and made.total(attrgetter("features")) == features
    assert made.total(attrgetter("nonzeros")) == 3_000_000 * l0
    assert made.total(attrgetter("encoder_flop")) == 2 * 1024 * features * 3_000_000
    (release,) = made.releases
    assert release.depths == [18, 23, 8]  # runs of 16 in order of their paths: layers 13 and 17, then 17, 22 and 7, then 7
    layer = 2 * 1152 * (2 * 1024 + 2 * 256 + 3 * 6912) + 4 * 1024 * 64
    assert release.lm_flop == sum(release.depths) * 3_000_000 * layer
    seconds = release.lm_flop / 1.5e11 + made.total(attrgetter("encoder_flop")) / 2.5e11
    seconds += made.total(attrgetter("nonzeros")) * (1 / 3e6 + 1 / 4e6) + features * (1 / 700 + 1 / 90)
    assert made.hours == pytest.approx(seconds / 3600)
    assert made.usd == pytest.approx({"machine": seconds / 3600 * 1.5, "llm": 36 * 100 * 16_000 * 0.3 / 1e6})


@pytest.mark.parametrize("names", [("gemma-scope-2-270m-pt",), ("gemma-scope-2",)])
def test_every_equation_that_a_plan_prints_is_true(names):
    lines = list(plan(*names, rates=MEASURED, prices=Prices(2.0, 100, 16_000, 0.3)).lines())
    equations = [clause for line in lines for clause in re.split(r"[;:,] |: ", line) if " = " in clause]
    assert len(equations) > 30
    for equation in equations:
        first, *others = equation.split(" = ")
        for other in others:
            rounding = 0.05 if re.search(r"[kMGT]B$", other) else 0.002
            assert worth(first) == pytest.approx(worth(other), rel=rounding), equation


def worth(text: str) -> float:
    """The value of one side: units count, other words do not."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "h": 3600}
    text = re.sub(r"\([^)]*\)", "", text).replace("$", "")
    numbers = re.sub(
        r"([\d.,]+(?:e\d+)?)(?: (kB|MB|GB|TB|h)\b)?", lambda m: f"{m[1].replace(',', '')}*{units.get(m[2], 1)}", text
    )
    return eval(re.sub(r"[A-Za-z](?!\d)[A-Za-z-]*", "", numbers.replace(" x ", " * ")))  # noqa: S307  # our own line


def test_without_rates_there_are_operations_and_bytes_but_no_hours():
    made = plan("gemma-scope-2-270m-pt", prices=Prices(usd_per_hour=2.0))
    assert made.hours is None and made.usd == {}
    text = "\n".join(made.lines())
    assert "no hours: no rates were measured" in text and "FLOP" in text and "(assumed)" in text and "$" not in text


def test_a_sum_of_hours_says_what_it_is_without():
    whole, some = (
        plan("gemma-scope-2-270m-pt", rates=Rates(**vars(MEASURED) | {"labelled_features": rate})) for rate in (90.0, None)
    )
    assert whole.hours is not None and some.hours is not None
    assert whole.hours - some.hours == pytest.approx(whole.total(attrgetter("features")) / 90 / 3600)
    assert ["without what was not measured" in "\n".join(made.lines()) for made in (whole, some)] == [False, True]


@pytest.mark.parametrize("missing", ["lm_flop", "encoder_flop"])
def test_hours_are_refused_while_a_products_rate_is_missing(missing):
    made = plan("gemma-scope-2-270m-pt", rates=Rates(**vars(MEASURED) | {missing: None}))
    assert made.hours is None and any("was not measured" in line for line in made.lines())


def test_an_sae_that_does_not_fit_is_named_and_in_no_figure():
    work = Work(1_000_000, memory_bytes=20 * 10**9, site="resid_post")
    made = plan("gemma-scope-2-27b-it", work=work)
    assert len(made.memory.refused) == 12 and all("width_1m" in sae for sae in made.memory.refused)
    assert made.total(attrgetter("saes")) == 40 and "left out" not in "\n".join(
        made.lines()
    )  # the memory plan of so few names each
    assert sum(len(chunk) for chunk in made.memory.chunks) == 40


def test_a_pass_serves_no_more_saes_than_a_run_takes():
    together, apart = (
        plan("gemma-scope-2-270m-pt", work=Work(1000, memory_bytes=10**12, per_run=n, site="mlp_out")) for n in (36, 1)
    )
    assert [len(chunk) for chunk in together.memory.chunks] == [36] and together.releases[0].depths == [16]
    assert [len(chunk) for chunk in apart.memory.chunks] == [1] * 36
    assert sorted(apart.releases[0].depths) == sorted(9 * [6, 10, 13, 16])


@pytest.mark.parametrize(
    ("names", "site", "message"),
    [
        (["gemma-scope-9"], "*", "no release of that name is known"),
        (["gemma-scope-2-270m-pt"], "residual", "has a site 'residual'"),
    ],
)
def test_what_stands_for_nothing_is_an_error_that_says_so(names, site, message):
    with pytest.raises(DictionaryError, match=message):
        plan(*names, work=Work(1000, memory_bytes=10**9, site=site))


def test_rates_are_read_as_they_were_written(tmp_path):
    write_rates(tmp_path / "rates.json", MEASURED)
    assert read_rates(tmp_path / "rates.json") == MEASURED


@pytest.mark.slow
def test_rates_measured_on_a_machine_are_of_what_it_stored_and_make_hours(rng, tmp_path):
    cache = tiny_cache(tmp_path, rng)
    entry = cache.entries[0]
    measured = measure(Bench(cache.store, cache.corpus, entry, cache.subject, 48, 1), chain=None)
    stage = cache.store.root / "saes" / entry.key / cache.corpus.id / "activations"
    nonzeros = sum(json.loads(path.read_text())["facts"]["nonzeros"] for path in stage.glob("*.commit.json"))
    assert measured.bytes_per_nonzero == sum(path.stat().st_size for path in stage.glob("*.parquet")) / nonzeros
    assert measured.lm_flop and measured.encoder_flop and measured.example_features and measured.labelled_features is None
    assert plan("gemma-scope-2-270m-pt", rates=measured).hours


@pytest.mark.parametrize("body", [{"speed": 1}, {"lm_flop": 0}, {"lm_flop": "fast"}, {"machine": 3}, [1]])
def test_a_file_that_holds_no_rates_is_named(tmp_path, body):
    (tmp_path / "mine.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="mine.json"):
        read_rates(tmp_path / "mine.json")


def test_the_command_takes_rates_from_the_store_and_prices_from_options(tmp_path):
    write_rates(tmp_path / "rates.json", MEASURED)
    priced = ("--usd-per-hour", "2", "--llm-tokens", "1000", "--usd-per-million", "0.5", "--llm-features", "10")
    arguments = ["--store", str(tmp_path), "plan", "gemma-scope-2-270m-pt", "--memory-gb", "80", *priced]
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    body = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert body["usd"]["llm"] == pytest.approx(572 * 10 * 1000 * 0.5 / 1e6)
    assert body["usd"]["machine"] == pytest.approx(body["hours"] * 2)
    assert sum(len(chunk) for chunk in body["chunks"]) == 572 == len(body["footprints"])
    assert "a machine on a model" in said and f"= ${sum(body['usd'].values()):,.2f}" in said


def test_a_release_that_is_named_twice_is_planned_for_once(tmp_path, monkeypatch):
    small = plan("gemma-scope-2-270m-pt")
    twice = plan("gemma-scope-2-270m-pt", "google/gemma-scope-2-270m-pt", "gemma-scope-2-270m")
    assert [cost.name for cost in twice.releases] == ["google/gemma-scope-2-270m-pt", "google/gemma-scope-2-270m-it"]
    assert twice.total(attrgetter("saes")) == 2 * small.total(attrgetter("saes"))
    an_unknown_sae(tmp_path / "mine" / "layers.3")
    monkeypatch.setenv("HOME", str(tmp_path))
    made = plan("~/mine", str(tmp_path / "mine"))
    assert made.total(attrgetter("saes")) == 1


def test_activations_of_a_folder_in_ones_home_must_fit_beside_the_store(tmp_path, monkeypatch):
    an_unknown_sae(tmp_path / "mine" / "layers.3")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(plan("~/mine").memory.disk.values()) == list(plan(str(tmp_path / "mine")).memory.disk.values()) != [0]


def test_a_subject_that_is_given_stands_for_none_that_is_known():
    given = Work(1000, memory_bytes=10**12, subject=ModelShape(5, 700, 16))
    known = Work(1000, memory_bytes=10**12)
    made = [plan("gemma-scope-2-270m-pt", work=work).releases[0].lm_flop for work in (given, known)]
    assert made[0] == made[1]


def an_unknown_sae(folder: Path) -> None:
    write_holes(folder / "sae.safetensors", {"encoder.weight": (64, 8), "encoder.bias": (64,), "W_dec": (64, 8), "b_dec": (8,)})
    (folder / "cfg.json").write_text(json.dumps({"num_latents": 64, "k": 4, "d_in": 8}))


def test_a_model_that_no_table_knows_is_asked_for(tmp_path):
    an_unknown_sae(tmp_path / "mine" / "layers.3")
    unknown = plan(str(tmp_path / "mine"), rates=MEASURED)
    assert unknown.hours is None and "--subject" in "\n".join(unknown.lines())
    work = Work(1000, memory_bytes=10**9, subject=ModelShape(5, 700, 16))
    known = plan(str(tmp_path / "mine"), work=work, rates=MEASURED)
    assert known.releases[0].lm_flop == 4 * 1000 * (2 * 700 + 4 * 16 * 128) and known.hours is not None
