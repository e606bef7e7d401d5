"""Critics on a language model say and learn of a trie of responses what they do of padded rows."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, NemotronConfig

from llmac.critics.distribution_heads import HLGaussConfig
from llmac.critics.frozen import FrozenCritic
from llmac.critics.value_head import ValueHeadConfig
from llmac.models.packing import Packing
from llmac.models.policy import TokenPolicy
from llmac.models.value_model import ValueModel
from llmac.runtime.context import Runtime

from .making import CONFIG, asked, bench, live, rollouts_of, rows, taught

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}


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


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_on_a_trunk_that_overlooks_paths_a_critic_reads_padded_rows(trunk, runtime):
    torch.manual_seed(0)
    forgetful = NemotronConfig(**SIZES)  # its layers do not hand on what they are called with
    language_model = AutoModelForCausalLM.from_config(CONFIG if trunk == "own" else forgetful)
    policy = TokenPolicy(language_model, temperature=1.0, chunk_mb=1.0)
    table = bench(runtime, policy, packing="auto")
    settings = ValueHeadConfig(lr=1e-2, trunk=trunk, target_tau=0.3)
    model = ValueModel(
        policy.model.base_model if trunk == "shared" else AutoModel.from_config(forgetful),
        settings.spec(16),
        states=table.policy_states if trunk == "shared" else None,
    )
    critic = settings.around(model, table, fresh_head=True)
    taught(critic, rollouts_of([*rows(), *rows()]), 2)  # worth sharing
    assert critic._packing.kind == "padded"


def test_a_frozen_critic_whose_trunk_overlooks_paths_reads_padded_rows(runtime):
    rollouts = rollouts_of([*rows(), *rows()])

    def said(kind):
        torch.manual_seed(0)
        model = ValueModel(AutoModel.from_config(NemotronConfig(**SIZES)))
        packing = Packing(kind=kind, max_tokens=1000, pad_id=0)
        return FrozenCritic(model, runtime, packing=packing).values(rollouts, rollouts.action_mask)

    assert torch.equal(said("auto").at, said("padded").at)
