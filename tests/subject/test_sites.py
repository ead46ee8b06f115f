import pytest

from scopeatlas.errors import DictionaryError, SubjectModelError
from scopeatlas.subject.sites import (
    EMBEDDING,
    Site,
    canonical_site,
    decoder_layers,
    module_input,
    parse_hook_point,
    parse_hook_points,
    parse_module_path,
    resolve,
    site_variants,
)
from tests.tiny_models import tiny_gemma2, tiny_gemma3, tiny_llama, tiny_neox


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("model.layers.12.output", Site(12, "", "output")),
        ("model.layers.0.input", Site(0, "", "input")),
        ("model.layers.7.self_attn.o_proj.input", Site(7, "self_attn.o_proj", "input")),
        ("model.layers.3.post_feedforward_layernorm.output", Site(3, "post_feedforward_layernorm", "output")),
        ("model.layers.3.pre_feedforward_layernorm.input.rms_norm", Site(3, "pre_feedforward_layernorm", "input", "rms_norm")),
        ("model.embed_tokens.output", Site(EMBEDDING, "", "output")),
        ("model.embed_tokens.output.unscaled", Site(EMBEDDING, "", "output", "unscaled")),
        ("blocks.4.hook_mlp_out", Site(4, "hook_mlp_out", "output")),
        ("blocks.4.attn.hook_z", Site(4, "attn.hook_z", "output")),
        ("blocks.4.hook_resid_mid", Site(4, "hook_resid_mid", "output")),
    ],
)
def test_a_hook_point_parses_and_prints_as_it_was(text, site):
    assert parse_hook_point(text) == site and str(site) == text


@pytest.mark.parametrize(
    ("lens", "hugging_face"),
    [
        ("blocks.5.hook_resid_pre", "model.layers.5.input"),
        ("blocks.5.hook_resid_post", "model.layers.5.output"),
        ("blocks.5.mlp.hook_in", "model.layers.5.mlp.input"),
        ("blocks.5.mlp.hook_out", "model.layers.5.mlp.output"),
        ("blocks.5.ln1.hook_normalized", "model.layers.5.ln1.input.rms_norm"),
        ("blocks.5.ln2.hook_normalized", "model.layers.5.ln2.input.rms_norm"),
        ("blocks.5.hook_mlp_in", "model.layers.5.ln2.input"),
        ("hook_embed", "model.embed_tokens.output"),
    ],
)
def test_two_names_of_one_tensor_are_one_site(lens, hugging_face):
    site = parse_hook_point(lens)
    assert site == parse_hook_point(hugging_face) and str(site) == hugging_face


@pytest.mark.parametrize("transform", ["none", "rms_norm", "unscaled"])
def test_every_site_prints_as_what_it_parses_from(transform):
    modules = ("", "ln2", "hook_mlp_out", "attn.hook_z", "mlp.down_proj", "self_attn")
    sites = [Site(layer, module, side, transform) for layer in (0, 17) for module in modules for side in ("input", "output")]
    sites.append(Site(EMBEDDING, "", "output", transform))
    assert [parse_hook_point(str(site)) for site in sites] == sites
    assert len({str(site) for site in sites}) == len(sites)


def test_a_list_of_layers_is_one_site_each():
    assert [str(site) for site in parse_hook_points("model.layers.{5,9,12}.mlp.output")] == [
        "model.layers.5.mlp.output",
        "model.layers.9.mlp.output",
        "model.layers.12.mlp.output",
    ]


def test_all_layers_are_as_many_as_the_model_has():
    assert parse_hook_points("blocks.{all}.hook_resid_post", layers=3) == tuple(Site(n, "", "output") for n in range(3))
    with pytest.raises(DictionaryError, match="names all layers, and how many there are is not known"):
        parse_hook_points("model.layers.{all}.output")


def test_one_site_is_not_read_from_a_string_that_names_several():
    with pytest.raises(DictionaryError, match=r"'model.layers.\{1,2\}.output' names several layers"):
        parse_hook_point("model.layers.{1,2}.output")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.layers.output",
        "model.layers.x.output",
        "model.layers.1",
        "model.layers.-1.output",
        "model.layers.{}.output",
        "blocks.1",
        "model.layers.1.output\n.x",
        "model.layers.1.output\n",
        "vision_tower.model.layers.1.output",
    ],
)
def test_any_other_string_is_an_error_that_quotes_it(text):
    with pytest.raises(DictionaryError, match="(?s)hook point '.*' is not of the form model.layers.N"):
        parse_hook_points(text)


@pytest.mark.parametrize("name", ["attn.hook_result", "attn.hook_pattern", "hook_q_input"])
def test_a_lens_name_that_is_not_one_tensor_of_vectors_is_an_error_that_lists_those_that_are(name):
    with pytest.raises(DictionaryError, match="of TransformerLens' names these are read: hook_resid_pre, .*attn.hook_z"):
        parse_hook_point(f"blocks.1.{name}")


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("layers.3", Site(3, "", "output")),
        ("layers.5.mlp", Site(5, "mlp", "output")),
        ("layers.0.attention", Site(0, "attention", "output")),
        ("h.5.mlp", Site(5, "mlp", "output")),
        ("gpt_neox.layers.11.mlp", Site(11, "mlp", "output")),
        ("embed_tokens", Site(EMBEDDING, "", "output")),
    ],
)
def test_a_module_path_is_the_output_of_that_module(path, site):
    assert parse_module_path(path) == site


@pytest.mark.parametrize("path", ["", "layers", "layers.x.mlp", "encoder.layers.3", "lm_head"])
def test_any_other_module_path_is_an_error(path):
    with pytest.raises(DictionaryError, match=f"module path '{path}' is not of the form"):
        parse_module_path(path)


def test_the_input_of_a_module_is_the_other_side_of_its_output():
    assert module_input(parse_module_path("layers.5.mlp")) == parse_hook_point("model.layers.5.mlp.input")


@pytest.mark.parametrize(
    ("make", "role", "there"),
    [
        (tiny_gemma2, "blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm.output"),
        (tiny_gemma3, "blocks.1.hook_attn_out", "model.layers.1.post_attention_layernorm.output"),
        (tiny_gemma3, "blocks.1.ln2.hook_normalized", "model.layers.1.pre_feedforward_layernorm.input.rms_norm"),
        (tiny_llama, "blocks.1.hook_mlp_out", "model.layers.1.mlp.output"),
        (tiny_llama, "blocks.1.hook_resid_mid", "model.layers.1.post_attention_layernorm.input"),
        (tiny_neox, "blocks.1.attn.hook_z", "model.layers.1.attention.dense.input"),
    ],
)
def test_a_role_is_played_by_a_module_of_each_architecture(make, role, there):
    assert str(canonical_site(make(), parse_hook_point(role))) == there


def test_another_architecture_that_shares_a_few_names_has_no_roles():
    from torch import nn

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            layer = nn.ModuleDict(
                {name: nn.Linear(2, 2) for name in ("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm")}
            )
            self.model.layers = nn.ModuleList([layer])

    with pytest.raises(SubjectModelError, match="no site blocks.0.hook_mlp_out: Other has"):
        resolve(Other(), parse_hook_point("blocks.0.hook_mlp_out"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("site", "variants"),
    [
        ("model.layers.0.output", {"layer 1": "model.layers.1.output"}),
        (
            "model.layers.4.self_attn.o_proj.input",
            {"layer 3": "model.layers.3.self_attn.o_proj.input", "layer 5": "model.layers.5.self_attn.o_proj.input"},
        ),
        (
            "model.layers.0.post_feedforward_layernorm.output",
            {
                "layer 1": "model.layers.1.post_feedforward_layernorm.output",
                "without the norm's gain": "model.layers.0.post_feedforward_layernorm.input.rms_norm",
                "before the norm": "model.layers.0.post_feedforward_layernorm.input",
            },
        ),
        (
            "model.layers.0.pre_feedforward_layernorm.input.rms_norm",
            {
                "layer 1": "model.layers.1.pre_feedforward_layernorm.input.rms_norm",
                "with the norm's gain": "model.layers.0.pre_feedforward_layernorm.output",
                "before the norm": "model.layers.0.pre_feedforward_layernorm.input",
            },
        ),
        (
            "blocks.0.hook_mlp_in",  # where TransformerLens' name for it is mistaken for what the MLP reads
            {
                "layer 1": "model.layers.1.ln2.input",
                "with the norm's gain": "model.layers.0.ln2.output",
                "without the norm's gain": "model.layers.0.ln2.input.rms_norm",
            },
        ),
        ("model.embed_tokens.output.unscaled", {"with the embedding's scale": "model.embed_tokens.output"}),
    ],
)
def test_the_variants_of_a_site_are_what_it_is_likeliest_mistaken_for(site, variants):
    assert {name: str(variant) for name, variant in site_variants(parse_hook_point(site))} == variants


def test_a_model_leaves_out_the_variants_that_it_lacks():
    model, texts = tiny_neox(), ("model.layers.2.output", "blocks.1.hook_mlp_in", "hook_embed")
    names = {text: [name for name, _ in site_variants(parse_hook_point(text), model)] for text in texts}
    assert names == {
        "model.layers.2.output": ["layer 1"],
        "blocks.1.hook_mlp_in": ["layer 0", "layer 2", "with the norm's gain"],
        "hook_embed": [],
    }


def test_a_model_without_known_layers_is_an_error():
    from torch import nn

    with pytest.raises(SubjectModelError, match="Linear has no known list of decoder layers; looked for model"):
        decoder_layers(nn.Linear(2, 2))  # type: ignore[arg-type]
