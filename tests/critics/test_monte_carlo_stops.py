"""Stop strings that begin in a state: its continuations end where a response would that was sampled in one go."""

import dataclasses
import functools
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llmac.core.collate import collate
from llmac.core.continuations import State
from llmac.core.growing import CUT_CHARACTER, continued
from llmac.core.protocols import Completion, SamplingParams
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.critics.continuing import continue_states
from llmac.critics.monte_carlo import MonteCarloConfig
from llmac.critics.states import sample_states
from llmac.engines.hf_engine import HFEngine
from tests.critics.making import bench

PROMPT = Prompt(id="p0", token_ids=(3,), source="?")


def read(token_ids):
    """A token is a byte of the text."""
    return bytes(token_ids).decode(errors="replace")


class Engine:
    """Like the real ones it sees stop strings in its own continuation only. `writes(before, seed)`: an endless text."""

    policy_version = 0

    def __init__(self, writes):
        self.writes, self.asked, self.sampled = writes, [], 0

    def generate(self, requests):
        self.asked += requests
        return [[self._answer(r, k) for k in range(r.params.n)] for r in requests]

    def _answer(self, request, k):
        before, params = request.prompt_ids[1:], request.params
        new, finish, more = [], Finish.LENGTH, self.writes(before, f"{params.seed} {k}")
        while len(new) < params.max_new_tokens and finish is Finish.LENGTH:
            new.append(next(more))
            if any(stop in read(new) for stop in params.stop):
                finish = Finish.STOP
        self.sampled += len(new)
        logprobs = tuple(-0.5 * (len(before) + n) for n in range(len(new)))
        return Completion(token_ids=tuple(new), logprobs=logprobs, finish=finish)


def scripted(text):
    """Always goes on with the same text."""
    return Engine(lambda before, seed: iter(text.encode()[len(before) :] + b"." * 99))


def babbling(before, seed):
    dice = random.Random(seed)
    while True:
        yield dice.choice(b"abc")


def unjudged(trajectories):
    return [dataclasses.replace(t, reward=0.0) for t in trajectories]


def whole(engine, sampling):
    """The response, sampled in one go."""
    [(response,)], _ = continue_states(
        engine, [State.before(PROMPT, 4)], unjudged, sampling=sampling, decode=read,
        counts=[1], tokens=[sampling.max_new_tokens], seeds=[0],
    )  # fmt: skip
    return response


def from_every_state(engine, response, sampling, decode=read):
    states = [State(origin=response, position=t) for t in range(len(response.response_ids))]
    return continue_states(
        engine, states, unjudged, sampling=sampling, decode=decode,
        counts=[1] * len(states),
        tokens=[sampling.max_new_tokens - state.position for state in states],
        seeds=[0] * len(states),
    )  # fmt: skip


LONG = "a long and winding string"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("4\nQuestion: 2+2?", ("\nQuestion:",), "4\nQuestion:"),
        ("abbdgcbghbc", ("bc", "bbd"), "abbd"),  # the earlier of two
        ("so " + LONG + " is", ("\n", LONG), "so " + LONG),
        ("été à la mer", ("é à",), "été à"),  # states in the middle of a character
        ("." * 50 + "stop it", ("stop",), "." * 50 + "stop"),
        ("nothing to see", ("never",), "nothing to see" + "." * 46),  # the limit comes first
    ],
)
def test_whichever_state_is_continued_the_same_response_comes_out(text, stops, expected):
    sampling = SamplingParams(max_new_tokens=60, stop=stops)
    engine = scripted(text)
    response = whole(engine, sampling)
    assert read(response.response_ids) == expected
    engine.sampled = 0
    found, sampled = from_every_state(engine, response, sampling)
    for position, [again] in enumerate(found):
        assert again == dataclasses.replace(response, fresh_from=position)
    assert sampled == engine.sampled


def test_the_same_holds_of_a_real_engine():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdef="])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(3)  # does not say the same letter for ever
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    engine = HFEngine(Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **ends)).eval(), tokenizer)
    # Greedy, so that a response goes on as it did.
    free = whole(engine, SamplingParams(temperature=0.0, max_new_tokens=16))
    text = tokenizer.decode(free.response_ids)
    stop = next(text[n : n + 3] for n in range(4, 14) if text.find(text[n : n + 3]) == n)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=16, stop=(stop,))
    response = whole(engine, sampling)
    assert tokenizer.decode(response.response_ids) == text[: text.find(stop) + 3] != text
    found, sampled = from_every_state(engine, response, sampling, tokenizer.decode)
    for [again] in found:
        assert again.response_ids == response.response_ids
        assert again.finish is Finish.STOP
        assert again.sampler_logprobs == pytest.approx(response.sampler_logprobs, abs=1e-5)
    kept = sum(len(again.response_ids) - again.fresh_from for [again] in found)
    assert sampled > kept


def test_nothing_is_decoded_without_stop_strings_and_little_with_them():
    def never(token_ids):
        raise AssertionError("there is nothing to look for")

    sampling = SamplingParams(max_new_tokens=30)
    from_every_state(scripted("abc"), whole(scripted("abc"), sampling), sampling, never)

    seen = []

    def listening(token_ids):
        seen.append(len(token_ids))
        return read(token_ids)

    before, text = b"x" * 200, b"y" * 200 + b"stop"
    nothing = State.before(PROMPT, 0).origin
    response = continued(
        dataclasses.replace(
            nothing,
            response_ids=tuple(before),
            action_mask=(True,) * 200,
            sampler_logprobs=(0.0,) * 200,
        ),
        Completion(token_ids=tuple(text), logprobs=(0.0,) * 204, finish=Finish.STOP),
        asked=300,
        sampling=SamplingParams(max_new_tokens=500, stop=("stop",)),
        decode=listening,
    )
    assert response.finish is Finish.STOP
    assert seen == [2 * (CUT_CHARACTER + len("stop"))]


LIMIT, STOP = 6, "ab"
STOPPING = SamplingParams(max_new_tokens=LIMIT, stop=(STOP,))


def early(trajectories):
    """1 for a response that ends at the stop string, after an even number of tokens."""
    return [
        dataclasses.replace(t, reward=float(earned(read(t.response_ids)))) for t in trajectories
    ]


def earned(text):
    return text.endswith(STOP) and len(text) % 2 == 0


@functools.cache
def worth(text):
    """V where each letter of abc is as likely."""
    if text.endswith(STOP) or len(text) == LIMIT:
        return float(earned(text))
    return sum(worth(text + letter) for letter in "abc") / 3


def live(engine, score=early, *, decode=read, **settings):
    class OneProcess:
        @staticmethod
        def sum(tensor):
            return tensor

    on_the_table = bench(
        OneProcess(),
        policy="not asked",
        engine=engine,
        score=score,
        sampling=STOPPING,
        decode=decode,
    )
    return MonteCarloConfig(**settings).build(on_the_table)


def asked(critic, text):
    response = Trajectory(
        prompt=PROMPT,
        response_ids=tuple(text.encode()),
        action_mask=(True,) * len(text),
        sampler_logprobs=tuple(-2.0 - n for n in range(len(text))),
        finish=Finish.STOP,
        group=0,
        reward=1.0,
    )
    batch = collate([response], length_limit=LIMIT)
    rollouts = Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)
    return critic.values(rollouts, rollouts.action_mask)


def test_values_are_those_of_responses_that_stop():
    found = asked(live(Engine(babbling), continuations=300), "ccab").at[0, :4]
    exact = torch.tensor([worth("ccab"[:t]) for t in range(4)])
    # Four standard errors of a coin. The last state is worth 1/3 of a stop at once, and the rest.
    assert (found - exact).abs().max() < 4 * 0.5 / 300**0.5
    assert exact[3] > 1 / 3


def test_true_values_of_an_examination_are_those_of_responses_that_stop():
    states = sample_states(
        Engine(babbling), [PROMPT], early, sampling=STOPPING, decode=read,
        states=24, depths=2, rollouts=250,
    )  # fmt: skip
    begun = 0
    for row, at, value in zip(states.row, states.position, states.value, strict=True):
        text = read(states.trajectories[row].response_ids[:at])
        begun += text.endswith("a")
        assert abs(value - worth(text)) < 4 * 0.5 / 250**0.5, text
    assert begun > 2


def test_what_was_sampled_behind_the_stop_is_counted_and_not_trained_on():
    engine = scripted("cabcacab")  # from "ca" on the engine sees the second "ab" only
    critic = live(engine, continuations=2, reuse=True)
    values = asked(critic, "cab")
    assert values.at[0, :3].tolist() == [0.0, 0.0, 0.0]
    rows = critic.responses()
    assert [(read(row.response_ids), row.fresh_from) for row in rows] == [
        ("cab", 0), ("cab", 0), ("cab", 1), ("cab", 1), ("cab", 2), ("cab", 2),
    ]  # fmt: skip
    assert {row.finish for row in rows} == {Finish.STOP}
    for row in rows:
        own = [-2.0 - n for n in range(row.fresh_from)]
        fresh = [-0.5 * n for n in range(row.fresh_from, 3)]
        assert row.sampler_logprobs == (*own, *fresh)
        assert row.action_mask == (True,) * 3
    found = {name: measure.value for name, measure in critic.metrics().items()}
    # 3, 2 and, from "ca" on, the 4 that the limit leaves; twice each.
    assert found["rollout/sampled_tokens"] == engine.sampled == 2 * (3 + 2 + 4)


def test_a_continuation_that_stopped_is_not_one_that_was_cut():
    critic = live(scripted("cabcaaaa"), continuations=1, continuation_tokens=3)
    asked(critic, "cab")
    assert critic.metrics()["critic/continuations_cut"].value == 0
    cut = live(scripted("ccccccca"), continuations=1, continuation_tokens=3)
    asked(cut, "ccc")
    assert cut.metrics()["critic/continuations_cut"].value == 3


def test_stop_strings_without_a_way_to_read_text_are_refused_before_anything_is_sampled():
    engine = scripted("cab")
    with pytest.raises(ValueError, match=r"\['ab'\] may begin in one part of a response and end"):
        asked(live(engine, decode=None), "cab")
    with pytest.raises(ValueError, match="give `decode`"):
        sample_states(engine, [PROMPT], early, sampling=STOPPING, rollouts=2)
    assert engine.asked == []
