"""Responses that are sampled a window at a time, and go on from step to step."""

import dataclasses
import datetime
import io
import threading

import pytest
import torch

from llmac.core.collate import collate
from llmac.core.plans import Flat
from llmac.core.protocols import Completion, RolloutPlan, SamplingParams, Stateful
from llmac.core.types import Finish, Prompt
from llmac.core.windowed import Windowed

LIMIT = 10
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=LIMIT)


class Untrained:
    """The part of an engine that a plan leaves alone."""

    policy_version = 0

    def load_weights(self, weights, version):
        raise AssertionError("a plan does not train")

    sleep = wake = close = load_weights


class FullEngine(Untrained):
    """Goes on with a response of prompt p that is known in advance: tokens 1000 p + 0, 1, 2 ...

    `lengths[p]` tokens, and the last of them ends it. The log-prob of token t under weights of
    version v is -t - v/10.
    """

    def __init__(self, lengths):
        self.lengths, self.policy_version = lengths, 0
        self.requests, self.decode_steps = [], 0

    def generate(self, requests):
        self.requests.append(list(requests))
        answers = [[self.answer(request)] for request in requests]
        self.decode_steps += max(len(one.token_ids) for (one,) in answers)
        return answers

    def answer(self, request):
        prompt, *before = request.prompt_ids
        length = self.lengths[prompt % len(self.lengths)]
        end = min(length, len(before) + request.params.max_new_tokens)
        places = range(len(before), end)
        return Completion(
            token_ids=tuple(1000 * prompt + t for t in places),
            logprobs=tuple(-t - self.policy_version / 10 for t in places),
            finish=Finish.STOP if end == length else Finish.LENGTH,
            policy_version=self.policy_version,
        )


class RandomEngine(Untrained):
    """Draws from the seed of the request alone; token 0 ends a response."""

    policy_version = 3

    def generate(self, requests):
        return [[self.answer(r, sibling) for sibling in range(r.params.n)] for r in requests]

    def answer(self, request, sibling):
        random = torch.Generator().manual_seed(request.params.seed + sibling)
        drawn = torch.randint(6, (request.params.max_new_tokens,), generator=random).tolist()
        ended = 0 in drawn
        tokens = drawn[: drawn.index(0) + 1] if ended else drawn
        return Completion(
            token_ids=tuple(tokens),
            logprobs=tuple(-t / 10 for t in tokens),
            finish=Finish.STOP if ended else Finish.LENGTH,
            policy_version=self.policy_version,
        )


class CountingPrompts:
    """Prompts first, first + 1, ..., for ever."""

    def __init__(self, first=0, **columns):
        self.next, self.takes, self.columns = first, [], columns

    def take(self, count):
        self.takes.append(count)
        self.next += count
        return [
            Prompt(id=str(name), token_ids=(name,), source=str(name), columns=self.columns)
            for name in range(self.next - count, self.next)
        ]


def score(trajectories):
    """Asked for finished responses only, each once."""
    assert all(t.finish is not Finish.PAUSED and t.reward is None for t in trajectories)
    return [dataclasses.replace(t, reward=float(len(t.response_ids))) for t in trajectories]


def windowed(window, responses, **changes):
    return Windowed(
        **{
            "window_tokens": window,
            "responses_per_step": responses,
            "sampling": SAMPLING,
            **changes,
        }
    )


def run(plan, engine, prompts, steps, **options):
    """Trajectories of each step; the weights change after each, where the engine has a version."""
    seen = []
    for step in steps:
        seen.append(plan.rollout(engine, prompts, score, seed=step, **options))
        if isinstance(engine, FullEngine):
            engine.policy_version += 1
    return [trajectories for trajectories, _ in seen], [metrics for _, metrics in seen]


def test_an_unfinished_response_goes_on_in_the_next_step_and_the_next_prompt_takes_a_free_place():
    engine, prompts = FullEngine([5, 2, 3]), CountingPrompts()
    plan = windowed(3, 2)
    assert isinstance(plan, RolloutPlan)
    assert isinstance(plan, Stateful)
    (first, second, third), metrics = run(plan, engine, prompts, range(3))

    assert [(t.prompt.id, t.finish, t.reward) for t in first] == [
        ("0", Finish.PAUSED, None),
        ("1", Finish.STOP, 2.0),
    ]
    assert [(t.prompt.id, t.finish, t.reward) for t in second] == [
        ("0", Finish.STOP, 5.0),
        ("2", Finish.STOP, 3.0),
    ]
    assert [t.prompt.id for t in third] == ["3", "4"]
    assert prompts.takes == [2, 1, 2]
    assert [request.prompt_ids for request in engine.requests[1]] == [(0, 0, 1, 2), (2,)]

    whole = second[0]
    assert whole.response_ids == (0, 1, 2, 3, 4)
    assert whole.action_mask == (True,) * 5
    assert whole.fresh_from == 3
    assert whole.policy_version == 1  # of its fresh tokens
    assert whole.sampler_logprobs == (-0.0, -1.0, -2.0, -3.1, -4.1)  # and the old ones stay
    assert [{name: m.value for name, m in step.items()} for step in metrics[:2]] == [
        {
            "rollout/finished": 1,
            "rollout/paused": 1,
            "rollout/windows": 1,
        },
        {
            "rollout/finished": 2,
            "rollout/paused": 0,
            "rollout/windows": 1.5,  # one took two, the other one
        },
    ]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 10, 25])
def test_every_sampled_token_is_fresh_in_exactly_one_step(window):
    lengths = [1, 7, 3, 12, 10, 2, 9]  # 12 is beyond the limit of 10
    engine = FullEngine(lengths)
    steps, _ = run(windowed(window, 3), engine, CountingPrompts(), range(60))
    assert all(len(step) == 3 for step in steps)
    told, ended = {}, {}
    for step in steps:
        for t in step:
            assert len(t.response_ids) - t.fresh_from <= window
            assert t.fresh_from == len(told.get(t.prompt.id, ()))
            told[t.prompt.id] = told.get(t.prompt.id, ()) + t.response_ids[t.fresh_from :]
            assert told[t.prompt.id] == t.response_ids
            if t.finish is not Finish.PAUSED:
                assert t.prompt.id not in ended, "it went on after its end"
                ended[t.prompt.id] = t
    assert len(ended) >= 3 * 60 / (10 / min(window, 10) + 1)
    for name, t in ended.items():
        length = lengths[int(name) % 7]
        assert len(told[name]) == min(length, LIMIT)
        assert t.finish is (Finish.STOP if length <= LIMIT else Finish.LENGTH)
        assert t.reward == min(length, LIMIT)


def test_no_step_waits_for_the_longest_response():
    # Lengths 2, 2, 2, 10: waiting for the longest is 16 tokens in 10 steps of decoding.
    lengths = [2, 2, 2, 10]

    def tokens_a_decode_step(plan, steps):
        engine = FullEngine(lengths)
        rollouts, _ = run(plan, engine, CountingPrompts(), range(steps))
        fresh = sum(len(t.response_ids) - t.fresh_from for step in rollouts for t in step)
        return fresh / engine.decode_steps

    flat = Flat(group_size=1, prompts_per_step=4, sampling=SAMPLING)
    assert tokens_a_decode_step(flat, 5) == pytest.approx(1.6)
    assert tokens_a_decode_step(windowed(2, 4), 20) == pytest.approx(4.0)


@pytest.mark.parametrize("window", [LIMIT, LIMIT + 5])
def test_a_window_that_holds_every_response_is_a_flat_plan(window):
    flat = Flat(group_size=1, prompts_per_step=4, sampling=SAMPLING)
    expected, _ = run(flat, RandomEngine(), CountingPrompts(), range(5))
    found, metrics = run(windowed(window, 4), RandomEngine(), CountingPrompts(), range(5))
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == [dataclasses.replace(t, group=t.group + 4 * step) for t in theirs]
        assert metrics[step]["rollout/paused"].value == 0
        assert metrics[step]["rollout/windows"].value == 1
    assert {t.finish for step in found for t in step} == {Finish.STOP, Finish.LENGTH}


def test_the_last_window_asks_for_no_more_than_the_length_limit_leaves():
    engine = FullEngine([99])
    (*_, last), _ = run(windowed(4, 1), engine, CountingPrompts(), range(3))
    assert [r[0].params.max_new_tokens for r in engine.requests] == [4, 4, 2]
    assert (last[0].finish, len(last[0].response_ids), last[0].reward) == (Finish.LENGTH, 10, 10.0)
    assert windowed(4, 1).length_limit == LIMIT


def test_an_engine_without_room_to_go_on_ends_the_response():
    class Short(FullEngine):
        def answer(self, request):
            whole = super().answer(request)
            return dataclasses.replace(
                whole, token_ids=whole.token_ids[:2], logprobs=whole.logprobs[:2]
            )

    (first, second), _ = run(windowed(3, 1), Short([99]), CountingPrompts(), range(2))
    assert (first[0].finish, first[0].reward) == (Finish.LENGTH, 2.0)
    assert second[0].prompt.id == "1"


def test_requests_carry_the_sampling_and_seeds_that_never_meet():
    engine, again = FullEngine([99]), FullEngine([99])
    for one in (engine, again):
        run(windowed(2, 3), one, CountingPrompts(), range(4))
    assert engine.requests == again.requests
    params = [request.params for requests in engine.requests for request in requests]
    assert len({p.seed for p in params}) == len(params) == 12
    assert {dataclasses.replace(p, seed=None, max_new_tokens=LIMIT) for p in params} == {SAMPLING}


def test_siblings_share_a_group_that_no_other_response_of_the_step_has():
    # Three places for groups of two: the second sibling of prompt 1 begins when there is room.
    engine = FullEngine([7, 2])
    steps, _ = run(windowed(3, 3, group_size=2), engine, CountingPrompts(), range(30))
    assert [t.prompt.id for t in steps[0]] == ["0", "0", "1"]
    assert [t.prompt.id for t in steps[1]] == ["0", "0", "1"]
    assert [t.fresh_from for t in steps[1]] == [3, 3, 0]
    for step in steps:
        assert len({(t.group, t.prompt.id) for t in step}) == len({t.group for t in step})
    ended = [t.prompt.id for step in steps for t in step if t.finish is not Finish.PAUSED]
    assert all(ended.count(name) == 2 for name in set(ended[:-4]))


def letters(token_ids):
    return "".join("abcdefgh"[t] for t in token_ids)


class WritingEngine(Untrained):
    """Writes a given text; like the real ones it sees stop strings in its own continuation only."""

    def __init__(self, text):
        self.tokens = ["abcdefgh".index(c) for c in text]

    def generate(self, requests):
        return [[self.answer(request)] for request in requests]

    def answer(self, request):
        before, params = len(request.prompt_ids) - 1, request.params
        new = self.tokens[before : before + params.max_new_tokens]
        ends = [n for n in range(1, len(new) + 1) if self.has_stop(new[:n], params.stop)]
        new = new[: ends[0]] if ends else new
        return Completion(
            token_ids=tuple(new),
            logprobs=tuple(-float(before + i) for i in range(len(new))),
            finish=Finish.STOP if ends else Finish.LENGTH,
        )

    def has_stop(self, tokens, stops):
        return any(stop in letters(tokens) for stop in stops)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9, 10])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aabcbcddddd", "aabc"),
        ("bcaaaaaaaaa", "bc"),
        ("aaaaaaaabca", "aaaaaaaabc"),
        ("aaaaaaaaabc", "aaaaaaaaab"),  # the limit comes first
        ("abbdgcbghbc", "abbd"),  # the earlier of two stop strings
    ],
)
def test_a_stop_string_across_windows_ends_the_response_where_it_would_without_windows(
    window, text, expected
):
    sampling = dataclasses.replace(SAMPLING, stop=("bc", "bbd"))
    plan = windowed(window, 1, sampling=sampling, decode=letters)
    prompts, engine = CountingPrompts(), WritingEngine(text)
    ended = None
    while ended is None:
        ((one,),), _ = run(plan, engine, prompts, [0])
        ended = one if one.finish is not Finish.PAUSED else None
    assert letters(ended.response_ids) == expected
    assert len(ended.action_mask) == len(ended.sampler_logprobs) == len(expected)
    assert ended.finish is (Finish.LENGTH if expected.endswith("ab") else Finish.STOP)
    assert ended.fresh_from <= len(expected) - 1
    assert prompts.next == 1


def test_stop_strings_without_a_way_to_read_text_are_refused_unless_a_window_holds_all():
    sampling = dataclasses.replace(SAMPLING, stop=("bc",))
    with pytest.raises(ValueError, match=r"stop strings \['bc'\] may begin in one window and end"):
        run(windowed(3, 1, sampling=sampling), WritingEngine("aabc"), CountingPrompts(), [0])
    whole = windowed(LIMIT, 1, sampling=sampling)
    ((one,),), _ = run(whole, WritingEngine("aabcaaaaaaaa"), CountingPrompts(), [0])
    assert letters(one.response_ids) == "aabc"


def saved(state):
    """Through a file, as a checkpoint does it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("group_size", [1, 3])
def test_six_steps_are_three_a_restore_and_three(group_size):
    columns = {"answer": 3, "parts": [1.5, None, {"x": "y"}], "ok": True, "pair": (1, "a")}

    def plan():
        return windowed(2, 4, group_size=group_size)

    straight, _ = run(plan(), RandomEngine(), CountingPrompts(**columns), range(6))
    before, prompts = plan(), CountingPrompts(**columns)
    first, _ = run(before, RandomEngine(), prompts, range(3))
    state = saved(before.state())
    run(before, RandomEngine(), CountingPrompts(**columns), range(3))  # what is saved stays
    after = plan()
    after.restore(state)
    second, _ = run(after, RandomEngine(), CountingPrompts(prompts.next, **columns), range(3, 6))
    assert first + second == straight
    assert any(t.finish is Finish.PAUSED for t in first[-1])
    # What is forgotten shows:
    fresh, _ = run(plan(), RandomEngine(), CountingPrompts(prompts.next, **columns), range(3, 6))
    assert fresh != second


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2025, 6, 15),
        torch.ones(1, dtype=torch.float64).numpy()[0],
        {"deep": [object()]},
    ],
)
def test_a_prompt_that_cannot_be_saved_is_refused_when_it_is_drawn(value):
    with pytest.raises(ValueError, match="column when of prompt 0 holds a"):
        run(windowed(2, 1), RandomEngine(), CountingPrompts(when=value), [0])


def test_ranks_draw_in_step_and_lose_no_prompt():
    # Rank 0 has short responses and lacks two prompts a step, rank 1 has long ones.
    meeting, parts, results = threading.Barrier(2, timeout=20), {}, {}

    def rank(number, lengths):
        def sum_across(part):
            meeting.wait()
            parts[number] = part
            meeting.wait()
            return parts[0] + parts[1]

        prompts = CountingPrompts(first=100 * number)
        steps, _ = run(
            windowed(2, 2), FullEngine(lengths), prompts, range(8), sum_across=sum_across
        )
        results[number] = prompts.takes, [t.prompt.id for step in steps for t in step]

    threads = [
        threading.Thread(target=rank, args=(number, lengths))
        for number, lengths in ((0, [1]), (1, [4]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (fast_takes, fast), (slow_takes, slow) = results[0], results[1]
    assert fast_takes == slow_takes == [2] * 8
    assert fast == [str(n) for n in range(16)]
    assert slow == [str(100 + n) for n in (0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7)]


def test_paused_and_finished_responses_make_one_batch():
    (step, *_), _ = run(windowed(3, 2), FullEngine([5, 2]), CountingPrompts(), range(1))
    batch = collate(step, length_limit=LIMIT)
    assert batch.truncated.tolist() == [True, False]
    assert batch.rewards.tolist() == [[0, 0, 0], [0, 2, 0]]


def test_an_engine_that_returns_too_few_is_named():
    class Dropping(FullEngine):
        def generate(self, requests):
            return super().generate(requests)[1:]

    with pytest.raises(ValueError, match="3 prompts, 3 in all, and returned 2"):
        run(windowed(2, 3), Dropping([4]), CountingPrompts(), [0])


@pytest.mark.parametrize("name", ["window_tokens", "responses_per_step", "group_size"])
def test_counts_below_one_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is at least 1; found 0"):
        windowed(2, 2, **{name: 0})
