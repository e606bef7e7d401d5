"""Every head and ensemble: calm at step 0, learns what it is shown, and is the same after saving."""

import dataclasses
import math

import pytest
import torch

from llmac.core.diagnostics import explained_variance
from llmac.core.ensembles import Combination
from llmac.core.types import CriticTargets, Finish
from llmac.critics import CRITICS
from llmac.critics.distribution_heads import HLGaussConfig, TwoHotConfig
from llmac.critics.head_config import HeadConfig
from llmac.critics.value_head import ValueHeadConfig
from llmac.models.packing import pack
from llmac.models.value_model import ValueModel
from llmac.rewards.loader import resolve
from llmac.runtime.context import Runtime

from .making import asked, live, rollouts_of, rows, taught, trajectory

CARDS = {
    name: card
    for name, card in ((name, resolve(place)) for name, place in CRITICS.items())
    if issubclass(card, HeadConfig)
}
OWN = {
    "outcome_classes": {"rewards": (0.0, 0.5, 1.0)},
    "code_outcomes": {"rewards": (0.0, 0.5, 1.0), "reward_range": (0.0, 1.0)},
    "quantile": {"quantiles": 16},
}
SAFE = {
    "heads": 2,
    "combine": "soft_min",
    "ensemble_loss": "combined",
    "loss": "huber",
    "clip_combine": "mean",
    "layer_norm": True,
    "activation": "gelu",
}
SETTINGS = {name: (name, OWN.get(name, {})) for name in CARDS} | {
    "mlp": ("value_head", {"hidden_layers": (24, 12)}),
    "bounded": ("value_head", {"bounded": True}),
    "popart": ("value_head", {"normalize": "popart"}),
    "running": ("value_head", {"normalize": "running", "value_clip": None}),
    "twins": ("value_head", {"heads": 2, "combine": "min"}),
    "safe": ("value_head", SAFE),
    "three": ("hl_gauss", {"heads": 3, "combine": "min_max"}),
    "target": ("bernoulli", {"target_tau": 0.5}),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def config_of(name, **changes):
    card, settings = SETTINGS[name]
    return CARDS[card](**{"lr": 2e-2} | settings | changes)


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def test_the_collection_is_in_the_registry():
    assert {
        "value_head",
        "bernoulli",
        "hl_gauss",
        "two_hot",
        "c51",
        "quantile",
        "gaussian",
        "outcome_classes",
    } <= set(CARDS)


@every_setting
def test_explained_variance_is_zero_before_anything_is_learned(name, runtime):
    rollouts = rollouts_of(rows())
    values = asked(live(config_of(name), runtime), rollouts).at
    assert values[rollouts.action_mask].tolist() == pytest.approx([0.4] * 13, abs=2e-6)
    returns = rollouts.rewards.sum(1, keepdim=True).expand_as(values)
    found = float(explained_variance(values, returns, rollouts.action_mask))
    assert found == pytest.approx(0.0, abs=1e-5)


# code_outcomes judges whole responses: it has no values of states.
@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "code_outcomes"])
def test_it_learns_that_the_first_token_decides(name, runtime):
    rollouts = rollouts_of(rows())
    critic = live(config_of(name), runtime)
    first = taught(critic, rollouts, 1)
    metrics = taught(critic, rollouts, 39)
    values = asked(critic, rollouts).at
    # Before the first token nothing is known; after it everything is.
    assert values[:, 0].tolist() == pytest.approx([0.4] * 5, abs=0.15)
    assert values[0, 1:3].tolist() == pytest.approx([1.0, 1.0], abs=0.15)
    assert values[4, 1:3].tolist() == pytest.approx([0.0, 0.0], abs=0.15)
    assert metrics["critic/vf_loss"].value < first["critic/vf_loss"].value


@every_setting
def test_a_saved_critic_says_the_same_in_another_run(name, runtime, tmp_path):
    config = config_of(name)
    rollouts = rollouts_of(rows())
    critic = live(config, runtime)
    taught(critic, rollouts, 3)
    critic.save(tmp_path)
    again = live(config, runtime)
    again.load(tmp_path)
    assert torch.equal(asked(again, rollouts).at, asked(critic, rollouts).at)
    taught(critic, rollouts, 1)
    taught(again, rollouts, 1)
    assert torch.equal(asked(again, rollouts).at, asked(critic, rollouts).at)

    critic.save_pretrained(tmp_path / "model", policy=tmp_path)
    loaded = ValueModel.from_pretrained(tmp_path / "model")
    assert loaded.spec == critic._model.spec
    packed = pack(rollouts.trajectories, pad_id=0)
    with torch.no_grad():
        assert torch.equal(loaded(packed), critic._model(packed))


@every_setting
def test_values_of_a_bfloat16_model_are_decoded_in_float32(name, runtime):
    rollouts = rollouts_of(rows())
    critic = live(config_of(name), runtime, dtype=torch.bfloat16)
    torch.nn.Module.to(critic._model, torch.bfloat16)  # ZeRO casts the head as well
    values = asked(critic, rollouts).at
    # bfloat16's nearest to .4 is .40039, and rounded centres are off by more.
    assert values[rollouts.action_mask].tolist() == pytest.approx([0.4] * 13, abs=2e-6)


@every_setting
def test_the_value_does_not_see_the_action(name, runtime):
    critic = live(config_of(name), runtime)
    taught(critic, rollouts_of(rows()), 2)
    one = asked(critic, rollouts_of([trajectory([3, 5, 6, 7], 1.0)])).at[0]
    other = asked(critic, rollouts_of([trajectory([3, 5, 9, 2], 0.0)])).at[0]
    torch.testing.assert_close(one[:3], other[:3])
    assert one[3] != other[3]


@every_setting
def test_micro_batches_do_not_change_what_is_learned(name, runtime):
    rollouts = rollouts_of(rows())
    whole = live(config_of(name), runtime)
    parts = live(config_of(name), runtime, max_tokens_per_microbatch=1)
    metrics = [taught(critic, rollouts, 2) for critic in (whole, parts)]
    torch.testing.assert_close(
        asked(parts, rollouts).at, asked(whole, rollouts).at, rtol=1e-4, atol=1e-4
    )
    assert metrics[1].keys() == metrics[0].keys()
    for key in metrics[0]:
        assert metrics[1][key].value == pytest.approx(metrics[0][key].value, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("combine", ["mean", "min", "soft_min", "min_max"])
@pytest.mark.parametrize("card", [ValueHeadConfig, HLGaussConfig])
def test_the_heads_of_an_ensemble_agree_at_first_and_then_differ(card, combine, runtime):
    rollouts = rollouts_of(rows())
    critic = live(card(lr=1e-2, heads=3, combine=combine), runtime)
    assert taught(critic, rollouts, 1)["critic/values/spread"].value == pytest.approx(0, abs=1e-5)
    assert taught(critic, rollouts, 3)["critic/values/spread"].value > 1e-3
    with torch.no_grad():
        packed = pack(rollouts.trajectories, pad_id=0)
        raw = critic._model(packed, raw=True)
        each = critic._model.spec.head.decode(raw)
        values = critic._model(packed)
    assert raw.shape[:3] == (5, 5, 3)
    assert torch.equal(values, Combination(how=combine)(each))


def test_twins_that_learn_by_their_one_value_have_its_loss(runtime):
    rollouts = rollouts_of(rows())
    together = live(config_of("safe"), runtime)
    metrics = taught(together, rollouts, 1)
    # All values are .4 and nothing has moved: .5 · e² per token, e = .6 at 7 tokens and .4 at 6 tokens; Huber(.5)
    # is linear beyond .5: .5 · (.6 - .25) = .175 and .08.
    assert metrics["critic/vf_loss"].value == pytest.approx((7 * 0.175 + 6 * 0.08) / 13, abs=1e-5)
    assert metrics["critic/vf_clipfrac"].value == 0.0


@pytest.mark.parametrize(
    ("together", "expected", "weights"),
    [
        # V = .197428: ½ · V² = .019489, pulled at by the soft minimum's weights
        ("combined", 0.019489, [0.034445 * 0.197428, 0.965555 * 0.197428]),
        # (½ · 1 + 0) / 2, each pulled to the return by itself
        ("each", 0.25, [0.5, 0.0]),
    ],
)
def test_twins_learn_by_their_one_value_or_each_by_its_own(together, expected, weights, runtime):
    settings = {"heads": 2, "combine": "soft_min", "ensemble_loss": together, "value_clip": None}
    critic = live(ValueHeadConfig(**settings), runtime)
    raw = torch.tensor([1.0, 0.0]).expand(1, 2, 2)[..., None].clone().requires_grad_()
    mask, nothing = torch.tensor([[True]]), torch.zeros(1, 1)
    targets = CriticTargets(returns=nothing, value_mask=mask, old_values=nothing)
    loss = critic._loss(raw, rollouts_of([trajectory([3], 0.0)]), targets)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(expected, abs=1e-5)
    assert raw.grad[0, 0, :, 0].tolist() == pytest.approx(weights, abs=1e-5)
    assert loss.metrics["critic/values/spread"].value == 1.0


def test_returns_outside_of_the_support_are_counted(runtime):
    rollouts = rollouts_of(rows(high=3.0))
    metrics = taught(live(TwoHotConfig(), runtime), rollouts, 1)
    assert metrics["critic/vf_target_clipfrac"].value == pytest.approx(7 / 13)
    wide = live(TwoHotConfig(reward_range=(0.0, 3.0)), runtime)
    assert taught(wide, rollouts, 1)["critic/vf_target_clipfrac"].value == 0.0


def test_scales_are_fractions_of_the_reward_range():
    wide = {"reward_range": (-2.0, 2.0)}
    assert CARDS["quantile"](kappa=0.5, **wide).head().kappa == 2.0
    gaussian = CARDS["gaussian"](reach=0.25, **wide).head()
    assert (gaussian.smallest_deviation, gaussian.reach) == pytest.approx((0.2, 1.0))


def test_the_default_support_of_hl_gauss_is_the_recipe_at_any_scale():
    head = HLGaussConfig().head()
    assert (head.low, head.high, head.bins) == (pytest.approx(-0.1), pytest.approx(1.1), 101)
    assert head.sigma == pytest.approx(0.024)
    head = HLGaussConfig(reward_range=(-1.0, 1.0)).head()
    assert (head.low, head.high, head.sigma) == pytest.approx((-1.2, 1.2, 0.048))


@pytest.mark.parametrize(
    ("card", "settings", "message"),
    [
        ("hl_gauss", {"bins": 1}, "bins must be at least 2, found 1"),
        ("hl_gauss", {"sigma": 0.0}, "sigma must be positive"),
        ("hl_gauss", {"sigma": math.inf}, "sigma must be finite, found inf"),
        ("hl_gauss", {"sigma": 1.3}, "at most the width of the support, 1.2"),
        ("hl_gauss", {"support": (0.0, math.inf)}, "support must be"),
        ("two_hot", {"support": (math.nan, 1.0)}, "support must be"),
        ("c51", {"reward_range": (0.0, math.inf)}, "reward_range must be"),
        ("quantile", {"reward_range": (-math.inf, 1.0)}, "reward_range must be"),
        ("quantile", {"kappa": math.inf}, "kappa must be finite"),
        ("gaussian", {"reach": math.nan}, "reach must be finite"),
        ("outcome_classes", {"rewards": (0.0, math.inf)}, "rewards must be finite"),
        ("value_head", {"huber_delta": math.inf}, "huber_delta must be finite"),
        ("value_head", {"lr": -1.0}, "lr must be finite and above 0"),
        ("hl_gauss", {"support": (1.0, -1.0)}, "support must be"),
        ("hl_gauss", {"support": (0.0, 0.5)}, "support must cover reward_range"),
        ("two_hot", {"reward_range": (0.0, 2.0), "support": (0.0, 1.0)}, "must cover"),
        ("c51", {"reward_range": (1.0, 2.0)}, "must contain 0"),
        ("c51", {"lam": 1.5}, r"lam must lie in \[0, 1\], found 1.5"),
        ("quantile", {"quantiles": 1}, "quantiles must be at least 2"),
        ("quantile", {"kappa": -1.0}, "kappa must not be negative"),
        ("gaussian", {"smallest_deviation": 0.0}, "smallest_deviation must lie"),
        ("gaussian", {"pessimism": -1.0}, "pessimism must not be negative"),
        ("gaussian", {"reach": 0.0}, "reach must be positive"),
        ("outcome_classes", {"rewards": (1.0,)}, "rewards must be at least two"),
        ("outcome_classes", {"rewards": (0.0, 1.0, 1.0)}, "rewards must ascend"),
        ("outcome_classes", {"reward_range": (-2.0, 1.0)}, "rewards must cover reward_range"),
        ("bernoulli", {"reward_range": (1.0, 0.0)}, "reward_range must be"),
        ("value_head", {"combine": "min"}, "needs several heads to combine, found heads: 1"),
        ("value_head", {"heads": 0}, "heads must be at least 1"),
        ("value_head", {"heads": 2, "hidden_layers": ()}, "same head 2 times"),
        ("value_head", {"hidden_layers": (0,)}, "hidden_layers must be widths"),
        ("value_head", {"soft_min_temperature": 0.0}, "soft_min_temperature must be positive"),
        ("value_head", {"min_weight": 1.5}, "min_weight must lie"),
        ("value_head", {"target_tau": 0.0}, "target_tau must be above 0"),
        ("value_head", {"minibatches": 0}, "minibatches must be at least 1"),
        ("value_head", {"huber_delta": 0.0}, "huber_delta must be positive"),
        ("value_head", {"bounded": True, "normalize": "popart"}, "take one of the two"),
        (
            "value_head",
            {"target_tau": 0.1, "trunk": "shared", "detach_trunk": False},
            "would copy the policy's trunk",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(card, settings, message):
    with pytest.raises(ValueError, match=message):
        CARDS[card](**settings)


def test_fields_that_do_nothing_are_named():
    plain = ValueHeadConfig().without_effect()
    assert {
        "detach_trunk",
        "soft_min_temperature",
        "min_weight",
        "activation",
        "huber_delta",
        "ensemble_loss",
    } == set(plain)
    assert "value_clip" in ValueHeadConfig(heads=2).without_effect()
    assert "value_clip" not in config_of("safe").without_effect()
    assert "soft_min_temperature" not in config_of("safe").without_effect()
    for card in CARDS.values():
        names = {field.name for field in dataclasses.fields(card)}
        assert set(card().without_effect()) <= names


def unfinished():
    return rollouts_of([trajectory([3, 5, 6], None, Finish.PAUSED)])


@pytest.mark.parametrize("name", ["value_head", "hl_gauss", "target"])
def test_a_critic_saved_before_anything_ended_still_starts_at_the_mean(name, runtime, tmp_path):
    critic = live(config_of(name), runtime)
    asked(critic, unfinished())
    critic.save(tmp_path)
    again = live(config_of(name), runtime, fresh=False)
    again.load(tmp_path)
    rollouts = rollouts_of(rows())
    values = asked(again, rollouts)
    assert torch.equal(values.at, asked(critic, rollouts).at)
    assert float(values.at[0, 0]) == pytest.approx(0.4, abs=1e-3)
    # Once it has started it does not start again.
    again.save(tmp_path)
    third = live(config_of(name), runtime)
    third.load(tmp_path)
    won = rollouts_of([trajectory([3, 5, 6], 1.0)])
    assert float(asked(third, won).at[0, 0]) == pytest.approx(0.4, abs=1e-3)


def test_a_checkpoint_that_does_not_say_whether_the_head_started_is_of_one_that_did(
    runtime, tmp_path
):
    critic = live(config_of("value_head"), runtime)
    critic.save(tmp_path)
    state = torch.load(tmp_path / "critic.pt", weights_only=True)
    del state["fresh"]
    torch.save(state, tmp_path / "critic.pt")
    critic.load(tmp_path)
    assert asked(critic, rollouts_of(rows())).at[0].tolist() == [0.0, 0.0, 0.0, 0.0]
