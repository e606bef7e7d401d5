"""The rehearsal of level 2, on a small model in place of an engine: it discards, forgets and reloads like one."""

import pytest
import torch
from torch import nn

from llmac.engines.deep_sleep import survives_discarding
from llmac.errors import EngineError


class Model(nn.Module):
    """y = (weight · table + offset), with what engines have besides parameters: a buffer and a plain tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 1.5]))
        self.register_buffer("table", torch.tensor([2.0, 3.0]), persistent=False)
        self.offset = torch.tensor([0.25, -0.25])
        self.kv_cache = torch.zeros(2)

    def logprobs(self):
        return (self.weight * self.table + self.offset).log_softmax(dim=-1).tolist()


class Engine:
    """Discards the named tensors at level 2; `sends` says whether the weights come back."""

    def __init__(self, *, forgets=(), sends=True, heals=True):
        self.model = Model()
        self.checkpoint = self.model.weight.detach().clone()
        self.forgets, self.sends, self.heals = forgets, sends, heals
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        for name in self.forgets:
            getattr(self.model, name).fill_(float("nan"))
        self.model.kv_cache = torch.full((2,), float("nan"))

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def apply_model(self, func):
        return [func(self.model)]

    def collective_rpc(self, method):
        self.calls.append(method)
        if self.sends:
            self.model.weight.data.copy_(self.checkpoint)

    def probe(self):
        return self.model.logprobs()


def test_an_engine_that_keeps_what_no_checkpoint_holds_survives():
    engine = Engine()
    before = engine.probe()
    assert survives_discarding(engine, engine.probe)
    assert engine.calls == ["sleep 2", "wake weights", "reload_weights", "wake kv_cache"]
    assert engine.probe() == before


@pytest.mark.parametrize("lost", ["table", "offset"])
def test_a_lost_buffer_is_noticed_and_put_back(lost):
    engine = Engine(forgets=[lost])
    before = engine.probe()
    assert not survives_discarding(engine, engine.probe)
    assert engine.probe() == before
    # Gigabytes, and worthless: keys and values are neither copied nor put back.
    assert engine.model.kv_cache.isnan().all()


def test_weights_that_are_not_sent_again_are_noticed_although_memory_happens_to_keep_them():
    engine = Engine(sends=False)
    with pytest.raises(EngineError, match=r"did not come back .* Set rollout\.sleep_level=1"):
        survives_discarding(engine, engine.probe)


def test_an_answer_of_another_length_is_another_answer():
    answers = iter([[-0.5, -0.5], [-0.5], [-0.5, -0.5]])
    assert not survives_discarding(Engine(), lambda: next(answers))
