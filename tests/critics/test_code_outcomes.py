"""CodeRL's critic: classes of outcomes by the largest logit over the tokens of a response."""

import pytest
import torch

from llmac.config import load_recipe
from llmac.core.categorical_heads import PooledOutcomes, nearest_class
from llmac.core.types import CriticTargets
from llmac.core.value_heads import Lesson
from llmac.critics.distribution_heads import CodeOutcomesConfig
from llmac.errors import ConfigError
from llmac.runtime.context import Runtime

from .making import asked, live, rollouts_of, rows, trajectory

LOGITS = torch.tensor([[1.0, 0, 2, -1], [0, 0, 2.5, 0], [-1, 0, 3, 1]])
NOISE = torch.full((1, 4), 50.0)
"""Outputs that nobody may look at: before any token was read, and of padding."""


def lesson(returns, mask):
    returns = torch.tensor([returns])
    return Lesson(
        returns=returns,
        old_values=returns,
        mask=torch.tensor([mask]),
        rewards=returns,
        bootstraps=torch.tensor([False]),
    )


def test_the_loss_of_a_response_is_that_of_its_largest_logits():
    raw = torch.cat([NOISE, LOGITS, NOISE])[None].requires_grad_()
    taught = lesson([0.0, 0.0, -0.3, 0.0], [False, False, True, False])
    learned = PooledOutcomes().learn(raw, taught)
    # Largest over time: [1, 0, 3, 1]; -log softmax of class 2 is 0.27798.
    assert learned.per_token[0, 2].item() == pytest.approx(0.27798, abs=1e-5)
    learned.per_token[taught.mask].sum().backward()
    moved = raw.grad[0].abs() > 0
    # Each class moves the token that says it the loudest; of class 1 all are equal, and one is it.
    assert moved[:, [0, 2, 3]].nonzero().tolist() == [[1, 0], [3, 1], [3, 2]]
    assert not moved[[0, 4]].any()


def test_an_outcome_is_of_the_class_with_the_nearest_reward():
    rewards = PooledOutcomes().rewards
    found = nearest_class(torch.tensor([-2.0, -0.7, -0.3, 0.0, 0.36, 1.0]), rewards)
    assert found.tolist() == [0, 1, 2, 2, 3, 3]
    taught = lesson([-2.0, 0.5, 1.0], [True] * 3)
    outside = PooledOutcomes().learn(torch.zeros(1, 4, 4), taught).shares
    assert outside["critic/vf_target_clipfrac"].tolist() == [[True, False, False]]


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def judged(critic, rollouts):
    return asked(critic, rollouts).outcome_chances


def test_it_learns_which_token_tells_what_came_of_the_whole(runtime):
    rollouts = rollouts_of(rows(low=-0.6, high=1.0))
    critic = live(CodeOutcomesConfig(lr=2e-2, heads=2, hidden_layers=(24,)), runtime)
    before = judged(critic, rollouts)
    mask = rollouts.action_mask
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    for _ in range(40):
        targets = CriticTargets(
            returns=rollouts.rewards.sum(1, keepdim=True) * last,
            value_mask=last,
            old_values=torch.zeros_like(rollouts.rewards),
        )
        metrics = critic.update(rollouts, targets)
    chances = judged(critic, rollouts)
    assert (chances[:, 0] > 0.9).all()  # the first token decides, and it has been read
    assert (before[:, 0] < 0.7).all()
    assert metrics["critic/vf_loss"].value < 0.1
    assert (chances[~mask] <= 1).all()


def test_chances_read_their_own_token_and_none_behind_it(runtime):
    critic = live(CodeOutcomesConfig(), runtime, fresh=False)
    for parameter in critic._model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    told = rollouts_of([trajectory([3, 5, 6, 7], 1.0)])
    other = rollouts_of([trajectory([3, 9, 8], 1.0)])
    worse = rollouts_of([trajectory([3, 5, 6, 7], -1.0)])
    chances = judged(critic, told)
    assert chances[0, 0].item() == pytest.approx(judged(critic, other)[0, 0].item(), abs=1e-6)
    assert abs(chances[0, 1] - judged(critic, other)[0, 1]) > 1e-3
    # The exception: the outcome is known. V is not told of it, and does not change.
    assert (chances - judged(critic, worse)).abs().max() > 1e-3
    assert torch.equal(asked(critic, told).at, asked(critic, worse).at)


@pytest.mark.parametrize(
    ("algorithm", "critic", "says"),
    [
        ("ppo", "code_outcomes", "takes it at its word at single states; set critic: outcome_cla"),
        ("coderl", "value_head", "has no classes of outcomes; set critic: code_outcomes"),
    ],
)
def test_a_card_and_a_critic_that_do_not_fit_are_refused(algorithm, critic, says):
    with pytest.raises(ConfigError, match=says):
        load_recipe(
            {
                "model": {"name": "none"},
                "data": {"name": "none"},
                "reward": "none.py:none",
                "algorithm": algorithm,
                "critic": critic,
                "run": {"steps": 1, "output": "none"},
            }
        )


@pytest.mark.parametrize("critic", [None, "code_outcomes", "outcome_classes"])
def test_coderl_takes_critics_with_classes(critic):
    recipe = load_recipe(
        {
            "model": {"name": "none"},
            "data": {"name": "none"},
            "reward": "none.py:none",
            "algorithm": "coderl",
            **({} if critic is None else {"critic": critic}),
            "run": {"steps": 1, "output": "none"},
        }
    )
    assert recipe.critic.name == (critic or "code_outcomes")
