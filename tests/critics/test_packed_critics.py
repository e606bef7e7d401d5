"""Critics on a language model say and learn of a trie of responses what they do of padded rows."""

import pytest
import torch

from llmac.critics.distribution_heads import HLGaussConfig
from llmac.critics.frozen import FrozenCritic
from llmac.critics.value_head import ValueHeadConfig
from llmac.models.packing import Packing
from llmac.runtime.context import Runtime

from .making import asked, live, rollouts_of, rows, taught


@pytest.fixture
def runtime():
    return Runtime.create(seed=0, output=None)


@pytest.mark.parametrize("kind", ["trie", "varlen"])
@pytest.mark.parametrize(
    "config",
    [
        ValueHeadConfig(lr=1e-2, target_tau=0.3),
        ValueHeadConfig(lr=1e-2, trunk="shared", target_tau=0.3),
        HLGaussConfig(lr=1e-2, heads=2, combine="min"),
    ],
    ids=["own", "shared", "ensemble"],
)
def test_how_rows_are_packed_does_not_change_what_a_critic_learns(config, kind, runtime):
    rollouts = rollouts_of([*rows(), *rows()[:2]])  # some of them twice
    padded, other = live(config, runtime), live(config, runtime, packing=kind)
    metrics = [taught(critic, rollouts, 2) for critic in (padded, other)]
    torch.testing.assert_close(
        asked(other, rollouts).at, asked(padded, rollouts).at, rtol=1e-4, atol=1e-4
    )
    for key in metrics[0]:
        assert metrics[1][key].value == pytest.approx(metrics[0][key].value, rel=1e-2, abs=1e-5)

    frozen = FrozenCritic(
        padded._model, runtime, packing=Packing(kind=kind, max_tokens=9, pad_id=0)
    )
    torch.testing.assert_close(
        frozen.values(rollouts, rollouts.action_mask).at[rollouts.action_mask],
        FrozenCritic(padded._model, runtime, packing=Packing(kind="padded", max_tokens=9, pad_id=0))
        .values(rollouts, rollouts.action_mask)
        .at[rollouts.action_mask],
    )
