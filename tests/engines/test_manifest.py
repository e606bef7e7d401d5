import pytest
import torch

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
