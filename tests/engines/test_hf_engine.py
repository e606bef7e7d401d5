import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from llmac.core.measures import Mean
from llmac.core.protocols import CountsPrefixHits, Request, RolloutEngine, SamplingParams
from llmac.core.types import Finish
from llmac.engines.hf_engine import HFEngine
from llmac.engines.wave import Wave
from llmac.errors import EngineError

END = 1
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
"""Of a Qwen2 whose cache is of its own kind, so that `generate` samples."""


def ask(prompts, **params):
    return [Request(prompt_ids=prompt, params=SamplingParams(**params)) for prompt in prompts]


def flat(answers):
    return [completion for siblings in answers for completion in siblings]


@pytest.fixture
def engine(make_model, tokenizer):
    return HFEngine(make_model(), tokenizer)


def test_it_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_responses_equal_generate(kind, tied, make_model, tokenizer, prompts, greedy):
    engine = HFEngine(make_model(kind, tied=tied), tokenizer)
    answers = engine.generate(ask(prompts, temperature=0.0, max_new_tokens=20))
    assert [c.token_ids for c in flat(answers)] == greedy(make_model(kind, tied=tied), prompts, 20)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_p": 0.7},
        {"top_k": 5},
        {"top_k": 8, "top_p": 0.8},
        {"temperature": 0.0},
    ],
)
def test_logprobs_equal_a_recomputation(params, engine, make_model, prompts, expected_logprobs):
    requests = ask(prompts[:6], n=2, max_new_tokens=12, seed=5, **params)
    for request, siblings in zip(requests, engine.generate(requests), strict=True):
        for completion in siblings:
            expected = expected_logprobs(
                make_model(), request.prompt_ids, completion, request.params
            )
            assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_after_an_update_greedy_responses_equal_those_of_the_new_weights(
    tied, make_model, tokenizer, prompts, greedy
):
    engine, new = HFEngine(make_model(tied=tied), tokenizer), make_model(tied=tied, seed=1)
    engine.load_weights(new.named_parameters(), version=3)
    answers = flat(engine.generate(ask(prompts, temperature=0.0, max_new_tokens=20)))
    assert [c.token_ids for c in answers] == greedy(new, prompts, 20)
    assert greedy(new, prompts, 20) != greedy(make_model(tied=tied), prompts, 20)
    assert {c.policy_version for c in answers} == {engine.policy_version} == {3}


def test_the_engine_keeps_its_own_copy_of_the_weights(engine, make_model, prompts):
    new = make_model(seed=1)
    engine.load_weights(new.named_parameters(), version=1)
    before = engine.generate(ask(prompts, max_new_tokens=8, seed=0))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert engine.generate(ask(prompts, max_new_tokens=8, seed=0)) == before


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda weights: weights[:-1], "model.norm.weight"),
        (lambda weights: [*weights, ("model.extra.weight", torch.zeros(2))], "model.extra.weight"),
        (lambda weights: [(weights[0][0], torch.zeros(3, 3)), *weights[1:]], "embed_tokens"),
        (lambda weights: [*weights, weights[2]], "twice"),
    ],
)
def test_a_wrong_stream_of_weights_is_named_and_changes_nothing(
    spoil, named, engine, make_model, prompts
):
    requests = ask(prompts, max_new_tokens=8, seed=0)
    before = engine.generate(requests)
    with pytest.raises(EngineError, match=named):
        engine.load_weights(spoil(list(make_model(seed=1).named_parameters())), version=9)
    assert engine.policy_version == 0
    assert engine.generate(requests) == before


def test_an_error_in_the_stream_changes_nothing(engine, make_model, prompts):
    def breaks_off():
        yield from list(make_model(seed=1).named_parameters())[:5]
        raise OSError("lost")

    before = engine.generate(ask(prompts, max_new_tokens=8, seed=0))
    with pytest.raises(OSError, match="lost"):
        engine.load_weights(breaks_off(), version=9)
    assert engine.generate(ask(prompts, max_new_tokens=8, seed=0)) == before


def test_an_update_holds_one_copy_of_each_weight(engine, make_model):
    new = make_model(seed=1)
    engine.load_weights(new.named_parameters(), version=1)
    for name, parameter in engine._model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert parameter.data_ptr() != new.get_parameter(name).data_ptr(), name


def test_both_names_of_a_tied_weight_are_accepted(engine, make_model):
    engine.load_weights(make_model(seed=1).state_dict().items(), version=1)
    assert engine.policy_version == 1


def test_the_same_seed_gives_the_same_responses_and_another_seed_others(engine, prompts):
    first = engine.generate(ask(prompts, n=2, max_new_tokens=12, seed=4))
    assert engine.generate(ask(prompts, n=2, max_new_tokens=12, seed=4)) == first
    assert engine.generate(ask(prompts, n=2, max_new_tokens=12, seed=5)) != first


def test_without_a_seed_torch_decides(engine, prompts):
    requests = ask(prompts, max_new_tokens=12)
    torch.manual_seed(0)
    first, second = engine.generate(requests), engine.generate(requests)
    torch.manual_seed(0)
    assert engine.generate(requests) == first != second


def test_siblings_and_equal_prompts_are_sampled_independently(engine, prompts):
    answers = flat(engine.generate(ask([prompts[0], prompts[0]], n=8, max_new_tokens=12, seed=0)))
    assert len({c.token_ids for c in answers}) > 12


def test_answers_keep_the_order_and_number_of_the_requests(engine, prompts, greedy, make_model):
    requests = [
        *ask(prompts[:3], n=2, temperature=0.0, max_new_tokens=6),
        *ask(prompts[3:5], n=1, temperature=0.0, max_new_tokens=3),
        *ask(prompts[5:6], n=3, temperature=0.0, max_new_tokens=6),
    ]
    answers = engine.generate(requests)
    assert [len(siblings) for siblings in answers] == [2, 2, 2, 1, 1, 3]
    assert [siblings[0].token_ids for siblings in answers[:3]] == greedy(
        make_model(), prompts[:3], 6
    )
    assert [siblings[0].token_ids for siblings in answers[3:5]] == greedy(
        make_model(), prompts[3:5], 3
    )
    assert engine.generate([]) == []


def test_batches_groups_and_dropped_rows_do_not_change_what_a_row_samples(
    make_model, tokenizer, prompts
):
    # The tie of a row to its numbers is its place in the call, so the same call is cut into batches of other sizes.
    requests = ask(prompts, n=4, max_new_tokens=40, seed=2, temperature=1.5)
    expected = flat(HFEngine(make_model(), tokenizer).generate(requests))
    lengths = {len(c.token_ids) for c in expected}
    assert len(lengths) > 8, "rows must finish at different times for this test to mean anything"
    for rows in (1, 3, 17):
        engine, batches = HFEngine(make_model(), tokenizer, max_batch_rows=rows), set()
        engine._model.register_forward_hook(lambda *call: batches.add(len(call[2].logits)))  # noqa: B023
        found = flat(engine.generate(requests))
        assert max(batches) == rows
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        for one, other in zip(found, expected, strict=True):
            assert torch.tensor(one.logprobs).allclose(torch.tensor(other.logprobs), atol=2e-5)


@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["in_step", "generate"])
def test_requests_of_different_lengths_are_sampled_together_as_if_alone(
    changes, make_model, tokenizer, prompts
):
    engine = HFEngine(make_model(**changes), tokenizer)
    limits = [3, 30, 1, 17, 4, 8]
    requests = [
        Request(prompt_ids=prompt, params=SamplingParams(n=3, max_new_tokens=limit, seed=6))
        for prompt, limit in zip(prompts, limits, strict=False)
    ]
    passes = []
    hook = engine._model.register_forward_hook(lambda *_: passes.append(1))
    together = engine.generate(requests)
    hook.remove()
    assert len(passes) <= max(limits)
    for place, (siblings, limit) in enumerate(zip(together, limits, strict=True)):
        # The others are of another temperature, so this one is in a batch of its own, at its place in the call.
        params = SamplingParams(n=3, max_new_tokens=5, temperature=0.5, seed=6)
        others = [Request(prompt_ids=(5,), params=params)] * len(requests)
        alone = engine.generate([*others[:place], requests[place], *others[place + 1 :]])[place]
        for one, other in zip(siblings, alone, strict=True):
            assert (one.token_ids, one.finish) == (other.token_ids, other.finish)
            assert torch.tensor(one.logprobs).allclose(torch.tensor(other.logprobs), atol=1e-5)
            assert (one.finish is Finish.STOP) == (one.token_ids[-1] == END)
            assert len(one.token_ids) == limit or one.finish is Finish.STOP
    assert {len(c.token_ids) for c in flat(together)} > set(limits) - {30}


def test_a_response_ends_at_the_end_token_or_at_the_limit(engine, prompts):
    answers = flat(engine.generate(ask(prompts, n=4, max_new_tokens=25, seed=0)))
    assert {c.finish for c in answers} == {Finish.STOP, Finish.LENGTH}
    for completion in answers:
        ended = completion.token_ids[-1] == END
        assert completion.finish == (Finish.STOP if ended else Finish.LENGTH)
        assert END not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == 25
        assert len(completion.logprobs) == len(completion.token_ids)


def test_a_stop_token_at_the_last_allowed_step_is_a_stop(engine, prompts):
    (full,) = flat(engine.generate(ask(prompts[:1], temperature=0.0, max_new_tokens=5)))
    fifth = full.token_ids[4]
    assert fifth not in full.token_ids[:4]
    (cut,) = flat(
        engine.generate(
            ask(prompts[:1], temperature=0.0, max_new_tokens=5, stop_token_ids=(fifth,))
        )
    )
    assert (cut.finish, cut.token_ids) == (Finish.STOP, full.token_ids)


def test_stop_token_ids_end_a_response_and_are_kept(engine, prompts):
    for completion in flat(
        engine.generate(ask(prompts, max_new_tokens=30, seed=0, stop_token_ids=(9, 10)))
    ):
        ends = [place for place, token in enumerate(completion.token_ids) if token in (END, 9, 10)]
        assert ends in ([], [len(completion.token_ids) - 1])
        assert (completion.finish is Finish.STOP) == bool(ends)


def test_all_end_tokens_of_the_generation_config_end_a_response(make_model, tokenizer, prompts):
    model = make_model()
    model.generation_config.eos_token_id = [END, 7, 8]
    engine = HFEngine(model, tokenizer)
    for completion in flat(engine.generate(ask(prompts, n=4, max_new_tokens=30, seed=0))):
        assert not {END, 7, 8} & set(completion.token_ids[:-1])


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
            assert after == before


def test_prompts_of_equal_and_of_unequal_length_agree(engine, make_model, greedy, prompts):
    equal = [prompt[:3] for prompt in prompts]
    answers = flat(engine.generate(ask(equal, temperature=0.0, max_new_tokens=10)))
    assert [c.token_ids for c in answers] == greedy(make_model(), equal, 10)


def test_prompts_read_in_several_passes_agree(make_model, tokenizer, prompts, greedy, monkeypatch):
    monkeypatch.setattr("llmac.engines.hf_engine.PREFILL_TOKENS", 20)
    answers = flat(
        HFEngine(make_model(), tokenizer).generate(ask(prompts, temperature=0.0, max_new_tokens=10))
    )
    assert [c.token_ids for c in answers] == greedy(make_model(), prompts, 10)


def test_a_response_longer_than_the_first_cache_agrees(
    make_model, tokenizer, prompts, greedy, monkeypatch
):
    monkeypatch.setattr("llmac.engines.row_cache.GROWTH_TOKENS", 4)
    answers = flat(
        HFEngine(make_model(), tokenizer).generate(ask(prompts, temperature=0.0, max_new_tokens=40))
    )
    assert [c.token_ids for c in answers] == greedy(make_model(), prompts, 40)


def test_what_a_row_draws_past_its_limit_is_neither_kept_nor_a_stop():
    wave = Wave(
        prompts=[(5, 6), (5,)],
        params=SamplingParams(),
        uniforms=[torch.zeros(2), torch.zeros(4)],
        device=torch.device("cpu"),
        ends=frozenset({END}),
        decode=str,
    )
    assert (wave.steps, wave.reach) == (4, 5)
    for ids in [(7, 3), (8, 4), (END, 5), (9, END)]:
        wave.take(torch.tensor(ids), torch.zeros(2))
    cut, ended = wave.completions(0)
    assert (cut.token_ids, cut.finish) == ((7, 8), Finish.LENGTH)
    assert (ended.token_ids, ended.finish) == ((3, 4, 5, END), Finish.STOP)


@pytest.mark.parametrize("in_step", [True, False])
def test_a_row_that_waits_for_longer_ones_asks_for_no_position_beyond_the_limit(
    in_step, tokenizer, prompts, greedy
):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3)).eval()
    other = copy.deepcopy(model)
    engine = HFEngine(model, tokenizer)
    engine._in_step = in_step
    long, short = (prompts[0] * 6)[:15], prompts[1][:2]
    requests = [
        *ask([long], temperature=0.0, max_new_tokens=1),
        *ask([short], temperature=0.0, max_new_tokens=14),
    ]
    assert [c.token_ids for c in flat(engine.generate(requests))] == [
        *greedy(other, [long], 1),
        *greedy(other, [short], 14),
    ]


@pytest.mark.parametrize(("changes", "reused"), [({}, 3 + 3 + 3), (SLIDING, 0)])
def test_prompt_tokens_that_are_copied_are_counted_until_they_are_drained(
    changes, reused, make_model, tokenizer
):
    engine = HFEngine(make_model(**changes), tokenizer)
    assert isinstance(engine, CountsPrefixHits)
    assert not engine.reuses_prefixes
    assert engine.prefix_hits() == {}, "the engine's own trial is not counted"
    # (5, 6, 7) is asked for four times and read once, (8, 9) is read once.
    engine.generate(
        [
            *ask([(5, 6, 7)], n=3, max_new_tokens=2),
            *ask([(8, 9)], max_new_tokens=2),
            *ask([(5, 6, 7)], max_new_tokens=4),
        ]
    )
    assert engine.prefix_hits() == {"rollout/prefix_hit_rate": Mean(reused, 4 * 3 + 2)}
    assert engine.prefix_hits() == {}


def test_dropout_is_off(make_model, tokenizer, prompts):
    engine = HFEngine(make_model(attention_dropout=0.5).train(), tokenizer)
    requests = ask(prompts, temperature=0.0, max_new_tokens=10)
    assert engine.generate(requests) == engine.generate(requests)


def test_sampling_leaves_the_random_state_alone_when_seeded(engine, prompts):
    state = torch.get_rng_state()
    engine.generate(ask(prompts, max_new_tokens=4, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                intermediate_size=64,
                vocab_size=40,
                max_position_embeddings=128,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
                initializer_range=0.03,
                pad_token_id=0,
                eos_token_id=END,
                bos_token_id=2,
            )
        ),
        lambda: GPT2LMHeadModel(
            GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64, initializer_range=0.3
            )
        ),
    ],
    ids=["sliding_window", "learned_positions"],
)
def test_other_architectures_agree_with_generate(
    build, tokenizer, prompts, greedy, expected_logprobs
):
    torch.manual_seed(0)
    model = build().eval()
    other = copy.deepcopy(model)
    engine = HFEngine(model, tokenizer)
    answers = flat(engine.generate(ask(prompts, temperature=0.0, max_new_tokens=12)))
    assert [c.token_ids for c in answers] == greedy(other, prompts, 12)
    requests = ask(prompts[:4], n=2, temperature=0.8, top_p=0.9, max_new_tokens=12, seed=1)
    for request, siblings in zip(requests, engine.generate(requests), strict=True):
        assert siblings[0] != siblings[1]
        for completion in siblings:
            expected = expected_logprobs(other, request.prompt_ids, completion, request.params)
            assert torch.tensor(completion.logprobs).double().allclose(expected, atol=2e-5)


@pytest.mark.parametrize("changes", [{}, SLIDING])
def test_a_repetition_penalty_of_the_checkpoint_does_not_act(
    changes, make_model, tokenizer, prompts, greedy
):
    model = make_model(**changes)
    model.generation_config.repetition_penalty = 5.0
    engine = HFEngine(model, tokenizer)
    answers = flat(engine.generate(ask(prompts, temperature=0.0, max_new_tokens=12)))
    assert [c.token_ids for c in answers] == greedy(make_model(**changes), prompts, 12)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "empty prompt"),
        ((2,), {"n": 0}, "n is 0"),
        ((2,), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ((2,), {"temperature": -1.0}, "temperature is -1.0"),
        ((2,), {"temperature": float("nan")}, "temperature is nan"),
        ((2,), {"top_p": 0.0}, r"top_p is 0\.0"),
        ((2,), {"top_k": -1}, "top_k is -1"),
        ((2,), {"stop": ("",)}, "stop is"),
        ((2,) * 100, {"max_new_tokens": 29}, "129 tokens .* limit is 128"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(prompt, params, message, engine):
    with pytest.raises(EngineError, match=message):
        engine.generate(ask([prompt], **{"max_new_tokens": 4, **params}))


def test_weights_that_are_not_finite_are_reported(engine, make_model, prompts):
    broken = [(name, weight * float("nan")) for name, weight in make_model().named_parameters()]
    engine.load_weights(broken, version=1)
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(ask(prompts, max_new_tokens=4))


def test_close_may_be_called_twice(engine):
    engine.sleep()
    engine.wake()
    assert engine.policy_version == 0
    engine.close()
    engine.close()


def test_an_encoder_decoder_is_refused(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
    with pytest.raises(EngineError, match="encoder-decoder"):
        HFEngine(T5ForConditionalGeneration(config), tokenizer)


def test_the_model_saves_as_before(engine, make_model, tmp_path):
    # The engine replaces linear layers by faster ones; names of parameters must not move.
    engine._model.save_pretrained(tmp_path)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().keys()
        == make_model().state_dict().keys()
    )


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_attention_models_decode_in_step(kind, tied, make_model, tokenizer, caplog):
    # A fault in our attention or cache fails the engine's own trial, and generate would hide it from the other tests.
    with caplog.at_level("INFO", logger="llmac.engines.hf_engine"):
        HFEngine(make_model(kind, tied=tied), tokenizer)
    assert not caplog.records


def test_a_model_that_falls_back_to_generate_is_named_once(make_model, tokenizer, caplog):
    model = make_model(**SLIDING, layer_types=None)
    with caplog.at_level("INFO", logger="llmac.engines.hf_engine"):
        HFEngine(model, tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        "Qwen2ForCausalLM needs a cache of its own kind: sampling with model.generate, which is slower"
    ]
