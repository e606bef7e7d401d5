import pytest
import torch
from torch import nn

from llmac.engines.manifest import Manifest
from llmac.errors import EngineError


def test_tied_names_are_one_weight_also_on_the_meta_device(make_model):
    with torch.device("meta"):
        skeleton = type(make_model())(make_model().config)
    for model in (make_model(), skeleton):
        manifest = Manifest.of(model)
        assert frozenset({"lm_head.weight", "model.embed_tokens.weight"}) in manifest.aliases


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_name_of_a_tied_weight_is_enough(name, make_model):
    state = make_model().state_dict()
    other = {"lm_head.weight", "model.embed_tokens.weight"} - {name}
    stream = [(key, x) for key, x in state.items() if key not in other]
    arrived = [key for key, _ in Manifest.of(make_model()).checked(stream)]
    assert name in arrived
    assert len(arrived) == len(stream)


def test_an_untied_head_must_arrive(make_model):
    model = make_model(tied=False)
    stream = [(key, x) for key, x in model.state_dict().items() if key != "lm_head.weight"]
    with pytest.raises(EngineError, match=r"1 of \d+ weights did not arrive: lm_head\.weight"):
        list(Manifest.of(model).checked(stream))


def test_a_shard_is_told_from_a_gathered_weight(make_model):
    model = make_model()
    with pytest.raises(EngineError, match=r"shape \(0,\).*gathered"):
        list(Manifest.of(model).checked([("model.norm.weight", torch.zeros(0))]))


def test_buffers_are_welcome_and_may_be_missing():
    model = nn.Linear(2, 1)
    model.register_buffer("steps", torch.zeros(3))
    manifest, weights = Manifest.of(model), list(model.named_parameters())
    assert manifest.optional == {"steps"}
    assert [name for name, _ in manifest.checked(weights)] == ["weight", "bias"]
    assert len(list(manifest.checked(model.state_dict().items()))) == 3
    with pytest.raises(EngineError, match="weight steps arrived with shape"):
        list(manifest.checked([*weights, ("steps", torch.zeros(4))]))


def test_what_checkpoints_do_without_may_be_missing(make_model):
    model = make_model(tied=False)
    model._keys_to_ignore_on_save = ["lm_head.weight"]
    stream = [(name, x) for name, x in model.state_dict().items() if name != "lm_head.weight"]
    assert Manifest.of(model).optional == {"lm_head.weight"}
    assert len(list(Manifest.of(model).checked(stream))) == len(stream)
