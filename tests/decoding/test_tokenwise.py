"""Decoding token by token, with real models of a few thousand parameters."""

import math

import pytest
import torch
from transformers import MistralConfig, MistralModel

from llmac.core.protocols import Request, SamplingParams
from llmac.core.types import Finish, Prompt
from llmac.decoding import token_guided, transfer
from llmac.decoding.ahead import ByCache, ByStates, looking_ahead
from llmac.decoding.reading import Reader
from llmac.decoding.values import State, ValueModelSays
from llmac.engines.hf_engine import HFEngine
from llmac.engines.sampling import draw
from llmac.errors import ConfigError, EngineError
from llmac.models.value_model import ValueModel
from tests.decoding.scripted import END, ByText, encode, read, tiny
from tests.e2e.conftest import character_tokenizer

TOKENIZER = character_tokenizer()
PROMPTS = ["abc=", "f", "ab"]
SAMPLING = SamplingParams(max_new_tokens=6, seed=1)
GREEDY = SamplingParams(max_new_tokens=6, seed=1, temperature=0.0)


@torch.no_grad()
def logits_behind(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].float()


def responses(decoded):
    return [one.chosen.response_ids for one in decoded]


@torch.no_grad()
def test_padded_rows_with_a_cache_are_read_as_each_row_alone():
    model = tiny(0)
    reader = Reader(model, [encode(text) for text in PROMPTS])
    found = reader.start()
    for step in range(3):
        for row, text in enumerate(PROMPTS):
            torch.testing.assert_close(
                found[row], logits_behind(model, encode(text + "dea"[:step]))
            )
        found = reader.advance(torch.full((3,), encode("dea")[step]))


def test_without_strength_the_policy_decodes():
    """Greedy: as the engine does."""
    model = tiny(0)
    engine = HFEngine(tiny(0), TOKENIZER)
    requests = [Request(prompt_ids=encode(text), params=GREEDY) for text in PROMPTS]
    expected = [c.token_ids for [c] in engine.generate(requests)]
    nothing = ByText(lambda text: float(len(text)))
    for rule in ("ratio", "tilt"):
        found = token_guided(
            model, TOKENIZER, nothing, PROMPTS, rule=rule, lam=0.0, sampling=GREEDY
        )
        assert responses(found) == expected
    same = transfer(model, TOKENIZER, [(tiny(1), tiny(1))], PROMPTS, sampling=GREEDY)
    assert responses(same) == expected


@pytest.mark.parametrize(
    ("rule", "others"), [("ratio", "zero"), ("ratio", "keep"), ("tilt", "zero")]
)
def test_each_token_is_drawn_in_proportion_to_probability_and_value(rule, others):
    """Against the definition, one prompt and one token at a time, with plain forward passes."""
    model, lam, tau, top_k = tiny(0), 2.0, 0.7, 3
    worth = {"": 0.1}

    def value(text):
        return worth.get(text, 0.4 * text.count("c") - 0.3 * text.count("e"))

    sampling = SamplingParams(max_new_tokens=4, seed=5, temperature=tau)
    found = token_guided(
        model,
        TOKENIZER,
        ByText(value),
        PROMPTS,
        rule=rule,
        others=others,
        lam=lam,
        top_k=top_k,
        sampling=sampling,
    )
    uniforms = torch.rand(3, 4, generator=torch.Generator().manual_seed(5))
    for row, one in enumerate(found):
        ids, logprob = [], 0.0
        while len(ids) < 4 and END not in ids:
            p = (logits_behind(model, (*encode(PROMPTS[row]), *ids)) / tau).softmax(0)
            weight = torch.full_like(p, 0.0 if others == "zero" else 1.0)
            for token in p.topk(top_k).indices.tolist():
                ahead = value(read([*ids, token]))  # an end is worth what is there before it
                if rule == "tilt":
                    weight[token] = math.exp(lam * ahead)
                else:
                    sigmoids = [1 / (1 + math.exp(-v)) for v in (ahead, value(read(ids)))]
                    weight[token] = (sigmoids[0] / sigmoids[1]) ** lam
            p = p * weight / (p * weight).sum()
            token, _ = draw(p.log()[None], uniforms[row, len(ids)][None, None], SamplingParams())
            ids.append(int(token))
            logprob += float(p[ids[-1]].log())
        assert one.chosen.response_ids == tuple(ids)
        assert one.chosen.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.valued_states == len(ids) * (top_k + 1)


class Through:
    """Says what another one says, and is no value model to anybody who looks."""

    def __init__(self, says):
        self.values_of = says.values_of


class LikesEnds:
    """What nobody has taught it: an end is worth a lot."""

    def values_of(self, states):
        return [100.0 * (END in state.response_ids) for state in states]


def test_a_value_model_guides_through_its_cache_as_it_does_through_whole_states():
    model = ValueModel(tiny(3).model)
    torch.nn.init.normal_(model.head.weight)
    how = {"rule": "tilt", "lam": 3.0, "sampling": SAMPLING}
    cached = token_guided(tiny(0), TOKENIZER, model, PROMPTS, **how)
    whole = token_guided(tiny(0), TOKENIZER, Through(ValueModelSays(model)), PROMPTS, **how)
    assert responses(cached) == responses(whole)
    assert len(set(responses(cached))) > 1


def test_what_a_critic_says_behind_the_end_is_not_asked():
    how = {"rule": "tilt", "top_k": 9, "sampling": SAMPLING}
    found = token_guided(tiny(0), TOKENIZER, LikesEnds(), PROMPTS, lam=1.0, **how)
    plain = token_guided(tiny(0), TOKENIZER, LikesEnds(), PROMPTS, lam=0.0, **how)
    assert responses(found) == responses(plain)


def test_nor_is_it_behind_a_token_that_the_caller_has_as_an_end():
    """Its likings do not count, and nothing else tells the tokens apart."""
    stop = SamplingParams(max_new_tokens=6, seed=1, stop_token_ids=encode("d"))
    found, plain = (
        token_guided(
            tiny(0),
            TOKENIZER,
            ByText(lambda text: float(text.endswith("d"))),
            PROMPTS,
            rule="tilt",
            top_k=9,
            lam=lam,
            sampling=stop,
        )
        for lam in (1e3, 0.0)
    )
    assert responses(found) == responses(plain)


def test_strong_values_are_obeyed_and_only_candidates_are_asked_about():
    values = ByText(lambda text: float(text.count("d")))
    found = token_guided(
        tiny(0), TOKENIZER, values, PROMPTS, rule="tilt", lam=1e3, top_k=9, sampling=GREEDY
    )
    assert [one.chosen.text for one in found] == ["dddddd"] * 3
    assert {one.chosen.finish for one in found} == {Finish.LENGTH}
    few = ByText(lambda text: 0.0)
    token_guided(tiny(0), TOKENIZER, few, ["a"], top_k=2, sampling=SamplingParams(max_new_tokens=1))
    assert len(few.asked) == 3


def test_a_row_is_decoded_the_same_in_whatever_company():
    values = ByText(lambda text: text.count("a") / (1 + len(text)))
    together = token_guided(tiny(0), TOKENIZER, values, PROMPTS, sampling=SAMPLING)
    apart = token_guided(tiny(0), TOKENIZER, values, PROMPTS, sampling=SAMPLING, rows_at_once=1)
    assert responses(together) == responses(apart)
    other = token_guided(
        tiny(0), TOKENIZER, values, PROMPTS, sampling=SamplingParams(max_new_tokens=6, seed=2)
    )
    assert responses(together) != responses(other)


@torch.no_grad()
def test_transfer_draws_from_the_shifted_logits():
    """A wider vocabulary of the large model: its tail is never drawn."""
    large, tuned, reference = tiny(0, vocabulary=12, width=32), tiny(1), tiny(2)
    sampling = SamplingParams(max_new_tokens=4, seed=5, temperature=1.3)
    found = transfer(large, TOKENIZER, [(tuned, reference)], PROMPTS, lam=0.5, sampling=sampling)
    uniforms = torch.rand(3, 4, generator=torch.Generator().manual_seed(5))
    for row, one in enumerate(found):
        ids = []
        while len(ids) < 4 and END not in ids:
            seen = (*encode(PROMPTS[row]), *ids)
            big, rl, ref = (logits_behind(m, seen) for m in (large, tuned, reference))
            logits = (big[:9] + 0.5 * (rl - ref)) / 1.3
            token, _ = draw(logits[None], uniforms[row, len(ids)][None, None], SamplingParams())
            ids.append(int(token))
        assert one.chosen.response_ids == tuple(ids)
        assert one.valued_states == 0


def test_a_model_shifted_by_its_own_tuning_is_the_tuned_one():
    base, tuned = tiny(0), tiny(1)
    found = transfer(base, TOKENIZER, [(tuned, base)], PROMPTS, sampling=SAMPLING)
    alone = transfer(tuned, TOKENIZER, [(base, base)], PROMPTS, sampling=SAMPLING)
    assert responses(found) == responses(alone)


def test_stop_words_end_a_response_with_the_token_that_completes_them():
    values = ByText(lambda text: float(text.count("d")))
    sampling = SamplingParams(max_new_tokens=6, seed=1, temperature=0.0, stop=("dd",))
    [found] = token_guided(
        tiny(0), TOKENIZER, values, ["a"], rule="tilt", lam=1e3, sampling=sampling
    )
    assert (found.chosen.text, found.chosen.finish) == ("dd", Finish.STOP)


def test_settings_that_make_no_sense_are_refused():
    values = ByText(len)
    with pytest.raises(ConfigError, match="top_k of guided tokens is 0"):
        token_guided(tiny(0), TOKENIZER, values, ["a"], top_k=0)
    with pytest.raises(ConfigError, match="rule tilt"):
        token_guided(tiny(0), TOKENIZER, values, ["a"], rule="tilt", others="keep")
    sevens, how = ByText(lambda text: 7.0), {"scale": "probability", "sampling": SAMPLING}
    with pytest.raises(ConfigError, match="a value is 7, and as a probability"):
        token_guided(tiny(0), TOKENIZER, sevens, ["a"], **how)
    with pytest.raises(ConfigError, match="no pair"):
        transfer(tiny(0), TOKENIZER, [], ["a"])
    with pytest.raises(EngineError, match="limit is 32"):
        transfer(
            tiny(0),
            TOKENIZER,
            [(tiny(0), tiny(0))],
            ["a"],
            sampling=SamplingParams(max_new_tokens=40),
        )


@torch.no_grad()
def test_a_value_model_is_asked_about_the_last_token_of_a_state():
    model = ValueModel(tiny(3).model)
    torch.nn.init.normal_(model.head.weight)
    states = [
        State(prompt=one, response_ids=encode(said))
        for one, said in [(prompt("abc="), ""), (prompt("f"), "abcd"), (prompt("f"), "ab")]
    ]
    expected = [
        float(model.head(model.backbone(torch.tensor([ids])).last_hidden_state[0, -1]))
        for ids in (encode("abc="), encode("fabcd"), encode("fab"))
    ]
    for packing in ("padded", "auto", "trie"):
        found = ValueModelSays(model, packing=packing, max_tokens=9).values_of(states)
        assert found == pytest.approx(expected, abs=1e-4)


def prompt(text):
    return Prompt(id=text, token_ids=encode(text), source=text)


def test_candidates_are_valued_by_the_cache_as_whole_states_are():
    model = ValueModel(tiny(3).model)
    torch.nn.init.normal_(model.head.weight)
    prompts = [prompt(text) for text in PROMPTS]
    says = ValueModelSays(model)
    cached = looking_ahead(says, prompts)
    assert isinstance(cached, ByCache)
    drawn = []
    for step in range(3):
        rows = [
            State(prompt=p, response_ids=tuple(ids[i] for ids in drawn))
            for i, p in enumerate(prompts)
        ]
        candidates = torch.tensor([[2, 3, 7], [1, 4, 5], [0, 6, 8]])
        for found, expected in zip(
            cached.look(rows, candidates), ByStates(says).look(rows, candidates), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        drawn.append([2 + step, 5, 8 - step])
        cached.advance(torch.tensor(drawn[-1]))


def test_a_value_model_whose_cache_cannot_be_used_so_is_asked_about_whole_states():
    model = ValueModel(tiny(3).model)
    torch.nn.init.normal_(model.head.weight)
    plain = model.backbone.forward

    def deaf(**inputs):
        if inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() == 4:
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
        return plain(**inputs)

    model.backbone.forward = deaf
    assert isinstance(looking_ahead(ValueModelSays(model), [prompt("abc=")]), ByStates)


def test_a_value_model_that_looks_through_a_window_is_asked_about_whole_states():
    """Its window is passed only in the middle of a response."""
    config = MistralConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=32,
    )
    torch.manual_seed(3)
    model = ValueModel(MistralModel(config).eval())
    torch.nn.init.normal_(model.head.weight)
    says = ValueModelSays(model)
    assert isinstance(looking_ahead(says, [prompt("abc=")]), ByStates)
    long = SamplingParams(max_new_tokens=12, seed=1, temperature=0.0)
    [found] = token_guided(tiny(0), TOKENIZER, model, ["abc="], top_k=3, sampling=long)
    assert found.sampled_tokens == 12 or found.chosen.finish is Finish.STOP
