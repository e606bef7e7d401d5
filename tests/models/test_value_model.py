"""Values are causal, start constant, sit at the right states, and survive saving."""

import pytest
import torch
from transformers import AutoModel

from llmac.errors import CheckpointError
from llmac.models.packing import pack
from llmac.models.value_heads import save_head
from llmac.models.value_model import ValueModel


@pytest.fixture
def value_model(make_model):
    model = ValueModel(make_model(auto=AutoModel))
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.offset.fill_(0.5)
    return model


def test_a_fresh_head_says_its_offset_everywhere(make_model, ragged):
    model = ValueModel(make_model(auto=AutoModel))
    model.head.offset.fill_(0.25)
    with torch.no_grad():
        assert torch.equal(model(pack(ragged, pad_id=0)), torch.full((4, 5), 0.25))


def test_a_value_never_sees_the_action_or_anything_after_it(value_model, make_trajectory):
    with torch.no_grad():
        one = value_model(pack([make_trajectory([1, 2], [3, 4, 5, 6])], pad_id=0))[0]
        for t in range(4):
            response = [3, 4, 5, 6]
            response[t:] = [(token + 7) % 29 for token in response[t:]]
            other = value_model(pack([make_trajectory([1, 2], response)], pad_id=0))[0]
            torch.testing.assert_close(one[: t + 1], other[: t + 1])
            assert not torch.allclose(one[t + 1 :], other[t + 1 :])


def test_values_of_ragged_rows_equal_those_of_each_row_alone(value_model, ragged):
    with torch.no_grad():
        together = value_model(pack(ragged, pad_id=0))
        for row, trajectory in enumerate(ragged):
            alone = value_model(pack([trajectory], pad_id=0))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone)


def test_a_saved_value_model_says_the_same(value_model, ragged, tmp_path):
    value_model.backbone.save_pretrained(tmp_path)
    save_head(value_model.head.state_dict(), value_model.spec, tmp_path)
    with torch.no_grad():
        again = ValueModel.from_pretrained(tmp_path)(pack(ragged, pad_id=0))
        assert torch.equal(again, value_model(pack(ragged, pad_id=0)))
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "qwen2"


def test_a_folder_without_a_head_is_refused(make_model, tmp_path):
    make_model(auto=AutoModel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no value_head.safetensors"):
        ValueModel.from_pretrained(tmp_path)


def test_a_borrowed_trunk_learns_nothing_from_values(make_model, ragged):
    trunk = make_model(auto=AutoModel)

    @torch.no_grad()
    def states(rows):
        return trunk(input_ids=rows.input_ids).last_hidden_state.flatten(0, 1)

    borrowed, own = ValueModel(trunk, states=states), ValueModel(trunk)
    with torch.no_grad():
        borrowed.head.weight.normal_()
        own.head.load_state_dict(borrowed.head.state_dict())
    rows = pack(ragged, pad_id=0)
    assert torch.equal(borrowed(rows), own(rows))
    borrowed(rows).sum().backward()
    assert set(dict(borrowed.named_parameters())) == {"head.weight", "head.bias"}
    assert borrowed.head.weight.grad is not None
    assert all(p.grad is None for p in trunk.parameters())
