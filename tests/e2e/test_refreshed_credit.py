"""Credit that follows the policy is asked for again before every optimizer step but the first."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from llmac.algorithms.grpo import GRPO
from llmac.build import build
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.runtime.context import Runtime


@dataclass(frozen=True, kw_only=True)
class Following(GRPO):
    """GRPO whose later credit is 1 everywhere; remembers what it was asked and what was learned from."""

    follows: bool = True
    asked: list = field(default_factory=list)
    learned: list = field(default_factory=list)

    @property
    def refreshes_credit(self):
        return self.follows

    def refreshed(self, credit, rollouts, logprobs):
        self.asked.append((credit, rollouts, logprobs))
        return dataclasses.replace(credit, advantages=torch.ones_like(credit.advantages))

    def policy_loss(self, logprobs, rollouts, credit, *, entropy=None):
        said = (logprobs.detach() * rollouts.action_mask).sum(1)
        self.learned.append((said, credit.advantages))
        return super().policy_loss(logprobs, rollouts, credit, entropy=entropy)


@pytest.fixture
def taught(settings):
    """The card after one step of two passes of two minibatches: `taught(Following(...))`."""
    runtime = Runtime.create(seed=0, output=None)

    def teach(card):
        settings["algorithm"] = card
        settings["actor"] |= {"epochs": 2, "minibatches": 2}
        parts = build(load_recipe(settings), runtime)
        for close in (parts.phases.close, parts.score.close, parts.log.close, parts.engines.close):
            closers.append(close)
        trajectories, _ = parts.plan.rollout(parts.engine, parts.prompts, parts.score, seed=5)
        batch = collate(trajectories, length_limit=parts.plan.length_limit)
        rollouts = parts.actor.annotate(batch, reference=False)
        parts.actor.update(rollouts, card.credit(rollouts, None), card)
        return card

    closers = [runtime.close]
    yield teach
    for close in reversed(closers):
        close()


def test_credit_is_refreshed_on_whole_groups_with_the_policy_as_it_is_then(taught):
    card = taught(Following(group_size=4))
    assert len(card.asked) == 3  # two passes of two steps, the first of which is on-policy
    for credit, rollouts, logprobs in card.asked:
        assert torch.unique(rollouts.group, return_counts=True)[1].tolist() == [4, 4]
        assert credit.advantages.shape == rollouts.action_mask.shape == logprobs.shape
        moved = (logprobs - rollouts.old_logprobs)[rollouts.action_mask].abs().max()
        assert moved > 1e-3
    # A step is one micro-batch here: what is asked with is what the loss is then taken at.
    assert len(card.learned) == 4
    assert not (card.learned[0][1] == 1).all()
    for (_, rollouts, logprobs), (said, advantages) in zip(
        card.asked, card.learned[1:], strict=True
    ):
        assert (advantages == 1).all()
        asked = (logprobs * rollouts.action_mask).sum(1)
        torch.testing.assert_close(said.sort().values, asked.sort().values)  # packed in any order


def test_other_cards_are_not_asked_again(taught):
    card = taught(Following(group_size=4, follows=False))
    assert card.asked == []
    assert len(card.learned) == 4
