"""How a generative critic learns: the loss in numbers, ranks without lessons, engines, and a tiny one that learns."""

import dataclasses
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llmac.algorithms.score_function import ScoreFunctionPolicy
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.core.measures import Mean
from llmac.core.protocols import Completion, Request, SamplingParams
from llmac.core.types import Credit, CriticTargets, Finish, Prompt, Rollouts, Trajectory
from llmac.critics.generative import GenerativeConfig
from llmac.critics.generative_engine import CriticEngine
from llmac.critics.generative_learning import Lesson, ScoreLearner, Written
from llmac.engines.hf_engine import HFEngine
from llmac.engines.probe import check_engine_holds
from llmac.errors import ConsistencyError, EngineError
from llmac.models.loading import load_causal_lm
from llmac.new_actor import model_named, new_actor
from llmac.new_engine import speaking
from llmac.runtime.context import Runtime

from .making import bench
from .talking import Learning, Talker


@pytest.fixture(scope="module")
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def texts(*lengths):
    """Responses of these lengths whose tokens had log-probability -1 when they were sampled."""
    rows = [
        Trajectory(
            prompt=Prompt(id="p", token_ids=(1,), source=""),
            response_ids=(2,) * length,
            action_mask=(True,) * length,
            sampler_logprobs=(-1.0,) * length,
            finish=Finish.STOP,
            group=0,
            reward=0.0,
        )
        for length in lengths
    ]
    batch = collate(rows, length_limit=8)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def test_the_loss_is_the_mean_over_all_tokens_of_weight_times_logprob():
    rollouts = texts(3, 5)
    weights = torch.tensor([0.24, -0.24])[:, None].expand(2, 5)
    credit = Credit(advantages=weights, policy_mask=rollouts.action_mask)
    logprobs = torch.full((2, 5), -1.0, requires_grad=True)
    loss = ScoreFunctionPolicy().policy_loss(logprobs, rollouts, credit)
    mean = loss.total / loss.weight
    assert mean.item() == pytest.approx(-0.06)
    mean.backward()
    expected = -torch.tensor([[0.24] * 3 + [0.0] * 2, [-0.24] * 5]) / 8
    assert torch.allclose(logprobs.grad, expected)


def said(values, *lengths, group=0):
    completions = tuple(
        Completion(token_ids=(2,) * n, logprobs=(-1.0,) * n, finish=Finish.STOP) for n in lengths
    )
    return Written(prompt_ids=(1, 4), completions=completions, values=values, group=group)


class Drifted(Learning):
    """The trainer finds every token e times as likely as the sampler did, and the first of a row half as likely."""

    def annotate(self, batch, *, reference):
        old = batch.sampler_logprobs + 1.0
        old[:, 0] -= 1.0 + torch.log(torch.tensor(2.0))
        return Rollouts.of(batch, old_logprobs=old * batch.action_mask)


class Others:
    """This rank among others that have lessons."""

    def sum(self, tensor):
        return tensor + 1


def learner(policy, runtime, **settings):
    usual = {"baseline": "none", "importance_cap": 2.0, "length_limit": 8}
    return ScoreLearner(policy, runtime, **usual | settings)


@pytest.mark.parametrize(("cap", "weights"), [(2.0, [0.5, 2.0]), (None, None)])
def test_tokens_are_weighed_by_trainer_over_sampler_up_to_a_cap(cap, weights, runtime):
    policy = Drifted(bench(runtime), None)
    lesson = Lesson(said=said((0.5, None), 2, 1), outcomes=(1.0,))
    metrics = learner(policy, runtime, importance_cap=cap).learn([lesson], spare=(1,))
    [(rollouts, credit, _)] = policy.taught
    assert [t.reward for t in rollouts.trajectories] == [0.75, 0.0]
    assert credit.advantages.tolist() == [[0.75, 0.75], [0.0, 0.0]]
    if weights is None:
        assert credit.importance is None
    else:
        assert credit.importance.tolist() == [pytest.approx(weights), pytest.approx([0.5, 0.0])]
        assert metrics["critic/lm/mismatch_weight"].value == pytest.approx(1.0)
    assert metrics["critic/lm/sampler_logprob_diff_max"].value == pytest.approx(1.0)


def test_a_rank_without_lessons_takes_part_and_counts_nothing(runtime):
    policy = Learning(bench(runtime), None)
    metrics = learner(policy, Others()).learn([], spare=(7, 8))
    assert metrics.keys() == {
        "critic/lm/taught",
        "critic/lr",
    }  # nothing of the row that counts nothing
    [(rollouts, credit, _)] = policy.taught
    assert len(rollouts.trajectories) == 1
    assert not credit.policy_mask.any()
    assert learner(policy, runtime).learn([], spare=(7, 8)) == {}
    assert len(policy.taught) == 1


def voice(engine, policy, **settings):
    usual = {"shared": False, "every": 1, "check": None}
    return CriticEngine(engine, policy, **usual | settings)


def test_an_engine_is_proved_at_its_first_use_and_must_report_its_version(runtime):
    class Deaf(Talker):
        def load_weights(self, weights, version):
            pass

    policy = Learning(bench(runtime), None)
    with pytest.raises(ConsistencyError, match="reports weights of version 0 after it was given"):
        voice(Deaf(None), policy).bring(3, (1,))
    # Says -1 for every token, as the trainer does; later it would not be noticed.
    engine = Talker(lambda text, n: "abc")
    speaker = voice(engine, policy, check=partial(check_engine_holds, tolerance=0.1))
    speaker.bring(0, (1,))
    engine.say = lambda text, n: "never asked"
    speaker.bring(1, (1,))
    assert len(engine.asked) == 1
    wrong = Learning(bench(runtime), None)
    wrong.logprobs_of = lambda prompt, response: [-2.0] * len(response)
    with pytest.raises(EngineError, match="the critic's engine, at its first use"):
        voice(Talker(lambda t, n: "abc"), wrong, check=check_engine_holds).bring(0, (1,))


@pytest.mark.parametrize("shared", [False, True])
def test_what_the_engine_need_not_read_is_told_apart_from_the_policys(shared):
    class Counting(Talker):
        hits = 0.25

        def generate(self, requests):
            self.hits = 0.75
            return super().generate(requests)

        def prefix_hits(self):
            found, self.hits = self.hits, None
            return {} if found is None else {"rollout/prefix_hit_rate": Mean(found, 1.0)}

    speaker = voice(Counting(lambda t, n: "x"), None, shared=shared)
    speaker.generate([Request(prompt_ids=(1,), params=SamplingParams())])
    found = {name: rate.value for name, rate in speaker.metrics().items()}
    assert found == {"critic/prefix_hit_rate": 0.75} | (
        {"rollout/prefix_hit_rate": 0.25} if shared else {}
    )
    assert not speaker.metrics()


WORDS = ["a", "b", "c", "<end>", "|", *(f"<answer>{n}</answer>" for n in (0, 10)), "hm"]


@pytest.fixture(scope="module")
def whole(runtime, tmp_path_factory):
    """What `build` puts on the table, of a tiny model whose words are scores."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.2,
        eos_token_id=3,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="hm"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="|")
    (folder / "t.jinja").write_text("{{ problem }} {{ partial }} |")
    recipe = load_recipe(
        {
            "model": {"name": str(folder)},
            "data": {"name": "none"},
            "reward": "none.py:none",
            "algorithm": "ppo",
            "run": {"steps": 1, "output": "none"},
        }
    )

    def new_player(*_):
        return speaking(HFEngine(load_causal_lm(recipe.model), tokenizer), tokenizer)

    player = new_player()
    return dataclasses.replace(
        bench(runtime, model=recipe.model),
        engine=player.engine,
        player=player,
        new_player=new_player,
        new_policy=lambda order: new_actor(
            order, recipe, runtime, pad_id=4, before_learning=lambda: None
        )[0],
        model_named=partial(model_named, recipe.model),
        check_engine=check_engine_holds,
    )


def answers():
    """What comes first decides: "a" wins, "b" loses."""
    found = []
    for number, (first, reward) in enumerate([(0, 1.0), (1, 0.0)] * 2):
        found.append(
            Trajectory(
                prompt=Prompt(id="p", token_ids=(7,), source="hm"),
                response_ids=(first, number % 2),
                action_mask=(True, True),
                sampler_logprobs=(0.0, 0.0),
                finish=Finish.STOP,
                group=0,
                reward=reward,
            )
        )
    batch = collate(found, length_limit=2)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def taught(whole, direction, steps=30, **settings):
    """Values of what "a" and "b" begin, and the mean Brier score at the start and at the end."""
    config = GenerativeConfig(
        template=f"{whole.model.name}/t.jinja",
        conditioning="none",
        max_new_tokens=1,
        lr=1e-2,
        samples=8,
        **settings,
    )
    critic = config.build(whole)
    rollouts = answers()
    starts = torch.tensor([[False, True]]).expand(4, 2)
    returns = rollouts.rewards.sum(1, keepdim=True).expand(4, 2)
    if direction < 0:
        learn = critic._policy.update

        def backwards(rows, credit, algorithm):
            return learn(
                rows, dataclasses.replace(credit, advantages=-credit.advantages), algorithm
            )

        critic._policy.update = backwards
    briers = []
    for _ in range(steps):
        values = critic.values(rollouts, starts)
        targets = CriticTargets(returns=returns, value_mask=starts, old_values=values.at)
        briers.append(critic.update(rollouts, targets)["critic/brier"].value)
    values = critic.values(rollouts, starts)
    return values.at[:2, 1], sum(briers[:3]) / 3, sum(briers[-3:]) / 3


@pytest.mark.parametrize("baseline", ["none", "by_outcome"])
def test_a_tiny_critic_learns_what_states_are_worth(baseline, whole):
    values, before, after = taught(whole, 1, baseline=baseline)
    assert before > 0.4
    assert after < 0.05
    assert values.tolist() == pytest.approx([1.0, 0.0], abs=0.1)


def test_with_the_sign_flipped_it_does_not(whole):
    _, before, after = taught(whole, -1, baseline="leave_one_out")
    assert after > before
