"""One division, one clip, one step; what cannot be right stops before it changes the weights."""

import math

import pytest
import torch
from torch import nn

from llmac.core.measures import Mean
from llmac.core.types import Loss
from llmac.errors import ConsistencyError
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


def linear(runtime, **optimization):
    torch.manual_seed(0)
    settings = {"lr": 0.1, "eps": 1.0, "max_grad_norm": math.inf, **optimization}
    return Learner(nn.Linear(2, 1), Optimization(**settings), runtime, name="actor", total_steps=10)


def squared_error(module, rows):
    x, y = rows
    error = (module(x).squeeze(-1) - y) ** 2
    weight = torch.tensor(float(len(x)))
    return Loss(
        total=error.sum(),
        weight=weight,
        metrics={"actor/error": Mean(error.sum().detach(), weight)},
    )


X, Y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0, -1.0])


def parts(*sizes):
    return list(zip(X.split(sizes), Y.split(sizes), strict=True))


def test_the_step_follows_the_gradient_of_the_mean(runtime):
    learner = linear(runtime)
    module = learner.trained.inner
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    w, b = (
        module.weight.detach().clone().requires_grad_(),
        module.bias.detach().clone().requires_grad_(),
    )
    gradient = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad((((X @ w.T).squeeze(-1) + b - Y) ** 2).mean(), [w, b])
        ]
    )
    metrics = learner.update(parts(1, 2), squared_error, torch.tensor(3.0))
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    # AdamW's first step: m̂ = g, v̂ = g², so the parameter moves by lr · g / (|g| + eps), eps = 1
    torch.testing.assert_close(after - before, -0.1 * gradient / (gradient.abs() + 1.0))
    assert metrics["actor/grad_norm"].value == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_how_rows_are_cut_into_micro_batches_changes_nothing(runtime):
    steps = []
    for sizes in [(3,), (1, 2), (1, 1, 1)]:
        learner = linear(runtime)
        learner.update(parts(*sizes), squared_error, torch.tensor(3.0))
        steps.append(learner.trained.inner.weight.detach().clone())
    torch.testing.assert_close(steps[0], steps[1])
    torch.testing.assert_close(steps[0], steps[2])


def test_a_loss_that_weighs_something_else_than_announced_stops(runtime):
    with pytest.raises(ConsistencyError, match=r"weigh 3.0 together.*announced with 4.0"):
        linear(runtime).update(parts(3), squared_error, torch.tensor(4.0))


def test_a_gradient_that_is_not_finite_stops_and_leaves_the_weights(runtime):
    learner = linear(runtime)
    before = learner.trained.inner.weight.detach().clone()
    rows = [(X, torch.tensor([1.0, math.inf, 0.0]))]
    with pytest.raises(ConsistencyError, match=r"gradient norm is (inf|nan) at optimizer step 0"):
        learner.update(rows, squared_error, torch.tensor(3.0))
    assert torch.equal(learner.trained.inner.weight, before)


def test_a_minibatch_without_a_single_token_is_counted_and_skipped(runtime):
    learner = linear(runtime)
    before = learner.trained.inner.weight.detach().clone()
    metrics = learner.update([(X[:0], Y[:0])], squared_error, torch.tensor(0.0))
    assert metrics["actor/empty_minibatches"].value == 1
    assert torch.equal(learner.trained.inner.weight, before)
    assert learner.steps == 0


def test_a_restored_learner_continues_bitwise(runtime, tmp_path):
    straight, interrupted = linear(runtime, schedule="linear"), linear(runtime, schedule="linear")
    for _ in range(4):
        straight.update(parts(3), squared_error, torch.tensor(3.0))
    for _ in range(2):
        interrupted.update(parts(3), squared_error, torch.tensor(3.0))
    interrupted.save(tmp_path)
    resumed = linear(runtime, schedule="linear")
    resumed.load(tmp_path)
    for _ in range(2):
        resumed.update(parts(3), squared_error, torch.tensor(3.0))
    assert torch.equal(straight.trained.inner.weight, resumed.trained.inner.weight)
    assert resumed.steps == 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # two warm-up steps to 1, then from 1 to min_lr_ratio = 0.2 over the remaining eight
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 1 - 0.8 * 4 / 8, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.8 * 0.5, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    o = Optimization(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.2)
    assert [o.lr_factor(step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx(expected)


def test_weight_decay_spares_biases(runtime):
    learner = linear(runtime, weight_decay=0.5)
    decays = {
        tuple(g["params"][0].shape): g["weight_decay"]
        for g in learner._optimizer_of(learner.trained.inner).param_groups
    }
    assert decays == {(1, 2): 0.5, (1,): 0.0}


def test_the_engine_sleeps_while_the_policy_looks_and_learns_but_not_for_a_probe(runtime):
    """An engine that discards its weights when it sleeps must sample between an update and its next sleep."""
    naps = []
    learner = Learner(
        nn.Linear(2, 1),
        Optimization(lr=0.1),
        runtime,
        name="actor",
        total_steps=10,
        before_learning=lambda: naps.append("sleep"),
    )
    assert len(learner.look(lambda module, x: module(x), [X, X], beside_engine=True)) == 2
    assert naps == []
    learner.look(lambda module, x: module(x), [X])
    learner.update(parts(3), squared_error, torch.tensor(3.0))
    assert naps == ["sleep", "sleep"]
