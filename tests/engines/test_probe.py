import pytest
import torch

from llmac.core.protocols import Request, SamplingParams
from llmac.engines.hf_engine import HFEngine
from llmac.engines.probe import (
    ProbedModule,
    check_engine_holds,
    prove_updates_arrive,
    sampler_difference,
)
from llmac.errors import EngineError

PROMPTS = [(5, 6, 7), (8, 9)]


class Forgetful(HFEngine):
    """An engine that loads every weight except the named one."""

    forgets = ""

    def load_weights(self, weights, version):
        kept = dict(self._model.named_parameters())[self.forgets].detach()
        super().load_weights(
            ((name, kept if name == self.forgets else x) for name, x in weights), version
        )


def test_a_healthy_engine_passes_and_ends_with_the_true_weights(make_model, tokenizer):
    model, engine = make_model(seed=1), HFEngine(make_model(seed=1), tokenizer)
    requests = [Request(prompt_ids=PROMPTS[0], params=SamplingParams(max_new_tokens=8, seed=0))]
    before = engine.generate(requests)
    state = torch.get_rng_state()
    found = prove_updates_arrive(engine, model.named_parameters, ProbedModule(model), PROMPTS)
    assert set(found) == {"perturbed", "restored"}
    assert all(difference < 1e-4 for difference in found.values())
    assert engine.generate(requests) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tied", [True, False])
def test_a_single_weight_that_stays_behind_is_caught(tied, make_model, tokenizer):
    model = make_model(tied=tied)
    for name, _ in model.named_parameters():
        engine = Forgetful(make_model(tied=tied), tokenizer)
        engine.forgets = name
        with pytest.raises(EngineError, match="every weight changed"):
            prove_updates_arrive(engine, model.named_parameters, ProbedModule(model), PROMPTS)


def test_an_engine_that_ignores_updates_agrees_until_the_policy_learns(make_model, tokenizer):
    class Deaf(HFEngine):
        def load_weights(self, weights, version):
            list(weights)

    model, engine = make_model(), Deaf(make_model(), tokenizer)
    assert check_engine_holds(engine, ProbedModule(model).logprobs_of, PROMPTS) < 1e-4
    with pytest.raises(EngineError, match="every weight changed"):
        prove_updates_arrive(engine, model.named_parameters, ProbedModule(model), PROMPTS)


def test_other_weights_are_told_from_the_policys(make_model, tokenizer):
    engine = HFEngine(make_model(seed=1), tokenizer)
    assert sampler_difference(engine, ProbedModule(make_model(seed=1)).logprobs_of, PROMPTS) < 1e-4
    with pytest.raises(EngineError, match=r"step 50.*rollout\.dtype"):
        check_engine_holds(
            engine, ProbedModule(make_model(seed=2)).logprobs_of, PROMPTS, when="step 50"
        )


def test_not_a_number_does_not_pass(make_model, tokenizer):
    engine = HFEngine(make_model(), tokenizer)
    with pytest.raises(EngineError, match="nan"):
        check_engine_holds(engine, lambda prompt, response: [float("nan")] * len(response), PROMPTS)
