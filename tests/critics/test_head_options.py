"""Normalised returns, target networks and where weights come from."""

import dataclasses

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmac.core.types import CriticTargets, Finish
from llmac.critics.distribution_heads import C51Config, HLGaussConfig, TwoHotConfig
from llmac.critics.value_head import ValueHeadConfig
from llmac.errors import ConfigError
from llmac.models.policy import TokenPolicy
from llmac.models.value_heads import build_head, normalize
from llmac.runtime.context import Runtime
from tests.algorithms.making import card

from .making import CONFIG, Model, asked, bench, live, rollouts_of, rows, taught, trajectory


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


@pytest.mark.parametrize("settings", [{}, {"heads": 2}, {"hidden_layers": (8,)}])
def test_popart_changes_no_value_when_the_statistics_do(settings):
    head = build_head(16, ValueHeadConfig(normalize="popart", **settings).spec(16))
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    normalize(head, mean=0.4, deviation=2.0, keep_values=False)
    for layer in head.last_layers():
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.ones_(layer.bias)
    before = head(hidden)
    normalize(head, mean=-30.0, deviation=50.0, keep_values=True)
    torch.testing.assert_close(head(hidden), before, rtol=1e-5, atol=1e-5)
    assert (float(head.offset), float(head.scale)) == (-30.0, 50.0)
    normalize(head, mean=0.4, deviation=2.0, keep_values=False)
    assert not torch.allclose(head(hidden), before)


@pytest.mark.parametrize("how", ["running", "popart"])
def test_normalised_returns_of_any_scale_are_learned_in_units_of_rewards(how, runtime):
    rollouts = rollouts_of(rows(low=-700.0, high=1300.0))
    settings = {"lr": 2e-2, "value_clip": None, "reward_range": (-700.0, 1300.0)}
    critic = live(ValueHeadConfig(normalize=how, **settings), runtime)
    metrics = taught(critic, rollouts, 40)
    values = asked(critic, rollouts).at
    assert values[:, 0].tolist() == pytest.approx([100.0] * 5, abs=300.0)
    assert values[0, 1:3].tolist() == pytest.approx([1300.0] * 2, abs=300.0)
    assert values[4, 1:3].tolist() == pytest.approx([-700.0] * 2, abs=300.0)
    # deviation of 7 times 1300 and 6 times -700, again and again
    assert metrics["critic/vf_scale"].value == pytest.approx(2000 * (42 / 169) ** 0.5, rel=0.05)
    assert metrics["critic/vf_loss"].value < 0.2
    # Without, steps of Adam are far too small for it.
    raw = live(ValueHeadConfig(**settings), runtime)
    taught(raw, rollouts, 40)
    assert asked(raw, rollouts).at[0, 1] < 500.0


def test_the_gradient_under_normalisation_is_that_of_normalised_returns():
    hidden = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    plain, scaled = (
        build_head(16, ValueHeadConfig(normalize=how).spec(16)) for how in ("none", "popart")
    )
    normalize(scaled, mean=10.0, deviation=4.0, keep_values=False)
    returns = torch.tensor([[14.0, 6.0, 10.0]])
    (0.5 * (plain(hidden)[..., 0, 0] - (returns - 10.0) / 4.0).square()).sum().backward()
    (0.5 * ((scaled(hidden)[..., 0, 0] - returns) / 4.0).square()).sum().backward()
    torch.testing.assert_close(scaled.weight.grad, plain.weight.grad)


def test_popart_does_not_move_values_between_two_updates(runtime):
    rollouts = rollouts_of(rows())
    critic = live(ValueHeadConfig(normalize="popart", lr=2e-2), runtime)
    taught(critic, rollouts, 3)
    before = asked(critic, rollouts).at
    mask = rollouts.action_mask
    targets = CriticTargets(
        returns=torch.full_like(before, 90.0), value_mask=mask, old_values=before
    )
    critic._renormalize(targets)
    assert float(critic._model.head.scale) > 10.0
    torch.testing.assert_close(asked(critic, rollouts).at, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_values_come_from_a_copy_that_follows(trunk, runtime):
    rollouts = rollouts_of(rows())
    config = ValueHeadConfig(lr=1e-2, target_tau=0.25, trunk=trunk, value_clip=None)
    policy = TokenPolicy(AutoModelForCausalLM.from_config(CONFIG), temperature=1.0, chunk_mb=1.0)
    critic = live(config, runtime) if trunk == "own" else config.build(bench(runtime, policy))
    asked(critic, rollouts)
    head, copy = critic._model.head, critic._target.model.head
    expected = copy.weight.detach().clone()
    for _ in range(3):
        taught(critic, rollouts, 1)
        expected = expected.lerp(head.weight.detach(), 0.25)  # θ' + τ · (θ - θ')
        torch.testing.assert_close(copy.weight, expected)
    with torch.no_grad():
        theirs = critic._target.model.spec.head.start(0.4)
    assert copy.offset == theirs[0]
    direct = dataclasses.replace(config, target_tau=None)
    other = live(direct, runtime) if trunk == "own" else direct.build(bench(runtime, policy))
    taught(other, rollouts, 3)
    torch.testing.assert_close(other._model.head.weight, head.weight)
    assert not torch.allclose(asked(other, rollouts).at, asked(critic, rollouts).at)


def test_a_head_on_a_shared_trunk_starts_from_a_saved_head_and_from_nothing_else(runtime, tmp_path):
    policy = TokenPolicy(AutoModelForCausalLM.from_config(CONFIG), temperature=1.0, chunk_mb=1.0)
    rollouts = rollouts_of(rows())
    before = ValueHeadConfig(lr=1e-2, trunk="shared").build(bench(runtime, policy))
    taught(before, rollouts, 3)
    policy.model.save_pretrained(tmp_path / "policy")
    before.save_pretrained(tmp_path / "critic", policy=tmp_path / "policy")

    after = ValueHeadConfig(trunk="shared", init=str(tmp_path / "critic"))
    said = asked(after.build(bench(runtime, policy)), rollouts).at
    torch.testing.assert_close(said, asked(before, rollouts).at)
    with pytest.raises(ConfigError, match="saved with another head"):
        HLGaussConfig(trunk="shared", init=str(tmp_path / "critic")).build(bench(runtime, policy))
    with pytest.raises(ConfigError, match="trunk: shared takes the head of a saved critic"):
        ValueHeadConfig(trunk="shared", init=str(tmp_path / "policy")).build(bench(runtime, policy))


def test_a_copy_at_tau_one_is_the_critic(runtime):
    rollouts = rollouts_of(rows())
    one, none = (live(ValueHeadConfig(lr=1e-2, target_tau=tau), runtime) for tau in (1.0, None))
    for critic in (one, none):
        taught(critic, rollouts, 3)
    assert torch.equal(asked(one, rollouts).at, asked(none, rollouts).at)


def test_a_run_that_begins_to_use_a_copy_starts_it_at_the_critic(runtime, tmp_path):
    rollouts = rollouts_of(rows())
    without = live(ValueHeadConfig(lr=1e-2), runtime)
    taught(without, rollouts, 2)
    without.save(tmp_path)
    critic = live(ValueHeadConfig(lr=1e-2, target_tau=0.1), runtime)
    critic.load(tmp_path)
    assert torch.equal(asked(critic, rollouts).at, asked(without, rollouts).at)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_tau": 0.1}, "critic.target_tau needs whole weights"),
        ({"normalize": "popart"}, "critic.normalize: popart rewrites"),
        ({"trunk": "shared", "detach_trunk": False}, "works in one process without DeepSpeed"),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_cut(settings, message):
    class Sharded:
        shards, world_size = True, 2

    with pytest.raises(ConfigError, match=message):
        ValueHeadConfig(**settings).build(bench(Sharded()))


def built(config, runtime, folder):
    config = dataclasses.replace(config, init=str(folder))
    return config.build(bench(runtime, model=Model(name=str(folder))))


def trained(config, runtime, folder):
    critic = live(config, runtime)
    taught(critic, rollouts_of(rows()), 3)
    critic.save_pretrained(folder, policy=folder)
    return critic


@pytest.mark.parametrize(
    "config",
    [
        ValueHeadConfig(lr=1e-2, heads=2, combine="min"),
        HLGaussConfig(lr=1e-2),
        ValueHeadConfig(lr=1e-2, normalize="popart"),
    ],
)
def test_a_run_starts_from_the_critic_of_another(config, runtime, tmp_path):
    rollouts = rollouts_of(rows())
    before = trained(config, runtime, tmp_path)
    after = built(config, runtime, tmp_path)
    assert torch.equal(asked(after, rollouts).at, asked(before, rollouts).at)


def test_how_a_head_learns_may_change_between_runs_and_what_it_says_may_not(runtime, tmp_path):
    rollouts = rollouts_of(rows())
    before = trained(ValueHeadConfig(lr=1e-2, normalize="running"), runtime, tmp_path / "scalar")
    after = built(ValueHeadConfig(loss="huber"), runtime, tmp_path / "scalar")
    torch.testing.assert_close(asked(after, rollouts).at, asked(before, rollouts).at)
    with pytest.raises(ConfigError, match=r"saved scalar .*, wanted hl_gauss"):
        built(HLGaussConfig(), runtime, tmp_path / "scalar")
    with pytest.raises(ConfigError, match="saved heads 1, wanted 2"):
        built(ValueHeadConfig(heads=2), runtime, tmp_path / "scalar")
    trained(HLGaussConfig(lr=1e-2), runtime, tmp_path / "gauss")
    built(HLGaussConfig(sigma=0.05), runtime, tmp_path / "gauss")
    with pytest.raises(ConfigError, match=r"bins 101\), wanted hl_gauss \(.*bins 51\)"):
        built(HLGaussConfig(bins=51), runtime, tmp_path / "gauss")


def reward_model(folder, labels):
    torch.manual_seed(3)
    config = type(CONFIG)(**CONFIG.to_dict() | {"num_labels": labels, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    return model


def test_a_reward_models_score_is_the_first_value(runtime, tmp_path):
    model = reward_model(tmp_path, 1)
    rollouts = rollouts_of(rows()[:1])
    values = asked(built(ValueHeadConfig(), runtime, tmp_path), rollouts).at
    trajectory = rollouts.trajectories[0]
    with torch.no_grad():
        ids = torch.tensor([trajectory.prompt.token_ids + trajectory.response_ids])
        hidden = model.model(input_ids=ids).last_hidden_state
        scores = model.score(hidden)[0, :, 0]
    torch.testing.assert_close(values[0], scores[1:4])


@pytest.mark.parametrize(
    ("labels", "config"),
    [(3, ValueHeadConfig()), (1, HLGaussConfig()), (1, ValueHeadConfig(heads=2))],
)
def test_where_the_score_does_not_fit_only_the_reward_models_trunk_is_taken(
    labels, config, runtime, tmp_path
):
    model = reward_model(tmp_path, labels)
    critic = built(config, runtime, tmp_path)
    values = asked(critic, rollouts_of(rows())).at
    assert values[:, 0].tolist() == pytest.approx([0.4] * 5, abs=1e-5)
    trunk = critic._model.backbone.state_dict()
    assert all(torch.equal(trunk[n], w) for n, w in model.model.state_dict().items())


def test_any_other_model_gives_its_trunk(runtime, tmp_path):
    torch.manual_seed(4)
    model = AutoModel.from_config(CONFIG)
    model.save_pretrained(tmp_path)
    critic = built(HLGaussConfig(), runtime, tmp_path)
    trunk = critic._model.backbone.state_dict()
    assert all(torch.equal(trunk[n], w) for n, w in model.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"hidden_layers": (12, 8)}, {"heads": 2}])
def test_no_gradient_reaches_a_trunk_that_is_shared_and_detached(settings, runtime):
    policy = TokenPolicy(AutoModelForCausalLM.from_config(CONFIG), temperature=1.0, chunk_mb=1.0)
    critic = ValueHeadConfig(trunk="shared", lr=1e-2, **settings).build(bench(runtime, policy))
    before = [p.detach().clone() for p in critic._model.head.parameters()]
    taught(critic, rollouts_of(rows()), 3)
    assert all(p.grad is None for p in policy.parameters())
    after = list(critic._model.head.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def taught_by(algorithm, critic, rollouts, times):
    """The values after some steps towards the targets of an algorithm."""
    for _ in range(times):
        credit = algorithm.credit(rollouts, asked(critic, rollouts))
        critic.update(rollouts, credit.critic_targets)
    return asked(critic, rollouts)


def test_c51_learns_what_the_algorithm_says_of_a_cut_response(runtime):
    cut = rollouts_of([trajectory([3, 5, 6], 0.0, Finish.LENGTH)] * 3)
    after = {}
    for rule in ("terminal", "bootstrap"):
        critic = live(C51Config(lr=1e-2), runtime)
        asked(critic, rollouts_of(rows()))  # the head starts at .4
        ppo = card("ppo", whiten_advantages=False, on_truncation=rule)
        after[rule] = taught_by(ppo, critic, cut, 60).at[0, :3]
    assert float(after["terminal"].max()) < 0.05
    # Nothing is ever seen behind the limit: what the head says there holds itself up.
    assert float(after["bootstrap"].min()) > 0.1


def test_c51_learns_discounted_values(runtime):
    won = rollouts_of([trajectory([3, 5, 6], 1.0)] * 3)
    critic = live(C51Config(lr=1e-2), runtime)
    asked(critic, rollouts_of(rows()))
    ppo = card("ppo", gamma=0.5, whiten_advantages=False)
    values = taught_by(ppo, critic, won, 80)
    assert values.at[0, :3].tolist() == pytest.approx([0.25, 0.5, 1.0], abs=0.05)


def test_c51_has_no_target_network_since_it_would_not_ask_it():
    with pytest.raises(ValueError, match=r"target_tau must be null for c51, found 0\.05"):
        C51Config(target_tau=0.05)


@pytest.mark.parametrize("config", [HLGaussConfig, TwoHotConfig, C51Config])
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_head_whose_first_responses_all_ended_alike_learns_that_others_do_not(
    config, first, runtime
):
    critic = live(config(lr=1e-2), runtime)
    start = asked(critic, rollouts_of([trajectory([3, 5, 6], first)] * 3)).at[0, :3]
    assert start.tolist() == pytest.approx([first] * 3, abs=0.011)
    rollouts = rollouts_of(rows())
    taught(critic, rollouts, 60)
    assert asked(critic, rollouts).at[[0, 1], 1].tolist() == pytest.approx([1.0, 0.0], abs=0.2)
