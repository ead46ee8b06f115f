import pytest

from scopeatlas.errors import DictionaryError, SubjectModelError
from scopeatlas.subject.sites import Site, decoder_layers, parse_hook_point, resolve_site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("model.layers.12.output", Site(12, "", "output")),
        ("model.layers.0.input", Site(0, "", "input")),
        ("model.layers.7.self_attn.o_proj.input", Site(7, "self_attn.o_proj", "input")),
        ("model.layers.3.post_feedforward_layernorm.output", Site(3, "post_feedforward_layernorm", "output")),
    ],
)
def test_a_hook_point_parses_and_prints_as_it_was(text, site):
    assert parse_hook_point(text) == site and str(site) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.layers.output",
        "model.layers.x.output",
        "model.layers.1",
        "blocks.1.hook_resid_post",
        "model.layers.1.output\n.x",
    ],
)
def test_any_other_string_is_an_error_that_quotes_it(text):
    with pytest.raises(DictionaryError, match="is not of the form model.layers.N"):
        parse_hook_point(text)


def test_sites_resolve_in_a_vision_language_model_to_its_text_layers():
    from torch import nn

    model, text, vision = nn.Module(), nn.Module(), nn.Module()
    model.model = nn.Module()
    model.model.language_model, model.model.vision_tower = text, vision
    text.layers, vision.layers = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(3, 3)])
    assert resolve_site(model, Site(0, "", "output")) is text.layers[0]


def test_a_model_without_known_layers_is_an_error():
    from torch import nn

    with pytest.raises(SubjectModelError, match="Linear has no known list of decoder layers; looked for model"):
        decoder_layers(nn.Linear(2, 2))
