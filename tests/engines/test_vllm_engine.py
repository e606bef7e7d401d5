"""The promises of `test_hf_engine.py`, kept by a real vLLM; one engine a kind of model, as starting costs seconds."""

import importlib.util
import logging
import os
import random

import pytest
import torch

from llmac.core.measures import Mean
from llmac.core.protocols import Request, RolloutEngine, SamplingParams
from llmac.core.types import Finish
from llmac.engines.probe import (
    LOW_PRECISION_TOLERANCE,
    ProbedModule,
    check_engine_holds,
    prove_updates_arrive,
)
from llmac.engines.vllm_engine import VLLMEngine
from llmac.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

END = 1

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    # vLLM and what it imports use names their own dependencies have deprecated.
    pytest.mark.filterwarnings("ignore"),
]


def ask(prompts, **params):
    return [Request(prompt_ids=prompt, params=SamplingParams(**params)) for prompt in prompts]


def flat(answers):
    return [completion for siblings in answers for completion in siblings]


@pytest.fixture(scope="module", params=["tied", "untied"])
def built(request, make_model, tokenizer, tmp_path_factory):
    """An engine, and a maker of models of its shape; the engine starts on seed 0."""
    tied = request.param == "tied"
    folder = tmp_path_factory.mktemp(request.param)
    make_model(tied=tied).save_pretrained(folder)
    before = _process_state()
    engine = VLLMEngine(str(folder), tokenizer)
    engine.state_before, engine.state_after = before, _process_state()
    yield engine, lambda seed: make_model(tied=tied, seed=seed)
    engine.close()
    engine.close()


@pytest.fixture
def engine(built):
    """The engine with the weights of seed 0."""
    engine, make = built
    engine.load_weights(make(0).named_parameters(), version=0)
    return engine


@pytest.fixture(params=["copy_in", "reload"])
def door(request, built, engine):
    """Both ways in: on CPU the engine takes the first, on GPU the second."""
    _, make = built
    engine._copies_in = request.param == "copy_in"
    yield request.param
    engine.load_weights(make(0).named_parameters(), version=0)  # an update ends by the way it began
    engine._copies_in = True


def _process_state():
    return {
        "threads": torch.get_num_threads(),
        "set_threads": torch.set_num_threads,
        "random": torch.get_rng_state().tolist(),
        "python_random": random.getstate(),
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0),
    }


def test_building_the_engine_leaves_the_process_as_it_was(built):
    engine, _ = built
    for name, before in engine.state_before.items():
        assert engine.state_after[name] == before, name


def test_it_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_on_cpu_weights_are_copied_in(engine):
    if torch.cuda.is_available():
        pytest.skip("on GPU vLLM reloads")
    assert engine._copies_in


def test_greedy_responses_equal_generate_before_and_after_an_update(
    door, built, engine, prompts, greedy
):
    _, make = built
    requests = ask(prompts, n=2, temperature=0.0, max_new_tokens=20)
    for seed in (0, 1):
        model = make(seed)
        engine.load_weights(model.named_parameters(), version=seed + 5)
        answers = engine.generate(requests)
        assert [siblings[0].token_ids for siblings in answers] == greedy(model, prompts, 20)
        assert all(len(siblings) == 2 and siblings[0] == siblings[1] for siblings in answers)
        assert {c.policy_version for c in flat(answers)} == {engine.policy_version} == {seed + 5}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_p": 0.7},
        {"top_k": 5},
        {"temperature": 0.0},
    ],
)
def test_logprobs_equal_a_recomputation(params, built, engine, prompts, expected_logprobs):
    _, make = built
    requests = ask(prompts[:6], max_new_tokens=12, seed=5, **params)
    for request, siblings in zip(requests, engine.generate(requests), strict=True):
        for completion in siblings:
            expected = expected_logprobs(make(0), request.prompt_ids, completion, request.params)
            assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=2e-4)


def test_seeds_repeat_and_siblings_differ(engine, prompts):
    requests = ask([prompts[0]] * 2, n=6, max_new_tokens=12, seed=4)
    first = engine.generate(requests)
    assert engine.generate(requests) == first
    assert len({c.token_ids for c in flat(first)}) > 9
    assert engine.generate(ask([prompts[0]] * 2, n=6, max_new_tokens=12, seed=5)) != first


def test_a_prompt_that_begins_like_an_earlier_one_is_not_read_from_the_beginning(built, engine):
    _, make = built
    assert engine.reuses_prefixes
    engine.prefix_hits()
    trunk = tuple(2 + place % 37 for place in range(70))
    engine.generate(ask([trunk], max_new_tokens=2, seed=0))
    assert engine.prefix_hits() == {"rollout/prefix_hit_rate": Mean(0.0, 70.0)}
    # Two whole blocks of 32 are there already.
    engine.generate(ask([(*trunk, 5, 6)], n=3, max_new_tokens=2, seed=0))
    assert engine.prefix_hits() == {"rollout/prefix_hit_rate": Mean(3 * 64.0, 3 * 72.0)}
    assert engine.prefix_hits() == {}
    engine.load_weights(make(1).named_parameters(), version=1)
    engine.generate(ask([trunk], max_new_tokens=2, seed=0))
    assert engine.prefix_hits() == {"rollout/prefix_hit_rate": Mean(0.0, 70.0)}


def test_more_prompts_than_fit_in_one_pass_are_sampled(engine):
    # 158 x 76 tokens that share nothing: more than vLLM reads at once. On CPU it cannot read a prompt in parts.
    prompts = [(*divmod(place, 36), *range(2, 39), *range(2, 39)) for place in range(2, 160)]
    answers = engine.generate(ask(prompts, max_new_tokens=2, seed=0))
    assert len(answers) == len(prompts)


def test_without_a_seed_torch_decides(engine, prompts):
    requests = ask(prompts, max_new_tokens=12)
    torch.manual_seed(0)
    first, second = engine.generate(requests), engine.generate(requests)
    torch.manual_seed(0)
    assert engine.generate(requests) == first != second


def test_finish_tells_stop_from_length(engine, prompts):
    answers = flat(
        engine.generate(ask(prompts, n=4, max_new_tokens=25, seed=0, stop_token_ids=(9,)))
    )
    assert {c.finish for c in answers} == {Finish.STOP, Finish.LENGTH}
    for completion in answers:
        ended = completion.token_ids[-1] in (END, 9)
        assert completion.finish == (Finish.STOP if ended else Finish.LENGTH)
        assert not {END, 9} & set(completion.token_ids[:-1])
        assert ended or len(completion.token_ids) == 25
        assert len(completion.logprobs) == len(completion.token_ids)


def test_a_stop_string_ends_a_response_at_the_token_that_completes_it(engine, tokenizer, prompts):
    free = flat(engine.generate(ask(prompts, n=2, max_new_tokens=30, seed=0)))
    longest = max(free, key=lambda completion: len(completion.token_ids))
    stop = tokenizer.decode(longest.token_ids[4:6])
    stopped = flat(
        engine.generate(ask(prompts, n=2, max_new_tokens=30, seed=0, stop=(stop, "never")))
    )
    assert stopped != free
    for before, after in zip(free, stopped, strict=True):
        if stop in tokenizer.decode(before.token_ids):
            tokens = before.token_ids
            kept = next(n for n in range(len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
            assert (after.token_ids, after.finish) == (before.token_ids[:kept], Finish.STOP)
        else:
            assert after.token_ids == before.token_ids


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda weights: weights[:-1], "did not arrive"),
        (
            lambda weights: [*weights, ("model.extra.weight", torch.zeros(2))],
            r"model\.extra\.weight",
        ),
        (
            lambda weights: [*weights[:4], (weights[4][0], torch.zeros(3, 3)), *weights[5:]],
            r"\(3, 3\)",
        ),
    ],
)
def test_after_an_incomplete_update_it_refuses_until_a_complete_one(
    spoil, named, door, built, engine, prompts, greedy
):
    _, make = built
    requests = ask(prompts, temperature=0.0, max_new_tokens=8)
    with pytest.raises(EngineError, match=named):
        engine.load_weights(spoil(list(make(1).named_parameters())), version=9)
    assert engine.policy_version == 0
    with pytest.raises(EngineError, match="incomplete weights: the update to version 9"):
        engine.generate(requests)
    engine.load_weights(make(1).named_parameters(), version=10)
    assert [c.token_ids for c in flat(engine.generate(requests))] == greedy(make(1), prompts, 8)


def test_a_stream_that_breaks_off_anywhere_is_healed_by_a_complete_one(door, built, engine):
    _, make = built
    names = [name for name, _ in make(0).named_parameters()]
    # Nothing yet, in the middle of a fused layer, between layers, before the last.
    for seed, cut in enumerate((0, 3, 13, len(names) - 1), start=1):

        def breaks_off(seed=seed, cut=cut):
            for index, weight in enumerate(make(20 + seed).named_parameters()):
                if index == cut:
                    raise RuntimeError("the link is down")
                yield weight

        with pytest.raises(EngineError, match=r"stream of weights broke off .* the link is down"):
            engine.load_weights(breaks_off(), version=seed)
        with pytest.raises(EngineError, match="incomplete weights"):
            engine.generate(ask([(5, 6)], max_new_tokens=2))
        model = make(seed)
        engine.load_weights(model.named_parameters(), version=10 + seed)
        check_engine_holds(
            engine, ProbedModule(model).logprobs_of, [(5, 6, 7), (8, 9)], tolerance=1e-4
        )


def test_an_error_of_the_source_keeps_its_type(engine, built):
    def misconfigured():
        raise ConfigError("an adapter that cannot be merged")
        yield

    with pytest.raises(ConfigError, match="an adapter"):
        engine.load_weights(misconfigured(), version=1)


def test_tensors_need_not_outlive_their_turn(door, built, engine, prompts, greedy):
    """A source that gathers weights may overwrite them as soon as the next ones are asked for."""
    _, make = built

    def volatile():
        for name, weight in make(3).named_parameters():
            copy = weight.detach().clone()
            yield name, copy
            copy.fill_(float("nan"))

    engine.load_weights(volatile(), version=1)
    answers = engine.generate(ask(prompts, temperature=0.0, max_new_tokens=8))
    assert [c.token_ids for c in flat(answers)] == greedy(make(3), prompts, 8)


def test_a_stream_is_read_to_its_end_when_the_engine_fails(door, built, engine):
    """Other ranks may be waiting in the gather of the next bucket."""
    _, make = built
    taken = []

    def counted():
        for index, (name, weight) in enumerate(make(1).named_parameters()):
            taken.append(name)
            yield name, weight[:1] if index == 2 else weight

    with pytest.raises(EngineError, match="arrived with shape"):
        engine.load_weights(counted(), version=1)
    assert taken == [name for name, _ in make(1).named_parameters()]


def test_the_probe_proves_that_updates_arrive(built, engine):
    _, make = built
    model = make(0)
    found = prove_updates_arrive(
        engine, model.named_parameters, ProbedModule(model), [(5, 6, 7), (8, 9)]
    )
    assert all(difference < 1e-4 for difference in found.values())


def test_the_probe_catches_a_weight_that_stays_behind(built, engine):
    _, make = built
    model = make(0)
    name = "model.layers.1.self_attn.k_proj.weight"
    stale = model.get_parameter(name).detach().clone()

    class Forgetful:
        policy_version = 0
        generate = staticmethod(engine.generate)

        @staticmethod
        def load_weights(weights, version):
            engine.load_weights(((n, stale if n == name else x) for n, x in weights), version)

    with pytest.raises(EngineError, match="every weight changed"):
        prove_updates_arrive(
            Forgetful(), model.named_parameters, ProbedModule(model), [(5, 6, 7), (8, 9)]
        )


def test_a_request_longer_than_the_engine_allows_is_refused(engine):
    with pytest.raises(EngineError, match=r"129 tokens .* limit is 128"):
        engine.generate(ask([(2,) * 100], max_new_tokens=29))


def test_sleep_and_wake_keep_the_weights(engine, prompts):
    requests = ask(prompts, max_new_tokens=8, seed=0)
    before = engine.generate(requests)
    engine.sleep()
    engine.sleep()
    assert engine.generate(requests) == before


def test_an_engine_out_of_memory_names_the_knobs_and_closes(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    engine = VLLMEngine(str(tmp_path), tokenizer)

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    engine._llm.apply_model(lambda model: model.register_forward_pre_hook(runs_out) and None)
    with pytest.raises(EngineError, match=r"Tried to allocate 2 GiB.*lower rollout\.max_model_len"):
        engine.generate(ask([(2, 3)], max_new_tokens=2))
    with pytest.raises(EngineError, match="closed"):
        engine.generate(ask([(2, 3)], max_new_tokens=2))
    with pytest.raises(EngineError, match="closed"):
        engine.load_weights([], version=1)
    engine.sleep()
    engine.wake()
    engine.close()


def test_too_little_room_for_keys_and_values_names_the_knobs(make_model, tokenizer, tmp_path):
    make_model(max_position_embeddings=4096).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"memory to start: .*4096.*rollout\.kv_cache_mb"):
        VLLMEngine(str(tmp_path), tokenizer, kv_cache_mb=1)


def test_a_bfloat16_engine_reports_its_own_logprobs_not_the_trainers(
    make_model, tokenizer, tmp_path, prompts
):
    """Engine and trainer differ on purpose; what the importance correction divides by is what was sampled from."""
    trainer = make_model(seed=4)
    trainer.save_pretrained(tmp_path)
    engine = VLLMEngine(str(tmp_path), tokenizer, dtype="bfloat16")
    engine.load_weights(trainer.named_parameters(), version=1)
    requests = ask(prompts, n=8, max_new_tokens=24, seed=3)
    answers = engine.generate(requests)
    said, expected = [], []
    reference = ProbedModule(trainer)
    for request, siblings in zip(requests, answers, strict=True):
        for completion in siblings:
            said += completion.logprobs
            expected += reference.logprobs_of(request.prompt_ids, completion.token_ids)
    log_ratio = torch.tensor(expected).double() - torch.tensor(said).double()
    mean, most = log_ratio.abs().mean().item(), log_ratio.abs().max().item()
    divergence = (log_ratio.exp() - 1 - log_ratio).mean().item()
    logger.info("bfloat16 engine: mean %.2g, max %.2g, KL %.2g", mean, most, divergence)
    assert 1e-4 < mean < LOW_PRECISION_TOLERANCE
    # E_μ[π/μ] = 1 holds for the engine's own μ.
    assert abs(log_ratio.exp().mean().item() - 1) < 5 * mean / len(said) ** 0.5
    assert check_engine_holds(
        engine, reference.logprobs_of, prompts, tolerance=LOW_PRECISION_TOLERANCE
    )
    with pytest.raises(EngineError, match="does not sample from the policy"):
        check_engine_holds(
            engine,
            ProbedModule(make_model(seed=5)).logprobs_of,
            prompts,
            tolerance=LOW_PRECISION_TOLERANCE,
        )
    engine.close()


def test_a_model_vllm_cannot_compute_is_refused_at_the_start(make_model, tokenizer, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("heads of 8 are refused by vLLM on CPU only")
    make_model(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"rollout\.engine=hf"):
        VLLMEngine(str(tmp_path), tokenizer)
