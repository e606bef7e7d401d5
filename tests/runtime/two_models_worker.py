"""Two language models learn in one run, each with an engine of its own, on however many processes.

Run by tests/runtime/test_two_models.py: `python two_models_worker.py OUTPUT FOLDER`, in the folder the models `policy`
and `second`. In between both are saved and continued in fresh ones.
"""

import sys
from pathlib import Path

import torch
from sharding_worker import GROUP, over_ranks, trajectories

from llmac.algorithms.grpo import GRPO
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.core.protocols import Request, SamplingParams
from llmac.critics.bench import PolicyOrder
from llmac.engines.probe import check_engine_holds
from llmac.models.loading import load_tokenizer
from llmac.new_actor import model_named, new_actor, order_of
from llmac.new_engine import Engines
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Optimization

# A large epsilon: Adam otherwise magnifies rounding of tiny gradients to whole steps.
LEARNS = {"lr": 1e-2, "eps": 1e-3}
CARDS = {
    "policy": GRPO(group_size=GROUP, aggregation="token_mean", kl_coef=0.01),
    "second": GRPO(group_size=GROUP, aggregation="token_mean", entropy_coef=0.01),
}


def recipe_of(folder):
    return load_recipe(
        {
            "model": {"name": str(folder / "policy")},
            "data": {"name": "none.jsonl", "prompt": "{question}"},
            "reward": "none.py:reward",
            "algorithm": CARDS["policy"],
            "actor": {"minibatches": 2, "max_tokens_per_microbatch": 30, **LEARNS},
            "rollout": {"engine": "hf", "max_new_tokens": 8},
            "run": {"steps": 4, "output": "nowhere"},
        }
    )


def learning(recipe, runtime, engines, folder):
    """Both models, as `build` and a critic make them."""
    second = PolicyOrder(
        name="critic",
        model=model_named(recipe.model, str(folder / "second")),
        optimization=Optimization(**LEARNS),
        epochs=1,
        minibatches=2,
        max_tokens_per_microbatch=24,
        packing="trie",
        temperature=0.7,
        optimizer_steps=8,
    )
    orders = {"policy": order_of(recipe), "second": second}
    return {
        name: new_actor(order, recipe, runtime, pad_id=0, before_learning=engines.sleep)[0]
        for name, order in orders.items()
    }


def step(models, runtime):
    """One update of each; the metrics."""
    mine = [t for t in trajectories() if t.group % runtime.world_size == runtime.rank]
    found = {}
    for name, model in models.items():
        card = CARDS[name]
        rollouts = model.annotate(collate(mine, length_limit=8), reference=card.uses_reference)
        metrics = model.update(rollouts, card.credit(rollouts, None, sum_across=runtime.sum), card)
        for metric in ("actor/pg_loss", f"{'actor' if name == 'policy' else 'critic'}/grad_norm"):
            found[f"{name}: {metric}"] = over_ranks(metrics[metric], runtime)
    return found


def whole(models):
    """Weights of both. Collective."""
    return {
        f"{name}: {key}": weight.clone()
        for name, model in models.items()
        for key, weight in model.weights()
    }


def greedy(player):
    params = SamplingParams(temperature=0.0, max_new_tokens=6)
    [[answer]] = player.engine.generate([Request(prompt_ids=(2, 3, 4), params=params)])
    return answer.token_ids, answer.logprobs


def taught(runtime, folder, output):
    recipe = recipe_of(folder)
    engines = Engines(recipe, runtime)
    players = {"policy": engines.of_policy(load_tokenizer(recipe.model), longest=16)}
    models = learning(recipe, runtime, engines, folder)
    # After a model is in shards, as a critic asks for its engine.
    second = model_named(recipe.model, str(folder / "second"))
    players["second"] = engines.of_other(second)
    before = whole(models)

    metrics = [step(models, runtime)]
    for name, model in models.items():
        if runtime.is_main:
            (output.parent / name).mkdir()
        runtime.barrier()
        model.save(output.parent / name)
    runtime.barrier()
    metrics.append(step(models, runtime))
    after = whole(models)

    fresh = learning(recipe, runtime, engines, folder)
    for name, model in fresh.items():
        model.load(output.parent / name)
    assert step(fresh, runtime) == metrics[1]
    again = whole(fresh)
    assert all(torch.equal(again[key], after[key]) for key in after)

    said = {name: greedy(player) for name, player in players.items()}
    players["second"].engine.load_weights(models["second"].weights(), version=1)
    check_engine_holds(players["second"].engine, models["second"].logprobs_of, [(2, 3, 4)])
    assert greedy(players["policy"]) == said["policy"]
    players["policy"].engine.load_weights(models["policy"].weights(), version=2)
    check_engine_holds(players["policy"].engine, models["policy"].logprobs_of, [(2, 3, 4)])
    check_engine_holds(players["second"].engine, models["second"].logprobs_of, [(2, 3, 4)])
    assert all(greedy(player) != said[name] for name, player in players.items())
    engines.close()
    moved = {key: float((after[key] - before[key]).abs().max()) for key in after}
    return {"weights": after, "metrics": metrics, "moved": moved}


def main(output, folder):
    torch.set_num_threads(1)
    runtime = Runtime.create(seed=0, output=None)
    result = taught(runtime, folder, output)
    if runtime.is_main:
        torch.save(result, output)
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
